"""Files that are whole or not there, checksums, seeds, and where the cache is."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import ROOT

import files
import runtime
from checkpoints import load_state, save_state
from files import (
    InputError,
    cache_dir,
    digest,
    file_digest,
    find_path,
    load_table,
    open_atomically,
    save_json,
    sealed_table,
)
from helpers import Tokens
from runtime import seed_of
from studies import read_row


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "deep" / "file"
    for content in ("old\n\x85\u96fb", "new"):
        with open_atomically(str(path)) as file:
            file.write(content)
        assert path.read_bytes() == content.encode()
    assert os.listdir(str(path.parent)) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_inside_leaves_the_old(tmp_path, error):
    path = tmp_path / "file"
    for old in (None, b"old"):
        if old:
            path.write_bytes(old)
        with pytest.raises(error):
            with open_atomically(str(path), "wb") as file:
                file.write(b"half")
                raise error()
        assert (path.read_bytes() if path.exists() else None) == old
        assert len(os.listdir(str(tmp_path))) == bool(old)


def test_whoever_reads_the_old_reads_on(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with open(str(path)) as reader:
        with open_atomically(str(path)) as file:
            file.write("new")
        assert reader.read() == "old" and path.read_text() == "new"  # another file, not another text


def test_a_locked_folder_keeps_its_blocks_errors_and_is_free_after(tmp_path):
    with pytest.raises(OSError, match="of the block"), files.folder_lock(str(tmp_path)):
        raise OSError("of the block")
    with files.folder_lock(str(tmp_path)):  # an error freed it
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), \
            files.folder_lock(str(tmp_path / "file")):
        pytest.fail("a file was locked as a folder")


def test_whoever_comes_second_to_a_locked_folder_says_so_and_waits(tmp_path):
    code = ("import files, sys, time\nwith files.folder_lock(sys.argv[1]):\n"
            "    print('in', flush=True)\n    sys.stdin.read()")
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=str(ROOT),
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"in\n"
    second = subprocess.Popen([sys.executable, "-u", "-c", code, str(tmp_path)], cwd=str(ROOT),
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert b"another process is at work there; waiting" in second.stdout.readline()
    assert second.poll() is None
    first.communicate()
    assert second.communicate()[0] == b"in\n" and second.returncode == 0


def test_json_is_written_whole(tmp_path):
    path = str(tmp_path / "a.json")
    save_json(path, {"b": 1, "a": [0.1]})
    with pytest.raises(TypeError):
        save_json(path, {"b": object()})
    with open(path) as file:
        assert json.load(file) == {"a": [0.1], "b": 1}


STATE = {"weights": torch.arange(12, dtype=torch.float32).view(3, 4), "n": [1, {"a": 0.1}],
         "half": torch.ones(2, dtype=torch.float16)}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    path = str(tmp_path / "state")
    assert load_state(path) is None
    save_state(path, STATE)
    back = load_state(path)
    assert back["n"] == STATE["n"]
    for key in ("weights", "half"):
        assert back[key].dtype == STATE[key].dtype and torch.equal(
            back[key].float(), STATE[key].float())


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(
        st.text(max_size=8), inner, max_size=4)), max_leaves=12)
TENSORS = st.builds(lambda shape, dtype, seed: (torch.randn(
    shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype),
    st.lists(st.integers(0, 4), max_size=3), st.sampled_from([
        torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8]), st.integers(0, 99))


def same(one, two):
    """Tell whether two plain values are the same to the type and the bit; NaN is NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


@given(PLAIN, st.lists(TENSORS, max_size=3))
def test_any_state_comes_back_as_it_was(tmp_path_factory, plain, tensors):
    path = str(tmp_path_factory.getbasetemp() / "any state")
    save_state(path, {"plain": plain, "tensors": tensors})
    back = load_state(path)
    assert same(back["plain"], plain) and len(back["tensors"]) == len(tensors)
    for one, two in zip(back["tensors"], tensors):
        assert one.dtype == two.dtype and one.shape == two.shape
        assert one.numpy().tobytes() == two.numpy().tobytes()


@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key != "checksum"), PLAIN, max_size=5))
def test_any_trial_comes_back_as_it_was(tmp_path_factory, row):
    path = str(tmp_path_factory.getbasetemp() / "any trial.json")
    row["checksum"] = digest(row)
    save_json(path, row)
    back = read_row(path)
    assert same(back, row)


@given(st.lists(st.lists(st.integers(0, 2 ** 31 - 1), max_size=9), max_size=9))
def test_any_table_of_pieces_comes_back_as_it_was(tmp_path_factory, rows):
    path = str(tmp_path_factory.getbasetemp() / "any table.npy")
    with open_atomically(path, "wb") as file:
        np.save(file, sealed_table([np.array(row, dtype=np.int32) for row in rows]))
    tokens = Tokens(load_table(path))
    assert [tokens[i] for i in range(len(tokens))] == rows
    assert tokens.lengths == [len(row) for row in rows]


def damages(path):
    whole = path.read_bytes()
    for at in [*range(40), *range(40, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        yield whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:]
    for size in (0, 1, 31, 32, 33, len(whole) // 2, len(whole) - 1):
        yield whole[:size]
    yield whole + b"\0"


def test_a_damaged_state_is_set_aside(tmp_path, capsys):
    path = tmp_path / "state"
    save_state(str(path), STATE)
    for damaged in list(damages(path)):
        path.write_bytes(damaged)
        assert load_state(str(path)) is None
        assert not path.exists()
        assert (tmp_path / "state.damaged").read_bytes() == damaged
        out = capsys.readouterr().out
        assert out.startswith(f"Warning: {path} ") and out.count("\n") == 1


def test_digests_and_seeds_are_the_same_everywhere(tmp_path):
    parts = ["text", b"bytes", 1, 0.1, None, {"b": 1, "a": [True]}, np.arange(3, dtype=np.int32)]
    assert digest(*parts) == DIGEST
    assert seed_of("dropout", 0, 1) == SEED
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_digest(str(path)) == ("ba7816bf8f01cfea414140de5dae2223"
                                      "b00361a396177a9cb410ff61f20015ad")  # FIPS 180-2, B.1


DIGEST = "f39dc4dfe68438898eb43650c4891e0d7ace9523a703c29af064eb03813a38be"
SEED = 4034495722612289105


def test_parts_do_not_run_together():
    made = [digest("ab", "c"), digest("a", "bc"), digest("abc"), digest(b"abc"), digest("abc", ""),
            digest(["a", "b"]), digest("a", "b"), digest(1), digest("1"), digest()]
    assert len(set(made)) == len(made)
    seeds = [seed_of(*parts) for parts in [(i, j) for i in range(40) for j in range(40)]]
    assert len(set(seeds)) == 1600 and 0 <= min(seeds) and max(seeds) < 2 ** 63


def test_generators_do_not_share_a_stream():
    draws = [torch.rand(3, generator=runtime.generator(*parts)).tolist()
             for parts in (("a",), ("a",), ("b",))]
    assert draws[0] == draws[1] != draws[2]


def test_the_environment_says_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "mine"))
    assert cache_dir("a", "b") == str(tmp_path / "mine" / "a" / "b")
    assert (tmp_path / "mine" / "a" / "b").is_dir()


def test_the_cache_is_beside_the_module_else_temporary(tmp_path, monkeypatch):
    monkeypatch.delenv("FILIMDB_CACHE")
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(files, "HERE", str(tmp_path / "code"))
    assert cache_dir("a") == str(tmp_path / "code" / ".cache" / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "HERE", str(tmp_path / "file"))  # nothing can be made below it
    assert cache_dir("a") == str(tmp_path / "tmp" / "filimdb-cache" / "a")
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(InputError, match="FILIMDB_CACHE"):
        cache_dir("a")


def test_a_cache_that_was_asked_for_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(InputError, match="below"):
        cache_dir("a")


def test_a_path_is_tried_from_the_working_folder_first(tmp_path, monkeypatch):
    for place in ("here", "code"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "HERE", str(tmp_path / "code"))
    assert find_path("x") == "x"
    (tmp_path / "code" / "x").mkdir()
    assert find_path("x") == str(tmp_path / "code" / "x")
    (tmp_path / "here" / "x").mkdir()
    assert find_path("x") == "x"
