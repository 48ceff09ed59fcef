"""Whatever happens, nothing is lost, half-written or wrong: kills, signals, full disks, damage.

Quick forms with fixed seeds; `SOAK=1 python -m pytest -s tests/test_crashes.py` has full counts.
What a test needs processes for runs in children forked from a fresh one: importing takes seconds.
"""
import builtins
import contextlib
import errno
import fcntl
import functools
import glob
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import report_tools as h
import torch
from tools import ROOT, SOAK, core, made_up_reviews, options, write_filimdb

import checkpoints
import evaluate
import files
import helpers
import pages
import runtime
import studies
from files import InputError
from helpers import Part

pytestmark = pytest.mark.slow

SAMPLE, TINY = str(ROOT / "data" / "sample"), str(ROOT / "data" / "sample" / "bert")
MOMENTS = 20 if SOAK else 2    # SIGKILLs of a training, and of a pretraining
DAMAGES = 1000 if SOAK else 60  # of each kind of file
FAULTS = 200 if SOAK else 4    # in a row over a study


def in_child(work, *args):
    """Run work(*args) in a forked child; return its pid."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work(*args)
            code = 0
        finally:
            os._exit(code)
    return child


def ended(child):
    """Return how a child ended: its exit code, or minus the signal that killed it."""
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def fresh(role, *args):
    """Call a function of this file in a fresh process; return what it printed as JSON."""
    code = "import json, sys, test_crashes as t; t.%s(*json.loads(sys.argv[1]))" % role
    env = dict(os.environ, PYTHONPATH=str(ROOT / "tests"))
    done = subprocess.run([sys.executable, "-c", code, json.dumps(args)], env=env,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    return json.loads(done.stdout.decode().strip().split("\n")[-1])


def begin(folder):
    """Set a fresh process up: one thread, checkpoints at almost every step, a cache of its own."""
    torch.set_num_threads(1)
    helpers.run.CHECKPOINT_SECONDS, helpers.run.CHECKPOINT_SHARE = 0.02, 0
    os.environ["FILIMDB_CACHE"] = os.path.join(folder, "cache")


def into_file(path, work):
    """Call work() with everything printed going to a file; save what it returns beside it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    files.save_json(path + ".json", work())


# ---- SIGKILL at a random moment ----------------------------------------------------------------

SMALL = dict(model=TINY, seq_len=24, batch_size=16, accumulation=2, lr=1e-3, device="cpu")


def learn(kind):
    """Train or pretrain on the sample; return digests of the weights and of the predictions."""
    data = helpers.load_filimdb(SAMPLE)
    _, texts, labels = helpers.subset(data["train"], 400)
    if kind == "pretrain":
        note = helpers.pretrain(texts[::4], epochs=2, **SMALL)
        return [checkpoints.weights_digest(helpers.load_bert(note["path"], "mlm")[0])]
    params = helpers.train(texts, labels, epochs=2, **SMALL)
    return [checkpoints.weights_digest(params["model"]), helpers.classify(data["test"].texts, params)]


def kill_learning(kind, folder, moments, seed):
    """Kill a run at each of some moments and go on; print what each came to."""
    begin(folder)
    draw, rows, began = random.Random(seed), [], time.time()
    log = os.path.join(folder, "log")
    assert not ended(in_child(into_file, log, lambda: learn(kind)))
    seconds = time.time() - began
    for i in range(moments):
        begin(os.path.join(folder, str(i)))
        child = in_child(into_file, log + str(i), lambda: learn(kind))
        if i % 2:  # after a checkpoint; else anywhere
            h.wait_for(lambda: glob.glob(os.path.join(folder, str(i), "cache", "*", "*.checkpoint")))
        time.sleep(seconds * draw.random() * (0.2 if i % 2 else 0.8))
        os.kill(child, signal.SIGKILL)
        killed = ended(child)
        assert not ended(in_child(into_file, log + str(i), lambda: learn(kind)))
        with open(log + str(i)) as file:
            said = file.read()
        with open(log + "%d.json" % i) as one, open(log + ".json") as two:
            rows.append([killed, "resuming from the checkpoint" in said, one.read() == two.read()])
    print(json.dumps([seconds, rows]))


@pytest.mark.parametrize("kind", ["train", "pretrain"])
def test_killed_at_a_random_moment_it_ends_bit_for_bit_the_same(kind, tmp_path):
    seconds, rows = fresh("kill_learning", kind, str(tmp_path), MOMENTS, 1)
    killed, went_on, same = map(list, zip(*rows))
    print("%s of %.1f s: %d killed, %d went on from a checkpoint, %d ended the same" % (
        kind, seconds, killed.count(-9), sum(went_on), sum(same)))
    assert all(same), rows
    assert -9 in killed and any(went_on), rows


# ---- Ctrl-C and SIGTERM, anywhere --------------------------------------------------------------

SIGNALLED = """import os, runpy, sys
root, script, where, calls, number = sys.argv[1:6]
sys.path.insert(0, root)
count = [0]

def now():
    count[0] += 1
    if count[0] == int(calls):
        os.kill(os.getpid(), int(number))

class Finder:
    def find_spec(self, name, *args):
        if name == where:
            now()

if "." in where:
    import files, helpers
    helpers.run.CHECKPOINT_SECONDS = 1000  # so that the one of the signal itself is what counts
    module, name = where.split(".")
    real = getattr(sys.modules[module], name)
    setattr(sys.modules[module], name, lambda *args, **kwargs: [now(), real(*args, **kwargs)][1])
else:
    sys.meta_path.insert(0, Finder())
sys.argv[:6] = [script]
runpy.run_path(os.path.join(root, script), run_name="__main__")
"""
# What is under way (an import, or a module's function), its n-th call, the signal.
STAGES = [("torch", 1, signal.SIGTERM), ("helpers.tokenize", 1, signal.SIGINT),
          ("helpers.summed_loss", 5, signal.SIGTERM), ("helpers.predict_logits", 2, signal.SIGINT)]
if SOAK:
    BOTH = signal.SIGINT, signal.SIGTERM
    STAGES[2:2] = [(where, calls, number) for number in BOTH for where, calls in (
        ("numpy", 1), ("transformers", 1), ("helpers.read_lines", 4), ("helpers.load_bert", 1),
        ("helpers.make_optimizer", 1), ("files.write_atomically", 1), ("helpers.summed_loss", 2),
        ("helpers.count_targets", 9), ("run.progress_bar", 1))]
    STAGES += [(where, calls, number) for number in BOTH for where, calls in (
        ("helpers.predict_logits", 1), ("helpers.predict_logits", 5),
        ("files.write_atomically", 1))]


def run_signalled(script, where, calls, number, *argv, **options):
    """Run a script that gets a signal in the n-th call: (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(ROOT), script, where, str(calls),
                           str(int(number)), *argv], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, **options)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def filimdb(tmp_path_factory):
    return write_filimdb(tmp_path_factory.mktemp("filimdb"), 40)


@pytest.fixture(scope="module")
def grade(filimdb, tiny_bert):
    """The arguments of a grading of some seconds, without pretraining."""
    return ["--data", str(filimdb), "--model", tiny_bert, "--no-pretrain", *options(epochs=3)]


@pytest.fixture(scope="module")
def expected(grade, tmp_path_factory):
    """The predictions of a grading that nothing disturbs."""
    out = tmp_path_factory.mktemp("expected") / "preds.tsv"
    assert evaluate.main([*grade, "--out", str(out)]) == 0
    return out.read_bytes()


def test_a_stopped_grading_says_so_in_one_line_and_goes_on(grade, expected, tmp_path, monkeypatch,
                                                           capsys):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    argv, at = [*grade, "--out", str(tmp_path / "preds.tsv")], 0
    for where, calls, number in STAGES:
        code, said, err = run_signalled("evaluate.py", where, calls, number, *argv)
        assert (code, err.count("\n")) == (128 + number, 1), (where, calls, said, err)
        assert err.startswith("evaluate.py: interrupted; the same command resumes"), err
        assert not (tmp_path / "preds.tsv").exists() and "Traceback" not in said
        if at and ("resuming from the checkpoint" in said or where == "helpers.predict_logits"):
            assert f"resuming from the checkpoint at step {at}\n" in said, "nothing was lost"
        if "interrupted at step " in said:
            at = int(said.split("interrupted at step ")[1].split()[0])
            assert at > 3 or where != "helpers.summed_loss" or calls < 5
        at = 18 if where == "helpers.predict_logits" else at  # the training is done, and kept
    capsys.readouterr()
    assert evaluate.main(argv) == 0
    assert "resuming from the checkpoint at step 18\n" in capsys.readouterr().out
    assert (tmp_path / "preds.tsv").read_bytes() == expected
    assert not list((tmp_path / "cache" / "runs").iterdir())


def test_a_report_that_is_still_loading_or_waiting_stops_in_one_line(tmp_path):
    code, _, err = run_signalled("report.py", "nbconvert", 1, signal.SIGTERM)
    assert code == 143 and err.startswith("report.py: interrupted; ") and err.count("\n") == 1
    h.write_notebook(h.make_project(tmp_path / "project"), "01_one", "# One", h.PARAMETERS)
    (tmp_path / "out").mkdir()
    with open(str(tmp_path / "out" / ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = h.start(tmp_path / "project", "--out", str(tmp_path / "out"))
        said = tmp_path / "project" / "said"
        h.wait_for(lambda: "waiting until it ends" in said.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert said.read_text().count("\n") == 2 and "Traceback" not in said.read_text()


# ---- every file: the old or the new ------------------------------------------------------------

WORDS = dict(zip(("train", "dev", "test", "dev-b", "test-b"), "abcde"))


def write_predictions(folder, version):
    data = {part: Part([f"{part}/{i}" for i in range(900)], None, None) for part in WORDS}
    predicted = {part: [("neg", "pos")[version]] * 900 for part in WORDS}
    evaluate.write_predictions(str(folder / "preds.tsv"), data, predicted)


def read_text(name):
    def read(folder):
        return (folder / name).read_text() if (folder / name).exists() else None
    return read


def write_state(folder, version):
    checkpoints.save_state(str(folder / "state"), {"weights": torch.full((3000,), version * 1.5)})


def read_state(folder):
    state = checkpoints.load_state(str(folder / "state"))
    return state and state["weights"].tolist()


@functools.lru_cache(maxsize=None)
def tiny():
    return helpers.load_bert(TINY, "mlm")


def write_tokens(folder, version):
    """Have the cache of tokens, whose name is its content's, made: there is no old one."""
    os.environ["FILIMDB_CACHE"] = str(folder)
    helpers.tokenize_all(made_up_reviews(300)[0], tiny()[1])


def read_tokens(folder):
    for path in folder.glob("tokens/*.npy"):
        return files.load_table(str(path)).tolist()


def write_weights(folder, version):
    """Have a pretrained folder saved, whose name is its content's: there is no old one."""
    checkpoints.save_bert(str(folder / "bert"), *tiny(), {"n": 1}, [{"step": 1, "loss": 0.5}])


def read_weights(folder):
    """Return the digest of a sound pretrained folder."""
    if (folder / "bert").exists():
        assert checkpoints.read_note(str(folder / "bert"))["n"] == 1
        assert (folder / "bert" / "history.csv").read_text() == "step,loss\n1,0.5\n"
        return checkpoints.weights_digest(helpers.load_bert(str(folder / "bert"), "mlm")[0])


def write_history(folder, version):
    files.save_history(str(folder / "history"), [{"step": i, "loss": version} for i in range(900)])


def write_page(folder, version):
    row = {"status": "failed", "reason": "", "seconds": 0}
    titles = {"01_setup_check": pages.read_headline(ROOT / "notebooks" / "01_setup_check.ipynb")}
    pages.save_page(folder, "01_setup_check", titles=titles, row=row, given={}, log="",
                    profile=str(version), executed=False)


def write_status(folder, version):
    files.save_json(str(folder / "status.json"), {"n": [version] * 3000})


WRITERS = {  # name: (write(folder, version 0 or 1), read(folder), whether one replaces another)
    "preds.tsv": (write_predictions, read_text("preds.tsv"), True),
    "checkpoint": (write_state, read_state, True),
    "tokens": (write_tokens, read_tokens, False),
    "weights": (write_weights, read_weights, False),
    "history.json": (write_history, read_text("history.json"), True),
    "history.csv": (write_history, read_text("history.csv"), True),
    "trial": (lambda folder, version: files.save_json(str(folder / "x.json"), [version] * 3000),
              read_text("x.json"), True),
    "page": (write_page, read_text("01_setup_check.html"), True),
    "status.json": (write_status, read_text("status.json"), True)}


class Halves:
    """A file whose every write is two, with a moment between them."""

    def __init__(self, file, moment):
        self.file, self.moment = file, moment

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        """Write half, to the disk; and the rest."""
        self.file.write(data[:len(data) // 2])
        self.file.flush()
        self.moment()
        self.file.write(data[len(data) // 2:])


def die_at(nth, work):
    """Do the work, but be killed at the n-th moment around and within what changes the disk."""
    count = [0]

    def moment():
        count[0] += 1
        if count[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, real, halve=False):
        def call(*args, **kwargs):
            moment()
            result = real(*args, **kwargs)
            moment()
            return Halves(result, moment) if halve and "w" in str(args[1:]) else result
        setattr(owner, name, call)

    for owner, name in ((os, "fsync"), (os, "chmod"), (os, "replace"), (os, "rename"),
                        (tempfile, "mkstemp"), (tempfile, "mkdtemp")):
        around(owner, name, getattr(owner, name))
    around(os, "fdopen", os.fdopen, halve=True)
    for module in (checkpoints, evaluate, files, helpers, pages, runtime, studies):
        around(module, "open", builtins.open, halve=True)
    work()


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_killed_while_a_file_is_written_it_is_old_or_new(name, tmp_path, monkeypatch):
    write, read, replaces = WRITERS[name]
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    wanted = []
    for version in (0, 1):
        (tmp_path / str(version)).mkdir()
        write(tmp_path / str(version), version)
        wanted.append(read(tmp_path / str(version)))
    folder, found, code, nth = tmp_path / "there", [], -9, 0
    folder.mkdir()
    while code == -9:
        nth += 1
        if replaces:
            write(folder, 0)
        code = ended(in_child(die_at, nth, lambda: write(folder, 1)))
        found.append(read(folder))
        assert found[-1] in ([wanted[0]] if replaces else [None]) + [wanted[1]], nth
    assert code == 0 and nth > 7 and found[0] != wanted[1] == found[-1], (code, nth)
    assert name in ("page", "status.json") or list(folder.rglob("*.tmp"))
    write(folder, 1)  # and the next run is not disturbed by what was left aside
    assert read(folder) == wanted[1]


def test_what_was_left_aside_goes_after_a_day(tmp_path):
    path = tmp_path / "x.json"
    ages = {"x.json1bcdefgh.tmp": 2, "x.json2bcdefgh.tmp": 0.5, "y.json1bcdefgh.tmp": 2}
    for name, days in ages.items():
        (tmp_path / name).write_text("half")
        os.utime(str(tmp_path / name), (time.time() - days * 86400,) * 2)
    files.save_json(str(path), 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", *sorted(ages)[1:]]


# ---- a full disk, a read-only folder -----------------------------------------------------------

@contextlib.contextmanager
def disk(folder, options="size=8m"):
    """Mount a small disk on a folder; skip where that is not permitted."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        pytest.skip("mounting a small disk is not permitted: " + done.stdout.decode().strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    with disk(tmp_path / "disk") as folder:
        yield folder


def fill(folder, leave=0):
    """Fill a disk but for some bytes; return the ballast."""
    with open(str(folder / "ballast"), "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - leave)
    return folder / "ballast"


def left(folder):
    """Return the names of all files but the ballast."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")
                  if p.is_file() and p.name != "ballast")


@pytest.mark.parametrize("how", ["full", "short of room", "no mount: ENOSPC", "read-only"])
@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_disk_that_takes_no_more(name, how, tmp_path, monkeypatch):
    write, read, replaces = WRITERS[name]
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    with contextlib.ExitStack() as stack:
        folder = tmp_path / "disk"
        folder.mkdir() if "ENOSPC" in how else stack.enter_context(disk(folder))
        if replaces:
            write(folder, 0)
        old, files = read(folder), left(folder)
        if how == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        elif "ENOSPC" in how:
            monkeypatch.setattr(os, "fsync", full)
        else:
            ballast = fill(folder, 4096 * (how != "full"))
        with pytest.raises((InputError, OSError)) as error:
            write(folder, 1)
        said = str(error.value)
        assert str(folder) in said and "\n" not in said, said
        assert name == "tokens" and how == "read-only" or (
            " bytes, " in said and " are free" in said and "it needs " in said), said
        assert read(folder) == old and left(folder) == files
        if how in ("full", "short of room"):
            ballast.unlink()
            write(folder, 1)
            assert read(folder) not in (None, old)


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_of_another_user(tmp_path):
    (tmp_path / "there").mkdir()
    files.save_json(str(tmp_path / "there" / "x.json"), "old")
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        os.chmod(str(folder), 0o755)
    os.chmod(str(tmp_path / "there"), 0o555)
    said = str(tmp_path / "said")
    open(said, "w").close()
    os.chmod(said, 0o666)

    def write():
        if not os.getuid():
            os.setuid(65534)
        try:
            files.save_json(str(tmp_path / "there" / "x.json"), "new")
        except InputError as error:
            with open(said, "w") as file:
                file.write(str(error))

    assert ended(in_child(write)) == 0
    with open(said) as file:
        text = file.read()
    assert "x.json: cannot be written (Permission denied): it needs 6 bytes" in text
    assert (tmp_path / "there" / "x.json").read_text() == '"old"\n'
    os.chmod(str(tmp_path / "there"), 0o755)


@pytest.mark.parametrize("what", ["the cache", "the output", "the report"])
def test_a_full_disk_ends_a_command_in_one_line(what, grade, small_disk, tmp_path, monkeypatch,
                                                capsys):
    out = small_disk if what == "the output" else tmp_path
    (out / "preds.tsv").write_text("older")
    if what == "the cache":
        monkeypatch.setenv("FILIMDB_CACHE", str(small_disk / "cache"))
        (small_disk / "cache" / "tokens").mkdir(parents=True)
    if what == "the report":
        h.write_notebook(h.make_project(tmp_path / "project"), "01_one", "# One", h.PARAMETERS)
        (small_disk / "out").mkdir()
        ballast = fill(small_disk)
        code, said = h.run(tmp_path / "project", "--out", str(small_disk / "out"))
    else:
        ballast = fill(small_disk)
        code = evaluate.main([*grade, "--out", str(out / "preds.tsv")])
        said = capsys.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    assert str(small_disk) in said and "it needs " in said and ", 0 are free" in said
    assert (out / "preds.tsv").read_text() == "older"
    assert not list(small_disk.rglob("*.tmp")) and not list(small_disk.rglob("*.part"))
    if what == "the report":  # with room again the same command goes well
        ballast.unlink()
        assert h.run(tmp_path / "project", "--out", str(small_disk / "out"))[0] == 0


# ---- truncated and altered files ---------------------------------------------------------------

def damaged(data, draw):
    """Return bytes with one thing wrong, as disks and transfers do it."""
    at, size = draw.randrange(len(data)), draw.randrange(1, 600)
    kind = draw.choice(["bit", "bit", "bit", "byte", "truncated", "zeros", "lost", "twice", "longer"])
    return {"bit": data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:],
            "byte": data[:at] + bytes([data[at] + 1 + draw.randrange(255) & 255]) + data[at + 1:],
            "truncated": data[:at], "zeros": data[:at] + bytes(size) + data[at + size:],
            "lost": data[:at] + data[at + size:], "twice": data[:at + size] + data[at:],
            "longer": data + bytes(size)}[kind]


def make_row(folder, tiny_bert):
    part = Part(None, *made_up_reviews(12, 4))
    studies.run_trials([dict(model=tiny_bert, seq_len=8, epochs=1, batch_size=8, accumulation=1)],
                       part, part, str(folder))


FILES = {  # kind: (make(folder, a model), the pattern of its files, read a file)
    "tokens": (lambda folder, model: write_tokens(folder, 0), "tokens/*.npy",
               lambda path: getattr(files.load_table(str(path)), "tolist", lambda: None)()),
    "checkpoint": (lambda folder, model: write_state(folder, 1), "state",
                   lambda path: read_state(path.parent)),
    "trial": (make_row, "*.json", lambda path: studies.read_row(str(path))),
    "weights": (lambda folder, model: checkpoints.save_bert(
        str(folder / "bert"), *helpers.load_bert(model, "mlm"), {"n": 1}), "bert/*",
        lambda path: checkpoints.read_note(str(path.parent)))}


@pytest.mark.parametrize("kind", sorted(FILES))
def test_a_damaged_file_is_never_used(kind, tiny_bert, tmp_path, monkeypatch, capsys):
    make, pattern, read = FILES[kind]
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    make(tmp_path, tiny_bert)
    draw, told, spared = random.Random(3), 0, 0
    paths = sorted(tmp_path.glob(pattern))
    whole = {path: path.read_bytes() for path in paths}
    sound = read(paths[0])
    for _ in range(DAMAGES):
        path = draw.choice(paths)
        bad = damaged(whole[path], draw)
        path.write_bytes(bad)
        capsys.readouterr()
        found = read(path)
        aside = path.parent if kind == "weights" else path
        if found:  # bytes that carry nothing: blanks of a table's header, or none has changed
            assert found == sound and (bad == whole[path] or kind in ("tokens", "trial", "weights"))
            spared += 1
        else:
            assert capsys.readouterr().out.count("is damaged (its checksum differs): set aside") == 1
            assert not aside.exists()
            os.replace(str(aside) + ".damaged", str(aside))
            told += 1
        path.write_bytes(whole[path])
        assert read(path) == sound
    print("%s: %d damaged, %d set aside, %d changed nothing" % (kind, DAMAGES, told, spared))
    assert told > 0.6 * DAMAGES


# ---- two at once -------------------------------------------------------------------------------

def test_two_gradings_at_once(grade, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    argv = [sys.executable, str(ROOT / "evaluate.py"), *grade[:4], *options(epochs=3), "--out",
            str(tmp_path / "preds.tsv")]  # with pretraining: its folder is shared too
    pair = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             universal_newlines=True) for _ in range(2)]
    for process in pair:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (0, ""), out
        assert "damaged" not in out
    both = (tmp_path / "preds.tsv").read_bytes()
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "alone"))
    assert evaluate.main([*argv[2:-1], str(tmp_path / "alone.tsv")]) == 0
    assert both == (tmp_path / "alone.tsv").read_bytes()
    assert not list((tmp_path / "cache").rglob("*.tmp"))


TRIALS = """import os, time
for i in range(6):
    if not os.path.exists(out_dir + "/trial%d" % i):
        with open(out_dir + "/log", "a") as file:
            file.write("%d" % i)
        time.sleep(0.3)
        open(out_dir + "/trial%d" % i, "w").close()"""


def test_two_reports_at_once_and_one_that_goes_on(tmp_path):
    for name in "one", "two":  # the same project, so that each has its own file of what it said
        h.write_notebook(h.make_project(tmp_path / name), "01_study", "# Study", h.PARAMETERS, TRIALS)
    out = tmp_path / "out"
    first = h.start(tmp_path / "one", "--out", str(out))
    h.wait_for((out / "log").exists, 120)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 143
    begun = (out / "log").read_text()
    pair = [h.start(tmp_path / name, "--out", str(out)) for name in ("one", "two")]
    assert [process.wait(timeout=120) for process in pair] == [0, 0]
    said = [(tmp_path / name / "said").read_text() for name in ("one", "two")]
    assert sum("waiting until it ends" in text for text in said) == 1, said
    assert all("01_study: ok" in text for text in said)
    log = (out / "log").read_text()
    again = log[len(begun):]  # each trial once; the one that was stopped, again
    assert again in ("012345"[len(begun) - 1:], "012345"[len(begun):]), (begun, log)
    assert h.read_status(out)["01_study"]["status"] == "ok"
    assert (out / "01_study.html").read_text().rstrip().endswith("</html>")
    assert not list(out.rglob("*.part"))


# ---- many faults in a row ----------------------------------------------------------------------

def study(model, store):
    """Run a small study of six trials; return its rows."""
    texts, labels = made_up_reviews(26, 5)
    parts = Part(None, texts[:16], labels[:16]), Part(None, texts[16:], labels[16:])
    grid = [dict(model=model, seq_len=16, epochs=2, batch_size=4, accumulation=1, keep="head", **point)
            for point in studies.product([0, 1, 2], lr=[1e-3, 1e-2])]
    return studies.run_trials(grid, *parts, store)


def run_out_of_room(nth, work):
    """Do the work on a disk that takes n files and no more."""
    real, count = os.fsync, [0]

    def fsync(handle):
        count[0] += 1
        full() if count[0] > nth else real(handle)

    os.fsync = fsync
    work()


def inject(fault, draw, folder, model, seconds):
    """Do one thing to the study, or to the files that it left; return whether it took effect."""
    def work():
        study(model, os.path.join(folder, "store"))

    log, trials = os.path.join(folder, "log"), sorted(glob.glob(folder + "/store/*.json"))
    for path in draw.sample(trials, 3) if len(trials) == 6 else ():
        os.remove(path)  # else there would be nothing left to disturb
    if fault == "no room":
        room = draw.randrange(9)
        return ended(in_child(into_file, log, lambda: run_out_of_room(room, work)))
    if fault in ("SIGKILL", "Ctrl-C", "two, one killed"):
        children = [in_child(into_file, log, work) for _ in range(1 + (fault[0] == "t"))]
        time.sleep(draw.random() * seconds)
        os.kill(children[0], signal.SIGINT if fault == "Ctrl-C" else signal.SIGKILL)
        return [ended(child) for child in children][0]
    found = [os.path.join(base, name) for base, _, names in os.walk(folder) for name in sorted(names)
             if name.endswith((".json", ".npy", ".checkpoint")) and "log" not in name]
    for path in draw.sample(sorted(found), min(len(found), 3)):
        with open(path, "rb") as file:
            data = file.read()
        if fault == "lost":
            os.remove(path)
        elif data:
            with open(path, "wb") as file:
                file.write(damaged(data, draw))
    return len(found[:3])


def inject_all(folder, model, n, seed):
    """Inject n random faults, look at the study after each tenth; print what was done and came."""
    begin(folder)
    draw, kinds = random.Random(seed), [
        "SIGKILL", "damaged", "no room", "Ctrl-C", "two, one killed", "SIGKILL", "lost", "damaged"]
    began, done = time.time(), {}
    assert not ended(in_child(into_file, folder + ".log", lambda: study(model, folder + ".alone")))
    seconds = time.time() - began
    for i in range(n):
        fault = kinds[i % len(kinds)] if i < len(kinds) else draw.choice(kinds)
        done.setdefault(fault, []).append(inject(fault, draw, folder, model, seconds))
    ends = {kind: [sum(map(bool, codes)), len(codes)] for kind, codes in done.items()}
    last = ended(in_child(into_file, os.path.join(folder, "end"),
                          lambda: study(model, os.path.join(folder, "store"))))
    print(json.dumps([last, seconds, time.time() - began, ends]))


def test_faults_in_a_row_lose_nothing(tiny_bert, tmp_path):
    folder = tmp_path / "soak"
    folder.mkdir()
    last, alone, seconds, ends = fresh("inject_all", str(folder), tiny_bert, FAULTS, 5)
    warned = (folder / "log").read_text().count("is damaged") if (folder / "log").exists() else 0
    print("%d faults in %.0f s over a study of %.1f s (took effect/injected: %s); %d files set "
          "aside" % (FAULTS, seconds, alone, ", ".join(
              "%s %d/%d" % (kind, *counts) for kind, counts in sorted(ends.items())), warned))
    assert last == 0
    rows = [json.loads(path.read_text()) for path in (tmp_path / "soak.log.json", folder / "end.json")]
    assert list(map(core, rows[0])) == list(map(core, rows[1])) and len(rows[0]) == 6
    names = [sorted(path.name for path in store.glob("*.json"))
             for store in (tmp_path / "soak.alone", folder / "store")]
    assert names[0] == names[1] and len(names[0]) == 6
    assert sum(effect for effect, _ in ends.values()) > (FAULTS / 2 if SOAK else 0), ends
