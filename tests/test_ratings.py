"""Ratings that texts state: what counts as one, and a pretraining on them against `train`."""
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import made_up_reviews, options, write_filimdb

import evaluate
import grading
import helpers
from files import InputError
from ratings import rated

QUICK = dict(seq_len=32, batch_size=8, accumulation=1, epochs=4, lr=1e-3, device="cpu")
TEXTS, LABELS = zip(*dict(zip(*made_up_reviews(200, length=6))).items())
N = len(TEXTS)
STATED = [f"{text} {9 if label == 'pos' else 2}/10" for text, label in zip(TEXTS, LABELS)]
PLAIN = ["no rating here", "seen on 9/10/99", "5 of 10", "it rates 6/10"]


@pytest.mark.parametrize("text,left,label", [
    ("a 7/10", "a  ", "pos"), ("6.9/10", None, None), ("4.5 / 10", None, None), ("4/10", " ", "neg"),
    ("10 out of 10!", " !", "pos"), ("1 OUT OF 10", " ", "neg"), ("8,5/10", " ", "pos"),
    ("11/10", None, None), ("1/100", None, None), ("3/10.5", None, None), ("2/3/10", None, None),
    ("not 10/10, rather 3/10", "not  , rather  ", "neg"), ("9 out of 10 fans", "  fans", "pos"),
    ("of 10", None, None), ("", None, None)])
def test_what_counts_as_a_rating(text, left, label):
    assert rated([text]) == (([left], [label]) if label else ([], []))


@given(st.lists(st.tuples(st.text(alphabet="ab /.,0159", max_size=20), st.integers(0, 10)), max_size=5))
def test_no_rating_is_left_and_none_is_made_up(pairs):
    texts = [f"{text} x {rating}/10 y" for text, rating in pairs]
    found, labels = rated(texts)
    expected = ["pos" if rating >= 7 else "neg" for _, rating in pairs if rating >= 7 or rating <= 4]
    assert labels == expected and len(found) == len(labels)
    assert all(text.endswith("x   y") for text in found)


def test_it_is_the_training_on_the_stated_labels(cache, tiny_bert):
    """The encoder is, bit for bit, that of `train` on the texts that are not held out."""
    note = helpers.pretrain(PLAIN + STATED, ["train"], model=tiny_bert, objective="ratings", **QUICK)
    assert (note["n_texts"], note["n_held_out"]) == (N, N // 10)
    texts, labels = rated(PLAIN + STATED)
    held = set(helpers.held_out(N))
    rest = [i for i in range(N) if i not in held]
    settings = dict(helpers.MLM_DEFAULTS, model=tiny_bert, **QUICK)
    params = helpers.train([texts[i] for i in rest], [labels[i] for i in rest], **settings)
    kept = helpers.load_bert(note["path"])[0]
    for (name, ours), other in zip(kept.bert.named_parameters(),
                                   params["model"].bert.parameters()):
        assert torch.equal(ours, other), name
    guesses = helpers.classify([texts[i] for i in helpers.held_out(N)], params)
    share = helpers.accuracy([labels[i] for i in helpers.held_out(N)], guesses)
    assert note["curve"][-1]["held_out_accuracy"] == pytest.approx(share)
    assert not any("/10" in text for text in texts), "BERT would read the answer"


def test_what_it_returns_serves_train_and_is_found_again(cache, tiny_bert, capsys):
    note = helpers.pretrain(STATED, ["train"], model=tiny_bert, objective="ratings", **QUICK)
    assert json.loads(json.dumps(note)) == note and note["loss_after"] < note["loss_before"]
    line = helpers.describe(note)
    assert f"{N} texts of train that state a rating (held-out accuracy " in line and "MLM" not in line
    capsys.readouterr()
    assert helpers.pretrain(STATED, ["train"], model=tiny_bert, objective="ratings", **QUICK) == note
    assert "not repeated" in capsys.readouterr().out
    masked = helpers.pretrain(STATED, model=tiny_bert, **QUICK)
    assert masked["path"] != note["path"] and "MLM" in helpers.describe(masked)
    params = helpers.train(TEXTS[:8], LABELS[:8], note, **dict(QUICK, epochs=1))
    assert helpers.accuracy(LABELS, helpers.classify(TEXTS, params)) > 0.9, "it knew before"
    assert params["pretrained"] == note


@pytest.mark.parametrize("texts", [PLAIN, STATED[:1] + PLAIN, ["a 9/10", "b 8/10", "c 2/10"]])
def test_too_few_ratings_are_refused(cache, tiny_bert, texts):
    with pytest.raises(InputError, match="of the texts state a rating such as 8/10; it needs 2 of 7"):
        helpers.pretrain(texts, model=tiny_bert, objective="ratings", **QUICK)
    with pytest.raises(InputError, match="state a rating"):
        grading.plan_pretraining(texts, {"model": tiny_bert, "objective": "ratings"},
                                 grading.Clock("cpu"))


@pytest.mark.parametrize("key", ["freeze", "whole_word"])
def test_what_is_of_masked_lm_is_refused(cache, key):
    with pytest.raises(InputError, match="are of masked LM"):
        helpers.pretrain(STATED, objective="ratings", **{key: True})


def test_train_has_no_objective(cache):
    with pytest.raises(InputError, match="objective='ratings': for pretrain only"):
        helpers.train(["a", "b"], ["pos", "neg"], objective="ratings")
    with pytest.raises(InputError, match="write pretrain.objective=ratings"):
        evaluate.parse_settings(["objective=ratings"])
    assert evaluate.parse_settings(["pretrain.objective=ratings"]) == ({}, {"objective": "ratings"})


def test_ratings_of_dev_are_not_read(capsys):
    data = {"train": helpers.Part([0], ["a"], None), "dev": helpers.Part([0], ["b"], None)}
    assert evaluate.not_graded({"train": ["a", "c"], "train_unlabeled": ["a", "b", "d"]}, data) == {
        "train": ["a", "c"], "train_unlabeled": ["a", "d"]}
    assert evaluate.main(["--transductive", "--set", "pretrain.objective=ratings"]) == 2
    assert "is its label" in capsys.readouterr().err


@pytest.mark.parametrize("grade", [[], ["--grading"]])
def test_evaluate_pretrains_on_ratings(tmp_path, tiny_bert, cache, capsys, monkeypatch, grade):
    data = write_filimdb(tmp_path)
    (tmp_path / "train_unlabeled.texts").write_text("\n".join(STATED) + "\n")
    out, record = tmp_path / "preds.tsv", tmp_path / "run.json"
    assert evaluate.main([*grade, "--data", str(data), "--model", tiny_bert, "--out", str(out), "--json",
                          str(record), *options(epochs=1), "--set", "pretrain.objective=ratings",
                          "--set", "pretrain.lr=1e-3", "--set", "pretrain.device=cpu"]) == 0
    kept = json.loads(record.read_text())
    assert kept["pretraining"]["n_texts"] == len(rated(
        helpers.read_lines(str(tmp_path / "train.texts")) + STATED)[0]) >= N
    assert kept["pretraining"]["config"]["objective"] == "ratings"
    said = capsys.readouterr().out
    assert "that state a rating (held-out accuracy" in said
    assert said.count("grading: ") == 2 * len(grade)
