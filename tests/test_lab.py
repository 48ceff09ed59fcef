"""What a student meets in Jupyter: the working copy, errors in one line, help, values that look well."""
import ast
import doctest
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pandas as pd
import pytest
from tools import DEV, PATHS, ROOT, TODAY, TRAIN, sources

import effects
import figures
import files
import helpers
import report
import runtime
import studies

# ---- the working copy ----------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A copy of what `make lab` reads, a python that says how it was called, and an ordinary user."""
    place = tmp_path / "project"
    shutil.copytree(str(ROOT / "data" / "sample"), str(place / "data" / "sample"))
    for folder in ("notebooks", "profiles", "docs"):
        shutil.copytree(str(ROOT / folder), str(place / folder),
                        ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    names = ["Makefile", "requirements.txt", "figures/report.png", "data/README.md", "README.md",
             "results/reference/README.md"]
    for name in [*names, *(path.name for path in ROOT.glob("*.py"))]:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(str(ROOT / name), str(place / name))
    (place / ".venv" / "bin").mkdir(parents=True)
    write_script(place / ".venv" / "bin" / "python", 'echo "python $*"')
    (place / ".venv" / "ready").write_text("")
    (place / "bin").mkdir()
    write_script(place / "bin" / "id", "echo ${ID:-1000}")
    return place


def write_script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(place, *words, **variables):
    """Run make as a person does: (exit code, what it said)."""
    environment = dict(os.environ, PATH=f"{place / 'bin'}:{os.environ['PATH']}", **variables)
    for key in ("MAKEFLAGS", "MAKELEVEL", "FRESH", "ARGS"):
        environment.pop(key, None)
    done = subprocess.run(["make", "--no-print-directory", *words], cwd=str(place), env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    return done.returncode, done.stdout


def contents(folder):
    return {str(path.relative_to(str(folder))): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "build" not in path.relative_to(str(folder)).parts}


def test_a_lab_works_on_a_copy_that_is_kept(project):
    tracked = contents(project)
    code, said = make(project, "lab", "ARGS=--port=9000")
    assert code == 0 and said.rstrip().endswith(
        "python -m jupyterlab --ip=127.0.0.1 --port=9000 build/lab"), said
    lab = project / "build" / "lab"
    for name in ("helpers.py", "README.md", "profiles/sample.yml", "data/sample/train.texts",
                 *(f"notebooks/{path.name}" for path in PATHS.values())):
        assert (lab / name).read_bytes() == (project / name).read_bytes(), name
        assert not (lab / name).is_symlink(), "a change would reach what is tracked"
    assert not (lab / "report.py").exists(), "it would write a report of what was tried"
    for path in (lab / "helpers.py", lab / "notebooks" / "01_setup_check.ipynb"):
        path.write_text("mine")
    code, said = make(project, "lab")
    assert code == 0 and said.startswith("build/lab: your working copy as it is (a new one: FRESH=1)\n")
    assert (lab / "helpers.py").read_text() == "mine", "kept"
    code, said = make(project, "lab", "FRESH=1")
    assert code == 0 and "build/lab-old: the working copy so far" in said
    assert (lab / "helpers.py").read_bytes() == (project / "helpers.py").read_bytes()
    assert (project / "build" / "lab-old" / "helpers.py").read_text() == "mine", "not lost"
    assert make(project, "lab", "FRESH=1")[0] == 0
    assert contents(project) == tracked


def test_what_is_tried_goes_to_the_copys_own_folder(project):
    code, said = make(project, "lab")
    lab = project / "build" / "lab"
    assert code == 0 and not os.path.lexists(str(lab / "report")) and "the report" not in said
    (project / "build" / "sample").mkdir()
    (project / "build" / "sample" / "index.html").write_text("an older report")
    assert make(project, "lab")[0] == 0
    (project / "build" / "sample" / "index.html").write_text("the report")
    (project / "build" / "sample" / "figures").mkdir()
    (project / "build" / "sample" / "figures" / "a.csv").write_text("a table that it links to")
    code, said = make(project, "lab")
    assert code == 0 and "the report: build/sample/index.html in a browser; in JupyterLab: report" in said
    assert (lab / "report" / "index.html").read_text() == "the report"
    assert (lab / "report" / "figures" / "a.csv").exists()
    assert not (lab / "report").is_symlink(), "Jupyter serves no file outside of its folder"
    assert (lab / "build" / "lab" / "helpers.py").samefile(str(lab / "helpers.py")), \
        "out_dir = build/lab, as a module in the copy sees it"
    (project / "data" / "FILIMDB").mkdir()
    assert (lab / "data" / "FILIMDB").is_dir(), "fetched later on"
    code, said = make(project, "clean")
    assert code == 0 and (lab / "helpers.py").exists() and not (project / "build" / "sample").exists()


def test_a_lab_as_root_says_the_one_thing_to_do(project):
    code, said = make(project, "lab", ID="0")
    assert code and not (project / "build").exists()
    assert said.split("\n")[0] == "make: JupyterLab does not start as root: make lab ARGS=--allow-root"
    code, said = make(project, "lab", "ARGS=--allow-root", ID="0")
    assert code == 0 and "--allow-root build/lab" in said


def test_a_report_names_the_notebooks_that_differ_from_what_is_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    paths = [tmp_path / name for name in ("01_a.ipynb", "02_b.ipynb", "03_c.ipynb")]
    for path in paths:
        path.write_text("{}")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.changed(paths) == [], "no repository"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "01_a.ipynb", "02_b.ipynb"], ["commit", "-qm", "a"]):
        subprocess.check_call([*git, *words], cwd=str(tmp_path))
    assert report.changed(paths[:2]) == []
    paths[1].write_text('{"tried": 1}')
    assert report.changed(paths) == ["02_b", "03_c"] and report.changed(paths[:1]) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report.changed(paths) == [], "no git"


def test_a_reports_log_says_how_far_the_trials_are(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_cell", lambda path: "cell 3 of 9")
    assert report.BEAT == 60, "a line a minute"
    assert report.how_far(tmp_path, "03", None) == "cell 3 of 9"
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("FILIMDB_PROGRESS", str(report.progress_file(tmp_path, "03")))
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(
        isatty=lambda: False, pub_thread=None, write=lambda text: None, flush=lambda: None))
    with runtime.progress_bar(6, "rates", "trial") as bar:
        bar.skip(2)
        bar.show()
        assert report.how_far(tmp_path, "03", None) == "cell 3 of 9: rates: trial 2 of 6"
    assert report.how_far(tmp_path, "03", None) == "cell 3 of 9"


# ---- errors in one line --------------------------------------------------------------------------

@pytest.fixture(scope="module")
def shell():
    """IPython's shell, as a kernel has it."""
    from IPython.core.interactiveshell import InteractiveShell
    shell = InteractiveShell.instance()
    yield shell
    InteractiveShell.clear_instance()


def shown(shell, code, capsys, **names):
    """Return what a cell prints in a shell."""
    shell.user_ns.update(names)
    capsys.readouterr()
    shell.run_cell(code)
    return capsys.readouterr().out


def test_an_input_error_is_one_red_line_and_another_is_not(shell, capsys):
    said = shown(shell, "helpers.make_config(lrr=1)", capsys, helpers=helpers)
    assert said == ("\x1b[31mInputError: unknown hyperparameter 'lrr'; did you mean lr?\x1b[0m\n")
    said = shown(shell, "raise InputError('a\\n\\x1b[2Jb')", capsys, InputError=files.InputError)
    assert said == "\x1b[31mInputError: a b\x1b[0m\n"
    assert shown(shell, "1 / 0", capsys).count("\n") > 3, "a fault of ours keeps its traceback"


def test_an_interrupt_is_one_red_line(shell, capsys, tiny_bert, monkeypatch, tmp_path):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path))
    count = [0]

    def stop(*args, real=helpers.accumulate, **options):
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(helpers, "accumulate", stop)
    monkeypatch.setattr(helpers.run, "is_notebook", lambda: True)
    grid = [dict(model=tiny_bert, seq_len=16, batch_size=8, epochs=3, accumulation=1, seed=seed)
            for seed in range(3)]
    cell = "run_trials(grid, TRAIN, DEV, store, 'learning rates')"
    names = dict(run_trials=studies.run_trials, grid=grid, TRAIN=TRAIN, DEV=DEV, store=str(tmp_path))
    assert shown(shell, cell, capsys, **names) == (
        "\x1b[31mInterrupted: learning rates, trial 1 of 3: training interrupted at step 4 of 6; "
        "the same call resumes\x1b[0m\n")
    monkeypatch.setattr(helpers, "accumulate", lambda *args, **options: 1 / 0)
    monkeypatch.setattr(studies, "run_once", stop)
    count[0] = 4
    assert shown(shell, cell, capsys, **names) == (
        "\x1b[31mInterrupted: learning rates, trial 1 of 3: interrupted; the same call "
        "resumes\x1b[0m\n")


def test_an_interrupt_of_ours_is_one_like_any_other():
    stop = files.Interrupted("training interrupted", 15)
    assert isinstance(stop, KeyboardInterrupt) and stop.args == (15,)
    assert str(stop) == "training interrupted"


@pytest.mark.parametrize("name,names,said", [
    ("lrr", ["lr", "lrs", "seeds"], "; did you mean lr?"), ("x", ["b", "a"], "; use one of a, b"),
    (3, ["a"], "; use one of a")])
def test_did_you_mean_names_one(name, names, said):
    assert files.nearest(name, names) == said


# ---- help ----------------------------------------------------------------------------------------

def lesson():
    """Return the names of all functions of helpers that a notebook takes or shows."""
    names = set()
    for name in PATHS:
        for cell in sources(name, "code"):
            for node in ast.walk(ast.parse(cell)):
                if isinstance(node, ast.ImportFrom) and node.module == "helpers":
                    names.update(alias.name for alias in node.names)
                if isinstance(node, ast.Call) and "show_source" in ast.dump(node.func):
                    names.update(getattr(arg, "id", getattr(arg, "attr", "")) for arg in node.args)
    return sorted(name for name in names if inspect.isfunction(getattr(helpers, name, None)))


@pytest.mark.parametrize("name", sorted({*lesson(), "load_filimdb"}))
def test_a_function_of_the_lesson_has_an_example_that_holds(name, monkeypatch, tmp_path):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path))
    test, = doctest.DocTestFinder(recurse=False).find(
        getattr(helpers, name), name, globs=dict(vars(helpers)))
    assert test.examples, f"{name} has no example"
    said = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not failed, "".join(said)


def test_the_lesson_has_its_functions():
    assert len(lesson()) > 15 and {"vectorize_ex", "fit", "train", "pretrain"} <= set(lesson())


def test_help_lists_the_settings_with_defaults_and_sources(shell):
    from IPython.core import oinspect
    said = oinspect.getdoc(helpers.train)
    for key, value in vars(helpers.make_config()).items():
        assert re.search(rf"(?m)^  {key}={re.escape(repr(value))} +{re.escape(helpers.meanings()[key])}$",
                         said), key
    assert said.startswith(inspect.getdoc(helpers.train)) and "Sun et al. 2019" in said
    assert "lr=5e-05" in oinspect.getdoc(helpers.pretrain) and "lr=2e-05" in said


# ---- values that look well -----------------------------------------------------------------------

def formats(value, shell):
    """Return (plain, HTML) of a value as the last line of a cell shows it."""
    data, _ = shell.display_formatter.format(value)
    return data["text/plain"], data.get("text/html", "")


def test_data_are_shown_in_a_few_lines(shell, sample):
    data = helpers.load_filimdb(sample)
    plain, html = formats(data, shell)
    assert plain.split("\n")[:2] == [f"Filimdb in {sample}",
                                     "train: Part of 1,000 reviews (500 neg, 500 pos)"]
    assert len(plain) < 500 and html.count("<tr>") == 1 + len(data) and len(html) < 5000
    plain, html = formats(data["train"], shell)
    assert plain == "Part of 1,000 reviews (500 neg, 500 pos)"
    assert html.count("<tr>") == 4 and len(html) < 2000 and data["train"].texts[0][:40] in html
    unlabelled = helpers.Part(["test/0"], ["<b>\x1b[2J" + "x" * 200], None)
    plain, html = formats(unlabelled, shell)
    assert plain == "Part of 1 reviews (no labels)"
    assert "&lt;b&gt;" in html and "\x1b" not in html and "\u2026" in html
    tokens = helpers.Tokens(files.sealed_table([np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32)]))
    assert formats(tokens, shell)[0] == "Tokens of 2 texts: 8 in all, 3 to 5 a text"
    assert "0 texts: 0 in all" in repr(helpers.Tokens(files.sealed_table([])))


def trials():
    def row(lr, seed, mark=""):
        return {"config": {"lr": lr, "seed": seed, "data_seed": seed}, "model": "bert", "mark": mark,
                "history": [{"step": i} for i in range(500)], "correct": "10" * 500, "seconds": 1.0,
                "n_train": 9, "n_dev": 1000, "metrics": {"dev_accuracy": 0.512345, "dev_loss": 0.7,
                                                         "train_accuracy": 1.0, "train_loss": 0.1}}
    return effects.as_table([row(lr, seed) for lr in (1e-3, 2e-3) for seed in (0, 1)])


def test_trials_show_what_differs_between_them(shell):
    table = trials()
    plain, html = formats(table, shell)
    assert plain.split("\n")[0].split() == ["lr", "seed", *effects.METRICS]
    assert len(plain.split("\n")) == 5 and len(plain) < 600 and "0.5123" in plain
    assert "<table" in html and "history" not in html and len(html) < 4000
    some = table[table["seed"] == 0]
    assert formats(some, shell)[0].split("\n")[0].split()[0] == "lr" and "history" in some.columns
    one = table[(table["seed"] == 0) & (table["lr"] == 1e-3)]
    assert "dev_accuracy" in formats(one, shell)[0]
    assert "failed" in repr(table.assign(failed="diverged"))


def test_trials_are_a_dataframe_in_all_else(shell):
    table = trials()
    assert isinstance(table, pd.DataFrame)
    pivot = table.pivot_table("dev_accuracy", "lr", "seed", aggfunc="mean")
    assert repr(pivot) == repr(pd.DataFrame(pivot)) and "seed" in repr(pivot)
    means = table.groupby("lr")[["dev_loss"]].mean()
    assert "0.7" in repr(means) and repr(table["lr"]) == repr(pd.DataFrame(table)["lr"])
    assert len(pd.concat([table, table])) == 8
    assert effects.compare(table, "lr", 1e-3)[0].n_seeds == 2


def test_a_comparison_and_answers_are_shown_as_tables(shell):
    found = effects.compare(trials(), "lr", 1e-3)
    plain, html = formats(found, shell)
    assert plain.startswith("lr 2e-3 against 1e-3: +0.0 points") and "<table" in html
    assert formats(found[0], shell)[0] == found[0].text and "<table" in formats(found[0], shell)[1]
    answers = studies.AnswerList([{"question": "Q1. Is <b>?", "answer": "Yes, by 2.", "verdict": "supported",
                                   "figure": "a", "point": "3a"}])
    plain, html = formats(answers, shell)
    assert plain == "Q1. Is <b>?: Yes, by 2.: supported"
    assert "Is &lt;b&gt;?" in html and "3a" not in html


def test_tables_read_in_jupyter_as_in_the_report():
    html = files.html_table([{"what": "<i>", "n": "1,200", "share": "5.1 %"}, {"what": 3, "n": 2, "share": ""}])
    cells = re.findall(r'<t[dh] style="text-align:(\w+);[^"]*">([^<]*)<', html)
    assert cells == [("left", "what"), ("right", "n"), ("right", "share"), ("left", "&lt;i&gt;"),
                     ("right", "1,200"), ("right", "5.1 %"), ("left", "3"), ("right", "2"), ("right", "")]
    assert html.count("<tr>") == html.count("</tr>") == 3
    assert files.html_table([]) and files.html_table([], ["a"]).count("<th") == 2


def test_an_answer_has_its_box_in_jupyter_too(monkeypatch):
    from tools import bare_study
    said = []
    monkeypatch.setattr(studies, "show_html", lambda text, *args, **metadata: said.append(text))
    study = bare_study()
    study.answer("", "Q1. Why?", "Because.", verdict="supported")
    study.summary()
    assert "border-left" in said[0] and "text-align:left" in said[1]


# ---- to try --------------------------------------------------------------------------------------

def test_without_a_person_the_example_stands_alone(monkeypatch, capsys):
    said = []
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    studies.try_it(lambda text, n=3: said.append((text, n)), "a text", n=(1, 9))
    assert said == [("a text", 3)] and not capsys.readouterr().out, "neither a box nor advice"


def test_a_box_shows_what_is_typed_into_it(monkeypatch):
    widgets = pytest.importorskip("ipywidgets")
    said, made = [], []
    monkeypatch.setattr(runtime, "is_watched", lambda: True)
    real = widgets.interactive.__init__
    monkeypatch.setattr(widgets.interactive, "__init__",
                        lambda self, *args, **options: (made.append(self), real(self, *args, **options))[0])
    studies.try_it(lambda text, n=3, truth="": said.append((text, n)), "a text", n=(1, 9))
    assert said == [("a text", 3)]
    box, slider, button, output = made[0].children  # none for what is no choice
    assert isinstance(box, widgets.Textarea) and box.value == "a text"
    assert button.description == "Show"
    box.value, slider.value = "my own", 7
    assert len(said) == 1, "not at every letter"
    button.click()
    assert said[1:] == [("my own", 7)]


def test_without_ipywidgets_a_person_is_told_what_brings_it(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "is_watched", lambda: True)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    studies.try_it(lambda text: None, "a text")
    assert capsys.readouterr().out.count("pip install ipywidgets") == 1


WATCH = """import sys
sys.path.insert(0, {root!r})
import runtime, studies
print("watched", runtime.is_watched())
studies.try_it(lambda text, n=2: studies.show_html("<b>" + text + "</b>", "plain " + text), "my text", n=(1, 9))
"""


@pytest.fixture
def kernel(monkeypatch):
    """A kernel as Jupyter starts it: run(code, stop) gives the messages that a page shows."""
    jupyter_client = pytest.importorskip("jupyter_client")
    monkeypatch.setenv("JUPYTER_PATH", sys.prefix + "/share/jupyter")
    manager, client = jupyter_client.manager.start_new_kernel(kernel_name="python3")

    def run(code, watched=True, stop=""):
        messages = []

        def hear(message):
            messages.append(message)
            if stop and stop in message["content"].get("text", ""):
                manager.interrupt_kernel()

        client.allow_stdin = watched
        client.execute_interactive(code, allow_stdin=watched, timeout=300, output_hook=hear)
        return messages
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


LONG = """import sys
sys.path.insert(0, {root!r})
import helpers
texts = ["a good film", "a bad film"] * 32
helpers.train(texts, ["pos", "neg"] * 32, model="data/sample/bert", seq_len=16, epochs=5000)"""


@pytest.mark.slow
def test_a_stopped_cell_says_so_in_one_line(kernel, monkeypatch, tmp_path):
    """The bar is on the page when the stop button is pressed; then one red line is, and no gap."""
    messages = kernel(f"import os\nos.environ['FILIMDB_CACHE'] = {str(tmp_path)!r}\n"
                      + LONG.format(root=str(ROOT)), stop="left")
    error = messages[-2 if messages[-1]["msg_type"] == "status" else -1]["content"]
    assert error["ename"] == "Interrupted" and len(error["traceback"]) == 1, error
    assert re.match(r"training interrupted at step \d+ of 10000; the same call resumes$", error["evalue"])
    assert error["evalue"] in error["traceback"][0] and "\n" not in error["traceback"][0]
    printed = "".join(m["content"].get("text", "") for m in messages if m["msg_type"] == "stream")
    assert re.search(r"\rtraining: \d+ of 10,000 steps, \d+ s *\r?\n$", printed), printed[-200:]


@pytest.mark.slow
@pytest.mark.parametrize("watched", [True, False])
def test_a_kernel_gives_a_box_to_a_person_and_none_to_papermill(watched, kernel):
    """A frontend that can be asked is a person's; papermill and nbconvert say that they cannot."""
    outputs = kernel(WATCH.format(root=str(ROOT)), watched)
    printed = "".join(m["content"].get("text", "") for m in outputs if m["msg_type"] == "stream")
    shown = [m["content"]["data"] for m in outputs if m["msg_type"] == "display_data"]
    assert f"watched {watched}" in printed
    assert shown[0]["text/html"] == "<b>my text</b>"
    boxes = [data for data in shown if "application/vnd.jupyter.widget-view+json" in data]
    have = not subprocess.call([sys.executable, "-c", "import ipywidgets"], stderr=subprocess.DEVNULL)
    assert len(boxes) == (watched and have)
    assert ("pip install ipywidgets" in printed) == (watched and not have)


def test_todays_requirements_bring_the_box():
    """jupyter brings ipywidgets on today's stack; the pinned one names it."""
    text = (ROOT / ("requirements.txt" if TODAY else "requirements-2019.txt")).read_text()
    assert re.search(r"(?m)^jupyter==" if TODAY else r"(?m)^ipywidgets==7\.5\.1$", text)


def test_pages_that_let_one_try_do_so_through_it():
    for name in ("02_vectorize_ex", "03_training_loop"):
        code = "\n".join(sources(name, "code"))
        assert code.count("studies.try_it(") == 1 and "ipywidgets" not in code


def test_what_is_not_used_any_more_is_gone():
    assert not json.dumps([sources(name, "code") for name in PATHS]).count("check_lists")
    assert "html" in vars(figures) and not hasattr(studies, "check_lists")
