"""What analysis.py says of made-up predictions whose answers are known, and of a run's own."""
import gzip
import os
import re

import numpy as np
import pytest
from tools import WORDS, options, run, write_filimdb

import analysis
import files
import helpers
from analysis import Reviews, calibration_error, draw_errors, expected_accuracy, share
from files import InputError

RECORD = {"model": "bert", "load": None, "seen": "no pretraining", "device": "cpu", "cores": 2,
          "minutes": {"training": 1.5}, "settings": {"lr": 0.5, "epochs": 3, "an_older_option": 0.0}}


def part_of(truth, said, chance=None, name="dev", texts=None):
    truth, said = np.asarray(truth), np.asarray(said)
    return Reviews([f"{name}/{i}" for i in range(len(said))], texts or ["good"] * len(said), truth,
                   said, said * 1.0 if chance is None else np.asarray(chance))


# ---- intervals ----------------------------------------------------------------------------------

@pytest.mark.parametrize("count,n", [(0, 10), (5, 10), (10, 10), (3, 1000), (1, 1)])
def test_the_interval_is_clopper_and_pearsons(count, n):
    """At its ends so many or more, so many or fewer, have a probability of 2.5 % each."""
    from scipy.stats import binom
    value, low, high = share(count, n)
    assert value == 100 * count / n and low <= value <= high
    assert low == 0 if count == 0 else binom.sf(count - 1, n, low / 100) == pytest.approx(0.025)
    assert high == 100 if count == n else binom.cdf(count, n, high / 100) == pytest.approx(0.025)


def test_a_difference_has_the_interval_of_its_kind():
    random = np.random.RandomState(1)
    first, second = random.rand(400) < 0.8, random.rand(300) < 0.6
    mean, low, high = analysis.difference(first, second, paired=False)
    assert mean == pytest.approx(100 * (first.mean() - second.mean()))
    assert (high - low) / 2 == pytest.approx(196 * np.sqrt(first.var() / 400 + second.var() / 300),
                                             rel=0.01)
    mean, low, high = analysis.difference(first, first, paired=True)
    assert mean == 0 and low == -high and high < 1


# ---- calibration --------------------------------------------------------------------------------

def test_calibration_of_probabilities_whose_error_is_known():
    assert calibration_error(np.repeat([0.25, 0.75], 4), np.array([1, 0, 0, 0, 1, 1, 1, 0])) == 0
    assert calibration_error(np.full(10, 0.8), np.repeat([0, 1], 5)) == pytest.approx(30)
    assert calibration_error(np.array([1.0, 0.0]), np.array([0, 1])) == 100  # sure and wrong
    both = np.repeat([0.05, 0.95], 10)  # errors of opposite sign do not cancel
    assert calibration_error(both, np.repeat([1, 0], 10)) == pytest.approx(95)


def test_true_probabilities_are_seen_to_be_true():
    random = np.random.RandomState(3)
    chance = random.rand(5000)
    truth = (random.rand(5000) < chance).astype(int)
    assert calibration_error(chance, truth) < analysis.error_by_chance(chance) < 4
    assert calibration_error(np.clip(chance * 1.2, 0, 1), truth) > analysis.error_by_chance(chance)
    rows = analysis.reliability(chance, truth)
    assert len(rows) == 10 and sum(row["n"] for row in rows) == 5000
    assert sum(row["low"] <= row["probability"] <= row["high"] for row in rows) >= 8


# ---- without labels -----------------------------------------------------------------------------

@pytest.mark.parametrize("share_pos", [0.0, 0.25, 0.9])
def test_the_accuracy_that_is_expected_is_the_true_one(share_pos):
    """A model that finds 90 % of pos and 80 % of neg, whatever their share."""
    truth = np.repeat([0, 1], 10000)
    labelled = part_of(truth, np.r_[np.arange(10000) < 2000, np.arange(10000) < 9000] * 1)
    called = share_pos * 0.9 + (1 - share_pos) * 0.2
    other = part_of([0] * 20000, (np.arange(20000) < 20000 * called) * 1)
    middle, low, high = expected_accuracy(labelled, other)
    true = 100 * (share_pos * 0.9 + (1 - share_pos) * 0.8)
    assert low < true < high and middle == pytest.approx(true, abs=0.5) and high - low < 3


def test_of_a_model_that_says_one_class_nothing_is_to_be_expected():
    constant = part_of([0, 1] * 500, [1] * 1000)
    middle, low, high = expected_accuracy(constant, constant)
    assert low < 5 and high > 95


# ---- length -------------------------------------------------------------------------------------

def test_accuracy_by_length():
    lengths = np.array([5, 50, 7, 70, 6, 60, 8, 80])
    rows = analysis.by_length(lengths, lengths < 60, 2)
    assert [(row["from"], row["to"], row["words"], row["n"], row["accuracy"]) for row in rows] == [
        (5, 8, 6.5, 4, 100.0), (50, 80, 65.0, 4, 25.0)]
    assert rows[1]["low"] == share(1, 4)[1]


@pytest.mark.parametrize("keep", ["head", "tail"])
def test_texts_are_cut_to_lengths_that_there_are(keep):
    texts = [" ".join(WORDS[:20 + i % 30]) for i in range(200)]
    cut = analysis.cut_to(texts, [3, 7, 40], keep)
    found = {len(text.split()) for text in cut}
    assert {3, 7} < found and cut == analysis.cut_to(texts, [3, 7, 40], keep)
    assert all(text.startswith(some) if keep == "head" else text.endswith(some)
               for text, some in zip(texts, cut))


def test_what_length_explains(monkeypatch, tmp_path):
    """A model that needs the first word of ten: a whole review is right, a half may not be."""
    monkeypatch.setattr(helpers, "classify", lambda texts, params: [
        "pos" if "good" in text else "neg" for text in texts])
    dev = part_of([1] * 400, [1] * 400, texts=["good " + "word " * 9] * 400)
    short = part_of([1] * 300, [1] * 150 + [0] * 150, name="dev-b", texts=["word word"] * 300)
    text = "\n".join(analysis.length_text({"dev": dev, "dev-b": short}, {"a": 1}, str(tmp_path)))
    assert "Dev 100.0 %, dev-b 50.0 %: 50.0 points apart." in text
    head, tail = re.findall(r"cut to the (?:head|tail) .*", text)
    assert "has: 100.0 %. Cutting takes 0.0 points (" in head
    assert "whole, is classified rightly more often by -50.0 points (-55" in head
    assert "has: 0.0 %. Cutting takes 100.0 points (" in tail
    assert "is classified rightly more often by 50.0 points (44" in tail
    assert "From bin to bin: dev 100.0 to 100.0 %; dev-b 0.0 to 100.0 %; head of dev 1" in text
    assert os.path.exists(str(tmp_path / "figures" / "accuracy_by_length.png"))
    alone = "\n".join(analysis.length_text({"dev": dev, "dev-b": short}, None, str(tmp_path)))
    assert "was not measured" in alone and "apart" not in alone


# ---- errors -------------------------------------------------------------------------------------

def test_errors_of_two_models_are_drawn_alike():
    truth = np.zeros(3000, int)
    said = (np.arange(3000) % 10 == 0) * 1  # 300 errors
    other = said.copy()
    other[::40] = 0  # of which a better model has a quarter right
    drawn, again = draw_errors(part_of(truth, said)), draw_errors(part_of(truth, other))
    assert len(set(drawn)) == len(set(again)) == 100 and all(said[i] for i in drawn)
    assert drawn == draw_errors(part_of(truth, said)) and drawn != sorted(drawn)
    kept = [i for i in drawn if i % 40]
    assert again[:len(kept)] == kept and len(kept) > 60
    assert draw_errors(part_of([0, 1, 1], [0, 0, 1])) == [1]


def test_what_readers_found(tmp_path):
    part = part_of([0, 1, 1, 1], [1, 0, 1, 0])
    path, out = tmp_path / "errors.tsv", str(tmp_path)
    text = "\n".join(analysis.errors_text(part, str(path), out))
    assert "3 of 3 errors" in text and "has labelled 0 of them" in text and "![" not in text
    path.write_text("dev/0\tirony\tsarcastic\ndev/3\tirony\ndev/2\tnegation\tright by now\n")
    text = "\n".join(analysis.errors_text(part, str(path), out))
    assert "has labelled 2 of them" in text and "Not read yet: dev/1." in text
    assert "| irony | " + analysis.KINDS["irony"] + " | 1 | 1 | " + analysis.percent(*share(2, 2)) in text
    assert "negation" not in text, "that review is no error of this model"
    for line, told in (("dev/1\tironie\t", "line 4: kind 'ironie'; did you mean irony?"),
                       ("dev/0\tirony\t", "line 4: dev/0 stands there twice")):
        path.write_text("dev/0\tirony\ndev/3\tirony\ndev/2\tnegation\n" + line)
        with pytest.raises(InputError, match=re.escape(told)):
            analysis.errors_text(part, str(path), out)


# ---- the page -----------------------------------------------------------------------------------

@pytest.fixture
def made_up(tmp_path):
    """A folder of reviews and what a run of evaluate.py leaves; one dev review in four is wrong."""
    data, random, said, chances = tmp_path / "data", np.random.RandomState(0), [], []
    data.mkdir()
    for name, n in (("train", 8), ("dev", 80), ("test", 40), ("dev-b", 40), ("test-b", 20)):
        labels = ["neg", "pos"] * (n // 2)
        texts = [" ".join(random.choice(WORDS, 2 + random.randint(60))) for _ in range(n)]
        (data / (name + ".texts")).write_text("\n".join(texts) + "\n")
        if "test" not in name:
            (data / (name + ".labels")).write_text("\n".join(labels) + "\n")
        for i, label in enumerate(labels):
            wrong = name == "dev" and i % 8 in (0, 1)
            called = {"neg": "pos", "pos": "neg"}[label] if wrong else label
            said.append(f"{name}/{i}\t{called}\n")
            chances.append(f"{name}/{i}\t{0.75 if called == 'pos' else 0.25}\n")
    (tmp_path / "p.tsv").write_text("".join(said))
    with gzip.open(str(tmp_path / "s.tsv.gz"), "wt") as file:
        file.write("".join(chances))
    files.save_json(str(tmp_path / "run.json"), dict(RECORD, data=str(data)))
    return tmp_path


def analysed(folder, *options):
    out = str(folder / "page")
    code = analysis.main([str(folder / "run.json"), str(folder / "p.tsv"), "--out", out, "--errors",
                          str(folder / "errors.tsv"), *options])
    path = folder / "page" / "README.md"
    return code, path.read_text(encoding="utf-8") if path.exists() else ""


def test_a_page_of_made_up_predictions(made_up):
    (made_up / "errors.tsv").write_text("dev/8\tplot mood\tsad film\n")
    code, page = analysed(made_up, "--scores", str(made_up / "s.tsv.gz"))
    assert code == 0
    for line in ("| dev | neg | 30 | 10 | 75.0 % (58.8 to 87.3) |",
                 "| dev | pos | 10 | 30 | 75.0 % (58.8 to 87.3) |",
                 "| dev | both |  |  | **75.0 % (64.1 to 84.0)** |",
                 "| dev-b | neg | 20 | 0 | 100.0 % (83.2 to 100.0) |",
                 "| plot mood | " + analysis.KINDS["plot mood"] + " | 1 | 0 | 100.0 % (2.5 to 100.0) |"):
        assert line in page, line
    for line in ("On dev as far as can be seen: the labels predicted have 75.0 % on average, 75.0 % "
                 "of them are right (+0.0 points, -", "expected calibration error 0.0 points",
                 "On dev-b no, too unsure: the labels predicted have 75.0 % on average, 100.0 % of "
                 "them are right (-25.0 points, -", "calibration error 25.0 points"):
        assert line in page, line
    assert "; lr=0.5; all else by default. Minutes: training 1.5" in page
    assert "20 of 20 errors were drawn by a fixed seed; one reader has labelled 1 of" in page and "Not read yet: dev/" in page
    assert re.search(r"\| test \| 40 \| 50\.0 % \(33\.8 to 66\.2\) \| 7\d\.\d % \(\S+ to \S+\) \| dev \|",
                     page)
    names = re.findall(r"!\[[^\]]{40,}\]\((figures/\w+\.png)\)", page)
    assert len(names) == 3 and all((made_up / "page" / name).stat().st_size > 3000 for name in names)
    assert "was not measured" in page, "no classifier was given"


def test_without_probabilities_there_is_no_calibration(made_up):
    code, page = analysed(made_up)
    assert code == 0 and "no probabilities were given (--scores)" in page
    assert "calibration.png" not in page and "by_length.png" in page


def test_errors_are_printed_to_be_read(made_up, capsys):
    (made_up / "errors.tsv").write_text("dev/8\tplot mood\n")
    assert analysed(made_up, "--texts") == (0, "")
    said = capsys.readouterr().out
    texts = helpers.read_lines(str(made_up / "data" / "dev.texts"))
    heads = re.findall(r"(?m)^(dev/\d+)\tis (neg|pos), predicted (neg|pos), (.*)\n(.*)$", said)
    assert len(heads) == 20 and heads[-1][0] == "dev/8" and heads[-1][3] == "plot mood"
    for review, label, called, state, text in heads:
        assert label != called and text == texts[int(review[4:])].strip()
        assert state == "plot mood" or state == "not read yet"
    assert all(kind in said.split("\n")[-2] for kind in analysis.KINDS)


def test_predictions_of_other_reviews_are_refused(made_up, capsys):
    lines = (made_up / "p.tsv").read_text().splitlines(True)
    for text, told in (("".join(lines[:-1]), "says nothing of test-b/19"), ("x\n", "cannot be read")):
        (made_up / "p.tsv").write_text(text)
        assert analysed(made_up) == (2, "")
        said = capsys.readouterr().err
        assert told in said and said.count("\n") == 1


def test_wrong_use_is_one_line_that_names_the_file(made_up, capsys):
    scores, swapped = str(made_up / "s.tsv"), str(made_up / "p.tsv")
    lines = gzip.decompress((made_up / "s.tsv.gz").read_bytes()).decode().splitlines(True)
    (made_up / "s.tsv").write_text("".join(lines[:-1]))
    for options_, told in ((["--scores", scores], f"{scores}: says nothing of test-b/19"),
                           (["--scores", swapped], f"{swapped}: holds other than numbers")):
        assert analysed(made_up, *options_) == (2, "")
        assert told in capsys.readouterr().err
    assert analysis.main([str(made_up / "none.json"), swapped]) == 2
    assert "evaluate.py --json writes it" in capsys.readouterr().err
    assert analysis.main([str(made_up / "run.json"), str(made_up / "s.tsv.gz")]) == 2
    assert "holds other than neg and pos" in capsys.readouterr().err
    os.remove(str(made_up / "data" / "dev.labels"))
    for options_ in ([], ["--texts"]):
        assert analysed(made_up, *options_) == (2, "")
        assert "dev with its labels is needed" in capsys.readouterr().err


def test_six_lines_of_accuracy_are_drawn(made_up, tmp_path, tiny_bert):
    """Where test has labels too: none is left out of the figure."""
    parts = {name: part_of([0, 1] * 8, [0, 1] * 8, name=name, texts=["good film"] * 16)
             for name in ("dev", "dev-b", "test", "test-b")}
    params = helpers.train(["good", "bad"], ["pos", "neg"], model=tiny_bert, seq_len=8, epochs=1)
    analysis.length_text(parts, params, str(tmp_path))
    table = (tmp_path / "figures" / "accuracy_by_length.csv").read_text()
    for name in (*parts, "head of dev", "tail of dev"):
        assert f"\n{name}," in table, name


def test_the_predictions_of_a_run_are_analysed(tiny_bert, tmp_path, monkeypatch):
    """evaluate.py's own files, and its classifier on dev reviews as short as dev-b's."""
    data = tmp_path / "data"
    data.mkdir()
    out, record, scores, folder = (str(tmp_path / name) for name in ("p.tsv", "run.json", "s", "c"))
    run("--data", str(write_filimdb(data)), "--model", tiny_bert, "--no-pretrain", "--out", out,
        "--json", record, "--scores", scores, "--save", folder, *options())
    code, page = analysed(tmp_path, "--scores", scores, "--load", folder)
    assert code == 0 and page.count("Dev reviews cut to the") == 2 and "![" in page
    parts = analysis.read_parts(str(data), out, scores)
    assert analysis.percent(*analysis.accuracy(parts["dev"])) in page
    assert files.read_json(record, {})["parts"]["dev"]["accuracy"] == (
        parts["dev"].said == parts["dev"].truth).mean()
