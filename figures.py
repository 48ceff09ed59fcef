"""Figures, tables and answers: what a study's notebook draws and shows.

    figure, panels = new_figure(2)
    plot_learning_curves(panels, {"lr 1e-3": rows}, {"lr 1e-3": COLOURS[0]})
    save_figure(figure, "curves", "Both losses fall.", "build/sample")

Each line is labelled at its end, single seeds are visible beside their mean, and a figure is
saved with its data and with its finding as caption and alt text. Numbers come from studies.py.
"""
from __future__ import annotations

import base64
import contextlib
import html
import inspect
import io
import itertools
import math
import os
import statistics
import sys
import textwrap

import numpy as np

import effects
import files
import runtime
from assignment import POINTS
from files import InputError
from runtime import VERSIONS
from studies import (
    counted,
    cut_shares,
    device_name,
    rows_of,
    series,
    show_html,
    spread,
    values_of,
)

# ---- one look -----------------------------------------------------------------------------------

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
GREY = "#555555"  # of floors: what has to be beaten


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


def label_ends(axes, ends, gap=0.085):
    """Write {text: (y of its line's end, colour)} beside the axes, pushed apart where they meet.

    Call it last: the places are those of the limits and the scale that the axes have now.
    """
    x, _ = axes.get_xlim()[1], axes.get_ylim()  # asking for them brings them up to date
    to_axes = axes.transData + axes.transAxes.inverted()
    at = sorted((to_axes.transform((x, y))[1], text, colour)
                for text, (y, colour) in ends.items() if not math.isnan(y))
    heights = [height for height, _, _ in at]
    for _ in range(50):
        for i in range(len(heights) - 1):
            push = max(0, (gap - heights[i + 1] + heights[i]) / 2)
            heights[i], heights[i + 1] = heights[i] - push, heights[i + 1] + push
    for height, (_, text, colour) in zip(heights, at):
        axes.text(1.02, height, text, color=colour, transform=axes.transAxes, va="center")


def name_ticks(axes, names):
    """Put names at x = 0, 1, 2 ..."""
    axes.set_xticks(range(len(names)))
    axes.set_xticklabels(names)
    axes.set_xlim(-0.5, len(names) - 0.5)


def same_limits(panels):
    """Give all panels one y scale, written at the first alone."""
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        axes.tick_params(labelleft=axes is panels[0])


def plot_seeds(axes, xs, groups, colour, percent=True):
    """Plot the mean of each x's group as a line, every seed as a point; return where it ends.

    groups: for each x the list of values (floats) of its seeds.
    """
    scale = 100 if percent else 1
    known = [(x, [scale * v for v in group]) for x, group in zip(xs, groups) if group]
    for x, group in known:
        axes.plot([x] * len(group), group, "o", color=colour, alpha=0.4, markersize=6.5,
                  markeredgewidth=0)
    means = [statistics.mean(group) for _, group in known]
    axes.plot([x for x, _ in known], means, "o-", color=colour, markersize=3.5)
    return means[-1] if means else math.nan


def plot_arms(axes, xs, arms, colours, floors=None):
    """Plot {name: groups of accuracies, one for each x}, the names at the lines' ends.

    floors: {name: accuracies, one for each x} of what has to be beaten, dashed. The x axis gets
    its scale before.
    """
    ends = {name: (plot_seeds(axes, xs, groups, colours[name]), colours[name])
            for name, groups in arms.items()}
    mark = {"marker": "_", "markersize": 40} if len(xs) == 1 else {}  # a line of one point is none
    for name, values in (floors or {}).items():
        axes.plot(xs, [100 * value for value in values], "--", color=GREY, linewidth=1.2, **mark)
        ends[name] = 100 * values[-1], GREY
    label_ends(axes, ends)


def plot_arm(axes, trials, key, colour, xs=None, count_failed=False):
    """Plot dev accuracy over the values of a key: means with 95 % intervals, faint single seeds.

    trials: a table of trials that differ in nothing else but the seed. xs: places of the values in
    their order, without them the values themselves. Return where the line ends, for `label_ends`.
    """
    table = effects.accuracies(trials, key, count_failed)
    places = dict(zip(table[key], table[key] if xs is None else xs))
    sound = trials[(trials["failed"] == "") | (count_failed & (trials["correct"] != ""))]
    axes.plot([places[value] for value in sound[key]], 100 * sound["dev_accuracy"], "o",
              color=colour, alpha=0.35, markersize=6, markeredgewidth=0)
    at = [places[value] for value in table[key]]
    heights = [(table["accuracy"] - table["low"]).values,  # a Series of one would be refused
               (table["high"] - table["accuracy"]).values]
    axes.errorbar(at, table["accuracy"], yerr=heights, fmt="o-", color=colour, markersize=4,
                  capsize=3, elinewidth=1.2)
    known = table["accuracy"].dropna()
    return known.iloc[-1] if len(known) else math.nan


# ---- the set-up and the vectors (notebooks 01, 02) ----------------------------------------------

def dumbbell_figure(rows, names, xlabel):
    """Return a figure of two values per part as points joined by a line; names: {key: name}."""
    figure, [axes] = new_figure(height=1.0 + 0.4 * len(rows))
    most = max([row[key] for row in rows for key in names] + [0.1])
    for y, row in enumerate(rows):
        axes.plot([row[key] for key in names], [y, y], color="0.75", zorder=1)
        for key, colour, side, shift in zip(names, COLOURS, ("right", "left"), (-9, 9)):
            axes.plot(row[key], y, "o", color=colour, markersize=8)
            axes.annotate(f"{row[key]:.2f} %", (row[key], y), xytext=(shift, 0), ha=side,
                          textcoords="offset points", va="center", color=colour)
    for (key, name), colour, side in zip(names.items(), COLOURS, ("left", "right")):
        axes.text(rows[0][key], -0.45, name, color=colour, ha=side)
    axes.set_xlim(-0.19 * most, 1.2 * most)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= most])
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([row["part"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -1)  # after the ticks: in matplotlib 3.1 they reset it
    axes.set_xlabel(xlabel)
    return figure


def in_short(n):
    """Return a count in three digits: 1,234,567 -> 1.23 M."""
    size, unit = (n / 1e6, " M") if n >= 1e6 else (n / 1e3, " k") if n >= 1e3 else (n, "")
    return f"{size:.3g}{unit}"


def blocks_figure(blocks):
    """Return a figure of {block: parameters} as bars, in per cent of all."""
    figure, [axes] = new_figure(height=1.3 + 0.3 * len(blocks))
    total, kinds = sum(blocks.values()), ["embeddings", "layer", "pooler", "classifier"]
    axes.barh(range(len(blocks)), [100 * n / total for n in blocks.values()],
              color=[COLOURS[kinds.index(block.split()[0])] for block in blocks])
    for y, n in enumerate(blocks.values()):
        axes.text(100 * n / total, y, f" {100 * n / total:.2g} %  ({in_short(n)})", va="center")
    axes.set_yticks(range(len(blocks)))
    axes.set_yticklabels(list(blocks))
    axes.invert_yaxis()
    axes.grid(axis="y", alpha=0)
    axes.set_xlim(0, 130 * max(blocks.values()) / total)
    axes.set_xlabel(f"share of all {in_short(total)} parameters, %")
    return figure


def padding_figure(changes, flips, bound):
    """Return a figure of each review's change with and without the mask over padded lengths.

    changes: {(kind, length): change of each review's logit}, flips: {length: labels that flip
    without the mask}, bound: what is asserted with it.
    """
    figure, [axes] = new_figure(height=3.6)
    floor, lengths = 1e-9, sorted(flips)  # a change of exactly 0 is drawn at the floor
    for kind, colour, label, above in (("no mask", COLOURS[1], "without mask", 60),
                                       ("masked", COLOURS[0], "with mask", 2)):
        tops = [max(float(changes[kind, n].max()), floor) for n in lengths]
        axes.plot(lengths, tops, marker="o", markersize=5, color=colour)
        axes.text(lengths[0], max(tops) * above, label + ": largest change", color=colour,
                  weight="bold")
        for n in lengths:
            axes.plot([n] * len(changes[kind, n]), changes[kind, n].clamp(min=floor).tolist(), "o",
                      color=colour, alpha=0.12, markersize=4, markeredgewidth=0)
    sides = ["left"] + ["center"] * (len(lengths) - 2) + ["right"]
    for n, side in zip(lengths, sides):
        axes.annotate(f"{flips[n]} labels flip" if side == "right" else flips[n],
                      (n, float(changes["no mask", n].max())), xytext=(0, 7), ha=side,
                      textcoords="offset points", color=COLOURS[1])
    axes.axhline(bound, color="0.35", linestyle="--", linewidth=1.2)
    axes.text(lengths[-1], 1.5 * bound, "asserted bound", color="0.35", ha="right")
    axes.text(lengths[0] * 1.04, floor, "0", color="0.35", va="center")
    axes.set_yscale("log")
    log_axis(axes, lengths)
    axes.set_ylim(floor / 3, 1e4)
    axes.set_xlabel("padded length, tokens")
    axes.set_ylabel("change of a review's logit")
    return figure


def lengths_figure(lengths, limits):
    """Return a figure of {part: lengths}, cumulative, with the share of train that is cut."""
    figure, [axes] = new_figure(height=3.9)
    least, most = (choose(choose(n) for n in lengths.values()) for choose in (min, max))
    axes.text(least, 106, "train reviews cut:", color=COLOURS[0])
    for limit, share in zip(limits, cut_shares(lengths["train"], limits)):
        axes.axvline(limit, color="0.55", linestyle="--", linewidth=1)
        axes.text(limit, 106, f"{share:.0f} %", color=COLOURS[0], ha="center",
                  backgroundcolor="white")
    looks = zip(itertools.cycle(COLOURS), itertools.cycle(["-", "--", ":"]),
                itertools.cycle([0.2, 0.45, 0.7, 0.32, 0.57]))  # where along the line its name is
    for (name, n), (colour, style, level) in zip(lengths.items(), looks):
        axes.plot(np.sort(n), 100 * np.arange(1, len(n) + 1) / len(n), color=colour,
                  linestyle=style)
        axes.annotate(name, (np.quantile(n, level), 100 * level), xytext=(6, -4), color=colour,
                      textcoords="offset points", weight="bold",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8})
    log_axis(axes, [2 ** k for k in range(2, 12) if 2 ** k < 2 * most])
    axes.set_xlim(least * 0.9, most * 1.1)
    axes.set_ylim(0, 116)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.set_xlabel("length of a review, tokens with [CLS] and [SEP]")
    axes.set_ylabel("reviews up to that length, %")
    return figure


# ---- training (notebooks 03 to 08) --------------------------------------------------------------

def plot_history(axes, rows, key, colour, style="-", scale=1):
    """Plot the seeds' mean of a figure of the history over epochs; return where the line ends.

    Single seeds are thin lines, beside a solid mean only.
    """
    runs = [[scale * value for value in series(row, key)] for row in rows if row["history"]]
    epochs = [[point["epoch"] for point in row["history"] if key in point]
              for row in rows if row["history"]]
    for at, run in zip(epochs, runs) if style == "-" else ():
        axes.plot(at, run, color=colour, linewidth=0.7, alpha=0.4)
    means = [statistics.mean(values) for values in zip(*runs)]
    axes.plot(epochs[0][:len(means)] if means else [], means, style, color=colour, linewidth=2.2)
    return means[-1] if means else math.nan


def plot_learning_curves(panels, arms, colours, floors=None):
    """Plot loss and accuracy, one panel each, of {name: rows}: dev solid, training dotted.

    floors: {name: accuracy} of what has to be beaten, dashed.
    """
    for axes, metric, unit, scale in zip(panels, ("loss", "accuracy"), ("nats", "%"), (1, 100)):
        ends, fit = {}, []
        for name, rows in arms.items():
            ends[name] = plot_history(axes, rows, f"dev_{metric}", colours[name], "-",
                                      scale), colours[name]
            fit.append(plot_history(axes, rows, f"train_{metric}", colours[name], ":", scale))
        fit = [end for end in fit if not math.isnan(end)] or [math.nan]
        ends["(training)"] = statistics.mean(fit), GREY
        for name, level in (floors or {}).items() if metric == "accuracy" else ():
            axes.axhline(100 * level, color=GREY, linestyle="--", linewidth=1.2)
            ends[name] = 100 * level, GREY
        label_ends(axes, ends)
        axes.set(xlabel="epochs", title=f"{metric} ({unit})")


def plot_rates(panels, rows, lrs):
    """Plot each learning rate's training loss over steps, and the dev accuracy it gave."""
    ends, groups = {}, [values_of(rows_of(rows, lr=lr)) for lr in lrs]
    names = {lr: f"{lr:.0e}".replace("e-0", "e-") for lr in lrs}  # 1e-4
    plot_seeds(panels[1], lrs, groups, GREY)
    for lr, group, colour in zip(lrs, groups, [*COLOURS, GREY] * len(lrs)):
        panels[1].plot([lr] * len(group), [100 * v for v in group], "o", color=colour)
        for row in rows_of(rows, lr=lr):
            losses = series(row, "loss")
            panels[0].plot(range(1, len(losses) + 1), losses, color=colour)
            ends[names[lr]] = (losses or [math.nan])[-1], colour
            if row["mark"] and row["metrics"]:
                at = lr, 100 * row["metrics"]["dev_accuracy"]
                panels[1].plot(*at, "x", color=colour, markersize=9, markeredgewidth=2)
                panels[1].annotate("broken", at, xytext=(-9, 4), ha="right", color=colour,
                                   textcoords="offset points")
    log_axis(panels[1], lrs, names.get)
    panels[1].tick_params(axis="x", rotation=90 * (len(lrs) > 6))
    panels[0].set_ylim(0, 2)
    label_ends(panels[0], {name: (min(y, 2), colour) for name, (y, colour) in ends.items()})


def plot_schedules(panels, rows, warmups, decays):
    """Plot the schedules' lr / peak over steps, and the dev accuracy that each gave."""
    arms = {decay: [rows_of(rows, warmup=warmup, decay=decay) for warmup in warmups]
            for decay in decays}
    colours, ends = dict(zip(decays, COLOURS)), {}
    for decay, groups in arms.items():
        for some, style in zip(groups, (":", "--", "-")):
            rates = [lr / some[0]["config"]["lr"] for lr in series(some[0], "lr")]
            panels[0].plot(range(1, len(rates) + 1), rates, style, color=colours[decay])
            ends[decay] = (rates or [math.nan])[-1], colours[decay]
    label_ends(panels[0], ends)
    name_ticks(panels[1], [f"{100 * warmup:g} %" for warmup in warmups])
    plot_arms(panels[1], range(len(warmups)),
              {decay: [values_of(some) for some in groups] for decay, groups in arms.items()},
              colours)


def words_axis(axes, ks):
    """Give the x axis numbers of words, rising, and "all" behind them; return their places."""
    places = [*ks, 2 * ks[-1]]
    log_axis(axes, places, lambda x: "all" if x == places[-1] else f"{x:g}")
    axes.set_xlabel("words kept")
    return places


def plot_mlm_loss(axes, curve):
    """Plot the masked-LM loss over epochs, of one training step each and of the held-out texts."""
    ends = {}
    for key, name, points, colour in (("loss", "training", curve[1:], COLOURS[1]),
                                      ("held_out_loss", "held out", curve, COLOURS[0])):
        losses = [math.nan if p[key] is None else p[key] for p in points]  # None: no masked token
        axes.plot([p["epoch"] for p in points], losses, "o-", color=colour, markersize=4)
        ends[name] = losses[-1] if points else math.nan, colour
    label_ends(axes, ends)


def heat_maps(panels, arms, x_key, y_key):
    """Draw mean dev accuracy in % over two keys, one panel for each of {title: rows}.

    All have one colour scale. A star for each trial left out; grey: none was sound.
    """
    known = [100 * value for rows in arms.values() for value in values_of(rows)] or [0, 100]
    for axes, (title, rows) in zip(panels, arms.items()):
        xs, ys = (sorted({row["config"][key] for row in rows}) for key in (x_key, y_key))
        cells = [[rows_of(rows, **{x_key: x, y_key: y}) for x in xs] for y in ys]
        means = [[100 * spread(cell).mean for cell in line] for line in cells]
        axes.imshow(means, cmap="cividis", vmin=min(known), vmax=max(known), aspect="auto")
        for i, line in enumerate(cells):
            for j, cell in enumerate(line):
                dark = means[i][j] < (min(known) + max(known)) / 2
                axes.text(j, i, cell_text(cell), ha="center", va="center", fontsize=13,
                          color="white" if dark else "black")
        name_ticks(axes, [f"{x:g}" for x in xs])
        axes.set(yticks=range(len(ys)), yticklabels=[f"{y:g}" for y in ys], title=title)
        axes.set(facecolor="#c8c8c8")
        axes.tick_params(length=0)
        axes.grid(False)


def cell_text(rows):
    """Return what a heat map's cell says of its trials."""
    s = spread(rows)
    if s.n:
        return f"{100 * s.mean:.1f}" + "*" * s.marked
    return "diverged" if any("diverged" in row["mark"] for row in rows) else "one\nclass"


def plot_norms(axes, norms, kind, colours):
    """Plot norms after / before training over weight decay; dotted: what decay alone leaves.

    norms: rows of {optimizer, weight_decay, keeps, kind: ratio}; the first is without decay.
    """
    plain = norms[0]
    ends = {"no decay": (plain[kind], colours[plain["optimizer"]])}
    axes.axhline(plain[kind], color=colours[plain["optimizer"]], linewidth=1.2)
    for name in dict.fromkeys(row["optimizer"] for row in norms[1:]):
        some = [row for row in norms[1:] if row["optimizer"] == name]
        decays = [row["weight_decay"] for row in some]
        axes.plot(decays, [row[kind] for row in some], "o-", color=colours[name])
        ends[name] = some[-1][kind], colours[name]
    axes.plot(decays, [plain[kind] * row["keeps"] for row in some], ":", color="#444444",
              linewidth=2.5)
    log_axis(axes, decays)
    label_ends(axes, ends)


def plot_collapsing(axes, groups, names, colour=COLOURS[0]):
    """Plot dev accuracy of a few groups of rows; a collapsed trial counts, as an open point."""
    plot_seeds(axes, range(len(groups)), [values_of(counted(rows)) for rows in groups], colour)
    for x, rows in enumerate(groups):
        low = [100 * r["metrics"]["dev_accuracy"] for r in rows if r["mark"] and r["metrics"]]
        axes.plot([x] * len(low), low, "o", color=colour, markerfacecolor="white", markersize=8)
    name_ticks(axes, names)


def plot_around(axes, rows, default, key, values):
    """Plot training and dev accuracy over one key, the others at their defaults (a ring).

    Return the lines' ends, for `label_ends`.
    """
    ends, settings = {}, [dict(default, **{key: value}) for value in values]
    for name, metric, colour in (("training", "train_accuracy", COLOURS[1]),
                                 ("dev", "dev_accuracy", COLOURS[0])):
        groups = [values_of(rows_of(rows, **setting), metric) for setting in settings]
        ends[name] = plot_seeds(axes, range(len(values)), groups, colour), colour
        ring = groups[values.index(default[key])]
        if ring:
            axes.plot(values.index(default[key]), 100 * statistics.mean(ring), "o", color=colour,
                      markersize=10, markerfacecolor="white", markeredgewidth=2)
    name_ticks(axes, [f"{value:g}" for value in values])
    return ends


def plot_search(axes, rows):
    """Plot the settings of a random search: dropouts by place, accuracy by colour."""
    rows = [row for row in rows if not row["mark"]]
    dots = axes.scatter([row["config"]["dropout"] for row in rows],
                        [row["config"]["attention_dropout"] for row in rows], s=130,
                        c=[100 * value for value in values_of(rows)], cmap="cividis",
                        edgecolors="black", linewidths=0.6)
    axes.figure.colorbar(dots, ax=axes)
    axes.margins(0.1)
    axes.set(xlabel="dropout", ylabel="attention dropout", title="dev accuracy found (%)")


def plot_luck(axes, curve, luck):
    """Plot the expected best of 1 to n trials, and in grey what luck alone would give."""
    ns = list(range(1, len(curve) + 1))
    axes.plot(ns, curve, "o-", color=COLOURS[0])
    axes.fill_between(ns, [luck[0]] * len(ns), luck, color="#999999", alpha=0.35, linewidth=0)
    axes.set_xticks(ns[::math.ceil(len(ns) / 8)])
    axes.set(xlabel="trials n", title="expected best dev accuracy (%)")
    label_ends(axes, {"search": (curve[-1], COLOURS[0]), "luck": (luck[-1], "#666666")})


def plot_leads(axes, arms, colours):
    """Plot each of {name: leads in points}, one line of seeds (points) and mean (bar) a name."""
    for y, values in enumerate(arms.values()):
        axes.plot(values, [y] * len(values), "o", color=colours[y], alpha=0.45, markersize=7)
        axes.plot(statistics.mean(values or [math.nan]), y, "|", color=colours[y], markersize=18,
                  markeredgewidth=3)
    axes.axvline(0, color="#555555", linewidth=1)
    axes.set(yticks=range(len(arms)), yticklabels=list(arms))


# ---- saving and showing -------------------------------------------------------------------------

def as_sentence(text):
    """Return a text with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def save_figure(figure, name, finding, out_dir, data=None, alt=""):
    """Save OUT/figures/NAME.png (and .csv), and show it with its finding as caption and alt text.

    data: a list of dicts with what the figure shows.
    """
    folder = os.path.join(out_dir, "figures")
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(ValueError):  # a figure too small for its labels is shown as it is
        figure.tight_layout()
        figure.tight_layout()  # the first may have changed which ticks there are
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    with files.open_atomically(os.path.join(folder, name + ".png"), "wb") as file:
        file.write(picture.getvalue())
    if data:
        files.save_table(os.path.join(folder, name + ".csv"), data)
    text = html.escape(as_sentence(finding))
    seen = html.escape(as_sentence(alt or finding))
    show_html(f'<figure><img alt="{seen}" src="data:image/png;base64,'
              f'{base64.b64encode(picture.getvalue()).decode()}" style="max-width:100%">'
              f"<figcaption>{text}</figcaption></figure>")


def save(figure, study, name, caption, alt="", data=None):
    """Save a page's figure as OUT/figures/NAME.png (and .csv), and show it with its caption.

    caption: what it means; alt: what is seen, for who cannot see it (without it the caption).
    data: a DataFrame, or a list of dicts, with what the figure shows.
    """
    if data is not None and not isinstance(data, list):
        data = data.to_dict("records")
    save_figure(figure, name, caption, study.out_dir, data, alt)


def show_table(rows, columns=None):
    """Show a list of dicts as a table; every value is escaped."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [[html.escape(str(row.get(column, ""))) for column in columns] for row in rows]
    show_html("<table><thead><tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in columns)
              + "</tr></thead><tbody>" + "".join(
                  "<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in cells)
              + "</tbody></table>")


# ---- source code --------------------------------------------------------------------------------

PAPER = "background:#f7f9fb;color:#1c2733;padding:.7em 1em;overflow-x:auto"  # in a dark Lab too


def show_source(function, around="", context=9):
    """Show the source of a function, or of a class, in colour: in Jupyter and in the report.

    around: a text that one of its lines has: that line is marked, and only `context` lines before
    and behind it are shown.
    """
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import Python3Lexer  # PythonLexer is for Python 2 in 2.4
    source, name = inspect.getsource(function), f"{function.__module__}.{function.__qualname__}"
    lines = textwrap.dedent(source).splitlines()
    look = HtmlFormatter(noclasses=True, nowrap=True)
    code = highlight("\n".join(lines), Python3Lexer(), look).splitlines()  # then cut
    begin, end = 0, len(lines)
    if around:
        at = next((i for i, line in enumerate(lines) if around in line), None)
        if at is None:
            raise InputError(f"{name}: no line has {around!r}; name a text that it has")
        code[at] = f'<mark style="background:#fff1b8;color:inherit">{code[at]}</mark>'
        begin, end = max(0, at - context), at + context + 1
    file = inspect.getsourcefile(inspect.unwrap(function))  # not its decorator's
    where = (f"{os.path.basename(file)}, line "
             f"{inspect.getsourcelines(function)[1] + begin}")
    show_html(f'<details open class="source"><summary><code>{html.escape(name)}</code>, '
              f'{html.escape(where)}</summary><pre style="{PAPER}">'
              + "\n".join(code[begin:end]) + "</pre></details>",
              "\n".join([f"{name}, {where}", *lines[begin:end]]))


# ---- answers ------------------------------------------------------------------------------------

class Answers:
    """The answers of a notebook: shown as they are computed, kept as OUT/answers/NAME.json."""

    def __init__(self, name, out_dir, profile):
        self.name, self.out_dir, self.profile, self.rows = name, out_dir, profile, []

    def give(self, question, answer, figure="", holds=None, point=""):
        """Record an answer; holds: did the claim that was expected come out? None: no claim.

        point: which of the assignment's points it answers, a key of POINTS; "": none.
        """
        if point and point not in POINTS:
            raise InputError(f"point {point!r} is not in the assignment; use one of "
                             f"{', '.join(POINTS)}")
        row = {"question": question, "answer": as_sentence(answer), "figure": figure,
               "verdict": {True: "supported", False: "contradicted", None: ""}[holds],
               "point": point}
        self.rows.append(row)
        files.save_json(os.path.join(self.out_dir, "answers", self.name + ".json"), self.rows)
        claim = {True: "As expected.", False: "NOT as expected.", None: ""}[holds]
        asked = f" <small>(assignment: {point})</small>" if point else ""
        show_html(f'<p class="answer"><strong>{html.escape(question)}</strong> '
                  f'{html.escape(row["answer"])} <em>{claim}</em>{asked}</p>',
                  f'{question} {row["answer"]} {claim}', answer=row)

    def table(self):
        """Show all answers in one table, with what the profile is good for."""
        show_table([{"question": r["question"], "answer": r["answer"], "figure": r["figure"],
                     "verdict": r["verdict"]}
                    for r in self.rows])
        if self.profile == "sample":
            print("Profile sample: synthetic reviews and a tiny BERT; indicative only.")


def banner(profile, model, data_dir, device=""):
    """Print which run this is: profile, data, model, stack, device."""
    device = runtime.pick_device(device)
    print(f"profile {profile} | data {data_dir} | model {model} | {device_name(device)}")
    print(", ".join(f"{name} {version}" for name, version in VERSIONS.items()))
    if profile == "sample":
        print("Synthetic reviews and a tiny BERT: the machinery is real, the findings are "
              "indicative only.")
