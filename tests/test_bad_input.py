"""Bad input, one table: refused with one line that names it, exit code 2, and nothing has changed.

Below it what is accepted, as the library's encoder and the harness take it, and what is warned of.
"""
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import report_tools
import torch
from tools import (
    ROOT,
    SIZES,
    SOAK,
    TODAY,
    by_the_library,
    encoder_only,
    options,
    rewrite,
    weights_of,
    write_filimdb,
)
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

import evaluate
import files
import helpers
import parameters
import report
import runtime

EVALUATE = ["--data", "PLACE/data", "--model", "PLACE/bert", "--out", "PLACE/out/preds.tsv"]
Row = namedtuple("Row", "name make argv words")  # argv goes behind EVALUATE; a later option wins


def remove(name):
    return lambda place: os.remove(str(place / name))


def write(name, content):
    content = content.encode() if isinstance(content, str) else content
    return lambda place: (place / name).write_bytes(content)


def folder(name):
    """Put a folder where a file should be."""
    def make(place):
        if (place / name).exists():
            os.remove(str(place / name))
        (place / name).mkdir()
    return make


def rows(*table):
    """Return the rows of mistakes that are made in files: (name, make, words)."""
    return [Row(name, make, [], words) for name, make, words in table]


# ---- the data ----------------------------------------------------------------------------------

DATA = rows(
    ("labels without texts", remove("data/dev.texts"), ["dev.texts: no such file", "make data"]),
    ("no training texts", remove("data/train.texts"), ["train.texts: no such file"]),
    ("no train", lambda place: [remove("data/train." + end)(place) for end in ("texts", "labels")],
     ["data/train.texts: no such file", "needed here", "make data"]),
    ("no part at all", lambda place: [path.unlink() for path in place.glob("data/*.*s")],
     ["data: holds none of train, dev", "make data"]),
    ("no training labels", remove("data/train.labels"), ["train.labels: missing", "neg or pos"]),
    ("a label too few", write("data/train.labels", "pos\n" * 47),
     ["train.labels: 47 labels for the 48 texts", "as many"]),
    ("a label too many", write("data/dev.labels", "pos\n" * 13),
     ["dev.labels: 13 labels for the 12 texts", "as many"]),
    ("a foreign label", write("data/dev.labels", "pos\n" * 11 + "good\n"),
     ["dev.labels: line 12 is 'good'", "neg and pos"]),
    ("an upper-case label", write("data/dev.labels", "neg\n Pos \n" + "neg\n" * 10),
     ["dev.labels: line 2 is 'Pos'", "neg and pos"]),
    ("a label that is a number", write("data/dev.labels", "1\n" * 12), ["line 1 is '1'"]),
    ("an empty label", write("data/dev.labels", "pos\n\n" + "neg\n" * 10), ["line 2 is ''"]),
    ("three classes", write("data/train.labels", "pos\nneg\nneutral\n" * 16),
     ["train.labels: line 3 is 'neutral'", "neg and pos"]),
    ("one class", write("data/train.labels", "pos\n" * 48),
     ["train.labels: holds pos alone", "neg and pos"]),
    ("an empty file", write("data/test.texts", ""), ["test.texts: empty", "one entry a line"]),
    ("a blank file", write("data/test.texts", " \n\n\x85"), ["test.texts: empty"]),
    ("empty labels", write("data/dev.labels", "\n"), ["dev.labels: empty"]),
    ("no unlabeled texts", write("data/train_unlabeled.texts", ""), ["train_unlabeled", "empty"]),
    ("no UTF-8", write("data/dev.texts", b"good\nb\xff\n"), ["dev.texts", "byte 6", "as UTF-8"]),
    ("UTF-16", write("data/dev.texts", "good\n".encode("utf-16")), ["dev.texts: not UTF-8 at"]),
    ("texts are a folder", folder("data/dev.texts"), ["dev.texts: cannot be read", "a text file"]),
    ("labels are a folder", folder("data/dev.labels"), ["dev.labels: cannot be read"]))

# ---- the model ---------------------------------------------------------------------------------


def spoil(change):
    """Change the tiny BERT: give a function of its folder."""
    return lambda place: change(str(place / "bert"))


def truncate(size):
    def make(place):
        with open(str(place / "bert" / "pytorch_model.bin"), "r+b") as file:
            file.truncate(size)
    return make


def words_of(change):
    """Write vocab.txt anew: give a function of the list of its tokens."""
    def make(place):
        path = place / "bert" / "vocab.txt"
        tokens = change(path.read_text(encoding="utf-8").split("\n")[:-1])
        path.write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
    return make


def capitalize(tokens):
    return [p.capitalize() if p.isalpha() and len(p) > 3 else p for p in tokens]


def distil(bert):
    """DistilBERT's keys: transformers would make up every weight, and say so in a log alone."""
    rewrite(bert, model_type="distilbert", state={
        key.replace("bert.", "distilbert.", 1).replace("attention.self", "attention"): value
        for key, value in weights_of(bert).items()})


def renamed(start):
    """Save the weights under names that begin so."""
    return spoil(lambda bert: rewrite(bert, state={
        start + key: value for key, value in weights_of(bert).items()}))


def whole_model(bert):
    config = BertConfig.from_pretrained(bert)
    torch.save(BertForSequenceClassification(config), os.path.join(bert, "pytorch_model.bin"),
               **runtime.LEGACY_FORMAT)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 440473133\n" % ("0a" * 32)


def instead_of_weights(name):
    return lambda bert: os.rename(os.path.join(bert, "pytorch_model.bin"),
                                  os.path.join(bert, name))


def of_the_hubs_cache(bert):
    os.rename(bert, bert + "-moved")
    for name in "blobs", "refs", "snapshots":
        os.makedirs(os.path.join(bert, name))
    os.rename(bert + "-moved", os.path.join(bert, "snapshots", "abc"))


def marked(name):
    """Write a byte-order mark in front of a file."""
    def make(bert):
        with open(os.path.join(bert, name), "r+b") as file:
            content = file.read()
            file.seek(0)
            file.write(b"\xef\xbb\xbf" + content)
    return make


def add_tokens(bert):
    """Add a token as the library does, in the embeddings too."""
    state = weights_of(bert)
    for key, value in state.items():
        if value.dim() and len(value) == 214:
            state[key] = torch.cat([value, value[:1]])
    rewrite(bert, state=state, vocab_size=215)
    files.save_json(os.path.join(bert, "added_tokens.json"), {"[MOVIE]": 214})


def other_tokenizer_json(bert):
    """Have vocab.txt corrected, and tokenizer.json, which today's stack prefers, left as it was."""
    tokenizer = BertTokenizer.from_pretrained(bert, do_lower_case=True)
    path = os.path.join(bert, "vocab.txt")
    if TODAY:
        tokenizer.backend_tokenizer.save(os.path.join(bert, "tokenizer.json"))
    else:  # which does not read it
        return os.remove(path)
    with open(path, "r+", encoding="utf-8") as file:
        words = file.read().split("\n")
        file.seek(0)
        file.write("\n".join(words[:5] + words[6:7] + words[5:6] + words[7:]))


ADVICE = ["PLACE/bert", "give a folder with config.json, vocab.txt and pytorch_model.bin"]
MODELS = rows(
    ("an empty folder", spoil(lambda bert: [shutil.rmtree(bert), os.mkdir(bert)]),
     ["PLACE/bert is an empty folder", "fill it, or remove it to have the hub's model"]),
    ("no config", remove("bert/config.json"), ["could not be loaded", *ADVICE]),
    ("no weights", remove("bert/pytorch_model.bin"), ["weights could not be loaded", *ADVICE]),
    ("no vocabulary", remove("bert/vocab.txt"), ["PLACE/bert", "vocab"]),
    ("a config that is no JSON", write("bert/config.json", "{"),
     ["config.json could not be loaded", *ADVICE]),
    ("a config of another kind", write("bert/config.json", "[1]"), ["PLACE/bert"]),
    *((f"weights cut to {size} bytes", truncate(size), ["weights could not be loaded", *ADVICE])
      for size in (0, 100, 9000, 100000)),
    ("weights of other shapes", spoil(lambda bert: rewrite(bert, intermediate_size=48)),
     ["weights could not be loaded", "other shapes" if TODAY else "size mismatch", *ADVICE]),
    ("weights that lack a layer",
     spoil(lambda bert: encoder_only(bert, "bert.encoder.layer.1.output")),
     ["lack 4 tensors", "encoder.layer.1.output", "give a whole BERT"]),
    ("another architecture", spoil(distil), ['model_type: "distilbert"; only "bert" is']),
    ("another architecture that is called bert", spoil(lambda bert: [
        distil(bert), rewrite(bert, model_type="bert")]), ["lack", "give a whole BERT"]),
    ("weights of a parallel model", renamed("module."), ["begin with 'module.'", "key[7:]"]),
    ("weights within a model", renamed("model."), ["begin with 'model.'", "key[6:]"]),
    ("a dict around the weights", spoil(lambda bert: rewrite(
        bert, state={"epoch": 3, "state_dict": weights_of(bert)})),
     ["holds them in a dict, under 'state_dict'", "torch.save(torch.load(FILE)['state_dict']"]),
    ("a whole pickled model", spoil(whole_model),
     ["weights could not be loaded: pytorch_model.bin holds a whole pickled model",
      "torch.save(model.state_dict()"]),
    *((f"{name} by Git LFS", write("bert/" + name, LFS),
       [f"its {name} is a Git LFS pointer", "git lfs pull"])
      for name in ("pytorch_model.bin", "model.safetensors", "vocab.txt", "config.json")),
    ("a web page for the weights", write("bert/pytorch_model.bin", "<!DOCTYPE html><html>404"),
     ["its pytorch_model.bin is a web page", "download the file"]),
    *((f"weights in {name}", spoil(instead_of_weights(name)),
       [f"holds {whose} weights only ({name})", "give the same model's PyTorch weights"])
      for name, whose in [("tf_model.h5", "TensorFlow's"), ("flax_model.msgpack", "Flax's"),
                          ("bert_model.ckpt.index", "TensorFlow's"), ("model.onnx", "ONNX's"),
                          ("adapter_config.json", "an adapter's")]),
    *([] if TODAY else [("weights in model.safetensors", spoil(
        instead_of_weights("model.safetensors")), ["holds model.safetensors only, which",
                                                   "2.1.1 cannot read; give pytorch_model.bin"])]),
    ("a folder of the hub's cache", spoil(of_the_hubs_cache),
     ["a folder of the hub's cache; give the one in it", "PLACE/bert/snapshots/abc"]),
    *((f"a byte-order mark in {name}", spoil(marked(name)),
       [f"its {name} begins with a byte-order mark; save it as UTF-8 without"])
      for name in ("vocab.txt", "config.json")),
    ("added tokens", spoil(add_tokens), ["tokens were added to its tokenizer ([MOVIE])",
                                         "give the model as it was before"]),
    ("no [MASK]", words_of(lambda tokens: [p.replace("[MASK]", "[MISK]") for p in tokens]),
     ["its vocabulary lacks [MASK]; is vocab.txt there"]),
    ("a tokenizer.json of another model", spoil(other_tokenizer_json), [
        "its tokenizer.json and vocab.txt hold different vocabularies" if TODAY else "PLACE"]),
    *((f"a tokenizer that says {key}", write("bert/tokenizer_config.json", '{"%s": %s}' % (
        key, value)), [f"tokenizer_config.json says {key}: {value}; only "])
      for key, value in [("do_basic_tokenize", "false"), ("never_split", '["great"]'),
                         *([] if TODAY else [("strip_accents", "false")])]),
    ("a decoder", spoil(lambda bert: rewrite(bert, is_decoder=True)),
     ["config.json says is_decoder: true; only false is supported"]),
    ("a token too few", words_of(lambda tokens: tokens[:-1]), ["has 213 entries", "214", "vocab"]),
    ("a token too many", words_of(lambda tokens: tokens + ["zzz"]), ["has 215 entries", "214"]),
    ("the last token twice", words_of(lambda tokens: tokens + tokens[-1:]), ["vocabulary", "214"]),
    ("a token twice", words_of(lambda tokens: tokens[:-1] + tokens[-2:-1]), ["PLACE/bert", "vocab"]),
    ("an empty vocabulary", words_of(lambda tokens: []), ["PLACE/bert", "vocab"]),
    ("a cased vocabulary", words_of(capitalize), ["PLACE/bert", "cased", "use an uncased BERT"])
) + [Row("model " + name, None, ["--model", name], [repr(name), *words]) for name, words in [
    ("PLACE/none", ["no such folder", "vocab.txt"]), ("./no/bert", ["no such folder"]),
    ("models/bert/tiny", ["no such folder"]), ("PLACE/data/dev.texts", ["no such folder"]),
    ("no-such-bert", ["config.json could not be loaded", "--model or BERT_MODEL"]),
    ("no-such-user/no-such-bert", ["config.json could not be loaded", "--model or BERT_MODEL"])]]

# ---- the parameters ----------------------------------------------------------------------------

SETTINGS = [Row("--set " + setting, None, ["--set", setting], words) for setting, words in [
    ("lrr=1", ["'lrr'", "did you mean lr?"]), ("foo=1", ["'foo'", "one of"]), ("=1", ["''"]),
    ("lr", ["--set lr", "KEY=VALUE"]), ("foo.lr=1", ["--set foo.lr=1", "pretrain.KEY"]),
    ("a.pretrain.lr=1", ["--set a.pretrain.lr=1"]),
    ("lr=0", ["lr=0", "more than 0"]), ("lr=-1", ["lr=-1", "more than 0"]),
    ("lr=nan", ["lr='nan'", "float"]), ("lr=1e999", ["lr=inf", "finite"]),
    ("lr=fast", ["lr='fast'", "float", "str"]), ("lr=", ["lr=''"]), ("lr='1'", ["lr='1'"]),
    ("lr=[1", ["lr='[1'"]), ("lr=None", ["lr=None"]), ("lr=True", ["lr=True"]),
    ("seq_len=0", ["seq_len=0", "3 or more"]), ("seq_len=2", ["seq_len=2", "3 or more"]),
    ("seq_len=513", ["seq_len=513", "512 positions"]), ("seq_len=64.0", ["seq_len=64.0", "int"]),
    ("pretrain.seq_len=513", ["pretrain.seq_len=513", "512 positions"]),
    ("words=-1", ["words=-1", "0 or more"]), ("words=1.5", ["words=1.5", "int"]),
    ("batch_size=0", ["batch_size=0", "1 or more"]), ("epochs=0", ["epochs=0", "1 or more"]),
    ("accumulation=0", ["accumulation=0", "1 or more"]),
    ("warmup=1", ["warmup=1.0", "a share of all steps", "below 1"]),
    ("warmup=1000", ["warmup=1000.0", "a share of all steps", "below 1"]),
    ("keep=middle", ["keep='middle'", "head, tail or head+tail"]),
    ("device=abacus", ["device='abacus'", "device='cpu'"]), ("max_minutes=-1", ["max_minutes=-1"]),
    ("freeze=True", ["--set freeze=True: for pretrain only", "write pretrain.freeze=True"]),
    ("whole_word=True", ["for pretrain only", "write pretrain.whole_word=True"]),
    ("pretrain.lr=0", ["lr=0", "more than 0"]), ("pretrain.epochs=0", ["epochs=0", "1 or more"]),
    ("pretrain.x=1", ["'x'"]), ("model=/no/such/bert", ["/no/such/bert", "no such folder"])]]
SETTINGS = [row if "model" not in row.argv[1] else row._replace(  # --model would win
    argv=[*row.argv, "--model", "/no/such/bert"]) for row in SETTINGS]

# ---- the command line --------------------------------------------------------------------------

LINES = [Row(name, make, argv, words) for name, make, argv, words in [
    ("no such option", None, ["--dataa", "x"], ["--dataa", "--help"]),
    ("an option without its value", None, ["--data"], ["--data", "expected one argument"]),
    ("a word too many", None, ["more"], ["more", "--help"]),
    ("no data folder", None, ["--data", "PLACE/none"], ["PLACE/none: no such folder", "make data"]),
    ("a file for a folder", None, ["--data", "PLACE/data/dev.texts"], ["no such folder"]),
    ("no name for the data", None, ["--data", ""], [": no such folder"]),
    ("a name of two lines", None, ["--data", "no\nfolder"], ["no folder: no such folder"]),
    ("an output that is a folder", folder("out/preds.tsv"), [],
     ["--out PLACE/out/preds.tsv", "name another"]),
    ("an output in no folder", None, ["--out", "PLACE/none/p.tsv"], ["--out PLACE/none/p.tsv"]),
    ("an output below a file", None, ["--out", "PLACE/data/dev.texts/p.tsv"], ["dev.texts/p.tsv"]),
    ("an output without name", None, ["--out", ""], ["--out :", "name another"]),
    ("a pipe", lambda place: os.mkfifo(str(place / "pipe")), ["--out", "PLACE/pipe"],
     ["--out PLACE/pipe", "name another"])]]


def taken(name):
    """Put something that is no classifier of ours at a name."""
    return lambda place: [(place / name).mkdir(), (place / name / "thesis.txt").write_text("years")]


SAVING = [Row(name, make, argv, words) for name, make, argv, words in [
    ("--save over a folder", taken("out/c"), ["--save", "PLACE/out/c"],
     ["PLACE/out/c: is there already", "name another"]),
    ("--save over a model", None, ["--save", "PLACE/bert"], ["PLACE/bert: is there already"]),
    ("--save over a file", write("out/c", "x"), ["--save", "PLACE/out/c"], ["is there already"]),
    ("--save in no folder", None, ["--save", "PLACE/none/c"], ["PLACE/none/c: not a place"]),
    ("--save without name", None, ["--save", ""], [": not a place"]),
    ("--save over another output", folder("out/c"),
     ["--save", "PLACE/out/c", "--json", "PLACE/out/c/run.json"],
     ["out/c/run.json: lies in PLACE/out/c, which --save replaces whole"]),
    ("--transductive without pretraining", None, ["--no-pretrain", "--transductive"],
     ["--transductive is of pretraining", "leave out one of the two"]),
    ("--load and what trains", None, ["--load", "PLACE/bert"],
     ["--load trains nothing", "--model", "--set batch_size", "--set pretrain.lr"])]]
TABLE = {row.name: row for row in DATA + MODELS + SETTINGS + LINES + SAVING}

# ---- the table, on evaluate.py -----------------------------------------------------------------


@pytest.fixture(scope="module")
def sound(tiny_bert, tmp_path_factory):
    """A folder with reviews, a model, an empty output folder and an empty cache."""
    place = tmp_path_factory.mktemp("sound")
    (place / "data").mkdir()
    write_filimdb(place / "data", words=20)
    shutil.copytree(tiny_bert, str(place / "bert"))
    for name in "out", "cache":
        (place / name).mkdir()
    return place


@pytest.fixture
def place(sound, tmp_path, monkeypatch):
    """A copy of the sound folder, to be spoilt, with a cache of its own."""
    copy = Path(shutil.copytree(str(sound), str(tmp_path / "place")))
    monkeypatch.setenv("FILIMDB_CACHE", str(copy / "cache"))
    return copy


def listing(place):
    """Return {path: checksum, or kind} of everything below a folder."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file()
            else "folder" if path.is_dir() else "other" for path in place.rglob("*")}


def command(row, place):
    """Make the mistake; return the arguments that meet it."""
    if row.make:
        row.make(place)
    return [word.replace("PLACE", str(place)) for word in [*EVALUATE, *options(), *row.argv]]


def check(row, place, code, error, before, program="evaluate.py"):
    """Check what a refusal promises."""
    assert code == 2 and error.startswith(program + ": "), error
    assert error.endswith("\n") and error.count("\n") == 1 and "Traceback" not in error, error
    for word in row.words:
        assert word.replace("PLACE", str(place)) in error, error
    assert not re.search("(?i)weights.only.*(False|option)|[\x00-\x09\x1b\x7f]", error), error
    assert listing(place) == before, error


@pytest.fixture
def no_network(monkeypatch):
    """Transformers 2.1 has no HF_HUB_OFFLINE; whatever it asks, there is no network."""
    if not TODAY:
        from transformers import file_utils

        def unreachable(*args, **kwargs):
            raise file_utils.requests.exceptions.ConnectionError("no network")
        for name in "head", "get":
            monkeypatch.setattr(file_utils.requests, name, unreachable)


@pytest.mark.parametrize("name", TABLE)
def test_bad_input_is_refused_in_one_line(name, place, capsys, no_network):
    row = TABLE[name]
    argv, before = command(row, place), listing(place)
    check(row, place, evaluate.main(argv), capsys.readouterr().err, before)


def run(argv, **environment):
    """Run a command as a process: (exit code, stderr)."""
    done = subprocess.run([sys.executable, *argv], env=dict(os.environ, **environment),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=300)
    return done.returncode, done.stderr.decode("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights cut to 9000 bytes", "no such option"])
def test_a_process_refuses_as_main_does(name, place):
    argv, before = command(TABLE[name], place), listing(place)
    code, error = run([str(ROOT / "evaluate.py"), *argv])
    check(TABLE[name], place, code, error, before)


def test_no_message_reaches_a_terminal_with_escapes(tmp_path, capsys):
    for name in "\x1b[31mred", "a\x07b", "\x1b]0;title\x07", "two\nlines", "\x9b1m":
        said = str(files.InputError(f"{name}: no such file"))
        files.warn(f"{name}: dropped")
        for text in said, capsys.readouterr().out[:-1], files.one_line(OSError(name)):
            assert text.isprintable(), text
    assert files.one_line(OSError("\x1b[1mdo so\x1b[0m  now")) == "OSError: do so now"


def test_torchs_advice_is_not_repeated():
    said = files.one_line(ValueError("Weights only load failed. Re-running `torch.load` with "
                                       "`weights_only` set to `False` will likely succeed"))
    assert said == "ValueError: the file is damaged, or holds more than tensors"


# ---- a hub that answers something else ---------------------------------------------------------

PAGE = b"<html><body>Please log in to the network</body></html>"
ANSWERS = {"a page": lambda path: (200, PAGE),
           "a page for the weights": lambda path: (
               200, (ROOT / "data" / "sample" / "bert" / "config.json").read_bytes()
               if path.endswith("config.json") else PAGE)}


@pytest.fixture
def hub():
    """Start a hub on this computer: hub(answer) gives its address."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802 - the library's name
                status, body = answer(self.path)
                self.send_response(status)
                for key, value in {"Content-Length": len(body), "ETag": '"1"',
                                   "X-Repo-Commit": "0" * 40}.items():
                    self.send_header(key, str(value))
                self.end_headers()
                self.wfile.write(body if self.command == "GET" else b"")

            do_HEAD = do_POST = do_GET  # noqa: N815

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return "http://127.0.0.1:%d" % servers[-1].server_port

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not TODAY, reason="transformers 2.1 asks servers that are gone")
@pytest.mark.parametrize("kind", ANSWERS)
def test_a_hub_that_answers_no_model(kind, place, hub, tmp_path):
    row = Row("", None, ["--model", "some/bert", "--no-pretrain"],
              ["'some/bert'", "could not be loaded", "give a folder with config.json"])
    argv, before = command(row, place), listing(place)
    code, error = run([str(ROOT / "evaluate.py"), *argv], HF_ENDPOINT=hub(ANSWERS[kind]),
                      HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "hub"), NO_PROXY="127.0.0.1")
    check(row, place, code, error, before)


# ---- the table, on report.py -------------------------------------------------------------------

PARAMETERS = {  # of two notebooks, as the real ones declare them
    "01_one": 'lr = 2e-5  # step\nepochs = 1\nsizes = [1, 2]\nfast = True\nbert = "a"\nout_dir = ""',
    "02_two": "seq_len = 128\nks = [8]\nseeds = [0]\nn_train = 0\nlrs = [1e-3]\nlimit = None\n"
              'n_dev = 0\ndata_dir = "notebooks"\nout_dir = ""'}
BOUNDS = "finite and more than 0"
PROFILES = {  # what profiles/sample.yml holds: words
    "learning_rate: 1.0": ["sample.yml: learning_rate: 1.0", "use one of", "lr"],
    "epoch: 1": ["sample.yml: epoch: 1 is no notebook's parameter; did you mean epochs?"],
    "lr: fast": ["lr: 'fast' is str", "01_one", "float"], "lr: 2e-5": ["'2e-5' is str", "2.0e-5"],
    "epochs: 1.5": ["epochs: 1.5 is float", "type int"], "epochs: true": ["epochs: True is bool"],
    "fast: 1": ["fast: 1 is int"], "sizes: 3": ["sizes: 3 is int"], "bert:": ["bert: None is None"],
    "sizes: [1, x]": ["sizes: [1, 'x']"], "epochs: {a: 1}": ["epochs: {'a': 1} is for no notebook"],
    "01_on: {lr: 1.0}": ["01_on: {'lr': 1.0} is for no notebook", "did you mean 01_one?"],
    "01_one: {lr: 0}": ["sample.yml: 01_one: lr: 0", BOUNDS],
    "01_one: {ks: [8]}": ["sample.yml: 01_one: ks: [8] is no notebook's parameter", "use one of"],
    "- epochs": ["not a mapping"], "just words": ["not a mapping"],
    "epochs: [1": ["sample.yml: not YAML"], "epochs: \x07": ["sample.yml: not YAML"],
    "lr: 0": ["lr: 0", BOUNDS], "lr: -1.0": ["lr: -1.0", BOUNDS], "lr: .nan": ["lr: nan", BOUNDS],
    "lr: .inf": ["lr: inf", BOUNDS], "lrs: [1.0e-3, 0.0]": ["lrs: [0.001, 0.0]", BOUNDS],
    "seq_len: 0": ["seq_len: 0", "max_tokens: 3 to 512"], "seq_len: 2": ["seq_len: 2", "3 to 512"],
    "seq_len: 513": ["seq_len: 513", "3 to 512"], "epochs: 0": ["epochs: 0", BOUNDS],
    "ks: [8, 0]": ["ks: [8, 0]", BOUNDS], "ks: [-8]": ["ks: [-8]", BOUNDS],
    "seeds: [-1]": ["seeds: [-1]", BOUNDS], "n_train: -1": ["n_train: -1", BOUNDS],
    "sizes: []": ["sizes: []", "not empty"], "n_dev: -1": ["n_dev: -1", BOUNDS],
    "data_dir: no/folder": ["data_dir: 'no/folder'", "make data"]}
REPORTS = {row.name: row for row in [
    *(Row(text, write("profiles/sample.yml", text), [], words) for text, words in PROFILES.items()),
    Row("no UTF-8", write("profiles/sample.yml", b"bert: \xff"), [], ["sample.yml: not YAML"]),
    Row("a folder", folder("profiles/sample.yml"), [], ["no profile sample", "give one of"]),
    *(Row(" ".join(argv), None, argv, words) for argv, words in [
        (["--only", "3"], ["--only 3", "01_one, 02_two"]),
        (["--profile", "huge"], ["no profile huge", "sample"]), (["--profile", ""], ["no profile"]),
        (["--profile", "no/such.yml"], ["no profile no/such.yml"]),
        (["--out", "/dev/null/report"], ["can't write to /dev/null/report", "another --out"]),
        (["--out", "PLACE/profiles/sample.yml"], ["sample.yml", "another --out"]),
        (["--out"], ["--out", "expected one argument", "--help"]), (["more"], ["more", "--help"]),
        (["--jobs", "0"], ["--jobs 0", "1 job or more"]), (["--jobs", "x"], ["--jobs", "'x'"]),
        (["--timeout", "-1"], ["--timeout -1", "0 minutes or more"]),
        (["--timeout", "nan"], ["--timeout nan", "0 minutes or more"])]),
    Row("computed parameters", lambda place: report_tools.write_notebook(
        place / "notebooks", "03_bad", "# Bad", 'lr = 1 / 3\nout_dir = ""'), [],
        ["03_bad.ipynb", "NAME = literal"]),
    Row("no notebook", write("notebooks/03_bad.ipynb", "{"), [], ["03_bad.ipynb"])]}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder like the project's, which report.py takes for it; nothing may be run."""
    place = tmp_path / "project"
    notebooks = report_tools.make_project(place)
    for name, source in PARAMETERS.items():
        report_tools.write_notebook(notebooks, name, "# Some", source)
    monkeypatch.setattr(parameters, "PROFILES", place / "profiles")
    monkeypatch.setattr(parameters, "ROOT", place)
    for name, value in {"NOTEBOOKS": notebooks, "ROOT": place, "execute": None}.items():
        monkeypatch.setattr(report, name, value)
    return place


@pytest.mark.parametrize("name", REPORTS)
def test_a_bad_request_for_a_report_is_refused_in_one_line(name, project, capsys):
    row = REPORTS[name]
    if row.make:
        row.make(project)
    before = listing(project)
    code = report.main([word.replace("PLACE", str(project)) for word in row.argv])
    said = capsys.readouterr()
    assert not said.out
    check(row, project, code, said.err, before, "report.py")


@pytest.mark.parametrize("name", ["epochs: [1", "more"])
def test_a_report_as_a_process_refuses_as_main_does(name, project):
    row = REPORTS[name]
    if row.make:
        row.make(project)
    before = listing(project)
    code, error = run(["-B", str(project / "report.py"), *row.argv])
    check(row, project, code, error, before, "report.py")


@pytest.mark.parametrize("text", [
    "lr: 1\nlimit: 2\nsizes: [1]\nseeds: [0]\nn_train: 0\nn_dev: 0", "limit:", "fast: false",
    "seq_len: 3", "seq_len: 512", "data_dir: profiles", "limit: 0.5\nbert: ''"])
def test_what_a_profile_may_hold(text, project):
    write("profiles/sample.yml", text)(project)
    declared = {n: parameters.read_parameters(project / "notebooks" / (n + ".ipynb"))
                for n in PARAMETERS}
    assert declared["01_one"]["lr"] == 2e-5 and declared["02_two"]["limit"] is None
    read = parameters.read_profile("sample", declared)[1]
    assert list(read) == re.findall(r"(?m)^\w+", text)


# ---- accepted ----------------------------------------------------------------------------------

ODD = ["", "   ", "one line\x85two lines", "a\rb\r", "good\x00film\x01\x1b[31m\x7f\x9f",
       "\ufeffgreat", "[MASK] is [SEP] not [CLS] it [PAD]", "\u202eyrevocer\u202c \u200f\u2066x",
       "\U0001f600 \ufffd", "<script>alert(1)</script>", "\u2028 \u2029 \x0b \x0c", "\u96fb\u5f71 \u0645\u0631", "a" * 300]
HUGE = ["good " * 1000000, "a" * 100000]  # 5 MB; a word that no vocabulary can split


def put(part, texts):
    """Have a part's texts end in these, among ordinary ones: blank lines at its ends would go."""
    def make(place):
        path = place / "data" / (part + ".texts")
        lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
        lines[-1 - len(texts):-1] = texts
        path.write_bytes("".join(line + "\n" for line in lines).encode("utf-8"))
    return make


def odd_everywhere(place):
    for part in ("train", "train_unlabeled"):
        put(part, ODD)(place)
    for part in ("dev", "test", "dev-b", "test-b"):
        put(part, ODD[:8])(place)


def huge(place):
    put("train", HUGE)(place)
    put("test-b", HUGE[1:])(place)


def with_carriage_returns(place):
    for path in (place / "data").iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def with_marks(place):
    for name in ("train.texts", "train.labels"):
        path = place / "data" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def with_five_labels(place):
    config = BertConfig.from_pretrained(str(place / "bert"))
    config.num_labels = 5
    rewrite(str(place / "bert"), state=BertForSequenceClassification(config).state_dict(),
            num_labels=5, architectures=["BertForSequenceClassification"],
            id2label={str(i): "star %d" % i for i in range(5)})


def repeated(place):
    """Two reviews of train again in dev, and three within train."""
    lines = (place / "data" / "train.texts").read_bytes().decode("utf-8").split("\n")
    put("train", lines[:3])(place)
    put("dev", lines[5:7])(place)


MARK = "Warning: PLACE/data/train.%s: byte-order mark dropped"
ACCEPTED = {  # name: make, argv, the warnings; None: of repeats, which odd reviews are
    "odd reviews": (odd_everywhere, [], None), "huge reviews": (huge, ["--no-pretrain"], None),
    "CR at line ends": (with_carriage_returns, ["--no-pretrain"], []),
    "byte-order marks": (with_marks, ["--no-pretrain"], [MARK % "texts", MARK % "labels"]),
    "five labels": (with_five_labels, ["--no-pretrain"], [
        "Warning: model 'PLACE/bert' holds a trained classifier, which is not taken; "
        "load_classifier or --load takes one that save_classifier or --save wrote"]),
    "no short parts": (lambda place: [path.unlink() for path in place.glob("data/*-b.*")],
                       ["--no-pretrain"], []),
    "train alone": (lambda place: [path.unlink() for path in place.glob("data/*.*s")
                                   if not path.name.startswith("train.")], [], []),
    "all words": (None, ["--no-pretrain", "--set", "words=0"], []),
    "repeats and leaks": (repeated, ["--no-pretrain"], [
        "Warning: train: 3 of 48 reviews repeat an earlier one",
        "Warning: 2 reviews stand in train and in dev: a leak"])}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_accepted_gets_a_prediction_for_every_review(name, place, capsys):
    make, argv, words = ACCEPTED[name]
    code = evaluate.main(command(Row(name, make, argv, words), place))
    said = capsys.readouterr()
    assert code == 0 and not said.err
    warned = re.findall("(?m)^Warning: (?!.*learned nothing).*$", said.out)
    assert words is None or warned == [word.replace("PLACE", str(place)) for word in words]
    lines = (place / "out" / "preds.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    parts = [part for part in helpers.PARTS if (place / "data" / (part + ".texts")).exists()]
    keys = [f"{part}/{i}" for part in parts for i in range(SIZES[part])]
    assert [line.split("\t")[0] for line in lines] == keys
    assert {line.split("\t")[1] for line in lines} <= {"neg", "pos"}


@pytest.mark.parametrize("text", ODD + HUGE[not SOAK:], ids=lambda text: ascii(text[:20]))
def test_odd_reviews_are_encoded_as_the_library_does(text, tiny_bert):
    tokenizer = helpers.load_bert(tiny_bert)[1]
    made = helpers.vectorize_ex(text, None, 32, tokenizer)
    assert made[:3] == by_the_library(tokenizer, text, 32)
    tokens = helpers.tokenize_all([text], tokenizer)
    assert helpers.add_special_tokens(tokens[0], 32, "head", tokenizer) == made[0][:sum(made[2])]


# ---- training that diverges --------------------------------------------------------------------

AT_ONCE = ["--set", "warmup=0", "--set", "clip_norm=0", "--set", "decay=none"]
DIVERGING = {  # argv, words
    "a loss": (["--set", "lr=1e30"], ["loss nan", "step 2 of 6", "lower lr"]),
    "the last step": (["--set", "lr=1e30", "--set", "batch_size=48"],
                      ["NaN or infinite numbers", "lower lr"]),
    "masked LM": (["--set", "pretrain.lr=1e30", "--set", "pretrain.batch_size=999", "--set",
                   "pretrain.warmup=0"], ["NaN or infinite numbers", "lower lr"])}


@pytest.mark.parametrize("name", DIVERGING)
def test_training_that_diverges_ends_in_one_line(name, place, capsys):
    argv, words = DIVERGING[name]
    mlm = [] if name == "masked LM" else ["--no-pretrain"]
    argv = command(Row(name, write("out/preds.tsv", "older"), [*mlm, *AT_ONCE, *argv], []), place)
    assert evaluate.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("evaluate.py: ") and said.count("\n") == 1
    assert all(word in said for word in words), said
    assert (place / "out" / "preds.tsv").read_text() == "older"
    assert not list(place.glob("cache/pretrained/*/note.json")), "broken weights would be reused"


def test_a_training_that_calls_everything_one_class_is_told(place, capsys):
    argv = command(Row("", None, ["--no-pretrain", *AT_ONCE, "--set", "lr=3"], []), place)
    assert evaluate.main(argv) == 0
    told = re.findall("(?m)^Warning: (.*): all (.*) reviews are called (neg|pos): the training "
                      "collapsed or learned nothing; try another lr", capsys.readouterr().out)
    assert [(part, int(n)) for part, n, _ in told] == [("train", 48), ("dev", 12), ("dev-b", 10)]
    assert evaluate.main(argv[:-1] + ["lr=1e-3", "--set", "epochs=20"]) == 0
    assert "collapsed" not in capsys.readouterr().out
