"""How many trials a report's pages want, how many the store has, and how long the rest will take.

Before a page runs, its source tells the sizes of its groups of trials (study.run, study.run_all),
wherever they follow from the parameters alone. While it runs, its Study notes the trials of each
group in OUT/plan/NAME.json before it trains the first (studies.Study.note_plan).
"""
import ast
import itertools
import types

import nbformat

import files

SAFE = {function.__name__: function for function in (
    dict, enumerate, len, list, max, min, range, round, set, sorted, sum, tuple, zip)}


def product(seeds, **axes):
    """Return the grid of studies.product, without its torch."""
    return [dict(zip(axes, values), seed=seed)
            for *values, seed in itertools.product(*axes.values(), seeds)]


STUDIES = types.SimpleNamespace(product=product)


def evaluate(node, names):
    """Return an expression's value; raise whatever it raises where it needs more than `names`."""
    code = compile(ast.Expression(body=node), "a notebook", "eval")
    return eval(code, dict(names, __builtins__=SAFE))


def size_of(call, names):
    """Return how many trials a call of study.run or study.run_all asks for."""
    if call.func.attr == "run_all":
        return len(evaluate(call.args[1], names))
    axes = {word.arg: evaluate(word.value, names) for word in call.keywords}
    size = len(axes.pop("seeds", names["seeds"]))
    for values in axes.values():
        size *= len(values) if isinstance(values, list) else 1
    return size


def calls_of(node):
    """Return the calls of study.run and study.run_all within a statement."""
    return [one for one in ast.walk(node) if isinstance(one, ast.Call)
            and isinstance(one.func, ast.Attribute) and one.func.attr in ("run", "run_all")
            and isinstance(one.func.value, ast.Name) and one.func.value.id == "study"]


def count_groups(path, parameters):
    """Return {group: its number of trials, or None where only the run of the page tells}."""
    groups, names = {}, dict(parameters, studies=STUDIES)
    for cell in nbformat.read(str(path), as_version=4).cells:
        if cell.cell_type != "code" or "parameters" in cell.metadata.get("tags", []):
            continue
        try:
            body = ast.parse(cell.source).body
        except SyntaxError:  # a magic, or a fault that the run will show
            continue
        for node in body:
            for call in calls_of(node):
                what = ast.dump(call.args[0])
                try:
                    what = evaluate(call.args[0], names)
                    groups[what] = size_of(call, names)
                except Exception:  # noqa: BLE001 - it needs more than parameters
                    groups[what] = None
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                names.pop(name, None)
                try:
                    names[name] = evaluate(node.value, names)
                except Exception:  # noqa: BLE001, S110 - so does this
                    pass
    return groups


def seconds_of(out, keys):
    """Return {trial: its seconds} of those trials that the store has."""
    rows = {key: files.read_json(out / "trials" / (key + ".json"), None) for key in keys}
    return {key: row["seconds"] for key, row in rows.items() if row}


def noted(out, name):
    """Return {group: its trials} that a page's Study has noted, in this run or the last."""
    return {group["what"]: group["keys"]
            for group in files.read_json(out / "plan" / (name + ".json"), [])}


def wanted(out, groups, last):
    """Say how many trials a page wants, and how many of them the store has; "" of none.

    last: what its Study noted in a whole run with the same parameters, or {}.
    """
    sizes = {what: len(keys) for what, keys in last.items()} or groups
    if not sizes:
        return ""
    unknown = list(sizes.values()).count(None)
    more = f"{unknown} group{'s' * (unknown > 1)} of trials that only the run can count"
    known = f"{sum(size or 0 for size in sizes.values())} trials"
    said = " and ".join([known] * (unknown < len(sizes)) + [more] * (unknown > 0)) + " wanted"
    if last:
        keys = [key for some in last.values() for key in some]
        found = seconds_of(out, set(keys))
        return f"{said}, {sum(key in found for key in keys)} in the store"
    return said + ", 0 in the store" * (not any((out / "trials").glob("*.json")))


def announce(out, paths, used, status, commit):
    """Say what each page wants before any trains; return {notebook: groups}.

    used: {notebook: its parameters}; status: {notebook: the row of its last run}; commit: which
    one this is and what was changed since (index.commit_of): a changed notebook is named.
    """
    if "notebooks/" in commit:
        print(f"commit {commit}", flush=True)
    groups = {name: count_groups(path, used[name]) for name, path in paths.items()}
    for name in paths:
        row = status[name]
        same = row["status"] == "ok" and row.get("parameters") == used[name]
        said = wanted(out, groups[name], noted(out, name) if same else {})
        if said:
            print(f"{name}: {said}", flush=True)
    return groups


def progress(out, name, groups):
    """Say how many of a page's trials are done, and how long the others take; "" of none.

    A group's trials cost what its finished ones cost on average; one without any what all do.
    """
    begun = noted(out, name)
    if not begun:
        return ""
    done = seconds_of(out, {key for keys in begun.values() for key in keys})
    total = left = 0
    mean = sum(done.values()) / len(done) if done else 0
    for what in {**begun, **groups}:
        keys = begun.get(what, ())
        here = [done[key] for key in keys if key in done]
        size = len(keys) or groups[what] or 0
        total += size
        left += (size - len(here)) * (sum(here) / len(here) if here else mean)
    n_done = sum(key in done for keys in begun.values() for key in keys)
    time = "" if not done or n_done == total else (
        f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left")
    return f"; trials: {n_done} of {total}{time}"
