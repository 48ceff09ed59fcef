"""Run the notebooks headless and export them as one HTML report.

    python report.py                           # all notebooks with profiles/sample.yml
    python report.py --profile small --jobs 2  # -> build/small/index.html
    python report.py --only 03 05              # these two again; the other pages stay

Each notebook runs in a process of its own and gets the profile's keys that its cell tagged
`parameters` declares. Exit code: 0 all ok, 1 a notebook failed, 2 wrong use or a full disk,
130/143 interrupted.
"""
import argparse
import ast
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path


def stopped(number):
    """Say in one line how to go on after a signal; return the exit code."""
    print("report.py: interrupted; the same command goes on: finished trials are not run again",
          file=sys.stderr, flush=True)
    return 128 + number


STOPS = signal.SIGINT, signal.SIGTERM
if __name__ == "__main__":  # while libraries are loaded nothing is to save
    for number in STOPS:
        signal.signal(number, lambda number, frame: os._exit(stopped(number)))

import nbformat  # noqa: E402
import yaml  # noqa: E402

from pages import (  # noqa: E402
    find_cell,
    judge,
    read_headline,
    read_json,
    write_index,
    write_page,
)

ROOT = Path(__file__).resolve().parent
NOTEBOOKS, PROFILES = ROOT / "notebooks", ROOT / "profiles"
MAY_BE_0 = "n_train", "n_dev", "mlm_minutes", "seeds"  # all, all, no limit, a seed like others
BEAT, GRACE = 10, 60  # seconds between two signs of life; for an interrupted cell to save its work
RUNNER = """import json, os, sys, threading
# The pipe ends when report.py is gone, even by kill -9: go too, and the kernel follows.
threading.Thread(target=lambda: os.read(0, 1) or os._exit(1), daemon=True).start()
import papermill
papermill.execute_notebook(**json.loads(sys.argv[1]))
"""  # `python -m papermill` does not exist in papermill 1.2.1


class Refused(Exception):
    """Wrong use: one line that says what and how to mend it, before anything runs."""


def read_parameters(path):
    """Read a notebook's parameters and their defaults from its cell tagged `parameters`."""
    try:
        return {node.targets[0].id: ast.literal_eval(node.value)
                for cell in nbformat.read(str(path), as_version=4).cells
                if "parameters" in cell.metadata.get("tags", [])
                for node in ast.parse(cell.source).body}
    except Exception as error:  # noqa: BLE001 - no JSON, notebook, assignment, literal
        raise Refused(f"{path.name}: {error!r}; `parameters` takes NAME = literal") from None


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
    if key == "seq_len":  # [CLS], a piece and [SEP] at least; BERT's number of positions at most
        return 3 <= value <= 512
    return 0 < value < float("inf") or value == 0 and key in MAY_BE_0


def read_profile(name, declared):
    """Read profiles/NAME.yml or a path; refuse what is no parameter of any notebook."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else PROFILES / (name + ".yml")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError:
        known = sorted(p.stem for p in PROFILES.glob("*.yml"))
        raise Refused(f"no profile {name}: give one of {known}, or a .yml's path") from None
    except (ValueError, yaml.YAMLError) as error:
        raise Refused(f"{path.name}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or any(isinstance(v, dict) for v in values.values()):
        raise Refused(f"{path.name}: not one flat mapping; write NAME: value")
    known = set().union(*declared.values())
    for key, value in values.items():
        said = f"{path.name}: {key}: {value!r} is"
        if key not in known:
            raise Refused(f"{said} no notebook's parameter; use one of {', '.join(sorted(known))}")
        for owner, defaults in declared.items():
            if key in defaults and not fits(value, defaults[key]):
                raise Refused(f"{said} {type(value).__name__}, but {owner}'s {defaults[key]!r} is "
                              f"of type {type(defaults[key]).__name__} (for 2e-5 write 2.0e-5)")
        if not in_bounds(key, value):
            raise Refused(f"{said} out of bounds; numbers are finite and more than 0 (seq_len: 3 "
                          f"to 512; 0 for {', '.join(MAY_BE_0)} alone), lists not empty")
        if key == "data_dir" and not (ROOT / value).is_dir():
            raise Refused(f"{said} no folder; `make data` fetches data/FILIMDB")
    return path.stem, values


def choose(only, names):
    """Pick the notebooks that --only names, by number or by name."""
    wanted = {Path(one).stem for one in only or []}
    for one in wanted - {alias for n in names for alias in (n, n.split("_")[0])}:
        raise Refused(f"--only {one}: no such notebook; there are {', '.join(names)}")
    return [n for n in names if not wanted or {n, n.split("_")[0]} & wanted]


def set_environment(out, jobs):
    """Return the kernels' environment: this venv's kernelspec, the run's cache, shared cores."""
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if jobs > 1 else {}
    return {"OMP_WAIT_POLICY": "PASSIVE", **threads, **os.environ,
            "FILIMDB_CACHE": str(out / "cache"), "JUPYTER_PATH": sys.prefix + "/share/jupyter"}


def execute(name, given, out, args, stops):
    """Run a notebook to whatever end it comes; return what judge says of it."""
    source, target = NOTEBOOKS / (name + ".ipynb"), out / "notebooks" / (name + ".ipynb")
    log, began, beat, why = out / "logs" / (name + ".log"), time.time(), BEAT, ""
    if stops:
        return None
    for stale in target, out / "answers" / (name + ".json"):
        with suppress(FileNotFoundError):
            stale.unlink()
    print(f"{name}: started\n", end="", flush=True)
    options = {"input_path": str(source), "output_path": str(target), "parameters": given,
               "kernel_name": "python3", "cwd": str(NOTEBOOKS), "progress_bar": False}
    with open(str(log), "wb") as f, subprocess.Popen(
            [sys.executable, "-c", RUNNER, json.dumps(options)], stdin=subprocess.PIPE, stdout=f,
            stderr=f, env=set_environment(out, args.jobs), start_new_session=True) as process:
        groups = {process.pid}
        while process.poll() is None:
            time.sleep(0.1)
            seconds = time.time() - began
            if len(groups) == 1:  # the kernel is a child that leads a process group of its own
                rows = subprocess.check_output(["ps", "-A", "-o", "ppid=,pgid="]).split()
                groups |= {int(g) for p, g in zip(rows[::2], rows[1::2]) if int(p) == process.pid}
            if not why and (stops or 0 < 60 * args.timeout < seconds):
                why = "interrupted" if stops else "timeout"
                end, cell = seconds + GRACE, find_cell(target)
                print(f"{name}: {why}, has {GRACE} s to save (again: kill)", flush=True)
                for kernel in groups - {process.pid}:
                    with suppress(ProcessLookupError):
                        os.kill(kernel, signal.SIGINT)
            elif why:  # a cell that swallows the interrupt must not let the next one run
                now = find_cell(target)
                cell = cell or now
                if len(stops) > 1 or seconds > end or len(groups) == 1 or now not in ("", cell):
                    break
            elif seconds > beat:
                beat = seconds + BEAT
                print(f"{name}: {find_cell(target)}, {seconds:.0f} s", flush=True)
        for group in groups:  # a dead papermill may leave its kernel, a kernel its children
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
    return judge(source, target, log, why, args.timeout, process.returncode, time.time() - began)


def build(args):
    """Check the request, run the notebooks, write the pages; return the exit code."""
    paths = {p.stem: p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}
    chosen = choose(args.only, list(paths))
    declared = {n: read_parameters(path) for n, path in paths.items()}
    profile, values = read_profile(args.profile, declared)
    out = Path(args.out or ROOT / "build" / profile).resolve()
    try:
        for folder in "notebooks", "logs", "cache":
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"can't write to {out} ({error.strerror}): give another --out") from None
    values["out_dir"] = str(out)
    with alone_in(out):
        return run_all(args, paths, chosen, declared, profile, values, out)


@contextmanager
def alone_in(out):
    """Hold a report's folder until the block ends; a second report.py waits its turn."""
    try:
        import fcntl
    except ImportError:  # Windows: one at a time, please
        yield
        return
    with open(str(out / ".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out}: another report.py is at work there; waiting until it ends", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run_all(args, paths, chosen, declared, profile, values, out):
    """Run the chosen notebooks and write all pages; return the exit code."""
    given = {n: {k: v for k, v in values.items() if k in declared[n]} for n in paths}
    used = {n: dict(declared[n], **given[n]) for n in paths}
    titles = {n: read_headline(path) for n, path in paths.items()}
    fresh = {"status": "not run", "reason": "", "seconds": 0, "profile": profile}
    saved = read_json(out / "status.json", {})
    status = {n: saved.get(n, dict(fresh)) for n in paths}
    for name, path in paths.items():  # a page each from the start: every link leads somewhere
        if not (out / (name + ".html")).exists():
            write_page(out, titles, name, status[name], nbformat.read(str(path), 4), used[name])
    summary = write_index(out, titles, status, profile)
    stops = []
    for number in STOPS:
        signal.signal(number, lambda number, frame: stops.append(number))
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(execute, n, given[n], out, args, stops): n for n in chosen}
        try:
            for run in as_completed(runs):
                if run.result():
                    name, (row, nb, log) = runs[run], run.result()
                    status[name] = row = dict(row, profile=profile)
                    write_page(out, titles, name, row, nb, used[name], log)
                    summary = write_index(out, titles, status, profile)
                    print("{}: {status}, {seconds} s {reason}".format(name, **row), flush=True)
        except OSError:  # a full disk: the others could not be written either
            stops.append(0)
            raise
    print(f"{out / 'index.html'}\n{summary}", flush=True)
    failed = any(status[n]["status"] != "ok" for n in chosen)
    return stopped(stops[0]) if stops else int(failed)


def interrupt(number, frame):
    """Raise what Ctrl-C raises, while no notebook is running."""
    raise KeyboardInterrupt(number)


def refuse(message):
    """Refuse a command line in one line, where argparse prints its usage too."""
    raise Refused(f"{message}; see --help")


def main(argv=None):
    """Read the command line; refuse in one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = refuse
    parser.add_argument("--profile", default="sample", help="profiles/NAME.yml, or a path")
    parser.add_argument("--only", nargs="+", help="numbers or names of notebooks")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once")
    parser.add_argument("--out", help="folder of the report (build/PROFILE)")
    parser.add_argument("--timeout", type=float, default=0, help="minutes a notebook (no limit)")
    try:
        for number in STOPS:
            signal.signal(number, interrupt)
        args = parser.parse_args(argv)
        if args.jobs < 1 or not 0 <= args.timeout < float("inf"):
            refuse(f"--jobs {args.jobs} --timeout {args.timeout:g}: 1 job or more, 0 minutes or "
                   f"more")
        return build(args)
    except (Refused, OSError) as error:
        print("report.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return stopped(*error.args or STOPS[:1])


if __name__ == "__main__":
    sys.exit(main())
