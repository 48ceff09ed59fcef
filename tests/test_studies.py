"""studies.py: trials that survive crashes, honest statistics, checks of the set-up."""
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tools import (
    DEV,
    ROOT,
    SOAK,
    TODAY,
    TRAIN,
    core,
    make_tiny_bert,
    names_in,
    row,
)

import assignment
import effects
import files
import helpers
import runtime
import studies
from files import InputError
from helpers import Diverged, Part, make_config

REFERENCE = ROOT / "tests" / "reference_trials.json"
STACK = "today" if TODAY else "2019"  # dropout draws other masks on each
KILLS = 10 if SOAK else 2


@pytest.fixture(scope="module")
def grid(tiny_bert):
    """Four trials of some tenths of a second."""
    common = dict(model=tiny_bert, seq_len=16, epochs=1, batch_size=8, accumulation=1, keep="head")
    return [dict(common, **point) for point in studies.product([0, 1], lr=[1e-3, 1e-2])]


@pytest.fixture
def runs(monkeypatch):
    """Count calls of helpers.train: a list of (lr, seed)."""
    calls, original = [], helpers.train

    def train(*args, **kwargs):
        calls.append((kwargs["lr"], kwargs["seed"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(helpers, "train", train)
    return calls


def test_from_root(monkeypatch, tmp_path):
    monkeypatch.chdir(str(tmp_path))
    assert studies.from_root("build/x") == str(ROOT / "build" / "x")
    assert studies.from_root(str(tmp_path)) == str(tmp_path)


# ---- trials ------------------------------------------------------------------------------------

def test_product_has_seeds_innermost():
    assert studies.product([3, 4], lr=[1, 2], keep=["head"]) == [
        {"lr": lr, "keep": "head", "seed": seed, "data_seed": seed}
        for lr in (1, 2) for seed in (3, 4)]


def test_a_finished_trial_is_not_run_again(grid, runs, tmp_path):
    first = studies.run_trials(grid, TRAIN, DEV, str(tmp_path))
    assert runs == [(1e-3, 0), (1e-3, 1), (1e-2, 0), (1e-2, 1)]
    names, bytes_ = names_in(tmp_path), {p.name: p.read_bytes() for p in tmp_path.glob("*.json")}
    assert len(names) == 4
    again = studies.run_trials(grid[::-1] + grid[:1], TRAIN, DEV, str(tmp_path))
    assert len(runs) == 4
    assert again == first[::-1] + first[:1], "in the grid's order, as when they were run"
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.json")} == bytes_
    assert [(r["config"]["lr"], r["config"]["seed"]) for r in first] == runs
    studies.run_trials(grid + [dict(grid[0], seed=7)], TRAIN, DEV, str(tmp_path))
    assert runs[4:] == [(1e-3, 7)]


def reference_trial(model, store):
    """Return the losses of a trial with everything that a trial can have; dropout today alone.

    PyTorch 1.3 draws its masks by a library whose numbers differ from CPU to CPU.
    """
    dropouts = {} if TODAY else {"dropout": 0.0, "attention_dropout": 0.0}
    row = studies.run_trials([dict(model=model, seq_len=16, epochs=2, batch_size=8, lr=1e-3,
                                   accumulation=2, device="cpu", **dropouts)], TRAIN, DEV, store)[0]
    return [r["loss"] for r in row["history"] if "loss" in r] + [row["metrics"]["dev_loss"]]


def test_other_numbers_demand_another_results_version(tiny_bert, tmp_path):
    """When this fails: raise helpers.RESULTS_VERSION, then `python tests/test_studies.py --write`.

    Else the stores would hand out trials that today's code would not reproduce.
    """
    with open(str(REFERENCE)) as file:
        expected = json.load(file)
    assert expected["results_version"] == studies.RESULTS_VERSION
    assert reference_trial(tiny_bert, str(tmp_path)) == pytest.approx(expected[STACK], abs=2e-5)


def write_reference(folder):
    """Write this stack's losses; other losses under the same RESULTS_VERSION are refused."""
    with open(str(REFERENCE)) as file:
        known = json.load(file)
    if known["results_version"] != studies.RESULTS_VERSION:
        known = {"results_version": studies.RESULTS_VERSION}
    found = reference_trial(make_tiny_bert(os.path.join(folder, "tiny")), folder)
    assert STACK not in known or found == pytest.approx(known[STACK], abs=2e-5), \
        "the losses changed: raise helpers.RESULTS_VERSION first"
    files.save_json(str(REFERENCE), dict(known, **{STACK: found}))


def test_a_row_is_what_training_and_classifying_give(grid, tmp_path):
    row = studies.run_trials(grid[2:3], TRAIN, DEV, str(tmp_path))[0]
    params = helpers.train(TRAIN.texts, TRAIN.labels, **grid[2])
    predicted = helpers.classify(DEV.texts, params)
    assert row["correct"] == "".join("01"[a == b] for a, b in zip(DEV.labels, predicted))
    assert row["metrics"]["dev_accuracy"] == helpers.accuracy(DEV.labels, predicted)
    assert row["metrics"]["train_accuracy"] == helpers.accuracy(
        TRAIN.labels, helpers.classify(TRAIN.texts, params))
    assert row["metrics"]["dev_loss"] > 0
    assert row["config"] == helpers.settings(make_config(**grid[2]))
    assert (row["n_train"], row["n_dev"], row["model"]) == (16, 10, "tiny")
    assert row["seconds"] > 0 and row["peak_memory"] > 10 ** 6
    assert row["versions"] == runtime.VERSIONS and row["device"] == "cpu"
    assert [r["step"] for r in row["history"]] == [0, 1, 2]


OTHER = dict(seq_len=17, keep="tail", words=5, batch_size=4, accumulation=2, epochs=2, lr=2e-3,
             optimizer="adamw", weight_decay=0.1, warmup=0.2, decay="none", clip_norm=2.0,
             pooling="mean", dropout=0.2, attention_dropout=0.2, views=True, whole_word=True,
             freeze=True, max_minutes=9.0, seed=9, data_seed=9,
             **({"precision": "bf16"} if TODAY else {}))


def test_a_key_depends_on_all_that_matters(grid, tiny_bert, tmp_path, monkeypatch):
    def key(train=TRAIN, dev=DEV, **overrides):
        return studies.trial_key(make_config(**dict(grid[0], **overrides)), train, dev)

    assert {*OTHER, "precision"} == {*helpers.settings(make_config()), "precision"}
    keys = [key(), *(key(**{name: value}) for name, value in OTHER.items())]
    flipped = ["neg" if label == "pos" else "pos" for label in TRAIN.labels]
    keys += [key(train=TRAIN._replace(labels=flipped)), key(train=DEV), key(dev=TRAIN),
             key(train=DEV, dev=TRAIN), key(train=TRAIN._replace(texts=TRAIN.texts[::-1])),
             key(dev=DEV._replace(labels=DEV.labels[::-1])),
             key(dev=Part(*(column[:-1] for column in DEV))),
             key(model=make_tiny_bert(tmp_path / "other", seed=1))]
    for package in ("torch", "transformers"):
        with mock.patch.dict(studies.VERSIONS, {package: "9.9"}):
            keys.append(key())
    with mock.patch.object(studies, "RESULTS_VERSION", 10 ** 6):
        keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_key_does_not_depend_on_places(grid, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, str(tmp_path / "elsewhere"))
    keys = {studies.trial_key(make_config(**dict(grid[0], **overrides)), train, DEV)
            for overrides in ({}, {"device": "cpu"}, {"model": str(tmp_path / "elsewhere")})
            for train in (TRAIN, TRAIN._replace(ids=["x"] * 16))}
    assert len(keys) == 1


def flip_digit(data):
    at = re.search(rb'"dev_accuracy": \d\.\d', data).end() - 1
    return data[:at] + (b"7" if data[at:at + 1] != b"7" else b"8") + data[at + 1:]


DAMAGES = {"truncated": lambda data: data[:-9], "empty": lambda data: b"",
           "a digit": flip_digit, "no text": lambda data: b"\xff\xfe" + data,
           "no dict": lambda data: b"[]", "null": lambda data: b"null",
           "no checksum": lambda data: b'{"metrics": {}}'}


def test_a_damaged_trial_is_set_aside_and_run_again(grid, runs, tmp_path, capsys):
    first = studies.run_trials(grid[:1], TRAIN, DEV, str(tmp_path))[0]
    path, = tmp_path.glob("*.json")
    whole = path.read_bytes()
    for number, (name, damage) in enumerate(sorted(DAMAGES.items()), 2):
        path.write_bytes(damage(whole))
        capsys.readouterr()
        row = studies.run_trials(grid[:1], TRAIN, DEV, str(tmp_path))[0]
        assert len(runs) == number, name
        said = capsys.readouterr().out
        assert said.count(" is damaged") == 1 and path.name + " is damaged" in said, name
        assert (tmp_path / (path.name + ".damaged")).read_bytes() == damage(whole)
        assert core(row) == core(first) == core(json.loads(path.read_text())), name


CHILD = """import json, os, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import torch
torch.set_num_threads(1)
import helpers, studies, test_studies
store, model, log, mode = sys.argv[3:]
original, replace, written = helpers.train, os.replace, []

def say(word, lr, seed):
    with open(log, "a") as file:
        file.write("%s %g %d\\n" % (word, lr, seed))

def train(*args, **kwargs):
    say("began", kwargs["lr"], kwargs["seed"])
    time.sleep(0.1)  # so that the other one comes to the lock
    return original(*args, **kwargs)

def replace_once(source, target):
    written.append(target)
    if str(target).endswith(".json") and store in str(target) and mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)  # the worst moment: written, not yet in place
    replace(source, target)

helpers.train, os.replace = train, replace_once
grid = json.load(open(model + ".grid"))
open(log + ".ready%d" % os.getpid(), "w").close()
while not os.path.exists(log + ".go"):
    time.sleep(0.01)
rows = studies.run_trials(grid, test_studies.TRAIN, test_studies.DEV, store)
json.dump(rows, open(log + ".rows%d" % os.getpid(), "w"))
"""


@pytest.fixture
def start(grid, tiny_bert, tmp_path):
    """Return start(store, mode): a process that runs the grid once LOG.go exists."""
    files.save_json(tiny_bert + ".grid", grid)
    started = []

    def start(store, mode=""):
        tests = str(ROOT / "tests")
        started.append(subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT), tests, str(store), tiny_bert,
             str(tmp_path / "log"), mode], stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_for(folder, pattern, n, *processes):
    """Wait until n files are there."""
    while len(list(folder.glob(pattern))) < n:
        assert all(p.poll() is None for p in processes), processes[0].stdout.read()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(grid, tmp_path_factory):
    """The grid run in peace: (its files' names, its rows)."""
    store = tmp_path_factory.mktemp("undisturbed")
    rows = studies.run_trials(grid, TRAIN, DEV, str(store))
    return names_in(store), list(map(core, rows))


def test_stored_trials_are_shown_and_none_is_run(grid, runs, tmp_path, capsys, monkeypatch):
    with pytest.raises(InputError, match=r"rates: none of the 4 trials is in the store \S+; rep"):
        studies.stored_trials(grid, TRAIN, DEV, str(tmp_path), "rates")
    rows = studies.run_trials(grid[1:3], TRAIN, DEV, str(tmp_path))
    del runs[:]
    capsys.readouterr()
    assert studies.stored_trials(grid, TRAIN, DEV, str(tmp_path), "rates") == rows
    assert capsys.readouterr().out.startswith("rates: 2 of 4 trials are not in the store")
    assert studies.stored_trials(grid[1:3], TRAIN, DEV, str(tmp_path)) == rows
    assert "not in the store" not in capsys.readouterr().out and runs == []
    monkeypatch.setattr(studies, "read_row", lambda path: dict(rows[0], mark="diverged"))
    studies.stored_trials(grid[1:3], TRAIN, DEV, str(tmp_path), "rates")
    assert capsys.readouterr().out.count("failed (diverged)") == 2


@pytest.mark.slow
def test_two_processes_share_a_store(start, grid, undisturbed, tmp_path):
    store = tmp_path / "store"
    pair = [start(store), start(store)]
    wait_for(tmp_path, "log.ready*", 2, *pair)
    (tmp_path / "log.go").touch()
    for process in pair:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    began = (tmp_path / "log").read_text().splitlines()
    assert sorted(began) == sorted("began %g %d" % (p["lr"], p["seed"]) for p in grid)
    rows = [json.loads(path.read_text()) for path in tmp_path.glob("log.rows*")]
    assert len(rows) == 2 and rows[0] == rows[1]
    assert names_in(store) == undisturbed[0] and list(map(core, rows[0])) == undisturbed[1]


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_study_goes_on(kill, start, grid, undisturbed, tmp_path, capsys):
    store, random_ = tmp_path / "store", random.Random(kill)
    process = start(store, "" if kill else "killed")
    wait_for(tmp_path, "log.ready*", 1, process)
    (tmp_path / "log.go").touch()
    if kill:
        time.sleep(random_.random() * 1.5)
        process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL or kill
    finished = names_in(store)
    assert kill or not finished
    rows = studies.run_trials(grid, TRAIN, DEV, str(store))
    assert names_in(store) == undisturbed[0] and set(finished) <= set(names_in(store))
    assert list(map(core, rows)) == undisturbed[1]
    assert "damaged" not in capsys.readouterr().out, "a half-written file was taken for a trial"


def test_a_trial_in_another_process_is_waited_for(grid, tmp_path):
    config = make_config(**grid[0])
    path = str(tmp_path / studies.trial_key(config, TRAIN, DEV)) + ".json"
    with files.try_lock(path + ".lock") as mine:
        assert mine
        assert studies.run_once(config, TRAIN, DEV, str(tmp_path)) is None
    assert studies.run_once(config, TRAIN, DEV, str(tmp_path))["metrics"]


def test_a_really_diverging_trial(grid, tmp_path):
    row, = studies.run_trials([dict(grid[0], lr=1e30, clip_norm=0.0, warmup=0.0, epochs=4)],
                              TRAIN, DEV, str(tmp_path))
    assert row["mark"].startswith("diverged: loss ") and "lower lr" in row["mark"]


def test_a_model_broken_by_its_last_step_is_marked(grid, tmp_path):
    row, = studies.run_trials([dict(grid[0], lr=1e30, clip_norm=0.0, warmup=0.0, batch_size=99,
                                    epochs=1)], TRAIN, DEV, str(tmp_path))
    assert len(row["history"]) <= 2 and row["metrics"] == {}
    assert row["mark"].startswith("diverged: the model gives NaN or infinite numbers")


def test_a_diverged_trial_is_a_result(grid, tmp_path, monkeypatch, capsys):
    original, calls = helpers.train, []

    def train(*args, **kwargs):
        calls.append(kwargs["seed"])
        if kwargs["seed"] == 1:
            raise Diverged("loss nan at step 7")
        return original(*args, **kwargs)

    monkeypatch.setattr(helpers, "train", train)
    monkeypatch.setattr(helpers, "predict_logits", lambda model, tokens, *args, **kwargs:
                        torch.eye(2).repeat(len(tokens), 1)[:len(tokens)])
    rows = studies.run_trials(grid[:2], TRAIN, DEV, str(tmp_path))
    assert [row["mark"] for row in rows] == ["", "diverged: loss nan at step 7"]
    assert rows[1]["metrics"] == {} and rows[1]["correct"] == ""
    told = ("Warning: trials: seed 1, data_seed 1: failed "
            "(diverged: loss nan at step 7)\n")
    assert capsys.readouterr().out.count(told) == 1
    assert studies.run_trials(grid[:2], TRAIN, DEV, str(tmp_path)) == rows and calls == [0, 1]
    assert capsys.readouterr().out.count(told) == 1, "said again: this page shows it too"
    assert list(effects.as_table(rows)["failed"]) == ["", "diverged: loss nan at step 7"]


def test_a_trial_that_says_one_class_is_marked(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(helpers, "predict_logits", lambda model, tokens, *args, **kwargs:
                        torch.tensor([[0.0, 1.0]] * len(tokens)))
    row, = studies.run_trials(grid[:1], TRAIN, DEV, str(tmp_path))
    assert row["mark"] == "one class for all reviews"
    assert "Warning: trials: the trial: failed (one class for all" in (
        capsys.readouterr().out)
    assert row["metrics"]["dev_accuracy"] == DEV.labels.count("pos") / 10


# ---- trials on a cluster -----------------------------------------------------------------------

def test_a_scheduler_without_its_package_is_refused(grid, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match="distributed is not installed"):
        studies.run_trials(grid, TRAIN, DEV, str(tmp_path), scheduler="tcp://nowhere:8786")


def test_a_stand_in_cluster_gives_the_same_rows(grid, undisturbed, tmp_path, monkeypatch):
    class Client:
        def __init__(self, address, timeout):
            assert address == "tcp://here:1" and timeout > 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def map(self, function, jobs, pure, retries):
            assert not pure and retries > 0
            return [function(job) for job in reversed(jobs)][::-1]

        def gather(self, futures):
            return futures

    monkeypatch.setitem(sys.modules, "distributed", types.SimpleNamespace(Client=Client))
    rows = studies.run_trials(grid, TRAIN, DEV, str(tmp_path), scheduler="tcp://here:1")
    assert names_in(tmp_path) == undisturbed[0] and list(map(core, rows)) == undisturbed[1]


@pytest.mark.slow
def test_a_cluster_gives_the_same_rows(grid, undisturbed, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
                                  dashboard_address=None) as cluster:
        rows = studies.run_trials(grid, TRAIN, DEV, str(tmp_path),
                                  scheduler=cluster.scheduler_address)
    assert names_in(tmp_path) == undisturbed[0] and list(map(core, rows)) == undisturbed[1]


# ---- statistics --------------------------------------------------------------------------------


def rows(*accuracies, **config):
    return [row(accuracy, seed, **config) for seed, accuracy in enumerate(accuracies)]


SHARES = st.floats(0, 1)


# ---- optimizers and regularizers ---------------------------------------------------------------


# ---- memory ------------------------------------------------------------------------------------

def test_largest_batch_finds_every_limit():
    for limit, most in itertools.product(range(301), (1, 37, 128, 1024)):
        asked = []

        def fits(model, optimizer, size, seq_len):
            asked.append(size)
            assert len(asked) <= 20 and 1 <= size <= most
            return size <= limit

        with mock.patch.object(studies, "step_fits", fits):
            assert studies.largest_batch(torch.nn.Linear(1, 1), 8, most) == min(limit, most)
        assert len(asked) == len(set(asked))


def test_the_largest_batch_has_no_silent_top_and_leaves_the_model_as_it_was(tiny_bert, monkeypatch):
    model, _ = helpers.load_bert(tiny_bert)
    old, true_fits = [p.detach().clone() for p in model.parameters()], studies.step_fits
    monkeypatch.setattr(studies, "step_fits", lambda model, optimizer, size, seq_len: (
        size <= 5000 and true_fits(model, optimizer, 1, seq_len)))
    assert studies.largest_batch(model, 4) == 5000
    assert all(torch.equal(a, b) for a, b in zip(old, model.parameters())) and not model.training


@pytest.fixture
def stepped(tiny_bert):
    """A model and its optimizer, for step_fits."""
    model, _ = helpers.load_bert(tiny_bert)
    return model, helpers.make_optimizer(model, make_config())


def has_grads(model):
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters())


def test_a_step_that_fits_is_a_real_one(stepped):
    model, optimizer = stepped
    old = [p.detach().clone() for p in model.parameters()]
    assert studies.step_fits(model, optimizer, 2, 8) is True
    assert sum(bool((a != b).any()) for a, b in zip(old, model.parameters())) > 30
    assert not has_grads(model)


def test_a_step_that_fits_is_in_fp32(stepped, monkeypatch):
    """So the page says, whatever the machine would take by itself."""
    original, taken = helpers.autocast, []
    monkeypatch.setattr(helpers, "autocast", lambda device, precision: (
        taken.append(precision), original(device, precision))[1])
    assert studies.step_fits(*stepped, 2, 8) is True and taken == ["fp32"]


OUT_OF_MEMORY = [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
                 RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_does_not_fit(where, error, stepped, monkeypatch):
    model, optimizer = stepped

    def fail(*args, **kwargs):
        raise error

    if where == "forward":
        monkeypatch.setattr(model, "forward", fail)
    else:  # when the later layers already have their gradients
        model.bert.embeddings.word_embeddings.weight.register_hook(fail)
    assert studies.step_fits(model, optimizer, 2, 8) is False
    assert not has_grads(model)


@pytest.mark.parametrize("error", [
    RuntimeError("shape mismatch"), KeyError("memory"),
    RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_another_error_is_not_taken_for_memory(error, stepped, monkeypatch):
    model, optimizer = stepped

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(type(error)):
        studies.step_fits(model, optimizer, 2, 8)
    assert not has_grads(model)


SHAPE = types.SimpleNamespace(hidden_size=768, num_attention_heads=12, num_hidden_layers=12)


def test_memory_of_this_computer():
    assert 10 ** 8 < studies.memory_of(torch.device("cpu")) < 10 ** 14


# ---- reviews, whole and in parts; masked words -------------------------------------------------


def test_shuffled_words_are_the_same_words():
    texts = ["one two three four", "one two three four", ""]
    shuffled = studies.shuffled_words(iter(texts))
    assert [sorted(text.split()) for text in shuffled] == [sorted(t.split()) for t in texts]
    assert shuffled == studies.shuffled_words(texts) and shuffled[0] != shuffled[1]


def test_shuffled_words_are_the_same_tokens(tiny_bert):
    """BERT drops a control character that Python takes for a blank: one word, before and after."""
    _, tokenizer = helpers.load_bert(tiny_bert)
    texts = ["a good\x85bad film of\x1fa time", "good\tbad a\nfilm  good"]
    before, after = (helpers.tokenize_all(some, tokenizer)
                     for some in (texts, studies.shuffled_words(texts)))
    for one, other in zip(before, after):
        assert sorted(one) == sorted(other)


# ---- checks of the set-up and of the vectors ---------------------------------------------------

def versions_row(package, matches):
    return {"package": package, "matches": matches}


def test_a_version_matches_its_pins_to_their_digits():
    assert studies.matches("3.11.7", "3.10 3.11 3.12") and studies.matches("1.3", "1.3")
    assert studies.matches("1.3.1", "1.3") and not studies.matches("1.31", "1.3")
    assert not studies.matches("1.3", "1.3.1") and not studies.matches("2.0", "")


def test_a_stack_is_told_by_three_packages():
    core = [versions_row(package, "2019") for package in runtime.VERSIONS]
    assert studies.stack_of(core) == ("the pinned stack of 2019", [])
    lesser = [versions_row("scipy", "2019 today"), versions_row("tqdm", "")]
    assert studies.stack_of(core + lesser) == ("the pinned stack of 2019", ["tqdm"])
    mixed = core[:2] + [versions_row("transformers", "today")]
    name, unlike = studies.stack_of(mixed)
    assert name.startswith("neither") and unlike == ["transformers"]


def test_the_versions_table_reads_both_requirement_files():
    table = {row["package"]: row for row in studies.versions_table(["torch", "no_such_package"])}
    assert list(table) == ["python", "torch", "no_such_package"]
    assert table["torch"]["here"] == runtime.VERSIONS["torch"]
    assert table["torch"]["pinned, 2019"] == "1.3" and table["python"]["pinned, 2019"] == "3.7"
    assert table["torch"]["pinned, today"] == studies.pins_of("requirements.txt")["torch"]
    assert table["no_such_package"]["here"] == "-" and not table["no_such_package"]["matches"]


def test_lengths_are_cut_at_limits():
    lengths = {"train": np.array([10, 20, 64, 65, 300]), "dev-b": np.array([5, 6, 7])}
    assert studies.cut_shares(lengths["train"], [64, 256, 512]) == [40.0, 20.0, 0.0]
    first, second = studies.lengths_table(lengths, [64, 128])
    assert first == {"part": "train", "reviews": 5, "median": 64.0, "9 in 10 up to": 206,
                     "longest": 300, "% cut at 64": 40.0, "% cut at 128": 20.0,
                     "% padding at 128": round(100 - (10 + 20 + 64 + 65 + 128) / 6.4, 1)}
    assert second["% cut at 64"] == 0.0


if __name__ == "__main__":
    import tempfile
    assert sys.argv[1:] == ["--write"], test_other_numbers_demand_another_results_version.__doc__
    with tempfile.TemporaryDirectory() as place:
        os.environ["FILIMDB_CACHE"] = place
        torch.set_num_threads(1)
        write_reference(place)


# ---- a page's study ----------------------------------------------------------------------------

def test_the_baselines_learn_from_the_part_and_the_words_that_are_named(tmp_path):
    study = studies.Study("page", "sample", str(ROOT / "data/sample"),
                          str(ROOT / "data/sample/bert"), str(tmp_path), 60, 40, seq_len=64)
    few = helpers.subset(study.train, 20)
    other = few._replace(ids=[id + "b" for id in few.ids], labels=["neg"] * 19 + ["pos"])
    whole, less, words = study.baselines(), study.baselines(train=few), study.baselines(words=3)
    assert study.baselines(few) is less is not whole and study.baselines() is whole
    assert len({one["TF-IDF"] for one in (whole, less, words)}) == 3
    assert study.baselines(other)["commonest label"] == studies.right_guesses(
        ["neg"] * 40, study.dev.labels)
    read, unseen = (helpers.texts_as_read(part.texts, helpers.load_bert(study.model)[1],
                                          study.config()) for part in (few, study.dev))
    assert less["TF-IDF"] == studies.right_guesses(
        helpers.tfidf_regression(read, few.labels, unseen), study.dev.labels)
def test_every_effect_of_an_answer_begins_like_a_sentence():
    study = studies.Study.__new__(studies.Study)  # what an answer needs of it, no more
    study.answers = []
    effect = effects.Effect(("lr 2", "1"), 1.0, 0.0, 2.0, 0.5, n_seeds=2, n_reviews=9, margin=1.5)
    study.answer("", "Q1. Does it?", [effect, effect], expected="better")
    answer = study.answers[0]["answer"]
    assert answer.count("Lr 2 against 1: +1.0 points") == 2
    assert assignment.first_sentence(answer) + " " + assignment.first_sentence(answer) == answer


def test_a_model_that_is_replaced_within_a_group_of_trials_is_told(tmp_path, monkeypatch):
    origins = iter("abac")
    monkeypatch.setattr(studies, "origin_of", lambda model: next(origins, "c"))
    monkeypatch.setattr(studies, "run_trials", lambda grid, *_: [])
    study = studies.Study("page", "sample", str(ROOT / "data/sample"), str(ROOT / "data/sample/bert"),
                          str(tmp_path), 3, 4, [0], seq_len=16)
    with pytest.raises(InputError, match="rates: a model's files were replaced meanwhile"):
        study.run("rates", lr=[1e-3])


def test_a_page_notes_its_trials_and_its_run_for_the_report(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(studies, "show_html", lambda text, plain="", **notes: told.append((plain, notes)))

    def made_up(grid, train, dev, store, what):
        """Return sound rows, but for a first that failed; half of each dev is right."""
        plan = json.loads((tmp_path / "plan" / "page.json").read_text())
        assert [len(group["keys"]) for group in plan] == [len(grid)], "noted before it trains"
        return [dict(row(0.5, config["seed"], "lost" if i == 0 else "", "" if i == 0 else "1100"),
                     history=[], seconds=30.0, checksum=f"{i}" * 64, model="m", n_train=3, n_dev=4)
                for i, config in enumerate(grid)]

    monkeypatch.setattr(studies, "run_trials", made_up)
    study = studies.Study("page", "sample", str(ROOT / "data/sample"), str(ROOT / "data/sample/bert"),
                          str(tmp_path), 3, 4, [0, 1], seq_len=16)
    dev = study.dev._replace(texts=[study.train.texts[0], *study.dev.texts[1:3], study.train.texts[2]])
    trials = study.run("rates", dev=dev, lr=[1e-3, 1e-4])
    (said, notes), = told
    assert len(trials) == 4 and said == "rates: 4 trials, 2.0 minutes of training"
    assert notes == {"trials": {"seconds": {f"{i}" * 16: 30.0 for i in range(4)},
                                "predictions": {f"{i}" * 16: [4, 2, 2, 1] for i in (1, 2, 3)}}}
    data, kept = study._repr_mimebundle_()
    assert data["text/html"] == study._repr_html_() and (kept["run"]["n_train"], kept["run"]["n_dev"]) == (3, 4)
    assert len(kept["run"]["data"]) == 64 and kept["run"]["weights"] == studies.origin_of(study.model)
    assert kept["run"]["versions"] == runtime.VERSIONS and kept["run"]["seeds"] == 2
    assert json.loads(json.dumps(kept)) == kept, "a notebook's file can hold it"
    other = tmp_path / "other"
    shutil.copytree(str(ROOT / "data/sample"), str(other))
    with open(str(other / "dev.texts"), "a") as file:
        file.write("one more\n")
    study.data_dir = str(other)
    assert study.run_note()["data"] != kept["run"]["data"]


def test_a_page_says_which_trials_were_missing(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(studies, "show_html", lambda text, plain="", **notes: shown.append(plain))
    monkeypatch.setenv("FILIMDB_STORED", "1")
    monkeypatch.setattr(studies, "stored_trials", lambda grid, *_: [dict(
        row(0.5, config["seed"]), history=[], seconds=1.0, checksum="0" * 64, model="m", n_train=3,
        n_dev=4) for config in grid if config["seed"]])
    study = studies.Study("page", "sample", str(ROOT / "data/sample"), str(ROOT / "data/sample/bert"),
                          str(tmp_path), 3, 4, [0, 1, 2], seq_len=16)
    study.summary()
    assert "not there" not in shown[-1]
    study.run("rates", lr=[1e-3, 1e-4])
    study.run("again", seeds=[1, 2])
    study.summary()
    assert shown[-1] == "Trials that were not there when this page was made: rates: 2 of 6."
