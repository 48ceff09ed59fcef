"""The baselines against independent ones, by hand, and on the same words as BERT."""
import numpy as np
import pytest
import torch
from tools import made_up_reviews

import checkpoints
import helpers
import helpers as baselines
from files import InputError
from helpers import accuracy, frozen_features, naive_bayes, texts_as_read, tfidf_regression


def test_naive_bayes_is_the_one_written_by_hand(sample):
    """helpers.naive_bayes is this project's own of before: the same labels for all reviews."""
    data = helpers.load_filimdb(sample, ["train", "dev", "dev-b"])
    texts, labels = data["train"].texts[:700], data["train"].labels[:700]
    unseen = data["dev"].texts + data["dev-b"].texts + ["zzz qqq", "G\u00d6\u00d6D good GOOD", "a"]
    got, own = (bayes(texts, labels, unseen) for bayes in (naive_bayes, helpers.naive_bayes))
    assert got == own and len(set(got)) == 2


def test_naive_bayes_by_hand():
    texts, labels = ["good good film", "bad film", "bad"], ["pos", "neg", "neg"]
    assert naive_bayes(texts, labels, ["good", "bad", "film", "", "unheard"]) == [
        "pos", "neg", "neg", "neg", "neg"]
    assert naive_bayes(texts + ["good"], labels + ["pos"], ["Good!"]) == ["pos"]


def test_tfidf_regression_by_hand():
    """Against the formulas: smoothed idf, 1 + log tf, length 1; and against another optimizer."""
    from scipy.optimize import minimize
    texts, labels = made_up_reviews(40)
    terms = [text.split() + [" ".join(pair) for pair in zip(text.split(), text.split()[1:])]
             for text in texts]
    vocabulary = sorted({term for row in terms[:30] for term in row})
    idf = [np.log(31 / (1 + sum(term in row for row in terms[:30]))) + 1 for term in vocabulary]

    def vector(row):
        counts = np.array([row.count(term) for term in vocabulary], dtype=float)
        values = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
        return np.append(values / np.linalg.norm(values), 1)  # liblinear penalizes the bias too
    features = np.array([vector(row) for row in terms])
    signs = np.where(np.array(labels) == "pos", 1.0, -1.0)

    def loss(weights):
        return 0.5 * weights @ weights + 10 * np.logaddexp(
            0, -signs[:30] * (features[:30] @ weights)).sum()
    weights = minimize(loss, np.zeros(features.shape[1])).x
    scores = features[30:] @ weights
    got = tfidf_regression(texts[:30], labels[:30], texts[30:])
    assert all(label == ("pos" if score > 0 else "neg")
               for label, score in zip(got, scores) if abs(score) > 0.05)
    assert len(set(got)) == 2


def test_the_baselines_learn_and_are_deterministic(sample):
    data = helpers.load_filimdb(sample, ["train", "dev"])
    (texts, labels), dev = data["train"][1:], data["dev"]
    bayes, regression = (method(texts, labels, dev.texts) for method in (
        naive_bayes, tfidf_regression))
    assert accuracy(dev.labels, bayes) == pytest.approx(0.712, abs=0.005)
    assert accuracy(dev.labels, regression) == pytest.approx(0.80, abs=0.01)
    assert tfidf_regression(texts, labels, dev.texts) == regression
    assert {type(label) for label in bayes + regression} == {str}


@pytest.mark.parametrize("method", [naive_bayes, tfidf_regression])
def test_reviews_without_a_word(method):
    with pytest.raises(InputError, match="hold no word"):
        method(["", "..."], ["pos", "neg"], ["good"])
    assert method(["good", "", "bad"], ["pos", "neg", "neg"], [""]) in (["pos"], ["neg"])


def test_the_same_words_as_bert(tiny_bert, tokenizer, reviews):
    """Read anew, what BERT reads of a text gives the same vector."""
    texts = reviews[0]
    for keep in ("head", "tail", "head+tail"):
        for words in (0, 5):
            config = helpers.make_config(model=tiny_bert, seq_len=12, keep=keep, words=words)
            for text, read in zip(texts, texts_as_read(texts, tokenizer, config)):
                ids = helpers.vectorize_ex(helpers.truncate_words(text, words, keep), None, 12,
                                           tokenizer, keep)[0]
                kept = [i for i in ids if i not in tokenizer.all_special_ids
                        or i == tokenizer.unk_token_id]
                assert read == " ".join(tokenizer.convert_ids_to_tokens(kept)).replace(" ##", "") \
                    or "[" in text  # a review that spells [MASK] or [SEP]
                assert len(read.split()) <= 10


def test_frozen_features_by_hand(tiny_bert, reviews):
    """A review at a time, without padding: the mean of all its states, and the first one."""
    model, tokenizer = helpers.load_bert(tiny_bert)
    config = helpers.make_config(model=tiny_bert, seq_len=16, keep="tail", precision="fp32")
    texts = reviews[0][:6] + [""]
    mean, cls = (frozen_features(texts, model, tokenizer, config, pooling)
                 for pooling in ("mean", "cls"))
    assert mean.shape == cls.shape == (7, 32) and mean.dtype == cls.dtype == np.float32
    assert isinstance(mean, np.ndarray) and not model.training
    for i, text in enumerate(texts):
        ids, _, mask, _ = helpers.vectorize_ex(text, None, 16, tokenizer, "tail")
        with torch.no_grad():
            hidden = model.bert(torch.tensor([ids[:sum(mask)]]))[0][0]
        assert np.allclose(mean[i], hidden.mean(0).numpy(), atol=1e-5)
        assert np.allclose(cls[i], hidden[0].numpy(), atol=1e-5)
    with pytest.raises(InputError, match="cls or mean"):
        frozen_features(texts, model, tokenizer, config, "max")


def test_frozen_features_leave_the_model_alone(tiny_bert):
    model, tokenizer = helpers.load_bert(tiny_bert)
    config, before = helpers.make_config(model=tiny_bert), checkpoints.weights_digest(model)
    state = torch.get_rng_state()
    frozen_features(["a good film"], model.train(), tokenizer, config)
    assert checkpoints.weights_digest(model) == before and model.training
    assert torch.equal(torch.get_rng_state(), state) and model.config.num_labels == 2


def test_frozen_regression_finds_a_direction():
    random = np.random.RandomState(0)
    features = random.randn(300, 20) * np.logspace(-3, 3, 20)  # of very different sizes
    labels = np.where(features[:, 3] * 1e2 + features[:, 10] > 0, "pos", "neg").tolist()
    got = baselines.frozen_regression(features[:200], labels[:200], features[200:])
    assert accuracy(labels[200:], got) > 0.85 and {type(label) for label in got} == {str}
