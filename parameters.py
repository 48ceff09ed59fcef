"""What a notebook takes and a profile gives: read, and refused in one line unless they fit.

A notebook declares its parameters in a cell tagged `parameters`: NAME = literal, its default. A
profile, profiles/NAME.yml, maps such names to values, for all notebooks; beneath the name of a
notebook it maps those that are for this one alone.
"""
import ast
import json
import os
from pathlib import Path

from files import InputError, nearest

ROOT = Path(__file__).resolve().parent
PROFILES = ROOT / "profiles"
MAY_BE_0 = "n_train", "n_dev", "seeds", "control_seeds"  # all, all, a seed like others
LENGTHS = "seq_len", "max_tokens"  # [CLS], a token and [SEP] at least; at most BERT's positions
INJECTED = "# Parameters\n"  # the first line of the cell that papermill puts behind the declaring


def read_parameters(path):
    """Read a notebook's parameters and their defaults from its cell tagged `parameters`."""
    try:
        return {node.targets[0].id: ast.literal_eval(node.value)
                for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
                if "parameters" in cell["metadata"].get("tags", [])
                for node in ast.parse("".join(cell["source"])).body}
    except Exception as error:  # noqa: BLE001 - no JSON, notebook, assignment, literal
        raise InputError(f"{path.name}: {error!r}; `parameters` takes NAME = literal") from None


def fits(value, default):
    """Tell whether a value has the type of a notebook's default."""
    if type(value) is type(default) is list:
        return all(fits(v, d) for v in value for d in default[:1])
    return (default is None or type(value) is type(default)  # a bool is not an int here
            or type(default) is float and type(value) is int)


def in_bounds(key, value):
    """Tell whether a parameter's numbers can be used: finite, 0 only where it has a sense."""
    if isinstance(value, list):
        return bool(value) and all(in_bounds(key, one) for one in value)
    if type(value) not in (int, float):
        return True
    if key in LENGTHS:
        return 3 <= value <= 512
    return 0 < value < float("inf") or value == 0 and key in MAY_BE_0


# ---- in a notebook, in the cell that takes them -------------------------------------------------

def bounds_of(key):
    """Return which numbers a parameter may have, in words."""
    if key in LENGTHS:
        return "at least 3 and at most 512, BERT's number of positions"
    if key in ("n_train", "n_dev"):
        return "a number of reviews, 0 (all) or more"
    return f"{'0 or more' if key in MAY_BE_0 else 'more than 0'}, and finite"


def check(name, namespace):
    """Refuse a notebook's parameters, in the cell that takes them, where they cannot be used.

    namespace: its globals(). Values are held to the types and bounds of profile sample. Of what
    papermill has put in, a name that the notebook does not declare is refused too: papermill
    itself only warns, and the run would go on with the defaults.
    """
    cells = namespace.get("In", [])  # IPython's history: what has been run
    for declaring, injected in zip(cells, cells[1:]):
        if injected.startswith(INJECTED):
            declared = assigned(declaring)
            for key in set(assigned(injected)) - set(declared):
                raise InputError(f"{key}={namespace[key]!r}: no parameter of this notebook"
                                 f"{nearest(key, declared)}")
    for key, example in load_profile(PROFILES / "sample.yml").given(name).items():
        if key in namespace:
            check_value(key, namespace[key], example)


def assigned(cell):
    """Return the names that a cell's statements assign to, or [] where it is no Python."""
    try:
        return [target.id for node in ast.parse(cell).body if isinstance(node, ast.Assign)
                for target in node.targets if isinstance(target, ast.Name)]
    except SyntaxError:
        return []


def check_value(key, value, example):
    """Refuse a parameter's value unless it has the type of an example, and is within bounds."""
    where = f"{key}={value!r}: must be"
    if isinstance(example, list) and not isinstance(value, list):
        raise InputError(f"{where} a list, such as {example}; papermill reads one with -y "
                         f"'{key}: [...]' or with -f FILE.yml, not with -p")
    if not fits(value, example):
        kind = "a list such as" if isinstance(example, list) else f"{type(example).__name__}, as"
        raise InputError(f"{where} {kind} {example}")
    if not in_bounds(key, value):
        each = "a list of one or more numbers, each " * isinstance(value, list)
        raise InputError(f"{where} {each}{bounds_of(key)}")


# ---- a profile ---------------------------------------------------------------------------------

class Profile(dict):
    """A profile as it stands: {key: value for all notebooks, or name of one: {key: value}}."""

    def given(self, name):
        """Return {key: value} of what is for a notebook: for all, or for this one."""
        shared = {key: value for key, value in self.items() if not isinstance(value, dict)}
        return dict(shared, **self.get(name, {}))


def load_profile(path):
    """Return a profile from its file, unchecked but for its form."""
    import yaml
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError:
        names = sorted(p.stem for p in PROFILES.glob("*.yml"))
        raise InputError(f"no profile {path.stem if path.parent == PROFILES else path}: give one "
                         f"of {names}, or a .yml's path") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path.name}: not YAML ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path.name}: not a mapping; write NAME: value")
    return Profile(values)


def read_profile(name, declared):
    """Read profiles/NAME.yml or a path: (its name, its Profile); refuse what no notebook takes.

    declared: {notebook: {parameter: default}}.
    """
    path = PROFILES / (name + ".yml")
    if name.endswith((".yml", ".yaml")):
        path = Path(os.path.expanduser(name))
    profile = load_profile(path)
    for key, value in profile.items():
        if not isinstance(value, dict):
            check_entry(path.name, key, value, declared)
        elif key in declared:
            for own, one in value.items():
                check_entry(f"{path.name}: {key}", own, one, {key: declared[key]})
        else:
            raise InputError(f"{path.name}: {key}: {value!r} is for no notebook; write NAME: "
                             f"value, or the name of a notebook{nearest(key, declared)}")
    return path.stem, profile


def check_entry(where, key, value, declared):
    """Refuse an entry of a profile unless it fits every notebook that declares the key."""
    where = f"{where}: {key}: {value!r} is"
    defaults = [(owner, known[key]) for owner, known in declared.items() if key in known]
    if not defaults:
        names = set().union(*declared.values())
        raise InputError(f"{where} no notebook's parameter{nearest(key, names)}")
    for owner, default in defaults:
        if not fits(value, default):
            raise InputError(f"{where} {type(value).__name__}, but {owner}'s {default!r} is "
                             f"of type {type(default).__name__} (for 2e-5 write 2.0e-5)")
    if not in_bounds(key, value):
        raise InputError(f"{where} out of bounds; numbers are finite and more than 0 "
                         f"({', '.join(LENGTHS)}: 3 to 512; 0 only for {', '.join(MAY_BE_0)}), "
                         f"lists not empty")
    if key == "data_dir" and not (ROOT / os.path.expanduser(value)).is_dir():
        raise InputError(f"{where} no folder; `make data` fetches data/FILIMDB")
