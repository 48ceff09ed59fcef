"""What a notebook takes and a profile gives: read, and refused in one line unless they fit.

A notebook declares its parameters in a cell tagged `parameters`: NAME = literal, its default. A
profile, profiles/NAME.yml, is one flat mapping of such names to values.
"""
import ast
import os
from pathlib import Path

import nbformat
import yaml

from files import InputError

ROOT = Path(__file__).resolve().parent
PROFILES = ROOT / "profiles"
MAY_BE_0 = "n_train", "n_dev", "mlm_minutes", "seeds"  # all, all, no limit, a seed like others


def read_parameters(path):
    """Read a notebook's parameters and their defaults from its cell tagged `parameters`."""
    try:
        return {node.targets[0].id: ast.literal_eval(node.value)
                for cell in nbformat.read(str(path), as_version=4).cells
                if "parameters" in cell.metadata.get("tags", [])
                for node in ast.parse(cell.source).body}
    except Exception as error:  # noqa: BLE001 - no JSON, notebook, assignment, literal
        raise InputError(f"{path.name}: {error!r}; `parameters` takes NAME = literal") from None


def fits(value, default):
    """Tell whether a profile's value has the type of a notebook's default."""
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
    if key == "seq_len":  # [CLS], a token and [SEP] at least; BERT's number of positions at most
        return 3 <= value <= 512
    return 0 < value < float("inf") or value == 0 and key in MAY_BE_0


def read_profile(name, declared):
    """Read profiles/NAME.yml or a path; refuse what is no parameter of any notebook."""
    path = PROFILES / (name + ".yml")
    if name.endswith((".yml", ".yaml")):
        path = Path(os.path.expanduser(name))
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError:
        names = sorted(p.stem for p in PROFILES.glob("*.yml"))
        raise InputError(f"no profile {name}: give one of {names}, or a .yml's path") from None
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path.name}: not YAML ({error})") from None
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise InputError(f"{path.name}: not one flat mapping; write NAME: value")
    names = ", ".join(sorted(set().union(*declared.values())))
    for key, value in values.items():
        where = f"{path.name}: {key}: {value!r} is"
        defaults = [(owner, known[key]) for owner, known in declared.items() if key in known]
        if not defaults:
            raise InputError(f"{where} no notebook's parameter; use one of {names}")
        for owner, default in defaults:
            if not fits(value, default):
                raise InputError(f"{where} {type(value).__name__}, but {owner}'s {default!r} is "
                                 f"of type {type(default).__name__} (for 2e-5 write 2.0e-5)")
        if not in_bounds(key, value):
            raise InputError(f"{where} out of bounds; numbers are finite and more than 0 "
                             f"(seq_len: 3 to 512; 0 only for {', '.join(MAY_BE_0)}), lists not "
                             f"empty")
        if key == "data_dir" and not (ROOT / os.path.expanduser(value)).is_dir():
            raise InputError(f"{where} no folder; `make data` fetches data/FILIMDB")
    return path.stem, values
