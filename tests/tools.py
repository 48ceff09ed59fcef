"""What the tests share: a tiny BERT, made-up reviews and trials, runs of evaluate.py, notebooks.

Everything made here is the same on both stacks: the weights come from torch.randn with a generator,
not from the layers' own initialization, which differs between PyTorch 1.3 and today's.
"""
import ast
import contextlib
import html.parser
import importlib.util
import io
import json
import os
import string
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import BertConfig, BertForPreTraining, BertTokenizer  # noqa: E402

import checkpoints  # noqa: E402
import evaluate  # noqa: E402
import files  # noqa: E402
import runtime  # noqa: E402
from helpers import Part  # noqa: E402

SOAK = bool(os.environ.get("SOAK"))
TODAY = sys.version_info >= (3, 8)  # else the pinned stack of 2019

WORDS = """the a an of and to in is it that this was i for with as but on film movie story actor
plot scene good bad great awful boring moving dull lovely never always one two not very best worst
ending music camera director joy pain time hour people watch love hate laugh cry slow fast funny
sad cinema again first last see saw think thought from by at my her his they we you all some more
most who what when why how will would can could should had has have been be are were""".split()
ENDINGS = "s ed ing ly er est y ness less ful".split()


def tiny_vocabulary():
    """Return some 200 tokens: special ones, letters, digits, punctuation, words, endings."""
    signs = string.ascii_lowercase + string.digits
    return (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *string.punctuation, "\u96fb",
             "\u5f71", "\u2026", *(w for w in WORDS if len(w) > 1), *("##" + c for c in signs),
             *("##" + ending for ending in ENDINGS if len(ending) > 1)])


def fill(model, seed=0, std=0.12):
    """Give every parameter values that depend on its name's place and the seed alone."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=random) * std
        parameter.data.copy_(values + float(name.endswith("LayerNorm.weight")))
    return model


def make_tiny_bert(folder, seed=0, layers=2):
    """Write a random BERT (hidden size 32) as a folder; return its path."""
    words, folder = tiny_vocabulary(), Path(str(folder))
    config = {"vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": layers,
              "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 512,
              "type_vocab_size": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
              "attention_probs_dropout_prob": 0.1, "initializer_range": 0.02,
              "layer_norm_eps": 1e-12, "pad_token_id": 0}
    bare = folder.with_name(folder.name + "-vocabulary")
    bare.mkdir(parents=True)
    (bare / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
    files.save_json(str(bare / "config.json"), dict(config, model_type="bert"))
    tokenizer = BertTokenizer.from_pretrained(str(bare), do_lower_case=True)
    model = fill(BertForPreTraining(BertConfig.from_dict(config)), seed)
    checkpoints.save_bert(str(folder), model, tokenizer, {"made": "for the tests"})
    return str(folder)


def made_up_reviews(n, length=12, seed=0):
    """Return n (texts, labels): a pattern of words of some `length`, the label leaks through."""
    texts, labels = [], []
    for i in range(n):
        label = "pos" if (i * 7 + seed) % 5 < 2 or i % 4 == 1 else "neg"
        size = 3 + (i * i + 3 * i + seed) % (2 * length)
        words = [WORDS[(i * 13 + j * (7 + seed) + j * j) % len(WORDS)] for j in range(size)]
        words[size // 2] = ("great" if label == "pos" else "awful") + ("ly" if i % 3 else "")
        texts.append(" ".join(words))
        labels.append(label)
    return texts, labels


def load_module(path):
    """Return a module that is no part of the house: data/*.py, benchmarks/*.py."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, str(ROOT / path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- model folders and tokens --------------------------------------------------------------------

def weights_of(folder):
    return torch.load(os.path.join(folder, "pytorch_model.bin"))


def rewrite(folder, **change):
    """Give the copy other weights, or other entries of config.json."""
    state = change.pop("state", None)
    if state is not None:
        torch.save(state, os.path.join(folder, "pytorch_model.bin"), **runtime.LEGACY_FORMAT)
    path = os.path.join(folder, "config.json")
    with open(path) as file:
        config = dict(json.load(file), **change)
    files.save_json(path, config)
    return folder


def encoder_only(folder, *lacking):
    return rewrite(folder, state={key: value for key, value in weights_of(folder).items()
                                  if key.startswith("bert.") and not key.startswith(lacking or "-")})


def by_the_library(tokenizer, text, n):
    """Return (input_ids, segment_ids, input_mask) of n tokens by the tokenizer's own encoder."""
    if TODAY:
        made = tokenizer(text, truncation=True, max_length=n, padding="max_length",
                         return_token_type_ids=True)
        return made["input_ids"], made["token_type_ids"], made["attention_mask"]
    ids = tokenizer.encode(text, add_special_tokens=True)
    if len(ids) > n:
        ids = ids[:n - 1] + ids[-1:]
    return ids + [0] * (n - len(ids)), [0] * n, [1] * len(ids) + [0] * (n - len(ids))


# ---- FILIMDB and evaluate.py ---------------------------------------------------------------------

SIZES = {"train": 48, "dev": 12, "test": 12, "dev-b": 10, "test-b": 10, "train_unlabeled": 30}
SMALL = {"seq_len": 32, "batch_size": 8, "accumulation": 1, "epochs": 1, "lr": 1e-3}


def options(**overrides):
    """Return --set options for train and pretrain alike."""
    pairs = [f"{key}={value}" for key, value in dict(SMALL, **overrides).items()]
    return [word for pair in pairs for word in ("--set", pair, "--set", "pretrain." + pair)]


def write_filimdb(folder, words=None):
    """Write the first reviews of data/sample in FILIMDB's layout, cut to some words."""
    source = ROOT / "data" / "sample"
    for path in sorted(source.glob("*.*s")):
        lines = path.read_bytes().decode("utf-8").split("\n")[:-1]
        half = SIZES[path.stem] // 2  # train is in order of class: take from both ends
        some = lines[:half] + lines[-half:]
        if path.suffix == ".texts" and words:
            some = [" ".join(line.split()[:words]) for line in some]
        (folder / path.name).write_bytes("".join(line + "\n" for line in some).encode("utf-8"))
    return folder


def predictions(path):
    """Read preds.tsv: {part: labels in order}."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, label = line.split("\t")
        found.setdefault(key.split("/")[0], []).append(label)
    return found


def run(*argv):
    """Run evaluate.main: what it printed on stdout."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert evaluate.main(list(argv)) == 0
    return said.getvalue()


def write_folder(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    return folder


def make_aclimdb(n=120, n_films=97):
    """Made-up aclImdb files; every text is unique, a film has reviews of both kinds."""
    files = {"README": "made up", "imdb.vocab": "the"}
    for kind, rating in (("neg", 2), ("pos", 9)):
        films = [i * i % n_films for i in range(n)]
        urls = [f"http://www.imdb.com/title/tt{film:07d}/usercomments" for film in films]
        files[f"train/urls_{kind}.txt"] = "\n".join(urls) + "\n"
        for i, film in enumerate(films):
            files[f"train/{kind}/{i}_{rating}.txt"] = f"{kind} train {i} film {film}\x85 é"
            files[f"test/{kind}/{i}_{rating}.txt"] = f"{kind} test {i}"
    for i in range(30):
        files[f"train/unsup/{i}_0.txt"] = f"unsup\r\nin two\n\nlines {i}\n"
    return files


# ---- trials --------------------------------------------------------------------------------------

def make_part(n, seed=0):
    texts, labels = made_up_reviews(n, 5, seed)
    return Part([f"train/{i}" for i in range(n)], texts, labels)


TRAIN, DEV = make_part(16), make_part(10, 3)


def core(row):
    """Return a row without what no two runs share: times and memory."""
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in row["history"]]
    return dict({k: v for k, v in row.items() if k not in ("seconds", "peak_memory", "checksum")},
                history=history)


def names_in(store, ending="json"):
    return sorted(path.name for path in store.glob("*." + ending))


def row(accuracy, seed=0, mark="", correct="", **config):
    """Make up a trial's row."""
    return {"config": dict({"seed": seed, "data_seed": seed}, **config), "mark": mark,
            "metrics": {} if mark else {"dev_accuracy": accuracy}, "correct": correct}


# ---- notebooks and pages -------------------------------------------------------------------------

PATHS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PATH_LINES = """
roots = [path for path in (Path.cwd(), *Path.cwd().parents) if (path / "helpers.py").exists()]
assert roots, "started outside of the project: give papermill --cwd PROJECT/notebooks"
sys.path.insert(0, str(roots[0]))
"""
TINY = ROOT / "tests" / "tiny.yml"


def read_notebook(name):
    """Return a notebook as JSON."""
    return json.loads(PATHS[name].read_text(encoding="utf-8"))


def sources(name, kind):
    """Return the sources of a notebook's cells of one kind."""
    return ["".join(c["source"]) for c in read_notebook(name)["cells"] if c["cell_type"] == kind]


def parameter_lines(name):
    """Return the lines of the one cell tagged `parameters`."""
    tagged = [c for c in read_notebook(name)["cells"] if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and tagged[0]["cell_type"] == "code"
    return "".join(tagged[0]["source"]).split("\n")


def parameters(name):
    """Return {name: default} of a notebook's parameters."""
    body = ast.parse("\n".join(parameter_lines(name))).body
    assert all(isinstance(node, ast.Assign) and len(node.targets) == 1 for node in body)
    return {node.targets[0].id: ast.literal_eval(node.value) for node in body}


class Page(html.parser.HTMLParser):
    """Collect a page's tags with attributes, ids, links, images and text. source: text or path."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.texts = [], [], []
        self.ids, self.links, self.images, self.loads = [], [], [], []
        self.source = source if isinstance(source, str) else source.read_text(encoding="utf-8")
        self.feed(self.source)

    @property
    def text(self):
        """Return the text as a reader sees it."""
        return "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        """Keep what a test asks for."""
        attrs = dict(attrs)
        self.tags.append(tag)
        self.attributes.append(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.loads += [attrs.get("src", "") + attrs.get("href", "")] if tag != "a" else []
        self.images += [attrs] if tag == "img" else []

    def handle_data(self, data):
        """Keep a text."""
        self.texts.append(data)


def bare_study():
    """Return a Study with what its answers need, and no data."""
    import studies
    study = studies.Study.__new__(studies.Study)
    study.answers, study.missing = [], []
    return study
