"""Checkpoints that no command has gone on from: said, and removed after a week."""
import os
import subprocess
import sys
import time

import pytest
from tools import ROOT, made_up_reviews

import helpers
from files import try_lock
from helpers import pretrain, train

TEXTS, LABELS = made_up_reviews(20)
QUICK = dict(seq_len=16, epochs=1, batch_size=8, lr=1e-3)
DAY = 86400


def leave(cache, name, days, size=3 * 2 ** 20):
    """Leave a file of an age in the cache; return its path."""
    path = cache / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(str(path), (time.time() - days * DAY,) * 2)
    return path


def begin(work, model):
    """Train, or pretrain, shortly."""
    return train(TEXTS, LABELS, model=model, **QUICK) if work == "train" else pretrain(
        TEXTS, model=model, **QUICK)


@pytest.mark.parametrize("work", ["train", "pretrain"])
def test_forgotten_checkpoints_are_removed_and_the_others_named(work, cache, tiny_bert, capsys):
    young = [leave(cache, "runs/a.checkpoint", 6), leave(cache, "pretrained/b.checkpoint", 0)]
    old = [leave(cache, "runs/c.checkpoint", 8), leave(cache, "pretrained/d.checkpoint", 30),
           leave(cache, "runs/e.checkpoint.damaged", 8), leave(cache, "runs/f.checkpoint.lock", 8, 0),
           leave(cache, "runs/g.checkpoint12345678.tmp", 8)]
    begin(work, tiny_bert)
    lines = [line for line in capsys.readouterr().out.split("\n") if "stopped runs" in line]
    assert all(path.exists() for path in young) and not any(path.exists() for path in old)
    assert len(lines) == 1 and "2 (6.0 MB) wait" in lines[0] and "4 (12.0 MB) older" in lines[0]
    assert sorted(p.name for p in (cache / "runs").iterdir()) == ["a.checkpoint"], "no lock left"
    begin(work, tiny_bert)
    assert "stopped runs" not in capsys.readouterr().out, "it is said once"


def test_where_nothing_lies_nothing_is_said(cache, tiny_bert, capsys):
    train(TEXTS, LABELS, model=tiny_bert, **QUICK)
    pretrain(TEXTS, model=tiny_bert, **QUICK)
    assert "stopped runs" not in capsys.readouterr().out
    assert not list((cache / "runs").iterdir()) and not list(cache.glob("pretrained/*.checkpoint*"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_what_a_running_process_holds_stays(cache, tiny_bert, capsys):
    held = leave(cache, "runs/held.checkpoint", 30)
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import files\n"
            f"with files.try_lock({str(held)!r} + '.lock') as mine:\n"
            f"    print(mine, flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"True\n"
        train(TEXTS, LABELS, model=tiny_bert, **QUICK)
        assert held.exists() and "stopped runs" not in capsys.readouterr().out
        other.kill()
    train(TEXTS, LABELS, model=tiny_bert, **QUICK)
    assert not held.exists() and "1 (3.0 MB) older" in capsys.readouterr().out


@pytest.mark.parametrize("work", ["train", "pretrain"])
def test_a_training_holds_its_checkpoint_and_goes_on_from_an_old_one(work, cache, tiny_bert,
                                                                   monkeypatch, capsys):
    real, seen = helpers.sample_of_step, []

    def interrupted(*args):
        if len(seen) == 2:
            raise KeyboardInterrupt
        path, = cache.glob("*/*.checkpoint.lock")
        with try_lock(str(path)) as mine:
            seen.append(mine)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(helpers, "sample_of_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            begin(work, tiny_bert)
    assert seen == [False, False]
    path, = cache.glob("*/*.checkpoint*")  # and no lock
    os.utime(str(path), (time.time() - 30 * DAY,) * 2)
    capsys.readouterr()
    begin(work, tiny_bert)
    out = capsys.readouterr().out
    assert "resuming from the checkpoint at step 2" in out and "stopped runs" not in out


def test_a_disk_without_locks_serves_one_process(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with try_lock(str(tmp_path / "a.lock")) as mine:
        assert mine
