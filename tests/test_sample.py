"""The promises of data/make_sample.py, about the texts that are committed in data/sample/."""
import importlib.util
import math
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
LONG = ["train", "dev", "test", "train_unlabeled"]
SIZES = {"train": 1000, "dev": 500, "test": 500, "dev-b": 300, "test-b": 300,
         "train_unlabeled": 2000}
LABELLED = ["train", "dev", "dev-b"]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_sample", str(DATA / "make_sample.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(name, kind="texts"):
    """Read the lines of a committed file; only "\\n" ends a line."""
    data = (DATA / "sample" / f"{name}.{kind}").read_bytes().decode("utf-8")
    assert data.endswith("\n")
    return data[:-1].split("\n")


@pytest.fixture(scope="module")
def parts():
    return {name: read(name) for name in SIZES}


@pytest.fixture(scope="module")
def plans(maker):
    """(label, sentences) of every long review, made again from the seeds."""
    made = [maker.make_part(name) for name in LONG]
    return [pair for _, labels, plans in made for pair in zip(labels, plans)]


# ----------------------------------------------------------------------------------- the files

def test_sizes(parts):
    assert {name: len(texts) for name, texts in parts.items()} == SIZES
    files = {path.name for path in (DATA / "sample").glob("*.*s")}
    assert files == ({name + ".texts" for name in SIZES}
                     | {name + ".labels" for name in LABELLED})


@pytest.mark.parametrize("name", LABELLED)
def test_labels_are_balanced(name):
    half = SIZES[name] // 2
    assert Counter(read(name, "labels")) == {"pos": half, "neg": half}


def test_train_is_in_order_of_class_and_dev_is_not():
    assert read("train", "labels") == ["neg"] * 500 + ["pos"] * 500
    assert read("dev", "labels") != sorted(read("dev", "labels"))


def test_regeneration_gives_the_committed_bytes(maker, tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        maker.make_reviews(folder)
        for path in folder.iterdir():
            assert path.read_bytes() == (DATA / "sample" / path.name).read_bytes(), path.name
    assert len(list((tmp_path / "a").iterdir())) == len(SIZES) + len(LABELLED)


def test_a_review_that_appears_twice_is_an_error(maker, monkeypatch, tmp_path):
    twins = {"dev": maker.PARTS["dev"], "test": maker.PARTS["dev"]}
    monkeypatch.setattr(maker, "PARTS", twins)
    with pytest.raises(ValueError):
        maker.make_reviews(tmp_path)


def test_no_review_appears_twice(parts):
    texts = [text for name in SIZES for text in parts[name]]
    assert len(set(texts)) == len(texts) == sum(SIZES.values())


def test_texts_are_clean_lines(parts):
    for texts in parts.values():
        for text in texts:
            assert text and text == text.strip() and "\r" not in text
            assert text[0] not in "\x85\x96" and text[-1] not in "\x85\x96"
            assert not re.search(r"[$+{}]|(?<!\w)-", text), text  # no slot left unfilled


def test_the_texts_take_less_than_3_mb(parts):
    assert sum(len(text.encode("utf-8")) + 1 for ts in parts.values() for text in ts) < 3e6


# ----------------------------------------------------------------------------------- the texts

@pytest.mark.parametrize("pattern", [
    "[éëüñà]", "\x85", "\x96", "<br /><br />", "[\U0001F300-\U0001FAFF]", "[\u4e00-\u9fff]"])
def test_special_characters_are_rare_but_there(parts, pattern):
    texts = [text for name in LONG for text in parts[name]]
    share = sum(bool(re.search(pattern, text)) for text in texts) / len(texts)
    assert 0.01 < share < 0.04


def test_lengths(parts):
    lengths = sorted(len(text.split()) for name in LONG for text in parts[name])
    assert 65 <= lengths[len(lengths) // 2] <= 85
    assert 100 <= sum(lengths) / len(lengths) <= 120
    assert 0.02 < sum(n > 400 for n in lengths) / len(lengths) < 0.045
    assert lengths[0] >= 12 and lengths[-1] <= 900


def test_short_reviews_are_one_sentence(parts):
    for text in parts["dev-b"] + parts["test-b"]:
        assert 5 <= len(text.split()) <= 30
        assert not re.search(r"[.!?] [A-Z]", text)


def test_number_of_distinct_words(maker, parts):
    words = {token for texts in parts.values() for text in texts
             for token in maker.basic_tokens(text) if len(token) > 1}
    assert 1300 <= len(words) <= 1700


# --------------------------------------------------------------------------------- the meaning

def agreement(maker, plans, kind):
    agree = [sentence.polarity == maker.LABELS[label] for label, sentences in plans
             for sentence in sentences if sentence.kind == kind]
    return sum(agree) / len(agree)


def test_opinions_lean_to_the_label_and_expectations_against_it(maker, plans):
    assert 0.62 <= agreement(maker, plans, "opinion") <= 0.69
    assert 0.35 <= agreement(maker, plans, "expectation") <= 0.47


def test_the_verdict_agrees_with_the_label_and_lies_in_the_last_40_words(maker, plans):
    assert agreement(maker, plans, "verdict") == 1
    for _, sentences in plans:
        kinds = [s.kind for s in sentences]
        start = max(i for i, kind in enumerate(kinds) if kind in ("verdict", "lukewarm"))
        assert len(kinds) - start <= 2
        assert len(" ".join(s.text for s in sentences[start:]).split()) <= 40
    lukewarm = sum(any(s.kind == "lukewarm" for s in sentences) for _, sentences in plans)
    assert 0.01 < lukewarm / len(plans) < 0.035


def test_the_plan_is_what_is_written(maker, parts):
    for text, plan in zip(*[maker.make_part("test")[i] for i in (0, 2)]):
        verdict = next(s.text for s in plan if s.kind in ("verdict", "lukewarm"))
        assert plan[0].text[:10] == text[:10] or re.search("[^ -~]", text[:12])
        assert verdict in text or re.search("[^ -~]", text)
    assert maker.make_part("test")[0] == parts["test"]


def test_polarity_of_words_follows_negation(maker):
    writer = maker.Writer(1)
    praise = set(maker.WORDS["adj+"].split())
    for negate, expected in ((0, True), (1, False)):
        for _ in range(50):
            claim = writer.claim(1, negate, set())
            assert (claim.split()[-1] in praise) == expected
            assert any(claim.startswith(no) for no in maker.NEGATIONS) != expected


def naive_bayes(train, labels, texts, expected, cut=slice(None)):
    """Return the accuracy in % of a unigram naive Bayes with add-one smoothing."""
    def words(text):
        return re.findall(r"[a-z']+|\d+", text.lower())[cut]

    counts = {label: Counter() for label in ("neg", "pos")}
    for text, label in zip(train, labels):
        counts[label].update(words(text))
    known = set(counts["neg"]) | set(counts["pos"])
    total = {label: sum(c.values()) + len(known) for label, c in counts.items()}
    weight = {w: math.log((counts["pos"][w] + 1) / total["pos"])
              - math.log((counts["neg"][w] + 1) / total["neg"]) for w in known}
    right = sum((sum(weight.get(w, 0) for w in words(text)) > 0) == (label == "pos")
                for text, label in zip(texts, expected))
    return 100 * right / len(texts)


def test_counting_words_is_neither_useless_nor_enough(parts):
    train = parts["train"], read("train", "labels")
    assert 65 <= naive_bayes(*train, parts["dev"], read("dev", "labels")) <= 80
    assert 58 <= naive_bayes(*train, parts["dev-b"], read("dev-b", "labels")) <= 75


def test_the_end_tells_more_than_the_beginning(parts):
    data = parts["train"], read("train", "labels"), parts["dev"], read("dev", "labels")
    first, last = naive_bayes(*data, cut=slice(30)), naive_bayes(*data, cut=slice(-30, None))
    assert first <= 58 and last >= 70 and last - first >= 8


def test_generic_texts_say_nothing_consistent(maker):
    texts = maker.generic_texts(300, 7)
    assert texts == maker.generic_texts(300, 7) and len(set(texts)) == 300
    polarity = {w: sign for sign, tail in ((1, "+"), (-1, "-")) for kind in ("adj", "verb", "noun")
                for w in maker.WORDS[kind + tail].split()}
    both = same = 0
    for text in texts:  # neighbouring polar words agree half of the time, as coins do
        signs = [polarity[w] for w in re.findall(r"[a-z-]+", text) if w in polarity]
        both += len(signs) - 1
        same += sum(signs[i] == signs[i - 1] for i in range(1, len(signs)))
    assert both > 2000 and 0.45 < same / both < 0.55


# ------------------------------------------------------------------------------ the vocabulary

def test_vocabulary(maker, parts):
    texts = [text for name in SIZES for text in parts[name]]
    pieces = maker.vocabulary(texts, 1600)
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(set(pieces)) == len(pieces) and 1200 < len(pieces) <= 1600
    assert {"a", "##z", "##ing", "7", ",", "the"} <= set(pieces)
    words = Counter(t for text in texts for t in maker.basic_tokens(text) if len(t) > 1)
    missing = [word for word in words if word not in pieces]
    assert 0.10 < len(missing) / len(words) < 0.20
    assert max(words[w] for w in missing) <= min(words[w] for w in pieces if w in words)
    assert not any("\u2e80" <= c for piece in pieces for c in piece)  # these come as [UNK]
    assert len(maker.vocabulary(texts, 500)) == 500


def test_basic_tokens_split_as_bert_does(maker):
    assert maker.basic_tokens("Déjà vu\x85 at the Café: it's A+ (映画)!<br />") == [
        "deja", "vu", "at", "the", "cafe", ":", "it", "'", "s", "a", "+", "(", "映", "画", ")",
        "!", "<", "br", "/", ">"]
