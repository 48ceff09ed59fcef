"""data/get_filimdb.py on made-up archives: layouts, refusals, and the older folder left intact.

    python -m pytest tests/test_get_filimdb.py
"""
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
import zipfile

import pytest
from tools import load_module, make_aclimdb, write_folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
get_filimdb = load_module("data/get_filimdb.py")

# \x85 and \r end lines elsewhere, but not for the harness
FILIMDB = {
    "train.texts": "a good film\x85 really\nbad\rsad\nfine\n", "train.labels": "pos\nneg\npos\n",
    "dev.texts": "dull\nlovely\n", "dev.labels": "neg\npos\n",
    "test.texts": "hm\nwell\n",
    "dev-b.texts": "short\n", "dev-b.labels": "pos\n", "test-b.texts": "brief\n",
    "train_unlabeled.texts": "one\ntwo\nthree\nfour\n",
}


@pytest.fixture
def out(tmp_path):
    """An older data/FILIMDB, to be replaced whole or left alone."""
    folder = tmp_path / "data" / "FILIMDB"
    write_folder(folder, {"train.texts": "old\n", "train.labels": "neg\n"})
    return folder


def write_archive(path, files, top="FILIMDB/"):
    """Pack {name: text} as what the suffix says."""
    if path.name.endswith(".zip"):
        with zipfile.ZipFile(str(path), "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(top + name, text.encode("utf-8"))
        return path
    mode = "w:gz" if path.name.endswith("gz") else "w:xz" if path.name.endswith("xz") else "w"
    with tarfile.open(str(path), mode) as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(top + name)
            member.size = len(text.encode("utf-8"))
            archive.addfile(member, io.BytesIO(text.encode("utf-8")))
    return path


def read_folder(folder):
    return {path.name: path.read_bytes().decode("utf-8") for path in folder.iterdir()}


def read_lines(path):
    return path.read_bytes().decode("utf-8").strip().split("\n")


def run(out, *argv):
    return get_filimdb.main(["--out", str(out)] + [str(arg) for arg in argv])


def check_refused(capsys, out, argv, *words):
    """One line on stderr with these words, exit code 2, the older folder and nothing else."""
    before = read_folder(out)
    assert run(out, *argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    for word in words:
        assert word in said
    assert read_folder(out) == before
    assert os.listdir(str(out.parent)) == ["FILIMDB"]


# ---- FILIMDB's own layout -----------------------------------------------------------------------

@pytest.mark.parametrize("name", ["F.tar.gz", "F.tgz", "F.tar.xz", "F.tar", "F.zip"])
@pytest.mark.parametrize("top", ["FILIMDB/", "./deep/er/", ""])
def test_archive_replaces_older_folder(tmp_path, out, capsys, name, top):
    extra = dict(FILIMDB, **{"README.md": "not a part", "preds.tsv": ""})
    path = write_archive(tmp_path / name, extra, top)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert run(out, "--source", path, "--sha256", sha256.upper()) == 0
    assert read_folder(out) == FILIMDB
    assert os.listdir(str(out.parent)) == ["FILIMDB"]
    said = capsys.readouterr().out
    assert sha256 in said and "not the course's own file" in said
    rows = [line.split() for line in said.split("\n")]
    texts = FILIMDB["train.texts"].encode("utf-8")
    assert ["train", "3", "2/1", str(len(texts)), hashlib.sha256(texts).hexdigest()[:12]] in rows


@pytest.mark.parametrize("given", [".", "sub/FILIMDB"])
def test_folder(tmp_path, capsys, given):
    write_folder(tmp_path / "from" / "sub" / "FILIMDB", FILIMDB)
    write_folder(tmp_path / "from" / ".FILIMDB-killed" / "new", FILIMDB)  # hidden: passed over
    out = tmp_path / "new" / "FILIMDB"  # whose parent is not there yet
    assert run(out, "--source", tmp_path / "from" / given) == 0
    assert read_folder(out) == FILIMDB
    assert read_folder(tmp_path / "from" / "sub" / "FILIMDB") == FILIMDB
    said = capsys.readouterr().out
    for text in FILIMDB.values():
        assert hashlib.sha256(text.encode("utf-8")).hexdigest() in said


def test_target_behind_link(tmp_path, out):
    link = tmp_path / "link"
    os.symlink(str(out), str(link))
    assert run(link, "--source", write_archive(tmp_path / "F.tar", FILIMDB)) == 0
    assert link.is_symlink() and read_folder(out) == FILIMDB


def test_source_in_home(tmp_path, out, monkeypatch):
    write_archive(tmp_path / "F.tar", FILIMDB)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(out, "--source", "~/F.tar") == 0


def test_source_is_target(tmp_path):
    out = write_folder(tmp_path / "data" / "FILIMDB", FILIMDB)
    assert run(out, "--source", out) == 0
    assert read_folder(out) == FILIMDB


# ---- aclImdb ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aclimdb():
    return make_aclimdb()


@pytest.mark.parametrize("name", ["aclImdb_v1.tar.gz", "aclImdb.zip", "folder"])
def test_aclimdb(tmp_path, out, capsys, aclimdb, name):
    if name == "folder":
        source = write_folder(tmp_path / "aclImdb", aclimdb)
    else:
        source = write_archive(tmp_path / name, aclimdb, "aclImdb/")
    assert run(out, "--source", source) == 0
    assert "no dev-b" in capsys.readouterr().out
    assert sorted(read_folder(out)) == ["dev.labels", "dev.texts", "test.texts", "train.labels",
                                        "train.texts", "train_unlabeled.texts"]
    texts = {part: read_lines(out / (part + ".texts")) for part in ("train", "dev", "test")}
    labels = {part: read_lines(out / (part + ".labels")) for part in ("train", "dev")}

    everything = [text for name, text in aclimdb.items() if name.endswith(("_2.txt", "_9.txt"))]
    assert sorted(texts["train"] + texts["dev"] + texts["test"]) == sorted(everything)
    films = {part: {text.split()[4] for text in texts[part]} for part in ("train", "dev")}
    assert films["train"] and films["dev"] and not films["train"] & films["dev"]
    assert 0.4 <= len(texts["dev"]) / 240 <= 0.45  # at most one film too many
    for part in ("train", "dev"):
        assert labels[part] == [text.split()[0] for text in texts[part]]
        order = [(text.split()[0], int(text.split()[2])) for text in texts[part]]
        assert order == sorted(order)  # neg, then pos, each by ID

    assert all(text.split()[1] == "test" for text in texts["test"])
    kinds = [text.split()[0] for text in texts["test"]]
    assert 0.35 < kinds[:120].count("pos") / 120 < 0.65  # position says nothing
    unlabeled = read_lines(out / "train_unlabeled.texts")
    assert unlabeled == [f"unsup in two lines {i}" for i in range(30)]


def test_aclimdb_is_divided_alike_every_time(tmp_path, aclimdb):
    source = write_folder(tmp_path / "elsewhere" / "aclImdb", aclimdb)
    for name in ("one", "two"):
        assert run(tmp_path / name, "--source", source) == 0
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")
    digest = hashlib.sha256((tmp_path / "one" / "dev.texts").read_bytes()).hexdigest()
    assert digest[:12] == "2799a5c473d6", "the division has changed: old results no longer compare"


@pytest.mark.parametrize("missing, word", [
    ("train/pos/7_9.txt", "incomplete"), ("test/neg/7_2.txt", "incomplete"),
    ("test/neg/119_2.txt", None),
    ("train/urls_neg.txt", "urls_neg.txt"), ("train/unsup/", "unsup"), ("test/pos/", "pos")])
def test_incomplete_aclimdb(tmp_path, out, capsys, aclimdb, missing, word):
    files = {name: text for name, text in aclimdb.items() if not name.startswith(missing)}
    source = write_archive(tmp_path / "aclImdb.tar", files, "aclImdb/")
    if word:
        check_refused(capsys, out, ["--source", source], word)
    else:  # the last of a test class: nothing tells
        assert run(out, "--source", source) == 0


@pytest.mark.parametrize("name, text, word", [
    ("train/urls_pos.txt", "http://www.imdb.com/title/tt0000001/usercomments\n", "1 lines"),
    ("train/urls_neg.txt", "http://www.imdb.com/title/\n" * 120, "120 of them without"),
    ("train/neg/3_2.txt", " \n", "empty")])
def test_strange_aclimdb(tmp_path, out, capsys, aclimdb, name, text, word):
    source = write_archive(tmp_path / "a.tar", dict(aclimdb, **{name: text}), "aclImdb/")
    check_refused(capsys, out, ["--source", source], name, word)


# ---- refusals -----------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["..", "absolute", "symlink", "hardlink", "fifo", "device",
                                  "way out", "zip ..", "zip absolute", "zip symlink",
                                  "zip backslash", "zip drive", "zip device"])
def test_nothing_is_written_outside(tmp_path, out, capsys, kind):
    evil = str(tmp_path / "evil.texts")
    name = {"..": "FILIMDB/../../../../evil.texts", "absolute": evil}.get(kind.split()[-1])
    name = name or {"zip backslash": "..\\..\\..\\evil.texts", "zip drive": "C:\\evil.texts"}.get(
        kind, "x.texts")
    source = tmp_path / ("F.zip" if kind.startswith("zip") else "F.tar.gz")
    write_archive(source, FILIMDB)
    if kind.startswith("zip"):
        with zipfile.ZipFile(str(source), "a") as archive:
            member = zipfile.ZipInfo(name)
            member.create_system = 3  # Unix: the file type is in external_attr
            member.external_attr = {"zip symlink": 0o120777, "zip device": 0o020666}.get(
                kind, 0o100644) << 16
            archive.writestr(member, evil)
    else:
        with tarfile.open(str(tmp_path / "plain"), "w") as archive:
            for part, text in FILIMDB.items():
                member = tarfile.TarInfo("FILIMDB/" + part)
                member.size = len(text.encode("utf-8"))
                archive.addfile(member, io.BytesIO(text.encode("utf-8")))
            member = tarfile.TarInfo(name)
            member.type = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE,
                           "way out": tarfile.SYMTYPE, "fifo": tarfile.FIFOTYPE,
                           "device": tarfile.CHRTYPE}.get(kind, tarfile.REGTYPE)
            member.linkname = str(tmp_path) if kind == "way out" else evil
            archive.addfile(member)
            if kind == "way out":  # a file below a link that leads out
                archive.addfile(tarfile.TarInfo("x.texts/evil.texts"))
        with gzip.open(str(source), "wb") as f:
            f.write((tmp_path / "plain").read_bytes())
    before = sorted(os.listdir(str(tmp_path)))
    check_refused(capsys, out, ["--source", source], "refused", source.name)
    assert sorted(os.listdir(str(tmp_path))) == before


@pytest.mark.parametrize("name", ["F.tar.gz", "F.tar.xz", "F.tar", "F.zip"])
def test_truncated_at_any_place(tmp_path, out, capsys, name):
    long = dict(FILIMDB, **{"zz.texts": "".join(map(str, range(9999)))})
    whole = write_archive(tmp_path / ("whole-" + name), long).read_bytes()
    cuts = [0, 3, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1]
    if name == "F.tar":  # at a member's end, where tarfile alone sees nothing; -1 is just padding
        cuts = cuts[:-1] + [1024, 2048, 2048 + 100]
    for cut in cuts:
        path = tmp_path / name
        path.write_bytes(whole[:cut])
        check_refused(capsys, out, ["--source", path], "truncated", str(path), "fetch it again")


def test_damaged(tmp_path, out, capsys):
    path = write_archive(tmp_path / "F.tar", FILIMDB)
    data = bytearray(path.read_bytes())
    data[1024:1034] = b"\xff" * 10  # the second member's header: tarfile alone would stop there
    path.write_bytes(bytes(data))
    check_refused(capsys, out, ["--source", path], "damaged")


def test_wrong_sha256(tmp_path, out, capsys, monkeypatch):
    path = write_archive(tmp_path / "F.tar.gz", FILIMDB)
    monkeypatch.setattr(get_filimdb, "unpack", None)  # refused before that
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    check_refused(capsys, out, ["--source", path, "--sha256", "0" * 64], "0" * 64, sha256)
    check_refused(capsys, out, ["--source", path, "--sha256", "abc"], "64 hex digits")


def test_sha256_of_folder(tmp_path, out, capsys):
    source = write_folder(tmp_path / "from", FILIMDB)
    check_refused(capsys, out, ["--source", source, "--sha256", "0" * 64], "archives only")


@pytest.mark.parametrize("change, word", [
    ({"train.texts": None}, "found 0"), ({"train.labels": None}, "train.labels"),
    ({"dev.texts": None}, "dev.texts"), ({"dev-b.labels": None}, "dev-b.labels"),
    ({"dev.texts": None, "dev.labels": None}, "dev.texts"),
    ({"test-b.texts": None, "test-b.labels": "pos\n"}, "test-b.texts"),
    ({"train.labels": "pos\nneg\n"}, "3 texts, 2 labels"),
    ({"dev.labels": "neg\n1\n"}, "['1']"), ({"test.labels": "pos\n"}, "2 texts, 1 labels")])
@pytest.mark.parametrize("kind", ["F.zip", "folder"])
def test_missing_or_mismatched(tmp_path, out, capsys, change, word, kind):
    files = {name: text for name, text in dict(FILIMDB, **change).items() if text is not None}
    make = write_folder if kind == "folder" else write_archive
    check_refused(capsys, out, ["--source", make(tmp_path / kind, files)], word)


def test_not_utf8(tmp_path, out, capsys):
    source = write_folder(tmp_path / "from", FILIMDB)
    (source / "dev.texts").write_bytes(b"caf\xe9\nwell\n")
    check_refused(capsys, out, ["--source", source], "dev.texts", "UTF-8")


def test_two_data_sets_or_none(tmp_path, out, capsys):
    (tmp_path / "from").mkdir()
    check_refused(capsys, out, ["--source", tmp_path / "from"], "found 0")
    write_folder(tmp_path / "from" / "a", FILIMDB)
    write_folder(tmp_path / "from" / "b", FILIMDB)
    check_refused(capsys, out, ["--source", tmp_path / "from"], "found 2: a, b")
    check_refused(capsys, out, ["--source", tmp_path / "nowhere"], "does not exist")


def test_other_folders_are_not_replaced(tmp_path, out, capsys):
    source = write_archive(tmp_path / "F.tar", FILIMDB)
    (out / "thesis.doc").write_bytes(b"years of work")
    check_refused(capsys, out, ["--source", source], "thesis.doc")
    (tmp_path / "file").write_bytes(b"x")
    assert run(tmp_path / "file", "--source", source) == 2


# ---- interruptions ------------------------------------------------------------------------------

def test_interrupted(tmp_path, out, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(get_filimdb, "swap_in", interrupt)
    before = read_folder(out)
    assert run(out, "--source", write_archive(tmp_path / "F.tar", FILIMDB)) == 130
    assert read_folder(out) == before and os.listdir(str(out.parent)) == ["FILIMDB"]
    assert capsys.readouterr().err.count("\n") == 1


def test_failing_swap_brings_older_folder_back(tmp_path, out, capsys, monkeypatch):
    rename = os.rename

    def fail(source, target):
        if source.endswith("new"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    source = write_archive(tmp_path / "F.tar", FILIMDB)
    check_refused(capsys, out, ["--source", source], "No space left")


def test_full_disk_is_not_the_archives_fault(tmp_path, out, capsys, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    source = write_archive(tmp_path / "F.tar.gz", FILIMDB)
    check_refused(capsys, out, ["--source", source], "get_filimdb: [Errno 28] No space left")


# ---- git ----------------------------------------------------------------------------------------

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


@needs_git
@pytest.mark.parametrize("times", [0, 1, 5000])  # the last is longer than one chunk
def test_blob_id_is_gits(tmp_path, times):
    path, data = tmp_path / "file", bytes(range(256)) * times
    path.write_bytes(data)
    git = subprocess.check_output(["git", "hash-object", "--no-filters", str(path)])
    sha256, blob = get_filimdb.compute_digests(str(path))
    assert blob == git.decode().strip()
    assert sha256 == hashlib.sha256(data).hexdigest()


def make_repository(folder, files):
    """A git repository with one commit, to be cloned in place of the course's."""
    def git(*args):
        subprocess.check_call(["git", "-C", str(folder), "-c", "user.name=x", "-c",
                               "user.email=x@x", "-c", "core.hooksPath="] + list(args))

    folder.mkdir()
    git("init", "--quiet")
    for name, make in files.items():
        make(folder / name)
    git("add", ".")
    git("commit", "--quiet", "-m", "x")


@needs_git
def test_clone(tmp_path, out, capsys, monkeypatch):
    make_repository(tmp_path / "repo", {"FILIMDB.tar.gz": lambda p: write_archive(p, FILIMDB)})
    blob = get_filimdb.compute_digests(str(tmp_path / "repo" / "FILIMDB.tar.gz"))[1]
    monkeypatch.setattr(get_filimdb, "URL", (tmp_path / "repo").as_uri())
    check_refused(capsys, out, [], blob, get_filimdb.COURSE_BLOB, "FILIMDB=")
    monkeypatch.setattr(get_filimdb, "COURSE_BLOB", blob)
    assert run(out, "--source", "", "--sha256", "") == 0  # what make passes when nothing is given
    assert read_folder(out) == FILIMDB
    assert "(the course's own)" in capsys.readouterr().out


@needs_git
def test_clone_without_archive(tmp_path, out, capsys, monkeypatch):
    make_repository(tmp_path / "repo", {"README.md": lambda p: p.write_bytes(b"moved")})
    monkeypatch.setattr(get_filimdb, "URL", (tmp_path / "repo").as_uri())
    check_refused(capsys, out, [], "no FILIMDB.tar.gz")


def test_unreachable(tmp_path, out, capsys, monkeypatch):
    url = str(tmp_path / "nowhere")
    monkeypatch.setattr(get_filimdb, "URL", url)
    check_refused(capsys, out, [], "git clone --depth 1 " + url, "make data FILIMDB=")
    monkeypatch.setenv("PATH", "")  # nor is there git
    check_refused(capsys, out, [], "git did not start", "make data FILIMDB=")
