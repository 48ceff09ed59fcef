"""The house: which module may import which, that nothing else creeps in, and the file handed in."""
import ast
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import those named here, and whatever these may import.
ARROWS = {"files": (), "runtime": ("files",), "cpu": ("runtime",), "gpu": ("runtime",),
          "checkpoints": ("runtime",), "run": ("gpu", "checkpoints"), "helpers": ("cpu", "run"),
          "effects": ("helpers",), "studies": ("effects", "assignment", "parameters"),
          "figures": ("studies",), "grading": ("helpers",), "evaluate": ("grading",),
          "assignment": (), "pages": ("assignment", "files"), "parameters": ("files",),
          "index": ("pages",), "plan": ("files",), "report": ("index", "parameters", "plan"),
          "reference": ("evaluate", "studies", "pages"), "handin": (),
          "analysis": ("reference", "figures")}
# Standard library aside, what each may use: at the top, and (slow to import, or not installed
# everywhere) within functions alone. Modules that notebooks use: the pinned environment only.
CORE = {"numpy", "torch", "transformers", "tqdm"}
PINNED = CORE | {"pandas"}
SLOW = {"matplotlib", "scipy", "sklearn", "IPython", "ipywidgets", "pygments"}
ALLOWED = {"files": ({"numpy", "tqdm"}, set()), "runtime": (CORE, set()),
           "cpu": (CORE - {"tqdm"}, set()), "gpu": ({"torch", "transformers"}, set()), "run": (set(), set()),
           "checkpoints": ({"torch", "transformers"}, set()),
           "helpers": (CORE, {"sklearn"}), "effects": (PINNED, {"scipy"}),
           "studies": (PINNED, SLOW | {"distributed"}), "figures": (PINNED, SLOW),
           "evaluate": (CORE, set()), "grading": (CORE, set()),
           "analysis": ({"numpy"}, {"scipy"}), "handin": (set(), set()), "assignment": (set(), set()),
           "parameters": (set(), {"yaml"}), "reference": (PINNED | {"yaml"}, SLOW),
           "pages": ({"nbformat", "nbconvert", "jinja2", "markupsafe"}, set()),
           "index": ({"markupsafe"}, set()), "plan": ({"nbformat"}, set()),
           "report": ({"nbformat", "papermill", "yaml"}, set())}


def imports_of(source):
    """Return (modules imported at the top, modules imported within functions) of a source."""
    top, late = set(), set()

    def visit(node, within):
        for child in ast.iter_child_nodes(node):
            function = within or isinstance(child, (ast.FunctionDef, ast.Lambda))
            if isinstance(child, ast.Import):
                (late if within else top).update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert not child.level, "a relative import"
                (late if within else top).add(child.module)
            visit(child, function)

    visit(ast.parse(source), False)
    return top, late


def roots(modules):
    """Return the first names of dotted ones."""
    return {module.split(".")[0] for module in modules}


def reachable(name):
    """Return the modules that a module may import: to its right, and on from there."""
    found = set(ARROWS[name])
    for other in ARROWS[name]:
        found |= reachable(other)
    return found


def modules():
    """Return {name: path} of the modules in the root."""
    return {path.stem: path for path in sorted(ROOT.glob("*.py"))}


def standard(name):
    """Tell whether a module is of the standard library, on both stacks."""
    if name in sys.builtin_module_names or name == "__future__":
        return True
    spec = importlib.util.find_spec(name)
    origin = spec and spec.origin or ""
    return bool(spec) and (origin in ("built-in", "frozen") or "site-packages" not in origin
                           and origin.startswith(sysconfig.get_paths()["stdlib"]))


def foreign(modules, allowed):
    """Return the modules that are neither allowed, nor our own, nor of the standard library."""
    return {name for name in roots(modules) - allowed - set(ARROWS) if not standard(name)}


def code_of(path):
    """Return the code of a module, or of all cells of a notebook."""
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".py" else "\n".join(
        "".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


def test_every_module_of_the_root_has_its_place():
    assert set(modules()) == set(ARROWS)


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_a_module_imports_only_what_lies_to_its_right(name):
    top, late = imports_of(code_of(modules()[name]))
    own = roots(top | late) & set(ARROWS)
    assert own <= reachable(name), own - reachable(name)
    assert name not in reachable(name), "a circle"
    at_top, within = ALLOWED[name]
    assert not foreign(top, at_top)
    assert not foreign(late, at_top | within)
    tensorboard = {module for module in top | late if "tensorboard" in module}
    assert tensorboard == ({"torch.utils.tensorboard"} if name == "runtime" else set())
    assert not tensorboard & top, "not installed everywhere"


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_imports_only_what_lies_to_its_right(path):
    top, late = imports_of(code_of(path))
    own = roots(top | late) & set(ARROWS)
    assert own <= reachable("figures") | {"figures"}, own
    assert not foreign(top | late, PINNED | SLOW)


def test_the_import_tests_see_what_they_should():
    top, late = imports_of("import a.b\nfrom c import d\ndef f():\n    import e\nif 1:\n  import g\n"
                           "class H:\n    def i(self):\n        from j.k import l")
    assert (top, late) == ({"a.b", "c", "g"}, {"e", "j.k"})
    assert standard("json") and standard("sys") and standard("fcntl")
    assert not standard("numpy") and not standard("no_such_module")
    assert foreign({"json", "files", "numpy.linalg", "no_such_module"}, {"numpy"}) == {"no_such_module"}


def test_nobody_imports_tests_benchmarks_or_data():
    outside = {path.stem for folder in ("tests", "benchmarks", "data")
               for path in (ROOT / folder).glob("*.py")}
    for name, path in modules().items():
        top, late = imports_of(code_of(path))
        assert not roots(top | late) & outside, name


def test_no_test_imports_another():
    """What two tests share stands in tools.py and report_tools.py, fixtures in conftest.py."""
    paths = sorted((ROOT / "tests").glob("*.py"))
    tests = {path.stem for path in paths} - {"tools", "report_tools", "fake_gpu"}
    for path in paths:
        top, late = imports_of(code_of(path))
        assert not roots(top | late) & tests, path.name


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_no_module_serves_names_of_another(name):
    """Whatever a module takes from another it uses: there is no façade of re-exports."""
    tree = ast.parse(code_of(modules()[name]))
    taken = {alias.asname or alias.name for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and node.module in ARROWS for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert taken <= used, taken - used


# ---- the one file to hand in ---------------------------------------------------------------------

PARTS = ("files", "runtime", "cpu", "gpu", "checkpoints", "run", "helpers", "handin")


@pytest.fixture
def copied(tmp_path):
    """A folder with copies of handin.py and what it joins, to be changed."""
    for name in PARTS:
        (tmp_path / (name + ".py")).write_bytes((ROOT / (name + ".py")).read_bytes())
    return tmp_path


def hand_in(folder, target, python=sys.executable, seed="0"):
    """Run a folder's handin.py: (exit code, what it said)."""
    done = subprocess.run([python, str(folder / "handin.py"), str(target)], stdout=subprocess.PIPE,
                          env=dict(os.environ, PYTHONHASHSEED=seed, PYTHONIOENCODING="utf-8"),
                          stderr=subprocess.STDOUT, universal_newlines=True)
    return done.returncode, done.stdout


def test_every_python_joins_the_same_bytes(tmp_path):
    pythons = [sys.executable] + [str(path) for path in (
        ROOT / ".venv" / "bin" / "python", ROOT / ".venv-2019" / "bin" / "python") if path.exists()]
    joined = set()
    for i, (python, seed) in enumerate([(python, seed) for python in pythons for seed in "12"]):
        target = tmp_path / "new" / f"{i}.py"
        assert hand_in(ROOT, target, python, seed) == (0, f"{target}\n")
        joined.add(target.read_bytes())
    source, = joined
    assert b"\r" not in source and source.endswith(b"\n") and len(source) > 50000
    top, late = imports_of(source.decode("utf-8"))
    assert not roots(top | late) & set(ARROWS), "it needs no other file"
    assert max(map(len, source.decode("utf-8").splitlines())) < 110


@pytest.mark.parametrize("module,line,told", [
    ("cpu", "def say(text):\n    pass\n", "files.py and cpu.py both define say"),
    ("helpers", "HERE = 1\n", "files.py and helpers.py both define HERE"),
    ("runtime", "if torch:\n    class InputError:\n        pass\n", "both define InputError"),
    ("checkpoints", "from time import time\n", "files.py and checkpoints.py both define time"),
    ("cpu", "import numpy as re\n", "files.py and cpu.py both define re"),
    ("cpu", "import files\n", "cpu.py imports files otherwise than by `from files import NAMES`"),
    ("cpu", "def late():\n    from files import say\n", "cpu.py imports files otherwise than by")])
def test_what_does_not_fit_in_one_file_is_refused(module, line, told, copied):
    with open(str(copied / (module + ".py")), "a") as file:
        file.write(line)
    code, said = hand_in(copied, copied / "joined.py")
    assert code == 1 and said.count("\n") == 1 and said.startswith("handin.py: "), said
    assert told in said and not (copied / "joined.py").exists()


@pytest.mark.parametrize("lacking", [PARTS[:5], PARTS[2:3], PARTS[3:4]])
def test_helpers_without_its_siblings_says_what_to_do(lacking, copied):
    for name in lacking:
        (copied / (name + ".py")).unlink()
    done = subprocess.run([sys.executable, "-c", "import helpers"], cwd=str(copied),
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    *_, last = done.stdout.strip().split("\n")
    assert done.returncode == 1 and last.startswith("ImportError: helpers.py works with the files")
    assert "`make classifier`" in last and "During handling" not in done.stdout
