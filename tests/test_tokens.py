"""Text to tokens: vectorize_ex against the tokenizer's own encoder, truncation, the cache."""
import os
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import ROOT, SOAK, WORDS, by_the_library

import files
import helpers
from helpers import tokenize_all, truncate, truncate_words, vectorize_ex

KEEPS = ["head", "tail", "head+tail"]
ANY = st.text(st.one_of(st.sampled_from("ab \x85\t\u00e9\u96fb\U0001f600.'"),
                        st.characters(blacklist_categories=("Cs",))), max_size=60)
WORDY = st.lists(st.sampled_from([*WORDS, "lovely.", "gr\u00e9at", "[SEP]", "unheard-of", "(a)"]),
                 max_size=40).map(" ".join)
TEXTS = st.one_of(ANY, WORDY)


def some_reviews(folder):
    """Return dev reviews: all real ones for `make soak` with BERT_FOLDER, else 200 made-up ones."""
    real = ROOT / "data" / "FILIMDB"
    if os.environ.get("BERT_FOLDER") and real.is_dir():
        texts = helpers.read_lines(str(real / "dev.texts"))
        return texts if SOAK else texts[:200]
    return helpers.read_lines(os.path.join(folder, "dev.texts"))[:200]


@pytest.mark.parametrize("n", [16, 512])
def test_reviews_are_encoded_as_the_library_does(sample, reviews, tiny_bert, n):
    _, tokenizer = helpers.load_bert(os.environ.get("BERT_FOLDER") or tiny_bert)
    for text in some_reviews(sample) + reviews[0]:
        assert vectorize_ex(text, "pos", n, tokenizer) == (
            *by_the_library(tokenizer, text, n), 1), text


@given(TEXTS, st.integers(3, 80))
def test_any_text_is_encoded_as_the_library_does(tokenizer, text, n):
    assert vectorize_ex(text, None, n, tokenizer)[:3] == by_the_library(tokenizer, text, n)


@given(TEXTS, st.integers(3, 60), st.sampled_from(KEEPS))
def test_what_always_holds(tokenizer, text, n, keep):
    input_ids, segment_ids, mask, label = vectorize_ex(text, "neg", n, tokenizer, keep)
    assert len(input_ids) == len(segment_ids) == len(mask) == n
    real = sum(mask)
    assert mask == [1] * real + [0] * (n - real) and segment_ids == [0] * n and label == 0
    assert input_ids[0] == tokenizer.cls_token_id
    assert input_ids[real - 1] == tokenizer.sep_token_id
    assert input_ids[real:] == [tokenizer.pad_token_id] * (n - real)
    assert all(type(i) is int and 0 <= i < len(tokenizer) for i in input_ids)
    tokens, room = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)), n - 2
    survived = input_ids[1:real - 1]
    if len(tokens) <= room:
        assert survived == tokens
    else:
        assert len(survived) == room
        first = {"head": room, "tail": 0, "head+tail": room // 4}[keep]
        assert survived[:first] == tokens[:first]
        assert survived[first:] == tokens[first - room:] or first == room


def test_lone_surrogates_are_dropped(cache, tokenizer):
    for text in "\ud800", "good \udfff\ud800 film", "fi\udc80lm":
        whole = "".join(c for c in text if not "\ud800" <= c <= "\udfff")
        expected = vectorize_ex(whole, None, 16, tokenizer)
        assert vectorize_ex(text, None, 16, tokenizer) == expected
        for kind in tokenizer, Slow(tokenizer):
            tokens = list(helpers.tokenize([text], kind))[0].tolist()
            assert [*tokens, 3] == expected[0][1:sum(expected[2])]


def test_128_and_382_pieces_of_a_long_review(tokenizer):
    """Sun et al. 2019, table 2; a quarter of 510 is 127.5."""
    ids = vectorize_ex(" ".join(["great"] * 300 + ["awful"] * 400), None, 512, tokenizer,
                       "head+tail")[0]
    great, awful = tokenizer.convert_tokens_to_ids(["great", "awful"])
    assert ids[1:128] == [great] * 127 and ids[128:511] == [awful] * 383


@pytest.mark.parametrize("n", [2, 0, -1, 513])
def test_a_seq_len_out_of_bounds_is_a_value_error_with_both_numbers(tokenizer, n):
    with pytest.raises(ValueError) as caught:
        vectorize_ex("good", "pos", n, tokenizer)
    assert f"seq_len={n}" in str(caught.value) and "512" in str(caught.value)
    assert "\n" not in str(caught.value)


class Letters:
    """A tokenizer that knows nothing of a limit: a letter is a token."""

    cls_token_id, sep_token_id, pad_token_id = 1, 2, 0

    def tokenize(self, text):
        return list(text)

    def convert_tokens_to_ids(self, tokens):
        return [ord(token) for token in tokens]


@pytest.mark.parametrize("limit", [None, int(1e30), 512, 100])
def test_the_limit_of_positions(limit):
    tokenizer, real = Letters(), limit if limit == 100 else 512
    if limit:
        tokenizer.model_max_length = limit
    ids, _, mask, _ = vectorize_ex("ab", None, real, tokenizer)
    assert ids == [1, 97, 98, 2] + [0] * (real - 4) and sum(mask) == 4
    with pytest.raises(ValueError, match=f"{real + 1}.* {real}"):
        vectorize_ex("ab", None, real + 1, tokenizer)


def test_labels(tokenizer):
    def label_id(label, **kwargs):
        return vectorize_ex("good", label, 8, tokenizer, **kwargs)[3]

    assert (label_id("neg"), label_id("pos"), label_id(None)) == (0, 1, None)
    assert label_id("meh", label_ids={"meh": 7}) == 7
    with pytest.raises(ValueError, match="'meh'.*neg, pos"):
        label_id("meh")


@given(st.lists(st.integers(), max_size=30), st.integers(0, 35), st.sampled_from(KEEPS))
def test_kept_items(items, n, keep):
    first = {"head": n, "tail": 0, "head+tail": int(n / 4)}[keep]
    slow = [item for i, item in enumerate(items)
            if len(items) <= n or i < first or i >= len(items) - (n - first)]
    assert truncate(items, n, keep) == slow


@given(TEXTS, st.integers(0, 45), st.sampled_from(KEEPS))
def test_kept_words(text, k, keep):
    words = text.split()
    got = truncate_words(text, k, keep)
    if k == 0 or len(words) <= k:
        assert got == text
        return
    first = {"head": k, "tail": 0, "head+tail": k // 4}[keep]
    assert got.split() == words[:first] + words[len(words) - (k - first):]
    head = re.match(r"\s*" + r"\S+\s+" * max(0, first - 1) + r"\S*", text).group() if first else ""
    assert got.startswith(head)  # spelled as it was, with the blanks between
    if first == 0:
        assert text.rstrip().endswith(got)


def test_words_are_spelled_as_they_were():
    text = "  It's  (not)\tB\u00c4D\u2026 at\x85all  "
    assert truncate_words(text, 2, "head").strip() == "It's  (not)"
    assert truncate_words(text, 2, "tail") == "at\x85all"
    assert truncate_words(text, 4, "head+tail").strip() == "It's B\u00c4D\u2026 at\x85all"
    assert truncate_words(text, 0, "head") == truncate_words(text, 6, "tail") == text


def one_by_one(texts, tokenizer):
    return [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in texts]


class Slow:
    """The same tokenizer without a bulk method, as all are in transformers 2.1."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.tokenizer)

    def __getattr__(self, name):
        if name == "backend_tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("kind", [lambda tokenizer: tokenizer, Slow])
def test_all_at_once_is_one_by_one(cache, sample, reviews, tokenizer, kind):
    texts = reviews[0] + helpers.read_lines(os.path.join(sample, "dev-b.texts")) * 4  # > 2 chunks
    tokens = tokenize_all(texts, kind(tokenizer))
    expected = one_by_one(texts, tokenizer)
    assert [tokens[i] for i in range(len(tokens))] == expected
    assert tokens.lengths == [len(row) for row in expected] and len(tokens) == len(texts)


@given(st.lists(TEXTS, min_size=1, max_size=5))
def test_any_texts_at_once_are_one_by_one(tokenizer, texts):
    tokens = tokenize_all(texts, tokenizer)
    assert [tokens[i] for i in range(len(tokens))] == one_by_one(texts, tokenizer)


def test_no_texts(cache, tokenizer):
    assert len(tokenize_all([], tokenizer)) == 0
    assert tokenize_all(["", ""], tokenizer).lengths == [0, 0]


def test_a_second_call_does_not_tokenize(cache, reviews, tokenizer, monkeypatch):
    texts = reviews[0]
    first = tokenize_all(texts, tokenizer)

    def refuse(*args):
        raise AssertionError("tokenized again")

    monkeypatch.setattr(helpers, "tokenize", refuse)
    again = tokenize_all(list(texts), tokenizer)
    assert [again[i] for i in range(len(texts))] == [first[i] for i in range(len(texts))]
    for other in (texts[::-1], texts[:-1], [texts[0] + texts[1], "", *texts[2:]]):
        with pytest.raises(AssertionError):
            tokenize_all(other, tokenizer)


def test_another_vocabulary_is_tokenized_anew(cache, reviews, tokenizer):
    class Other(Slow):
        def convert_ids_to_tokens(self, ids):
            return [word + "!" for word in self.tokenizer.convert_ids_to_tokens(ids)]

    tokenize_all(reviews[0], tokenizer)
    tokenize_all(reviews[0], Other(tokenizer))
    assert len(list((cache / "tokens").iterdir())) == 2


def test_a_damaged_cache_is_set_aside_and_done_again(cache, tokenizer, capsys):
    texts = ["good film", "a bad one", ""]
    expected = one_by_one(texts, tokenizer)
    tokenize_all(texts, tokenizer)
    path, = (cache / "tokens").iterdir()
    whole = path.read_bytes()
    harmful = [whole[:size] for size in (0, 5, 60, 128, 129, len(whole) - 1)]
    harmful += [whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:]
                for at in range(len(whole)) for bit in (1, 64)]
    told = 0
    for damaged in harmful:
        path.write_bytes(damaged)
        tokens = tokenize_all(texts, tokenizer)
        assert [tokens[i] for i in range(len(texts))] == expected
        del tokens
        told += "is damaged" in capsys.readouterr().out
    assert told > 0.7 * len(harmful)  # a flip among the header's blanks does no harm
    assert (cache / "tokens" / (path.name + ".damaged")).exists()


def test_two_processes_at_once(cache, sample, tokenizer):
    texts = helpers.read_lines(os.path.join(sample, "dev-b.texts"))
    slow, (read, write) = Slow(tokenizer), os.pipe()
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(write)
                os.read(read, 1)  # both start when the parent closes the pipe
                made = tokenize_all(texts, slow)
                code = int([made[i] for i in range(len(texts))] != one_by_one(texts, tokenizer))
            finally:
                os._exit(code)
        children.append(child)
    os.close(write)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    os.close(read)
    assert len(list((cache / "tokens").iterdir())) == 1


IDS = "161cfbf5084221ab2d68c2dafab0436c13623ded9bcf51085a7ae347f736e96d"


def test_ids_are_the_same_on_both_stacks(sample, reviews, tokenizer):
    texts = reviews[0] + helpers.read_lines(os.path.join(sample, "dev.texts"))[:50]
    rows = [vectorize_ex(text, None, 200, tokenizer, keep)[0] for text in texts for keep in KEEPS]
    assert files.digest(np.array(rows, dtype=np.int64)) == IDS
