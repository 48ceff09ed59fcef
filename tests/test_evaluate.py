"""evaluate.py, the course's harness around the file that is handed in, and what importing does."""
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tools import ROOT, SIZES, SMALL, options, predictions, run, write_filimdb

import checkpoints
import evaluate
import handin
import helpers
from files import InputError

PARTS = ["train", "dev", "test", "dev-b", "test-b"]
LABELLED = ["train", "dev", "dev-b"]


@pytest.fixture(scope="module")
def filimdb(tmp_path_factory):
    return write_filimdb(tmp_path_factory.mktemp("filimdb"))


@pytest.fixture
def broken(filimdb, tmp_path):
    """A copy of the folder, to be damaged."""
    shutil.copytree(str(filimdb), str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def graded(filimdb, tiny_bert, tmp_path_factory):
    """Run evaluate.main once in full: (exit code, preds.tsv, what it printed)."""
    out, said = tmp_path_factory.mktemp("graded") / "preds.tsv", io.StringIO()
    with contextlib.redirect_stdout(said):
        code = evaluate.main(["--data", str(filimdb), "--model", tiny_bert, "--out", str(out),
                              *options()])
    return code, out, said.getvalue()


class Spy:
    """Stand in for helpers' three functions and keep what they are given."""

    def __init__(self, monkeypatch):
        self.calls, self.texts = {}, None
        for name in ("pretrain", "train", "classifier_logits"):
            monkeypatch.setattr(helpers, name, getattr(self, name))

    def pretrain(self, texts, parts=(), log_dir="", **overrides):
        """Return params as the real one does."""
        self.texts, self.calls["pretrain"] = texts, overrides
        return {"path": "nowhere", "parts": list(parts), "n_texts": 7, "loss_before": 2.0,
                "loss_after": 1.0}

    def train(self, texts, labels, pretrain_params=None, hold=False, **overrides):
        """Keep the overrides and what pretraining gave."""
        self.calls["train"], self.params = overrides, pretrain_params
        return {"run": "nowhere"}

    def classifier_logits(self, texts, params, **overrides):
        """Call everything positive."""
        assert params == {"run": "nowhere"}
        return torch.tensor([[0.0, 1.0]]).expand(len(texts), 2)


@pytest.fixture
def spy(monkeypatch):
    return Spy(monkeypatch)


def read_labels(folder, part):
    return (folder / (part + ".labels")).read_text(encoding="utf-8").split()


# ---- a run -------------------------------------------------------------------------------------

def test_preds_has_a_line_for_every_review_in_order(graded):
    code, out, _ = graded
    assert code == 0
    text = out.read_bytes().decode("utf-8")
    keys = [f"{part}/{i}" for part in PARTS for i in range(SIZES[part])]
    assert text.endswith("\n") and [line.split("\t")[0] for line in text[:-1].split("\n")] == keys
    assert all(re.match(r"[\w-]+/\d+\t(pos|neg)$", line) for line in text[:-1].split("\n"))
    assert os.listdir(str(out.parent)) == ["preds.tsv"]


def test_accuracies_are_those_of_the_predictions(graded, filimdb):
    _, out, said = graded
    found = re.findall(r"(?m)^(\S+) +accuracy +([\d.]+)% of (\d+) reviews \((.*)\)$", said)
    assert [row[0] for row in found] == LABELLED
    for part, percent, n, note in found:
        gold = read_labels(filimdb, part)
        right = sum(a == b for a, b in zip(gold, predictions(out)[part]))
        assert (percent, int(n)) == ("%.2f" % (100 * right / len(gold)), len(gold))
        assert ("another domain" in note) == (part == "dev-b")
        assert ("naive Bayes" in note) == (part != "train")
        assert "pretrained on train, train_unlabeled" in note


def test_the_predictions_are_those_of_the_trained_model(graded, filimdb, tiny_bert):
    data = helpers.load_filimdb(str(filimdb))
    unlabeled = helpers.read_lines(str(filimdb / "train_unlabeled.texts"))
    small = dict(SMALL, model=tiny_bert)
    params = helpers.pretrain([data["train"].texts, unlabeled], **small)
    params = helpers.train(data["train"].texts, data["train"].labels, params, **small)
    assert predictions(graded[1]) == {part: helpers.classify(data[part].texts, params)
                                      for part in PARTS}
    assert "MLM pretraining on 78 texts of train, train_unlabeled (held-out loss" in graded[2]


@pytest.mark.parametrize("flags,parts", [
    ([], ["train", "train_unlabeled"]),
    (["--transductive"], ["train", "train_unlabeled", "dev", "test", "dev-b", "test-b"])])
def test_pretraining_sees_the_parts_that_are_named(flags, parts, filimdb, spy, tmp_path):
    said = run("--data", str(filimdb), "--out", str(tmp_path / "p.tsv"), *flags)
    assert said.count("pretrained on " + ", ".join(parts) + ")") == len(LABELLED)
    assert spy.texts == [helpers.read_lines(str(filimdb / (part + ".texts"))) for part in parts]
    assert spy.params["parts"] == parts


def test_no_pretrain(filimdb, spy, tmp_path):
    said = run("--data", str(filimdb), "--out", str(tmp_path / "p.tsv"), "--no-pretrain")
    assert "pretrain" not in spy.calls and spy.params is None
    assert said.count("no pretraining") == len(LABELLED) and "pretrained on" not in said


def test_a_folder_without_unlabeled_texts(broken, spy, tmp_path):
    (broken / "train_unlabeled.texts").unlink()
    assert "pretrained on train)" in run("--data", str(broken), "--out", str(tmp_path / "p.tsv"))


def test_set_reaches_train_and_pretrain(filimdb, spy, tmp_path):
    run("--data", str(filimdb), "--out", str(tmp_path / "p.tsv"), "--set", "lr=1",
        "--set", "keep=tail", "--set", "pretrain.epochs=5", "--set", "pretrain.whole_word=True")
    assert spy.calls["train"] == {"lr": 1, "keep": "tail"}
    assert spy.calls["pretrain"] == {"epochs": 5, "whole_word": True, "model": "bert-base-uncased"}


@pytest.mark.parametrize("argv,environment,model", [
    ([], "", "data/sample/bert"), ([], "/some/bert", "data/sample/bert"),
    (["--model", "/my/bert"], "", "/my/bert"), (["--data", "D"], "", "bert-base-uncased"),
    (["--data", "D"], "/some/bert", "/some/bert"),
    (["--data", "D", "--model", "/my/bert"], "/some/bert", "/my/bert"),
    (["--data", "D", "--set", "model=/set/bert"], "/some/bert", "/set/bert")])
def test_which_model(argv, environment, model, filimdb, spy, tmp_path, monkeypatch):
    monkeypatch.setenv("BERT_MODEL", environment)
    argv = [str(filimdb) if word == "D" else word for word in argv]
    said = run("--out", str(tmp_path / "p.tsv"), *argv)
    assert helpers.make_config(**spy.calls["train"]).model == model
    assert helpers.make_config(**spy.calls["pretrain"]).model == model
    assert ("sample" in said.split("\n")[0]) == ("--data" not in argv)
    tuned = {"lr", "seq_len"} & set(spy.calls["train"])
    assert bool(tuned) == (model == "data/sample/bert"), "the sample's settings are the tiny BERT's"


# ---- --json and --help -------------------------------------------------------------------------

def test_a_record_of_the_run_is_kept(filimdb, tiny_bert, tmp_path):
    out, record = tmp_path / "p.tsv", tmp_path / "run.json"
    run("--data", str(filimdb), "--model", tiny_bert, "--out", str(out), "--json", str(record),
        *options(keep="tail"))
    kept = json.loads(record.read_text(encoding="utf-8"))
    assert sorted(os.listdir(str(tmp_path))) == ["p.tsv", "run.json"]
    assert list(kept["parts"]) == sorted(LABELLED)
    data = helpers.load_filimdb(str(filimdb))
    for part, row in kept["parts"].items():
        gold = read_labels(filimdb, part)
        assert row["n"] == len(gold)
        assert row["accuracy"] == helpers.accuracy(gold, predictions(out)[part])
        assert set(row["baselines"]) == (
            set() if part == "train" else {"naive Bayes", "majority class"})
        assert row["stand_in_train"] == sum(
            text in data["train"].texts for text in data[part].texts)
    assert kept["parts"]["train"]["stand_in_train"] == SIZES["train"]
    assert set(kept["minutes"]) == {"pretraining", "training", "classification"}
    assert all(0 < minutes < 5 for minutes in kept["minutes"].values())
    assert kept["settings"] == helpers.settings(helpers.make_config(**dict(SMALL, keep="tail")))
    assert kept["pretraining"]["parts"] == ["train", "train_unlabeled"]
    assert kept["pretraining"]["config"]["lr"] == SMALL["lr"]
    assert kept["seen"] == "pretrained on train, train_unlabeled" and kept["device"] == "cpu"
    assert (kept["data"], kept["model"]) == (str(filimdb), tiny_bert)
    assert set(kept["versions"]) == {"python", "torch", "transformers"}


def test_a_record_of_a_loaded_classifier(filimdb, tiny_bert, tmp_path):
    folder, record = str(tmp_path / "c"), tmp_path / "run.json"
    run("--data", str(filimdb), "--model", tiny_bert, "--no-pretrain", "--save", folder, "--out",
        str(tmp_path / "p.tsv"), *options())
    run("--data", str(filimdb), "--load", folder, "--out", str(tmp_path / "p.tsv"), "--set",
        "keep=head", "--json", str(record))
    kept = json.loads(record.read_text(encoding="utf-8"))
    assert list(kept["minutes"]) == ["classification"] and kept["pretraining"] == {}
    assert (kept["settings"]["keep"], kept["load"]) == ("head", folder)


@pytest.mark.parametrize("grading", [[], ["--grading"]])
def test_probabilities_are_kept_beside_the_predictions(filimdb, tiny_bert, tmp_path, grading):
    out, scores, folder = tmp_path / "p.tsv", tmp_path / "s.tsv", str(tmp_path / "c")
    said = run("--data", str(filimdb), "--model", tiny_bert, "--no-pretrain", "--out", str(out),
               "--scores", str(scores), "--save", folder, *grading, *options(precision="fp32"))
    labels, chances = ([line.split("\t") for line in path.read_text().splitlines()]
                       for path in (out, scores))
    assert [key for key, _ in chances] == [key for key, _ in labels] and len(labels) == 92
    assert f"{scores}: 92 probabilities of pos" in said
    data, params = helpers.load_filimdb(str(filimdb)), helpers.load_classifier(folder)
    expected = torch.cat([helpers.probabilities(data[part].texts, params)[:, 1] for part in PARTS])
    found = torch.tensor([float(chance) for _, chance in chances])
    assert torch.allclose(found, expected, atol=2e-6)
    for (_, label), (_, chance) in zip(labels, chances):
        assert re.match(r"0\.\d{6}$", chance) and (float(chance) > 0.5) == (label == "pos")


def test_an_older_record_stays_when_the_disk_is_full(filimdb, spy, tmp_path, monkeypatch, capsys):
    calls, fsync, removed = [], os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 1:  # the predictions still fitted
            raise OSError(28, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(evaluate, "record_of", lambda *args: {})
    monkeypatch.setattr(evaluate.files, "remove_if_there", removed.append)
    (tmp_path / "run.json").write_bytes(b"older")
    argv = ["--data", str(filimdb), "--out", str(tmp_path / "p.tsv"), "--json",
            str(tmp_path / "run.json")]
    assert evaluate.main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "run.json") in said and "No space" in said
    assert (tmp_path / "run.json").read_bytes() == b"older"
    assert sorted(os.listdir(str(tmp_path))) == ["p.tsv", "run.json"]
    assert not removed, "the same command must find the training that it paid for"


@pytest.mark.parametrize("path", ["", "none/run.json", ".", "p.tsv"])
def test_a_record_that_could_not_be_written(path, filimdb, spy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(str(tmp_path))
    assert evaluate.main(["--data", str(filimdb), "--out", "p.tsv", "--json", path]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"--json {path}: " in said and not spy.calls
    assert evaluate.main(["--data", str(filimdb), "--out", "p.tsv", "--scores", path]) == 2
    assert f"--scores {path}: " in capsys.readouterr().err and not spy.calls
    assert evaluate.main(["--data", str(filimdb), "--json", "a", "--scores", "./a"]) == 2
    assert "--scores ./a: --json goes there; name another" in capsys.readouterr().err
    assert os.listdir(str(tmp_path)) == []


def help_text(capsys):
    """Return what --help prints."""
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_key(capsys):
    said, config = help_text(capsys), vars(helpers.Config())
    assert set(helpers.meanings()) == set(config), "a field of Config without its comment"
    words = " ".join(said.split())
    for key, value in config.items():
        assert f"\n  {key}={value}" in said
        rule = "True or False" if value is False else helpers.rule_of(key)[0]
        assert f"{helpers.meanings()[key]}; must be {rule}" in words
    for key, value in helpers.MLM_DEFAULTS.items():
        assert (f"pretrain.{key}={value}\n" in said) == (value != config[key])
    assert "[S] Sun et al. 2019" in words and "Exit code: 0 done, 2 wrong use" in words
    assert "python evaluate.py --data data/FILIMDB --grading" in said
    assert max(map(len, said.split("\n"))) <= 99


def test_help_names_an_optimizer_that_was_added(capsys, monkeypatch):
    monkeypatch.setitem(helpers.OPTIMIZERS, "sgd", torch.optim.SGD)
    assert "must be adam, adamw or sgd" in " ".join(help_text(capsys).split())


# ---- older predictions are safe ----------------------------------------------------------------

FAULTS = {"diverged": ("train", helpers.Diverged("loss nan"), 2),
          "interrupted": ("train", KeyboardInterrupt(), 130),
          "a bug": ("train", RuntimeError("oops"), RuntimeError),
          "too few": ("classifier_logits", lambda texts, params: torch.zeros(len(texts) - 1, 2),
                      RuntimeError),
          "foreign": ("labels_of", lambda logits: ["good"] * len(logits), RuntimeError)}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_an_older_file_stays_when_a_run_fails(fault, filimdb, spy, tmp_path, monkeypatch, capsys):
    where, what, end = FAULTS[fault]

    def fail(*args, **kwargs):
        raise what

    monkeypatch.setattr(helpers, where, fail if isinstance(what, BaseException) else what)
    (tmp_path / "preds.tsv").write_bytes(b"train/0\tpos\r\nhalf a li")
    argv = ["--data", str(filimdb), "--out", str(tmp_path / "preds.tsv")]
    if isinstance(end, int):
        assert evaluate.main(argv) == end
        assert capsys.readouterr().err.count("\n") == 1
    else:
        with pytest.raises(end):
            evaluate.main(argv)
    assert (tmp_path / "preds.tsv").read_bytes() == b"train/0\tpos\r\nhalf a li"
    assert os.listdir(str(tmp_path)) == ["preds.tsv"]


def test_an_older_file_stays_when_the_disk_is_full(filimdb, spy, tmp_path, monkeypatch, capsys):
    def fsync(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "preds.tsv").write_bytes(b"older")
    assert evaluate.main(["--data", str(filimdb), "--out", str(tmp_path / "preds.tsv")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(tmp_path / "preds.tsv") in said and "No space" in said
    assert (tmp_path / "preds.tsv").read_bytes() == b"older"
    assert os.listdir(str(tmp_path)) == ["preds.tsv"]


# ---- as a process ------------------------------------------------------------------------------

def command(*argv):
    return [sys.executable, str(ROOT / "evaluate.py"), *argv]


def test_a_process_writes_what_main_does(graded, filimdb, tiny_bert, tmp_path):
    done = subprocess.run(command("--data", str(filimdb), "--model", tiny_bert, *options()),
                          cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "preds.tsv").read_bytes() == graded[1].read_bytes()
    assert b"found: not repeated" in done.stdout
    assert os.listdir(str(tmp_path)) == ["preds.tsv"]


OFTEN = """import runpy, sys
sys.path.insert(0, sys.argv[1])
import files, helpers
helpers.run.CHECKPOINT_SECONDS, helpers.run.CHECKPOINT_SHARE = 0.1, 0
del sys.argv[1]
runpy.run_path(files.HERE + "/evaluate.py", run_name="__main__")
"""


@pytest.mark.slow
def test_sigterm_saves_the_work(filimdb, tiny_bert, tmp_path, monkeypatch, capsys):
    argv = ["--data", str(filimdb), "--model", tiny_bert, "--no-pretrain", *options(epochs=9999)]
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", OFTEN, str(ROOT), *argv],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob("cache/runs/*.checkpoint")):  # so the training has begun
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 143
    assert err.decode("utf-8") == (
        "evaluate.py: interrupted; the same command resumes from the last checkpoint\n")
    assert b"training interrupted at step" in out and not (tmp_path / "preds.tsv").exists()
    assert len(list((tmp_path / "cache" / "runs").iterdir())) == 1

    def resume(*args):  # the same command again, as far as to where it goes on
        print("step", original(*args)[0])
        raise KeyboardInterrupt

    original = checkpoints.resume
    monkeypatch.setattr(helpers.run, "resume", resume)
    assert evaluate.main(argv) == 130
    assert int(re.search(r"(?m)^step (\d+)$", capsys.readouterr().out).group(1)) > 0


@pytest.mark.parametrize("given,told", [
    (["--load", "F"], "begins anew\n"), (["--load=F"], "begins anew\n"),
    (["--load=F", "--grading"], "begins anew: --grading measures its budgets\n"),
    (["--set", "lr=1e-4"], "resumes from the last checkpoint\n")])
def test_who_is_stopped_hears_what_the_same_command_does(given, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *given])
    assert evaluate.stopped(signal.SIGINT) == 130
    assert capsys.readouterr().err == "evaluate.py: interrupted; the same command " + told


def test_an_option_is_written_out():
    with pytest.raises(InputError, match="--grad"):  # `stopped` would not know it for --grading
        evaluate.parse_arguments(["--grad"])


# ---- the course's harness ----------------------------------------------------------------------

HARNESS = '''"""The course's evaluate.py, written anew from what is known of it."""
import json, os, pickle, random, sys

import numpy, torch

form, data, seed = sys.argv[1], sys.argv[2], int(sys.argv[3])
before = set(sys.modules)
if form == "package":  # as one of many submissions
    from submissions.score import classifier, other
else:
    import classifier
    other = None

ours = [getattr(sys.modules[name], "__file__", None) or "" for name in set(sys.modules) - before]
random.seed(seed), numpy.random.seed(seed), torch.manual_seed(seed)


def read(part):
    with open(os.path.join(data, part + ".texts"), encoding="utf-8", newline="") as file:
        texts = [line.strip() for line in file.read().strip().split("\\n")]
    labels = None
    if os.path.exists(os.path.join(data, part + ".labels")):
        with open(os.path.join(data, part + ".labels")) as file:
            labels = [line.strip() for line in file.readlines()]
    return list(range(len(texts))), texts, labels


names = ["train", "dev", "test", "dev-b", "test-b"]
parts = {name: read(name) for name in names + ["train_unlabeled"]}
assert parts["test"][2] is None and parts["test-b"][2] is None
if form in ("2019", "package"):
    params = classifier.pretrain(parts["train"][1] + parts["train_unlabeled"][1])
elif form == "transductive":
    params = classifier.pretrain([texts for _, texts, _ in parts.values()])
elif form == "2020":
    params = classifier.pretrain([parts["train"][1], parts["train_unlabeled"][1]])
else:
    params = None  # what a bundle without pretraining returns
others = [other.train(parts["train"][1], parts["train"][2])] if other else []
if params is None:
    trained = classifier.train(parts["train"][1], parts["train"][2])
else:
    trained = classifier.train(parts["train"][1], parts["train"][2], params)
if others:
    trained, others = pickle.loads(pickle.dumps((trained, others)))
    assert type(trained["config"]) is classifier.Config is not other.Config
    assert type(others[0]["config"]) is other.Config
    assert classifier.ATTENTION != other.ATTENTION, "each registers its own, with its random stream"
with open("preds.tsv", "w") as file:
    for name in names:
        ids, texts, labels = parts[name]
        predicted = classifier.classify(texts, trained)
        assert len(predicted) == len(texts)
        file.writelines("%s/%d\\t%s\\n" % (name, i, label) for i, label in zip(ids, predicted))
drawn = [random.random(), numpy.random.rand(), float(torch.rand(1))]
json.dump({"modules": ours, "random": drawn,
           "weights": [float(sum(p.detach().double().abs().sum() for p in one["model"].parameters()))
                       for one in [trained, *others]]},
          open("seen.json", "w"))
'''


# Importing torch takes seconds: done once, in a process whose children each run the harness.
BERT = "from transformers import BertForPreTraining, BertModel, BertTokenizer  # loaded lazily\n"
PARENT = BERT + """import os, runpy, sys, numpy, torch, tqdm
for form, seed, folder in zip(*[iter(sys.argv[2:])] * 3):
    child = os.fork()
    if not child:
        os.chdir(folder)
        os.environ.pop("FILIMDB_CACHE")
        sys.path[0], sys.argv[1:] = folder, [form, sys.argv[1], seed]
        runpy.run_path("evaluate.py", run_name="__main__")
        sys.stdout.flush()
        os._exit(0)  # taking all of torch down takes longer than the run
    if os.waitpid(child, 0)[1]:
        sys.exit(form)
"""
FORMS = [("2019", 1), ("2020", 2), ("transductive", 3), ("none", 4), ("package", 5)]
SUBMITTED = {"package": ["submissions/one/Name_123.py", "submissions/two/Other_456.py"]}
SCORE = """from .one import Name_123 as classifier
from .two import Other_456 as other
"""


@pytest.fixture(scope="module")
def submitted(tmp_path_factory, tiny_bert):
    """Run every form of the harness: form -> (its folder with preds.tsv, what it saw)."""
    data, argv, folders = write_filimdb(tmp_path_factory.mktemp("short"), words=6), [], {}
    for form, seed in FORMS:
        folders[form] = folder = tmp_path_factory.mktemp("submission")
        for place in SUBMITTED.get(form, ["classifier.py"]):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_text(handin.join(ROOT), encoding="utf-8")
        if form == "package":
            (folder / "submissions" / "score.py").write_text(SCORE)
        (folder / "evaluate.py").write_text(HARNESS, encoding="utf-8")
        argv += [form, str(seed), str(folder)]
    env = dict(os.environ, BERT_MODEL=tiny_bert, PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run([sys.executable, "-c", PARENT, str(data), *argv], env=env,
                          cwd=str(data), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode("utf-8")
    return {form: (folder, json.loads((folder / "seen.json").read_text()))
            for form, folder in folders.items()}


@pytest.mark.parametrize("form", dict(FORMS))
def test_the_file_alone_serves_the_harness(form, submitted):
    folder, seen = submitted[form]
    lines = (folder / "preds.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    keys = [f"{part}/{i}" for part in PARTS for i in range(SIZES[part])]
    assert [line.split("\t")[0] for line in lines] == keys
    assert {line.split("\t")[1] for line in lines} <= {"pos", "neg"}
    files = SUBMITTED.get(form, ["classifier.py"])
    place = folder / os.path.dirname(files[0])
    assert sorted(os.listdir(str(place))) == sorted(
        {".cache", os.path.basename(files[0])} | (
            {"evaluate.py", "preds.tsv", "seen.json"} if place == folder else set()))
    notes = [json.loads(path.read_text()) for path in place.glob(".cache/pretrained/*/note.json")]
    assert len(notes) == (form != "none")


@pytest.mark.parametrize("form", dict(FORMS))
def test_the_file_needs_nothing_of_the_repository(form, submitted):
    folder, seen = submitted[form]
    inside = [path for path in seen["modules"] if path.startswith(str(ROOT) + os.sep)
              and not path.startswith(sys.prefix)]
    assert not inside
    for place in SUBMITTED.get(form, ["classifier.py"]):
        assert str(folder / place) in seen["modules"]


def test_the_result_depends_neither_on_the_harness_seed_nor_on_its_form(submitted):
    """Nor on a second copy in the process: each has its attention and random streams."""
    one, seen = submitted["2019"]
    for form in ("2020", "package"):
        assert (submitted[form][0] / "preds.tsv").read_bytes() == (one / "preds.tsv").read_bytes()
        assert submitted[form][1]["weights"][0] == seen["weights"][0]
    assert submitted["package"][1]["weights"][1:] == submitted["none"][1]["weights"]
    weights = {seen["weights"][0] for _, seen in submitted.values()}
    assert len(weights) == 3, "other texts to pretrain on, other weights"


@pytest.mark.parametrize("form,seed", FORMS)
def test_the_harness_keeps_its_random_stream(form, seed, submitted):
    import random

    import numpy
    drawn = [random.Random(seed).random(), numpy.random.RandomState(seed).rand(),
             float(torch.rand(1, generator=torch.Generator().manual_seed(seed)))]
    assert submitted[form][1]["random"] == drawn


# ---- importing ---------------------------------------------------------------------------------

SIDE_EFFECTS = BERT + """
import logging, os, random, signal, sys, warnings
import numpy, pandas, torch, tqdm
def state():
    level = [logging.getLogger(name).level for name in ("", "transformers", "torch")]
    return [torch.initial_seed(), torch.get_rng_state().tolist(), random.getstate(),
            repr(numpy.random.get_state()), logging.root.handlers[:], level, dict(os.environ),
            signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), warnings.filters[:],
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            sorted(os.listdir(".")), sys.stdout, sys.excepthook]
already, before = set(sys.modules), state()  # what transformers and pandas bring is not ours
import evaluate, figures, handin, helpers, reference
changed = [i for i, (a, b) in enumerate(zip(before, state())) if a != b]
assert not changed, changed
loaded = {"matplotlib", "scipy", "sklearn", "IPython", "distributed"} & set(sys.modules)
assert not loaded - already, loaded
"""


def test_importing_has_no_side_effects(tmp_path):
    names = [path.name for path in ROOT.glob("*.py")]
    for name in names:
        shutil.copy(str(ROOT / name), str(tmp_path))
    done = subprocess.run([sys.executable, "-B", "-c", SIDE_EFFECTS], cwd=str(tmp_path),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(os.listdir(str(tmp_path))) == len(names)
