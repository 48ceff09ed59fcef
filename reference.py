"""Put a finished run of the report into the repository, so that README shows what it found.

    make reference                     # profile small -> build/small -> results/reference
    python reference.py build/small    # the second half of it alone
    make recipe                        # the best recipe by evaluate.py -> preds.tsv.gz, README

Every page's answers become one JSON in results/reference, beside the pages and the trials as
archives; figures go to figures/. README's tables and results/reference/README.md are written anew
from what is kept. A run with a page that failed is refused; pages that were not run yet are named
as missing.
"""
import argparse
import contextlib
import gzip
import io
import json
import os
import re
import sys
import zipfile

import yaml

import evaluate
from assignment import VERDICTS, best_accuracy, points_named, split_question, table_by_point
from files import HERE, InputError, open_atomically, save_json
from helpers import make_config, settings
from runtime import VERSIONS
from studies import compare, show, spread

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
              if row["status"] not in ("not run", "interrupted")}
    for name, row in status.items():
        if row["status"] != "ok":
            raise InputError(f"{out}: page {name} is {row['status']}, not ok; run report.py again")
        if "answers" not in row:
            raise InputError(f"{out}: page {name} was made before pages kept their answers; run "
                             f"report.py again")
    if not status:
        raise InputError(f"{out}: no page was run; run report.py first")
    return {name: {key: row[key] for key in ("seconds", "profile", "answers")}
            for name, row in status.items()}


def trials_of(out):
    """Return the paths of the run's sound trials, in order."""
    folder = os.path.join(out, "trials")
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)
                  if name.endswith(".json"))


def read_profile(name):
    """Return a profile's parameters."""
    with open(os.path.join(HERE, "profiles", name + ".yml"), encoding="utf-8") as file:
        return yaml.safe_load(file)


def cost_of(out, pages):
    """Return what the run was and what it cost: model, parameters, versions, cores, minutes."""
    parameters = read_profile(next(iter(pages.values()))["profile"])
    note = os.path.join(HERE, parameters["model"], "note.json")
    rows = [read_json(path) for path in trials_of(out)]
    return {"parameters": parameters, "versions": VERSIONS, "cores": os.cpu_count(),
            "weights": read_json(note).get("source", "") if os.path.exists(note) else "",
            "trials": len(rows), "trial_minutes": sum(row["seconds"] for row in rows) / 60,
            "devices": sorted({row.get("device", "") for row in rows} - {""})}


def archive(path, members):
    """Write a ZIP of {name within: file}; the same files give the same bytes."""
    with open_atomically(path, "wb") as file, zipfile.ZipFile(file, "w") as bundle:
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
                open_atomically(os.path.join(HERE, "figures", name), "wb") as target:
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
                with open_atomically(target, "wb") as file:
                    file.write(bundle.read(name))


# ---- the best recipe ----------------------------------------------------------------------------

class Tee(io.StringIO):
    """Keep what is printed, and print it."""

    def __init__(self):
        """Remember where print goes to so far."""
        super().__init__()
        self.screen = sys.stdout

    def write(self, text):
        """Write the text to both."""
        self.screen.write(text)
        return super().write(text)

    def flush(self):
        """Show it now."""
        self.screen.flush()


PROGRESS = re.compile(r"[a-z ]+: +\d+%\||classifying [\d,]+ reviews: about")  # bars, estimates


def run_recipe(arguments):
    """Run evaluate.py; keep its arguments, what it printed, its predictions; return its code."""
    with contextlib.redirect_stdout(Tee()) as printed:
        code = evaluate.main(arguments)
    if code:
        return code
    with open(evaluate.parse_arguments(arguments).out, "rb") as predictions, \
            open_atomically(os.path.join(REFERENCE, "preds.tsv.gz"), "wb") as file, \
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:  # no date: the same bytes
        packed.write(predictions.read())
    save_json(os.path.join(REFERENCE, "recipe.json"), {
        "arguments": arguments, "versions": VERSIONS, "cores": os.cpu_count(),
        "printed": [line for line in printed.getvalue().splitlines() if not PROGRESS.match(line)]})
    return 0


# What trials say of a recipe: key, notebook, in what else its trials leave the basic setting.
ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
CHOICES = (
    ("keep", "04", {"seq_len": 512, "words": 128}), ("keep", "04", {"seq_len": 512}),
    ("lr", "03", {}), ("epochs", "03", {}), ("warmup", "03", {}), ("decay", "03", {}),
    ("weight_decay", "06", {}), ("clip_norm", "07", {}), ("dropout", "08", ADAMW),
    ("attention_dropout", "08", ADAMW))


def varied(trials, run, key, **fixed):
    """Return {value of key: trials} of those that are the run's basic setting in all else.

    Seeds that a search or a grid was tuned with, and the run does not name, are left out.
    """
    told = run["parameters"]
    of_run = os.path.basename(told["model"]), told["n_train"]
    base = dict(settings(make_config(keep="tail", **{name: told[name] for name in (
        "seq_len", "epochs", "lr")})), **fixed)
    found = {}
    for row in trials:
        apart = [name for name in {**base, **row["config"]}
                 if name not in (key, "seed", "data_seed")
                 and row["config"].get(name) != base.get(name)]
        if (not apart and row["config"]["seed"] in told["seeds"]
                and (row["model"], row["n_train"]) == of_run):
            found.setdefault(row["config"][key], []).append(row)
    return found


def table_row(*cells):
    """Return a row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def listed(values):
    """Return some values as text, with commas."""
    return ", ".join(map(str, values))


def tried(found):
    """Return {value: trials} as text."""
    return ", ".join(f"{value}: {show(spread(rows))}" if spread(rows).n else f"{value}: broken"
                     for value, rows in sorted(found.items())) or "not run yet"


def answers_to(pages, notebook, question):
    """Return a page's answers to a question, as Q3, joined."""
    return " ".join(row["answer"] for name, page in pages.items() if name.startswith(notebook)
                    for row in page["answers"] if row["question"].startswith(question + ".")
                    ) or "not run yet"


def choices_of(recipe, pages, trials, run):
    """Return rows of the table: what was tried on dev, what the recipe takes, does dev object."""
    args = evaluate.parse_arguments(recipe["arguments"])
    taken = settings(make_config(**evaluate.parse_settings(args.set)[0]))
    lines = ["| setting | dev accuracy in the trials | the recipe takes | which | notebook |",
             "|---|---|---|---|---|"]
    for key, notebook, fixed in CHOICES:
        found = varied(trials, run, key, **fixed)
        if len(found) < 2:
            continue
        best = max(found, key=lambda value: max(-1, spread(found[value]).mean))
        verdict = "is the best" if best == taken[key] else "was not tried"
        if best != taken[key] in found:
            verdict = compare(found[taken[key]], found[best], (str(taken[key]), str(best))).text
        where = ", ".join(f"{name} {value}" for name, value in fixed.items())
        lines.append(table_row(key + f" ({where})" * bool(where), tried(found), taken[key],
                               verdict, notebook))
    return lines + [table_row("MLM pretraining", answers_to(pages, "05", "Q3"),
                              "no" if args.no_pretrain else "yes", "", "05")]


def recipe_text(recipe, pages, trials, run):
    """Return README's text on the recipe: its command, what it printed, how it was chosen."""
    command = " ".join(["python evaluate.py", *recipe["arguments"]])
    stack = " ".join(f"{name} {version}" for name, version in sorted(recipe["versions"].items()))
    return ["", "**The best recipe**, chosen on dev alone, trained on the whole train part "
            f"({recipe['cores']} cores; {stack}). Its predictions of all five parts are "
            "[preds.tsv.gz](results/reference/preds.tsv.gz). Again: `make recipe`.", "",
            "```", "$ " + command, *recipe["printed"], "```", "",
            *choices_of(recipe, pages, trials, run)]


# ---- beside what others published ---------------------------------------------------------------

def accuracy_on(part, recipe):
    """Return the recipe's line on a part."""
    return " ".join(word for line in (recipe or {}).get("printed", ())
                    if line.startswith(f"{part:<6} accuracy") for word in line.split()
                    ) or "not run yet"


def anchors_of(pages, run, recipe, trials):
    """Return README's table: published figures, this run's, and whether it is the same work.

    [S]: Sun et al. 2019, How to Fine-Tune BERT for Text Classification?, errors on IMDb's test
    part; [R]: a reproduction of it over 3 seeds, accuracies. bert-base-uncased, 25,000 reviews.
    """
    told = run["parameters"]
    other = f"not the same work: {{}} reviews, {os.path.basename(told['model'])}"
    few = other.format(told["n_train"])
    return ["", "**Beside published figures** of bert-base-uncased on IMDb's 25,000 training "
            "reviews ([S]: errors, Sun et al. 2019; [R]: accuracies, a reproduction, 3 seeds):",
            "", "| finding | published | this run, dev | same work? |", "|---|---|---|---|",
            table_row("which end of a review, 512 tokens",
                      "[S] head 5.63 %, tail 5.44, head+tail 5.42; "
                      "[R] head 94.20 %, tail 94.48, head+tail 94.57",
                      tried(varied(trials, run, "keep", seq_len=512)), few),
            table_row("learning rate", "[S] 2e-5 best, 4e-4 does not converge; "
                      "[R] 2e-5 94.57 %, 5e-5 94.30, 1e-4 91.95, 4e-4 50.00",
                      tried(varied(trials, run, "lr")), few),
            table_row("further MLM pretraining, few labels",
                      "[S] 100 labels: from 17.26 % to 9.23",
                      answers_to(pages, "05", "Q3"), other.format(listed(told["sizes"]))),
            table_row("accumulation", "[R] 12 x 2: 94.60 %, 24 x 1: 94.57",
                      answers_to(pages, "03", "Q5"), few),
            table_row("reviews longer than 128 / 256 / 512 tokens", "[R] 88 / 41 / 13 %",
                      answers_to(pages, "02", "Q7"), "the same, of other reviews"),
            table_row("the whole train part",
                      "[S] 512 tokens, head+tail: 5.42 %, with MLM pretraining 4.37",
                      accuracy_on("dev", recipe), other.format("the train part's"))]


# ---- README -------------------------------------------------------------------------------------

def read_reference():
    """Return ({notebook: page}, run, recipe or None, trials) as kept in results/reference."""
    names = sorted(name[:-5] for name in os.listdir(REFERENCE) if name[0].isdigit())
    kept, recipe = os.path.join(REFERENCE, "recipe.json"), None
    if os.path.exists(kept):
        recipe = read_json(kept)
    with zipfile.ZipFile(os.path.join(REFERENCE, "trials.zip")) as bundle:
        trials = [json.loads(bundle.read(name)) for name in bundle.namelist()]
    return ({name: read_json(REFERENCE, name + ".json") for name in names},
            read_json(REFERENCE, "run.json"), recipe, trials)


def thinned(told):
    """Return which lists have fewer entries than in profile full, as text."""
    return ", ".join(f"{key} {len(told[key])} of {len(values)}"
                     for key, values in read_profile("full").items()
                     if isinstance(values, list) and len(told.get(key, values)) < len(values))


def notebooks():
    """Return the names of all notebooks, in order."""
    folder = os.path.join(HERE, "notebooks")
    return sorted(name[:-6] for name in os.listdir(folder) if name.endswith(".ipynb"))


def points_table(pages):
    """Return a table of the answers by assignment point, of notebooks that were not run too."""
    named = {}
    for name in notebooks():
        with open(os.path.join(HERE, "notebooks", name + ".ipynb"), encoding="utf-8") as file:
            named[name] = points_named(file.read())
    lines, last = ["| assignment | answer | outcome | where |", "|---|---|---|---|"], None
    for row in table_by_point({name: page["answers"] for name, page in pages.items()}, named):
        title = f"**{row['point']}** {row['title']}" * (row["point"] != last)
        last, where = row["point"], ", ".join(filter(None, (row["notebook"][:2], row["number"])))
        said = f"{row['question']} {row['answer']}" if row["answer"] else "not run yet"
        lines.append(table_row(title, said, VERDICTS[row["holds"]] if row["answer"] else "",
                               f"[{where}](notebooks/{row['notebook']}.ipynb)" if where else ""))
    return lines


def table_of(pages, run, recipe, trials):
    """Return README's text on the reference run: what it was, points, the recipe, anchors."""
    told, answers = run["parameters"], {name: page["answers"] for name, page in pages.items()}
    missing = ", ".join(name[:2] for name in notebooks() if name not in pages)
    best = best_accuracy(answers)
    lines = ([f"The best accuracy that an answer states is {best[0]}, on {told['n_dev'] or 'all'} "
              f"reviews of dev (notebook {best[1][:2]}, "
              f"{split_question(answers[best[1]][best[2] - 1]['question'])[0]})"
              + f"; the best recipe: {accuracy_on('dev', recipe)}" * bool(recipe) + ".", ""]
             if best else [])
    lines += [f"Model: {run['weights'] or told['model']}. Profile {told['profile']}: "
              f"{told['n_train']} training reviews (notebook 05: {listed(told['sizes'])}), "
              f"{told['n_dev']} dev reviews, {told['seq_len']} tokens, {told['epochs']} epochs, "
              f"seeds {told['seeds']}. {run['trials']} trials took {run['trial_minutes']:.0f} "
              f"minutes of training and measuring on {' and '.join(run['devices'])} "
              f"({run['cores']} cores). Again: `make reference`. "
              f"Thinned, against profile full: {thinned(told)}."
              + f" Not run yet: notebooks {missing}." * bool(missing), "",
              *points_table(pages), "",
              f"All {sum(map(len, answers.values()))} answers, with spread and n: "
              "[results/reference](results/reference/README.md).",
              *(recipe_text(recipe, pages, trials, run) if recipe else [])]
    return "\n".join(lines + anchors_of(pages, run, recipe, trials)) + "\n"


def all_answers(pages):
    """Return results/reference/README.md: every answer, notebook by notebook."""
    lines = ["# All answers of the reference run", "",
             "Written by `reference.py` from the JSON files beside it; README has those by "
             "assignment point. `report.zip` holds the pages, `trials.zip` the trials."]
    for name, page in pages.items():
        lines += ["", f"## [{name}](../../notebooks/{name}.ipynb)", "",
                  "| question | answer | outcome | point |", "|---|---|---|---|",
                  *(table_row(row["question"], row["answer"], VERDICTS[row["holds"]], row["point"])
                    for row in page["answers"])]
    return "\n".join(lines) + "\n"


def write_readme():
    """Write README's tables, and the list of all answers, anew from what is kept."""
    kept, path = read_reference(), os.path.join(HERE, "README.md")
    with open(path, encoding="utf-8", newline="\n") as file:
        text = file.read()
    for target, written in ((path, fill_in(text, table_of(*kept))),
                            (os.path.join(REFERENCE, "README.md"), all_answers(kept[0]))):
        with open_atomically(target) as file:
            file.write(written)


def fill_in(text, table):
    """Return README's text with the table between its two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main(argv=None):
    """Keep a run and write README's table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", help="folder of a finished report, as build/small")
    parser.add_argument("--trials", action="store_true", help="only unpack the reference's trials")
    parser.add_argument("--recipe", nargs=argparse.REMAINDER, metavar="ARGUMENT",
                        help="run evaluate.py with all that follows, and keep what it gives")
    args = parser.parse_args(argv)
    if (args.out is None) == (args.recipe is None):
        parser.error("name the folder of a finished report, or --recipe")
    try:
        if args.trials:
            bring_back(args.out)
            return 0
        if args.recipe is not None:
            code = run_recipe(args.recipe)
            if code:
                return code
        else:
            keep(args.out)
        write_readme()
    except InputError as error:
        print(f"reference.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
