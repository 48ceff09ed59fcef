"""Look at where the recipe is right and where not: a page with three figures, of its predictions.

    python evaluate.py --data data/FILIMDB ... --out build/preds.tsv --json build/run.json \\
        --scores build/scores.tsv --save build/classifier
    python analysis.py build/run.json build/preds.tsv --scores build/scores.tsv \\
        --load build/classifier
    python analysis.py build/run.json build/preds.tsv --texts    # the drawn errors, to be read

`make recipe` does the first two; of the recipe that is kept, RECORD and PREDICTIONS are
recipe.json and preds.tsv.gz of results/reference. README.md and figures go to
results/reference/analysis. Without --scores there is no calibration; without --load dev reviews
are not cut to the lengths of short ones (which takes their classification). What a reader found in
the drawn errors of dev stands in results/reference/errors.tsv, without the texts, a line
`PART/INDEX<TAB>kind<TAB>note` each; the page lists those that nobody has read yet.
Exit code: 0 done, 2 wrong use.
"""
import argparse
import os
import sys
from collections import Counter, namedtuple

import numpy as np

import effects
import figures
import helpers
from files import InputError, nearest, open_atomically
from helpers import LABELS
from reference import REFERENCE, listed, percent, read_column, read_json, table_row, trained_for

PAGE = os.path.join(REFERENCE, "analysis")
ERRORS = os.path.join(REFERENCE, "errors.tsv")
MAIN = "keep", "seq_len", "lr"  # settings that are named even where they have their defaults
DRAWN = 100    # errors of dev to be read
BINS = 10      # of probabilities, equally wide
DRAWS = 10000  # of a simulation
PAIRS = {"test": "dev", "test-b": "dev-b"}  # whose errors tell of which part without labels
KINDS = {  # of errors: what a reader means by it
    "negation": "a negated or weakened word decides (not bad, hardly fails)",
    "mixed verdict": "praise and blame, and the verdict hangs on how they are weighed",
    "plot mood": "the story's sadness or joy is taken for the verdict",
    "irony": "the words say the opposite of what is meant",
    "comparison": "the verdict is on another film, book or actor",
    "cut": "what decides stands in the words that were not read",
    "plain": "a plain verdict, read and missed",
    "label doubtful": "a reader would give the other label, or none"}

# truth, said: 0 neg, 1 pos, a number a review (truth is None without labels); chance: of pos.
Reviews = namedtuple("Reviews", "ids texts truth said chance")


# ---- reading ------------------------------------------------------------------------------------

def read_parts(data_dir, predictions, scores=""):
    """Return {part: Reviews} of all parts but train; refuse predictions of other reviews."""
    said, parts = read_column(predictions), {}
    if set(said.values()) - set(LABELS):
        raise InputError(f"{predictions}: holds other than {' and '.join(LABELS)}; give what "
                         f"--out wrote")
    chance = read_column(scores) if scores else {}
    try:
        chance = {i: float(value) for i, value in chance.items()}
    except ValueError:
        raise InputError(f"{scores}: holds other than numbers; give what --scores wrote") from None
    for name, part in helpers.load_filimdb(data_dir).items():
        for path, values in ((predictions, said), (scores, chance)):
            lacking = [i for i in part.ids if path and i not in values]
            if lacking:
                raise InputError(f"{path}: says nothing of {lacking[0]}; give what is of all of "
                                 f"{data_dir}")
        if name != "train":
            truth = part.labels and np.array([LABELS.index(label) for label in part.labels])
            parts[name] = Reviews(part.ids, part.texts, truth,
                                  np.array([LABELS.index(said[i]) for i in part.ids]),
                                  np.array([chance.get(i, np.nan) for i in part.ids]))
    return parts


def read_kinds(path, ids):
    """Return {id: kind} of those drawn errors that a reader has labelled."""
    kinds = {}
    if os.path.exists(path):
        for number, line in enumerate(helpers.read_lines(path), 1):
            review, kind, *_ = line.split("\t") + [""]
            if kind not in KINDS:
                raise InputError(f"{path}: line {number}: kind {kind!r}{nearest(kind, KINDS)}")
            if review in kinds:
                raise InputError(f"{path}: line {number}: {review} stands there twice")
            kinds[review] = kind
    return {i: kinds[i] for i in ids if i in kinds}


# ---- what can be said ---------------------------------------------------------------------------

def share(count, n):
    """Return (share, low, high) in %, with the 95 % interval of Clopper & Pearson 1934."""
    from scipy.stats import beta
    low = beta.ppf(effects.LEVEL / 2, count, n - count + 1) if count else 0.0
    high = beta.isf(effects.LEVEL / 2, count + 1, n - count) if count < n else 1.0
    return 100 * count / n, 100 * low, 100 * high


def accuracy(part):
    """Return (accuracy, low, high) of a part in %."""
    return share(int((part.said == part.truth).sum()), len(part.ids))


def bins_of(chance):
    """Return the number of the bin of each probability."""
    return np.minimum((BINS * chance).astype(int), BINS - 1)


def calibration_error(chance, truth):
    """Return the expected calibration error in points: Guo et al. 2017, equation 3.

    Of the probability of pos, in BINS bins, each with its number of reviews as weight.
    """
    return 100 * float(np.abs(np.bincount(bins_of(chance), chance - truth)).sum()) / len(truth)


def error_by_chance(chance):
    """Return the calibration error that perfect probabilities exceed in 5 % of samples."""
    random = np.random.RandomState(0)
    return float(np.percentile([calibration_error(chance, random.rand(len(chance)) < chance)
                                for _ in range(DRAWS // 20)], 95))


def reliability(chance, truth):
    """Return a dict a bin: its mean probability of pos, the share that is pos, in %, and n."""
    number, rows = bins_of(chance), []
    for i in sorted(set(number)):
        here = number == i
        value, low, high = share(int(truth[here].sum()), int(here.sum()))
        rows.append({"probability": 100 * chance[here].mean(), "pos": value, "low": low,
                     "high": high, "n": int(here.sum())})
    return rows


def words_of(texts):
    """Return the number of words of each text."""
    return np.array([len(text.split()) for text in texts])


def by_length(lengths, right, n_bins):
    """Return a dict a bin of about as many reviews: words from, to, median; accuracy in %, n."""
    rows = []
    for some in np.array_split(np.argsort(lengths, kind="stable"), min(n_bins, len(lengths))):
        value, low, high = share(int(right[some].sum()), len(some))
        rows.append({"from": int(lengths[some].min()), "to": int(lengths[some].max()),
                     "words": float(np.median(lengths[some])), "accuracy": value, "low": low,
                     "high": high, "n": len(some)})
    return rows


def cut_to(texts, lengths, keep):
    """Return texts, each cut to a number of words that is drawn from `lengths`."""
    drawn = np.random.RandomState(0).choice(np.maximum(lengths, 1), len(texts))  # 0 is all
    return [helpers.truncate_words(text, int(k), keep) for text, k in zip(texts, drawn)]


def difference(first, second, paired):
    """Return (difference, low, high) in points of two arrays of shares or of 0 and 1."""
    if paired:
        mean, half, _ = effects.estimate([first * 1.0 - second])
    else:
        mean = first.mean() - second.mean()
        half = np.hypot(*(effects.estimate([one * 1.0]).half for one in (first, second)))
    return 100 * mean, 100 * (mean - half), 100 * (mean + half)


def draw_errors(part):
    """Return the places of DRAWN errors; those of another model on the same reviews overlap."""
    order = np.random.RandomState(0).permutation(len(part.ids))
    return [int(i) for i in order if part.said[i] != part.truth[i]][:DRAWN]


def expected_accuracy(labelled, other):
    """Return (median, low, high) in % of the accuracy on reviews without labels.

    If the model errs on each class as often as on the labelled part: the share of pos follows
    from how many are predicted so (Rogan & Gladen 1978), the accuracy from both. The 95 % interval
    holds the chance in all three counts (Jeffreys' prior) and in the other part's own reviews.
    """
    random, n = np.random.RandomState(0), len(other.ids)

    def rate(hits):
        return random.beta(hits.sum() + 0.5, len(hits) - hits.sum() + 0.5, DRAWS)
    right_neg, right_pos = (rate(labelled.said[labelled.truth == i] == i) for i in (0, 1))
    share_pos = (rate(other.said == 1) + right_neg - 1) / (right_pos + right_neg - 1)
    share_pos = np.clip(share_pos, 0, 1)
    seen = random.binomial(n, share_pos * right_pos + (1 - share_pos) * right_neg) / n
    return tuple(np.percentile(100 * seen, [50, 2.5, 97.5]))


# ---- the page -----------------------------------------------------------------------------------

def confusion_text(parts):
    """Return the table of labels given, and of how many of them are right."""
    lines = ["## Right and wrong", "",
             "| part | label | predicted neg | predicted pos | recall |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        for i, label in enumerate(LABELS):
            said = np.bincount(part.said[part.truth == i], minlength=2)
            lines.append(table_row(name, label, f"{said[0]:,}", f"{said[1]:,}", percent(
                *share(int(said[i]), int(said.sum()))) if said.sum() else "none there"))
        lines.append(table_row(name, "both", "", "", f"**{percent(*accuracy(part))}**"))
    return lines


def calibration_text(parts, out):
    """Return what there is on calibration, and draw the first figure."""
    lines = ["", "## Do the probabilities mean what they say?", ""]
    if any(np.isnan(part.chance).any() for part in parts.values()):
        return [*lines, "Not measured: no probabilities were given (--scores)."]
    figure, [axes, counts] = figures.new_figure(2)
    axes.plot([0, 100], [0, 100], "--", color=figures.GREY, label="perfect")
    said, data = [], []
    for (name, part), colour, mark in zip(parts.items(), figures.COLOURS, "os^v"):
        rows = reliability(part.chance, part.truth)
        data += [dict(part=name, **row) for row in rows]
        draw_interval(axes, [row["probability"] for row in rows], rows, "pos", colour, name, mark)
        counts.plot([row["probability"] for row in rows],
                    [100 * row["n"] / len(part.ids) for row in rows], mark + "-", color=colour)
        error, by_chance = calibration_error(part.chance, part.truth), error_by_chance(part.chance)
        sure = np.maximum(part.chance, 1 - part.chance)  # the probability of the label predicted
        more, low, high = difference(sure, part.said == part.truth, True)
        verdict = ("as far as can be seen" if error <= by_chance else "no, too sure" if low > 0
                   else "no, too unsure" if high < 0 else
                   "no, though neither too sure nor too unsure on the whole")
        said.append(f"On {name} {verdict}: the labels predicted have {100 * sure.mean():.1f} % on "
                    f"average, {accuracy(part)[0]:.1f} % of them are right ({more:+.1f} points, "
                    f"{low:+.1f} to {high:+.1f}); expected calibration error {error:.1f} "
                    f"points (by chance alone up to {by_chance:.1f}, in 95 % of samples).")
    axes.set(xlabel="probability of pos, %", ylabel="reviews that are pos, %")
    counts.set(xlabel="probability of pos, %", ylabel="share of reviews, %")
    axes.legend(loc="upper left")
    return lines + picture(figure, "calibration", " ".join(said), out, data, (
        f"Share of positive reviews by the probability given, in {BINS} bins with 95 % intervals, "
        f"beside the diagonal of perfect calibration; at the right how many reviews get which."))


def length_text(parts, params, out):
    """Return what there is on length, and draw the second figure."""
    figure, [axes] = figures.new_figure()
    data, right = [], {name: part.said == part.truth for name, part in parts.items()}
    lengths = {name: words_of(part.texts) for name, part in parts.items()}
    said = []
    if params and {"dev", "dev-b"} <= set(parts):
        whole, short = (accuracy(parts[name])[0] for name in ("dev", "dev-b"))
        said.append(f"dev {whole:.1f} %, dev-b {short:.1f} %: {whole - short:.1f} points apart.")
        for keep in ("head", "tail"):
            texts, name = cut_to(parts["dev"].texts, lengths["dev-b"], keep), f"{keep} of dev"
            right[name] = np.array([LABELS.index(label) for label in helpers.classify(
                texts, params)]) == parts["dev"].truth
            lengths[name] = words_of(texts)
            said.append(f"dev reviews cut to the {keep} of as many words as a dev-b review has: "
                        f"{100 * right[name].mean():.1f} %. Cutting takes "
                        f"{in_points(difference(right['dev'], right[name], True))}, of which the "
                        f"verdict that stood elsewhere is a part; a dev-b review, as long but "
                        f"whole, is classified rightly more often by "
                        f"{in_points(difference(right['dev-b'], right[name], False))}.")
    for (name, hits), colour, mark in zip(right.items(), figures.COLOURS, "os^vDP"):
        rows = by_length(lengths[name], hits, 8 if name == "dev" else 4)
        data += [dict(part=name, **row) for row in rows]
        draw_interval(axes, [row["words"] for row in rows], rows, "accuracy", colour, name, mark)
    figures.log_axis(axes, [2 ** k for k in range(1, 12)
                            if min(row["words"] for row in data) / 2 < 2 ** k
                            < 2 * max(row["words"] for row in data)])
    axes.set(xlabel="words of a review", ylabel="accuracy, %")
    axes.legend(loc="best")
    found = {name: [row["accuracy"] for row in data if row["part"] == name] for name in right}
    finding = "From bin to bin: " + "; ".join(
        f"{name} {min(found[name]):.1f} to {max(found[name]):.1f} %" for name in right) + "."
    drawn = picture(figure, "accuracy_by_length", finding, out, data, (
        f"Accuracy by number of words with 95 % intervals, in bins of as many reviews: "
        f"{listed(right)}."))
    lacking = [] if said else ["", "What cutting dev reviews to the lengths of dev-b does was not "
                               "measured: that takes the classifier (--load)."]
    return ["", "## Accuracy by length", "", *drawn, *(
        line for one in said for line in ("", one[:1].upper() + one[1:])), *lacking]


def errors_text(dev, path, out):
    """Return what a reader found in the drawn errors, and draw the third figure."""
    ids = [dev.ids[i] for i in draw_errors(dev)]
    kinds, lines = read_kinds(path, ids), ["", "## Errors on dev, by kind", ""]
    unread = [i for i in ids if i not in kinds]
    lines += [f"{len(ids)} of {int((dev.said != dev.truth).sum()):,} errors were drawn by a fixed "
              f"seed; one reader has labelled {len(kinds)} of them (errors.tsv)."]
    if kinds:
        rows, truth = [], dict(zip(dev.ids, dev.truth))
        for kind, count in Counter(kinds.values()).most_common():
            value, low, high = share(count, len(kinds))
            false_pos = sum(kinds[i] == kind and truth[i] == 0 for i in kinds)
            rows.append({"kind": kind, "n": count, "share": value, "low": low, "high": high,
                         "false pos": false_pos, "false neg": count - false_pos})
        figure, [axes] = figures.new_figure(height=0.8 + 0.4 * len(rows))
        heights = range(len(rows))[::-1]
        axes.barh(heights, [row["share"] for row in rows], color=figures.COLOURS[0], xerr=[
            [row["share"] - row["low"] for row in rows],
            [row["high"] - row["share"] for row in rows]], ecolor=figures.GREY, capsize=3)
        axes.set_yticks(heights)
        axes.set_yticklabels([row["kind"] for row in rows])
        axes.set(xlabel="of the errors that were read, %")
        lines += ["", "| kind | what it means | false pos | false neg | of those read |",
                  "|---|---|---|---|---|"]
        lines += [table_row(row["kind"], KINDS[row["kind"]], row["false pos"],
                            row["false neg"], percent(row["share"], row["low"], row["high"]))
                  for row in rows] + [""]
        top = rows[0]
        lines += picture(figure, "errors_by_kind", (
            f"The commonest kind: {top['kind']}, "
            f"{percent(top['share'], top['low'], top['high'])} of {len(kinds)} errors."), out,
            rows, f"Shares of {len(rows)} kinds of errors as bars with 95 % intervals.")
    return lines + (["", f"Not read yet: {listed(unread)}."] if unread else [])


def unlabelled_text(parts):
    """Return the table of parts without labels: how many are predicted pos, what to expect."""
    lines = ["", "## What is to be expected without labels", "",
             "If each class is mistaken as often as in the part named (Rogan & Gladen 1978); the "
             "interval, of 95 %, also holds the chance in the reviews themselves.", "",
             "| part | reviews | predicted pos | accuracy to be expected | errors as in |",
             "|---|---|---|---|---|"]
    for name, source in PAIRS.items():
        if name in parts and source in parts and parts[source].truth is not None:
            part = parts[name]
            lines.append(table_row(
                name, f"{len(part.ids):,}", percent(*share(int(part.said.sum()), len(part.ids))),
                percent(*expected_accuracy(parts[source], part)), source))
    return lines


def in_points(values):
    """Return a difference as text: "3.1 points (2.2 to 4.0)"."""
    return "{:.1f} points ({:.1f} to {:.1f})".format(*values)


def draw_interval(axes, xs, rows, key, colour, name, mark):
    """Plot a row's value over xs, with its interval."""
    heights = [[row[key] - row["low"] for row in rows], [row["high"] - row[key] for row in rows]]
    axes.errorbar(xs, [row[key] for row in rows], yerr=heights, fmt=mark + "-", color=colour,
                  markersize=5, capsize=3, elinewidth=1.2, label=name)


def picture(figure, name, finding, out, data, alt):
    """Save a figure with its data; return the page's lines that show it."""
    figures.save_figure(figure, name, finding, out, data, alt)
    return [f"![{alt}](figures/{name}.png)", "", f"{finding} ([numbers](figures/{name}.csv))"]


def page_of(record, parts, params, errors, out):
    """Return the page as text; its figures are written beside it."""
    labelled = {name: part for name, part in parts.items() if part.truth is not None}
    minutes = listed(f"{phase} {value:.1f}" for phase, value in sorted(record["minutes"].items()))
    config = helpers.make_config()
    set_to = listed(f"{key}={value:.1f}" if key == "max_minutes" else f"{key}={value}"
                    for key, value in sorted(record["settings"].items())  # an older one has more
                    if key in MAIN or value != getattr(config, key, value))
    lines = ["# Where the recipe is right and where not", "",
             f"Written by `analysis.py`. The model: {record['model'] or record['load']}, "
             f"{record['seen']}; {set_to}; all else by default. Minutes: {minutes} "
             f"({record['device']}, {record['cores']} cores){trained_for(record)}. Intervals are "
             f"of 95 %, over reviews, of this one model.", ""]
    lines += confusion_text(labelled) + calibration_text(labelled, out)
    lines += length_text(labelled, params, out) + errors_text(labelled["dev"], errors, out)
    return "\n".join(lines + unlabelled_text(parts)) + "\n"


def show_errors(dev, errors):
    """Print the drawn errors with their texts, those first that nobody has read yet."""
    drawn = draw_errors(dev)
    kinds = read_kinds(errors, [dev.ids[i] for i in drawn])
    for i in sorted(drawn, key=lambda i: dev.ids[i] in kinds):
        print(f"\n{dev.ids[i]}\tis {LABELS[dev.truth[i]]}, predicted {LABELS[dev.said[i]]}, "
              f"{kinds.get(dev.ids[i], 'not read yet')}\n{dev.texts[i]}")
    print(f"\nkinds: {listed(KINDS)}; a line ID<TAB>kind<TAB>note each goes to {errors}")


def main(argv=None):
    """Write the page, or print the drawn errors; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", help="what evaluate.py --json wrote")
    parser.add_argument("predictions", help="what its --out is")
    parser.add_argument("--scores", default="", help="what its --scores wrote")
    parser.add_argument("--load", help="the classifier that its --save kept")
    parser.add_argument("--data", help="folder in FILIMDB's layout (default: the record's)")
    parser.add_argument("--errors", default=ERRORS, help="what readers found in errors")
    parser.add_argument("--out", default=PAGE, help="folder of the page")
    parser.add_argument("--texts", action="store_true", help="only print the drawn errors")
    args = parser.parse_args(argv)
    try:
        if not os.path.isfile(args.record):
            raise InputError(f"{args.record}: no such file; evaluate.py --json writes it")
        record = read_json(args.record)
        parts = read_parts(args.data or record["data"], args.predictions, args.scores)
        if "dev" not in parts or parts["dev"].truth is None:
            raise InputError("dev with its labels is needed to analyse errors; `make data` "
                             "fetches it")
        if args.texts:
            show_errors(parts["dev"], args.errors)
            return 0
        params = helpers.load_classifier(args.load) if args.load else None
        text = page_of(record, parts, params, args.errors, args.out)
        path = os.path.join(args.out, "README.md")
        with open_atomically(path) as file:
            file.write(text)
        print(path)
    except InputError as error:
        print(f"analysis.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
