"""The training loop: accumulation, schedule, decay, reference losses, resuming, budgets.

    python tests/test_training.py --write      # writes reference_losses.json anew
"""
import csv
import io
import json
import math
import os
import signal
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from tools import ROOT, TODAY, fill, made_up_reviews, make_tiny_bert

import checkpoints
import files
import helpers
import runtime
from checkpoints import weights_digest
from files import InputError
from helpers import (
    IGNORE,
    Diverged,
    classifier_forward,
    fit,
    load_bert,
    lr_factor,
    make_config,
    make_optimizer,
    mlm_forward,
    pad,
    summed_loss,
    train,
)

REFERENCE = ROOT / "tests" / "reference_losses.json"
CPU = torch.device("cpu")
QUIET = {"dropout": 0.0, "attention_dropout": 0.0}
TEXTS, LABELS = made_up_reviews(60)
SHORT = dict(seq_len=64, batch_size=8, accumulation=2, epochs=1, lr=1e-3, device="cpu")


def losses(history):
    return [row["loss"] for row in history if "loss" in row]


def timeless(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


@pytest.fixture
def cache(cache, monkeypatch):
    monkeypatch.setattr(helpers.run, "EVALUATIONS", 8)
    return cache


# ---- schedule ----------------------------------------------------------------------------------

@pytest.mark.parametrize("total,warmup", [(20, 0.1), (50, 0.1), (100, 0.25), (10, 0.0), (8, 0.5)])
def test_the_schedule_is_the_librarys(total, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if TODAY:
        schedule = transformers.get_linear_schedule_with_warmup(
            optimizer, int(warmup * total), total)
    else:
        schedule = transformers.WarmupLinearSchedule(optimizer, int(warmup * total), total)
    for step in range(total):
        assert lr_factor(step / total, warmup) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_schedule_at_its_ends():
    assert lr_factor(0, 0.1) == 0 and lr_factor(0.05, 0.1) == 0.5 and lr_factor(0.1, 0.1) == 1
    assert lr_factor(1, 0.1) == 0 == lr_factor(1.5, 0.1) and lr_factor(0, 0) == 1
    assert lr_factor(0.55, 0.1) == pytest.approx(0.5)
    assert lr_factor(0.05, 0.1, "none") == 0.5 and lr_factor(0.99, 0.1, "none") == 1


@pytest.mark.parametrize("accumulation", [1, 2, 8])
def test_warm_up_and_decay_count_optimizer_steps(cache, tiny_bert, accumulation):
    params = train(TEXTS, LABELS, model=tiny_bert, **dict(SHORT, epochs=5,
                                                          accumulation=accumulation))
    lrs = [row["lr"] / 1e-3 for row in params["history"]]
    assert len(lrs) == 5 * 8  # 60 reviews in steps of 8
    expected = [min(step / 4, (40 - step) / 36) for step in range(40)]
    assert lrs == pytest.approx(expected, abs=1e-12)
    assert lrs[0] == 0 and lrs[4] == 1 and lrs[-1] < 0.03


# ---- accumulation ------------------------------------------------------------------------------

def window_of(rows, labels, parts, mlm=False):
    """Split rows into micro-batches of the given sizes, each padded to its own longest."""
    made, start = [], 0
    for size in parts:
        some = slice(start, start + size)
        batch = pad(rows[some], 0)
        if mlm:
            batch["labels"] = torch.full_like(batch["input_ids"], IGNORE)
            for i, at in enumerate(labels[some]):
                for j in at:
                    batch["labels"][i, j] = 7 + j
        else:
            batch["labels"] = torch.tensor(labels[some])
        made.append(batch)
        start += size
    assert start == len(rows)
    return made


def gradient_of(model, window, forward, **overrides):
    """Return the whole gradient that one step of `fit` hands to the optimizer, and its row."""
    caught = {}

    class Catch(torch.optim.SGD):
        def step(self, closure=None):
            caught.update((name, p.grad.clone()) for name, p in model.named_parameters()
                          if p.grad is not None)

    make = helpers.make_optimizer
    helpers.make_optimizer = lambda model, config: Catch(model.parameters(), lr=1.0)
    try:
        history = fit(model, lambda step: window, 1, 1, forward,
                      make_config(**dict(dict(clip_norm=0.0, device="cpu"), **overrides)))
    finally:
        helpers.make_optimizer = make
    return caught, history[0]


def by_hand(model, rows, labels, mlm=False):
    """Return (mean loss, gradients) of one plain step over all rows, one row at a time."""
    model.zero_grad()
    parts, count = [], 0
    for row, label in zip(rows, labels):
        ids = torch.tensor([row])
        if mlm:
            logits = model(ids)[0][0]
            parts += [F.cross_entropy(logits[j:j + 1], torch.tensor([7 + j])) for j in label]
            count += len(label)
        else:
            parts.append(F.cross_entropy(model(ids)[0], torch.tensor([label])))
            count += 1
    loss = sum(parts) / count
    loss.backward()
    return float(loss), {name: p.grad.clone() for name, p in model.named_parameters()
                         if p.grad is not None}


ROWS = [[2, *(20 + (i * 5 + j) % 150 for j in range(4 + i % 7 * 3)), 3] for i in range(24)]
BINARY = [i * i % 3 % 2 for i in range(24)]
MASKED = [list(range(1, 2 + i * i % 5)) for i in range(24)]  # 1 to 5 targets of a row


def assert_same_gradients(got, expected):
    for name, grad in expected.items():
        if name in got:
            largest = max(1.0, float(grad.abs().max()))
            assert float((got[name] - grad).abs().max()) < 1e-6 * largest, name
        else:
            assert float(grad.abs().max()) == 0, name  # the NSP head and, in MLM, the pooler


@pytest.mark.parametrize("n,parts", [(24, [24]), (24, [8, 8, 8]), (24, [1] * 24), (24, [17, 1, 6]),
                                     (7, [3, 3, 1]), (1, [1])])
@pytest.mark.parametrize("mlm", [False, True])
def test_accumulation_is_exact(tiny_bert, n, parts, mlm):
    model = fill(load_bert(tiny_bert, "mlm" if mlm else "classifier", 0.0, 0.0)[0], seed=2)
    labels = (MASKED if mlm else BINARY)[:n]
    loss, expected = by_hand(model, ROWS[:n], labels, mlm)
    model.zero_grad()
    got, row = gradient_of(model, window_of(ROWS[:n], labels, parts, mlm),
                           mlm_forward if mlm else classifier_forward)
    assert row["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert row["targets"] == (sum(map(len, labels)) if mlm else n)
    assert_same_gradients(got, expected)
    norm = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in expected.values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_micro_batch_without_targets(tiny_bert):
    """Few masked tokens may all fall into one micro-batch: the others count for nothing."""
    model = fill(load_bert(tiny_bert, "mlm", 0.0, 0.0)[0], seed=2)
    loss, expected = by_hand(model, ROWS[:1], MASKED[:1], True)
    model.zero_grad()
    got, row = gradient_of(model, window_of(ROWS[:3], [MASKED[0], [], []], [1, 2], True), mlm_forward)
    assert (row["loss"], row["targets"]) == (pytest.approx(loss, abs=1e-6), len(MASKED[0]))
    assert_same_gradients(got, expected)
    nothing = window_of(ROWS[:2], [[], []], [2], True)
    assert float(summed_loss(mlm_forward, model, nothing[0], CPU)) == 0
    assert gradient_of(model, nothing, mlm_forward)[1]["loss"] is None, "not measured"


def test_mean_pooling_learns_by_the_gradients_of_its_definition(tiny_bert):
    model = fill(load_bert(tiny_bert, "classifier", 0.0, 0.0, pooling="mean")[0], seed=2)
    parts = [F.cross_entropy(model.classifier(model.bert(torch.tensor([row]))[0].mean(1)),
                             torch.tensor([label])) for row, label in zip(ROWS, BINARY)]
    loss = sum(parts) / len(parts)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got, row = gradient_of(model, window_of(ROWS, BINARY, [17, 1, 6]), classifier_forward)
    assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert_same_gradients(got, expected)
    assert not any(name.startswith("bert.pooler") for name in expected), "the pooler takes no part"


# ---- clipping and weight decay -----------------------------------------------------------------

@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1e6])
def test_clipping(tiny_bert, clip_norm):
    model = fill(load_bert(tiny_bert, "classifier", 0.0, 0.0)[0], seed=2)
    expected = by_hand(model, ROWS, BINARY)[1]
    norm = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in expected.values()))
    assert norm > 0.1
    model.zero_grad()
    got, row = gradient_of(model, window_of(ROWS, BINARY, [24]), classifier_forward,
                           clip_norm=clip_norm)
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)  # before clipping
    applied = math.sqrt(sum(float((grad.double() ** 2).sum()) for grad in got.values()))
    assert applied == pytest.approx(0.01 if clip_norm == 0.01 else norm, rel=1e-3)
    assert not clip_norm or applied <= clip_norm * (1 + 1e-6)


@pytest.mark.parametrize("head", ["classifier", "mlm"])
def test_biases_and_layer_norm_do_not_decay(tiny_bert, head):
    model = load_bert(tiny_bert, head)[0]
    decaying, others = make_optimizer(model, make_config(weight_decay=0.25)).param_groups
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    ids = [{id(p) for p in group["params"]} for group in (decaying, others)]
    for name, parameter in model.named_parameters():
        spared = name.endswith(".bias") or "LayerNorm" in name
        assert id(parameter) in ids[spared] and id(parameter) not in ids[not spared], name
    assert sum(map(len, ids)) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_two_steps_by_the_formula(kind):
    """Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2; in numpy."""
    layer = torch.nn.Linear(3, 2).double()
    config = make_config(optimizer=kind, weight_decay=0.1, lr=0.02)
    optimizer = make_optimizer(layer, config)
    assert type(optimizer).__name__.lower() == kind
    w = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    m, v = ({name: np.zeros_like(value) for name, value in w.items()} for _ in range(2))
    for t in (1, 2):
        for name, p in layer.named_parameters():
            g = np.sin(np.arange(p.numel()) + t).reshape(p.shape)
            p.grad = torch.tensor(g)
            decay = 0.1 if name == "weight" else 0.0
            if kind == "adam":
                g = g + decay * w[name]
            else:
                w[name] = w[name] * (1 - 0.02 * decay)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            w[name] = w[name] - 0.02 * (m[name] / (1 - 0.9 ** t)) / (
                np.sqrt(v[name] / (1 - 0.999 ** t)) + 1e-8)
        optimizer.step()
        for name, p in layer.named_parameters():
            assert np.abs(p.detach().numpy() - w[name]).max() < 1e-9


# ---- the loop against others -------------------------------------------------------------------

@pytest.mark.skipif(not TODAY, reason="transformers 2.1 has no Trainer")
@pytest.mark.filterwarnings("ignore")
def test_the_loop_is_the_librarys_trainer(cache, tiny_bert, tmp_path):
    texts, labels = made_up_reviews(160)
    settings = dict(QUIET, seq_len=48, batch_size=16, accumulation=4, epochs=5, lr=1e-3,
                    optimizer="adamw", weight_decay=0.01, device="cpu")
    history = train(texts, labels, model=tiny_bert, **settings)["history"]
    model, tokenizer = load_bert(tiny_bert, "classifier", 0.0, 0.0)
    order = [i for step in range(50) for i in helpers.sample_of_step(160, 16, step, 0)]
    rows = [dict(ids=helpers.add_special_tokens(tokenizer(texts[i], add_special_tokens=False)["input_ids"], 48,
                                    "head+tail", tokenizer), label=int(labels[i] == "pos"))
            for i in order]
    seen = []

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(rows)

        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            seen.append(float(loss))
            return loss

    def collate(some):
        return dict(pad([row["ids"] for row in some], 0),
                    labels=torch.tensor([row["label"] for row in some]))

    Trainer(model, transformers.TrainingArguments(
        str(tmp_path / "trainer"), per_device_train_batch_size=16, num_train_epochs=1,
        learning_rate=1e-3, weight_decay=0.01, warmup_steps=5, lr_scheduler_type="linear",
        max_grad_norm=1.0, optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        remove_unused_columns=False), train_dataset=rows, data_collator=collate).train()
    assert len(seen) == 50
    assert losses(history) == pytest.approx(seen, abs=1e-5)
    assert max(row["grad_norm"] for row in history) > 1 and losses(history)[-1] < seen[0] - 0.05


def run_reference(model):
    """Return the losses of 20 steps of both objectives, without dropout."""
    texts, labels = made_up_reviews(40)
    settings = dict(QUIET, model=model, seq_len=32, batch_size=8, accumulation=2, epochs=4, lr=5e-4,
                    device="cpu")
    found = {"classifier": losses(train(texts, labels, **settings)["history"])}
    texts = [text for text in dict.fromkeys(made_up_reviews(50, length=20)[0])]
    note = helpers.pretrain(texts, **dict(settings, batch_size=16, epochs=5))
    with open(os.path.join(note["path"], "history.json")) as file:
        found["mlm"] = losses(json.load(file))[:20]
    found["mlm_loss_before"] = note["loss_before"]
    return found


def test_the_losses_are_the_same_on_both_stacks(cache, tiny_bert):
    with open(str(REFERENCE)) as file:
        expected = json.load(file)
    found = run_reference(tiny_bert)
    for key in ("classifier", "mlm"):
        assert len(expected[key]) == 20
        assert found[key][:20] == pytest.approx(expected[key], abs=1e-5), key
    assert found["mlm_loss_before"] == pytest.approx(expected["mlm_loss_before"], abs=1e-4)


# ---- memory ------------------------------------------------------------------------------------

def small_memory(monkeypatch, most, message="CUDA out of memory. Tried to allocate 2 GiB"):
    """Have micro-batches of more than `most` reviews run out of memory; return all sizes tried."""
    tried, true_loss = [], helpers.summed_loss

    def summed_loss(forward, model, batch, *rest):
        tried.append(len(batch["labels"]))
        if tried[-1] > most:
            raise RuntimeError(message)
        return true_loss(forward, model, batch, *rest)

    monkeypatch.setattr(helpers, "summed_loss", summed_loss)
    return tried


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2 GiB",
                                     "[enforce fail] DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_halves_the_micro_batches(cache, tiny_bert, monkeypatch, capsys, message):
    settings = dict(QUIET, model=tiny_bert, batch_size=8, accumulation=1, epochs=2)
    wanted = train(TEXTS, LABELS, **settings)["history"]
    tried = small_memory(monkeypatch, 2, message)
    history = train(TEXTS, LABELS, **settings)["history"]
    assert losses(history) == pytest.approx(losses(wanted), abs=1e-6)
    assert [row["grad_norm"] for row in history] == pytest.approx(
        [row["grad_norm"] for row in wanted], rel=1e-4)
    said = capsys.readouterr().out
    assert said.count("micro-batches are halved") == sum(size > 2 for size in tried) >= 1


def test_out_of_memory_in_a_thread_too(cache, tiny_bert, two_threads, monkeypatch, capsys):
    settings = dict(QUIET, model=tiny_bert, batch_size=8, accumulation=2, epochs=2)
    wanted = train(TEXTS, LABELS, **settings)["history"]
    small_memory(monkeypatch, 2)
    history = train(TEXTS, LABELS, **settings)["history"]
    assert losses(history) == pytest.approx(losses(wanted), abs=1e-6)
    assert "micro-batches are halved" in capsys.readouterr().out
    small_memory(monkeypatch, 0, "an error in a thread")
    with pytest.raises(RuntimeError, match="in a thread"):
        train(TEXTS, LABELS, **settings)


def spied_autocast(monkeypatch):
    """Return the dtypes that helpers.autocast's contexts compute a product in, as they are made."""
    made, true_autocast = [], runtime.autocast

    def autocast(*args):
        with true_autocast(*args):
            made.append((torch.ones(1, 2) @ torch.ones(2, 1)).dtype)
        return true_autocast(*args)

    monkeypatch.setattr(helpers, "autocast", autocast)
    return made


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="torch 1.3 has no bfloat16 products")
@pytest.mark.parametrize("work", ["train", "pretrain"])
def test_half_precision_is_for_the_forward_pass_alone(cache, tiny_bert, monkeypatch, work):
    def run(**settings):
        if work == "pretrain":
            path = helpers.pretrain(TEXTS, model=tiny_bert, epochs=2, **settings)["path"]
            return helpers.load_bert(path, "mlm")[0], checkpoints.read_note(path)
        params = train(TEXTS, LABELS, dev=(TEXTS, LABELS), model=tiny_bert,
                       **dict(QUIET, batch_size=8, epochs=2, **settings))
        return params["model"], params

    made, found = spied_autocast(monkeypatch), {}
    for precision in ("auto", "fp32", "bf16"):
        monkeypatch.setenv("FILIMDB_CACHE", str(cache / precision))  # auto finds what fp32 made
        model, outcome = run(precision=precision)
        assert set(made) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert len(made) >= 4  # training, and measuring it
        made.clear()
        found[precision] = outcome["curve" if work == "pretrain" else "history"]
    name = "held_out_loss" if work == "pretrain" else "loss"
    fp32, auto, bf16 = ([row[name] for row in found[precision] if name in row]
                        for precision in ("fp32", "auto", "bf16"))
    assert fp32 == auto != bf16 and bf16 == pytest.approx(fp32, abs=0.03)


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="torch 1.3 has no bfloat16 products")
def test_a_classification_may_have_a_precision_of_its_own(cache, tiny_bert, monkeypatch):
    params = train(TEXTS, LABELS, **dict(QUIET, model=tiny_bert, epochs=2))
    tokens, logits = helpers.tokenize_all(TEXTS, params["tokenizer"]), {}
    for precision in ("auto", "bf16"):
        config = helpers.make_config(**dict(QUIET, model=tiny_bert, precision=precision))
        logits[precision] = helpers.predict_logits(params["model"], tokens, params["tokenizer"],
                                                   config)
    assert logits["bf16"].dtype == torch.float32 and not torch.equal(*logits.values())
    assert torch.allclose(*logits.values(), atol=0.03)
    made = spied_autocast(monkeypatch)
    helpers.classify(TEXTS, params, precision="bf16")
    assert set(made) == {torch.bfloat16}


def test_one_review_too_large_for_the_memory_ends_the_run(cache, tiny_bert, monkeypatch):
    small_memory(monkeypatch, 0)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(TEXTS, LABELS, model=tiny_bert, **SHORT)


def test_another_error_is_no_lack_of_memory(cache, tiny_bert, monkeypatch):
    tried = small_memory(monkeypatch, 0, "CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side"):
        train(TEXTS, LABELS, model=tiny_bert, **SHORT)
    assert len(tried) == 1


# ---- what is printed ----------------------------------------------------------------------------

@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets: the seconds since it began."""
    now = [0.0]
    monkeypatch.setattr(runtime.time, "time", lambda: 1e9 + now[0])
    return now


def screen_of(monkeypatch, **attributes):
    """Take the place of stdout by a terminal, or a notebook's page."""
    screen = io.StringIO()
    screen.__dict__.update(attributes)
    monkeypatch.setattr(sys, "stdout", screen)
    return screen


def as_seen(text):
    """Return the lines that a terminal shows of what was written to it."""
    return [line.split("\r")[-1].rstrip() for line in text.split("\n")]


def work(clock, seconds=1.0, n_trials=6, n_steps=30, stop=(9, 9)):
    """Go through trials of steps, on the clock; one of two bars in the other."""
    with runtime.progress_bar(n_trials, "learning rates", "trial") as trials:
        for trial in range(n_trials):
            with runtime.progress_bar(n_steps, "training", "step") as steps:
                for step in range(n_steps):
                    clock[0] += seconds
                    steps.update()
                    if (trial, step) == stop:
                        return
            trials.update()


def test_one_bar_has_the_whole_in_sight(monkeypatch, clock):
    screen = screen_of(monkeypatch, isatty=lambda: True)
    work(clock, stop=(2, 11))
    states = [state.rstrip() for state in screen.getvalue().split("\r")]
    assert "[########............] learning rates 3/6 \u00b7 step 12/30 \u00b7 2 min left" in states
    assert as_seen(screen.getvalue()) == [""], "nothing is left on a terminal"
    assert not [state for state in states if "training" in state]


def test_a_notebook_keeps_one_line_and_no_gap(monkeypatch, clock):
    screen = screen_of(monkeypatch, pub_thread=None)
    work(clock)
    assert as_seen(screen.getvalue()) == ["learning rates: 6 trials, 3 min", ""]
    screen = screen_of(monkeypatch, pub_thread=None)
    work(clock, seconds=0.001)
    assert screen.getvalue() == "", "what is done at once shows no bar, and leaves no gap"


def test_a_log_gets_a_line_a_minute(monkeypatch, clock):
    screen = screen_of(monkeypatch)
    work(clock, seconds=61.0, n_trials=2, n_steps=3)
    assert screen.getvalue().split("\n") == [
        "learning rates: trial 1 of 2, step 1 of 3, 5 min left",
        "learning rates: trial 1 of 2, step 2 of 3, 4 min left",
        "learning rates: trial 1 of 2, step 3 of 3, 3 min left",
        "learning rates: trial 2 of 2, step 1 of 3, 2 min left",
        "learning rates: trial 2 of 2, step 2 of 3, 61 s left",
        "learning rates: trial 2 of 2, step 3 of 3, 0 s left", ""]
    screen = screen_of(monkeypatch)
    work(clock, seconds=10.0, n_trials=4, n_steps=2160)  # a day
    assert screen.getvalue().count("\n") == 1440


def test_the_time_left_is_of_what_has_to_be_done(monkeypatch, clock):
    screen_of(monkeypatch)
    with runtime.progress_bar(4, "rates", "trial", costs=[0, 0, 1, 3]) as bar:
        bar.skip(2)
        assert bar.left() is None and bar.share() == 0
        clock[0] += 10
        bar.update()
        assert (bar.share(), bar.left()) == (0.25, 30) and "rates: trial 3 of 4" in bar.text()
        with runtime.progress_bar(10, "training", "step", budget=12) as steps:
            steps.skip(5)
            clock[0] += 10
            steps.update()
            assert (steps.share(), steps.left()) == (0.2, 2)
            assert abs(bar.share() - (1 + 3 * 0.2) / 4) < 1e-9
            assert bar.text() == "rates: trial 4 of 4, step 6 of 10, 30 s left"
    assert bar.summary() == "rates: 3 of 4 trials, 2 of them before, 20 s"


def test_an_error_leaves_no_bar_behind(monkeypatch, clock):
    screen = screen_of(monkeypatch, pub_thread=None)
    for seconds in (1.0, 2.0):
        with pytest.raises(KeyError), runtime.progress_bar(6, "rates", "trial") as bar:
            clock[0] += seconds
            bar.update()
            runtime.progress_bar(5, "tokenizing", "review").update()  # never closed
            raise KeyError
    assert as_seen(screen.getvalue()) == ["rates: 1 of 6 trials, 1 s", "rates: 1 of 6 trials, 2 s", ""]


def test_who_watches_from_outside_finds_the_line_in_a_file(monkeypatch, clock, tmp_path):
    screen_of(monkeypatch, pub_thread=None)
    monkeypatch.setenv("FILIMDB_PROGRESS", str(tmp_path / "progress"))
    seen = []
    monkeypatch.setattr(runtime.Progress, "close", lambda bar, close=runtime.Progress.close: (
        seen.extend(path.read_text() for path in tmp_path.iterdir()), close(bar)))
    work(clock, stop=(2, 11))
    assert seen[-1] == "learning rates: trial 3 of 6, step 12 of 30, 2 min left"
    assert not list(tmp_path.iterdir())


def test_a_line_stands_above_the_bar_that_is_shown(monkeypatch, clock):
    screen = screen_of(monkeypatch, isatty=lambda: True)
    with runtime.progress_bar(7, "trials", "trial") as bar:
        clock[0] += 1
        bar.update()
        files.say("goes on")
        files.warn("mind")
        assert as_seen(screen.getvalue())[2].endswith("trials 1/7 \u00b7 6 s left")
    assert as_seen(screen.getvalue()) == ["goes on", "Warning: mind", ""]


def test_a_terminal_that_knows_ascii_alone(monkeypatch, clock):
    raw = io.BytesIO()
    screen = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", screen)
    bar = runtime.progress_bar(7, "trials", "trial")
    bar.live = True
    clock[0] += 1
    bar.update()
    assert b"trials 1/7, 6 s left" in raw.getvalue()


# ---- resuming ----------------------------------------------------------------------------------

def whole_run(model, **overrides):
    return train(TEXTS, LABELS, dev=(TEXTS[:9], LABELS[:9]), model=model,
                 **dict(SHORT, epochs=2, **overrides))


def interrupt(monkeypatch, name, calls):
    """Have the helper of that name raise Ctrl-C at its n-th call."""
    real, count = getattr(helpers, name), [0]

    def interrupted(*args, **kwargs):
        count[0] += 1
        if count[0] == calls:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(helpers, name, interrupted)


def test_an_interrupted_run_goes_on_bit_for_bit(cache, tiny_bert, monkeypatch, capsys):
    undisturbed = whole_run(tiny_bert)
    assert len(undisturbed["history"]) == 17 and not list((cache / "runs").glob("*"))
    for name, calls in [("sample_of_step", 1), ("sample_of_step", 2), ("sample_of_step", 10),
                        ("sample_of_step", 16), ("measure", 1), ("measure", 6), ("measure", 18),
                        ("summed_loss", 12)]:
        with monkeypatch.context() as patch:
            interrupt(patch, name, calls)
            with pytest.raises(KeyboardInterrupt):
                whole_run(tiny_bert)
        capsys.readouterr()
        resumed = whole_run(tiny_bert)
        if name == "sample_of_step":
            assert f"resuming from the checkpoint at step {calls - 1}\n" in capsys.readouterr().out
        assert timeless(resumed["history"]) == timeless(undisturbed["history"]), (name, calls)
        assert weights_digest(resumed["model"]) == weights_digest(undisturbed["model"])
        assert not list((cache / "runs").glob("*"))


def test_two_threads_train_as_one_and_go_on_bit_for_bit(cache, tiny_bert, two_threads, monkeypatch):
    undisturbed = whole_run(tiny_bert)
    for name, calls in [("sample_of_step", 10), ("summed_loss", 12), ("measure", 6)]:
        with monkeypatch.context() as patch:
            interrupt(patch, name, calls)  # summed_loss: raised by a worker
            with pytest.raises(KeyboardInterrupt):
                whole_run(tiny_bert)
        resumed = whole_run(tiny_bert)
        assert timeless(resumed["history"]) == timeless(undisturbed["history"]), (name, calls)
        assert weights_digest(resumed["model"]) == weights_digest(undisturbed["model"])
    torch.set_num_threads(1)
    assert losses(whole_run(tiny_bert)["history"]) == pytest.approx(
        losses(undisturbed["history"]), abs=1e-6)


def test_a_run_with_a_learning_curve_is_another_run(cache, tiny_bert, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt(patch, "measure", 3)
        with pytest.raises(KeyboardInterrupt):
            whole_run(tiny_bert)
    capsys.readouterr()
    train(TEXTS, LABELS, model=tiny_bert, **dict(SHORT, epochs=2))
    train(TEXTS, LABELS, dev=(TEXTS[:8], LABELS[:8]), model=tiny_bert, **dict(SHORT, epochs=2))
    assert "resuming from the checkpoint at" not in capsys.readouterr().out
    whole_run(tiny_bert)
    assert "resuming from the checkpoint at" in capsys.readouterr().out


def test_other_settings_texts_or_weights_are_no_resumption(cache, tiny_bert, tmp_path, monkeypatch,
                                                           capsys):
    other = make_tiny_bert(tmp_path / "other", seed=1)
    with monkeypatch.context() as patch:
        interrupt(patch, "sample_of_step", 4)
        with pytest.raises(KeyboardInterrupt):
            whole_run(tiny_bert)
    assert len(list((cache / "runs").glob("*.checkpoint"))) == 1
    capsys.readouterr()
    whole_run(other)
    whole_run(tiny_bert, seed=1)
    whole_run(tiny_bert, lr=2e-3)
    train(TEXTS[::-1], LABELS[::-1], model=tiny_bert, **dict(SHORT, epochs=2))
    train(TEXTS, LABELS[1:] + LABELS[:1], model=tiny_bert, **dict(SHORT, epochs=2))
    assert "resuming from the checkpoint" not in capsys.readouterr().out
    whole_run(tiny_bert)
    assert "resuming from the checkpoint at step 3\n" in capsys.readouterr().out


def test_a_damaged_checkpoint_is_set_aside(cache, tiny_bert, monkeypatch, capsys):
    undisturbed = whole_run(tiny_bert)
    with monkeypatch.context() as patch:
        interrupt(patch, "sample_of_step", 4)
        with pytest.raises(KeyboardInterrupt):
            whole_run(tiny_bert)
    path, = (cache / "runs").glob("*")
    path.write_bytes(path.read_bytes()[:-1] + b"\0\0")
    again = whole_run(tiny_bert)
    out = capsys.readouterr().out
    assert "set aside" in out and "resuming from the checkpoint" not in out
    assert weights_digest(again["model"]) == weights_digest(undisturbed["model"])


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import checkpoints, helpers, tools, torch
from test_training import whole_run
torch.set_num_threads(1)
helpers.run.CHECKPOINT_SECONDS = helpers.run.CHECKPOINT_SHARE = 0

def killed_at(owner, name, calls):
    real, count = getattr(owner, name), [0]
    def deadly(*args, **kwargs):
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, deadly)

# while a step is made; then while the next checkpoint but two is half written
for owner, name, calls in ((helpers, "summed_loss", 9), (os, "fsync", 3)):
    child = os.fork()
    if child == 0:
        killed_at(owner, name, calls)
        whole_run({model!r})
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print("files", sum(name.endswith(".checkpoint") for name in os.listdir(
        os.path.join(os.environ["FILIMDB_CACHE"], "runs"))))
params = whole_run({model!r})
print("weights", checkpoints.weights_digest(params["model"]))
"""


@pytest.mark.slow
def test_killed_runs_go_on_from_their_last_checkpoint(cache, tiny_bert):
    undisturbed = whole_run(tiny_bert)
    code = KILLED.format(tests=os.path.dirname(os.path.abspath(__file__)), model=tiny_bert)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=400,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert f"weights {weights_digest(undisturbed['model'])}\n" in done.stdout
    steps = [int(line.split()[-1]) for line in done.stdout.split("\n") if "resuming from" in line]
    assert len(steps) == 2 and 0 < steps[0] < steps[1], done.stdout
    assert "files 1\n" in done.stdout and signal.SIGKILL == 9


def test_a_finished_run_is_not_reused(cache, tiny_bert, monkeypatch):
    one = whole_run(tiny_bert)
    steps, real = [], helpers.sample_of_step
    monkeypatch.setattr(helpers, "sample_of_step", lambda *args: steps.append(1) or real(*args))
    two = whole_run(tiny_bert)
    assert len(steps) == 16 and one["model"] is not two["model"]
    assert weights_digest(one["model"]) == weights_digest(two["model"])
    assert timeless(one["history"]) == timeless(two["history"])


# ---- what else may happen ----------------------------------------------------------------------

def test_a_loss_that_is_nan_stops_the_run(cache, tiny_bert):
    model = load_bert(tiny_bert)[0]
    window = window_of(ROWS[:4], BINARY[:4], [4])

    def batches(step):
        if step == 2:
            model.classifier.bias.data[0] = math.nan
        return window

    with pytest.raises(Diverged) as caught:
        fit(model, batches, 4, 4, classifier_forward, make_config(lr=0.5, warmup=0.0, device="cpu"))
    message = str(caught.value)
    assert "step 3 of 4" in message and "lr 0.25" in message and "\n" not in message
    assert "nan" in message and not model.training


def test_an_infinite_gradient_stops_the_run(tiny_bert, monkeypatch):
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    with pytest.raises(Diverged, match="gradient norm inf at step 1 of 1"):
        fit(load_bert(tiny_bert)[0], lambda step: window_of(ROWS[:4], BINARY[:4], [4]), 1, 1,
            classifier_forward, make_config(device="cpu"))


class Clock:
    """A clock that goes on by a second whenever it is read."""

    def __init__(self, tick=1.0):
        self.now, self.tick = 1e9, tick

    def time(self):
        self.now += self.tick
        return self.now


@pytest.mark.parametrize("decay", ["linear", "none"])
def test_a_time_budget(cache, tiny_bert, monkeypatch, capsys, decay):
    clock = Clock()
    monkeypatch.setattr(helpers.run, "time", clock)
    started = clock.now
    history = train(TEXTS, LABELS, model=tiny_bert,
                    **dict(SHORT, epochs=20, max_minutes=2.0, decay=decay))["history"]
    assert clock.now - started < 120 + 15
    assert 20 < len(history) < 100  # of 160
    assert history[-1]["seconds"] <= 120 + 3
    lrs = [row["lr"] / 1e-3 for row in history]
    if decay == "linear":
        assert lrs[-1] < 0.05 and max(lrs) > 0.9
        assert lrs.index(max(lrs)) == pytest.approx(0.1 * len(lrs), abs=3)
    else:
        assert lrs[-1] == 1
    out = capsys.readouterr().out
    assert f"the budget of 2 minutes ended it after {len(history)} of 160 steps" in out
    assert decay == "linear" or "decayed" not in out


def test_a_time_budget_has_a_whole_learning_curve(cache, tiny_bert, monkeypatch):
    monkeypatch.setattr(helpers.run, "time", Clock())
    history = train(TEXTS, LABELS, model=tiny_bert, dev=(TEXTS[:8], LABELS[:8]),
                    **dict(SHORT, epochs=20, max_minutes=2.0))["history"]
    measured = [i for i, row in enumerate(history) if "dev_loss" in row]
    assert measured[0] == 0 and measured[-1] == len(history) - 1, "before and after"
    assert len(measured) == helpers.run.EVALUATIONS + 1
    gaps = [b - a for a, b in zip(measured, measured[1:])]
    assert max(gaps) < 2 * min(gaps) + 3, "evenly over the time"


def test_a_budget_used_up_before_the_first_step(cache, tiny_bert, monkeypatch, capsys):
    monkeypatch.setattr(helpers.run, "time", Clock(1000.0))
    history = train(TEXTS, LABELS, model=tiny_bert, dev=(TEXTS[:8], LABELS[:8]),
                    **dict(SHORT, max_minutes=1.0))["history"]
    assert [row["step"] for row in history] == [0]
    assert "ended it after 0 of 8 steps" in capsys.readouterr().out


def test_no_budget_and_a_wide_one_are_the_same(cache, tiny_bert, capsys):
    one, two = (train(TEXTS, LABELS, model=tiny_bert, max_minutes=minutes, **SHORT)
                for minutes in (0.0, 1e4))
    assert losses(one["history"]) == pytest.approx(losses(two["history"]), abs=1e-5)
    assert "budget" not in capsys.readouterr().out


def test_whoever_calls_keeps_their_random_stream(cache, tiny_bert):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state().clone()
        params = train(TEXTS, LABELS, model=tiny_bert, **SHORT)
        assert torch.equal(torch.get_rng_state(), before)
        found.append((weights_digest(params["model"]), losses(params["history"])))
    assert found[0] == found[1]


def test_each_step_draws_its_own_dropout(cache, tiny_bert, monkeypatch):
    seeds, real = [], helpers.sample_of_step
    monkeypatch.setattr(helpers, "sample_of_step",
                        lambda *args: seeds.append(torch.initial_seed()) or real(*args))
    for _ in range(2):
        train(TEXTS, LABELS, model=tiny_bert, **SHORT)
    assert len(set(seeds)) == 8 and seeds[:8] == seeds[8:]


def test_seeds_matter(cache, tiny_bert):
    found = [losses(train(TEXTS, LABELS, model=tiny_bert, **dict(SHORT, **seeds))["history"])
             for seeds in ({}, {"seed": 1}, {"data_seed": 1})]
    assert found[0] != found[1] and found[0] != found[2] and found[1] != found[2]
    found = [train(TEXTS, LABELS, model=tiny_bert, **dict(SHORT, dropout=p))["history"]
             for p in (0.0, 0.5)]
    assert losses(found[0]) != losses(found[1])


def test_evaluation_changes_nothing_in_training(cache, tiny_bert):
    without = train(TEXTS, LABELS, model=tiny_bert, **SHORT)
    beside = train(TEXTS, LABELS, dev=(TEXTS[5:20], LABELS[5:20]), n_eval=7, model=tiny_bert, **SHORT)
    assert losses(without["history"]) == losses(beside["history"])
    assert weights_digest(without["model"]) == weights_digest(beside["model"])


def test_the_curve_is_measured_through_every_epoch(cache, tiny_bert):
    params = train(TEXTS, LABELS, dev=(TEXTS[:11], LABELS[:11]), model=tiny_bert,
                   **dict(SHORT, epochs=2))
    keys = {f"{part}_{what}" for part in ("train", "dev") for what in ("loss", "accuracy")}
    measured = [row for row in params["history"] if keys <= set(row)]
    assert [row["step"] for row in measured] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert [row["epoch"] for row in measured] == [step / 8 for step in range(0, 17, 2)]
    assert "loss" not in measured[0]
    model, tokenizer = load_bert(tiny_bert)
    for params_, row in (({"model": model, "tokenizer": tokenizer, "config": params["config"]},
                          measured[0]), (params, measured[-1])):
        predicted = helpers.classify(TEXTS[:11], params_)
        assert row["dev_accuracy"] == pytest.approx(helpers.accuracy(LABELS[:11], predicted))
        assert row["train_accuracy"] == pytest.approx(
            helpers.accuracy(LABELS, helpers.classify(TEXTS, params_)))
    logits = torch.cat([params["model"](torch.tensor([helpers.add_special_tokens(
        tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)), 64, "head+tail", tokenizer)]))[0]
        for text in TEXTS[:11]])
    loss = F.cross_entropy(logits, torch.tensor([int(label == "pos") for label in LABELS[:11]]))
    assert measured[-1]["dev_loss"] == pytest.approx(float(loss), abs=1e-5)


def test_it_learns(cache, tiny_bert):
    texts, labels = made_up_reviews(200)
    params = train(texts, labels, model=tiny_bert, **dict(SHORT, epochs=6, lr=2e-3))
    unseen, expected = made_up_reviews(60, seed=3)
    assert helpers.accuracy(expected, helpers.classify(unseen, params)) > 0.75


def test_the_history_is_written(cache, tiny_bert, tmp_path):
    stem = str(tmp_path / "out" / "history")
    history = train(TEXTS, LABELS, dev=(TEXTS, LABELS), model=tiny_bert, save_as=stem,
                    **SHORT)["history"]
    with open(stem + ".json", encoding="utf-8") as file:
        assert json.load(file) == history
    with open(stem + ".csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(history) == 9
    for row, expected in zip(rows, history):
        assert {key: float(value) for key, value in row.items() if value} == expected
    assert {"step", "epoch", "lr", "grad_norm", "loss", "targets", "seconds"} <= set(rows[0])


def test_tensorboard_gets_every_figure(cache, tiny_bert, monkeypatch):
    written, closed = [], []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, key, value, step):
            written.append((self.folder, key, value, step))

        def close(self):
            closed.append(True)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard",
                        types.SimpleNamespace(SummaryWriter=Writer))
    history = train(TEXTS, LABELS, model=tiny_bert, log_dir="there", **SHORT)["history"]
    for row in history:
        assert ("there", "loss", row["loss"], row["step"]) in written
        assert ("there", "lr", row["lr"], row["step"]) in written
    assert closed  # else the last two minutes may never reach the disk


def test_without_tensorboard_it_warns_and_goes_on(cache, tiny_bert, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    history = train(TEXTS, LABELS, model=tiny_bert, log_dir="there", **SHORT)["history"]
    assert len(history) == 8
    said = capsys.readouterr().out
    assert said.count("Warning: no TensorBoard log") == 1 and "pip install tensorboard" in said


@pytest.mark.parametrize("texts,labels,said", [
    (["a", "b"], ["pos", "pos"], "both labels"), ([], [], "both labels"),
    (["a", "b"], ["pos"], "1 labels for 2 texts"), (["a", "b"], ["pos", "meh"], "'meh'"),
    (["a", None], ["pos", "neg"], "text 1 is of type NoneType"),
    (["a", b"b"], ["pos", "neg"], "text 1 is of type bytes")])
def test_what_cannot_be_trained_on_is_refused(cache, tiny_bert, texts, labels, said):
    with pytest.raises(InputError) as caught:
        train(texts, labels, model=tiny_bert, **SHORT)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_labels_and_texts_of_other_types(cache, tiny_bert):
    class Label:
        def __init__(self, name):
            self.name = name

        def __str__(self):
            return self.name

    expected = weights_digest(train(TEXTS, LABELS, model=tiny_bert, **SHORT)["model"])
    for texts, labels in ((tuple(TEXTS), tuple(LABELS)), (iter(TEXTS), iter(LABELS)),
                          (np.array(TEXTS, dtype=object), np.array(LABELS)),
                          (TEXTS, [Label(label) for label in LABELS])):
        assert weights_digest(train(texts, labels, model=tiny_bert, **SHORT)["model"]) == expected


if __name__ == "__main__":
    import tempfile
    assert sys.argv[1:] == ["--write"], __doc__
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FILIMDB_CACHE"] = folder
        torch.set_num_threads(1)
        found = run_reference(make_tiny_bert(os.path.join(folder, "tiny")))
        files.save_json(str(REFERENCE), {key: value[:20] if isinstance(value, list) else value
                                           for key, value in found.items()})
