"""The house: which module may import which, and that nothing else creeps in."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A module may import those named here, and whatever these may import.
ARROWS = {"files": (), "runtime": ("files",), "cpu": ("runtime",),
          "checkpoints": ("runtime",), "helpers": ("cpu", "checkpoints"),
          "effects": ("helpers",), "studies": ("effects", "assignment"), "figures": ("studies",), "evaluate": ("helpers",),
          "assignment": (), "pages": ("assignment", "files"), "parameters": ("files",),
          "report": ("pages", "parameters"),
          "reference": ("evaluate", "studies", "pages"), "handin": ()}
# Standard library aside, what each may use. The notebooks' modules: the pinned environment alone.
PINNED = {"numpy", "torch", "transformers", "tqdm", "matplotlib", "scipy", "pandas", "sklearn",
          "IPython", "ipywidgets", "pygments"}
ALLOWED = {"files": {"numpy", "tqdm"}, "runtime": {"numpy", "torch", "transformers", "tqdm"},
           "cpu": {"numpy", "torch", "transformers"}, "checkpoints": {"torch", "transformers"},
           "handin": set(), "assignment": set(), "reference": PINNED | {"yaml"}, "effects": PINNED,
           "parameters": {"nbformat", "yaml"},
           "helpers": PINNED - {"matplotlib", "IPython", "ipywidgets", "pygments"},
           "studies": PINNED | {"distributed"}, "figures": PINNED, "evaluate": PINNED,
           "pages": {"nbformat", "nbconvert", "jinja2", "markupsafe", "pygments"},
           "report": {"nbformat", "papermill", "yaml"}}


def imports_of(tree):
    """Return the first names of all modules that a syntax tree imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names.add(node.module.split(".")[0])
    return names


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
    import importlib.util
    import sysconfig
    if name in getattr(__import__("sys"), "stdlib_module_names", ()) or name == "__future__":
        return True
    spec = importlib.util.find_spec(name)
    origin = spec and spec.origin or ""
    return bool(spec) and (origin in ("built-in", "frozen") or "site-packages" not in origin
                           and origin.startswith(sysconfig.get_paths()["stdlib"]))


def test_every_module_of_the_root_has_its_place():
    assert set(modules()) == set(ARROWS)


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_a_module_imports_only_what_lies_to_its_right(name):
    names = imports_of(ast.parse(modules()[name].read_text(encoding="utf-8")))
    own = names & set(ARROWS)
    assert own <= reachable(name), own - reachable(name)
    assert name not in reachable(name), "a circle"
    others = {other for other in names - own if not standard(other)}
    assert others <= ALLOWED[name], others - ALLOWED[name]


def test_nobody_imports_tests_benchmarks_or_data():
    outside = {path.stem for folder in ("tests", "benchmarks", "data")
               for path in (ROOT / folder).glob("*.py")}
    for name, path in modules().items():
        assert not imports_of(ast.parse(path.read_text(encoding="utf-8"))) & outside, name


@pytest.mark.parametrize("name", sorted(ARROWS))
def test_no_module_serves_names_of_another(name):
    """Whatever a module takes from another it uses: there is no façade of re-exports."""
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    taken = {alias.asname or alias.name for node in ast.walk(tree)
             if isinstance(node, ast.ImportFrom) and node.module in ARROWS for alias in node.names}
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert taken <= used, taken - used
