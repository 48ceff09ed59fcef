"""Figures, tables and answers: what a study's notebook draws and shows.

    figure, panels = new_figure(2)
    end = plot_arm(panels[0], trials, "lr", COLOURS[0])
    save(figure, study, "rates", "The middle rate is best.", "Accuracy over rates.", trials)

Each line is labelled at its end, single seeds are visible beside their mean, and a figure is
saved with its data, its meaning as caption and what is seen as alt text.
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
import sys
import textwrap

import numpy as np

import effects
import files
from files import InputError
from studies import (
    cut_shares,
    show_html,
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


# ---- drawings -----------------------------------------------------------------------------------

def new_drawing(width, height, columns, rows):
    """Return (figure, axes) without scales to draw on: x from 0 to columns, y from 0 to rows."""
    figure, [axes] = new_figure(width=width, height=height)
    axes.axis("off")
    axes.set(xlim=(0, columns), ylim=(0, rows))
    return figure, axes


def box(axes, x, y, text, colour=COLOURS[0], size=10):
    """Write a text in a box around (x, y); a line break begins a new line."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, zorder=3, linespacing=1.35,
              bbox={"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": colour,
                    "linewidth": 1.4})


def arrow(axes, start, end, bend=0.0):
    """Draw an arrow from (x, y) to (x, y); bend: how far it bows to its left."""
    axes.annotate("", end, start, zorder=1, arrowprops={
        "arrowstyle": "->", "color": GREY, "connectionstyle": f"arc3,rad={-bend}"})


# ---- the set-up and the vectors (notebooks 01, 02) ----------------------------------------------


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


def words_axis(axes, ks):
    """Give the x axis numbers of words, rising, and "all" behind them; return their places."""
    places = [*ks, 2 * ks[-1]]
    log_axis(axes, places, lambda x: "all" if x == places[-1] else f"{x:g}")
    axes.set_xlabel("words kept")
    return places


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


