"""studies.py: trials that survive crashes, honest statistics, checks of the set-up."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from unittest import mock

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import (
    DEV,
    ROOT,
    SOAK,
    TODAY,
    TRAIN,
    core,
    made_up_reviews,
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
SIMULATIONS = 1000 if SOAK else 300
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
             dropout=0.2, attention_dropout=0.2, whole_word=True, freeze=True, max_minutes=9.0,
             seed=9, data_seed=9, **({"precision": "bf16"} if TODAY else {}))


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
    told = ("Warning: trials: seed 1, data_seed 1: broken, left out of every mean "
            "(diverged: loss nan at step 7)\n")
    assert capsys.readouterr().out.count(told) == 1
    assert studies.run_trials(grid[:2], TRAIN, DEV, str(tmp_path)) == rows and calls == [0, 1]
    assert capsys.readouterr().out.count(told) == 1, "said again: this page shows it too"
    assert studies.values_of(rows) == [rows[0]["metrics"]["dev_accuracy"]]
    assert studies.spread(rows)[2:] == (1, 1)


def test_a_really_diverging_trial(grid, tmp_path):
    row, = studies.run_trials([dict(grid[0], lr=1e30, clip_norm=0.0, warmup=0.0, epochs=4)],
                              TRAIN, DEV, str(tmp_path))
    assert row["mark"].startswith("diverged: loss ") and "lower lr" in row["mark"]


def test_a_model_broken_by_its_last_step_is_marked(grid, tmp_path):
    row, = studies.run_trials([dict(grid[0], lr=1e30, clip_norm=0.0, warmup=0.0, batch_size=99,
                                    epochs=1)], TRAIN, DEV, str(tmp_path))
    assert len(row["history"]) <= 2 and row["metrics"] == {}
    assert row["mark"].startswith("diverged: the model gives NaN or infinite numbers")


def test_a_trial_that_says_one_class_is_marked(grid, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(helpers, "predict_logits", lambda model, tokens, *args, **kwargs:
                        torch.tensor([[0.0, 1.0]] * len(tokens)))
    row, = studies.run_trials(grid[:1], TRAIN, DEV, str(tmp_path))
    assert row["mark"] == "one class for all reviews"
    assert "Warning: trials: the trial: broken, left out of every mean (one class for all" in (
        capsys.readouterr().out)
    assert row["metrics"]["dev_accuracy"] == DEV.labels.count("pos") / 10
    assert studies.spread([row])[2:] == (0, 1)


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


@given(st.lists(st.tuples(SHARES, SHARES), min_size=3, max_size=9))
def test_paired_t_is_that_of_scipy(pairs):
    differences = [a - b for a, b in pairs]
    if statistics.stdev(differences) < 1e-6:
        return
    t, p = studies.paired_t(differences)
    reference = scipy.stats.ttest_rel(*zip(*pairs))
    assert t == pytest.approx(reference[0], rel=1e-6, abs=1e-9)
    assert p == pytest.approx(reference[1], rel=1e-6)


def test_paired_t_on_student_s_own_example():
    """Hours of sleep that two drugs gained ten patients: Student 1908, table 1."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    t, p = studies.paired_t([a - b for a, b in zip(one, two)])
    assert (round(t, 4), round(p, 6)) == (-4.0621, 0.002833)


def test_paired_t_without_variance():
    assert studies.paired_t([0.0, 0.0, 0.0]) == (0.0, 1.0)
    assert studies.paired_t([0.25, 0.25, 0.25]) == (math.inf, 0.0)
    assert studies.paired_t([-0.25, -0.25, -0.25]) == (-math.inf, 0.0)


def binomial_p(k, n):
    """Return scipy's exact two-sided p of k heads in n tosses of a fair coin."""
    if hasattr(scipy.stats, "binomtest"):
        return scipy.stats.binomtest(k, n).pvalue
    return scipy.stats.binom_test(k, n)


@given(st.lists(st.sampled_from(["00", "01", "10", "11"]), min_size=1, max_size=80))
def test_mcnemar_is_an_exact_binomial_test(pairs):
    a, b = map("".join, zip(*pairs))
    n = pairs.count("01") + pairs.count("10")
    assert studies.mcnemar(a, b) == pytest.approx(
        binomial_p(pairs.count("01"), n) if n else 1.0, rel=1e-9)
    assert studies.mcnemar(a, b) == studies.mcnemar(b, a)


def test_mcnemar_by_hand():
    for only_a, only_b, p in ((1, 9, 2 * (1 + 10) / 2 ** 10), (0, 5, 2 / 2 ** 5), (0, 6, 2 / 2 ** 6),
                              (2, 8, 2 * (1 + 10 + 45) / 2 ** 10), (3, 3, 1.0), (0, 0, 1.0)):
        a = "1" * only_a + "0" * only_b + "11100"
        b = "0" * only_a + "1" * only_b + "11100"
        assert studies.mcnemar(a, b) == pytest.approx(p)


@given(st.lists(SHARES, min_size=1, max_size=5), st.integers(1, 4))
def test_expected_best_is_the_mean_over_all_draws(values, n):
    draws = [max(draw) for draw in itertools.product(values, repeat=n)]
    assert studies.expected_best(values, n) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_spread_and_its_text():
    assert studies.spread(rows(0.86, 0.87, 0.88)) == pytest.approx((0.87, 0.01, 3, 0))
    assert studies.show(studies.spread(rows(0.86, 0.87, 0.88))) == "87.0 ± 1.0 % (3 seeds)"
    one = studies.spread(rows(0.866))
    assert one[0] == 0.866 and math.isnan(one.sd) and one[2:] == (1, 0)
    assert studies.show(one) == "86.6 % (1 seed)"
    marked = rows(0.9, 0.8) + [row(0, 2, "diverged: x"), row(0.5, 3, "one class for all reviews")]
    found = studies.spread(marked)
    assert (found.n, found.marked) == (2, 2) and found.mean == pytest.approx(0.85)
    assert studies.show(found) == "85.0 ± 7.1 % (2 seeds, 2 broken and left out)"
    assert studies.show(studies.Spread(1.23456, 0.0123, 2, 0), percent=False) == (
        "1.23 ± 0.012 (2 seeds)")
    nothing = studies.spread(marked[2:])
    assert math.isnan(nothing.mean) and nothing[2:] == (0, 2)
    assert studies.show(nothing) == "not measured (2 trials broken and left out)"


def test_rows_of():
    some = rows(0.1, 0.2, lr=1) + rows(0.3, 0.4, lr=2)
    assert studies.rows_of(some, lr=2) == some[2:]
    assert studies.rows_of(some, lr=2, seed=1) == some[3:]
    assert studies.values_of(studies.rows_of(some, seed=0)) == [0.1, 0.3]


def test_compare_over_seeds():
    a, b = (0.80, 0.81, 0.82), (0.83, 0.85, 0.85)
    result = studies.compare(rows(*a), rows(*b), names=("head", "tail"))
    assert result.difference == pytest.approx(0.1 / 3) and result.test == "paired t"
    assert result.p == pytest.approx(scipy.stats.ttest_rel(b, a)[1]) and result.significant
    assert result.text == ("tail against head: +3.3 points (sd 0.6, 3 seeds), significant "
                           f"(paired t, p = {result.p:.2g})")
    result = studies.compare(rows(*b), rows(*a), names=("head", "tail"))
    assert result.difference < 0 and result.text.startswith("tail against head: -3.3 points")
    result = studies.compare(rows(0.80, 0.85, 0.82), rows(0.83, 0.82, 0.83))
    assert not result.significant and "within noise (paired t, p = " in result.text
    assert result.p > 0.05


def test_compare_pairs_by_seed_not_by_place():
    a, b = rows(0.5, 0.6, 0.7), rows(0.52, 0.61, 0.73)
    assert studies.compare(a, b[::-1]) == studies.compare(a, b)


def test_compare_one_seed():
    a, b = row(0.5, correct="1" * 10 + "0" * 10), row(0.9, correct="1" * 18 + "00")
    result = studies.compare([a], [b])
    assert (result.test, result.p) == ("McNemar", pytest.approx(2 / 2 ** 8))
    assert result.significant and "significant, one seed (McNemar" in result.text
    result = studies.compare([a], [row(0.55, correct="1" * 11 + "0" * 9)])
    assert not result.significant and "within noise, one seed (McNemar, p = 1)" in result.text
    assert "B against A: +5.0 points," in result.text


def test_compare_two_seeds_is_not_tested():
    result = studies.compare(rows(0.5, 0.5), rows(0.9, 0.9))
    assert result.test == "none" and math.isnan(result.p) and not result.significant
    assert "not tested (2 seeds: too few to test)" in result.text


def test_compare_leaves_marked_and_unpaired_trials_out():
    a, b = rows(0.5, 0.6, 0.7, 0.8), rows(0.6, 0.71, 0.79, 0.9)
    b[3] = row(0, 3, "diverged: x")
    result = studies.compare(a, b + [row(0.1, 99)])
    assert result[:4] == studies.compare(a[:3], b[:3])[:4]
    assert result.text.endswith("3 broken or unpaired trials left out")
    nothing = studies.compare(a, [row(0, 0, "diverged: x")])
    assert nothing.test == "none" and not nothing.significant and "broken" in nothing.text


def test_compare_without_variance():
    same = studies.compare(rows(0.5, 0.75, 1.0), rows(0.5, 0.75, 1.0))
    assert (same.difference, same.p, same.significant) == (0.0, 1.0, False)
    assert same.text.startswith("B against A: +0.0 points (sd 0.0, 3 seeds), within noise")
    moved = studies.compare(rows(0.25, 0.5, 0.75), rows(0.5, 0.75, 1.0))
    assert (moved.difference, moved.p, moved.significant) == (0.25, 0.0, True)


def test_best_of_flags_the_edge():
    some = rows(0.5, 0.6, lr=1e-5) + rows(0.8, 0.9, lr=1e-4) + rows(0.7, 0.7, lr=1e-3)
    assert studies.best_of([1e-5, 1e-4, 1e-3], some, "lr") == (1e-4, "")
    best, note = studies.best_of([1e-5, 1e-4], some, "lr")
    assert (best, note) == (1e-4, ""), "a grid of two has only edges"
    some += rows(0.95, 0.95, lr=1e-2)
    best, note = studies.best_of([1e-2, 1e-5, 1e-4, 1e-3], some, "lr")
    assert best == 1e-2 and note == (
        " lr = 0.01 is at the edge of the grid; a wider one may do better.")
    assert studies.best_of([1e-5, 1e-4, 1e-3, 1e-2], some, "lr") == (best, note)
    lowest = rows(0.1, lr=3) + rows(0.2, lr=2) + rows(0.3, lr=1)
    assert "edge" in studies.best_of([3, 2, 1], lowest, "lr")[1]
    assert "edge" in studies.best_of([2, 1, 3], lowest, "lr")[1]
    marked = [row(0, 0, "diverged: x", lr=1e-1)]
    assert studies.best_of([1e-4, 1e-3, 1e-1], some + marked, "lr")[0] == 1e-4
    with pytest.raises(InputError, match="lr"):
        studies.best_of([1e-1], marked, "lr")


def noise_for(seed_sd, n, ease):
    """Return the sd of a run's own noise at which accuracy has `seed_sd` over seeds."""
    low, high = 1e-4, 10.0
    for _ in range(25):
        noise = (low + high) / 2
        p = scipy.stats.norm.cdf(ease / noise)  # of a right answer, by review
        low, high = (noise, high) if math.sqrt(np.mean(p * (1 - p)) / n) < seed_sd else (low, noise)
    return noise


def simulate(n_seeds, effect=0.0, n=500, seed_sd=0.005):
    """Return the share of simulated comparisons that `compare` calls significant.

    A review's ease is shared by all runs, about 85 % are easy enough; each run adds noise of its
    own. effect: by how much arm B finds everything easier.
    """
    draw, significant = np.random.RandomState(n_seeds), 0
    noise = noise_for(seed_sd, n, draw.normal(1.04, 1, 20000))
    accuracies = []
    for _ in range(SIMULATIONS):
        ease, arms = draw.normal(1.04, 1, n), []
        for shift in (0.0, effect):
            right = ease + shift + draw.normal(0, noise, (n_seeds, n)) > 0
            arms.append([row(r.mean(), seed, correct=(r + 48).astype(np.uint8).tobytes().decode())
                         for seed, r in enumerate(right)])
        significant += studies.compare(*arms).significant
        accuracies.append([r["metrics"]["dev_accuracy"] for r in arms[0]])
    assert abs(np.mean(accuracies) - 0.85) < 0.005, "the simulation is as it says"
    if n_seeds > 1:
        assert abs(math.sqrt(np.mean(np.var(accuracies, axis=1, ddof=1))) / seed_sd - 1) < 0.1
    return significant / SIMULATIONS


@pytest.mark.parametrize("n_seeds", [1, 3, 5])
def test_no_effect_is_seldom_called_one(n_seeds):
    assert simulate(n_seeds) <= 0.05 + 2.6 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


@pytest.mark.parametrize("n_seeds", [1, 3, 5])
def test_a_large_effect_is_mostly_found(n_seeds):
    assert simulate(n_seeds, effect=0.25) > 0.75


# ---- optimizers and regularizers ---------------------------------------------------------------

def test_counted_brings_collapsed_trials_back_but_not_diverged_ones():
    collapsed = dict(row(0.5), mark="one class for all reviews", metrics={"dev_accuracy": 0.5})
    diverged = row(0.0, mark="diverged: loss nan")
    assert studies.values_of([collapsed, diverged]) == []
    assert studies.values_of(studies.counted([collapsed, diverged, row(0.9)])) == [0.5, 0.9]
    assert collapsed["mark"], "the rows themselves stay"


def test_gap_and_leads():
    some = [dict(r, metrics=dict(r["metrics"], train_accuracy=0.9)) for r in rows(0.8, 0.7)]
    assert studies.gap(some) == pytest.approx(15)
    assert math.isnan(studies.gap([row(0, mark="diverged")]))
    base = [row(0.6, 1), row(0.5, 0), row(0, 2, "diverged")]
    assert studies.leads(base, rows(0.8, 0.7, 0.9)) == pytest.approx([30, 10])  # paired by seed
    assert studies.leads([], rows(0.8)) == []


def test_best_setting_breaks_a_tie_by_loss_and_passes_broken_cells_over():
    def cell(accuracy, loss, lr, mark=""):
        return dict(row(accuracy, mark=mark, lr=lr, weight_decay=0.0),
                    metrics={"dev_accuracy": accuracy, "dev_loss": loss})
    some = [cell(0.8, 0.5, 1e-3), cell(0.8, 0.4, 1e-2), cell(0.99, 0.1, 1.0, "one class")]
    assert studies.best_setting(some, ["lr", "weight_decay"]) == {"lr": 1e-2, "weight_decay": 0.0}
    with pytest.raises(InputError, match="no trial over lr"):
        studies.best_setting(some[2:], ["lr"])
    assert studies.at_edge({"lr": 1e-2, "weight_decay": 0.0}, some) == []
    assert studies.at_edge({"lr": 1e-3}, some) == ["lr"]
    assert studies.at_edge({"lr": 1e-3}, some[:2]) == [], "of two values each is at an edge"


def test_swing_is_the_mean_range_at_a_fixed_other():
    table = {(1, 0): 0.8, (1, 9): 0.7, (2, 0): 0.8, (2, 9): 0.5}
    some = [row(a, lr=lr, weight_decay=decay) for (lr, decay), a in table.items()]
    assert studies.swing(some, "weight_decay", "lr") == pytest.approx(20)
    assert studies.swing(some + [row(0, lr=3, weight_decay=0, mark="diverged")], "weight_decay",
                         "lr") == pytest.approx(20)


def test_a_zero_gradient_shows_the_two_decays(tiny_bert):
    settings = dict(lr=0.01, weight_decay=2.0)
    bert, _ = helpers.load_bert(tiny_bert)
    optimizer = helpers.make_optimizer(bert, make_config(model=tiny_bert, **settings))
    decayed = studies.decayed_names(bert, optimizer)
    after = {kind: studies.step_from_zero_gradient(tiny_bert, optimizer=kind, **settings)
             for kind in ("adam", "adamw")}
    name = "bert.embeddings.word_embeddings.weight"
    w = studies.weights_by_name(bert)[name].double()
    assert name in decayed and torch.equal(after["adamw"][name], w * 0.98)
    large = w.abs() > 1e-3
    assert ((w - after["adam"][name])[large].abs() / 0.01 - 1).abs().max() < 1e-3
    assert sum(row["tensors"] for row in studies.group_table(bert, optimizer)) == len(
        list(bert.parameters()))
    assert studies.group_table(bert, optimizer)[0]["tensors"] == len(decayed)


def test_decay_keeps_and_norm_ratios_by_hand():
    history = [{"lr": 0.1}, {"dev_loss": 1.0}, {"lr": 0.2}]
    assert studies.decay_keeps({"config": {"weight_decay": 2.0}, "history": history}) == (
        pytest.approx(0.8 * 0.6))
    before = {"a": torch.tensor([[3.0], [4.0], [100.0]])}
    after = {"a": torch.tensor([[6.0], [8.0], [100.0]])}
    kinds = {"some": {"a": torch.tensor([True, True, False])}, "all": {"a": slice(None)}}
    ratios = studies.norm_ratios(after, before, kinds)
    assert ratios["some"] == pytest.approx(2) and 1 < ratios["all"] < 1.01


def test_a_batch_has_the_gradients_of_its_mean_loss(tiny_bert):
    some = dict(model=tiny_bert, seq_len=16, batch_size=8, keep="head")
    whole, split = (torch.cat([g.flatten() for g in studies.batch_gradients(
        TRAIN, make_config(accumulation=n, **some))]) for n in (1, 4))
    assert whole.norm() > 0 and (whole - split).norm() < 1e-4 * whole.norm()


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=5), st.floats(0.01, 10))
def test_clipping_once(values, threshold):
    gradients = [torch.tensor([value]) for value in values]
    before, after = studies.clip_once(gradients, threshold)
    assert before == pytest.approx(math.sqrt(sum(v * v for v in values)), rel=1e-3, abs=1e-6)
    assert float(after.norm()) <= min(threshold, before) * (1 + 1e-3) + 1e-6
    assert [float(g) for g in gradients] == pytest.approx(values, rel=1e-6), "they stay"


def test_adam_does_not_see_the_scale_and_sgd_does():
    gradient = torch.tensor([3.0, -4.0])
    adam, sgd = ([studies.step_length(kind, s * gradient, 0.1) for s in (1, 0.01)]
                 for kind in (torch.optim.Adam, torch.optim.SGD))
    assert adam == pytest.approx([0.1 * math.sqrt(2)] * 2, rel=1e-4)
    assert sgd == pytest.approx([0.5, 0.005], rel=1e-4)
    spiked, guarded = studies.steps_around_spike(0.1), studies.steps_around_spike(0.1, 1.0)
    assert guarded == pytest.approx([1] * 60, rel=1e-3)
    assert spiked[:20] == pytest.approx(guarded[:20], rel=1e-3)
    assert spiked[-1] < 0.5


def test_clipped_shares_count_steps_above_the_threshold():
    history = [{"dev_loss": 1.0}] + [{"grad_norm": norm} for norm in (0.5, 1.0, 2.0, 3.0)]
    some = [dict(row(0.8, clip_norm=threshold), history=history) for threshold in (1.0, 9.0, 0.0)]
    assert studies.clipped_shares(some) == [0.5, 0, 0]
    assert studies.clipped_shares([dict(some[0], history=[])]) == [], "a diverged trial has none"


def test_unsettled_is_what_is_large_without_proof_or_untested():
    def test_of(difference, p):
        return studies.Comparison(difference, p, "", p < 0.05, "")
    tests = {"large": test_of(0.1, 0.2), "shown": test_of(0.1, 0.01), "small": test_of(0.01, 0.9),
             "negative": test_of(-0.1, 0.2), "two seeds": test_of(0.0, math.nan)}
    assert studies.unsettled(tests) == ["large", "negative", "two seeds"]


def test_dropouts_are_found_and_act(tiny_bert):
    bert, _ = helpers.load_bert(tiny_bert, dropout=0.17, attention_dropout=0.23)
    carriers, layers = studies.dropout_modules(bert), bert.config.num_hidden_layers
    assert {p: len(names) for p, names in carriers.items()} == {0.17: 2 * layers + 2, 0.23: layers}
    assert studies.starred(carriers[0.23]) == "bert.encoder.layer.*.attention.self.dropout"
    state = torch.get_rng_state()
    assert studies.passes_differ(tiny_bert, dropout=0.5, attention_dropout=0.0)
    assert not studies.passes_differ(tiny_bert, dropout=0.0, attention_dropout=0.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_around_changes_one_thing_at_a_time():
    default, grid = {"a": 1, "b": 2}, {"a": [0, 1], "b": [2, 3]}
    assert studies.around(default, grid, {"a": "the a", "b": "b"}) == {
        "default": default, "the a = 0": {"a": 0, "b": 2}, "b = 3": {"a": 1, "b": 3}}


def test_random_settings_stay_within_the_grid():
    default = {"weight_decay": 0.01, "dropout": 0.1, "attention_dropout": 0.1}
    grid = {"weight_decay": [0, 10.0], "dropout": [0, 0.3], "attention_dropout": [0, 0.2]}
    drawn = [[studies.draw_setting(default, grid, runtime.generator("x", i)) for i in range(200)]
             for _ in range(2)]
    assert drawn[0] == drawn[1]
    for key, low in (("weight_decay", 0.01), ("dropout", 0), ("attention_dropout", 0)):
        values = [setting[key] for setting in drawn[0]]
        assert low <= min(values) and max(values) <= max(grid[key])
    below = sum(setting["weight_decay"] < 0.3 for setting in drawn[0])
    assert 60 < below < 140, "half of a log-uniform draw lies below the geometric mean"


def test_luck_rises_as_the_expected_maximum_of_normal_draws():
    curve = studies.luck_curve(70, 2, 3)
    assert curve == pytest.approx([70, 70 + 2 / math.sqrt(math.pi), 70 + 3 / math.sqrt(math.pi)],
                                  abs=0.15)


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


@given(st.integers(1, 512), st.integers(1, 512), st.integers(0, 10 ** 11), st.integers(0, 10 ** 10))
def test_estimated_batch_is_monotone(seq_len, other, memory, more):
    def estimate(memory, seq_len, n_weights=110 * 10 ** 6):
        return studies.estimated_batch(SHAPE, n_weights, seq_len, memory)

    assert 0 <= estimate(memory, seq_len) <= estimate(memory + more, seq_len)
    assert estimate(memory, max(seq_len, other)) <= estimate(memory, min(seq_len, other))
    assert estimate(memory, seq_len, 110 * 10 ** 6 + more) <= estimate(memory, seq_len)


def test_estimated_batch_by_hand():
    # 12 layers x 128 tokens x (66 x 768 + 9 x 12 x 128) bytes = 99,090,432 an example
    weights = 10 ** 8
    for count in (0, 1, 37):
        memory = 16 * weights + count * 99090432
        assert studies.estimated_batch(SHAPE, weights, 128, memory) == count
        assert studies.estimated_batch(SHAPE, weights, 128, memory + 99090431) == count
    assert studies.estimated_batch(SHAPE, weights, 128, 0) == 0


def test_memory_of_this_computer():
    assert 10 ** 8 < studies.memory_of(torch.device("cpu")) < 10 ** 14


def test_batches_are_estimated_on_a_cpu_and_measured_on_a_gpu(tiny_bert, monkeypatch):
    model, cpu = helpers.load_bert(tiny_bert)[0], torch.device("cpu")
    how, sizes = studies.fitting_batches(model, [64, 512], cpu)
    weights = sum(p.numel() for p in model.parameters())
    assert how == "estimated" and sizes[0] > sizes[1] == studies.estimated_batch(
        model.config, weights, 512, studies.memory_of(cpu))
    monkeypatch.setattr(studies, "largest_batch", lambda model, n: 1000 // n)
    gpu = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(model, "to", lambda device: model)
    assert studies.fitting_batches(model, [64, 512], gpu) == ("measured", [15, 1])


# ---- reviews, whole and in parts; masked words -------------------------------------------------

def test_mistakes_are_the_surest_first(tiny_bert):
    config = make_config(model=tiny_bert, seq_len=16)
    model, tokenizer = helpers.load_bert(tiny_bert)
    params = {"model": model, "tokenizer": tokenizer, "config": config}
    found = studies.mistakes(params, DEV)
    guesses = studies.logits_of(params, DEV.texts).argmax(1).tolist()
    wrong = [i for i, label in enumerate(DEV.labels) if helpers.LABEL_IDS[label] != guesses[i]]
    assert sorted(i for _, i in found) == wrong != []
    assert found == sorted(found, reverse=True) and all(0.5 <= p < 1 for p, _ in found)


def test_enough_words_is_the_least_not_below_all():
    arms = {4: (0.50, 0.51, 0.52), 8: (0.80, 0.82, 0.80), 16: (0.79, 0.83, 0.82),
            0: (0.81, 0.80, 0.82)}
    some = [one for k, values in arms.items() for one in rows(*values, keep="tail", words=k)]
    k, test = studies.enough_words(some, [4, 8, 16], "tail")
    assert k == 8 and test.text.startswith("all against 8 words")
    assert studies.enough_words(some, [4], "tail") == (None, None)


def test_thirds_and_their_shares_right():
    assert studies.thirds([9, 1, 5, 7, 2, 3, 8]) == [[1, 4], [5, 2], [3, 6, 0]]
    some = [row(0.5, correct="0111"), row(0.5, 1, correct="1100"), row(0, 2, mark="diverged")]
    assert studies.shares_right(some, [0, 1]) == [0.5, 1] and len(studies.thirds([1])) == 3


def test_only_right_is_what_all_seeds_agree_on():
    late = [row(0, correct="1101"), row(0, 1, correct="1001"), row(0, 2, mark="diverged")]
    early = [row(0, correct="0011"), row(0, 1, correct="0001")]
    assert studies.only_right(late, early) == [0] and studies.only_right(early, late) == []
    assert studies.only_right(late, early[:0]) == []


def test_shuffled_words_are_the_same_words():
    texts = ["one two three four", "one two three four", ""]
    shuffled = studies.shuffled_words(iter(texts))
    assert [sorted(text.split()) for text in shuffled] == [sorted(t.split()) for t in texts]
    assert shuffled == studies.shuffled_words(texts) and shuffled[0] != shuffled[1]


def test_top_words_are_those_of_the_whole_model(tiny_bert):
    model, tokenizer = helpers.load_bert(tiny_bert, "mlm")
    sentences = ["the movie was [MASK] and good", "[MASK] film", "a never ending [MASK]", "[MASK]"]
    found = studies.top_words(model, tokenizer, sentences, k=4)
    for sentence, words in zip(sentences, found):
        tokens = tokenizer.tokenize("[CLS] " + sentence + " [SEP]")
        assert tokens.count("[MASK]") == 1
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokens)])
        logits = model(ids)[0][0, tokens.index("[MASK]")].tolist()
        best = sorted(range(len(logits)), key=lambda i: -logits[i])[:4]
        assert words == tokenizer.convert_ids_to_tokens(best)


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


def test_text_is_changed_as_bert_cleans_it():
    assert studies.without_accents("Ça, naïve Ångström") == "Ca, naive Angstrom"
    assert studies.without_controls("a\x85b\x00\u200bc\td\n") == "abc\td\n"
    assert studies.visible("a\x85\tb\x00") == "a\\x85\tb\\x00"


def test_passages_are_of_different_matches_and_texts():
    texts = ["one FILM here", "a film there and FILM", "PLOT " + "word " * 20 + "PLOTS", "nothing"]
    found = studies.passages(texts, r"\b[A-Z]{3,}")
    assert found == ["one FILM here", texts[2][:len("PLOT word word word")]]
    assert studies.passages(texts, r"\b[A-Z]{3,}", 1) == found[:1]
    assert studies.passages(texts, "absent") == []


def test_changes_of_a_text_that_change_its_tokens(tokenizer):
    texts = ["Good Film", "a good film", "CAFÉ", "bad\x85film"]
    assert studies.changed_by(str.upper, texts, tokenizer) == (3, 0)
    assert studies.changed_by(studies.without_accents, texts, tokenizer) == (1, 0)
    assert studies.changed_by(lambda text: text.replace("film", "plot"), texts, tokenizer) == (2, 2)
    [row] = studies.tokens_table(["A\x85 film"], tokenizer, in_lower_case=str.lower,
                                 cut=lambda text: text[:1])
    assert row == {"as written": "A\\x85 film", "tokens": "a film", "in lower case": "same",
                   "cut": "OTHER"}


def test_unknown_pieces_and_characters(tokenizer):
    texts = ["good \u96ea film", "bad", "\u96ea\u96ea"]
    tokens = [token for text in texts for token in tokenizer.tokenize(text)]
    share = 100 * tokens.count("[UNK]") / len(tokens)
    assert studies.unknown_share(texts, tokenizer) == pytest.approx(share) and share > 0
    assert studies.unknown_characters(texts, tokenizer) == {"\u96ea": 3}


def test_parameters_are_what_the_formula_says(tiny_bert):
    model, _ = helpers.load_bert(tiny_bert)
    blocks = studies.blocks_of(model)
    sizes = {key: getattr(model.config, key) for key in studies.BERT_BASE}
    assert blocks == studies.blocks_by_formula(sizes)
    assert list(blocks) == ["embeddings", "layer 1", "layer 2", "pooler", "classifier"]
    assert sum(blocks.values()) == sum(p.numel() for p in model.parameters())
    assert studies.in_layers(blocks) == 2 * blocks["layer 1"]
    base = studies.blocks_by_formula(studies.BERT_BASE)
    assert sum(base.values()) == 109482240 + 2 * 768 + 2  # BertModel as published, the classifier
    table = studies.blocks_table({"this": blocks, "base": base})
    assert [row["block"] for row in table] == [*base, "sum"]
    assert table[3]["this"] == "-" and table[-1]["base"] == "109,483,778 (100.0 %)"


@pytest.fixture(scope="module")
def rows_of_ids(tiny_bert):
    """(model, tokenizer, rows of ids of several lengths, their logits alone)."""
    model, tokenizer = helpers.load_bert(tiny_bert)
    rows = [helpers.add_special_tokens(studies.tokens_of(text, tokenizer), 16, "head", tokenizer)
            for text in made_up_reviews(8)[0]]
    return model, tokenizer, rows, torch.cat(
        [studies.padded_logits(model, [row], tokenizer) for row in rows])


def test_padding_is_tried_with_and_without_the_mask(rows_of_ids):
    model, tokenizer, rows, alone = rows_of_ids
    tried = studies.padding_trials(model, rows, [16, 40], tokenizer)
    assert list(tried) == [(kind, n) for kind in ("masked", "masked noise", "no mask")
                           for n in (16, 40)]
    for (kind, _), logits in tried.items():
        assert logits.shape == alone.shape
        assert (float((logits - alone).abs().max()) < 1e-5) == (kind != "no mask")
    ids = torch.full((1, 40), tokenizer.pad_token_id, dtype=torch.int64)
    ids[0, :len(rows[0])] = torch.tensor(rows[0])
    with runtime.inference_mode():
        assert torch.allclose(model(ids)[0][0], tried["no mask", 40][0], atol=1e-6)


def test_an_effect_counts_flips_and_accuracy():
    alone = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    logits = alone.clone()
    logits[0] = torch.tensor([1.0, 1.5])
    effect = studies.effect_of(logits, alone, ["neg", "pos", "neg", "pos"])
    assert effect == {"reviews": 4, "accuracy, %": "75.0", "labels that flip": 1,
                      "median change of a logit": "0", "largest change of a logit": "1.5"}


def test_an_outcome_is_one_line():
    assert studies.outcome_of(int, "3") == "fine"
    assert studies.outcome_of(helpers.make_config, None) == "fine"
    assert studies.outcome_of([].pop) == "IndexError: pop from empty list"
    with pytest.raises(ZeroDivisionError):
        studies.outcome_of(divmod, 1, 0)

    def refuse():
        raise InputError("give another")
    assert studies.outcome_of(refuse) == "give another"


@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 20),
       st.sampled_from(["head", "tail", "head+tail"]))
def test_survivors_are_what_is_kept(tokens, n, keep):
    assert studies.survivors(tokens, n, keep) == helpers.truncate(tokens, n, keep)


def test_truncation_and_encoder_tables_agree_and_would_not(tiny_bert, tokenizer, monkeypatch):
    texts = made_up_reviews(10)[0]
    other = helpers.load_bert(tiny_bert)[1]

    def wrong_ones():
        return ([row["differ from the slice"] for row in
                 studies.truncation_table(texts, 8, tokenizer)],
                [[row["equal to the encoder"], row["equal to the loaders"],
                  row["mask and segments fit"]] for row in
                 studies.encoder_table(texts, [8, 64], tokenizer, other)])
    assert wrong_ones() == ([0, 0, 0], [[10] * 3, [10] * 3])
    original = helpers.vectorize_ex

    def vectorize(*args):
        ids, segments, mask, label = original(*args)
        return [ids[0], ids[2], ids[1], *ids[3:]], [1] * len(ids), mask, label

    monkeypatch.setattr(helpers, "vectorize_ex", vectorize)
    assert wrong_ones() == ([10, 10, 10], [[0, 0, 0], [0, 0, 0]])


def test_a_short_example_has_a_word_in_parts(tokenizer):
    part = Part(["a", "b", "c"], ["good film", "the good " * 4 + "films", "films " * 30],
                ["pos", "neg", "pos"])
    assert studies.short_example(part, tokenizer) == (part.texts[1], "neg")
    assert studies.short_example(part, tokenizer, least=1000) == ("good film", "pos")


def test_words_come_back(tokenizer, monkeypatch):
    ids = studies.tokens_of("The films, Greatly!", tokenizer)
    assert studies.words_of(ids, tokenizer) == "the films , greatly !"
    assert studies.comes_back("The films, Greatly!", 32, tokenizer)
    monkeypatch.setattr(studies, "words_of", lambda ids, tokenizer: "the films")
    assert not studies.comes_back("The films, Greatly!", 32, tokenizer)


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
