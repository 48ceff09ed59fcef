"""Put a finished run of the report into the repository, so that README shows what it found.

    make reference                     # profile small -> build/small -> results/reference
    python reference.py build/small    # the second half of it alone

Every page's answers become one JSON in results/reference, beside the pages and the trials as
archives; figures go to figures/, README's table of answers is written anew from the JSONs. A run
with a page that failed is refused; pages that were not run yet are named as missing.
"""
import argparse
import json
import os
import sys
import zipfile

import yaml

from helpers import HERE, VERSIONS, InputError, save_json, written_whole

REFERENCE = os.path.join(HERE, "results", "reference")
BEGIN, END = "<!-- reference: begin -->\n", "<!-- reference: end -->\n"


# ---- collect a run ------------------------------------------------------------------------------

def read_json(*path):
    """Read a JSON file; InputError when there is none."""
    try:
        with open(os.path.join(*path), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file; run report.py first") from None


def collect(out):
    """Return {notebook: seconds, profile and answers} of a run; refuse one with a failed page."""
    status = {name: row for name, row in read_json(out, "status.json").items()
              if row["status"] != "not run"}
    for name, row in status.items():
        if row["status"] != "ok":
            raise InputError(f"{out}: page {name} is {row['status']}, not ok; run report.py again")
    if not status:
        raise InputError(f"{out}: no page was run; run report.py first")
    return {name: {"seconds": row["seconds"], "profile": row["profile"],
                   "answers": read_json(out, "answers", name + ".json")}
            for name, row in status.items()}


def trials_of(out):
    """Return the paths of the run's sound trials, in order."""
    folder = os.path.join(out, "trials")
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)
                  if name.endswith(".json"))


def cost_of(out, pages):
    """Return what the run was and what it cost: model, parameters, versions, cores, minutes."""
    profile = next(iter(pages.values()))["profile"]
    with open(os.path.join(HERE, "profiles", profile + ".yml"), encoding="utf-8") as file:
        parameters = yaml.safe_load(file)
    note = os.path.join(HERE, parameters["model"], "note.json")
    rows = [read_json(path) for path in trials_of(out)]
    return {"parameters": parameters, "versions": VERSIONS, "cores": os.cpu_count(),
            "weights": read_json(note).get("source", "") if os.path.exists(note) else "",
            "trials": len(rows), "trial_minutes": sum(row["seconds"] for row in rows) / 60,
            "devices": sorted({row.get("device", "") for row in rows} - {""})}


def archive(path, members):
    """Write a ZIP of {name within: file}; the same files give the same bytes."""
    with written_whole(path, "wb") as file, zipfile.ZipFile(file, "w") as bundle:
        for name, source in sorted(members.items()):
            entry = zipfile.ZipInfo(name)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with open(source, "rb") as content:
                bundle.writestr(entry, content.read())


def keep(out):
    """Copy a run's answers, figures, pages and trials into the repository."""
    pages = collect(out)
    for name in os.listdir(REFERENCE) if os.path.isdir(REFERENCE) else ():
        if name[0].isdigit() and name[:-5] not in pages:
            os.remove(os.path.join(REFERENCE, name))  # of an older run
    for name, page in pages.items():
        save_json(os.path.join(REFERENCE, name + ".json"), page)
    save_json(os.path.join(REFERENCE, "run.json"), cost_of(out, pages))
    for name in sorted(os.listdir(os.path.join(out, "figures"))):
        with open(os.path.join(out, "figures", name), "rb") as source, \
                written_whole(os.path.join(HERE, "figures", name), "wb") as target:
            target.write(source.read())
    archive(os.path.join(REFERENCE, "report.zip"), {
        name + ".html": os.path.join(out, name + ".html") for name in ["index", *notebooks()]})
    archive(os.path.join(REFERENCE, "trials.zip"), {
        os.path.basename(path): path for path in trials_of(out)})


def bring_back(out):
    """Unpack the reference's trials into a run's store: what is there is not trained again."""
    path, folder = os.path.join(REFERENCE, "trials.zip"), os.path.join(out, "trials")
    if not os.path.exists(path):
        return
    with zipfile.ZipFile(path) as bundle:
        for name in bundle.namelist():
            target = os.path.join(folder, os.path.basename(name))
            if not os.path.exists(target):
                with written_whole(target, "wb") as file:
                    file.write(bundle.read(name))


# ---- README -------------------------------------------------------------------------------------

def read_reference():
    """Return ({notebook: page}, run) as they stand in results/reference."""
    names = sorted(name[:-5] for name in os.listdir(REFERENCE) if name[0].isdigit())
    return ({name: read_json(REFERENCE, name + ".json") for name in names},
            read_json(REFERENCE, "run.json"))


def notebooks():
    """Return the names of all notebooks, in order."""
    folder = os.path.join(HERE, "notebooks")
    return sorted(name[:-6] for name in os.listdir(folder) if name.endswith(".ipynb"))


def table_of(pages, run):
    """Return README's text on the reference run: what it was, question -> answer -> notebook."""
    told, minutes = run["parameters"], sum(page["seconds"] for page in pages.values()) / 60
    missing = ", ".join(name[:2] for name in notebooks() if name not in pages)
    lines = [f"Model: {run['weights'] or told['model']}. Profile {told['profile']}: "
             f"{told['n_train']} training reviews (notebook 05: {told['sizes']}), "
             f"{told['n_dev']} dev reviews, {told['seq_len']} pieces, {told['epochs']} epochs, "
             f"seeds {told['seeds']}. {run['trials']} trials took {run['trial_minutes']:.0f} "
             f"minutes of training and measuring on {' and '.join(run['devices'])} "
             f"({run['cores']} cores), the pages {minutes:.0f} minutes. Again: `make reference`."
             + f" Not run yet: notebooks {missing}." * bool(missing),
             "", "| question | answer | as expected | notebook |", "|---|---|---|---|"]
    claim = {True: "yes", False: "no", None: ""}
    for name, page in pages.items():
        for row in page["answers"]:
            answer = row["answer"].replace("|", "\\|")
            lines.append(f"| {row['question']} | {answer} | {claim[row['holds']]} | "
                         f"[{name[:2]}](notebooks/{name}.ipynb) |")
    return "\n".join(lines) + "\n"


def fill_in(text, table):
    """Return README's text with the table between its two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main(argv=None):
    """Keep a run and write README's table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder of a finished report, as build/small")
    parser.add_argument("--trials", action="store_true", help="only unpack the reference's trials")
    args = parser.parse_args(argv)
    try:
        if args.trials:
            bring_back(args.out)
            return 0
        keep(args.out)
        path = os.path.join(HERE, "README.md")
        with open(path, encoding="utf-8", newline="\n") as file:
            text = file.read()
        with written_whole(path) as file:
            file.write(fill_in(text, table_of(*read_reference())))
    except InputError as error:
        print(f"reference.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
