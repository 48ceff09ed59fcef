"""evaluate.py --grading: what fits into the course's limits, by clocks that lie."""
import contextlib
import io
import json
import os
import time

import pytest
import torch
from tools import made_up_reviews, options, predictions, write_filimdb

import evaluate
import grading
import helpers
import runtime
from files import InputError
from grading import Clock
from helpers import Part

TEXTS, LABELS = made_up_reviews(240, length=60)
QUICK = {"batch_size": 8, "lr": 1e-3, "accumulation": 1, "device": "cpu"}


class Lying:
    """A clock of a made-up machine: time goes by with tokens that are read, and not otherwise.

    per_token(n): the seconds of the n-th token that the machine reads.
    """

    def __init__(self, monkeypatch, per_token):
        self.now, self.read, self.per_token = 1e9, 0, per_token
        monkeypatch.setattr(time, "time", lambda: self.now)
        self.count(monkeypatch, "accumulate", lambda model, batches, *rest: sum(
            int(batch["attention_mask"].sum()) for batch in batches))
        self.count(monkeypatch, "predict_logits", lambda model, tokens, tokenizer, config, *rest:
                   sum(min(n + 2, config.seq_len) for n in tokens.lengths) / 3)

    def count(self, monkeypatch, name, tokens_of):
        """Let time go by when a function of helpers is called."""
        original = getattr(helpers, name)

        def called(*args, **kwargs):
            outcome = original(*args, **kwargs)
            n = tokens_of(*args)
            self.now += n * self.per_token(self.read)
            self.read += n
            return outcome

        monkeypatch.setattr(helpers, name, called)


@pytest.fixture
def machine(monkeypatch, cache):
    return lambda per_token: Lying(monkeypatch, per_token)


def trained(tiny_bert, **overrides):
    """Plan and train; return (params, minutes by the clock)."""
    began = time.time()
    overrides = dict(QUICK, model=tiny_bert, **overrides)
    clock = Clock("cpu")
    params = helpers.train(TEXTS, LABELS, **grading.plan_training(TEXTS, LABELS, overrides, clock))
    return params, (time.time() - began) / 60


WHOLE = sum(min(len(text.split()), 510) + 2 for text in TEXTS)  # about: made-up words are tokens


@pytest.mark.parametrize("passes", [0.4, 1.0, 2.0, 30.0])
def test_training_ends_in_time_with_its_decay_complete(machine, tiny_bert, passes, capsys):
    machine(lambda n: 28 * 60 / passes / WHOLE)  # passes that fit into all of the 28 minutes
    params, minutes = trained(tiny_bert)
    steps = [row for row in params["history"] if "lr" in row]
    assert minutes <= 28 and steps[-1]["lr"] < 0.34 * 1e-3
    assert minutes > 14 or params["config"].epochs == 3 == round(steps[-1]["epoch"])
    said = capsys.readouterr().out
    assert said.count("grading: ") == 1 and f"of {params['config'].seq_len} tokens" in said
    assert " in fp32, " in said or " in bf16, " in said, "what is used, not auto"
    if passes > 10:
        assert params["config"].seq_len == 512
    if passes < 1:
        assert params["config"].seq_len == 128 and "the shortest: there is no time for 1" in said


def test_training_on_a_machine_that_slows_down_midway_still_ends_in_time(machine, tiny_bert):
    per_token = 28 * 60 / 2 / WHOLE
    lying = machine(lambda n: per_token * (1 if n < WHOLE else 4))
    params, minutes = trained(tiny_bert)
    steps = [row for row in params["history"] if "lr" in row]
    assert lying.read > WHOLE and 20 < minutes <= 28 and steps[-1]["lr"] < 0.34 * 1e-3
    assert len(steps) < 45, "the plan was kept in spite of the clock"


def test_what_was_set_is_not_chosen(machine, tiny_bert, capsys):
    machine(lambda n: 0.001)
    params, _ = trained(tiny_bert, seq_len=40, epochs=1, precision="fp32")
    config = params["config"]
    assert (config.seq_len, config.epochs, config.precision) == (40, 1, "fp32")
    assert "40 tokens (as set) in fp32" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="this torch has no bf16 on a CPU")
@pytest.mark.parametrize("faster", [0.5, 1.05, 2.0])
def test_bf16_is_taken_where_it_is_faster(monkeypatch, cache, tiny_bert, faster):
    def speed(model, tokens, label_ids, tokenizer, config, clock):
        rate = faster if config.precision == "bf16" else 1.0
        return grading.Speed(config.seq_len, config.precision, 1000, 100 * rate, 0.1)

    monkeypatch.setattr(grading, "time_training", speed)
    plan = grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert), Clock("cpu"))
    assert plan["precision"] == ("bf16" if faster == 2.0 else "fp32") and plan["seq_len"] == 512


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="this torch has no bf16 on a CPU")
@pytest.mark.parametrize("faster", [1.05, 2.0])
def test_bf16_is_taken_for_pretraining_too(monkeypatch, cache, tiny_bert, capsys, faster):
    monkeypatch.setattr(grading, "time_pretraining", lambda *words: (
        0.1, 1 / faster if words[4].precision == "bf16" else 1.0))
    _, plan = grading.plan_pretraining([TEXTS], dict(QUICK, model=tiny_bert, seq_len=32),
                                       Clock("cpu"))
    expected = "bf16" if faster == 2.0 else "fp32"
    assert plan["precision"] == expected and f", in {expected}, " in capsys.readouterr().out


def test_a_length_that_memory_has_no_room_for_is_not_taken(monkeypatch, cache, tiny_bert, capsys):
    def speed(model, tokens, label_ids, tokenizer, config, clock):
        if config.seq_len > 256:
            raise runtime.OutOfMemory("no more")
        return grading.Speed(config.seq_len, config.precision, 1000, 100.0, 0.1)

    monkeypatch.setattr(grading, "time_training", speed)
    plan = grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert), Clock("cpu"))
    assert plan["seq_len"] == 256
    assert "256 tokens (the longest that memory has room for)" in capsys.readouterr().out


# ---- classification -----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def params(tiny_bert):
    """A classifier that gives both labels about as often."""
    made = helpers.train(TEXTS, LABELS, model=tiny_bert, seq_len=128, epochs=1, **QUICK)
    logits = helpers.classifier_logits(TEXTS, made)
    made["model"].classifier.bias.data[0] += float((logits[:, 1] - logits[:, 0]).median())
    return made


@pytest.fixture
def data():
    """Two parts, of which the second is of short reviews."""
    parts = {"dev": made_up_reviews(150, length=100, seed=1), "dev-b": made_up_reviews(60, 4, 2)}
    return {name: Part(list(range(len(texts))), texts, None)
            for name, (texts, _) in parts.items()}


def labels_within_the_limit(data, params):
    logits, _ = grading.classify(data, params, Clock("cpu"))
    return {part: helpers.labels_of(logits[part]) for part in data}


def tokens_to_read(data, seq_len):
    return sum(min(len(text.split()) + 2, seq_len) for part in data.values() for text in part.texts)


def test_with_time_enough_the_labels_are_those_of_classify(machine, params, data, capsys):
    machine(lambda n: 1e-6)
    predicted = labels_within_the_limit(data, params)
    assert predicted == {part: helpers.classify(data[part].texts, params) for part in data}
    assert "grading" not in capsys.readouterr().out and len(set(predicted["dev"])) == 2


def test_a_machine_that_slows_down_reads_fewer_tokens_of_what_is_left(machine, params, data,
                                                                      capsys):
    whole = tokens_to_read(data, 128) / 3
    per_token = 20 * 60 / whole  # 20 minutes at the first speed, 80 at the second
    lying = machine(lambda n: per_token * (1 if n < whole / 3 else 4))
    predicted = labels_within_the_limit(data, params)
    assert (lying.now - 1e9) / 60 <= 28
    assert {part: len(labels) for part, labels in predicted.items()} == {"dev": 150, "dev-b": 60}
    said = capsys.readouterr().out
    assert "tokens of a review, not 128, for the" in said and "time was up" not in said


def test_the_first_share_which_is_slower_as_any_first_call_chooses_nothing(machine, params, data,
                                                                           capsys):
    per_token = 35 * 60 * 3 / tokens_to_read(data, 128)  # 35 minutes at the first share's speed
    machine(lambda n: 1e-6 if n else per_token)
    labels_within_the_limit(data, params)
    assert "grading" not in capsys.readouterr().out


def test_views_are_given_up_before_tokens(machine, params, data, capsys):
    once = tokens_to_read(data, 32) / 3
    machine(lambda n: 20 * 60 / once)  # 20 minutes for one reading of each review
    logits, read = grading.classify(data, params, Clock("cpu"), seq_len=32, views=True)
    assert [(row["seq_len"], row["views"]) for row in read] == [(32, True), (32, False)]
    assert sum(row["reviews"] for row in read) == 210
    said = capsys.readouterr().out
    assert "1 of 3 readings of what is cut for the 208" in said and "time was up" not in said
    assert "tokens of a review" not in said
    assert {part: len(one) for part, one in logits.items()} == {"dev": 150, "dev-b": 60}
    machine(lambda n: 1e-6)
    logits, read = grading.classify(data, params, Clock("cpu"), seq_len=32, views=True)
    assert read == [{"seq_len": 32, "views": True, "reviews": 210}]
    for part in data:
        expected = helpers.classifier_logits(data[part].texts, params, seq_len=32, views=True)
        assert torch.allclose(logits[part], expected, atol=1e-5)


def test_past_the_limit_the_rest_is_called_what_most_were(machine, params, data, capsys):
    lying = machine(lambda n: 0.01 if n < 1000 else 1e5)  # it all but stops
    predicted = labels_within_the_limit(data, params)
    assert lying.read < tokens_to_read(data, 128) / 3
    said = capsys.readouterr().out
    assert "time was up before the last" in said and "they are called" in said
    usual = said.split("they are called ")[1][:3]
    labels = predicted["dev"] + predicted["dev-b"]
    assert len(labels) == 210 and labels.count(usual) > 105
    machine(lambda n: 1e9)  # not even the first share
    logits, how = grading.classify(data, params, Clock("cpu"))
    chances = torch.cat([one.softmax(1) for one in logits.values()])
    assert how[-1]["seq_len"] == 0 and how[-1]["reviews"] > 200
    read = (chances != chances.mode(0)[0]).any(1)
    assert 0 < int(read.sum()) < 5, "the others have the share of the labels given"
    assert float(chances.mode(0)[0].max()) > 0.5


def test_a_model_of_few_positions_reads_as_many_as_it_has(machine, tiny_bert, monkeypatch):
    machine(lambda n: 1e-4)
    original = helpers.load_bert

    def few(*words, **more):
        model, tokenizer = original(*words, **more)
        model.config.max_position_embeddings = 64
        return model, tokenizer

    monkeypatch.setattr(helpers, "load_bert", few)
    plan = grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert), Clock("cpu"))
    assert plan["seq_len"] == 64


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_epochs_that_were_set_are_what_there_must_be_time_for(epochs, machine, tiny_bert,
                                                                  capsys):
    """The made-up reviews are read whole at 128 tokens or more, so longer ones must cost more."""
    texts = [" ".join([text] * 8) for text in TEXTS]
    machine(lambda n: 28 * 60 / 2.5 / (8 * WHOLE))  # two and a half passes at 512 tokens
    plan = grading.plan_training(texts, LABELS, dict(QUICK, model=tiny_bert, epochs=epochs,
                                                     precision="fp32"), Clock("cpu"))
    assert plan["epochs"] == epochs
    assert (plan["seq_len"] == 512) == (epochs == 1)
    assert f"the longest with time for {epochs})" in capsys.readouterr().out


def test_a_download_is_not_taken_for_the_time_of_loading(machine, tiny_bert, monkeypatch):
    lying = machine(lambda n: 1e-4)
    original, loads = helpers.load_bert, []

    def load(*words, **more):
        lying.now += 1 if loads else 300
        loads.append(words)
        return original(*words, **more)

    monkeypatch.setattr(helpers, "load_bert", load)
    plan = grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert), Clock("cpu"))
    assert len(loads) == 2 and plan["max_minutes"] > 28 - 5.2 - 0.5


def test_the_first_step_is_not_what_is_timed(monkeypatch, tiny_bert, cache, machine):
    lying = machine(lambda n: 0)
    steps = []
    monkeypatch.setattr(grading, "one_step", lambda *_: steps.append(setattr(
        lying, "now", lying.now + (9 if not steps else len(steps)))))
    timed = grading.time_steps(helpers.load_bert(tiny_bert)[0], "abcd", None,
                               helpers.make_config(), Clock("cpu"))
    assert timed == [("b", 1), ("c", 2), ("d", 3)]
    steps.clear()
    monkeypatch.setattr(grading, "LONG", 0.001)
    assert grading.time_steps(helpers.load_bert(tiny_bert)[0], "abcd", None, helpers.make_config(),
                              Clock("cpu")) == [("a", 9)]


def test_what_is_timed_is_split_where_memory_is_short(machine, tiny_bert, monkeypatch):
    """As `fit` does it: a planned training would otherwise end before it began."""
    machine(lambda n: 1e-4)
    original, refused = helpers.accumulate, []

    def short(model, batches, *rest):
        if max(len(batch["input_ids"]) for batch in batches) > 2:
            refused.append(len(batches))
            raise runtime.OutOfMemory("no more")
        return original(model, batches, *rest)

    monkeypatch.setattr(helpers, "accumulate", short)
    plan = grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert), Clock("cpu"))
    assert refused and plan["seq_len"] == 512
    monkeypatch.setattr(helpers, "accumulate", lambda *_: short(None, [{"input_ids": "one"}]))
    with pytest.raises(runtime.OutOfMemory):
        grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert, batch_size=1),
                              Clock("cpu"))


def test_what_is_timed_has_the_dropouts_and_the_pooling_of_the_training(machine, tiny_bert,
                                                                        monkeypatch):
    machine(lambda n: 1e-4)
    original, loaded = helpers.load_bert, []
    monkeypatch.setattr(helpers, "load_bert", lambda *words, **more: loaded.append(
        original(*words, **more)) or loaded[-1])
    grading.plan_training(TEXTS, LABELS, dict(QUICK, model=tiny_bert, dropout=0.3, pooling="mean",
                                              attention_dropout=0.2, seq_len=16), Clock("cpu"))
    [(model, _)] = loaded
    assert model.config.pooling == "mean" and model.config.hidden_dropout_prob == 0.3
    assert model.config.attention_probs_dropout_prob == 0.2


# ---- the whole ----------------------------------------------------------------------------------

def test_pretraining_ends_in_time_on_as_many_texts_as_can_be_tokenized(machine, tiny_bert, capsys,
                                                                       monkeypatch):
    lying = machine(lambda n: 28 * 60 / 20000)  # 20,000 tokens in all
    original = helpers.tokenize

    def slow(texts, *rest):
        lying.now += 3 * len(texts)  # seconds a text: 140 fit into a quarter of 28 minutes
        yield from original(texts, *rest)

    monkeypatch.setattr(helpers, "tokenize", slow)
    clock = Clock("cpu")
    texts, overrides = grading.plan_pretraining(
        [TEXTS], dict(QUICK, model=tiny_bert, seq_len=32), clock)
    assert 120 <= len(texts) <= 140 and set(texts) < set(TEXTS)
    assert 0 < overrides["max_minutes"] < clock.left()
    helpers.pretrain(texts, **overrides)
    assert (lying.now - 1e9) / 60 <= 28
    assert "as many as can be tokenized" in capsys.readouterr().out


@pytest.mark.parametrize("named", [True, False])
def test_evaluate_keeps_the_limits(named, tmp_path, tiny_bert, cache, monkeypatch):
    said, out = io.StringIO(), tmp_path / "preds.tsv"
    arguments = ["--grading", "--data", str(write_filimdb(tmp_path))]
    arguments += ["--model", tiny_bert] * named
    monkeypatch.setenv("BERT_MODEL", tiny_bert)
    with contextlib.redirect_stdout(said):
        assert evaluate.main([*arguments, "--out", str(out), "--json", str(tmp_path / "run.json"),
                              *options(epochs=1)]) == 0
    assert said.getvalue().count("grading: ") == 2, said.getvalue()
    record = json.loads((tmp_path / "run.json").read_text())
    assert sum(row["reviews"] for row in record["read"]) == sum(
        len(labels) for labels in predictions(out).values())
    assert record["trained"]["steps"] > 0 and record["trained"]["epochs"] > 0
    assert set(record["minutes"]) == {"pretraining", "training", "classification"}
    assert max(record["minutes"].values()) < 28 and record["settings"]["max_minutes"] > 20
    assert record["model"] == tiny_bert and os.listdir(str(cache / "pretrained")) == []
    assert {part: len(labels) for part, labels in predictions(out).items()} == {
        part: len(helpers.read_lines(str(tmp_path / (part + ".texts"))))
        for part in ("train", "dev", "test", "dev-b", "test-b")}


def test_a_budget_of_ones_own_is_refused(capsys):
    for key in ("max_minutes", "pretrain.max_minutes"):
        assert evaluate.main(["--grading", "--set", key + "=3"]) == 2
        assert f"does not go with --set {key}" in capsys.readouterr().err
    with pytest.raises(InputError):
        evaluate.check_grading({}, {"max_minutes": 1})
