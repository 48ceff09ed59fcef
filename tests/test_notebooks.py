"""The notebooks: how they are stored and written, and that a tiny run of all of them goes through."""
import ast
import html
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import papermill
import pytest
import yaml
from tools import (
    PATH_LINES,
    PATHS,
    ROOT,
    TINY,
    parameter_lines,
    parameters,
    read_notebook,
    sources,
)

import assignment
import helpers
import parameters as profiles

FIRST = {"profile": "sample", "data_dir": "data/sample", "model": "data/sample/bert",
         "out_dir": "build/lab"}
each = pytest.mark.parametrize("name", sorted(PATHS))


def has_study(name):
    """Tell whether a page works with studies.Study, in place of Answers and a banner."""
    return "import studies" in sources(name, "code")[0].split("\n")


def questions(name):
    """Return the numbers of the questions that the first cell asks."""
    return re.findall(r"(?m)^[-*] (?:\*\*)?Q(\d+)\b", sources(name, "markdown")[0])


# ---- as they are stored ------------------------------------------------------------------------

def test_there_are_notebooks_numbered_from_1():
    assert [name[:3] for name in PATHS] == [f"{i:02d}_" for i in range(1, len(PATHS) + 1)]


@each
def test_stored_stripped_for_both_stacks(name):
    nb = read_notebook(name)
    assert (nb["nbformat"], nb["nbformat_minor"]) == (4, 4)
    assert nb["metadata"]["kernelspec"] == {"name": "python3", "display_name": "Python 3",
                                            "language": "python"}
    assert set(nb["metadata"]) <= {"kernelspec", "language_info"}
    assert nb["metadata"].get("language_info", {"name": "python"}) == {"name": "python"}
    for cell in nb["cells"]:
        assert "id" not in cell and cell["cell_type"] in ("code", "markdown")
        assert set(cell["metadata"]) <= {"tags"} and "".join(cell["source"]).strip()
        assert set(cell["metadata"].get("tags", [])) <= {"parameters", "lesson", "folded"}
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert "attachments" not in cell
    text = PATHS[name].read_bytes()
    assert text.endswith(b"\n") and b"\r" not in text and b"\\u" not in text


@each
def test_parameters_are_a_few_commented_literals(name):
    lines, values = parameter_lines(name), parameters(name)
    assert 4 <= len(values) <= 13, f"{len(values)} parameters"
    assert len(lines) == len(values), "one line each"
    assert all(re.match(r"\w+ = \S.*  # \S", line) for line in lines), lines
    assert list(values.items())[:4] == list(FIRST.items())
    assert all(value not in ([], None) for value in values.values()), "a default without a type"


@each
def test_the_first_cells(name):
    nb = read_notebook(name)
    code = [c for c in nb["cells"] if c["cell_type"] == "code"]
    assert nb["cells"][0]["cell_type"] == "markdown"
    assert [c["metadata"].get("tags", []) for c in code[:3]] == [[], ["parameters"], []]
    opening = sources(name, "markdown")[0]
    assert re.match(r"# \S.*\n\n[A-Z]", opening), "a title, then a paragraph"
    assert questions(name) == [str(i) for i in range(1, len(questions(name)) + 1)] != []
    imports = sources(name, "code")[0]
    assert PATH_LINES in imports
    setup = sources(name, "code")[2]
    if has_study(name):
        assert f'study = studies.Study("{name}", profile, data_dir, model, out_dir' in setup
        assert setup.rstrip().endswith("\nstudy") and code_lines(imports) <= 12
        return
    assert "banner(profile, model, data_dir)" in setup
    assert f'Answers("{name}", out_dir, profile)' in setup


def code_lines(cell):
    """Count a cell's lines that are neither blank nor an import; long lists of names are no logic."""
    lines = {i for i, line in enumerate(cell.split("\n"), 1) if line.strip()}
    imports = [node for node in ast.parse(cell).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    following = [node.lineno for node in ast.parse(cell).body] + [len(cell) + 1]
    for node in imports:  # Python 3.7 has no end_lineno
        lines -= set(range(node.lineno, min(n for n in following if n > node.lineno)))
    return len(lines)


@each
def test_code_is_short_and_plain(name):
    cells, sizes = sources(name, "code"), []
    del cells[1]  # the parameters, of which another test allows a few
    for cell in cells:
        tree = ast.parse(cell)
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
                    and any(alias.name == "*" for alias in node.names)], "import *"
        assert not re.search(r"(?m)^[%!]\w", cell), "a magic"
        defs_only = all(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body)
        sizes.append(code_lines(cell) - 3 * len(tree.body) if defs_only else code_lines(cell))
    # 3 to 8 lines are the aim; a cell of functions alone may have 15 lines a function
    assert max(sizes) <= 12, [cell.split("\n")[0] for cell, n in zip(cells, sizes) if n > 12]


NUMBER = r"\d(?:[\d.,]*\d)? ?(?:%|percent\b|points?\b)"
CITATION = r"[A-Z][\w-]+(?:,? (?:&|and) [A-Z]\w+| et al\.)?,? \(?(?:19|20)\d\d"


def typed_numbers(text):
    """Return the sentences of a Markdown text that give a result which nobody is quoted for."""
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-*|#] )", text):
        if not re.search(CITATION, paragraph):
            found += [sentence for sentence in re.split(r"(?<=[.;:!?])\s", paragraph)
                      if re.search(NUMBER, sentence)
                      and re.search(r"(?i)accura|error|loss|perplex|gain|beats|better", sentence)]
    return found


def test_typed_numbers_are_found():
    assert typed_numbers("Text.\n\nAn accuracy of 87.3 % is good. It is.") == [
        "An accuracy of 87.3 % is good."]
    assert typed_numbers("The tail gains 2 points.") and typed_numbers("- 5 percent fewer errors")
    assert not typed_numbers("Sun et al. (2019) found errors of 5.4 %.")
    assert not typed_numbers("Warm-up over 10 % of the steps. The loss falls.")
    assert not typed_numbers("Loshchilov & Hutter 2019: 1 % better.")


@each
def test_nobody_typed_a_result(name):
    assert typed_numbers("\n\n".join(sources(name, "markdown"))) == []


@each
def test_text_has_no_local_links_and_images(name):
    text = "\n".join(sources(name, "markdown"))
    assert not re.search(r"!\[|<img|<script|<iframe|<style|\$\$|\\\(", text)
    targets = re.findall(r"\]\(([^)]*)\)|<a [^>]*href=[\"']?([^\"'> ]*)", text)
    for target in (a or b for a, b in targets):
        known = re.match(r"([\w-]+)\.ipynb$", target)  # report.py makes it a page
        assert target.startswith(("https://", "http://")) or known and known.group(1) in PATHS, target


@each
def test_a_sentence_stands_before_each_figure_and_answer(name):
    code = "\n".join(sources(name, "code"))
    give, table = (("study.answer(", "study.summary()") if has_study(name)
                   else ("answers.give(", "answers.table()"))
    assert code.count(give) >= len(questions(name))
    assert code.rstrip().endswith(table) or "\n" + table in code
    assert re.search(r"(?m)^\s*assert ", code), "at least one mechanism is asserted"


def test_figures_have_names_of_their_own():
    names = [(figure, name) for name in PATHS for figure in re.findall(
        r"(?:save_figure\(\s*\w+|figures\.save\(figure, study),\s*f?\"(\w+)\"",
        "\n".join(sources(name, "code")))]
    assert len(names) > len(PATHS) / 2
    figures = [figure for figure, _ in names]
    assert sorted(figures) == sorted(set(figures)), "all notebooks share one folder"


def calls(name, function):
    """Return the calls of a function, by its name, in a notebook's code."""
    trees = [ast.parse(cell) for cell in sources(name, "code")]
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)
            and function == getattr(node.func, "attr", getattr(node.func, "id", ""))]


def option(call, name):
    """Return an option of a call, which is a literal; "" when it is not given."""
    values = [ast.literal_eval(one.value) for one in call.keywords if one.arg == name]
    return values[0] if values else ""


def test_every_point_of_the_assignment_has_an_answer():
    answered = {}
    for name in PATHS:
        points = [option(call, "point") for call in calls(name, "give")] + [
            ast.literal_eval(call.args[0]) for call in calls(name, "answer")]
        assert [point for point in points if point] == assignment.points_named(
            "\n".join(sources(name, "code"))) == assignment.points_named(PATHS[name].read_text("utf-8"))
        answered[name] = {point for point in points if point}
    assert set.union(*answered.values()) == set(assignment.POINTS)


SHOWN = {"02": "vectorize_ex truncate keep_head_and_tail", "03": "fit accumulate lr_factor train classify",
         "04": "truncate_words", "05": "windows_of mask_tokens pretrain", "06": "make_optimizer", "07": "fit",
         "08": "load_bert"}


def test_the_code_that_was_asked_for_is_shown_and_has_what_it_is_shown_for():
    shown = {}
    for name in PATHS:
        for call in calls(name, "show_source"):
            function = getattr(helpers, call.args[0].id)
            assert option(call, "around") in inspect.getsource(function), (name, call.args[0].id)
            shown.setdefault(name[:2], []).append(function)
    for number, functions in SHOWN.items():
        assert {getattr(helpers, one) for one in functions.split()} <= set(shown[number]), number


def test_a_sentence_stands_before_each_source():
    for name in PATHS:
        cells = read_notebook(name)["cells"]
        for before, cell in zip(cells, cells[1:]):
            if "show_source(" in "".join(cell["source"]) and cell["cell_type"] == "code":
                assert before["cell_type"] == "markdown", name


@each
def test_a_page_says_which_code_is_its_lesson(name):
    lessons = [cell for cell in read_notebook(name)["cells"]
               if "lesson" in cell["metadata"].get("tags", [])]
    assert len(lessons) >= 3 and all(cell["cell_type"] == "code" for cell in lessons)


def solutions(name):
    """Return the code of the solutions that are folded under a page's exercises."""
    last = sources(name, "markdown")[-1]
    return [html.unescape(code) for code in re.findall(
        r"(?s)<details><summary>Solution of \d</summary>\n<p>\S.*?</p>\n"
        r"<pre><code>(.*?)</code></pre>\n</details>", last)]


@each
def test_three_exercises_end_a_page_each_with_a_folded_solution(name):
    last = sources(name, "markdown")[-1]
    assert re.findall(r"(?m)^\*\*(\d)\.\*\* \S.*\?$", last) == ["1", "2", "3"]
    assert len(solutions(name)) == 3 == last.count("<details>")
    for code in solutions(name):
        assert [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Assert)], code
        assert "\n\n" not in code, "a blank line would end the folded part"


@each
def test_words_are_explained_where_they_first_stand(name):
    """In prose a word of the field is in italics, with what it means, the first time it stands."""
    text = re.sub(r"(?s)`[^`]*`|\[[^]]*\]\([^)]*\)|#[^\n]*|^- Q[^\n]*", "", "\n".join(sources(name, "markdown")))
    text = "\n".join(line for line in text.split("\n") if not line.startswith("- Q"))
    for word in ("logits", "pooler", "baseline", "paired", "95 % interval", "family"):
        if re.search(rf"\b{word}\b", text):
            first = re.search(rf"\b{word}\b", text).start()
            assert text[first - 1] == "*", (word, text[max(0, first - 60):first + 40])


# ---- parameters and profiles -------------------------------------------------------------------

def kind(value):
    """Return a value's type, lists with that of their elements; an int may do for a float."""
    if isinstance(value, list):
        return "list of " + " and ".join(sorted({kind(one) for one in value}))
    return type(value).__name__


def test_the_same_name_has_the_same_type_everywhere():
    kinds = {}
    for name in PATHS:
        for key, value in parameters(name).items():
            kinds.setdefault(key, {}).setdefault(kind(value), []).append(name)
    assert {key: found for key, found in kinds.items() if len(found) > 1} == {}


PROFILES = sorted((ROOT / "profiles").glob("*.yml")) + [TINY]


@pytest.mark.parametrize("path", PROFILES, ids=[path.stem for path in PROFILES])
def test_profiles_use_declared_keys_of_the_right_type(path, tmp_path, monkeypatch):
    for folder in ("FILIMDB", "sample"):  # the real reviews need not be here
        (tmp_path / "data" / folder).mkdir(parents=True)
    monkeypatch.setattr(profiles, "ROOT", tmp_path)
    declared = {name: parameters(name) for name in PATHS}
    name, profile = profiles.read_profile(str(path), declared)
    assert profile["profile"] == name == path.stem
    for notebook in PATHS:
        wrong = {key: kind(value) for key, value in profile.given(notebook).items()
                 if kind(value) != kind(declared[notebook].get(key, value)) and value != []}
        assert wrong == {} and "out_dir" not in profile.given(notebook)


def test_the_sample_profile_states_the_notebooks_defaults():
    """All of them: a notebook that somebody has tried things in is run with these nonetheless."""
    profile = profiles.load_profile(ROOT / "profiles" / "sample.yml")
    for name in PATHS:
        declared = parameters(name)
        del declared["out_dir"]
        stated = profile.given(name)
        assert {key: stated[key] for key in declared} == declared, name


# ---- a run of them all -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def environment():
    """This stack's kernel, not a user's; as report.py has it."""
    return {"JUPYTER_PATH": sys.prefix + "/share/jupyter", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def tiny_report(tmp_path_factory, environment):
    """Run report.py once on everything: (its folder, exit code, what it said).

    Of a copy, whose pages have the solutions of their exercises as further cells.
    """
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("report")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(str(path), str(project))
    for name in ("data", "profiles", "results"):
        (project / name).symlink_to(ROOT / name)
    (project / "notebooks").mkdir()
    for name in PATHS:
        nb = read_notebook(name)
        nb["cells"] += [dict(cell_type="code", metadata={}, execution_count=None, outputs=[],
                             source=code) for code in solutions(name)]
        (project / "notebooks" / (name + ".ipynb")).write_text(json.dumps(nb), encoding="utf-8")
    done = subprocess.run([sys.executable, "report.py", "--profile", str(TINY), "--jobs", "2",
                           "--out", str(out)], cwd=str(project), stdout=subprocess.PIPE,
                          env=dict(os.environ, **environment), stderr=subprocess.STDOUT,
                          universal_newlines=True)
    return types.SimpleNamespace(out=out, code=done.returncode, said=done.stdout)


@pytest.mark.slow
def test_every_notebook_runs(tiny_report):
    status = json.loads((tiny_report.out / "status.json").read_text(encoding="utf-8"))
    failed = {name: row["reason"] for name, row in status.items() if row["status"] != "ok"}
    assert failed == {} and tiny_report.code == 0, tiny_report.said
    assert set(status) == set(PATHS)


@pytest.mark.slow
@each
def test_a_page_without_errors(name, tiny_report):
    nb = json.loads((tiny_report.out / "notebooks" / (name + ".ipynb")).read_text(encoding="utf-8"))
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    said = "".join("".join(o.get("text", "")) for o in outputs if o["output_type"] == "stream")
    assert (has_study(name) or "profile tiny" in said) and "Traceback" not in said
    stderr = ["".join(o["text"]) for o in outputs if o.get("name") == "stderr"]
    assert stderr == [], "a library complains on the page"
    page = (tiny_report.out / (name + ".html")).read_text(encoding="utf-8")
    assert "tiny" in page and "<h1" in page and len(page) > 10000


@pytest.mark.slow
@each
def test_every_question_has_its_answer(name, tiny_report):
    status = json.loads((tiny_report.out / "status.json").read_text(encoding="utf-8"))
    rows = status[name]["answers"]
    answered = {re.match(r"Q(\d+)\b", row["question"]).group(1) for row in rows}
    assert answered == set(questions(name)) and len(answered) > 0
    for row in rows:
        assert set(row) == {"question", "answer", "figure", "verdict", "point"}
        assert re.search(r"\w{3}", row["answer"]) and "?" in row["question"]
        assert row["verdict"] in assignment.VERDICTS
        for word in ("nan", "NaN", "None", "inf points"):
            assert not re.search(rf"\b{word}\b", row["answer"]), row["answer"]
        if row["figure"]:
            assert (tiny_report.out / "figures" / (row["figure"] + ".png")).exists(), row


@pytest.mark.slow
@each
def test_the_folded_solutions_hold(name, tiny_report):
    """All of them were run, to the last line: with their asserts."""
    nb = json.loads((tiny_report.out / "notebooks" / (name + ".ipynb")).read_text(encoding="utf-8"))
    last = nb["cells"][-len(solutions(name)):]
    assert ["".join(cell["source"]) for cell in last] == solutions(name)
    for cell in last:
        assert cell["execution_count"], cell["source"]
        assert "error" not in [output["output_type"] for output in cell["outputs"]]


@pytest.mark.slow
def test_every_figure_is_a_picture_and_a_table(tiny_report):
    figures = {path.name for path in (tiny_report.out / "figures").iterdir()}
    drawings = {"loop_step", "bert_layer"}  # which have no data
    names = {Path(name).stem for name in figures} - drawings
    assert figures == {name + ending for name in names for ending in (".png", ".csv")} | {
        name + ".png" for name in drawings}
    for name in names:
        picture = (tiny_report.out / "figures" / (name + ".png")).read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 3000
        table = (tiny_report.out / "figures" / (name + ".csv")).read_text(encoding="utf-8")
        assert table.count("\n") > 1 and "," in table.split("\n")[0]


@pytest.fixture
def kernel_environment(environment, monkeypatch, tmp_path):
    """Let papermill, called from here, use this stack's kernel and a cache of its own."""
    for key, value in dict(environment, FILIMDB_CACHE=str(tmp_path / "cache")).items():
        monkeypatch.setenv(key, value)


@pytest.mark.parametrize("start", ["root", pytest.param("notebooks", marks=pytest.mark.slow)])
def test_a_kernel_started_in_the_root_or_in_notebooks(start, kernel_environment, tmp_path,
                                                      monkeypatch):
    name = next(name for name in PATHS if name.startswith("02_"))
    folder = str(ROOT if start == "root" else ROOT / "notebooks")
    values = dict(yaml.safe_load(TINY.read_text(encoding="utf-8")), out_dir=str(tmp_path))
    given = {key: value for key, value in values.items() if key in parameters(name)}
    before = sorted(os.listdir(folder))
    monkeypatch.chdir(folder)
    papermill.execute_notebook(str(PATHS[name]), str(tmp_path / "out.ipynb"), parameters=given,
                               kernel_name="python3", cwd=folder, progress_bar=False)
    assert (tmp_path / "figures" / "padding.png").exists()
    assert sorted(os.listdir(folder)) == before, "a run left files beside the notebooks"
