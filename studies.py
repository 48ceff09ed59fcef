"""A page's run: its trials and answers, and what two notebooks or more share beyond helpers.py.

    study = Study("07_gradient_clipping", profile, data_dir, model, out_dir, n_train, n_dev, seeds)
    trials = study.run("thresholds", clip_norm=[0.0, 1.0])  # a DataFrame, a row a trial

Trials are run once and kept as one JSON each, named by all that determines them. What follows from
them is said by effects.py.
"""
from __future__ import annotations

import contextlib
import glob
import html
import importlib
import json
import os
import random
import re
import sys
import time
from collections import Counter

import numpy as np
import pandas as pd
import torch
from transformers import BertTokenizer

import checkpoints
import cpu
import effects
import files
import helpers
import parameters
import runtime
from assignment import POINTS, VERDICTS
from files import InputError, try_lock
from helpers import RESULTS_VERSION, Diverged
from runtime import VERSIONS


def from_root(path):
    """Return a path as seen from the repository's root, wherever the kernel was started."""
    return os.path.join(files.HERE, os.path.expanduser(path))  # an absolute path stays


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
        check_numbers(n_train, n_dev, seeds)
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
        self.margin = effects.margin_of(profile)
        self.answers = AnswerList()
        self.plan = []
        self.missing = []  # groups of trials that the store lacks: "control: 5 of 10"
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

        With FILIMDB_STORED in the environment (report.py --stored) no trial is run: the table
        holds the trials that the store has, a line says how many it lacks, and a store that has
        none of them is refused.
        """
        run = stored_trials if os.environ.get("FILIMDB_STORED") else run_trials
        grid = [dict(self.settings, **point) for point in points]
        train, dev = train or self.train, dev or self.dev
        self.note_plan(what, grid, train, dev)
        models = sorted({point["model"] for point in grid})
        before = list(map(origin_of, models))
        rows = run(grid, train, dev, os.path.join(self.out_dir, "trials"), what)
        if list(map(origin_of, models)) != before:
            raise InputError(f"{what}: a model's files were replaced meanwhile; run it again")
        if len(rows) < len(grid):
            self.missing.append(f"{what}: {len(grid) - len(rows)} of {len(grid)}")
        note = note_of_trials(rows, train, dev)
        said = (f"{what}: {effects.number_of(len(rows), 'trial')}, "
                f"{sum(note['seconds'].values()) / 60:.1f} minutes of training")
        show_html(f"<small>{html.escape(said)}</small>", said, trials=note)
        return effects.as_table(rows)

    def note_plan(self, what, grid, train, dev):
        """Note which trials the page wants, in OUT/plan/NAME.json: report.py counts them."""
        keys = [trial_key(helpers.make_config(**settings), train, dev) for settings in grid]
        self.plan.append({"what": what, "keys": keys})
        files.save_json(os.path.join(self.out_dir, "plan", self.name + ".json"), self.plan)

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
        said = (f"Expected {expected}" if expected else "The expectation above") + f": {verdict}."
        said *= bool(verdict)
        asked = f" <small>(assignment: {point})</small>" if point else ""
        show_html(f'<p class="answer" style="{BOX}"><strong>{html.escape(question)}</strong> '
                  f'{html.escape(row["answer"])} <em>{html.escape(said)}</em>{asked}</p>',
                  f'{question} {row["answer"]} {said}', answer=row)

    def summary(self):
        """Show all answers in one table; say which trials were missing."""
        rows = AnswerList(dict(row, verdict=row["verdict"] or "-") for row in self.answers)
        show_html(rows._repr_html_(), repr(rows))
        if self.missing:
            groups = "; ".join(self.missing)
            said = f"Trials that were not there when this page was made: {groups}."
            show_html(f"<p><strong>{html.escape(said)}</strong></p>", said)

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
            "difference that one typical comparison sees four times in five":
                f"about {smallest:.1f} points{of_what}",
            "equivalent": f"within {self.margin:g} points",
            "device": device_name(device),
            "versions": ", ".join(f"{name} {version}" for name, version in VERSIONS.items())}

    def run_note(self):
        """Return what the report's front page says of the run: sizes, device, checksums."""
        device = runtime.pick_device()
        parts = sorted(glob.glob(os.path.join(glob.escape(files.find_path(self.data_dir)),
                                              "*.[tl]*s")))  # PART.texts, PART.labels
        return {"n_train": len(self.train.texts), "n_dev": len(self.dev.texts),
                "seeds": len(self.seeds), "hardware": hardware_name(device),
                "smallest": effects.smallest_visible(len(self.seeds), len(self.dev.texts)),
                "data": files.digest(*map(files.file_digest, parts)),
                "weights": origin_of(self.model), "versions": VERSIONS}

    def _repr_mimebundle_(self, **_):
        """Return (the box, what the report's front page reads), as IPython asks for them."""
        return ({"text/plain": repr(self), "text/html": self._repr_html_()},
                {"run": self.run_note()})

    def __repr__(self):
        return "\n".join(f"{name}: {value}" for name, value in self.facts().items())

    def _repr_html_(self):
        style = 'style="text-align:left;vertical-align:top"'
        rows = "".join(f"<tr><th scope=row {style}>{html.escape(name)}</th>"
                       f"<td {style}>{html.escape(value)}</td></tr>"
                       for name, value in self.facts().items())
        return f'<table class="facts">{rows}</table>'


class AnswerList(list):
    """A page's answers, which a notebook shows as a table."""

    SHOWN = "question", "answer", "verdict"

    def __repr__(self):
        return "\n".join(": ".join(row[key] for key in self.SHOWN) for row in self)

    def _repr_html_(self):
        return files.html_table(self, self.SHOWN)


BOX = "padding:.7em 1.1em;border-left:4px solid #3a7ca8"  # of an answer, in Jupyter too


def note_of_trials(rows, train, dev):
    """Return what the report's front page says of a group of trials, from their rows.

    seconds: {trial: its seconds}; predictions: {trial, unless it diverged: [how many, of them
    right, how many on dev reviews that stand in train word for word, of them right]}.
    """
    known = set(train.texts)
    leaked = [i for i, text in enumerate(dev.texts) if text in known]

    def counts(correct):
        of_leaked = "".join(correct[i] for i in leaked)
        return [len(correct), correct.count("1"), len(of_leaked), of_leaked.count("1")]

    named = {row["checksum"][:16]: row for row in rows}
    return {"seconds": {name: round(row["seconds"], 2) for name, row in named.items()},
            "predictions": {name: counts(row["correct"]) for name, row in named.items()
                            if row["correct"]}}


def histories(trials, *keys):
    """Return the trials' histories as one table: a row a recorded step, with these keys and seed.

    Columns beside them: step, epoch, lr, loss, grad_norm (before clipping), targets, seconds, and
    at some steps dev_loss, dev_accuracy, train_loss, train_accuracy.
    """
    rows = [dict(point, **{key: row[key] for key in (*keys, "seed")})
            for row in trials.to_dict("records") for point in row["history"]]
    return pd.DataFrame(rows)


def check_numbers(n_train=0, n_dev=0, seeds=(0,)):
    """Refuse numbers of reviews, and seeds, that no study can be made of."""
    for name, value in (("n_train", n_train), ("n_dev", n_dev)):
        parameters.check_value(name, value, 0)
    parameters.check_value("seeds", list(seeds) if isinstance(seeds, tuple) else seeds, [0, 1, 2])


def check_parameters(name, namespace):
    """Refuse a notebook's parameters, in the cell that takes them, where they cannot be used.

    name: of the notebook; namespace: its globals(). A name that `papermill -p` was given and that
    the notebook does not declare is refused too, and the nearest suggested.
    """
    parameters.check(name, namespace)


def show_html(text, plain="", **metadata):
    """Show HTML in a notebook, plain text where it is printed; do nothing elsewhere.

    metadata: kept with the output in the notebook's file; a page reads the answers from there.
    """
    if "IPython" in sys.modules:
        from IPython.display import display
        display({"text/html": text, "text/plain": plain}, raw=True, metadata=metadata)


def try_it(show, text, **choices):
    """Show `show(text)`, and beneath it, in a live Jupyter, a box in which to type another text.

    choices: of show's other arguments, as ipywidgets takes them: (least, most), or a list. In a
    run without a person (papermill, report.py) and without ipywidgets the example stands alone.
    """
    show(text)
    if not runtime.is_watched():
        return
    try:
        import ipywidgets
    except ImportError:
        files.say("A box to type in needs ipywidgets: python -m pip install ipywidgets")
        return
    box = ipywidgets.Textarea(text, rows=4, layout=ipywidgets.Layout(width="95%"))
    interact = ipywidgets.interact_manual.options(manual_name="Show")
    interact(lambda text, **chosen: show(text, **chosen), text=box, **choices)


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
    warn_of_failed(grid, rows, what)
    return rows


def stored_trials(grid, train_part, dev_part, store, what="trials"):
    """Return the rows of the trials of a grid that the store has; say how many it lacks.

    Raises InputError where it has none of them: there is nothing to judge.
    """
    rows = [read_row(trial_path(helpers.make_config(**overrides), train_part, dev_part, store))
            for overrides in grid]
    if rows.count(None) == len(rows):
        raise InputError(f"{what}: none of the {len(rows)} trials is in the store {store}; "
                         f"report.py without --stored runs them")
    if None in rows:
        files.say(f"{what}: {rows.count(None)} of {len(rows)} trials are not in the store and "
                  f"were not run; what follows is of the others")
    warn_of_failed(grid, rows, what)
    return [row for row in rows if row is not None]


def run_here(jobs, what):
    """Return the trials' rows, one after another; what another process runs is waited for."""
    rows = [read_row(trial_path(*job)) for job in jobs]
    lacking = [job for job, row in zip(jobs, rows) if row is None]
    stored = len(jobs) - len(lacking)
    costs = [0] * stored + [cost_of(config) for config, *_ in lacking]
    with runtime.progress_bar(len(jobs), what, "trial", costs=costs) as bar:
        bar.skip(stored)
        try:
            while None in rows:
                waiting = rows.count(None)
                for i, job in enumerate(jobs):
                    if rows[i] is None:
                        rows[i] = run_once(*job)
                        bar.update(rows[i] is not None)
                if rows.count(None) == waiting:  # all that are left run in other processes
                    time.sleep(1)
        except KeyboardInterrupt as stop:
            raise files.Interrupted(
                f"{what}, trial {bar.done + 1} of {len(jobs)}: " + (
                    str(stop) if isinstance(stop, files.Interrupted) else
                    "interrupted; the same call resumes"), *stop.args) from None
    return rows


def cost_of(config):
    """Return about how long a trial takes, beside others on the same reviews."""
    return config.epochs * min(config.words or config.seq_len, config.seq_len)


def trial_path(config, train_part, dev_part, store):
    """Return the file of a trial in a store."""
    return os.path.join(store, trial_key(config, train_part, dev_part) + ".json")


def warn_of_failed(grid, rows, what):
    """Warn of each trial that failed, named by what sets it apart, and of seconds that differ."""
    for overrides, row in zip(grid, rows):
        apart = [f"{key} {value}" for key, value in overrides.items()
                 if any(other.get(key) != value for other in grid)]
        if row and row["mark"]:
            files.warn(f"{what}: {', '.join(apart) or 'the trial'}: failed ({row['mark']})")
    products = dict.fromkeys(row.get("product", "default") for row in rows if row)
    if len(products) > 1:
        files.warn(f"{what}: {' and '.join(products)} matrix products: their seconds do not "
                   f"compare")


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
           "correct": "", "product": cpu.product_of(runtime.pick_device(config.device))}
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
    logits = helpers.classifier_logits(dev_part.texts, params, what="")
    targets = torch.tensor([helpers.LABEL_IDS[label] for label in dev_part.labels])
    correct = right_string(logits, dev_part.labels)
    last = [row for row in params["history"] if "dev_loss" in row][-1]
    metrics = {"dev_loss": float(torch.nn.functional.cross_entropy(logits, targets)),
               "dev_accuracy": correct.count("1") / len(correct),
               "train_loss": last["train_loss"], "train_accuracy": last["train_accuracy"]}
    return metrics, correct, len(set(logits.argmax(1).tolist())) == 1


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


# ---- optimizers and regularizers (notebooks 06 to 08) ------------------------------------------


def group_table(bert, optimizer):
    """Return a row for each of the optimizer's groups: weight decay, size, kinds of tensors."""
    names = {id(p): ".".join(name.split(".")[-2:]) for name, p in bert.named_parameters()}
    return [{"weight decay": group["weight_decay"], "tensors": len(group["params"]),
             "weights": f"{sum(p.numel() for p in group['params']):,}",
             "such as": ", ".join(sorted({names[id(p)] for p in group["params"]})[:9])}
            for group in optimizer.param_groups]


# ---- memory ------------------------------------------------------------------------------------

def largest_batch(model, seq_len, most=2 ** 20):
    """Return the largest batch of seq_len tokens whose training step fits on the model's GPU.

    Found by real steps (forward, backward, Adam) on doubled, then bisected sizes; afterwards the
    model is as it was. most: a size that no GPU reaches, so that the search ends.
    """
    weights = {key: value.cpu().clone() for key, value in model.state_dict().items()}
    training = model.training
    try:
        return largest_that_fits(model, seq_len, most)
    finally:
        model.load_state_dict(weights)
        model.train(training)


def largest_that_fits(model, seq_len, most):
    """Return the largest size, at most `most`, whose `step_fits`."""
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
    """Tell whether a step of size x seq_len fits, in fp32; the process stays healthy if not."""
    device = next(model.parameters()).device
    try:
        ids = torch.ones(size, seq_len, dtype=torch.int64)
        batch = {"input_ids": ids, "attention_mask": ids, "labels": ids[:, 0]}
        helpers.summed_loss(helpers.classifier_forward, model.train(), batch, device,
                            "fp32").backward()
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


def device_name(device):
    """Return the GPU's name, or what there is of a CPU."""
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {threads} thread{'s' * (threads != 1)}")


def hardware_name(device):
    """Return device_name, of a CPU its maker's name for it too, where Linux tells."""
    if device.type == "cuda":
        return device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, {device_name(device)[5:]}"
    return device_name(device)


def memory_of(device):
    """Return the bytes of memory that the device (a GPU, or this computer) has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- reviews, whole and in parts; masked words --------------------------------------------------


def right_guesses(guesses, labels):
    """Return "0110...": where a guess is the label."""
    return "".join("01"[guess == label] for guess, label in zip(guesses, labels))


def right_string(logits, labels):
    """Return "0110...": where the likeliest class is the label."""
    return right_guesses(logits.argmax(1).tolist(), [helpers.LABEL_IDS[name] for name in labels])


def shuffled_words(texts):
    """Return the texts, the words of each in a random order that its place alone decides.

    A word ends at a space alone: what BERT drops (a control character), where Python sees a
    blank, goes on joining what it joined, so that the tokens are the same.
    """
    return [" ".join(random.Random(i).sample(words, len(words)))
            for i, words in enumerate(text.split(" ") for text in texts)]


# ---- checks of the set-up and of the vectors (notebooks 01, 02) --------------------------------

# key: (the stack's name, its requirements file, what that file pins otherwise or not at all)
STACKS = {"2019": ("the pinned stack of 2019", "requirements-2019.txt",
                   {"python": "3.7", "torch": "1.3"}),
          "today": ("today's stack", "requirements.txt", {"python": "3.10 3.11 3.12"})}
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


def visible(text):
    """Return a text with its control characters spelled out."""
    return re.sub(CONTROL, lambda match: f"\\x{ord(match.group()):02x}", text)


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
