"""figures.py: figures in one look, tables, answers that are kept as they come."""
import csv
import inspect
import json
import math
import os
import sys
import textwrap
import types
from unittest import mock

import numpy as np
import pytest
import torch
from tools import Page, row

import cpu
import figures
import files
import helpers
import runtime

EVIL = 'A < B & "C" \'d\' <script>alert(1)</script> café ± 1'


@pytest.fixture
def shown(monkeypatch):
    """What would be shown in a notebook: a list of HTML."""
    pages = []
    monkeypatch.setattr(figures, "show_html", lambda text, *plain, **metadata: pages.append(text))
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
    assert page.tags == ["figure", "img", "figcaption"]
    assert page.attributes[1]["alt"] == EVIL == page.text
    assert page.attributes[1]["src"].startswith("data:image/png;base64,iVBORw0KGgo")


def test_figures_have_one_look_and_leave_none_open():
    import matplotlib.pyplot as plt
    figure, panels = figures.new_figure(3)
    assert len(panels) == 3 and plt.get_fignums() == []
    groups = [[0.5, 0.7], [], [0.9]]
    assert figures.plot_seeds(panels[0], [1, 2, 3], groups, "red") == pytest.approx(90)
    line = panels[0].get_lines()[-1]
    assert list(line.get_xdata()) == [1, 3]
    assert list(line.get_ydata()) == pytest.approx([60.0, 90.0])
    points = [list(x.get_ydata()) for x in panels[0].get_lines()[:-1]]
    assert points == [pytest.approx([50.0, 70.0]), pytest.approx([90.0])]
    assert math.isnan(figures.plot_seeds(panels[1], [1], [[]], "red"))


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


def test_labels_at_line_ends_do_not_overlap():
    _, (axes,) = figures.new_figure()
    axes.semilogy([0, 1], [1, 100])
    figures.label_ends(axes, {"b": (10, "C0"), "a": (9, "C1"), "lost": (math.nan, "C2")})
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert set(heights) == {"a", "b"} and heights["b"] - heights["a"] > 0.08
    assert 0.3 < heights["a"] < heights["b"] < 0.7


def test_heat_maps_say_what_each_cell_is():
    some = [row(0.9, lr=1, weight_decay=0), row(0.5, lr=2, weight_decay=0),
            row(0, lr=1, weight_decay=9, mark="diverged: nan"),
            row(0, lr=2, weight_decay=9, mark="one class for all reviews"),
            row(0.7, 1, lr=2, weight_decay=9)]
    _, panels = figures.new_figure(2)
    figures.heat_maps(panels, {"one": some, "two": some[:2]}, "lr", "weight_decay")
    assert texts_of(panels[0]) == ["90.0", "50.0", "diverged", "70.0*"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "9"]
    assert panels[1].get_title() == "two" and panels[0].images[0].get_clim() == (50, 90)


def test_learning_curves_survive_a_diverged_trial():
    history = [{"epoch": e, **{f"{part}_{m}": 0.5 + e / 10 for part in ("dev", "train")
                               for m in ("loss", "accuracy")}} for e in (0, 1)]
    good, broken = dict(row(0.8), history=history), dict(row(0, mark="diverged"), history=[])
    _, panels = figures.new_figure(2)
    arms = {"good": [broken, good], "broken": [broken]}
    figures.plot_learning_curves(panels, arms, {"good": "C0", "broken": "C1"})
    assert sorted(texts_of(panels[0])) == ["(training)", "good"]
    assert figures.plot_history(panels[0], [broken, good], "dev_loss", "C0") == pytest.approx(0.6)
    assert math.isnan(figures.plot_history(panels[0], [broken], "dev_loss", "C0"))


@pytest.mark.parametrize("xs", ([200], [200, 300]))
def test_a_floor_is_seen_at_one_place_too(xs):
    _, (axes,) = figures.new_figure()
    figures.plot_arms(axes, xs, {}, {}, {"floor": [0.3] * len(xs)})
    line, = axes.lines
    assert (line.get_marker() == "_") == (len(xs) == 1)


def test_arms_and_floors_are_named_at_their_ends():
    _, (axes,) = figures.new_figure()
    figures.plot_arms(axes, [1, 2], {"a": [[0.5], [0.6, 0.8]], "lost": [[], []]},
                      {"a": "C0", "lost": "C1"}, {"floor": [0.3, 0.4]})
    assert texts_of(axes) == ["floor", "a"]
    assert list(axes.get_lines()[-1].get_ydata()) == pytest.approx([30, 40])
    _, panels = figures.new_figure(2)
    history = [{"epoch": 0, "dev_loss": 1, "train_loss": 1, "dev_accuracy": 0.5,
                "train_accuracy": 0.5}]
    figures.plot_learning_curves(panels, {"dev": [{"history": history}]}, {"dev": "C0"},
                                 {"floor": 0.25})
    assert [sorted(texts_of(axes)) for axes in panels] == [["(training)", "dev"],
                                                           ["(training)", "dev", "floor"]]


def with_steps(row, losses, rates=()):
    """Give a row a history of steps."""
    return dict(row, history=[{"loss": loss, "lr": lr} for loss, lr in
                              zip(losses, rates or [1.0] * len(losses))])


def test_rates_name_broken_trials_and_keep_losses_in_sight():
    rows = [with_steps(row(0.7, lr=1e-4), [0.7, 0.5]),
            with_steps(dict(row(0, lr=1e-2, mark="one class"), metrics={"dev_accuracy": 0.5}),
                       [0.7, 9.0]), with_steps(row(0, lr=1.0, mark="diverged"), [])]
    _, panels = figures.new_figure(2)
    figures.plot_rates(panels, rows, [1e-4, 1e-2, 1.0])
    assert texts_of(panels[0]) == ["1e-4", "1e-2"] and texts_of(panels[1]) == ["broken"]
    assert panels[0].texts[1].get_position()[1] <= 1
    assert list(panels[1].get_lines()[1].get_ydata()) == [70]  # the line of means: sound ones


def test_schedules_are_drawn_relative_to_their_peak():
    rows = [with_steps(row(0.7, lr=2.0, warmup=w, decay=d), [1, 1], [1.0 + w, 2.0 * (d == "none")])
            for w in (0.0, 1.0) for d in ("linear", "none")]
    _, panels = figures.new_figure(2)
    figures.plot_schedules(panels, rows, [0.0, 1.0], ["linear", "none"])
    assert [list(line.get_ydata()) for line in panels[0].get_lines()] == [
        [0.5, 0], [1, 0], [0.5, 1], [1, 1]]
    assert [sorted(texts_of(axes)) for axes in panels] == [["linear", "none"]] * 2
    assert [t.get_text() for t in panels[1].get_xticklabels()] == ["0 %", "100 %"]


def test_all_words_stand_behind_the_numbers_of_words():
    figure, (axes,) = figures.new_figure()
    places = figures.words_axis(axes, [8, 16])
    axes.plot(places, [1, 2, 3])
    figure.canvas.draw()
    assert places == [8, 16, 32]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "16", "all"]


def test_masked_lm_losses_are_named():
    _, (axes,) = figures.new_figure()
    curve = [{"epoch": 0, "held_out_loss": 5.0},
             {"epoch": 1, "held_out_loss": 4.0, "loss": 3.0}]
    figures.plot_mlm_loss(axes, curve)
    assert sorted(texts_of(axes)) == ["held out", "training"]
    assert [list(line.get_ydata()) for line in axes.get_lines()] == [[3.0], [5.0, 4.0]]
    figures.plot_mlm_loss(axes, curve[:1])  # a run without a step
    _, (axes,) = figures.new_figure()
    figures.plot_mlm_loss(axes, [dict(point, held_out_loss=None, loss=None) for point in curve])
    assert texts_of(axes) == [], "a loss that was not measured has no point and no name"


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


def test_answers_are_kept_as_they_come(shown, tmp_path, capsys):
    answers = figures.Answers("03_it", str(tmp_path), "sample")
    path = tmp_path / "answers" / "03_it.json"
    answers.give("Q1. " + EVIL, EVIL, "lengths", True, point="3a")
    first = {"question": "Q1. " + EVIL, "answer": EVIL, "figure": "lengths", "verdict": "supported",
             "point": "3a"}
    assert json.loads(path.read_text(encoding="utf-8")) == [first]
    answers.give("Q2", "no", holds=False)
    answers.give("Q3", "so")
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept[0] == first and [r["verdict"] for r in kept] == ["supported", "contradicted", ""]
    assert [r["point"] for r in kept] == ["3a", "", ""]
    assert ["assignment: 3a" in page for page in shown] == [True, False, False]
    assert [r["answer"] for r in kept[1:]] == ["No", "So"] and figures.as_sentence("") == ""
    assert "script" not in [tag for page in shown for tag in Page(page).tags]
    assert ["As expected." in page for page in shown] == [True, False, False]
    assert ["NOT as expected." in page for page in shown] == [False, True, False]
    answers.table()
    assert Page(shown[3]).texts[4:8] == ["Q1. " + EVIL, EVIL, "lengths", "yes"]
    assert "indicative only" in capsys.readouterr().out
    figures.Answers("x", str(tmp_path), "full").table()
    assert "indicative" not in capsys.readouterr().out


def test_a_point_that_the_assignment_lacks_is_refused(shown, tmp_path):
    answers = figures.Answers("03_it", str(tmp_path), "sample")
    with pytest.raises(files.InputError, match="point '3e' is not in the assignment; use one of"):
        answers.give("Q1. Why?", "So.", point="3e")
    assert shown == answers.rows == [] and not (tmp_path / "answers").exists()


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


def test_an_answer_travels_with_its_output(displayed, tmp_path):
    answers = figures.Answers("03_it", str(tmp_path), "sample")
    answers.give("Q1. Why?", "so.", holds=False, point="4a")
    (data, metadata), = displayed
    assert metadata == {"answer": answers.rows[0]} and answers.rows[0]["answer"] == "So."
    assert data["text/plain"] == "Q1. Why? So. NOT as expected."


def hostile(text="</pre><script>alert(1)</script> & ä"):
    """Return the text: '\x1b' <b>."""
    return text  # marked


@pytest.mark.parametrize("shown_thing", [hostile, helpers.fit, helpers.vectorize_ex,
                                         cpu.Dropout, figures.Answers.give])
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


def test_the_banner_says_which_run_this_is(capsys):
    figures.banner("full", "bert", "data/FILIMDB", "cpu")
    said = capsys.readouterr().out
    assert all(word in said for word in ("profile full", "data data/FILIMDB", "model bert", "CPU",
                                         "torch " + runtime.VERSIONS["torch"]))
    assert "indicative" not in said
    figures.banner("sample", "bert", "data/sample", "cpu")
    assert "indicative only" in capsys.readouterr().out


@pytest.mark.parametrize("n, text", [(7, "7"), (1234, "1.23 k"), (1234567, "1.23 M")])
def test_counts_in_short(n, text):
    assert figures.in_short(n) == text


def words_in(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_figures_of_the_checks_name_what_they_show():
    rows = [{"part": "train", "a": 1.0, "b": 11.0}, {"part": "dev", "a": 0.5, "b": 0.5}]
    figure = figures.dumbbell_figure(rows, {"a": "before", "b": "after"}, "%")
    assert {"before", "after", "1.00 %", "11.00 %", "0.50 %"} == set(words_in(figure))
    figure = figures.blocks_figure({"embeddings": 300, "layer 1": 100})
    assert [word.split()[0] for word in words_in(figure)] == ["75", "25"]
    changes = {(kind, n): torch.tensor([0.0, 2.0]) for kind in ("masked", "no mask")
               for n in (8, 16)}
    words = words_in(figures.padding_figure(changes, {8: 1, 16: 3}, bound=1e-5))
    assert {"1", "3 labels flip", "asserted bound"} <= set(words)
    lengths = {name: np.array([5, 9, 70]) for name in ("train", "dev")}
    words = words_in(figures.lengths_figure(lengths, [64, 128]))
    assert {"train", "dev", "33 %", "0 %"} <= set(words)


def test_every_part_has_its_line_and_its_name_however_many_there_are():
    names = [*helpers.PARTS, *(f"part-{i}" for i in range(6))]
    figure = figures.lengths_figure({name: np.arange(5, 90) for name in names}, [64, 128])
    assert set(names) <= set(words_in(figure))
    drawn = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 85]
    assert len(drawn) == len(names)
    looks = [(line.get_color(), line.get_linestyle()) for line in drawn]
    assert len(set(looks)) == len(looks), "two parts look alike"
