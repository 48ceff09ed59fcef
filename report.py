"""Run the notebooks headless and export them as one HTML report.

    python report.py                           # all notebooks with profiles/sample.yml
    python report.py --profile small --jobs 2  # -> build/small/index.html, report.html
    python report.py --only 03 05              # these two again; the other pages stay
    python report.py --stored                  # train nothing: pages of the kept trials
    python report.py --timeout 30              # interrupt a notebook after 30 minutes

Each notebook runs in a process of its own and gets the profile's keys that its cell tagged
`parameters` declares. Exit code: 0 all ok, 1 a notebook failed, 2 wrong use or a full disk,
130/143 interrupted.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path


def stopped(number):
    """Say in one line how to go on after a signal; return the exit code."""
    print("report.py: interrupted; the same command goes on: finished trials are not run again",
          file=sys.stderr, flush=True)
    return 128 + number


STOPS = signal.SIGINT, signal.SIGTERM
if __name__ == "__main__":  # until notebooks run there is nothing to save
    for number in STOPS:
        signal.signal(number, lambda number, frame: os._exit(stopped(number)))

import nbformat  # noqa: E402

from files import InputError, folder_lock, read_json  # noqa: E402
from index import commit_of, write_index  # noqa: E402
from pages import find_cell, judge, read_headline, write_page  # noqa: E402
from parameters import read_parameters, read_profile  # noqa: E402
from plan import announce, progress  # noqa: E402

ROOT = Path(__file__).resolve().parent
NOTEBOOKS = ROOT / "notebooks"
BEAT = 60  # seconds between two signs of life
GRACE = 60  # seconds that an interrupted cell has to save its work
# Papermill, its kernel and what that starts are one process group, like a job of a shell: one
# signal reaches all. Papermill itself ignores Ctrl-C, waits for its kernel and saves the page.
RUNNER = """import json, os, signal, subprocess, sys, threading
# The pipe ends when report.py is gone, even by kill -9: then all go.
threading.Thread(target=lambda: os.read(0, 1) or os.kill(0, signal.SIGKILL), daemon=True).start()
import jupyter_client.launcher, papermill
jupyter_client.launcher.Popen = lambda *args, **options: subprocess.Popen(
    *args, **dict(options, start_new_session=False))
del os.killpg  # so that a kernel's manager, when it ends the kernel, signals it and not its group
for number in signal.SIGINT, signal.SIGTERM:
    signal.signal(number, lambda *_: None)
papermill.execute_notebook(**json.loads(sys.argv[1]))
"""  # `python -m papermill` does not exist in papermill 1.2.1


def choose(only, names):
    """Pick the notebooks that --only names, by number or by name."""
    wanted = {Path(one).stem for one in only or []}
    for one in wanted - {alias for n in names for alias in (n, n.split("_")[0])}:
        raise InputError(f"--only {one}: no such notebook; there are {', '.join(names)}")
    return [n for n in names if not wanted or {n, n.split("_")[0]} & wanted]


def changed(paths):
    """Return the names of the notebooks that differ from what is committed; none without git."""
    with suppress(OSError):
        listed = subprocess.run(["git", "status", "--porcelain", "-z", "--", *map(str, paths)],
                                cwd=str(ROOT), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        entries = listed.stdout.decode("utf-8", "replace").split("\0")
        return sorted(Path(entry[3:]).stem for entry in entries if entry.endswith(".ipynb"))
    return []


def set_environment(out, args):
    """Return the kernels' environment: this venv's kernelspec, the run's cache, shared cores."""
    cores = max(1, os.cpu_count() // args.jobs)
    return {"OMP_WAIT_POLICY": "PASSIVE", **({"OMP_NUM_THREADS": str(cores)} if args.jobs > 1
                                             else {}),
            **os.environ, **({"FILIMDB_STORED": "1"} if args.stored else {}),
            "FILIMDB_CACHE": str(out / "cache"), "JUPYTER_PATH": sys.prefix + "/share/jupyter"}


def progress_file(out, name):
    """Return where a kernel says how far it is in what takes long (runtime.Progress)."""
    return out / "logs" / (name + ".progress")


def how_far(out, name, target):
    """Return how far a notebook is, in words: "cell 3 of 9: rates: trial 3 of 6, 40 s left"."""
    words = [find_cell(target)]
    with suppress(OSError):
        words.append(progress_file(out, name).read_text(encoding="utf-8"))
    return ": ".join(filter(None, words))


def send(process, number):
    """Send a signal to a papermill, its kernel and whatever that started."""
    with suppress(ProcessLookupError, PermissionError):  # all have gone, zombies at most are left
        os.killpg(process.pid, number)


def wind_up(process, target, stops):
    """Let the cell that runs save its work, then papermill its page; not for ever.

    The kernel is ended when GRACE seconds are over, at a second Ctrl-C, or when another cell
    begins: then this one has swallowed the interrupt.
    """
    end = time.time() + (GRACE if target.exists() else 0)  # without: papermill has begun nothing
    cells = {find_cell(target), ""}  # "" while papermill writes
    send(process, signal.SIGINT)
    while process.poll() is None and time.time() < end and len(stops) < 2 and len(cells) < 3:
        time.sleep(0.1)
        cells.add(find_cell(target))
    send(process, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)  # papermill finds its kernel dead within 5 seconds


def execute(name, given, groups, out, args, stops):
    """Run a notebook to whatever end it comes; return what judge says of it."""
    if stops:
        return None
    source, target = NOTEBOOKS / (name + ".ipynb"), out / "notebooks" / (name + ".ipynb")
    log, began, beat, why = out / "logs" / (name + ".log"), time.time(), BEAT, ""
    for stale in target, out / "plan" / (name + ".json"), progress_file(out, name):
        with suppress(FileNotFoundError):
            stale.unlink()
    print(f"{name}: started\n", end="", flush=True)
    options = {"input_path": str(source), "output_path": str(target), "parameters": given,
               "kernel_name": "python3", "cwd": str(NOTEBOOKS), "progress_bar": False}
    with open(str(log), "wb") as f, subprocess.Popen(
            [sys.executable, "-c", RUNNER, json.dumps(options)], stdin=subprocess.PIPE, stdout=f,
            stderr=f, start_new_session=True,
            env=dict(set_environment(out, args), FILIMDB_PROGRESS=str(progress_file(out, name)))
            ) as process:
        try:
            while process.poll() is None and not why:
                time.sleep(0.1)
                seconds = time.time() - began
                overdue = 0 < 60 * args.timeout < seconds
                why = "interrupted" if stops else "timeout" if overdue else ""
                if seconds > beat:
                    beat, far = seconds + BEAT, how_far(out, name, target)
                    more = "" if args.stored else progress(out, name, groups[name])
                    print(f"{name}: {far}, {seconds:.0f} s{more}\n" if far else "", end="",
                          flush=True)
            if why:
                print(f"{name}: {why}, has {GRACE} s to save (again: kill)\n", end="", flush=True)
                wind_up(process, target, stops)
        finally:
            send(process, signal.SIGKILL)
    return judge(source, target, log, why, args.timeout, process.returncode, time.time() - began)


def build(args):
    """Check the request, run the notebooks, write the pages; return the exit code."""
    paths = {p.stem: p for p in sorted(NOTEBOOKS.glob("*.ipynb"))}
    chosen = choose(args.only, list(paths))
    declared = {n: read_parameters(path) for n, path in paths.items()}
    profile, values = read_profile(args.profile, declared)  # a name; values, of some pages others
    out = Path(os.path.expanduser(args.out or str(ROOT / "build" / profile))).resolve()
    try:
        for folder in "notebooks", "logs", "cache":
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"can't write to {out} ({error.strerror}): give another --out") from None
    given = {n: {k: v for k, v in dict(values.given(n), out_dir=str(out)).items()
                 if k in declared[n]} for n in paths}
    used = {n: dict(declared[n], **given[n]) for n in paths}
    for n in changed([paths[n] for n in chosen]):
        print(f"{n}: differs from what is committed (git diff notebooks/{n}.ipynb)", flush=True)
    with folder_lock(out):
        return run_all(args, paths, chosen, profile, given, used, out)


def run_all(args, paths, chosen, profile, given, used, out):
    """Run the chosen notebooks and write all pages; return the exit code."""
    titles = {n: read_headline(path) for n, path in paths.items()}
    saved, stops = read_json(out / "status.json", {}), []
    status = {n: saved.get(n, {"status": "not run", "reason": "", "seconds": 0,
                               "profile": profile}) for n in paths}
    commit = commit_of()
    groups = announce(out, {n: paths[n] for n in chosen}, used, status, commit)
    for name, path in paths.items():  # a page each from the start: every link leads somewhere
        if not (out / (name + ".html")).exists():
            ran, row = out / "notebooks" / (name + ".ipynb"), status[name]
            nb = nbformat.read(str(ran if ran.exists() else path), 4)
            write_page(out, titles, name, row, nb, row.get("parameters", used[name]))
    summary = write_index(out, titles, status, profile)
    for number in STOPS:
        signal.signal(number, lambda number, frame: stops.append(number))
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {pool.submit(execute, n, given[n], groups, out, args, stops): n for n in chosen}
        try:
            for run in as_completed(runs):
                if run.result():
                    name, (row, nb, log) = runs[run], run.result()
                    status[name] = row = dict(row, profile=profile, commit=commit,
                                              date=time.strftime("%Y-%m-%d"))
                    write_page(out, titles, name, row, nb, used[name], log)
                    summary = write_index(out, titles, status, profile)
                    print("{}: {status}, {seconds} s {reason}".format(name, **row).strip(),
                          flush=True)
        except (OSError, InputError):  # a full disk: the others could not be written either
            stops.append(0)
            raise
    summary = write_index(out, titles, status, profile, whole=True)
    print(f"{out / 'index.html'}\n{summary}", flush=True)
    return stopped(stops[0]) if stops else int(any(status[n]["status"] != "ok" for n in chosen))


def refuse(message):
    """Refuse a command line in one line, where argparse prints its usage too."""
    raise InputError(f"{message}; see --help")


def main(argv=None):
    """Read the command line; refuse in one line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = refuse
    parser.add_argument("--profile", default="sample", help="profiles/NAME.yml, or a path")
    parser.add_argument("--only", nargs="+", help="numbers or names of notebooks")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks at once")
    parser.add_argument("--out", help="folder of the report (build/PROFILE)")
    parser.add_argument("--stored", action="store_true",
                        help="run no trial: show what the kept ones say; what pages train "
                             "beside trials (01 to 06) they still do")
    parser.add_argument("--timeout", type=float, default=0, help="minutes a notebook (no limit)")
    try:
        args = parser.parse_args(argv)
        if args.jobs < 1 or not 0 <= args.timeout < float("inf"):
            refuse(f"--jobs {args.jobs} --timeout {args.timeout:g}: 1 job or more, 0 minutes or "
                   f"more")
        return build(args)
    except (InputError, OSError) as error:
        print("report.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
