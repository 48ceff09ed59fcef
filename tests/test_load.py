"""Large loads: 100,000 reviews to classify, 75,000 to pretrain on; `make soak` has these counts.

    SOAK=1 python -m pytest -s tests/test_load.py      # prints seconds, memory, lines of progress
"""
import json
import os
import re
import resource
import subprocess
import sys
import time

import pytest
from tools import ROOT, SOAK

import helpers
import runtime

pytestmark = pytest.mark.slow

SAMPLE, TINY = str(ROOT / "data" / "sample"), str(ROOT / "data" / "sample" / "bert")
LOADS = {"classify": (10000, 100000), "pretrain": (7500, 75000)} if SOAK else {
    "classify": (600,), "pretrain": (200,)}
BAR = r"%s: %s [\d,]+ of [\d,]+(, \w+ [\d,]+ of [\d,]+)*(, [\w ]+ left)?"
UNITS = {"tokenizing": "review", "classifying": "token", "pretraining": "step"}
NAMES = {"classify": "classifying", "pretrain": "pretraining"}


def many_reviews(n):
    """Return n different reviews: those of the sample in turn, each with a number."""
    texts = [text for part in ("train", "dev", "test", "train_unlabeled")
             for text in helpers.read_lines(os.path.join(SAMPLE, part + ".texts"))]
    return [f"{i} {texts[i % len(texts)]}" for i in range(n)]


def peak():
    """Return this process's peak memory so far in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(kind, n):
    """Do it; print as JSON: seconds, of the CPU, tokens, bytes over those with the model loaded."""
    if not SOAK:  # a line for each update, not every minute
        real = runtime.Progress.update

        def update(bar, n=1):
            (bar.parents or [bar])[0].shown = 0
            real(bar, n)

        runtime.Progress.update = update
    model, tokenizer = helpers.load_bert(TINY, "mlm" if kind == "pretrain" else "classifier")
    model(helpers.pad([[1, 2, 3]], 0)["input_ids"])
    before, texts, began = peak(), many_reviews(n), (time.time(), time.process_time())
    if kind == "classify":
        config = helpers.make_config(model=TINY, seq_len=64, device="cpu")
        params = {"model": model, "tokenizer": tokenizer, "config": config}
        assert len(helpers.classify(texts, params)) == n
    else:
        texts = [" ".join(text.split()[:16]) for text in texts]  # one window each
        note = helpers.pretrain(texts, model=TINY, seq_len=64, epochs=1, lr=5e-4, device="cpu")
        assert note["n_texts"] == n <= note["n_windows"] + note["n_held_out"]
    seconds = time.time() - began[0], time.process_time() - began[1]
    more = peak() - before
    lengths = helpers.tokenize_all(texts, tokenizer).lengths
    print(json.dumps([*seconds, sum(min(n, 62) + 2 for n in lengths), more]))


def measured(kind, n, folder):
    """Do the work in a fresh process; return its lines and what it printed at last."""
    code = "import sys, test_load; test_load.work(%r, %d)" % (kind, n)
    env = dict(os.environ, PYTHONPATH=str(ROOT / "tests"), FILIMDB_CACHE=str(folder))
    done = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    *lines, last = done.stdout.decode().strip().split("\n")
    return (lines, *json.loads(last))


@pytest.mark.parametrize("kind", sorted(LOADS))
def test_memory_is_bounded_and_progress_is_told(kind, tmp_path):
    for n in LOADS[kind]:
        lines, seconds, cpu, tokens, more = measured(kind, n, tmp_path / str(n))
        bars = [line for line in lines if re.match(r"\w+: \w+ [\d,]+ of ", line)]
        print("%s %d: %.0f s (CPU %.0f s), %.1f CPU microseconds a token (%.2f million), peak %.0f MB "
              "above the model, %d lines of progress" % (kind, n, seconds, cpu, 1e6 * cpu / tokens,
                                                         tokens / 1e6, more / 2 ** 20, len(bars)))
        for line in bars:
            what = line.split(":")[0]
            assert re.match(BAR % (what, UNITS[what]) + "$", line), line
        assert not any("\r" in line for line in lines)
        assert more < (2048 if SOAK else 200) * 2 ** 20
    assert {NAMES[kind]} <= {line.split(":")[0] for line in bars} <= {"tokenizing", NAMES[kind]}
    print("\n".join(bars[:2] + bars[-2:]))
