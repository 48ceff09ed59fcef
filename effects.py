"""Trials as a table, and what can be concluded from them: intervals, verdicts, judgements.

    trials = as_table(rows)
    for effect in compare(trials, "clip_norm", base=0.0, by="lr"):
        print(effect.text)

One quantity is estimated throughout: the mean over training seeds AND reviews, of an accuracy or
of a difference of accuracies on the same seeds and reviews. Both are samples (Clark 1973, The
Language-as-Fixed-Effect Fallacy): another seed, or another dev set, would give another number, and
every interval holds both. The training reviews are fixed: what follows holds for these.
"""
from __future__ import annotations

import dataclasses
import math
from collections import namedtuple

import numpy as np
import pandas as pd

import files
import helpers
from files import InputError

# ---- trials as a table -------------------------------------------------------------------------

METRICS = ["dev_accuracy", "dev_loss", "train_accuracy", "train_loss"]


def as_table(rows):
    """Return trials' rows as a DataFrame, a row a trial.

    Columns: every key of Config, then METRICS (NaN where a trial has none), `failed` ("" or why),
    `correct` ("0110...", a digit a dev review), `history` (a list of dicts), seconds, n_train,
    n_dev. A key that a row does not hold (`precision` left to the machine) has its default.
    """
    defaults = vars(helpers.Config())
    table = [dict(defaults, **dict(row["config"], model=row["model"], device=row.get("device", ""),
                                   failed=row["mark"], correct=row["correct"],
                                   history=row["history"], seconds=row["seconds"],
                                   n_train=row["n_train"], n_dev=row["n_dev"],
                                   **{key: row["metrics"].get(key, math.nan) for key in METRICS}))
             for row in rows]
    return Trials(table, columns=[*defaults, *METRICS, "failed", "correct", "history", "seconds",
                                  "n_train", "n_dev"])


class Trials(pd.DataFrame):
    """A DataFrame that shows, of a table of trials, what differs between them and how they went.

    All other columns are there: trials.columns names them.
    """

    @property
    def _constructor(self):
        return Trials

    def shown(self):
        """Return the columns that are shown as an ordinary DataFrame; all, of other tables."""
        plain = pd.DataFrame(self)
        if not {"correct", "history", *METRICS} <= set(plain.columns):
            return plain
        settings = [key for key in vars(helpers.Config()) if key in plain.columns]
        varied = [key for key in settings if plain[key].nunique(dropna=False) > 1]
        if "data_seed" in varied and plain["data_seed"].equals(plain["seed"]):
            varied.remove("data_seed")
        failed = ["failed"] * bool((plain["failed"] != "").any())
        return plain[[*(varied or ["lr", "seed"]), *METRICS, *failed]].round(4)

    def __repr__(self):
        return repr(self.shown())

    def _repr_html_(self):
        return self.shown()._repr_html_()


# ---- the interval over seeds and reviews -------------------------------------------------------

MARGINS = {"sample": 1.5, "small": 1.5, "full": 0.5}  # points; a smaller difference is no matter
LEVEL = 0.05  # of tests; an interval holds 1 - LEVEL
FLOOR = 0.75  # the largest quarter that leaves no cell of the coverage test above 99 %

Estimate = namedtuple("Estimate", "mean half p")  # the interval: mean - half to mean + half


def margin_of(profile):
    """Return a profile's margin in points; for a profile of one's own that of small."""
    return MARGINS.get(profile, MARGINS["small"])


def variances(values):
    """Return (of the seeds, of the reviews, of their interaction): the mean's variance by each.

    values: (..., seeds, reviews). Cornfield & Tukey 1956: two random factors, crossed, one value a
    cell. The first two hold the interaction too, so seeds + reviews - interaction is unbiased.
    """
    n_seeds, n_reviews = values.shape[-2:]
    mean = values.mean((-2, -1), keepdims=True)
    by_seed = values.mean(-1, keepdims=True) - mean
    by_review = values.mean(-2, keepdims=True) - mean
    of_reviews = (by_review ** 2).sum((-2, -1)) / (n_reviews - 1) / n_reviews
    if n_seeds == 1:
        return 0 * of_reviews, of_reviews, 0 * of_reviews
    of_seeds = (by_seed ** 2).sum((-2, -1)) / (n_seeds - 1) / n_seeds
    left = values - mean - by_seed - by_review
    of_both = (left ** 2).sum((-2, -1)) / ((n_seeds - 1) * (n_reviews - 1)) / (n_seeds * n_reviews)
    return of_seeds, of_reviews, of_both


def half_width(parts, n_seeds, n_reviews, level=LEVEL):
    """Return half the width of the interval; parts: from `variances`, numbers or arrays.

    half^2 = max(t^2 seeds, FLOOR z^2 interaction) + z^2 max(0, reviews - interaction) + z^2 / n^2,
    with Student's t of n_seeds - 1 degrees and the normal z; sums of squared half-widths: Howe
    1974, Zou & Donner 2008. The floor: seeds that agree by chance must not hide that each is
    measured on some reviews. The last term: one review more that differs (Agresti & Min 2005), so
    that few or no differing reviews give no certainty. One seed: reviews alone.
    """
    from scipy.stats import norm
    from scipy.stats import t as student
    of_seeds, of_reviews, of_both = parts
    z = norm.isf(level / 2)
    t = student.isf(level / 2, n_seeds - 1) if n_seeds > 1 else 0.0
    return np.sqrt(np.maximum(t ** 2 * of_seeds, FLOOR * z ** 2 * of_both)
                   + z ** 2 * (np.maximum(0, of_reviews - of_both) + 1 / n_reviews ** 2))


def estimate(values):
    """Return the Estimate of the mean of values (seeds, reviews), its p that of a mean of 0.

    p is the level whose interval just reaches 0, so that p < 0.05 and "the 95 % interval leaves
    out 0" are the same statement.
    """
    from scipy.optimize import brentq
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] < 1 or values.shape[1] < 2:
        raise InputError(f"values of shape {values.shape}: an interval needs (seeds, reviews), of "
                         f"1 or more seeds and 2 or more reviews")
    mean, parts, sizes = float(values.mean()), variances(values), values.shape
    half = float(half_width(parts, *sizes))
    if mean == 0:
        return Estimate(mean, half, 1.0)

    def excess(exponent):
        return float(half_width(parts, *sizes, level=10 ** exponent)) - abs(mean)
    lowest = -300.0
    p = 10 ** brentq(excess, lowest, 0.0) if excess(lowest) > 0 else 0.0
    return Estimate(mean, half, float(p))


def number_of(n, noun):
    """Return a number with its noun: "1 seed", "3 seeds"."""
    return f"{n:,} {noun}{'s' * bool(n != 1)}"


def sample_size(trials):
    """Return how many seeds a setting has, and dev reviews, in words: "3 seeds, 2,000 reviews"."""
    settings = [key for key in vars(helpers.Config()) if key in trials
                and key not in ("seed", "data_seed", "device")]  # a diverged trial names none
    counts = trials.groupby(settings)["seed"].nunique()
    least = f"{counts.min()} to " * bool(counts.min() < counts.max())
    reviews = number_of(trials["n_dev"].max(), "review")
    return f"{least}{number_of(counts.max(), 'seed')}, {reviews}"


def as_array(correct):
    """Return "0110..." as an array of 0 and 1."""
    return np.frombuffer(correct.encode("ascii"), dtype=np.uint8) - np.float64(48)


def accuracy_interval(corrects):
    """Return (accuracy, low, high) in % of "0110..." strings on the same reviews, one a seed."""
    mean, half, _ = estimate(stack(map(as_array, corrects)))
    return 100 * mean, 100 * max(0.0, mean - half), 100 * min(1.0, mean + half)


def stack(arrays):
    """Return arrays of the same reviews as one, (seeds, reviews)."""
    arrays = list(arrays)
    if len({len(array) for array in arrays}) > 1:
        sizes = ", ".join(str(len(array)) for array in arrays)
        raise InputError(f"predictions of {sizes} reviews: give those of the same dev reviews")
    return np.stack(arrays)


def accuracies(trials, by, count_failed=False):
    """Return a DataFrame, a row for each value of `by` (a key, or a list of keys).

    Columns: by, accuracy, low, high (in %; NaN without a sound trial), seeds, reviews, failed.
    """
    keys = [by] if isinstance(by, str) else list(by)
    rows = []
    for values, cell in cells_of(trials, keys, count_failed).items():
        corrects = list(cell.by_seed.values())
        mean, half, _ = estimate(stack(corrects)) if corrects else (math.nan,) * 3
        rows.append(dict(zip(keys, values), accuracy=100 * mean,
                         low=100 * max(mean - half, 0.0),  # in this order NaN stays NaN
                         high=100 * min(mean + half, 1.0), seeds=len(corrects),
                         reviews=len(corrects[0]) if corrects else 0,
                         failed=cell.trials - len(corrects)))
    return pd.DataFrame(rows, columns=[*keys, "accuracy", "low", "high", "seeds", "reviews",
                                       "failed"])


# ---- effects and verdicts ----------------------------------------------------------------------

@dataclasses.dataclass(frozen=True, repr=False)
class Effect:
    """A difference of accuracies in points, its 95 % interval (unadjusted) and what follows.

    p_adjusted: by Holm over the `family` comparisons that were made together; NaN where there is
    no verdict on the methods: no pair of trials, or one seed.
    """

    names: tuple          # (what is judged, what it is compared with)
    difference: float     # points; more than 0: the first is the better
    low: float
    high: float
    p: float
    n_seeds: int
    n_reviews: int
    margin: float         # points: differences within +- margin are equivalent
    failed: int = 0       # trials left out because they failed
    where: str = ""       # what else is fixed, in words: "lr 2e-4"
    value: object = None  # of the key that was compared
    at: object = None     # value(s) of `by`; "interaction": of two effects, not of two accuracies
    p_adjusted: float = math.nan
    family: int = 1

    def __repr__(self):
        return self.text

    def _repr_html_(self):
        return Effects([self])._repr_html_()

    @property
    def is_within(self):
        """Tell whether the interval lies within +- margin."""
        return -self.margin < self.low and self.high < self.margin

    @property
    def verdict(self):
        """Return better, worse, equivalent or undecided."""
        if self.n_seeds < 2:
            return "undecided"
        if self.p_adjusted < LEVEL:
            return "better" if self.difference > 0 else "worse"
        return "equivalent" if self.is_within else "undecided"

    @property
    def word(self):
        """Return the verdict as one says it: an effect on an effect is larger, not better."""
        of_effects = {"better": "larger", "worse": "smaller"} if self.at == "interaction" else {}
        return of_effects.get(self.verdict, self.verdict)

    @property
    def text(self):
        """Return the effect as a sentence."""
        first, second = self.names
        head = f"{first} against {second}" + (f", {self.where}" if self.where else "")
        out = f"; {number_of(self.failed, 'failed trial')} left out" if self.failed else ""
        if self.n_seeds == 0:
            return f"{head}: no trials to compare{out}."
        unadjusted = "unadjusted " * (self.n_seeds > 1 and self.family > 1)
        return (f"{head}: {self.difference:+.1f} points ({unadjusted}95 % interval "
                f"{self.low:+.1f} to {self.high:+.1f}; {number_of(self.n_seeds, 'seed')}, "
                f"{number_of(self.n_reviews, 'review')}{out}): {self.verdict_words()}.")

    def verdict_words(self):
        """Return the verdict as the end of a sentence."""
        if self.n_seeds < 2:
            return "of these two models; undecided for the methods, which need more seeds"
        if self.verdict == "equivalent":
            return f"equivalent within {self.margin:g} points"
        if self.verdict == "undecided":
            why = f" (p = {self.p_adjusted:.2g} by Holm over {self.family} comparisons)"
            return "undecided" + why * bool(self.family > 1 and not self.low <= 0 <= self.high)
        p = "p < 0.001" if self.p_adjusted < 0.001 else f"p = {self.p_adjusted:.2g}"
        holm = f" by Holm over {self.family} comparisons" if self.family > 1 else ""
        small = f", by less than {self.margin:g} points" * self.is_within
        return f"{self.word}{small} ({p}{holm})"


def short(value):
    """Return a value as one writes it: 2e-4, 0.1, tail."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def holm(p_values):
    """Return p-values adjusted by Holm 1979; NaN takes no part."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted


def as_family(effects):
    """Return effects with p adjusted over all of them: the family that a page judges together."""
    p_values = holm([effect.p if effect.n_seeds > 1 else math.nan for effect in effects])
    size = sum(not math.isnan(p) for p in p_values)
    return Effects(dataclasses.replace(effect, p_adjusted=p, family=max(1, size))
                   for effect, p in zip(effects, p_values))


class Effects(list):
    """A family of Effects, which a notebook shows as a table."""

    def __repr__(self):
        return "\n".join(effect.text for effect in self)

    def _repr_html_(self):
        table = effects_table(self)
        if not any(effect.where for effect in self):
            table = table.drop(columns="where", errors="ignore")
        return files.html_table(table.to_dict("records"))


Cell = namedtuple("Cell", "by_seed trials")  # {(seed, data_seed): 0/1 a review}; number of trials


def cells_of(trials, keys, count_failed=False):
    """Return {values of the keys: Cell}, in the order of the values.

    count_failed: trials that collapsed to one class take part, where collapsing is the outcome.
    """
    columns = [*keys, "seed", "data_seed"]
    twice = trials[trials.duplicated(columns)]
    if len(twice):
        twin = in_words(columns, [twice.iloc[0][key] for key in columns])
        raise InputError(f"two trials with {twin}: choose rows that differ in nothing else")
    cells = {}
    for row in trials.to_dict("records"):
        values, seed = tuple(row[key] for key in keys), (row["seed"], row["data_seed"])
        by_seed, number = cells.get(values, ({}, 0))
        if row["correct"] and (count_failed or not row["failed"]):
            by_seed[seed] = as_array(row["correct"])
        cells[values] = Cell(by_seed, number + 1)
    return {values: cells[values] for values in sorted(cells)}


def in_words(keys, values):
    """Return keys with their values: "lr 2e-4, keep tail"."""
    return ", ".join(f"{key} {short(value)}" for key, value in zip(keys, values))


def contrast(cells, weights, margin, names, **more):
    """Return the Effect of a weighted sum of cells, on the seeds that all of them have.

    cells: from `cells_of`; weights: {values: weight}, which add up to 0. No verdict before
    `as_family` has said with how many others it is judged.
    """
    parts = {values: cells.get(values, Cell({}, 0)) for values in weights}
    seeds = sorted(set.intersection(*(set(cell.by_seed) for cell in parts.values())))
    failed = sum(cell.trials - len(cell.by_seed) for cell in parts.values())
    if not seeds:
        return Effect(names, *[math.nan] * 4, 0, 0, margin, failed, **more)
    corrects = stack(cell.by_seed[seed] for cell in parts.values() for seed in seeds)
    values = np.tensordot(list(weights.values()), corrects.reshape(len(parts), len(seeds), -1), 1)
    mean, half, p = estimate(values)
    return Effect(names, 100 * mean, 100 * (mean - half), 100 * (mean + half), p, len(seeds),
                  values.shape[1], margin, failed, **more)


def compare(trials, key, base, by=None, margin=MARGINS["small"], count_failed=False, names=None):
    """Return the Effects of each value of `key` against `base`, on the same seeds: one family.

    by: a key, or a list of keys, at each of whose values the comparison is made apart. names:
    {value of key: its name in a sentence}.
    """
    fixed = [] if by is None else [by] if isinstance(by, str) else list(by)
    cells, names = cells_of(trials, [*fixed, key], count_failed), names or {}
    if base not in {values[-1] for values in cells}:
        raise InputError(f"no trial with {key} = {base!r}; there are "
                         f"{', '.join(short(values[-1]) for values in cells) or 'no trials'}")

    return as_family([
        contrast(cells, {values: 1, values[:-1] + (base,): -1}, margin,
                 (names.get(values[-1], f"{key} {short(values[-1])}"),
                  names.get(base, short(base))), where=in_words(fixed, values), value=values[-1],
                 at=values[0] if len(fixed) == 1 else values[:-1])
        for values in cells if values[-1] != base])


def compare_to(trials, correct, name, margin=MARGINS["small"], count_failed=False, what="BERT"):
    """Return the Effect of trials of one setting against predictions that come from no trial.

    correct: the baseline's "0110..." on the same reviews, the same for every seed.
    """
    cell = cells_of(trials, [], count_failed).get((), Cell({}, 0))
    other = Cell(dict.fromkeys(cell.by_seed, as_array(correct)), len(cell.by_seed))
    return as_family([contrast({(what,): cell, (name,): other}, {(what,): 1, (name,): -1}, margin,
                               (what, name), value=name)])[0]


def factorial(trials, a, b, base=None, margin=MARGINS["small"], count_failed=False):
    """Return main effects and interactions of two crossed keys: one family of Effects.

    A main effect: a value against the base's, averaged over all values of the other key. An
    interaction: by how much the effect of a value of `a` is larger at a value of `b` than at b's
    base. base: (value of a, value of b); the least ones without it.
    """
    cells = cells_of(trials, [a, b], count_failed)
    levels = [sorted({values[side] for values in cells}) for side in (0, 1)]
    base = base or tuple(values[0] for values in levels)
    effects = []
    for side, key in enumerate((a, b)):
        others = levels[1 - side]
        for value in levels[side]:
            if value != base[side]:
                weights = {}
                for other in others:
                    weights[(value, other)[::1 - 2 * side]] = 1 / len(others)
                    weights[(base[side], other)[::1 - 2 * side]] = -1 / len(others)
                effects.append(contrast(cells, weights, margin, (
                    f"{key} {short(value)}", short(base[side])), value=value,
                    where=f"averaged over {(b, a)[side]}", at=key))
    for x in levels[0]:
        for y in levels[1]:
            if x != base[0] and y != base[1]:
                weights = {(x, y): 1, (base[0], y): -1, (x, base[1]): -1, base: 1}
                effects.append(contrast(cells, weights, margin, (
                    f"the effect of {a} {short(x)} (over {short(base[0])}) at {b} {short(y)}",
                    f"its effect at {b} {short(base[1])}"), value=(x, y), at="interaction"))
    return as_family(effects)


def effects_table(effects):
    """Return effects as a DataFrame to show."""
    return pd.DataFrame([{
        "comparison": " against ".join(effect.names), "where": effect.where,
        "points": round(effect.difference, 1),
        "95 % interval, unadjusted": f"{effect.low:+.1f} to {effect.high:+.1f}",
        "p by Holm": f"{effect.p_adjusted:.2g}",
        "verdict": effect.word if effect.n_seeds else "not measured",
        "seeds": effect.n_seeds, "left out": effect.failed} for effect in effects])


# ---- what follows ------------------------------------------------------------------------------

def judge(effects, expected):
    """Return supported, contradicted or undecided: an expectation of all the effects together.

    expected: better, worse, different or equivalent. No difference is supported by equivalence
    alone, a better (worse) one is contradicted by equivalence too. One contradiction is enough.
    """
    if expected not in ("better", "worse", "different", "equivalent"):
        raise InputError(f"expected={expected!r}: better, worse, different or equivalent")
    found = [judge_one(effect, expected) for effect in effects]
    if "contradicted" in found:
        return "contradicted"
    return "supported" if found and set(found) == {"supported"} else "undecided"


def judge_one(effect, expected):
    """Return supported, contradicted or undecided of one effect."""
    if effect.verdict == "undecided":
        return "undecided"
    if expected == "equivalent":
        return "supported" if effect.is_within else "contradicted"
    if expected == "different":
        return "contradicted" if effect.verdict == "equivalent" else "supported"
    return "supported" if effect.verdict == expected else "contradicted"


def smallest_enough(trials, key="words", whole=0, margin=MARGINS["small"]):
    """Return the smallest value of `key` shown to lose less than the margin to `whole`, or None.

    Shown: the interval's lower end lies above -margin, with two or more seeds.
    """
    enough = [effect.value for effect in compare(trials, key, whole, margin=margin)
              if effect.n_seeds > 1 and effect.low > -margin]
    return min(enough, default=None)


Best = namedtuple("Best", "value at_edge left_out")  # left_out: values that failed on some seeds


def best(trials, key):
    """Return the Best value of `key` by mean dev accuracy, then by dev loss: a choice, no test.

    The values with the fewest failed trials compete, on the seeds that all of these have: who
    fails on some seeds is not the best by those survived. at_edge: no value beyond it was tried,
    so a wider grid may do better; never so for 0, beyond which nothing lies (0 words, or a
    clipping norm of 0, is no limit), nor for what has no order.
    """
    tried = sorted(set(trials[key]), key=lambda value: place(key, value))
    groups = {value: trials[trials[key] == value] for value in tried}
    failures = {value: int((group["failed"] != "").sum()) for value, group in groups.items()}
    fewest = min(failures.values(), default=0)
    competing = {value: group[group["failed"] == ""].set_index(["seed", "data_seed"])
                 for value, group in groups.items() if failures[value] == fewest}
    shared = set.intersection(*(set(group.index) for group in competing.values())) \
        if competing else set()
    if not shared:
        raise InputError(f"no seed came to a sound end with every value of {key}; see why in the "
                         f"trials' column failed")

    def quality(value):
        rows = competing[value].loc[sorted(shared)]
        return rows["dev_accuracy"].mean(), -rows["dev_loss"].mean()
    value = max(competing, key=quality)
    ordered = not isinstance(value, (str, bool, np.bool_))
    return Best(value, ordered and bool(value != 0) and value in (tried[0], tried[-1]),
                [x for x in tried if x not in competing])


def place(key, value):
    """Return what a value is sorted by: 0 words, or a clipping norm of 0, is no limit."""
    return math.inf if key in ("words", "clip_norm") and value == 0 else value


def smallest_visible(n_seeds, n_reviews, sd=1.0, discordant=0.10, persisting=0.1, level=LEVEL,
                     power=0.8):
    """Return the smallest true difference, in points, that a test sees with this power.

    sd: of the methods' difference over seeds, in points, were there infinitely many reviews.
    discordant: share of reviews that one arm of a pair has right and the other wrong; persisting:
    share of these that are the same with every seed: what 15 comparisons of the reference run
    had in the middle. level: LEVEL / m for the hardest of m comparisons.
    The squared distances that seeds alone (noncentral t) and reviews alone (normal) need add up.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, norm
    from scipy.stats import t as student
    each = discordant / n_reviews
    steady = each * (persisting if n_seeds > 1 else 1)
    of_reviews = steady * (norm.isf(level / 2) + norm.isf(1 - power)) ** 2
    if n_seeds == 1:
        return 100 * math.sqrt(of_reviews)
    t = student.isf(level / 2, n_seeds - 1)
    needed = brentq(lambda x: nct.sf(t, n_seeds - 1, x) - power, 1e-3, t * 10)
    of_seeds = needed ** 2 * ((sd / 100) ** 2 + each - steady) / n_seeds
    return 100 * math.sqrt(of_seeds + of_reviews)
