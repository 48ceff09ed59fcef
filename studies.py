"""Trials, statistics and checks: what the study notebooks share beyond helpers.py.

    rows = run_trials(grid, train_part, dev_part, "build/sample/trials")
    print(compare(rows_of(rows, lr=2e-5), rows_of(rows, lr=1e-4)).text)

Trials are run once, kept as one JSON each, and compared honestly: over seeds where there are
three, on the same reviews where there is one, and "within noise" where it is.
"""
from __future__ import annotations

import contextlib
import glob
import html
import importlib
import json
import math
import os
import random
import re
import statistics
import sys
import time
import unicodedata
from collections import Counter, namedtuple

import numpy as np
import pandas as pd
import torch
from transformers import BertTokenizer

import checkpoints
import effects
import files
import helpers
import runtime
from assignment import POINTS, VERDICTS
from files import InputError, try_lock
from helpers import RESULTS_VERSION, Diverged
from runtime import VERSIONS


def from_root(path):
    """Return a path as seen from the repository's root, wherever the kernel was started."""
    return os.path.join(files.HERE, os.path.expanduser(path))  # an absolute path stays


def check_lists(**values):
    """Refuse a notebook's parameter that must be a list and is none: `papermill -p` gives text."""
    for name, value in values.items():
        if not isinstance(value, list):
            raise InputError(f"{name}={value!r}: must be a list; papermill reads one with -y "
                             f"'{name}: [...]' or with -f FILE.yml, not with -p")


# ---- a page: its run, its trials, its answers ---------------------------------------------------

class Study:
    """What a page works with: its reviews, settings, trials, baselines and answers.

        study = Study("07_gradient_clipping", profile, data_dir, model, out_dir, n_train, n_dev,
                      seeds=seeds, seq_len=96, epochs=2, lr=1e-3)
        study                                                  # a box that says which run this is
        trials = study.run("thresholds", clip_norm=[0.0, 1.0])  # a DataFrame, a row a trial
        study.answer("R4", "Does clipping help?", compare(trials, "clip_norm", 0.0), "equivalent")

    profile to n_dev are a notebook's parameters of these names; settings: fields of Config that
    all trials of the page share. Raises InputError where a parameter cannot be used.
    """

    def __init__(self, name, profile, data_dir, model, out_dir, n_train=0, n_dev=0, seeds=(0,),
                 **settings):
        check_parameters(n_train=n_train, n_dev=n_dev, seeds=seeds)
        self.name = name
        self.profile = profile
        self.data_dir = data_dir
        self.model = model
        self.out_dir = from_root(os.path.expanduser(out_dir))
        self.seeds = list(seeds)
        self.settings = dict({"model": model, "keep": "tail"}, **settings)
        self.config()  # refuses what no trial could be run with
        self.data = helpers.load_filimdb(data_dir)
        self.train = helpers.subset(self.data["train"], n_train)
        self.dev = helpers.subset(self.data["dev"], n_dev)
        self.margin = effects.MARGINS.get(profile, effects.MARGINS["small"])
        self.answers = []
        self._baselines = {}

    def run(self, what, train=None, dev=None, seeds=None, **settings):
        """Run trials and return them as a table (effects.as_table), a row a trial.

        settings: a list is an axis, whose values are combined with those of all other axes and
        with the seeds; any other value is fixed. A finished trial comes from the store.
        """
        axes = {key: value for key, value in settings.items() if isinstance(value, list)}
        fixed = dict(self.settings, **{key: settings[key] for key in settings if key not in axes})
        points = product(self.seeds if seeds is None else seeds, **axes)
        return self.run_all(what, [dict(fixed, **point) for point in points], train, dev)

    def run_all(self, what, points, train=None, dev=None):
        """Run the trials of a list of settings (dicts) and return them as a table.

        With FILIMDB_STORED in the environment (report.py --stored) nothing is trained: the table
        holds the trials that the store has, and a line says how many it lacks.
        """
        run = stored_trials if os.environ.get("FILIMDB_STORED") else run_trials
        rows = run([dict(self.settings, **point) for point in points], train or self.train,
                   dev or self.dev, os.path.join(self.out_dir, "trials"), what)
        return effects.as_table(rows)

    def config(self, **settings):
        """Return the page's settings as a Config."""
        return helpers.make_config(**dict(self.settings, **settings))

    def compare(self, trials, key, base, by=None, **options):
        """Return the Effects of each value of a key against the base's: effects.compare."""
        return effects.compare(trials, key, base, by, margin=self.margin, **options)

    def baselines(self, train=None, **settings):
        """Return {name: "0110..." on dev} of what BERT has to beat, on the very words it reads.

        train: another Part to learn from. settings: of the trials that they are compared with
        (seq_len, keep, words), else as here.
        """
        config, train = self.config(**settings), train or self.train
        key = config.seq_len, config.keep, config.words, tuple(train.ids)
        if key not in self._baselines:
            _, tokenizer = helpers.load_bert(config.model)
            read, unseen = (helpers.texts_as_read(part.texts, tokenizer, config)
                            for part in (train, self.dev))
            most = Counter(train.labels).most_common(1)[0][0]
            guesses = {"commonest label": [most] * len(unseen),
                       "naive Bayes": helpers.naive_bayes(read, train.labels, unseen),
                       "TF-IDF": helpers.tfidf_regression(read, train.labels, unseen)}
            self._baselines[key] = {name: right_guesses(labels, self.dev.labels)
                                    for name, labels in guesses.items()}
        return self._baselines[key]

    def answer(self, point, question, answer, expected="", verdict="", figure=""):
        """Show an answer in its box and keep it with the page, where the index finds it.

        point: of the assignment (assignment.POINTS), or "". answer: a text, or Effects, whose own
        words are taken. expected: better, worse, different or equivalent, from which the verdict
        on the Effects follows; of a text the verdict is given: one of VERDICTS, or a bool.
        """
        if point and point not in POINTS:
            raise InputError(f"point {point!r} is not in the assignment; use one of "
                             f"{', '.join(POINTS)}")
        if not isinstance(answer, str):
            compared = [answer] if isinstance(answer, effects.Effect) else list(answer)
            answer = " ".join(effect.text[:1].upper() + effect.text[1:] for effect in compared)
            verdict = verdict or (effects.judge(compared, expected) if expected else "")
        if isinstance(verdict, (bool, np.bool_)):
            verdict = "supported" if verdict else "contradicted"
        if verdict not in VERDICTS:
            raise InputError(f"verdict={verdict!r}: must be one of {', '.join(VERDICTS[:3])}")
        row = {"question": question, "answer": answer[:1].upper() + answer[1:], "figure": figure,
               "verdict": verdict, "point": point}
        self.answers.append(row)
        said = f"Expected {expected or 'as said above'}: {verdict}." if verdict else ""
        asked = f" <small>(assignment: {point})</small>" if point else ""
        show_html(f'<p class="answer"><strong>{html.escape(question)}</strong> '
                  f'{html.escape(row["answer"])} <em>{html.escape(said)}</em>{asked}</p>',
                  f'{question} {row["answer"]} {said}', answer=row)

    def summary(self):
        """Show all answers in one table."""
        keys = "question", "answer", "verdict"
        rows = "".join("<tr>" + "".join(f"<td>{html.escape(row[key])}</td>" for key in keys)
                       for row in self.answers)
        head = "".join(f"<th>{key}</th>" for key in keys)
        show_html(f"<table><thead><tr>{head}</thead><tbody>{rows}</tbody></table>",
                  "\n".join(": ".join(row[key] for key in keys) for row in self.answers))

    @property
    def sample_size(self):
        """Return seeds and reviews in words: "5 seeds, 2,000 reviews"."""
        return (f"{effects.number_of(len(self.seeds), 'seed')}, "
                f"{effects.number_of(len(self.dev.texts), 'review')}")

    def facts(self):
        """Return what is known of the run before any trial, {name: value in words}."""
        device = runtime.pick_device()
        smallest = effects.smallest_visible(len(self.seeds), len(self.dev.texts))
        of_what = "" if len(self.seeds) > 1 else ", of two models, not of two methods"
        return {
            "profile": self.profile + (": synthetic reviews and a tiny BERT; findings are "
                                       "indicative only" if self.profile == "sample" else ""),
            "model": self.model, "data": self.data_dir,
            "reviews": f"{len(self.train.texts):,} for training, {len(self.dev.texts):,} of dev",
            "seeds": ", ".join(map(str, self.seeds)),
            "smallest difference to be seen": f"about {smallest:.1f} points{of_what}",
            "equivalent": f"within {self.margin:g} points",
            "device": device_name(device),
            "versions": ", ".join(f"{name} {version}" for name, version in VERSIONS.items())}

    def __repr__(self):
        return "\n".join(f"{name}: {value}" for name, value in self.facts().items())

    def _repr_html_(self):
        rows = "".join(f"<tr><th scope=row>{html.escape(name)}</th><td>{html.escape(value)}</td>"
                       for name, value in self.facts().items())
        return f'<table class="facts">{rows}</table>'


def histories(trials, *keys):
    """Return the trials' histories as one table: a row a recorded step, with these keys and seed.

    Columns beside them: step, epoch, lr, loss, grad_norm (before clipping), targets, seconds, and
    at some steps dev_loss, dev_accuracy, train_loss, train_accuracy.
    """
    rows = [dict(point, **{key: row[key] for key in (*keys, "seed")})
            for row in trials.to_dict("records") for point in row["history"]]
    return pd.DataFrame(rows)


def check_parameters(n_train=0, n_dev=0, seeds=(0,)):
    """Refuse a notebook's numbers of reviews and its seeds where they cannot be used."""
    for name, value in (("n_train", n_train), ("n_dev", n_dev)):
        if type(value) is not int or value < 0:
            raise InputError(f"{name}={value!r}: must be a number of reviews; 0 takes all")
    check_lists(seeds=list(seeds) if isinstance(seeds, tuple) else seeds)
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds):
        raise InputError(f"seeds={seeds!r}: must be one or more whole numbers, 0 or more")


def show_html(text, plain="", **metadata):
    """Show HTML in a notebook, plain text where it is printed; do nothing elsewhere.

    metadata: kept with the output in the notebook's file; a page reads the answers from there.
    """
    if "IPython" in sys.modules:
        from IPython.display import display
        display({"text/html": text, "text/plain": plain}, raw=True, metadata=metadata)


# ---- trials ------------------------------------------------------------------------------------

_origins = {}  # state of a model's files -> its origin, in this process


def state_of_files(model):
    """Return what changes with any file of a model, a tuple, or None where its folder is unknown.

    Of a hub's model that is the folder of the revision that the local cache has.
    """
    folder = files.find_path(model)
    if not os.path.isdir(folder):
        folder = ""
        with contextlib.suppress(ImportError, ValueError):  # transformers 2.1; no hub's name
            from transformers.utils.hub import try_to_load_from_cache
            folder = os.path.dirname(str(try_to_load_from_cache(model, "config.json") or ""))
    if not os.path.isdir(folder):
        return None
    states = ((path, os.stat(path)) for path in sorted(glob.glob(
        os.path.join(glob.escape(os.path.realpath(folder)), "*"))))
    return tuple((path, file.st_size, file.st_mtime_ns, file.st_ino) for path, file in states)


def origin_of(model):
    """Return what names the model that a trial starts from: of `pretrain` its key, else a digest.

    Loaded once for each state of its files.
    """
    state = state_of_files(model)
    if state in _origins:
        return _origins[state]
    note = checkpoints.sound_note(files.find_path(model)) or {}
    origin = note.get("key") or checkpoints.model_digest(*helpers.load_bert(model))
    if state and state == state_of_files(model):
        _origins[state] = origin
    return origin


def trial_key(config, train_part, dev_part):
    """Return the name of a trial: a digest of all that determines its result."""
    return files.digest(RESULTS_VERSION, VERSIONS["torch"], VERSIONS["transformers"],
                          helpers.named_settings(config), origin_of(config.model),
                          train_part.texts, train_part.labels, dev_part.texts,
                          dev_part.labels)[:24]


def product(seeds, **axes):
    """Return the grid of all combinations of the axes' values with the seeds, seeds innermost."""
    grid = [{}]
    for key, values in axes.items():
        grid = [dict(point, **{key: value}) for point in grid for value in values]
    return [dict(point, seed=seed, data_seed=seed) for point in grid for seed in seeds]


def run_trials(grid, train_part, dev_part, store, what="trials", scheduler=""):
    """Return one row per entry of the grid (overrides of Config), in its order.

    A finished trial is read from the store, the others are run and written whole. Several
    processes may share a store: each trial is locked while it runs. scheduler: the address of a
    Dask scheduler that the trials go to (else FILIMDB_SCHEDULER from the environment); empty:
    here, one after another.
    """
    scheduler = scheduler or os.environ.get("FILIMDB_SCHEDULER", "")
    jobs = [(helpers.make_config(**overrides), train_part, dev_part, store) for overrides in grid]
    rows = run_on_cluster(jobs, scheduler) if scheduler else run_here(jobs, what)
    tell_broken(grid, rows, what)
    return rows


def stored_trials(grid, train_part, dev_part, store, what="trials"):
    """Return the rows of the trials of a grid that the store has; say how many it lacks."""
    names = (trial_key(helpers.make_config(**overrides), train_part, dev_part)
             for overrides in grid)
    rows = [read_row(os.path.join(store, name + ".json")) for name in names]
    if None in rows:
        files.say(f"{what}: {rows.count(None)} of {len(rows)} trials are not in the store and "
                  f"were not run; what follows is of the others")
    return [row for row in rows if row is not None]


def run_here(jobs, what):
    """Return the trials' rows, one after another; what another process runs is waited for."""
    rows, bar = [None] * len(jobs), runtime.progress_bar(len(jobs), what, "trial")
    while None in rows:
        waiting = rows.count(None)
        for i, job in enumerate(jobs):
            if rows[i] is None:
                rows[i] = run_once(*job)
                bar.update(rows[i] is not None)
        if rows.count(None) == waiting:  # all that are left run in other processes
            time.sleep(1)
    bar.close()
    return rows


def tell_broken(grid, rows, what):
    """Warn of each trial with a mark, named by what sets it apart: it enters no mean."""
    for overrides, row in zip(grid, rows):
        apart = [f"{key} {value}" for key, value in overrides.items()
                 if any(other.get(key) != value for other in grid)]
        if row["mark"]:
            files.warn(f"{what}: {', '.join(apart) or 'the trial'}: broken, left out of every "
                         f"mean ({row['mark']})")


def run_on_cluster(jobs, scheduler):
    """Map the trials over a Dask cluster's workers; a lost worker's trials go to another."""
    try:
        from distributed import Client
    except ImportError:
        raise InputError("scheduler: the package distributed is not installed here; `python -m "
                         "pip install distributed` brings it") from None

    def until_done(job):
        row = run_once(*job)
        while row is None:  # the lock of a worker that is still at it
            time.sleep(1)
            row = run_once(*job)
        return row

    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise InputError(f"scheduler {scheduler!r}: no Dask scheduler answers there "
                         f"({files.one_line(error)})") from None
    with client:
        return client.gather(client.map(until_done, jobs, pure=False, retries=3))


def run_once(config, train_part, dev_part, store):
    """Return a trial's row, from the store or run now; None while another process runs it.

    None too where the model's files were replaced meanwhile: the row may be of either.
    """
    key = trial_key(config, train_part, dev_part)
    path = os.path.join(store, key + ".json")
    row = read_row(path)
    if row is None:
        with try_lock(path + ".lock") as mine:
            row = read_row(path) if mine else None  # it may have been finished meanwhile
            if mine and row is None:
                row = run_trial(config, train_part, dev_part)
                if trial_key(config, train_part, dev_part) == key:
                    row["checksum"] = files.digest(row)
                    files.save_json(path, row)
                else:
                    row = files.warn(f"{config.model} was replaced during a trial: run again")
                files.remove_if_there(path + ".lock")  # whoever waits on it finds the row
    return row


def read_row(path):
    """Return a sound trial file's row, or None; a damaged one is set aside."""
    try:
        with open(path, encoding="utf-8") as file:
            row = json.load(file)
        if row["checksum"] == files.digest({k: v for k, v in row.items() if k != "checksum"}):
            return row
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError):
        pass
    return files.quarantine(path)


N_CURVE = 100  # reviews of train, and of dev, that the points of a learning curve are measured on


@runtime.exclusive
def run_trial(config, train_part, dev_part):
    """Train and measure once; return the row: config, metrics, history, cost, versions.

    `mark` says why the trial must not enter a mean without being named: it diverged, or it calls
    everything one class.
    """
    started = time.time()
    reset_peak_memory()
    row = {"config": helpers.settings(config), "model": os.path.basename(config.model.rstrip("/")),
           "n_train": len(train_part.texts), "n_dev": len(dev_part.texts), "versions": VERSIONS,
           "results_version": RESULTS_VERSION, "mark": "", "history": [], "metrics": {},
           "correct": ""}
    try:
        params = helpers.train(train_part.texts, train_part.labels,
                               dev=(dev_part.texts, dev_part.labels), n_eval=N_CURVE,
                               **vars(config))
        row["history"] = params["history"]
        row["metrics"], row["correct"], constant = final_metrics(params, train_part, dev_part)
        row["mark"] = "one class for all reviews" if constant else ""
        row["device"] = str(next(params["model"].parameters()).device)
    except Diverged as error:
        row["mark"] = f"diverged: {error}"
    row.update(seconds=time.time() - started, peak_memory=peak_memory())
    return row


def final_metrics(params, train_part, dev_part):
    """Return ({dev_loss, dev_accuracy, train_...}, "0110..." right or wrong on dev, constant?)."""
    logits = logits_of(params, dev_part.texts)
    targets = torch.tensor([helpers.LABEL_IDS[label] for label in dev_part.labels])
    correct = right_string(logits, dev_part.labels)
    last = [row for row in params["history"] if "dev_loss" in row][-1]
    metrics = {"dev_loss": float(torch.nn.functional.cross_entropy(logits, targets)),
               "dev_accuracy": correct.count("1") / len(correct),
               "train_loss": last["train_loss"], "train_accuracy": last["train_accuracy"]}
    return metrics, correct, len(set(logits.argmax(1).tolist())) == 1


def logits_of(params, texts):
    """Return the logits of a trained model for texts, cut as in its training: (n, labels)."""
    tokens = helpers.prepare(texts, params["tokenizer"], params["config"])
    return helpers.predict_logits(params["model"], tokens, params["tokenizer"], params["config"])


def reset_peak_memory():
    """Start a new measurement of the GPU's peak memory, where there is one."""
    if torch.cuda.is_available() and hasattr(torch.cuda, "reset_peak_memory_stats"):
        torch.cuda.reset_peak_memory_stats()


def peak_memory():
    """Return the peak memory in bytes: of the GPU, else of this process so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024)


def rows_of(rows, **fixed):
    """Return the rows whose config has these values."""
    return [row for row in rows if all(row["config"][key] == fixed[key] for key in fixed)]


def values_of(rows, metric="dev_accuracy"):
    """Return a metric of the rows without a mark, a list of floats."""
    return [row["metrics"][metric] for row in rows if not row["mark"]]


# ---- statistics --------------------------------------------------------------------------------

Spread = namedtuple("Spread", "mean sd n marked")  # sd: nan for n < 2; marked: rows left out


def spread(rows, metric="dev_accuracy"):
    """Return mean, sample standard deviation and n over seeds; marked rows are counted apart."""
    values = values_of(rows, metric)
    return Spread(statistics.mean(values) if values else math.nan,
                  statistics.stdev(values) if len(values) > 1 else math.nan,
                  len(values), len(rows) - len(values))


def show(s, percent=True):
    """Return a Spread as text: "87.3 ± 0.4 % (3 seeds)"."""
    if not s.n:
        return f"not measured ({effects.number_of(s.marked, 'trial')} broken and left out)"
    scale, unit = (100, " %") if percent else (1, "")
    text = f"{s.mean * scale:.3g}" if not percent else f"{s.mean * scale:.1f}"
    if s.n > 1:
        text += f" ± {s.sd * scale:.1f}" if percent else f" ± {s.sd * scale:.2g}"
    text += f"{unit} ({effects.number_of(s.n, 'seed')}"
    return text + (f", {s.marked} broken and left out)" if s.marked else ")")


def paired_t(differences):
    """Return (t, two-sided p) of the differences against 0; Student 1908, n - 1 degrees."""
    from scipy.stats import t as student
    n, mean, sd = len(differences), statistics.mean(differences), statistics.stdev(differences)
    if sd == 0:
        return (math.copysign(math.inf, mean), 0.0) if mean else (0.0, 1.0)
    t = mean / (sd / math.sqrt(n))
    return t, float(2 * student.sf(abs(t), n - 1))


def mcnemar(right_a, right_b):
    """Return the exact two-sided p of McNemar's test (1947) on two "0110..." strings."""
    from scipy.stats import binom
    only_a = sum(a > b for a, b in zip(right_a, right_b))
    only_b = sum(a < b for a, b in zip(right_a, right_b))
    return min(1.0, float(2 * binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))


# difference: of B over A in the metric's unit; holds: True only when significant and B > A
Comparison = namedtuple("Comparison", "difference p test significant text")


def compare(rows_a, rows_b, names=("A", "B"), alpha=0.05):
    """Compare B with A on dev accuracy, paired; return a Comparison with a verdict in words.

    The same 3 or more seeds in both arms: paired t over the seeds' differences. One seed: McNemar
    on the same reviews, and the verdict says so. Anything else is not tested.
    """
    arms = [{(r["config"]["seed"], r["config"]["data_seed"]): r for r in rows if not r["mark"]}
            for rows in (rows_a, rows_b)]
    seeds, left_out = sorted(set(arms[0]) & set(arms[1])), len(rows_a) + len(rows_b)
    left_out -= 2 * len(seeds)
    if not seeds:
        return Comparison(math.nan, math.nan, "none", False, "no trial to compare: all are broken")
    differences = [arms[1][s]["metrics"]["dev_accuracy"] - arms[0][s]["metrics"]["dev_accuracy"]
                   for s in seeds]
    mean, p, test = statistics.mean(differences), math.nan, "none"
    if len(seeds) >= 3:
        p, test = paired_t(differences)[1], "paired t"
    elif len(seeds) == 1:
        p, test = mcnemar(arms[0][seeds[0]]["correct"], arms[1][seeds[0]]["correct"]), "McNemar"
    significant = p < alpha
    size = f"{names[1]} against {names[0]}: {mean * 100:+.1f} points"
    if len(seeds) > 1:
        size += f" (sd {statistics.stdev(differences) * 100:.1f}, {len(seeds)} seeds)"
    how = f"{test}, p = {p:.2g}" if test != "none" else "2 seeds: too few to test"
    verdict = "significant" if significant else "within noise" if test != "none" else "not tested"
    if len(seeds) == 1:
        verdict += ", one seed"
    text = f"{size}, {verdict} ({how})"
    return Comparison(mean, p, test, significant, text + (
        f"; {left_out} broken or unpaired trials left out" if left_out else ""))


def expected_best(values, n):
    """Return the expected maximum of n draws with replacement; Dodge et al. 2019, equation 6."""
    ordered, total = sorted(values), len(values)
    return sum(v * ((i / total) ** n - ((i - 1) / total) ** n) for i, v in enumerate(ordered, 1))


def best_of(grid_values, rows, key, metric="dev_accuracy"):
    """Return (best value of `key` by mean, a sentence more when it is at the edge of the grid)."""
    means = {value: spread(rows_of(rows, **{key: value}), metric).mean for value in grid_values}
    sound = {value: mean for value, mean in means.items() if not math.isnan(mean)}
    if not sound:
        raise InputError(f"no trial over {key} came to an end; look at the rows' marks")
    best = max(sound, key=sound.get)
    edge = best in (min(grid_values), max(grid_values)) and len(grid_values) > 2
    return best, f" {key} = {best:g} is at the edge of the grid; a wider one may do better." * edge


# ---- optimizers and regularizers (notebooks 06 to 08) ------------------------------------------

def series(row, key):
    """Return a figure of a trial's history: one number for each step that has it."""
    return [point[key] for point in row["history"] if key in point]


def counted(rows):
    """Return the rows with collapsed trials as full members, where collapsing is the outcome."""
    return [dict(row, mark="") if row["metrics"] else row for row in rows]


def gap(rows):
    """Return mean training accuracy less mean dev accuracy in points; nan without a sound row."""
    return 100 * (spread(rows, "train_accuracy").mean - spread(rows).mean)


def leads(base, rows):
    """Return by how many points each trial leads the base's one of the same seed, both sound."""
    known = {row["config"]["seed"]: row["metrics"]["dev_accuracy"] for row in base
             if not row["mark"]}
    return [100 * (row["metrics"]["dev_accuracy"] - known[row["config"]["seed"]]) for row in rows
            if not row["mark"] and row["config"]["seed"] in known]


def best_setting(rows, keys):
    """Return {key: value} of the best sound setting: by mean dev accuracy, then by dev loss."""
    settings = sorted({tuple(r["config"][key] for key in keys) for r in rows if not r["mark"]})
    if not settings:
        raise InputError(f"no trial over {', '.join(keys)} came to a sound end; see their marks")

    def quality(values):
        some = rows_of(rows, **dict(zip(keys, values)))
        return spread(some).mean, -spread(some, "dev_loss").mean
    return dict(zip(keys, max(settings, key=quality)))


def at_edge(setting, rows):
    """Return the keys whose value is the least or the most of three or more tried."""
    tried = {key: {row["config"][key] for row in rows} for key in setting}
    return [key for key, values in tried.items()
            if len(values) > 2 and setting[key] in (min(values), max(values))]


def swing(rows, key, given):
    """Return the range of dev accuracy over `key`, in points, averaged over values of `given`."""
    ranges = []
    for value in {row["config"][given] for row in rows}:
        some = rows_of(rows, **{given: value})
        means = [spread(rows_of(some, **{key: x})).mean
                 for x in {row["config"][key] for row in some}]
        known = [mean for mean in means if not math.isnan(mean)]
        ranges.extend([100 * (max(known) - min(known))] if known else [])
    return statistics.mean(ranges) if ranges else math.nan


def group_table(bert, optimizer):
    """Return a row for each of the optimizer's groups: weight decay, size, kinds of tensors."""
    names = {id(p): ".".join(name.split(".")[-2:]) for name, p in bert.named_parameters()}
    return [{"weight decay": group["weight_decay"], "tensors": len(group["params"]),
             "weights": f"{sum(p.numel() for p in group['params']):,}",
             "such as": ", ".join(sorted({names[id(p)] for p in group["params"]})[:9])}
            for group in optimizer.param_groups]


def decayed_names(bert, optimizer):
    """Return the set of names of the parameters that the optimizer decays."""
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"]
               for p in group["params"]}
    return {name for name, p in bert.named_parameters() if id(p) in decayed}


def weights_by_name(bert):
    """Return {name: weights on the CPU}."""
    return {name: p.detach().cpu() for name, p in bert.named_parameters()}


def step_from_zero_gradient(model, **overrides):
    """Return {name: weights} after one optimizer step in which every gradient is zero.

    In double precision, so that rounding does not blur so small a step.
    """
    bert = helpers.load_bert(model)[0].double()
    for p in bert.parameters():
        p.grad = torch.zeros_like(p)
    helpers.make_optimizer(bert, helpers.make_config(model=model, **overrides)).step()
    return weights_by_name(bert)


def decay_keeps(row):
    """Return the share of a weight that AdamW's decay alone leaves: all 1 - lr * decay."""
    factors = [1 - lr * row["config"]["weight_decay"] for lr in series(row, "lr")]
    return float(torch.tensor(factors, dtype=torch.float64).prod())


def trained_weights(part, **overrides):
    """Train outside the store; return ({name: weights}, what `decay_keeps` says of the run)."""
    params = helpers.train(part.texts, part.labels, **overrides)
    return weights_by_name(params["model"]), decay_keeps(
        {"config": overrides, "history": params["history"]})


def norm_ratios(after, before, kinds):
    """Return {kind: L2 norm after / before} of {kind: {name: mask of rows, or slice(None)}}."""
    def norm(weights, rows):
        return math.sqrt(sum(float(weights[n][mask].double().pow(2).sum())
                             for n, mask in rows.items()))
    return {kind: norm(after, rows) / norm(before, rows) for kind, rows in kinds.items()}


def batch_gradients(part, config):
    """Return the gradients of the first batch of a training, a list of tensors."""
    (bert, tokenizer), cpu = helpers.load_bert(config.model), torch.device("cpu")
    ids = [helpers.LABEL_IDS[label] for label in part.labels]
    window = helpers.classifier_batches(helpers.prepare(part.texts, tokenizer, config), ids,
                                        config, tokenizer, cpu)(0)
    for batch in window:
        loss = helpers.summed_loss(helpers.classifier_forward, bert, batch, cpu, config.precision)
        (loss / helpers.count_targets(window)).backward()
    return [p.grad for p in bert.parameters() if p.grad is not None]


def clip_once(gradients, threshold):
    """Return (norm before, gradients after as one flat tensor) of clipping them together."""
    weights = [torch.zeros_like(g, requires_grad=True) for g in gradients]
    for weight, gradient in zip(weights, gradients):
        weight.grad = gradient.clone()
    before = float(torch.nn.utils.clip_grad_norm_(weights, threshold))
    return before, torch.cat([weight.grad.flatten() for weight in weights])


def step_length(kind, gradient, lr):
    """Return the L2 norm of the first update of an optimizer (torch.optim's) by the gradient."""
    weights = torch.zeros_like(gradient, requires_grad=True)
    weights.grad = gradient
    kind([weights], lr=lr).step()
    return float(weights.detach().norm())


def steps_around_spike(lr, threshold=0.0, n=60, at=20, spike=100.0):
    """Return Adam's n steps / lr on one weight: all gradients are 1, but one; clipped or not."""
    weight, steps = torch.zeros(1, requires_grad=True), []
    optimizer = torch.optim.Adam([weight], lr=lr)
    for step in range(n):
        before, weight.grad = weight.item(), torch.tensor([spike if step == at else 1.0])
        if threshold:
            torch.nn.utils.clip_grad_norm_([weight], threshold)
        optimizer.step()
        steps.append((before - weight.item()) / lr)
    return steps


def clipped_shares(rows):
    """Return for each trial with a history the share of its steps in which clipping acted."""
    return [statistics.mean(norm > row["config"]["clip_norm"] > 0
                            for norm in series(row, "grad_norm"))
            for row in rows if row["history"]]


def unsettled(tests, large=0.05):
    """Return the keys of {key: Comparison} that are too large to call nothing, or untested."""
    return [key for key, test in tests.items() if math.isnan(test.p) or (
        abs(test.difference) > large and not test.significant)]


def dropout_modules(bert):
    """Return {p: names of the nn.Dropout modules with this p}."""
    found = {}
    for name, module in bert.named_modules():
        if isinstance(module, torch.nn.Dropout):
            found.setdefault(module.p, []).append(name)
    return found


def starred(names):
    """Return the names in one line, layers' numbers as *, each once."""
    return ", ".join(sorted({re.sub(r"\b\d+\b", "*", name) for name in names}))


def passes_differ(model, **dropouts):
    """Tell whether two passes of the model in training mode differ."""
    with torch.random.fork_rng(), torch.no_grad():
        bert, ids = helpers.load_bert(model, **dropouts)[0].train(), torch.arange(20, 40)[None]
        torch.manual_seed(0)
        one, two = (bert(ids, attention_mask=torch.ones_like(ids))[0] for _ in range(2))
    return not torch.equal(one, two)


def around(default, grid, names):
    """Return {"default": default, "NAME = value": default with this one value changed, ...}."""
    return dict({"default": default}, **{
        f"{names[key]} = {value:g}": dict(default, **{key: value})
        for key in grid for value in grid[key] if value != default[key]})


def draw_setting(default, grid, random):
    """Return a random {weight_decay, dropout, attention_dropout}; random: a torch.Generator.

    Dropouts are uniform up to the grid's end, weight decay log-uniform from the default on.
    """
    u = torch.rand(3, generator=random, dtype=torch.float64).tolist()
    low, high = default["weight_decay"], max(grid["weight_decay"])
    return {"weight_decay": round(low * (high / low) ** u[0], 4),
            "dropout": round(max(grid["dropout"]) * u[1], 2),
            "attention_dropout": round(max(grid["attention_dropout"]) * u[2], 2)}


def luck_curve(mean, sd, n, draws=2000):
    """Return the expected best of 1 to n draws of nothing but normal noise, by simulation."""
    noise = torch.randn(draws, n, generator=runtime.generator("luck"), dtype=torch.float64)
    return [mean + sd * float(noise[:, :k].max(1)[0].mean()) for k in range(1, n + 1)]


# ---- memory ------------------------------------------------------------------------------------

def largest_batch(model, seq_len, most=1024):
    """Return the largest batch of seq_len tokens whose training step fits on the model's GPU.

    Found by real steps (forward, backward, Adam) on doubled, then bisected sizes.
    """
    optimizer = helpers.make_optimizer(model, helpers.make_config())
    fits, too_many = 0, most + 1
    while too_many - fits > 1:
        size = min(max(1, 2 * fits), most) if too_many > most else (fits + too_many) // 2
        if step_fits(model, optimizer, size, seq_len):
            fits = size
        else:
            too_many = size
    return fits


def step_fits(model, optimizer, size, seq_len):
    """Tell whether a training step of size x seq_len fits; the process stays healthy if not."""
    device = next(model.parameters()).device
    try:
        ids = torch.ones(size, seq_len, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids[:, 0]}
        helpers.summed_loss(helpers.classifier_forward, model.train(), batch, device).backward()
        optimizer.step()
        return True
    except (RuntimeError, MemoryError) as error:
        if not runtime.out_of_memory(error):
            raise
        return False
    finally:
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def estimated_batch(config, n_weights, seq_len, memory):
    """Estimate the largest batch of a training step in fp32 in `memory` bytes; no measurement.

    Weights, gradients and Adam's two moments take 16 bytes a weight. Activations of a layer, after
    Korthikanti et al. 2022, equation 1, in 4-byte numbers with 1-byte dropout masks:
    s (66 h + 9 a s) bytes an example.
    """
    h, a, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    return max(0, int((memory - 16 * n_weights) // (
        layers * seq_len * (66 * h + 9 * a * seq_len))))


def fitting_batches(model, lengths, device):
    """Return ("measured" or "estimated", the largest batches at these numbers of tokens)."""
    if device.type == "cuda":
        return "measured", [largest_batch(model.to(device), n) for n in lengths]
    n_weights, memory = sum(p.numel() for p in model.parameters()), memory_of(device)
    return "estimated", [estimated_batch(model.config, n_weights, n, memory) for n in lengths]


def device_name(device):
    """Return the GPU's name, or what there is of a CPU."""
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {threads} thread{'s' * (threads != 1)}")


def memory_of(device):
    """Return the bytes of memory that the device (a GPU, or this computer) has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- reviews, whole and in parts; masked words --------------------------------------------------

class Windows:
    """The windows of many texts as texts of their own, for helpers.predict_logits."""

    def __init__(self, tokens, size):
        self.tokens, self.spans = tokens, helpers.windows_of(tokens.lengths, size)
        self.lengths = [end - start for _, start, end in self.spans]

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        text, start, end = self.spans[i]
        return self.tokens[text][start:end]


def window_logits(params, tokens):
    """Return the mean logits over windows that cover each whole text, (n, labels)."""
    windows = Windows(tokens, params["config"].seq_len - 2)
    logits = helpers.predict_logits(params["model"], windows, params["tokenizer"],
                                    params["config"])
    owner = torch.tensor([text for text, _, _ in windows.spans], dtype=torch.int64)
    total = torch.zeros(len(tokens), logits.shape[1]).index_add(0, owner, logits)
    return total / torch.bincount(owner, minlength=len(tokens)).clamp(min=1).float()[:, None]


def right_guesses(guesses, labels):
    """Return "0110...": where a guess is the label."""
    return "".join("01"[guess == label] for guess, label in zip(guesses, labels))


def right_string(logits, labels):
    """Return "0110...": where the likeliest class is the label."""
    return right_guesses(logits.argmax(1).tolist(), [helpers.LABEL_IDS[name] for name in labels])


def as_row(correct, seed):
    """Return predictions that come from no trial in the form that `compare` takes."""
    return {"config": {"seed": seed, "data_seed": seed}, "mark": "", "correct": correct,
            "metrics": {"dev_accuracy": correct.count("1") / len(correct)}}


def mistakes(params, part):
    """Return [(probability of the wrong label, index)] of a part's mistakes, the surest first."""
    sure, guesses = logits_of(params, part.texts).softmax(1).max(1)
    right = [helpers.LABEL_IDS[label] for label in part.labels]
    return sorted(((p, i) for i, (p, guess) in enumerate(zip(sure.tolist(), guesses.tolist()))
                   if guess != right[i]), reverse=True)


def enough_words(rows, ks, keep):
    """Return (k, Comparison) of the least k not significantly below all words; else Nones."""
    for k in ks:
        test = compare(rows_of(rows, keep=keep, words=k), rows_of(rows, keep=keep, words=0),
                       (f"{k} words", "all"))
        if not (test.significant and test.difference > 0):
            return k, test
    return None, None


def thirds(lengths):
    """Return the indices of the shortest third, the middle one, the longest one."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i * len(order) // 3:(i + 1) * len(order) // 3] for i in range(3)]


def shares_right(rows, group):
    """Return for each sound trial the share of a group of reviews (indices) that it has right."""
    return [statistics.mean(int(row["correct"][i]) for i in group) for row in rows
            if not row["mark"]]


def only_right(rows, others):
    """Return the indices that every sound trial of `rows` has right and of `others` wrong."""
    def always(some, mark):
        known = zip(*(row["correct"] for row in some if not row["mark"]))
        return {i for i, marks in enumerate(known) if set(marks) == {mark}}
    return sorted(always(rows, "1") & always(others, "0"))


def shuffled_words(texts):
    """Return the texts, the words of each in a random order that its place alone decides."""
    return [" ".join(random.Random(i).sample(words, len(words)))
            for i, words in enumerate(text.split() for text in texts)]


def top_words(model, tokenizer, sentences, k=5):
    """Return for each sentence with one [MASK] the k likeliest tokens, the likeliest first."""
    found = []
    for sentence in sentences:
        left, right = sentence.split("[MASK]")
        ids = [tokenizer.cls_token_id, *tokens_of(left, tokenizer), tokenizer.mask_token_id,
               *tokens_of(right, tokenizer), tokenizer.sep_token_id]
        with runtime.inference_mode():
            hidden = model.bert(torch.tensor([ids]))[0][0, ids.index(tokenizer.mask_token_id)]
            best = model.cls.predictions(hidden[None])[0].topk(k)[1]
        found.append(tokenizer.convert_ids_to_tokens(best.tolist()))
    return found


def tokens_of(text, tokenizer):
    """Return the ids of a text's tokens."""
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


# ---- checks of the set-up and of the vectors (notebooks 01, 02) --------------------------------

# key: (the stack's name, its requirements file, what that file pins otherwise or not at all)
STACKS = {"2019": ("the pinned stack of 2019", "requirements-2019.txt",
                   {"python": "3.7", "torch": "1.3"}),
          "today": ("today's stack", "requirements.txt", {"python": "3.10 3.11 3.12"})}
# The settings of bert-base-uncased's published config.json that give its size.
BERT_BASE = {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
             "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072}
ACCENTED = r"[À-ÅÇ-ÏÑ-ÖÙ-Ýà-åç-ïñ-öù-ýÿ]"
CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"  # tab and newline count as spaces


def pins_of(path):
    """Return {package: version} of a requirements file of the bundle."""
    lines = helpers.read_lines(from_root(path))
    return dict(re.match(r"([\w-]+)==(\S+)", line).groups() for line in lines if "==" in line)


def matches(version, pins):
    """Tell whether a version is one of the pinned ones ("3.10 3.11"), to the digits they give."""
    return any(version == pin or version.startswith(pin + ".") for pin in pins.split())


def version_here(package):
    """Return the version of an importable package, or a dash."""
    try:
        return importlib.import_module(package).__version__.split("+")[0]
    except ImportError:
        return "-"


def versions_table(packages):
    """Return a row for python and each package: pins, version here, and whose pin that matches."""
    here = dict({"python": VERSIONS["python"]}, **{name: version_here(name) for name in packages})
    pins = {key: dict(pins_of(path), **more) for key, (_, path, more) in STACKS.items()}
    return [dict({"package": package},
                 **{f"pinned, {key}": pins[key].get(package, "-") for key in pins}, here=version,
                 matches=" ".join(key for key in pins if matches(
                     version, pins[key].get(package, "")))) for package, version in here.items()]


def stack_of(table):
    """Return (the stack whose python, torch and transformers these are, the packages unlike it).

    table: from versions_table. Of no stack: the packages unlike the nearest one.
    """
    unlike = {key: [row["package"] for row in table if key not in row["matches"]]
              for key in STACKS}
    for key, packages in unlike.items():
        if not set(packages) & set(VERSIONS):
            return STACKS[key][0], packages
    return "neither the pinned stack of 2019 nor today's", min(unlike.values(), key=len)


def special_ids(tokenizer):
    """Return {token: id} of BERT's five special tokens."""
    return {getattr(tokenizer, name): getattr(tokenizer, name + "_id") for name in (
        "cls_token", "sep_token", "pad_token", "unk_token", "mask_token")}


def cased_tokenizer(model):
    """Return a model's tokenizer with lower-casing switched off: what the fault would read."""
    with runtime.quiet_transformers():
        return BertTokenizer.from_pretrained(files.find_path(model), do_lower_case=False)


def without_accents(text):
    """Return a text in NFD without its combining marks."""
    decomposed = unicodedata.normalize("NFD", text)
    return "".join(c for c in decomposed if unicodedata.category(c) != "Mn")


def without_controls(text):
    """Return a text without the characters that BERT's cleaning drops."""
    return "".join(c for c in text if c in "\t\n\r" or
                   unicodedata.category(c) not in ("Cc", "Cf", "Co"))


def visible(text):
    """Return a text with its control characters spelled out."""
    return re.sub(CONTROL, lambda match: f"\\x{ord(match.group()):02x}", text)


def passages(texts, pattern, n=4):
    """Return n passages around different matches of the pattern, each from another text."""
    found = {}
    for text in texts:
        match = re.search(pattern, text)
        if match and len(found) < n and match.group().lower() not in found:
            start = text.rfind(" ", 0, max(0, match.start() - 12)) + 1
            end = text.find(" ", match.end() + 12)
            found[match.group().lower()] = text[start:end if end > 0 else match.end() + 30]
    return list(found.values())


def tokens_table(texts, tokenizer, **changes):
    """Return a row per text: its tokens, and whether each change of the text leaves them."""
    return [dict({"as written": visible(text), "tokens": " ".join(tokenizer.tokenize(text))},
                 **{name.replace("_", " "): "same" if tokenizer.tokenize(change(text))
                    == tokenizer.tokenize(text) else "OTHER" for name, change in changes.items()})
            for text in texts]


def changed_by(change, texts, tokenizer):
    """Return (how many texts the change alters, how many of these then get other tokens)."""
    tokens = helpers.tokenize_all(texts, tokenizer)
    altered = [i for i, text in enumerate(texts) if change(text) != text]
    again = helpers.tokenize([change(texts[i]) for i in altered], tokenizer)
    return len(altered), sum(row.tolist() != tokens[i] for i, row in zip(altered, again))


def unknown_share(texts, tokenizer):
    """Return the percentage of the texts' tokens that are [UNK]."""
    ids = helpers.tokenize_all(texts, tokenizer).ids
    return 100 * float((ids == tokenizer.unk_token_id).mean())


def unknown_characters(texts, tokenizer):
    """Return {character: how often it stands in the texts}, of those that are [UNK] alone.

    No space is: transformers 2.1 makes any special token of it, another in each process.
    """
    counts = Counter(c for text in texts for c in text
                     if (ord(c) > 126 or not c.isalnum()) and not c.isspace())
    return {c: n for c, n in counts.most_common() if tokenizer.unk_token in tokenizer.tokenize(c)}


def blocks_of(model):
    """Return {block: parameters} of a BERT classifier, counted: embeddings, layer 1 ..."""
    counted = Counter()
    for name, parameter in model.named_parameters():
        layer = re.search(r"encoder\.layer\.(\d+)\.", name)
        counted[f"layer {int(layer.group(1)) + 1}" if layer else
                re.sub(r"^bert\.", "", name).split(".")[0]] += parameter.numel()
    return dict(counted)


def blocks_by_formula(sizes):
    """Return {block: parameters} of a BERT classifier with 2 labels, from its sizes alone."""
    h, i = sizes["hidden_size"], sizes["intermediate_size"]
    rows = sizes["vocab_size"] + sizes["max_position_embeddings"] + sizes["type_vocab_size"]
    layer = 4 * (h * h + h) + 2 * h * i + i + h + 4 * h
    layers = {f"layer {n}": layer for n in range(1, sizes["num_hidden_layers"] + 1)}
    return dict(embeddings=rows * h + 2 * h, **layers, pooler=h * h + h, classifier=2 * h + 2)


def in_layers(blocks):
    """Return the number of parameters that lie in the encoder's layers."""
    return sum(n for block, n in blocks.items() if block.startswith("layer"))


def blocks_table(models):
    """Return a row per block of {model: {block: parameters}} with shares in %, and their sum."""
    deepest = max(models.values(), key=len)
    models = {name: dict(blocks, sum=sum(blocks.values())) for name, blocks in models.items()}
    return [dict({"block": block}, **{
        name: f"{blocks[block]:,} ({100 * blocks[block] / blocks['sum']:.1f} %)"
        if block in blocks else "-" for name, blocks in models.items()})
        for block in [*deepest, "sum"]]


def words_of(ids, tokenizer):
    """Return tokens as text, those of a word joined; on both stacks the same."""
    return " ".join(tokenizer.convert_ids_to_tokens(ids)).replace(" ##", "")


def padded_logits(model, rows, tokenizer, length=0, mask=True, fill=None):
    """Return the logits of rows of ids, padded to `length` if that is more, (rows, labels).

    mask: hide the padding from the model. fill: ids to put under it, (rows, length or more).
    """
    extra = [[tokenizer.pad_token_id] * length] if length else []  # one row of that length
    batch = helpers.pad(rows + extra, tokenizer.pad_token_id)
    ids, real = (batch[key][:len(rows)] for key in ("input_ids", "attention_mask"))
    if fill is not None:
        ids = torch.where(real == 1, ids, fill[:, :ids.shape[1]])
    with runtime.inference_mode():
        return model(ids, attention_mask=real if mask else torch.ones_like(ids))[0]


def padding_trials(model, rows, lengths, tokenizer):
    """Return {(kind, length): logits} of the rows padded to each length, in three kinds.

    masked: as it should be; masked noise: with random tokens under the padding; no mask.
    """
    noise = torch.randint(len(tokenizer), (len(rows), max(lengths)),
                          generator=runtime.generator("noise"))
    kinds = {"masked": {}, "masked noise": {"fill": noise}, "no mask": {"mask": False}}
    return {(kind, n): padded_logits(model, rows, tokenizer, n, **options)
            for kind, options in kinds.items() for n in lengths}


def effect_of(logits, alone, labels):
    """Return what logits (n, labels) do otherwise than those of the reviews alone, as a row."""
    change, right = (logits - alone).abs(), right_string(logits, labels)
    return {"reviews": len(right), "accuracy, %": f"{100 * right.count('1') / len(right):.1f}",
            "labels that flip": int((logits.argmax(1) != alone.argmax(1)).sum()),
            "median change of a logit": f"{float(change.median()):.2g}",
            "largest change of a logit": f"{float(change.max()):.2g}"}


def outcome_of(call, *args):
    """Return "fine", or the one line of the error that the call ends in."""
    try:
        with runtime.inference_mode():
            call(*args)
        return "fine"
    except (InputError, IndexError, RuntimeError) as error:
        return str(error) if isinstance(error, InputError) else files.one_line(error)


def head_and_tail(n, keep):
    """Return (first, last): how many of n kept items come from the head, and from the tail."""
    first = sum(i < n for i in helpers.truncate(list(range(2 * n + 1)), n, keep))
    return first, n - first


def survivors(tokens, n, keep):
    """Return the n tokens that survive truncation, told by their index alone: a witness."""
    first, last = head_and_tail(n, keep)
    return [id for i, id in enumerate(tokens)
            if len(tokens) <= n or i < first or i >= len(tokens) - last]


def truncation_table(texts, seq_len, tokenizer):
    """Return a row per `keep`: texts cut at seq_len, vectors unlike the slice of their tokens."""
    tokens, rows = helpers.tokenize_all(texts, tokenizer), []
    for keep in ("head", "tail", "head+tail"):
        differ = 0
        for i, text in enumerate(texts):
            ids, _, mask, _ = helpers.vectorize_ex(text, None, seq_len, tokenizer, keep)
            differ += len(ids) != seq_len or ids[:sum(mask)] != [
                tokenizer.cls_token_id, *survivors(tokens[i], seq_len - 2, keep),
                tokenizer.sep_token_id]
        rows.append({"keep": keep, "seq_len": seq_len, "reviews": len(texts),
                     "head + tail": "{} + {}".format(*head_and_tail(seq_len - 2, keep)),
                     "truncated": sum(n > seq_len - 2 for n in tokens.lengths),
                     "differ from the slice": differ})
    return rows


def short_example(part, tokenizer, least=8):
    """Return (text, label) of a part's shortest review of `least` tokens with a word in parts."""
    labels = part.labels or [None] * len(part.texts)
    pairs = sorted(zip(part.texts, labels), key=lambda pair: len(pair[0]))
    for text, label in pairs:
        tokens = tokenizer.tokenize(text)
        if len(tokens) >= least and any(token.startswith("##") for token in tokens):
            return text, label
    return pairs[0]


def comes_back(text, seq_len, tokenizer):
    """Tell whether a review's vector, decoded to words, gives the same ids when vectorized."""
    ids, _, mask, _ = helpers.vectorize_ex(text, None, seq_len, tokenizer)
    decoded = words_of(ids[1:sum(mask) - 1], tokenizer)
    return helpers.vectorize_ex(decoded, None, seq_len, tokenizer)[0] == ids


def encoder_table(texts, sizes, tokenizer, other):
    """Return a row per seq_len: how many vectors are those of the other tokenizer's encoder.

    Counts too how many are those of the loaders (texts in bulk) and have mask and segments that
    fit their ids. The other tokenizer keeps the encoder's limits: give one that serves no more.
    """
    options = runtime.supported_options(other.encode, truncation=True)
    tokens, rows = helpers.tokenize_all(texts, tokenizer), []
    for n in sizes:
        agree, loaders, fit = 0, 0, 0
        for i, text in enumerate(texts):
            ids, segments, mask, _ = helpers.vectorize_ex(text, None, n, tokenizer)
            real = ids[:sum(mask)]
            agree += real == other.encode(text, add_special_tokens=True, max_length=n, **options)
            loaders += real == helpers.add_special_tokens(tokens[i], n, "head", tokenizer)
            fit += segments == [0] * n and mask == [int(id != tokenizer.pad_token_id)
                                                    for id in ids]
        rows.append({"seq_len": n, "reviews": len(texts), "equal to the encoder": agree,
                     "equal to the loaders": loaders, "mask and segments fit": fit})
    return rows


def cut_shares(lengths, limits):
    """Return the percentage of the lengths that are over each limit."""
    return [100 * float((np.array(lengths) > limit).mean()) for limit in limits]


def lengths_table(lengths, limits):
    """Return a row per part of {part: lengths}: quantiles, cuts, padding to the last limit."""
    return [dict({"part": name, "reviews": len(n), "median": float(np.median(n)),
                  "9 in 10 up to": round(float(np.percentile(n, 90))), "longest": int(max(n))},
                 **{f"% cut at {limit}": round(share, 1)
                    for limit, share in zip(limits, cut_shares(n, limits))},
                 **{f"% padding at {limits[-1]}": round(
                     100 - 100 * float(np.minimum(n, limits[-1]).mean()) / limits[-1], 1)})
            for name, n in lengths.items()]
