"""Hyperparameters: what is refused, with which message, and where the model's name comes from."""
import dataclasses
import math

import pytest
from tools import TODAY

import helpers
from files import InputError
from helpers import MLM_DEFAULTS, Config, load_bert, make_config, settings

BAD = [*(("lr", v) for v in (0.0, -1.0, -2e-5, math.nan, math.inf)),
       *(("seq_len", v) for v in (0, -1, 2)), *(("words", v) for v in (-1,)),
       *((key, v) for key in ("epochs", "batch_size", "accumulation") for v in (0, -1)),
       *((key, v) for key in ("warmup", "dropout", "attention_dropout")
         for v in (1.0, 1.5, -0.1, math.nan)),
       *((key, v) for key in ("weight_decay", "clip_norm", "max_minutes")
         for v in (-0.1, math.nan, math.inf)),
       *((key, -1) for key in ("seed", "data_seed")),
       ("keep", "middle"), ("keep", ""), ("optimizer", "sgd"), ("decay", "cosine"), ("model", ""), ("pooling", "max"),
       ("precision", "half"), ("precision", "")]
GOOD = [("lr", 1e-9), ("seq_len", 3), ("words", 0), ("epochs", 1), ("batch_size", 1),
        ("accumulation", 1), ("warmup", 0.0), ("warmup", 0.99), ("dropout", 0.0), ("clip_norm", 0.0),
        ("weight_decay", 0.0), ("max_minutes", 0.0), ("keep", "head"), ("keep", "tail"),
        ("keep", "head+tail"), ("optimizer", "adamw"), ("optimizer", "adam"), ("decay", "none"),
        ("decay", "linear"), ("pooling", "cls"), ("pooling", "mean"), ("seed", 0),
        ("views", True), ("whole_word", True), ("freeze", True), ("device", ""),
        ("precision", "auto"), ("precision", "fp32")]
WRONG_TYPE = [("epochs", 1.0), ("epochs", True), ("epochs", "3"), ("lr", "2e-5"), ("lr", True),
              ("lr", None), ("views", 3), ("whole_word", 1), ("freeze", 0), ("keep", None), ("model", 3), ("seed", None)]


def message(**overrides):
    with pytest.raises(InputError) as caught:
        make_config(**overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("key,value", BAD)
def test_a_value_out_of_bounds_is_named(key, value):
    assert f"{key}={value!r}: must be " in message(**{key: value})


@pytest.mark.parametrize("key,value", GOOD)
def test_a_value_on_the_bound_is_taken(key, value):
    assert getattr(make_config(**{key: value}), key) == value


def test_bf16_needs_a_pytorch_that_computes_in_it(monkeypatch):
    if hasattr(helpers.torch, "autocast"):
        assert make_config(precision="bf16").precision == "bf16"
        monkeypatch.delattr(helpers.torch, "autocast")
    assert "precision='bf16': must be auto, fp32 or, from PyTorch 1.10 on, bf16" in message(
        precision="bf16")


@pytest.mark.parametrize("key,value", WRONG_TYPE)
def test_a_changed_type_is_named(key, value):
    kind = type(getattr(Config(), key)).__name__
    text = message(**{key: value})
    assert f"{key}={value!r}" in text and kind in text and type(value).__name__ in text


def test_views_do_not_go_with_words():
    assert "views=True with words=5: views read what seq_len cuts" in message(views=True, words=5)
    assert make_config({"words": 5}).words == 5 and make_config(views=True).views


def test_every_field_is_checked():
    assert {key for key, _ in BAD} | {"views", "whole_word", "freeze", "device"} == set(vars(Config()))


def test_an_int_does_for_a_float():
    config = make_config(lr=1, warmup=0)
    assert (config.lr, config.warmup) == (1.0, 0.0)
    assert type(config.lr) is type(config.warmup) is float


@pytest.mark.parametrize("typo,meant", [("learning_rate", None), ("lrr", "lr"), ("epoch", "epochs"),
                                        ("seqlen", "seq_len"), ("batchsize", "batch_size")])
def test_an_unknown_key_gets_a_suggestion(typo, meant):
    text = message(**{typo: 1})
    assert repr(typo) in text
    if meant:
        assert f"did you mean {meant}?" in text
    else:
        assert all(key in text for key in ("seq_len", "lr"))


def test_a_refused_override_changes_nothing():
    before = Config()
    message(epochs=5, lr=-1.0)
    assert Config() == before == make_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.lr = 1.0


def test_mlm_defaults_are_valid_and_can_be_overridden():
    assert vars(make_config(**MLM_DEFAULTS)) == vars(make_config(MLM_DEFAULTS))
    assert make_config(MLM_DEFAULTS, seq_len=32).seq_len == 32
    assert make_config(MLM_DEFAULTS, seq_len=32).lr == MLM_DEFAULTS["lr"]


def test_the_assignments_defaults():
    config = Config()
    assert (config.optimizer, config.batch_size, config.accumulation) == ("adam", 32, 4)
    assert (config.lr, config.warmup, config.epochs, config.dropout) == (2e-5, 0.1, 3, 0.1)


def test_settings_name_no_place():
    here, there = (make_config(model=name, device=device) for name, device in
                   (("a", "cpu"), ("b", "cuda")))
    assert settings(here) == settings(there)
    assert set(vars(here)) - set(settings(here)) == {"model", "device", "precision"}  # fp32
    assert settings(make_config(precision="fp32")) == settings(here)
    if TODAY:
        assert settings(make_config(precision="bf16")) == dict(settings(here), precision="bf16")
    assert settings(make_config(seed=1)) != settings(here)


def test_argument_beats_environment_beats_bert_base(monkeypatch):
    monkeypatch.delenv("BERT_MODEL", raising=False)
    assert make_config().model == helpers.default_model() == "bert-base-uncased"
    monkeypatch.setenv("BERT_MODEL", "")
    assert make_config().model == "bert-base-uncased"
    monkeypatch.setenv("BERT_MODEL", "/no/such/one")
    assert make_config().model == "/no/such/one"
    assert make_config(model="/no/other").model == "/no/other"
    with pytest.raises(InputError, match="/no/such/one"):
        load_bert()
    with pytest.raises(InputError, match="/no/other"):
        load_bert("/no/other")
    with pytest.raises(InputError, match="/no/such/one"):
        helpers.train(["good", "bad"], ["pos", "neg"])
