"""Trainings in threads of one process: the numbers of those that run one after another."""
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tools import DEV, TODAY, TRAIN, core, made_up_reviews, names_in

import cpu
import helpers
import studies
from checkpoints import weights_digest
from helpers import classify, load_bert, pretrain, train
from runtime import WEIGHTS_ONLY

TEXTS, LABELS = made_up_reviews(40)
QUICK = dict(seq_len=32, epochs=4, batch_size=8, accumulation=1, lr=1e-3, dropout=0.3)
LIMIT = 240  # seconds: a deadlock fails instead of hanging


pytestmark = pytest.mark.usefixtures("cache")


def outcome(model, seed):
    """Return the weights and losses of a training, or of a pretraining for an odd seed."""
    if seed % 2:
        note = pretrain(TEXTS, model=model, seed=seed, **QUICK)
        weights = torch.load(os.path.join(note["path"], "pytorch_model.bin"), **WEIGHTS_ONLY)
        return {name: value.tolist() for name, value in weights.items()}, note["loss_after"]
    params = train(TEXTS, LABELS, model=model, seed=seed, **QUICK)
    return weights_digest(params["model"]), [row["loss"] for row in params["history"]]


def in_threads(work, items):
    """Return work(item) of every item, all at once, each in a thread of its own."""
    with ThreadPoolExecutor(len(items)) as pool:
        return [future.result(LIMIT) for future in [pool.submit(work, item) for item in items]]


@pytest.mark.parametrize("threads", [1, 2])
def test_trainings_in_threads_give_the_same_numbers(tiny_bert, tmp_path, monkeypatch, threads):
    torch.set_num_threads(threads)
    disabled, state = logging.root.manager.disable, torch.get_rng_state().clone()
    one_by_one = [outcome(tiny_bert, seed) for seed in range(4)]
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "another"))
    assert in_threads(lambda seed: outcome(tiny_bert, seed), range(4)) == one_by_one
    assert logging.root.manager.disable == disabled
    assert torch.equal(torch.get_rng_state(), state), "the caller's random stream"
    torch.set_num_threads(1)


def test_who_loads_and_classifies_beside_a_training_changes_nothing(tiny_bert):
    params = train(TEXTS, LABELS, model=tiny_bert, seed=5, **QUICK)
    alone, labels = outcome(tiny_bert, 0), classify(TEXTS, params)
    done, others = threading.Event(), []

    def use():
        while not done.is_set():
            others.append(classify(TEXTS, params))
            load_bert(tiny_bert)

    user = threading.Thread(target=use)
    user.start()
    beside = outcome(tiny_bert, 0)
    done.set()
    user.join(LIMIT)
    assert beside == alone and others and all(other == labels for other in others)


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 drops by the process's generator")
def test_who_seeds_pytorch_beside_a_training_changes_nothing(tiny_bert, monkeypatch):
    alone, sample = outcome(tiny_bert, 0), helpers.sample_of_step

    def sample_and_seed(*args):
        torch.manual_seed(0)  # as another thread may at any time
        return sample(*args)

    monkeypatch.setattr(helpers, "sample_of_step", sample_and_seed)
    assert outcome(tiny_bert, 0) == alone


def test_threads_classify_with_the_same_params(tiny_bert):
    params, texts = train(TEXTS, LABELS, model=tiny_bert, **QUICK), made_up_reviews(600)[0]
    expected = classify(texts, params)
    parts = [texts[:300 + i] for i in range(12)]  # each is new to the cache
    assert in_threads(lambda part: classify(part, params), parts) == [
        expected[:len(part)] for part in parts]


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 has no such threads")
def test_pools_that_begin_at_once_compute_alone(monkeypatch):
    """A thread of a pool with several cores would wait for its own pool: for ever."""
    set_number = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: set_number(n) or time.sleep(0.05))
    cpu.worker_threads.cache_clear()
    pools = in_threads(cpu.worker_threads, [2, 3, 2, 4])
    cores = [set(pool.map(lambda _: torch.get_num_threads(), range(8))) for pool in pools]
    for pool in pools:
        pool.shutdown()
    cpu.worker_threads.cache_clear()
    set_number(1)
    assert cores == [{1}] * 4


def test_trials_in_threads_are_those_one_after_another(tiny_bert, tmp_path, monkeypatch):
    grid = [dict(QUICK, model=tiny_bert, seq_len=16, **point)
            for point in studies.product([0, 1], lr=[1e-3, 1e-2])]
    here = studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "here"))
    running, overlaps, real = [], [], helpers.train

    def spy(*args, **kwargs):
        running.append(1)
        overlaps.append(len(running))
        params = real(*args, **kwargs)
        time.sleep(0.05)
        running.pop()
        return params

    monkeypatch.setattr(helpers, "train", spy)
    found = in_threads(lambda _: studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "threads")),
                       range(4))
    assert overlaps == [1] * len(grid), "a trial's seconds and memory are its own; none runs twice"
    assert names_in(tmp_path / "threads") == names_in(tmp_path / "here")
    assert [list(map(core, rows)) for rows in found] == [list(map(core, here))] * 4
