"""Data-parallel training: without dropout two processes give what one gives; a dead one ends both."""
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from tools import ROOT

import runtime

pytestmark = pytest.mark.slow

SCRIPT = """
import collections, json, sys, torch
import files, helpers, runtime
from tools import made_up_reviews
model, out, mode = sys.argv[1:]
texts, labels = made_up_reviews(90)
common = dict(model=model, seq_len=32, dropout=0.0, attention_dropout=0.0, epochs=3, lr=1e-3)
if mode == "endless":
    common.update(epochs=100000)
if mode == "budget":
    common.update(epochs=100000, max_minutes=0.03)
with runtime.joined_processes():
    rank = runtime.processes()[0]
    open("%s.pid%d" % (out, rank), "w").write(str(__import__("os").getpid()))
    note = helpers.pretrain(texts, optimizer="adam", weight_decay=0.5,
                            **common) if mode == "plain" else None
    exchanges, all_reduce = collections.Counter(), torch.distributed.all_reduce
    def counted(tensor, *args, **kwargs):
        exchanges["parameters" if tensor.numel() > 10000 else "numbers"] += 1
        return all_reduce(tensor, *args, **kwargs)
    torch.distributed.all_reduce = counted
    params = helpers.train(texts, labels, note, dev=made_up_reviews(30, seed=5), batch_size=12,
                           accumulation=1, **common)
    unseen = made_up_reviews(41, seed=9)[0]
    exchanges = dict(exchanges, steps=params["history"][-1]["step"])
    predicted = helpers.classify(unseen, params)
    logits = helpers.predict_logits(params["model"], helpers.tokenize_all(
        unseen, params["tokenizer"]), params["tokenizer"], params["config"])
    files.save_json("%s.rank%d" % (out, rank), {
        "history": params["history"], "predicted": predicted, "logits": logits.tolist(),
        "curve": note and note["curve"], "exchanges": exchanges, "pooler": note and float(
            helpers.load_bert(note["path"], "mlm")[0].bert.pooler.dense.weight.detach().norm())})
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(count, model, out, mode="plain"):
    """Start the script in `count` processes as torchrun does; return them."""
    port = str(free_port())
    return [subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model, str(out), mode], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True, env=dict(
            os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), OMP_NUM_THREADS="1",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=port, FILIMDB_CACHE="%s-cache" % out))
        for rank in range(count)]


def outcome(count, model, out, mode="plain"):
    """Return what each process found, and what it printed."""
    printed = [process.communicate(timeout=240)[0] for process in launch(count, model, out, mode)]
    found = []
    for rank in range(count):
        path = "%s.rank%d" % (out, rank)
        assert os.path.exists(path), printed[rank]
        with open(path) as file:
            found.append(json.load(file))
    return found, printed


@pytest.fixture(scope="module")
def one(tiny_bert, tmp_path_factory):
    """What one process finds."""
    return outcome(1, tiny_bert, tmp_path_factory.mktemp("one") / "one")[0][0]


@pytest.mark.parametrize("count", [2, 4])
def test_without_dropout_several_processes_train_pretrain_and_predict_as_one(tiny_bert, tmp_path, one,
                                                                          count):
    several, printed = outcome(count, tiny_bert, tmp_path / "several")
    for found in several:
        assert len(found["history"]) == len(one["history"]) > 20
        for key in ("loss", "grad_norm", "lr", "dev_loss", "train_loss"):
            theirs, ours = ([row[key] for row in some["history"] if key in row]
                            for some in (found, one))
            assert theirs == pytest.approx(ours, abs=1e-5, rel=1e-3 * (key == "grad_norm")), key
        assert [p["held_out_loss"] for p in found["curve"]] == pytest.approx(
            [p["held_out_loss"] for p in one["curve"]], abs=1e-5)
        assert found["predicted"] == one["predicted"]
        assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(one["logits"]), atol=1e-5)
        # Masked LM gives the pooler no gradient, so no decay either: not even zeros for one.
        assert found["pooler"] == pytest.approx(one["pooler"], rel=1e-6)
        # Gradients, loss and flags of a step travel as one; then there is nothing else to exchange.
        exchanges = found["exchanges"]
        assert exchanges["parameters"] == exchanges["steps"] == 24
        assert exchanges.get("numbers", 0) <= 12, "the measurements' logits alone"
    assert "classifying" not in printed[1] and not printed[1].strip(), "the first alone prints"
    assert "training starts from" in printed[0]


def test_a_time_budget_ends_all_processes_at_the_same_step(tiny_bert, tmp_path):
    two, _ = outcome(2, tiny_bert, tmp_path / "two", "budget")
    assert two[0]["history"][-1]["step"] == two[1]["history"][-1]["step"] > 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other_within_a_minute(tiny_bert, tmp_path, victim):
    both = launch(2, tiny_bert, tmp_path / "two", "endless")
    try:
        deadline = time.time() + 120
        while not (tmp_path / "two-cache" / "tokens").exists():  # the run is under way
            assert time.time() < deadline and both[victim].poll() is None, both[victim].stdout.read()
            time.sleep(0.2)
        time.sleep(3)
        os.kill(both[victim].pid, signal.SIGKILL)
        printed = both[1 - victim].communicate(timeout=60)[0]
        assert both[1 - victim].returncode not in (0, None)
        assert "Error" in printed
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with runtime.joined_processes():
        assert runtime.processes() == (0, 1)
        assert runtime.my_share([3, 1, 2]) == [3, 1, 2]
        assert runtime.all_sum(1.5) == 1.5
        runtime.wait_for_all()
