"""Classifying: order, batches of like length, the estimate of the time, and the floor to beat."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import WORDS, fill, made_up_reviews

import helpers
from files import InputError
from helpers import (
    accuracy,
    add_special_tokens,
    classify,
    load_bert,
    majority_accuracy,
    make_config,
    naive_bayes,
    predict_logits,
    tokenize_all,
)

TEXT = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(
    [*WORDS, "lovely.", "gr\u00e9at", "[MASK]", "\u96fb"]), max_size=90).map(" ".join))


@pytest.fixture(scope="module")
def params(tiny_bert):
    """A classifier that says both labels, by random weights."""
    model, tokenizer = load_bert(tiny_bert, dropout=0.5)
    fill(model, seed=3)
    model.classifier.bias.data.copy_(torch.tensor([0.0, 0.01]))
    config = make_config(seq_len=64, device="cpu")
    texts = made_up_reviews(100)[0]
    logits = predict_logits(model, tokenize_all(texts, tokenizer), tokenizer, config)
    model.classifier.bias.data[1] += float((logits[:, 0] - logits[:, 1]).median())
    return {"model": model, "tokenizer": tokenizer, "config": config}


def alone(texts, params, **overrides):
    """Return the logits of each text by itself, through transformers alone."""
    config = make_config(vars(params["config"]), **overrides)
    with torch.no_grad():
        return torch.cat([params["model"].eval()(torch.tensor([add_special_tokens(
            params["tokenizer"].convert_tokens_to_ids(params["tokenizer"].tokenize(text)),
            config.seq_len, config.keep, params["tokenizer"])]))[0] for text in texts])


@given(st.lists(TEXT, max_size=12), st.sampled_from([3, 16, 64]))
def test_any_texts_are_classified_as_one_by_one(params, texts, seq_len):
    predicted = classify(texts, params, seq_len=seq_len)
    logits = alone(texts, params, seq_len=seq_len) if texts else []
    assert len(predicted) == len(texts)
    for label, (neg, pos) in zip(predicted, logits):
        assert label in ("neg", "pos") and type(label) is str
        assert abs(float(pos - neg)) < 1e-5 or label == ("pos" if pos > neg else "neg")


@given(st.lists(TEXT, min_size=1, max_size=8), st.sampled_from([5, 16]), st.sampled_from(["head", "head+tail"]))
def test_three_views_of_what_is_cut_one_by_one(params, texts, seq_len, keep):
    """Of what is not cut there is but one view, so that its mean is that view."""
    got = helpers.classifier_logits(texts, params, seq_len=seq_len, keep=keep, views=True)
    by_keep = [alone(texts, params, seq_len=seq_len, keep=one) for one in ("head", "tail", "head+tail")]
    assert torch.allclose(got, torch.stack(by_keep).mean(0), atol=1e-5)


def test_each_reading_says_its_own_progress(params, reviews, monkeypatch):
    names, original = [], helpers.progress_bar
    monkeypatch.setattr(helpers, "progress_bar", lambda total, what, unit: names.append(
        f"{what}: {unit}") or original(total, what, unit))
    helpers.classifier_logits(reviews[0], params, seq_len=5, views=True)
    assert [name for name in names if "classifying" in name] == [
        "classifying: token", *(f"classifying again by {keep}: token" for keep in helpers.TRUNCATIONS
                                if keep != params["config"].keep)]


def test_mean_pooling_one_by_one(tiny_bert, reviews):
    """Mean of the last hidden states, [CLS] and [SEP] too, then the classifier: no pooler."""
    model, tokenizer = load_bert(tiny_bert, pooling="mean", seed=4)
    texts, config = reviews[0] + made_up_reviews(40)[0], make_config(seq_len=32, device="cpu")
    logits = predict_logits(model, tokenize_all(texts, tokenizer), tokenizer, config)
    for text, got in zip(texts, logits):
        ids, _, mask, _ = helpers.vectorize_ex(text, None, 32, tokenizer, config.keep)
        with torch.no_grad():
            hidden = model.bert(torch.tensor([ids[:sum(mask)]]))[0][0]
            expected = model.classifier.weight @ hidden.mean(0) + model.classifier.bias
        assert torch.allclose(got, expected, atol=1e-5)
    features = helpers.frozen_features(texts, model, tokenizer, config)
    weight, bias = (p.detach().numpy() for p in (model.classifier.weight, model.classifier.bias))
    assert np.allclose(features @ weight.T + bias, logits.numpy(), atol=1e-5), "the same vectors"


def test_many_texts_keep_their_order(params, reviews):
    texts = made_up_reviews(300, length=60)[0] + reviews[0]
    config = params["config"]
    logits = predict_logits(params["model"], tokenize_all(texts, params["tokenizer"]),
                            params["tokenizer"], config)
    expected = alone(texts, params)
    assert logits.dtype == torch.float32 and float((logits - expected).abs().max()) < 1e-5
    predicted = classify(texts, params)
    assert predicted == [("neg", "pos")[i] for i in logits.argmax(1).tolist()]
    assert 50 < predicted.count("pos") < 250


def test_two_threads_predict_as_one(params, reviews, two_threads):
    texts = made_up_reviews(300, length=60)[0] + reviews[0]
    tokens = tokenize_all(texts, params["tokenizer"])
    logits = predict_logits(params["model"], tokens, params["tokenizer"], params["config"])
    torch.set_num_threads(1)
    assert torch.allclose(logits, alone(texts, params), atol=1e-5)
    assert torch.allclose(logits, predict_logits(
        params["model"], tokens, params["tokenizer"], params["config"]), atol=1e-6)


def test_a_training_model_is_left_training_and_predicts_without_dropout(params):
    texts = made_up_reviews(20)[0]
    expected = classify(texts, params)
    params["model"].train()
    assert all(classify(texts, params) == expected for _ in range(3)) and params["model"].training
    params["model"].eval()


def test_no_text_and_empty_text(params):
    assert classify([], params) == classify((), params) == []
    assert classify([""], params) == classify(["", "\t "], params)[:1]
    assert classify(iter(["good", "bad"]), params) == classify(["good", "bad"], params)


def test_the_settings_of_the_training_serve_for_classifying(params):
    texts = [" ".join(["great"] * 200 + ["awful"] * 200)] * 2
    rows, real = [], helpers.add_special_tokens

    def spy(*args):
        rows.append(real(*args))
        return rows[-1]

    helpers.add_special_tokens = spy
    try:
        classify(texts, params)
        classify(texts, params, seq_len=10, keep="head")
        classify(texts, params, words=3)
    finally:
        helpers.add_special_tokens = real
    great, awful = params["tokenizer"].convert_tokens_to_ids(["great", "awful"])
    assert rows[0] == [2, *[great] * 15, *[awful] * 47, 3]
    assert rows[2] == [2, *[great] * 8, 3] and rows[4] == [2, *[awful] * 3, 3]


def test_unsuitable_settings_are_refused(params):
    for overrides, said in (({"seq_len": 513}, "512"), ({"seqlen": 5}, "seqlen"),
                            ({"device": "gpu9"}, "device='gpu9'"),
                            ({"pooling": "mean"}, "pooling='mean': fixed by the training"),
                            ({"lr": 0.1}, "classifying takes seq_len, keep, words")):
        with pytest.raises(InputError, match=said):
            classify(["good"], params, **overrides)
    with pytest.raises(InputError, match="text 1 is of type int"):
        classify(["good", 3], params)


class Clock:
    """A clock that goes on by some seconds whenever it is read."""

    def __init__(self, tick):
        self.now, self.tick = 1e9, tick

    def time(self):
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("tick,warned,told", [(0.001, False, False), (6, False, True),
                                              (600, True, True)])
def test_the_estimate(params, monkeypatch, capsys, tick, warned, told):
    texts = ["good film " * 20] * 640  # all of a length: every micro-batch is the same work
    with monkeypatch.context() as patch:
        patch.setattr(helpers, "time", Clock(tick))
        classify(texts, params)
    out = capsys.readouterr().out
    assert ("classifying 640 reviews: about" in out) == told
    assert ("more than the 30 minutes" in out) == warned and out.count("Warning") == warned
    if told:
        minutes = float(out.split("about ")[1].split(" minutes")[0].replace(",", ""))
        batches = 640 // (helpers.CPU_TOKENS // 42)
        assert minutes == pytest.approx(tick * batches / 60, rel=1.2)  # 1 to 2 ticks a batch


def test_measuring_stays_silent(params, monkeypatch, capsys):
    texts, labels = made_up_reviews(30)
    tokens = tokenize_all(texts, params["tokenizer"])
    capsys.readouterr()
    monkeypatch.setattr(helpers, "time", Clock(600))
    ids = [int(label == "pos") for label in labels]
    figures = helpers.measure(params["model"], tokens, ids, params["tokenizer"], params["config"])
    assert capsys.readouterr().out == ""
    logits = alone(texts, params).double()
    own = -torch.log_softmax(logits, 1)[torch.arange(30), torch.tensor(ids)]
    assert figures["loss"] == pytest.approx(float(own.mean()), abs=1e-5)
    right = sum(int(row[1] > row[0]) == i for row, i in zip(logits.tolist(), ids))
    assert figures["accuracy"] == pytest.approx(right / 30)


def test_accuracy_compares_strings():
    assert accuracy(["pos", "neg", "pos", "pos"], ["pos", "neg", "neg", "pos"]) == 0.75
    assert accuracy([1, 0], ["1", "1"]) == 0.5
    assert accuracy(np.array(["pos", "neg"]), ("pos", "neg")) == 1.0
    for labels, predicted in ((["pos"], ["pos", "neg"]), ([], []), (["pos"], [])):
        with pytest.raises(InputError, match=f"{len(predicted)} .* {len(labels)} "):
            accuracy(labels, predicted)


def test_the_commonest_label():
    assert majority_accuracy(["neg", "neg", "pos"], ["neg", "pos", "pos", "pos"]) == 0.25


def test_naive_bayes_is_scikit_learns(sample):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    data = helpers.load_filimdb(sample, ["train", "dev", "dev-b"])
    texts, labels = data["train"].texts[:700], data["train"].labels[:700]
    unseen = data["dev"].texts + data["dev-b"].texts + ["", "zzz qqq", "G\u00d6\u00d6D good GOOD"]
    words = CountVectorizer(token_pattern=r"\w+", lowercase=True, binary=True)
    model = MultinomialNB(alpha=1).fit(words.fit_transform(texts), labels)
    expected = list(model.predict(words.transform(unseen)))
    got = naive_bayes(texts, labels, unseen)
    margins = np.abs(np.diff(model.predict_log_proba(words.transform(unseen)), axis=1))[:, 0]
    assert all(a == b or margin < 1e-9 for a, b, margin in zip(got, expected, margins))
    assert len(set(got)) == 2 and accuracy(data["dev"].labels, got[:500]) > 0.6


def test_naive_bayes_by_hand():
    texts, labels = ["good good film", "bad film", "bad"], ["pos", "neg", "neg"]
    assert naive_bayes(texts, labels, ["good", "bad", "film", "", "unheard"]) == [
        "pos", "neg", "neg", "neg", "neg"]
    assert naive_bayes(texts + ["good"], labels + ["pos"], ["Good!"]) == ["pos"]
