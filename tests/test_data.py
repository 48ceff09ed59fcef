"""Reading FILIMDB as the course's harness does, and drawing subsets."""
import os
import pickle
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import ROOT

import files
import helpers
import studies
from files import InputError
from helpers import Part, load_filimdb, load_part, read_lines, subset


def harness_lines(path):
    """Read as filimdb_evaluation does: codecs.open() translates no line ends."""
    with open(path, "rb") as file:
        text = file.read().decode("utf-8")
    return [line.strip() for line in text.strip().split("\n")]


LINES = st.lists(st.text(st.one_of(st.sampled_from("ab \x85\r\t\x0b\x0c\x1c\u2028\u00a0"),
                                   st.characters(blacklist_categories=("Cs",),
                                                 blacklist_characters="\ufeff"))), max_size=6)


@given(LINES, st.sampled_from(["\n", "\r\n", "\n\n", "\r"]))
def test_lines_are_the_harnesss(tmp_path_factory, lines, end):
    path = str(tmp_path_factory.getbasetemp() / "lines.texts")
    with open(path, "wb") as file:
        file.write(end.join(lines).encode())
    expected = harness_lines(path)
    if expected == [""]:
        with pytest.raises(InputError, match="empty"):
            read_lines(path)
    else:
        assert read_lines(path) == expected


def write(folder, **files):
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".").replace("_", "-")).write_bytes(content)
    return str(folder)


def test_only_a_newline_ends_a_line(tmp_path):
    write(tmp_path, a="one\x85still one\u2028still\r\n\r\n two \nthree\r\n\n")
    assert read_lines(str(tmp_path / "a")) == ["one\x85still one\u2028still", "", "two", "three"]


def test_a_byte_order_mark_is_dropped_and_told(tmp_path, capsys):
    write(tmp_path, a=b"\xef\xbb\xbfone\ntwo\n")
    assert read_lines(str(tmp_path / "a")) == ["one", "two"]
    assert capsys.readouterr().out == f"Warning: {tmp_path / 'a'}: byte-order mark dropped\n"


@pytest.mark.parametrize("content,said", [(b"ab\xff\n", "not UTF-8 at byte 2"), (b"", "empty"),
                                          (b" \r\n\n\xc2\x85", "empty"), (None, "no such file"),
                                          (b"\xef\xbb\xbf\n", "empty")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, said):
    path = tmp_path / "dev.texts"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_lines(str(path))
    assert str(path) in str(caught.value) and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_has_ids_texts_and_labels(tmp_path):
    folder = write(tmp_path, dev_b__texts="one\ntwo\n", dev_b__labels="pos\r\nneg\r\n\n")
    assert load_part(folder, "dev-b") == (["dev-b/0", "dev-b/1"], ["one", "two"], ["pos", "neg"])
    os.remove(os.path.join(folder, "dev-b.labels"))
    assert load_part(folder, "dev-b").labels is None


def test_a_missing_folder_is_named():
    with pytest.raises(InputError, match="no/such/folder"):
        load_filimdb("no/such/folder")


def test_a_part_that_is_absent_whole_is_left_out_and_named_when_asked_for(tmp_path, capsys):
    folder = write(tmp_path, train__texts="one\ntwo", dev_b__texts="three\nfour")
    data = load_filimdb(folder)
    assert list(data) == ["train", "dev-b"] and data.get("dev") is None
    assert capsys.readouterr().out == f"{folder} has no dev, test, test-b: left out\n"
    with pytest.raises(InputError) as caught:
        data["dev"]
    assert f"{folder}/dev.texts: no such file" in str(caught.value)
    assert pickle.loads(pickle.dumps(data)) == data and "\n" not in str(caught.value)
    assert list(load_filimdb(folder, ["train"])) == ["train"] and not capsys.readouterr().out


@pytest.mark.parametrize("files,parts,said", [
    ({}, helpers.PARTS, "holds none of train, dev, test, dev-b, test-b"),
    ({"train__texts": "one"}, ["dev"], "holds none of dev"),
    ({"train__texts": "one", "dev_b__labels": "pos"}, helpers.PARTS, "dev-b.texts: no such file"),
    ({"train__texts": "one"}, "train", "parts: one string, 'train'")])
def test_what_is_not_whole_is_refused(files, parts, said, tmp_path):
    with pytest.raises(InputError) as caught:
        load_filimdb(write(tmp_path, **files), parts)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_dangling_link_is_no_absent_part(tmp_path):
    folder = write(tmp_path, train__texts="one\ntwo")
    (tmp_path / "dev.texts").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="dev.texts: no such file"):
        load_filimdb(folder)


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, train__texts="one\ntwo")
    assert load_filimdb("~", ["train"])["train"].texts == ["one", "two"]
    monkeypatch.setenv("FILIMDB_CACHE", "~/cache")
    assert files.cache_dir("a") == str(tmp_path / "cache" / "a")
    files.save_history("~/history", [{"step": 1}])
    assert (tmp_path / "history.csv").exists() and studies.from_root("~/x") == f"{tmp_path}/x"


def test_what_masked_lm_may_see(tmp_path, capsys):
    folder = write(tmp_path, train__texts="one\ntwo", test__texts="three")
    data = load_filimdb(folder)
    assert helpers.pretrain_parts(folder, data) == {"train": ["one", "two"]}
    assert "train_unlabeled.texts: not there" in capsys.readouterr().out
    (tmp_path / "train_unlabeled.texts").write_text("four\n")
    assert helpers.pretrain_parts(folder, data, transductive=True) == {
        "train": ["one", "two"], "train_unlabeled": ["four"], "test": ["three"]}


def test_leaks_and_repeats_are_told(tmp_path, capsys):
    folder = write(tmp_path, train__texts="one\ntwo\none\none\nfour\n", dev__texts="two\nfive\none\n",
                   test__texts="six\nseven\n")
    load_filimdb(folder, ["train", "dev", "test"])
    assert capsys.readouterr().out == (
        "Warning: train: 2 of 5 reviews repeat an earlier one\n"
        "Warning: 2 reviews stand in train and in dev: a leak\n")


def test_a_relative_folder_is_tried_here_then_beside_the_module(tmp_path, monkeypatch):
    for place in ("here", "code"):
        (tmp_path / place / "db").mkdir(parents=True)
        write(tmp_path / place / "db", dev__texts=f"in {place}")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(files, "HERE", str(tmp_path / "code"))
    assert load_filimdb("db", ["dev"])["dev"].texts == ["in here"]
    os.remove("db/dev.texts")
    os.rmdir("db")
    assert load_filimdb("db", ["dev"])["dev"].texts == ["in code"]


def test_the_embedded_sample_loads(sample, capsys):
    data = load_filimdb(sample)
    assert tuple(data) == helpers.PARTS
    for name, part in data.items():
        assert part.texts == harness_lines(os.path.join(sample, name + ".texts"))
        assert part.ids == [f"{name}/{i}" for i in range(len(part.texts))]
        assert (part.labels is None) == name.startswith("test")
    assert capsys.readouterr().out == ""


def test_the_real_reviews_load():
    folder = ROOT / "data" / "FILIMDB"
    if not folder.is_dir():
        pytest.skip("data/FILIMDB is not there; `make data` fetches it")
    data = load_filimdb(str(folder), [*helpers.PARTS, "train_unlabeled"])
    assert {name: len(part.texts) for name, part in data.items()} == {
        "train": 14980, "dev": 10000, "test": 24980, "dev-b": 5331, "test-b": 5331,
        "train_unlabeled": 50000}
    for name, part in data.items():
        assert part.texts == harness_lines(str(folder / (name + ".texts")))
        assert (part.labels is None) == (name in ("test", "test-b", "train_unlabeled"))
    assert Counter(data["train"].labels) == {"neg": 7490, "pos": 7490}


PART = Part([f"train/{i}" for i in range(40)], [f"text {i}" for i in range(40)],
            ["neg"] * 25 + ["pos"] * 15)


@given(st.integers(1, 39), st.integers(0, 3))
def test_a_subset_is_balanced_and_nested(n, seed):
    some, more = subset(PART, n, seed), subset(PART, n + 2, seed)
    assert len(some.ids) == len(set(some.ids)) == n
    assert set(some.ids) <= set(more.ids)
    numbers = [int(name.split("/")[1]) for name in some.ids]
    assert some.texts == [PART.texts[i] for i in numbers]
    assert some.labels == [PART.labels[i] for i in numbers]
    assert numbers == sorted(numbers)
    counts = Counter(some.labels)
    assert abs(counts["neg"] - counts["pos"]) <= 1 or counts["pos"] == 15  # all there are


def test_a_subset_is_drawn_by_its_seed():
    draws = [subset(PART, 10, seed).ids for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1] and len({tuple(draw) for draw in draws}) == 3


@pytest.mark.parametrize("n", [0, 40, 41, 10 ** 6])
def test_all_of_a_part(n):
    assert subset(PART, n) == PART
