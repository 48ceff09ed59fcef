"""figures.py: figures in one look, tables, answers that are kept as they come."""
import base64
import csv
import inspect
import io
import math
import os
import re
import sys
import textwrap
import types
from unittest import mock

import numpy as np
import pytest
from tools import Page, bare_study

import cpu
import figures
import files
import helpers
import studies

EVIL = 'A < B & "C" \'d\' <script>alert(1)</script> café ± 1'


@pytest.fixture
def shown(monkeypatch):
    """What would be shown in a notebook: a list of HTML."""
    pages = []
    for module in (figures, studies):
        monkeypatch.setattr(module, "show_html",
                            lambda text, *plain, **metadata: pages.append(text))
    return pages


def test_figures_are_saved_with_their_data_and_shown_with_their_finding(shown, tmp_path):
    figure, [axes] = figures.new_figure()
    axes.plot([1, 2], [3, 4])
    data = [{"x": 1, "y": 0.5}, {"x": 2, "y": None, "note": EVIL}]
    figures.save_figure(figure, "one", EVIL, str(tmp_path), data)
    figures.save_figure(figure, "two", "plain", str(tmp_path))
    assert sorted(os.listdir(str(tmp_path / "figures"))) == ["one.csv", "one.png", "two.png"]
    picture = (tmp_path / "figures" / "one.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 5000
    with open(str(tmp_path / "figures" / "one.csv"), encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [{"x": "1", "y": "0.5", "note": ""},
                                              {"x": "2", "y": "", "note": EVIL}]
    page = Page(shown[0])
    assert page.tags == ["figure", "div", "img", "figcaption"]
    assert page.text == EVIL and EVIL not in page.images[0]["alt"], "a screen reader says it once"
    assert page.images[0]["src"].startswith("data:image/png;base64,iVBORw0KGgo")
    figures.save_figure(figure, "one", "caption", str(tmp_path), data, EVIL)
    assert Page(shown[2]).images[0]["alt"] == EVIL


def pixels_of(png):
    """Return a PNG's pixels by matplotlib's own reader: (height, width, 3), 0 to 255."""
    from matplotlib import image
    return (255 * image.imread(io.BytesIO(png))[:, :, :3]).round().astype("uint8")


def test_a_picture_is_sharp_small_and_as_drawn():
    figure, [axes] = figures.new_figure()
    axes.plot([1, 2], [3, 4])
    drawn = figures.pixels_of(figure)
    assert drawn.shape == (int(3.4 * 192), int(6.2 * 192), 3)
    png = figures.encode_png(*figures.to_palette(drawn))
    kept = pixels_of(png).astype(int)
    assert kept.shape == drawn.shape and abs(kept - drawn).max() <= 12, "a shade, no other colour"
    for colour in ("#ffffff", figures.COLOURS[0]):
        rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
        own = (drawn == rgb).all(-1)
        assert own.any() and (kept[own] == rgb).all(), colour
    few = np.zeros((3, 5, 3), np.uint8)
    few[1, 2] = 10, 20, 30
    assert (pixels_of(figures.encode_png(*figures.to_palette(few))) == few).all()


def test_panels_are_cut_where_nothing_is_drawn(shown, tmp_path):
    figure, panels = figures.new_figure(2, width=9)
    for axes in panels:
        axes.plot([1, 2], [3, 4])
        axes.set_ylabel("accuracy")
    figures.save_figure(figure, "two", "caption", str(tmp_path), alt="seen")
    images = Page(shown[0]).images
    assert [image["alt"] for image in images] == ["Seen", "Panel 2 of the same figure"]
    assert sum(int(image["width"]) for image in images) in (9 * 96 - 1, 9 * 96, 9 * 96 + 1)
    whole = pixels_of((tmp_path / "figures" / "two.png").read_bytes())
    parts = [pixels_of(base64.b64decode(image["src"].split(",")[1])) for image in images]
    assert (np.concatenate(parts, 1) == whole).all() and (parts[1][:, :3] == 255).all()
    figure, panels = figures.new_figure(2)
    figure.text(0.5, 0.9, "over both")
    assert figures.panel_cuts(figure) == [] == figures.panel_cuts(figures.new_figure()[0])


def test_a_log_axis_has_plain_ticks():
    figure, [axes] = figures.new_figure()
    axes.plot([8, 128], [1, 2])
    figures.log_axis(axes, [8, 16, 32, 128])
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "32", "128"]
    assert axes.get_xscale() == "log" and not len(axes.get_xticks(minor=True))
    figures.log_axis(axes, [1e-5, 1e-3], label="{:.0e}".format)
    figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1e-05", "1e-03"]


def texts_of(axes):
    """Return the texts written into the axes."""
    return [text.get_text() for text in axes.texts]


def test_a_drawing_of_boxes_and_arrows():
    figure, axes = figures.new_drawing(9, 3, 10, 4)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 10), (0, 4)) and not axes.axison
    figures.arrow(axes, (1, 1), (9, 1))
    figures.arrow(axes, (1, 2), (9, 2), bend=0.3)
    figures.box(axes, 5, 3, "tokens\n(1, 11, 64)")
    figure.canvas.draw()
    straight, bowed, label = axes.texts
    assert label.get_text() == "tokens\n(1, 11, 64)" and label.get_position() == (5, 3)
    assert label.get_bbox_patch().get_facecolor()[:3] == (1, 1, 1), "an arrow behind it shows through"
    tops = [axes.transData.inverted().transform(
        one.arrow_patch.get_window_extent(figure.canvas.get_renderer()).get_points())[1][1]
        for one in (straight, bowed)]
    assert tops[0] < 1.5 and tops[1] > 2.5, "bend: to the left of the way, which is up here"


def test_labels_at_line_ends_do_not_overlap():
    _, (axes,) = figures.new_figure()
    axes.semilogy([0, 1], [1, 100])
    figures.label_ends(axes, {"b": (10, "C0"), "a": (9, "C1"), "lost": (math.nan, "C2")})
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert set(heights) == {"a", "b"} and heights["b"] - heights["a"] > 0.08
    assert 0.3 < heights["a"] < heights["b"] < 0.7


def with_steps(row, losses, rates=()):
    """Give a row a history of steps."""
    return dict(row, history=[{"loss": loss, "lr": lr} for loss, lr in
                              zip(losses, rates or [1.0] * len(losses))])


def test_all_words_stand_behind_the_numbers_of_words():
    figure, (axes,) = figures.new_figure()
    places = figures.words_axis(axes, [8, 16])
    axes.plot(places, [1, 2, 3])
    figure.canvas.draw()
    assert places == [8, 16, 32]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "all"]


def test_panels_of_one_scale():
    _, panels = figures.new_figure(2)
    panels[0].set_ylim(0, 2), panels[1].set_ylim(-1, 1)
    figures.same_limits(panels)
    assert [axes.get_ylim() for axes in panels] == [(-1, 2)] * 2


def test_tables_are_escaped(shown):
    figures.show_table([{"a<b": EVIL, "n": 1}, {"n": 2.5, "later": None}])
    page = Page(shown[0])
    assert "script" not in page.tags
    text = [text for text in page.texts if text.strip()]
    assert text == ["a<b", "n", "later", EVIL, "1", "2.5", "None"]
    assert page.tags.count("td") == 6
    figures.show_table([{"a": 1, "b": 2}], ["b"])
    assert Page(shown[1]).text == "b2"


@pytest.fixture
def displayed():
    """What a notebook would be given to show: a list of (data by kind, metadata)."""
    seen = []
    display = types.SimpleNamespace(display=lambda data, raw, metadata: seen.append((data, metadata)))
    with mock.patch.dict(sys.modules, {"IPython": None, "IPython.display": display}):
        yield seen


def test_html_is_shown_in_notebooks_only(displayed):
    figures.show_html("<b>text", "text", answer=1)
    sys.modules.pop("IPython")
    figures.show_html("no notebook")
    assert displayed == [({"text/html": "<b>text", "text/plain": "text"}, {"answer": 1})]


def hostile(text="</pre><script>alert(1)</script> & ä"):
    """Return the text: '\x1b' <b>."""
    return text  # marked


def test_source_is_shown_around_a_line(displayed):
    figures.show_source(helpers.fit, around="clip_grad_norm_", context=2)
    figures.show_source(hostile, around="def hostile")  # at the very beginning
    lines = displayed[0][0]["text/plain"].split("\n")
    assert len(lines) == 1 + 5 and "clip_grad_norm_" in lines[3]
    source, first = inspect.getsourcelines(helpers.fit)
    at = next(i for i, line in enumerate(source) if "clip_grad_norm_" in line)
    assert lines[0] == f"helpers.fit, helpers.py, line {first + at - 2}"
    page = Page(displayed[0][0]["text/html"])
    assert page.tags.count("mark") == 1
    assert page.text.endswith("\n".join(lines[1:]))
    assert displayed[1][0]["text/plain"].endswith("# marked")
    figures.show_source(helpers.load_bert, around="name = model", context=1)  # cuts its docstring
    assert displayed[2][0]["text/plain"].startswith("helpers.load_bert, helpers.py, line ")
    assert ">or</span>" in displayed[2][0]["text/html"], "code behind a docstring is no string"
    with pytest.raises(files.InputError, match="helpers.fit: no line has 'no such text'"):
        figures.show_source(helpers.fit, around="no such text")


def luminance(colour):
    """Return the relative luminance of #rgb or #rrggbb (WCAG 2.2)."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i:i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("function", [helpers.fit, helpers.load_bert, helpers.mask_tokens, helpers.accumulate])
def test_every_colour_of_a_source_can_be_read(function, displayed):
    """A contrast of 4.5 to 1 at least, as WCAG wants of text."""
    figures.show_source(function)
    paper = luminance(re.search(r"background:(#\w+)", figures.PAPER).group(1))
    text = displayed[0][0]["text/html"]
    colours = set(re.findall(r"(?<![-\w])color: ?(#\w+)", text))
    assert len(colours) > 2
    assert {c: round((paper + 0.05) / (luminance(c) + 0.05), 2) for c in colours
            if (paper + 0.05) / (luminance(c) + 0.05) < 4.5} == {}


def words_in(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_part_has_its_line_and_its_name_however_many_there_are():
    names = [*helpers.PARTS, *(f"part-{i}" for i in range(6))]
    figure = figures.lengths_figure({name: np.arange(5, 90) for name in names}, [64, 128])
    assert set(names) <= set(words_in(figure))
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 85]
    assert len(drawn) == len(names)
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn]
    assert len(set(looks)) == len(looks), "two parts look alike"


def test_answers_are_shown_as_they_come(shown):
    study = bare_study()
    study.answer("3a", "Q1. " + EVIL, EVIL, verdict=True, figure="lengths")
    first = {"question": "Q1. " + EVIL, "answer": EVIL, "figure": "lengths", "verdict": "supported",
             "point": "3a"}
    study.answer("", "Q2", "no", verdict=False)
    study.answer("", "Q3", "so")
    assert study.answers[0] == first
    assert [r["verdict"] for r in study.answers] == ["supported", "contradicted", ""]
    assert ["assignment: 3a" in page for page in shown] == [True, False, False]
    assert [r["answer"] for r in study.answers[1:]] == ["No", "So"]
    assert "script" not in [tag for page in shown for tag in Page(page).tags]
    assert ["The expectation above: supported." in page for page in shown] == [True, False, False]
    assert ["expectation" in page for page in shown] == [True, True, False]
    study.summary()
    assert Page(shown[3]).texts[3:6] == ["Q1. " + EVIL, EVIL, "supported"]


@pytest.mark.parametrize("words", [{"point": "3e"}, {"verdict": "maybe"}])
def test_an_answer_with_no_such_point_or_verdict_is_refused(shown, words):
    study = bare_study()
    with pytest.raises(files.InputError, match="'3e' is not in the assignment|verdict='maybe': must"):
        study.answer(words.get("point", ""), "Q1. Why?", "So.", verdict=words.get("verdict", ""))
    assert shown == study.answers == []


def test_an_answer_travels_with_its_output(displayed):
    study = bare_study()
    study.answer("4a", "Q1. Why?", "so.", verdict=False)
    (data, metadata), = displayed
    assert metadata == {"answer": study.answers[0]} and study.answers[0]["answer"] == "So."
    assert data["text/plain"] == "Q1. Why? So. The expectation above: contradicted."


def test_figures_have_one_look_and_leave_none_open():
    import matplotlib.pyplot as plt
    figure, panels = figures.new_figure(3)
    assert len(panels) == 3 and plt.get_fignums() == []


@pytest.mark.parametrize("shown_thing", [hostile, helpers.fit, helpers.vectorize_ex,
                                         cpu.Dropout, studies.Study.answer])
def test_source_is_shown_whole_in_colour_and_without_scripts(shown_thing, displayed):
    figures.show_source(shown_thing)
    (data, _), = displayed
    page, source = Page(data["text/html"]), inspect.getsource(shown_thing)
    assert (page.tags[0], page.attributes[0]) == ("details", {"open": None, "class": "source"})
    assert set(page.tags) == {"details", "summary", "code", "pre", "span"}
    assert all(set(attrs) <= {"style", "open", "class"} for attrs in page.attributes)
    assert [a for tag, a in zip(page.tags, page.attributes) if tag == "span" and "color: #" in a.get("style", "")]
    text, name = page.text, f"{shown_thing.__module__}.{shown_thing.__qualname__}"
    source = textwrap.dedent(source).rstrip("\n")
    assert text.endswith(source) and text.startswith(name + ", ")
    file, line = os.path.basename(inspect.getsourcefile(shown_thing)), inspect.getsourcelines(shown_thing)[1]
    assert f"{file}, line {line}" in text
    assert data["text/plain"] == f"{name}, {file}, line {line}\n{source}"
