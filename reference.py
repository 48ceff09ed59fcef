"""Put a finished run of the report into the repository, so that README shows what it found.

    make reference                           # profile small -> build/small -> results/reference
    python reference.py build/small          # the second half of it alone
    python reference.py build/small --pages  # and all pages in one file, once a run: report.zip
    make recipe                              # the recipe by evaluate.py, and its predictions

Every page's answers become one JSON in results/reference, beside the trials as an archive; figures
go to figures/. results/reference/README.md (all answers, the recipe, published figures) and
README's table by assignment point are written anew from what is kept. A run with a page that
failed is refused; pages that were not run yet are named as missing.
Exit code: 0 done, 2 wrong use, nothing to keep or a full disk; with --recipe that of evaluate.py.
"""
import argparse
import collections
import gzip
import json
import math
import os
import re
import sys
import tempfile
import zipfile

import numpy as np
import yaml

import effects
import evaluate
import helpers
from assignment import one_line, points_named, sentences, spread, table_by_point
from files import HERE, InputError, open_atomically, save_json
from runtime import VERSIONS

REFERENCE = os.path.join(HERE, "results", "reference")
LONGEST = 200  # characters of an answer in README's table
SHOWN = "report.png"  # README's picture of a page, the one figure that no page makes
COMPARISON = re.compile(r" points \([^()]* to [^()]*\):")
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
    if len({row["profile"] for row in status.values()}) > 1:
        raise InputError(f"{out}: pages of several profiles; give each an --out of its own")
    return {name: {key: row[key] for key in ("seconds", "profile", "answers")}
            for name, row in status.items()}


def trials_of(out):
    """Return the paths of the run's trials, in order; a store keeps those of other stacks too."""
    folder = os.path.join(out, "trials")
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))
             if name.endswith(".json")]
    return [path for path in paths if is_current(read_json(path))]


def is_current(row):
    """Tell whether a trial was made by this code and by this stack."""
    return row["results_version"] == helpers.RESULTS_VERSION and all(
        row["versions"][name] == VERSIONS[name] for name in ("torch", "transformers"))


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


def keep(out, with_pages=False):
    """Copy a run's answers, figures and trials into the repository, its pages where asked to."""
    pages = collect(out)
    if with_pages and not os.path.exists(os.path.join(out, "report.html")):
        raise InputError(f"{os.path.join(out, 'report.html')}: no such file; run report.py again")
    run, path = cost_of(out, pages), os.path.join(REFERENCE, "recipe.json")
    recipe = read_json(path) if os.path.exists(path) else None
    if recipe:  # first: it needs the reviews, and refuses without
        recipe["unseen"] = accuracy_on_unseen(recipe, run["parameters"]["n_dev"])
        save_json(path, recipe)
    for name in os.listdir(REFERENCE) if os.path.isdir(REFERENCE) else ():
        if name[0].isdigit() and name[:-5] not in pages:
            os.remove(os.path.join(REFERENCE, name))  # of an older run
    for name, page in pages.items():
        save_json(os.path.join(REFERENCE, name + ".json"), page)
    save_json(os.path.join(REFERENCE, "run.json"), run)
    made, folder = os.listdir(os.path.join(out, "figures")), os.path.join(HERE, "figures")
    for name in sorted(made):
        with open(os.path.join(out, "figures", name), "rb") as source, \
                open_atomically(os.path.join(folder, name), "wb") as target:
            target.write(source.read())
    for name in set(os.listdir(folder)) - {*made, SHOWN}:  # of an older run
        os.remove(os.path.join(folder, name))
    archive(os.path.join(REFERENCE, "trials.zip"), {
        os.path.basename(path): path for path in trials_of(out)})
    if with_pages:
        archive(os.path.join(REFERENCE, "report.zip"),
                {"report.html": os.path.join(out, "report.html")})


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


# ---- the recipe ---------------------------------------------------------------------------------

def run_recipe(arguments):
    """Run evaluate.py; keep its record and its predictions; return its exit code.

    What was kept before stays where the new predictions can't be measured on dev.
    """
    n_dev = read_json(REFERENCE, "run.json")["parameters"]["n_dev"]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "record.json")
        code = evaluate.main([*arguments, "--json", path])
        if code:
            return code
        recipe = dict(read_json(path), arguments=arguments)
    recipe["unseen"] = accuracy_on_unseen(recipe, n_dev, recipe["predictions"])
    with open(recipe["predictions"], "rb") as predictions, \
            open_atomically(os.path.join(REFERENCE, "preds.tsv.gz"), "wb") as file, \
            gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:  # no date: the same bytes
        packed.write(predictions.read())
    save_json(os.path.join(REFERENCE, "recipe.json"), recipe)
    return 0


def read_column(path):
    """Return {PART/INDEX: value} of a file that evaluate.py wrote, packed by gzip or not."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            return dict(line.rstrip("\n").split("\t") for line in file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as lines PART/INDEX<TAB>value ({error}); give "
                         f"what evaluate.py wrote") from None


def accuracy_on_unseen(recipe, n_dev, predictions=""):
    """Return accuracies on dev, on ever fewer reviews: all, not seen by trials, not in train.

    n_dev: on as many dev reviews the trials were judged; 0: on all, which leaves none. A row:
    which reviews, n, accuracy, its 95 % interval over reviews (of this one model), naive Bayes,
    and TF-IDF regression with how many points the recipe is above it, and their interval.
    predictions: a file (default: that which is kept).
    """
    data = helpers.load_filimdb(recipe["data"], ("train", "dev"))
    if not (data["train"].labels and data["dev"].labels):
        raise InputError(f"{recipe['data']}: train or dev has no labels; a recipe is measured on "
                         f"them")
    dev = data["dev"]
    predicted = read_column(predictions or os.path.join(REFERENCE, "preds.tsv.gz"))
    used, in_train = set(helpers.subset(dev, n_dev).ids), set(data["train"].texts)
    guesses = [baseline(data["train"].texts, data["train"].labels, dev.texts)
               for baseline in (helpers.naive_bayes, helpers.tfidf_regression)]
    reviews = [(i, text, predicted[i] == label, bayes == label, tfidf == label)
               for i, text, label, bayes, tfidf in zip(dev.ids, dev.texts, dev.labels, *guesses)]
    unused = [row for row in reviews if row[0] not in used]
    unseen = [row for row in unused if row[1] not in in_train]
    names = ("all of dev", f"without the {len(used):,} that the trials saw",
             f"and without {len(unused) - len(unseen):,} more that stand in train word for word")
    return [measured(name, rows) for name, rows in zip(names, (reviews, unused, unseen))
            if len(rows) > 1]


def measured(name, reviews):
    """Return a row of `accuracy_on_unseen`, of (id, text, right: it, naive Bayes, TF-IDF) each."""
    right, bayes, tfidf = np.array([row[2:] for row in reviews], dtype=float).T
    accuracy, low, high = effects.accuracy_interval(["".join(map(str, right.astype(int)))])
    above = effects.estimate([right - tfidf])
    return {"reviews": name, "n": len(reviews), "accuracy": accuracy, "low": low, "high": high,
            "naive_bayes": 100 * bayes.mean(), "tfidf": 100 * tfidf.mean(),
            "above_tfidf": [100 * (above.mean + side * above.half) for side in (0, -1, 1)]}


def above_tfidf(row):
    """Return by how many points a row of `accuracy_on_unseen` is above TF-IDF, in words."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*row["above_tfidf"])


# What trials say of a recipe: key, notebook, in what else its trials leave the basic setting.
ADAMW = {"optimizer": "adamw", "weight_decay": 0.01}
FEW = dict(ADAMW, epochs=10, n_train="n_few")  # a parameter's name stands for its value
CHOICES = (
    ("keep", "04", {"seq_len": 512, "words": 128}), ("keep", "04", {"seq_len": 512}),
    ("lr", "03", {}), ("epochs", "03", {}), ("warmup", "03", {}), ("decay", "03", {}),
    ("weight_decay", "06", {"optimizer": "adam", "epochs": 2}),
    ("weight_decay", "06", {"optimizer": "adamw", "epochs": 2}),
    ("clip_norm", "07", {"epochs": 2}), ("dropout", "08", FEW), ("attention_dropout", "08", FEW))


def varied(trials, run, key, **fixed):
    """Return those trials, a table, that are the run's basic setting in all but `key` and `fixed`.

    Seeds that a search or a grid was tuned with, and the run does not name, are left out.
    """
    parameters = run["parameters"]
    given = {name: parameters[name] for name in ("seq_len", "epochs", "lr")}
    base = dict(vars(helpers.make_config(keep="tail", **given)))
    base.update({"n_train": parameters["n_train"]}, **fixed)
    base.update(model=os.path.basename(parameters["model"]),
                precision=parameters.get("precision", "auto").replace("fp32", "auto"))
    if parameters.get("n_dev"):  # 0: all of dev, however many
        base["n_dev"] = parameters["n_dev"]
    free = {key, "seed", "data_seed", "device"}
    if parameters.get("precision", "auto") == "auto" and len(trials):
        base["precision"] = trials["precision"].mode()[0]  # what the machine took; fp32: no entry
    if not base["n_train"]:  # all of train, however many
        base["n_train"] = trials["n_train"].max()
    same = trials["seed"].isin(parameters["seeds"])
    for name in set(base) - free:
        same &= trials[name] == base[name]
    return trials[same]


def table_row(*cells):
    """Return a row of a Markdown table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def listed(values):
    """Return some values as text, with commas."""
    return ", ".join(map(str, values))


def percent(value, low, high):
    """Return a share in percent with its interval as text: "82.4 % (79.1 to 85.7)"."""
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def accuracy_of(row):
    """Return a row's accuracy with its interval as text."""
    return percent(row["accuracy"], row["low"], row["high"])


def tried(trials, key):
    """Return what trials give by the value of a key, as text; those that collapsed count."""
    collapsed = trials[(trials["failed"] != "") & (trials["correct"] != "")].groupby(key).size()
    said = []
    for row in effects.accuracies(trials, key, count_failed=True).to_dict("records"):
        some = f", {collapsed.get(row[key])} of them collapsed" * (row[key] in collapsed)
        some += f", {row['failed']} diverged" * (row["failed"] > 0)
        said.append(f"{effects.short(row[key])}: " + (
            f"{accuracy_of(row)[:-1]}; {effects.number_of(row['seeds'], 'seed')}{some})"
            if row["seeds"] else "failed"))
    return ", ".join(said) or "not run yet"


def answers_to(pages, notebook, question):
    """Return a page's answers to a question, as Q3, joined."""
    return " ".join(row["answer"] for name, page in pages.items() if name.startswith(notebook)
                    for row in page["answers"] if row["question"].startswith(question + ".")
                    ) or "not run yet"


def judged(trials, key, chosen, margin):
    """Return what trials say of the value that was chosen: a test, or that there is none."""
    table = effects.accuracies(trials, key, count_failed=True)
    table = table[table["seeds"] > 0]
    if chosen not in set(trials[key]) or not len(table):
        return "the recipe's was not tried"
    highest = table.loc[table["accuracy"].idxmax(), key]
    if highest == chosen:
        return "the highest, and chosen"
    return next(effect.text for effect in effects.compare(
        trials, key, chosen, margin=margin, count_failed=True) if effect.value == highest)


def settings_of(recipe):
    """Return all of a recipe's settings: a record leaves precision out where it was fp32."""
    return dict(vars(helpers.make_config()), **dict({"precision": "fp32"}, **recipe["settings"]))


def choices_of(recipe, pages, trials, run):
    """Return a table: what was tried on dev, what the recipe takes, what a test says of it."""
    taken = settings_of(recipe)
    margin = effects.margin_of(run["parameters"]["profile"])
    lines = ["| setting | dev accuracy in the trials | the recipe takes | highest of them | "
             "notebook |", "|---|---|---|---|---|"]
    done = recipe.get("trained") or {}
    by_clock = {"epochs": "ended by the clock"} if taken["max_minutes"] and done.get(
        "epochs", 0) < taken["epochs"] else {}
    for key, notebook, fixed in CHOICES:
        fixed = {name: run["parameters"].get(value, value) for name, value in fixed.items()}
        found = varied(trials, run, key, **fixed)
        if found[key].nunique() < 2:
            continue
        where = listed(f"{name} {value}" for name, value in fixed.items())
        other = key == "weight_decay" and fixed["optimizer"] != taken["optimizer"]
        lines.append(table_row(
            key + f" ({where})" * bool(where), tried(found, key),
            taken["optimizer"] if other else f"{done['epochs']:.2f} of {taken[key]}"
            if key in by_clock and done else effects.short(taken[key]),
            "another optimizer" if other else by_clock.get(key) or judged(
                found, key, taken[key], margin), notebook))
    if taken["views"]:
        lines.append(table_row("views", "none; seen on all of dev ([EXPERIMENTS.md]"
                               "(../../EXPERIMENTS.md))", True, "no trial", ""))
    return lines + [table_row("MLM pretraining", answers_to(pages, "05", "Q3"),
                              "yes" if recipe["pretraining"] else "no", "measured with "
                              "these few labels, not on all of train", "05")]


def trained_for(recipe):
    """Return how long a recipe trained and how it classified, as the end of a sentence."""
    said, done = "", recipe.get("trained")
    if done:
        said += f"; {done['steps']:,} steps, {done['epochs']:.2f} epochs"
    for row in recipe.get("read", ()):
        said += f"; {row['reviews']:,} reviews classified by at most {row['seq_len']} tokens" if (
            row["seq_len"]) else f"; {row['reviews']:,} reviews not read, given the usual label"
        said += f", longer ones in {len(helpers.TRUNCATIONS)} readings" * row["views"]
    return said


def recipe_text(recipe, pages, trials, run):
    """Return the page's text on the recipe: its command, accuracies, how it was chosen."""
    stack = " ".join(f"{name} {version}" for name, version in sorted(recipe["versions"].items()))
    minutes = listed(f"{phase} {value:.1f}" for phase, value in sorted(recipe["minutes"].items()))
    taken = settings_of(recipe)
    given = {word.split("--set=")[-1].split("=")[0] for word in recipe["arguments"]}
    chosen = [f"{key}={taken[key]}" for key in ("seq_len", "precision", "epochs")
              if "--grading" in given and key not in given]
    by_clock = f" ({listed(chosen)}: by --grading)" * bool(chosen)
    lines = ["", "## The recipe", "", "One model, trained on the whole train part, its settings "
             f"chosen on dev by the trials below{by_clock}; {recipe['seen']}. Minutes: {minutes} "
             f"({recipe['device']}, {recipe['cores']} cores; {stack}){trained_for(recipe)}. "
             "Predictions of all parts: [preds.tsv.gz](preds.tsv.gz). [Where it is right and "
             "where not](analysis/README.md). Again: `make recipe`. Some settings were compared "
             "in full-size runs too, on all of dev ([EXPERIMENTS.md](../../EXPERIMENTS.md)): its "
             "accuracy may be a little too high.", "", "```",
             " ".join(["python evaluate.py", *recipe["arguments"]]), "```", "",
             "| dev reviews | n | accuracy (95 % interval over reviews) | naive Bayes | TF-IDF, "
             "words and pairs | BERT above TF-IDF, points |", "|---|---|---|---|---|---|"]
    lines += [table_row(row["reviews"], f"{row['n']:,}", accuracy_of(row),
                        f"{row['naive_bayes']:.1f} %", f"{row['tfidf']:.1f} %", above_tfidf(row))
              for row in recipe["unseen"]]
    lines += ["", "| part | n | accuracy | naive Bayes | of them in train |",
              "|---|---|---|---|---|"]
    for part, row in recipe["parts"].items():
        bayes = row["baselines"].get("naive Bayes")
        lines.append(table_row(part, f"{row['n']:,}", f"{row['accuracy']:.2%}",
                               "" if bayes is None else f"{bayes:.2%}",
                               "all: seen in training" if part == "train"
                               else row["stand_in_train"]))
    return [*lines, "", "How it was chosen: intervals are over seeds and reviews, tests by Holm "
            "over all values of a row. The highest of a row is a description; only a test says "
            "more.", "", *choices_of(recipe, pages, trials, run)]


# ---- beside what others published ---------------------------------------------------------------

def published_figures(pages, run, recipe, trials):
    """Return a table: published accuracies, this run's, and whether it is the same work."""
    parameters = run["parameters"]
    other = f"not the same work: {{}} reviews, {os.path.basename(parameters['model'])}"
    few = other.format(parameters["n_train"])
    whole = (recipe or {}).get("unseen") or [{}]
    n_train = recipe["parts"]["train"]["n"] if recipe else 0
    return ["", "## Beside published figures", "",
            "Of bert-base-uncased on IMDb's 25,000 training reviews, accuracy on its test part: "
            "[S] Sun, Qiu, Xu & Huang 2019, How to Fine-Tune BERT for Text Classification? "
            "(arXiv:1905.05583), which gives errors; here 100 % less the error.", "",
            "| finding | published | this run, on dev | same work? |",
            "|---|---|---|---|",
            table_row("which end of a review, 512 tokens",
                      "[S], table 2: head 94.37 %, tail 94.56 %, head+tail 94.58 %",
                      tried(varied(trials, run, "keep", seq_len=512), "keep"), few),
            table_row("learning rate", "[S]: 2e-5 is the best, 4e-4 does not converge",
                      tried(varied(trials, run, "lr"), "lr"), few),
            table_row("further MLM pretraining, few labels",
                      "[S], 100 labels: 82.74 % without, 90.77 % with",
                      answers_to(pages, "05", "Q3"), other.format(listed(parameters["sizes"]))),
            table_row("the whole train part",
                      "[S], 512 tokens, head+tail: 94.58 %; with MLM pretraining 95.63 %; on test",
                      accuracy_of(whole[-1]) if whole[-1] else "not run yet",
                      other.format(f"{n_train:,}"))]


# ---- README -------------------------------------------------------------------------------------

def read_reference():
    """Return ({notebook: page}, run, recipe or None, table of trials) of results/reference."""
    names = sorted(name[:-5] for name in os.listdir(REFERENCE) if name[0].isdigit())
    kept, recipe = os.path.join(REFERENCE, "recipe.json"), None
    if os.path.exists(kept):
        recipe = read_json(kept)
    with zipfile.ZipFile(os.path.join(REFERENCE, "trials.zip")) as bundle:
        trials = [json.loads(bundle.read(name)) for name in bundle.namelist()]
    pages = {name: read_json(REFERENCE, name + ".json") for name in names}
    return (pages, read_json(REFERENCE, "run.json"), recipe, effects.as_table(trials))


def thinned(parameters):
    """Return which lists have fewer entries than in profile full, as text."""
    full = {key: len(values) for key, values in read_profile("full").items()
            if isinstance(values, list)}
    return listed(f"{key} {len(parameters[key])} of {number}" for key, number in full.items()
                  if key in parameters and len(parameters[key]) < number)


def notebooks():
    """Return the names of all notebooks, in order."""
    folder = os.path.join(HERE, "notebooks")
    return sorted(name[:-6] for name in os.listdir(folder) if name.endswith(".ipynb"))


def shortened(text, limit):
    """Return as many whole clauses of a text as fit into `limit` characters, one at least."""
    ends = [match.start() for match in re.finditer("; ", text)
            if text.count("(", 0, match.start()) == text.count(")", 0, match.start())]
    if len(text) <= limit or not ends:
        return text
    return text[:max([ends[0], *(end for end in ends if end < limit - 1)])] + " …"


def briefly(answer):
    """Return as much of an answer as README's table has room for, and how much is left out.

    That is its first sentence; where this is a comparison, the next ones too that fit.
    """
    brief = [re.sub(r", averaged over [^:]*:", ", on average:", re.sub(
        r" by Holm over \d+ comparisons|, of k = [\d, ]+(?=:)", "", one_line(sentence)))
        for sentence in sentences(answer)]
    compared = [sentence for sentence in brief if COMPARISON.search(sentence)]
    said = [shortened(brief[0], LONGEST)]
    while said[-1] in compared and len(compared) > len(said) and len(
            " ".join([*said, compared[len(said)]])) <= LONGEST:
        said.append(compared[len(said)])
    left = len(compared) - sum(sentence in compared for sentence in said)
    return " ".join(said) + f" … and {effects.number_of(left, 'comparison')} more" * bool(left)


def points_table(pages):
    """Return a table of a line per assignment point, of those that were not run too."""
    named = {}
    for name in notebooks():
        with open(os.path.join(HERE, "notebooks", name + ".ipynb"), encoding="utf-8") as file:
            named[name] = points_named(file.read())
    points = {}
    for row in table_by_point({name: page["answers"] for name, page in pages.items()}, named):
        points.setdefault((row["point"], row["title"]), []).append(row)
    lines = ["| assignment | question and answer (unadjusted 95 % interval; p by Holm) | outcome "
             "| where |", "|---|---|---|---|"]
    for (point, title), rows in points.items():
        for row in rows:
            said = "not run yet"
            if row["answer"]:
                whole = pages[row["notebook"]]["answers"][row["place"] - 1]["answer"]
                said = f"*{row['question']}* {briefly(whole)}"
            place = listed(filter(None, (row["notebook"][:2], row["number"])))
            lines.append(table_row(f"**{point}** {title}" if row is rows[0] else "", said,
                                   row["verdict"], f"[{place}](notebooks/{row['notebook']}.ipynb)"
                                   if row["notebook"] else ""))
    return lines


def counted(pages):
    """Return how many answers have which outcome, as text; without one: expected was nothing."""
    outcomes = collections.Counter(row["verdict"] or "without expectation"
                                   for page in pages.values() for row in page["answers"])
    return listed(f"{number} {word}" for word, number in outcomes.most_common())


def or_all(n):
    """Return a number as text; infinity is "all"."""
    return "all" if n == math.inf else f"{n:,}"


def what_it_can_show(run):
    """Return what the run was, and which differences it can see."""
    parameters = run["parameters"]
    given = [parameters, *(own for own in parameters.values() if isinstance(own, dict))]
    n_train = [own[key] or math.inf for own in given for key in ("n_train", "n_few") if key in own]
    n_train += parameters.get("sizes", [])
    n_seeds = {len(own[key]) for own in given for key in ("seeds", "control_seeds") if key in own}
    seeds, n_dev = len(parameters["seeds"]), parameters["n_dev"]
    head = (f"{effects.number_of(run['trials'], 'trial')} of "
            f"{run['weights'] or parameters['model']} on {spread(n_train, or_all)} training and "
            f"{or_all(n_dev or math.inf)} dev reviews, with {spread(n_seeds)} "
            f"seed{'s' * (n_seeds != {1})}, took {run['trial_minutes']:.0f} minutes of training "
            f"on {' and '.join(run['devices'])}")
    if seeds == 1:
        return (f"{head}: they tell two models apart that differ by "
                f"{effects.smallest_visible(1, n_dev or 10000):.1f} points four times in five, "
                f"and decide nothing about methods, which takes more seeds.")
    return (f"{head}. A single comparison of methods over {seeds} seeds, where the difference "
            f"varies by 1 point (standard deviation) between seeds, sees one of "
            f"{effects.smallest_visible(seeds, n_dev or 10000, sd=1.0):.1f} points four times in "
            f"five; a smaller or more varied one less often, so \"undecided\" is no \"no\".")


def table_of(pages, run, recipe):
    """Return what README says of the reference run: what it was, the recipe's, the points."""
    missing = listed(name[:2] for name in notebooks() if name not in pages)
    lines = [what_it_can_show(run) + f" Not run yet: notebooks {missing}." * bool(missing)]
    if recipe and len(recipe["unseen"]) == 3:  # less: the trials saw all of dev
        row = recipe["unseen"][-1]
        lines += ["", (f"The recipe, trained on all of train, gets {row['accuracy']:.1f} % (95 % "
                       f"interval {row['low']:.1f} to {row['high']:.1f}) of the {row['n']:,} dev "
                       f"reviews right that neither the trials nor its training saw (full-size "
                       f"runs of other settings did), {above_tfidf(row)} points above TF-IDF over "
                       f"words and word pairs.")]
    margin = effects.margin_of(run["parameters"]["profile"])
    lines += ["", (
        "Outcome: whether what the page expected beforehand was supported, contradicted or left "
        f"undecided. In an answer, better, worse: p < {effects.LEVEL:g}; equivalent: else, where "
        f"the whole interval lies within {margin:g} points of 0; undecided: neither.")]
    return "\n".join([*lines, "", *points_table(pages), "",
                      f"All answers ({counted(pages)}), the recipe, published figures: "
                      "[results/reference](results/reference/README.md)."]) + "\n"


def page_of(pages, run, recipe, trials):
    """Return results/reference/README.md: the run, every answer, the recipe, published figures."""
    parameters = run["parameters"]
    missing = listed(name[:2] for name in notebooks() if name not in pages)
    own = "; ".join(f"notebook {name[:2]}: {values['seeds']}" for name, values
                    in parameters.items() if isinstance(values, dict) and "seeds" in values)
    lines = ["# The reference run", "",
             "Written by `reference.py` from the files beside it. " + what_it_can_show(run), "",
             f"Profile {parameters['profile']}: {parameters['n_train']} training reviews "
             f"(notebook 05: {listed(parameters['sizes'])}), {parameters['n_dev']} dev reviews, "
             f"{parameters['seq_len']} tokens, {parameters['epochs']} epochs, seeds "
             f"{parameters['seeds']}{f' ({own})' * bool(own)}; {run['cores']} cores. Thinned, "
             f"against profile full: {thinned(parameters) or 'nothing'}."
             + f" Not run yet: notebooks {missing}." * bool(missing) +
             " Again: `make reference`. `trials.zip` holds the trials, "
             "`report.zip` the pages as last packed.", "", f"## All answers: {counted(pages)}"]
    for name, page in pages.items():
        lines += ["", f"### [{name}](../../notebooks/{name}.ipynb)", "",
                  "| question | answer | outcome | point |", "|---|---|---|---|",
                  *(table_row(row["question"], row["answer"], row["verdict"], row["point"])
                    for row in page["answers"])]
    lines += recipe_text(recipe, pages, trials, run) if recipe else []
    return "\n".join(lines + published_figures(pages, run, recipe, trials)) + "\n"


def write_readme():
    """Write README's table, and the reference's own page, anew from what is kept."""
    kept, path = read_reference(), os.path.join(HERE, "README.md")
    with open(path, encoding="utf-8", newline="\n") as file:
        text = file.read()
    for target, written in ((path, fill_in(text, table_of(*kept[:3]))),
                            (os.path.join(REFERENCE, "README.md"), page_of(*kept))):
        with open_atomically(target) as file:
            file.write(written)


def fill_in(text, table):
    """Return README's text with the table between its two marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table + END + rest.split(END)[1]


def main(argv=None):
    """Keep a run and write README's table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", help="folder of a finished report, as build/small")
    parser.add_argument("--trials", action="store_true", help="only unpack the reference's trials")
    parser.add_argument("--pages", action="store_true",
                        help="pack report.html into report.zip: once a run, it is large")
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
            keep(args.out, args.pages)
        write_readme()
    except (InputError, OSError) as error:
        print(f"reference.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
