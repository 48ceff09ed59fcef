"""Trials, statistics, figures and answers: what the study notebooks share beyond helpers.py.

    rows = run_trials(grid, train_part, dev_part, "build/sample/trials")
    print(compare(rows_of(rows, lr=2e-5), rows_of(rows, lr=1e-4)).text)

Trials are run once, kept as one JSON each, and compared honestly: over seeds where there are
three, on the same reviews where there is one, and "within noise" where it is.
"""
from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import math
import os
import re
import statistics
import sys
import time
from collections import namedtuple

import torch

import helpers
from helpers import VERSIONS, Diverged, InputError

# Raise it when the same trial gives other numbers than before (tests/reference_losses.json).
RESULTS_VERSION = 1

def from_root(path):
    """Return a path as seen from the repository's root, wherever the kernel was started."""
    return os.path.join(helpers.HERE, path)  # an absolute path stays what it is


# ---- trials ------------------------------------------------------------------------------------

_weights = {}  # model's name -> digest of its weights, in this process


def weights_of(model):
    """Return the digest of a model's weights; loaded once in a process."""
    if model not in _weights:
        bert, _ = helpers.load_bert(model, "mlm")
        _weights[model] = helpers.weights_digest(bert)
    return _weights[model]


def trial_key(config, train_part, dev_part):
    """Return the name of a trial: a digest of all that determines its result."""
    return helpers.digest(RESULTS_VERSION, VERSIONS["torch"], VERSIONS["transformers"],
                          helpers.settings(config), weights_of(config.model), train_part.texts,
                          train_part.labels, dev_part.texts, dev_part.labels)[:24]


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
    Dask scheduler that the trials go to; empty: here, one after another.
    """
    jobs = [(helpers.make_config(**overrides), train_part, dev_part, store) for overrides in grid]
    if scheduler:
        return run_on_cluster(jobs, scheduler)
    rows, bar = [None] * len(jobs), helpers.progress_bar(len(jobs), what, "trial")
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


def run_on_cluster(jobs, scheduler):
    """Map the trials over a Dask cluster's workers; a lost worker's trials go to another."""
    try:
        from distributed import Client
    except ImportError:
        raise InputError("scheduler: the package distributed is not installed here") from None

    def until_done(job):
        row = run_once(*job)
        while row is None:  # the lock of a worker that is still at it
            time.sleep(1)
            row = run_once(*job)
        return row

    with Client(scheduler) as client:
        return client.gather(client.map(until_done, jobs, pure=False, retries=3))


def run_once(config, train_part, dev_part, store):
    """Return a trial's row, from the store or run now; None while another process runs it."""
    path = os.path.join(store, trial_key(config, train_part, dev_part) + ".json")
    row = read_row(path)
    if row is None:
        with locked(path + ".lock") as mine:
            row = read_row(path) if mine else None  # it may have been finished meanwhile
            if mine and row is None:
                row = run_trial(config, train_part, dev_part)
                row["checksum"] = helpers.digest(row)
                helpers.save_json(path, row)
                helpers.forget(path + ".lock")  # whoever waits on it finds the row
    return row


def read_row(path):
    """Return a sound trial file's row, or None; a damaged one is set aside."""
    try:
        with open(path, encoding="utf-8") as file:
            row = json.load(file)
        if row["checksum"] == helpers.digest({k: v for k, v in row.items() if k != "checksum"}):
            return row
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OSError):
        pass
    return helpers.set_aside(path)


@contextlib.contextmanager
def locked(path):
    """Hold a lock file; yield whether it is ours. It falls with its process, even by SIGKILL."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time, please
        yield True
        return
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


N_CURVE = 150  # reviews of train, and of dev, that the points of a learning curve are measured on


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
    model, tokenizer, config = params["model"], params["tokenizer"], params["config"]
    pieces = helpers.prepare(dev_part.texts, tokenizer, config)
    logits = helpers.predict_logits(model, pieces, tokenizer, config)
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
    scale, unit = (100, " %") if percent else (1, "")
    text = f"{s.mean * scale:.3g}" if not percent else f"{s.mean * scale:.1f}"
    if s.n > 1:
        text += f" ± {s.sd * scale:.1f}" if percent else f" ± {s.sd * scale:.2g}"
    text += f"{unit} ({s.n} seed{'s' * (s.n != 1)}"
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
    size = (f"{names[1]} {'beats' if mean > 0 else 'trails'} {names[0]} by {abs(mean) * 100:.1f} "
            f"points" if mean else f"{names[1]} equals {names[0]}")
    if len(seeds) > 1:
        size += f" (sd {statistics.stdev(differences) * 100:.1f}, {len(seeds)} seeds)"
    how = f"{test}, p = {p:.2g}" if test != "none" else "2 seeds: too few to test"
    verdict = "significant" if significant else "within noise" if test != "none" else "not tested"
    if len(seeds) == 1:
        verdict += ", one seed"
    text = f"{size}: {verdict} ({how})"
    return Comparison(mean, p, test, significant, text + (
        f"; {left_out} broken or unpaired trials left out" if left_out else ""))


def expected_best(values, n):
    """Return the expected maximum of n draws with replacement; Dodge et al. 2019, equation 6."""
    ordered, total = sorted(values), len(values)
    return sum(v * ((i / total) ** n - ((i - 1) / total) ** n) for i, v in enumerate(ordered, 1))


def best_of(grid_values, rows, key, metric="dev_accuracy"):
    """Return (best value of `key` by mean, a note when it lies at the edge of the grid)."""
    means = {value: spread(rows_of(rows, **{key: value}), metric).mean for value in grid_values}
    sound = {value: mean for value, mean in means.items() if not math.isnan(mean)}
    if not sound:
        raise InputError(f"no trial over {key} came to an end; look at the rows' marks")
    best = max(sound, key=sound.get)
    edge = best in (min(grid_values), max(grid_values)) and len(grid_values) > 2
    return best, f"{key} = {best:g} is at the edge of the grid: a wider one may do better" * edge


# ---- memory ------------------------------------------------------------------------------------

def largest_batch(model, seq_len, most=1024):
    """Return the largest batch of seq_len pieces whose training step fits on the model's GPU.

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
        if not isinstance(error, MemoryError) and not re.search(
                r"out of memory|can't allocate memory|not enough memory", str(error)):
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


def memory_of(device):
    """Return the bytes of memory that the device (a GPU, or this computer) has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- whole reviews, masked words ----------------------------------------------------------------

class Windows:
    """The windows of many texts as texts of their own, for helpers.predict_logits."""

    def __init__(self, pieces, size):
        self.pieces, self.spans = pieces, helpers.spans(pieces.lengths, size)
        self.lengths = [end - start for _, start, end in self.spans]

    def __len__(self):
        return len(self.spans)

    def __getitem__(self, i):
        text, start, end = self.spans[i]
        return self.pieces[text][start:end]


def window_logits(params, pieces):
    """Return the mean logits over windows that cover each whole text, (n, labels)."""
    windows = Windows(pieces, params["config"].seq_len - 2)
    logits = helpers.predict_logits(params["model"], windows, params["tokenizer"],
                                    params["config"])
    owner = torch.tensor([text for text, _, _ in windows.spans], dtype=torch.int64)
    total = torch.zeros(len(pieces), logits.shape[1]).index_add(0, owner, logits)
    return total / torch.bincount(owner, minlength=len(pieces)).clamp(min=1).float()[:, None]


def right_string(logits, labels):
    """Return "0110...": where the likeliest class is the label."""
    return "".join("01"[helpers.LABEL_IDS[label] == guess] for label, guess in
                   zip(labels, logits.argmax(1).tolist()))


def as_row(correct, seed):
    """Return predictions that come from no trial in the form that `compare` takes."""
    return {"config": {"seed": seed, "data_seed": seed}, "mark": "", "correct": correct,
            "metrics": {"dev_accuracy": correct.count("1") / len(correct)}}


def top_words(model, tokenizer, sentences, k=5):
    """Return for each sentence with one [MASK] the k likeliest pieces, the likeliest first."""
    found = []
    for sentence in sentences:
        left, right = sentence.split("[MASK]")
        ids = [tokenizer.cls_token_id, *pieces_of(left, tokenizer), tokenizer.mask_token_id,
               *pieces_of(right, tokenizer), tokenizer.sep_token_id]
        with helpers.inference_mode():
            hidden = model.bert(torch.tensor([ids]))[0][0, ids.index(tokenizer.mask_token_id)]
            best = model.cls.predictions(hidden[None])[0].topk(k)[1]
        found.append(tokenizer.convert_ids_to_tokens(best.tolist()))
    return found


def pieces_of(text, tokenizer):
    """Return the ids of a text's pieces."""
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


# ---- figures -----------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def new_figure(panels=1, height=3.4, width=None):
    """Return (figure, list of axes) in the one look that all figures share."""
    import matplotlib
    matplotlib.use("Agg", **({"force": False} if "matplotlib.pyplot" in sys.modules else {}))
    import matplotlib.pyplot as plt
    look = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
            "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True, "lines.linewidth": 1.8,
            "axes.prop_cycle": matplotlib.cycler(color=COLOURS), "legend.frameon": False}
    plt.rcParams.update(look)  # for good: colours by name ("C0") are looked up when drawn
    size = (width or (6.2 if panels == 1 else 10), height)
    figure, axes = plt.subplots(1, panels, figsize=size)
    plt.close(figure)  # shown by save_figure alone
    return figure, [axes] if panels == 1 else list(axes)


def log_axis(axes, ticks, label="{:g}".format):
    """Give the x axis a log scale with plain ticks: 8, 16, 32 ..."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: label(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def plot_seeds(axes, xs, groups, label, colour, percent=True, marker="o"):
    """Plot the mean of each x's rows as a line and every seed as a faint point; label the line.

    groups: for each x the list of values (floats) of its seeds.
    """
    scale = 100 if percent else 1
    known = [(x, group) for x, group in zip(xs, groups) if group]
    for x, group in known:
        axes.plot([x] * len(group), [v * scale for v in group], "o", color=colour, alpha=0.35,
                  markersize=4, markeredgewidth=0)
    axes.plot([x for x, _ in known], [statistics.mean(g) * scale for _, g in known], marker=marker,
              color=colour, label=label, markersize=5)


def save_figure(figure, name, finding, out_dir, data=None):
    """Save OUT/figures/NAME.png (and .csv), and show it with its finding as caption and alt text.

    data: a list of dicts with what the figure shows.
    """
    folder = os.path.join(out_dir, "figures")
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(ValueError):  # a figure too small for its labels is shown as it is
        figure.tight_layout()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    with helpers.written_whole(os.path.join(folder, name + ".png"), "wb") as file:
        file.write(picture.getvalue())
    if data:
        helpers.save_table(os.path.join(folder, name + ".csv"), data)
    text = html.escape(finding)
    show_html(f'<figure><img alt="{text}" src="data:image/png;base64,'
              f'{base64.b64encode(picture.getvalue()).decode()}" style="max-width:100%">'
              f"<figcaption>{text}</figcaption></figure>")


def show_html(text):
    """Show HTML in a notebook; do nothing elsewhere."""
    if "IPython" in sys.modules:
        from IPython.display import HTML, display
        display(HTML(text))


def show_table(rows, columns=None):
    """Show a list of dicts as a table; every value is escaped."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[html.escape(str(row.get(column, ""))) for column in columns] for row in rows]
    show_html("<table><thead><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns)
              + "</tr></thead><tbody>" + "".join(
                  "<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
              + "</tbody></table>")


# ---- answers -----------------------------------------------------------------------------------

class Answers:
    """The answers of a notebook: shown as they are computed, kept as OUT/answers/NAME.json."""

    def __init__(self, name, out_dir, profile):
        self.name, self.out_dir, self.profile, self.rows = name, out_dir, profile, []

    def give(self, question, answer, figure="", holds=None):
        """Record an answer; holds: did the claim that was expected come out? None: no claim."""
        self.rows.append({"question": question, "answer": answer, "figure": figure,
                          "holds": holds})
        helpers.save_json(os.path.join(self.out_dir, "answers", self.name + ".json"), self.rows)
        claim = {True: "As expected.", False: "NOT as expected.", None: ""}[holds]
        show_html(f'<p class="answer"><strong>{html.escape(question)}</strong> '
                  f"{html.escape(answer)} <em>{claim}</em></p>")

    def table(self):
        """Show all answers in one table, with what the profile is good for."""
        show_table([{"question": r["question"], "answer": r["answer"], "figure": r["figure"],
                     "as expected": {True: "yes", False: "no", None: ""}[r["holds"]]}
                    for r in self.rows])
        if self.profile == "sample":
            print("Profile sample: synthetic reviews and a tiny BERT; indicative only.")


def banner(profile, model, data_dir, device=""):
    """Print which run this is: profile, data, model, stack, device."""
    device = helpers.pick_device(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"profile {profile} | data {data_dir} | model {model} | {where}")
    print(", ".join(f"{name} {version}" for name, version in VERSIONS.items()))
    if profile == "sample":
        print("Synthetic reviews and a tiny BERT: the machinery is real, the findings are "
              "indicative only.")
