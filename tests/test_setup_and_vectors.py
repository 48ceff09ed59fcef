"""The functions that stand on pages 01 and 02: the witnesses see what they are there to see."""
import ast
import json
import re
import unicodedata
from html import escape
from unittest import mock

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import ROOT, made_up_reviews, make_tiny_bert

import helpers
import studies


def functions_of(name, **names):
    """Return the names that a page's functions and capitals define, with what they use given."""
    nb = json.loads((ROOT / "notebooks" / (name + ".ipynb")).read_text(encoding="utf-8"))
    space = dict(vars(helpers), helpers=helpers, studies=studies, torch=torch, pd=pd, re=re,
                 unicodedata=unicodedata, escape=escape, **names)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        for node in ast.parse(source).body if cell["cell_type"] == "code" else ():
            constant = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "").isupper()
            if isinstance(node, ast.FunctionDef) or constant:
                exec(compile(ast.Module([node], []) if hasattr(ast, "TypeIgnore")
                             else ast.Module([node]), name, "exec"), space)
    return space


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(model, tokenizer, its folder) of a tiny BERT."""
    folder = make_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny")
    return helpers.load_bert(folder) + (folder,)


@pytest.fixture(scope="module")
def setup(loaded):
    """What page 01's functions are called."""
    return functions_of("01_setup_check", tokenizer=loaded[1])


@pytest.fixture(scope="module")
def vectors(loaded):
    """What page 02's functions are called."""
    tokenizer = loaded[1]
    return functions_of("02_vectorize_ex", tokenizer=tokenizer, encoder=helpers.load_bert(
        loaded[2])[1], cls=tokenizer.cls_token_id, sep=tokenizer.sep_token_id, limit=512)


# ---- page 01 -----------------------------------------------------------------------------------

def test_a_words_tokens_are_those_of_the_tokenizer(setup, loaded):
    tokenizer = loaded[1]
    for word in "film films greatly unforgettable lovelyness zzz 1999".split():
        assert setup["tokens_of_word"](word, tokenizer.vocab) == tokenizer.tokenize(word)
    assert setup["tokens_of_word"]("ab", {"a"}) == ["[UNK]"]


def test_text_is_changed_as_bert_cleans_it(setup):
    assert setup["without_accents"]("Ça, naïve Ångström") == "Ca, naive Angstrom"
    assert setup["without_controls"]("a\x85b\x00\u200bc\td\n") == "abc\td\n"


def test_passages_are_of_different_matches_and_texts(setup):
    texts = ["one FILM here", "a film there and FILM", "PLOT " + "word " * 20 + "PLOTS", "nothing"]
    found = setup["passages"](texts, r"\b[A-Z]{3,}")
    assert found == ["one FILM here", texts[2][:len("PLOT word word word")]]
    assert setup["passages"](texts, r"\b[A-Z]{3,}", 1) == found[:1]
    assert setup["passages"](texts, "absent") == []


def test_changes_of_a_text_that_change_its_tokens(setup):
    texts = ["Good Film", "a good film", "CAFÉ", "bad\x85film"]
    assert setup["changed_by"](str.upper, texts) == (3, 0)
    assert setup["changed_by"](setup["without_accents"], texts) == (1, 0)
    assert setup["changed_by"](lambda text: text.replace("film", "plot"), texts) == (2, 2)
    [row] = setup["tokens_table"](["A\x85 film"], in_lower_case=str.lower,
                                  cut=lambda text: text[:1])
    assert row == {"as written": "A\\x85 film", "tokens": "a film", "in lower case": "same",
                   "cut": "OTHER"}


def test_unknown_tokens_and_characters(setup, loaded):
    texts = ["good \u96ea film", "bad", "\u96ea\u96ea"]
    tokens = [token for text in texts for token in loaded[1].tokenize(text)]
    share = 100 * tokens.count("[UNK]") / len(tokens)
    assert setup["unknown_share"](texts, loaded[1]) == pytest.approx(share) and share > 0
    assert setup["unknown_characters"](texts) == {"\u96ea": 3}


def test_without_lower_casing_a_capital_is_unknown(setup, loaded):
    cased = studies.cased_tokenizer(loaded[2])
    assert cased.tokenize("Good film") == ["[UNK]", "film"]
    assert loaded[1].tokenize("Good film") == ["good", "film"]


def test_parameters_are_what_the_formula_says(setup, loaded):
    model = loaded[0]
    blocks = setup["blocks_of"](model)
    sizes = {key: getattr(model.config, key) for key in setup["BERT_BASE"]}
    assert blocks == setup["blocks_by_formula"](sizes)
    assert sum(blocks.values()) == sum(p.numel() for p in model.parameters())
    base = setup["blocks_by_formula"](setup["BERT_BASE"])
    assert sum(base.values()) == 109482240 + 2 * 768 + 2  # BertModel as published, the classifier
    assert setup["blocks_by_formula"](dict(sizes, num_hidden_layers=3)) != blocks


# ---- page 02 -----------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 99), max_size=30), st.integers(1, 20),
       st.sampled_from(list(helpers.TRUNCATIONS)))
def test_survivors_are_what_is_kept(vectors, tokens, n, keep):
    assert vectors["survivors"](tokens, n, keep) == helpers.truncate(tokens, n, keep)


def test_the_witness_of_truncation_does_not_follow_a_wrong_truncate(vectors):
    texts = made_up_reviews(10, 30)[0]
    assert [vectors["count_differences"](texts, 8, keep) for keep in helpers.TRUNCATIONS] == [0] * 3
    longer = sum(len(tokens) > 6 for tokens in helpers.tokenize_all(texts, vectors["tokenizer"]))
    assert longer > 3
    with mock.patch.dict(helpers.TRUNCATIONS, tail=helpers.keep_head):
        assert vectors["survivors"](list("abc"), 2, "tail") == ["b", "c"]
        assert vectors["count_differences"](texts, 8, "tail") == longer
    with mock.patch.dict(helpers.TRUNCATIONS, {"head+tail": lambda items, n: items[:n]}):
        assert vectors["count_differences"](texts, 8, "head+tail") == longer


def test_agreement_counts_what_differs(vectors):
    texts, tokenizer = made_up_reviews(10)[0], vectors["tokenizer"]
    rows = helpers.tokenize_all(texts, tokenizer)

    def counts():
        row = vectors["agreement"](texts, rows, 8)
        return [row[key] for key in ("as the encoder", "as the loaders", "mask and segments fit")]
    assert counts() == [10, 10, 10]
    original = helpers.vectorize_ex

    def wrong(*args):
        ids, segments, mask, label = original(*args)
        return [ids[0], ids[2], ids[1], *ids[3:]], [1] * len(ids), mask, label
    with mock.patch.dict(vectors, vectorize_ex=wrong):
        assert counts() == [0, 0, 0]


def test_padding_changes_logits_without_the_mask_alone(vectors, loaded):
    model, tokenizer, _ = loaded
    rows = [helpers.add_special_tokens(tokens, 16, "head", tokenizer) for tokens in
            helpers.tokenize_all(made_up_reviews(60)[0], tokenizer)]
    alone = torch.cat([vectors["padded_logits"](model, [row]) for row in rows])
    assert alone.shape == (60, 2)
    for options, same in (({}, True), ({"noise": True}, True), ({"mask": False}, False)):
        logits = vectors["padded_logits"](model, rows, 40, **options)
        assert (float((logits - alone).abs().max()) < 1e-5) == same, options


def test_an_outcome_is_one_line(vectors):
    assert vectors["outcome_of"](int, "3") == "fine"
    assert vectors["outcome_of"](int, "x") == "invalid literal for int() with base 10: 'x'"
    with pytest.raises(ZeroDivisionError):
        vectors["outcome_of"](divmod, 1, 0)


def test_words_come_back(vectors):
    ids = vectors["tokenizer"].convert_tokens_to_ids(["the", "film", "##s", "!"])
    assert vectors["words_of"](ids) == "the films !"
    assert vectors["comes_back"]("The films, Greatly!")
    with mock.patch.dict(vectors, words_of=lambda ids: "the films"):
        assert not vectors["comes_back"]("The films, Greatly!")


def test_a_text_in_colour_shows_what_becomes_of_each_token(vectors):
    kinds = vectors["kinds_of"]("good \u96ea films <b> bad", 9, "tail")
    tokens = vectors["tokenizer"].tokenize("good \u96ea films <b> bad")
    assert [token for token, kind in kinds if kind not in ("special", "masked")] == tokens
    assert [kind for _, kind in kinds] == ["special", "cut", *["unknown" if token == "[UNK]" else
                                           "kept" for token in tokens[1:]], "special"][:len(kinds)]
    assert ("[PAD]", "masked") in vectors["kinds_of"]("good", 5, "tail")
    with mock.patch.object(studies, "show_html") as shown:
        vectors["show_tokens"]("<b>", n=8)
    page = shown.call_args[0][0]
    assert "<b>" not in page and "&lt;" in page and "script" not in page
    assert all(kind in page for kind in vectors["LOOK"])
