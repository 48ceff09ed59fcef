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
import struct
import sys
import textwrap
import zlib

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

    trials: a table of trials that differ in nothing else but the seed. xs: {value: its place},
    without it the values are their own places. Return where the line ends, for `label_ends`.
    """
    table = effects.accuracies(trials, key, count_failed)
    places = xs or {value: value for value in table[key]}
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


DPI = 192  # two pixels of a picture to one of the page: sharp on a phone and on good screens


def pixels_of(figure):
    """Return a figure as it is drawn: (height, width, 3), bytes."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="rgba", dpi=DPI, facecolor="white")
    width, height = (int(inches * DPI) for inches in figure.get_size_inches())
    return np.frombuffer(drawn.getvalue(), np.uint8).reshape(height, width, 4)[:, :, :3]


def to_palette(pixels):
    """Return (colours, place of each pixel's colour): the 256 commonest, for the others the next.

    A figure's own colours stay as they are; what differs is the shade of a blurred edge.
    """
    codes = pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
    codes, places, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], 1).astype(np.float32)
    palette = colours[np.argsort(-counts, kind="stable")[:256]]
    nearest = ((palette ** 2).sum(1) - 2 * colours @ palette.T).argmin(1)
    return palette.astype(np.uint8), nearest[places].reshape(pixels.shape[:2]).astype(np.uint8)


def encode_png(palette, places):
    """Return an image of at most 256 colours as a PNG: a third of the bytes of true colours."""
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data) & 0xFFFFFFFF))
    height, width = places.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), places], 1)  # 0: unfiltered
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
            + chunk(b"PLTE", palette.tobytes())
            + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)) + chunk(b"IEND", b""))


def panel_cuts(figure):
    """Return where a figure can be cut between its panels: inches from the left; [] if nowhere.

    Cut in two, a wide figure's panels stand one below the other on a phone.
    """
    if len(figure.axes) < 2 or figure.texts or figure.legends:
        return []
    draw = figure.canvas.get_renderer()
    boxes = sorted((axes.get_tightbbox(draw).extents / figure.dpi for axes in figure.axes),
                   key=lambda box: box[0])
    pairs = list(zip(boxes, boxes[1:]))
    if any(left[2] > right[0] for left, right in pairs):
        return []  # one above the other, or a twin axis
    return [(left[2] + right[0]) / 2 for left, right in pairs]


def image_tag(palette, places, alt):
    """Return an <img> of a panel, as wide as in print; beside others it may shrink."""
    width = round(96 * places.shape[1] / DPI)
    png = base64.b64encode(encode_png(palette, places)).decode()
    return (f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/png;base64,{png}" '
            f'style="flex:{width} 1 {0.6 * width:.0f}px;min-width:0;max-width:min(100%,{width}px);'
            f'height:auto">')


def save_figure(figure, name, finding, out_dir, data=None, alt=""):
    """Save OUT/figures/NAME.png (and .csv), and show it with its finding as caption.

    data: a list of dicts with what the figure shows. alt: what is seen, for who can't see it.
    """
    folder = os.path.join(out_dir, "figures")
    os.makedirs(folder, exist_ok=True)
    with contextlib.suppress(ValueError):  # a figure too small for its labels is shown as it is
        figure.tight_layout()
        figure.tight_layout()  # the first may have changed which ticks there are
    palette, places = to_palette(pixels_of(figure))
    with files.open_atomically(os.path.join(folder, name + ".png"), "wb") as file:
        file.write(encode_png(palette, places))
    if data:
        files.save_table(os.path.join(folder, name + ".csv"), data)
    seen = as_sentence(alt or f"figure {name}; what it means is its caption")
    panels = np.split(places, [int(cut * DPI) for cut in panel_cuts(figure)], axis=1)
    images = "".join(image_tag(palette, panel, f"Panel {i} of the same figure" if i > 1 else seen)
                     for i, panel in enumerate(panels, 1))
    show_html('<figure><div style="display:flex;flex-wrap:wrap;justify-content:center;'
              f'align-items:flex-start">{images}</div>'
              f"<figcaption>{html.escape(as_sentence(finding))}</figcaption></figure>",
              figure={"name": name, "data": bool(data)})


def save(figure, study, name, caption, alt="", data=None):
    """Save a page's figure as OUT/figures/NAME.png (and .csv), and show it with its caption.

    caption: what it means; alt: what is seen, for who can't see it.
    data: a DataFrame, or a list of dicts, with what the figure shows.
    """
    if data is not None and not isinstance(data, list):
        data = data.to_dict("records")
    save_figure(figure, name, caption, study.out_dir, data, alt)


def show_table(rows, columns=None):
    """Show a list of dicts as a table; every value is escaped."""
    show_html(files.html_table(rows, columns))


# ---- source code --------------------------------------------------------------------------------

PAPER = "background:#f7f9fb;color:#1c2733;padding:.7em 1em;overflow-x:auto"  # in a dark Lab too


def readable_style():
    """Return pygments' default style; what is too pale on PAPER, on either stack, is darker."""
    from pygments.styles.default import DefaultStyle
    from pygments.token import Comment, Name, Operator, String, Whitespace

    class Readable(DefaultStyle):
        styles = {**DefaultStyle.styles, Operator.Word: "bold #008000", Comment: "italic #3D7B7B",
                  String.Interpol: "bold #A45A77", String.Escape: "bold #8A4B14",
                  Name.Exception: "bold #B5322B", Whitespace: ""}
    return Readable


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
    look = HtmlFormatter(style=readable_style(), noclasses=True, nowrap=True)
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
