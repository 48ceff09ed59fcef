"""gpu.py and what belongs to it, as far as a CPU shows it: unpadded passes, fp16, dealing."""
import contextlib
import dataclasses
import datetime
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tools import TODAY, fill, made_up_reviews

import gpu
import helpers
import runtime
from files import InputError
from helpers import IGNORE, load_bert, make_config, micro_batches, micro_limits, pad, split_step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TEXTS, LABELS = made_up_reviews(40)
QUICK = dict(seq_len=32, batch_size=8, epochs=2, lr=1e-3, dropout=0.0, attention_dropout=0.0,
             device="cpu")
ROWS = [[2, *(20 + (i * 5 + j) % 150 for j in range(4 + i % 7 * 3)), 3] for i in range(24)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FILIMDB_CACHE", str(tmp_path / "cache"))
    return tmp_path


# ---- without padding ----------------------------------------------------------------------------

def test_an_unpadded_row_by_hand():
    batch = dict(pad([[2, 7, 3], [2, 8, 9, 4, 3]], 0), labels=torch.tensor([1, 0]))
    row = gpu.unpad(batch)
    assert row["input_ids"].tolist() == [[2, 7, 3, 2, 8, 9, 4, 3]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert (row["starts"].tolist(), row["longest"]) == ([0, 3, 8], 5)
    assert row["starts"].dtype == torch.int32 and row["labels"].tolist() == [1, 0]
    assert (gpu.rows_of(batch), gpu.rows_of(row)) == (2, 2)
    assert (gpu.tokens_of(batch), gpu.tokens_of(batch, True), gpu.tokens_of(row)) == (10, 8, 8)
    words = gpu.unpad(dict(batch, labels=torch.tensor([[IGNORE, 7, *[IGNORE] * 3],
                                                       [IGNORE, 8, IGNORE, 4, IGNORE]])))
    targets = gpu.pick_targets(words)
    assert (targets["masked"].tolist(), targets["labels"].tolist()) == ([1, 4, 6], [7, 8, 4])


def batch_of(head):
    """Return a padded batch with labels for a head."""
    batch = pad(ROWS, 0)
    if head != "mlm":
        return dict(batch, labels=torch.tensor([i * i % 3 % 2 for i in range(len(ROWS))]))
    labels = torch.full_like(batch["input_ids"], IGNORE)
    for i in range(len(ROWS)):
        labels[i, 1:1 + i % 4] = 7 + i
    return dict(batch, labels=labels)


@pytest.mark.skipif(not TODAY, reason="transformers 2.1 lets nobody say how BERT attends")
@pytest.mark.parametrize("head,pooling", [("classifier", "cls"), ("classifier", "mean"),
                                          ("mlm", "cls")])
def test_loss_and_gradients_are_those_of_padded_reviews(tiny_bert, head, pooling):
    model = fill(load_bert(tiny_bert, head, 0.0, 0.0, pooling=pooling)[0], seed=2).train()
    forward = helpers.classifier_forward if head == "classifier" else helpers.mlm_forward
    padded, found = batch_of(head), []
    row = gpu.unpad(padded)
    for batch in (padded, row if head == "classifier" else gpu.pick_targets(row)):
        helpers.clear_gradients(model)
        loss = helpers.summed_loss(forward, model, batch, CPU)
        loss.backward()
        found.append((float(loss.detach()), {name: p.grad.clone() for name, p in
                                    model.named_parameters() if p.grad is not None}))
    (loss, expected), (got_loss, got) = found
    assert got_loss == pytest.approx(loss, rel=1e-6)
    for name in set(expected) | set(got):
        if name not in got:  # in masked LM the pooler, which BertModel works out for nothing
            assert float(expected[name].abs().max()) == 0, name
            continue
        size = max(1.0, float(expected[name].norm()))
        assert float((got[name] - expected[name]).norm()) < 1e-6 * size, name


@pytest.mark.parametrize("pooling", sorted(gpu.POOLINGS))
def test_pooling_does_not_depend_on_how_a_batch_lies_in_memory(monkeypatch, pooling):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for rows in ([[2, 7, 3], [2, 8, 9, 4, 3]], [[2, 7, 8, 3], [2, 9, 4, 3]]):  # padded, even
        batch = pad(rows, 0)
        hidden = torch.randn(2, batch["input_ids"].shape[1], 6)
        states = [one[:len(row)] for one, row in zip(hidden, rows)]
        expected = torch.stack([one[0] if pooling == "cls" else one.sum(0) / len(one)
                                for one in states])
        for laid, form in ((hidden, batch), (hidden, gpu.pinned(batch)),
                           (torch.cat(states)[None], gpu.unpad(batch))):
            if TODAY or "starts" not in form:  # the pinned stack pads always
                assert torch.allclose(gpu.POOLINGS[pooling](laid, form), expected, atol=1e-6)


@pytest.mark.skipif(not TODAY, reason="transformers 2.1 lets nobody say how BERT attends")
def test_unpadded_attention_drops_as_often_as_asked():
    torch.manual_seed(0)
    q = torch.zeros(1, 1, 4000, 8)
    ones = torch.ones_like(q)
    starts = torch.tensor([0, 2000, 4000], dtype=torch.int32)
    same = gpu.attend_apart(q, q, ones, 0.0, 1.0, starts, 2000)
    assert torch.allclose(same, torch.ones(1, 4000, 1, 8))
    dropped = gpu.attend_apart(q, q, ones, 0.5, 1.0, starts, 2000)
    assert abs(float(dropped.mean()) - 1) < 1e-2 and float(dropped.std()) > 0.01


def test_a_mask_is_left_out_where_nothing_is_padded(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    even = gpu.pinned(pad([[1, 2], [3, 4]], 0))
    assert set(even) == {"input_ids"}
    uneven = gpu.pinned(pad([[1, 2], [3]], 0))
    if TODAY:  # as attention takes it: (batch, heads, queries, keys)
        assert uneven["attention_mask"].shape == (2, 1, 1, 2)
    assert uneven["attention_mask"].reshape(2, 2).tolist() == [[1, 1], [1, 0]]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 200))
def test_a_batch_is_split_until_it_fits(lengths, most):
    batch = dict(pad([[5] * n for n in sorted(lengths, reverse=True)], 0),
                 labels=torch.arange(len(lengths)))
    for unpadded in (False, True):
        parts = gpu.split_batch(batch, most, unpadded)
        assert torch.cat([part["labels"] for part in parts]).tolist() == list(range(len(lengths)))
        for part in parts:
            assert gpu.rows_of(part) == 1 or gpu.tokens_of(part, unpadded) <= most
        assert len(parts) == 1 or gpu.tokens_of(batch, unpadded) > most


def test_who_goes_unpadded(monkeypatch, tiny_bert):
    monkeypatch.setattr(torch.version, "cuda", "13.0", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert gpu.unpadding(GPU, "bf16") == gpu.unpadding(GPU, "fp16") == TODAY
    assert not gpu.unpadding(GPU, "fp32") and not gpu.unpadding(CPU, "bf16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not gpu.unpadding(GPU, "fp16"), "a T4"
    assert not gpu.unpads(load_bert(tiny_bert)[0], "bf16"), "on a CPU"


# ---- several processes ----------------------------------------------------------------------------

@given(st.lists(st.integers(1, 512), max_size=60), st.integers(1, 9))
def test_dealing(costs, count):
    lists = runtime.deal(costs, count)
    assert sorted(i for one in lists for i in one) == list(range(len(costs))) and len(lists) == count
    loads = [sum(costs[i] for i in one) for one in lists]
    assert max(loads) - min(loads) <= max(costs, default=0)
    assert runtime.deal(costs, 1) == [list(range(len(costs)))]


def long_tailed(n, seed):
    """Return the tokens of n reviews like FILIMDB's: log-normal, median 241, cut at 512."""
    random = np.random.RandomState(seed)
    return (np.exp(random.normal(math.log(241), 0.82, n)).astype(int).clip(5, 510) + 2).tolist()


@pytest.mark.parametrize("way", ["a CPU", "a GPU, padded", "a GPU, unpadded"])
@pytest.mark.parametrize("count,batch_size", [(2, 32), (4, 128), (8, 256)])
def test_processes_work_equally(monkeypatch, way, count, batch_size):
    """Real tokens of a process, if all had the same, over those that the busiest computes."""
    monkeypatch.setattr(helpers, "processes", lambda: (0, count))
    monkeypatch.setattr(helpers, "unpadding", lambda device, precision: "unpadded" in way)
    shares = []
    for seed in range(40):
        lengths = long_tailed(batch_size, seed)
        config = make_config(batch_size=batch_size, precision="fp32")
        batches = split_step(lengths, config, CPU if "CPU" in way else GPU)
        costs = [sum(lengths[i] for i in batch) if "unpadded" in way else
                 len(batch) * max(lengths[i] for i in batch) for batch in batches]
        busiest = max(sum(costs[i] for i in one) for one in runtime.deal(costs, count))
        shares.append(sum(lengths) / count / busiest)
    print(f"{way}, {count} processes, batch {batch_size}: {np.mean(shares):.0%}")
    assert np.mean(shares) >= 0.8


def test_a_classifications_batches_do_not_shrink_with_processes(monkeypatch, tiny_bert):
    params = helpers.train(TEXTS, LABELS, model=tiny_bert, **QUICK)
    sizes = []
    for count in (1, 4):
        seen = []
        true_pad = helpers.pad
        with monkeypatch.context() as patch:
            patch.setattr(helpers, "processes", lambda: (0, count))
            patch.setattr(helpers, "pad", lambda rows, pad_id: seen.append(len(rows)) or true_pad(
                rows, pad_id))
            helpers.classify(["good film"] * 256, params)
        sizes.append(max(seen))
    assert sizes == [64, 64]


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("device", ["", "cpu"])
def test_processes_exchange_what_they_compute(monkeypatch, cuda, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    options = runtime.exchange_options(device, 3)
    assert options["timeout"] >= datetime.timedelta(hours=1)
    if not cuda:
        assert options["backend"] == "gloo" and "device_id" not in options
    elif TODAY:  # a CPU's tensors too, whatever device is asked for
        assert options["backend"] == "cpu:gloo,cuda:nccl"
        assert options["device_id"] == torch.device("cuda", 3)
    else:
        assert options["backend"] == ("gloo" if device else "nccl")


# ---- precision ----------------------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="PyTorch 1.3 has no autocast")
def test_emulated_bf16_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: (
        including_emulation))
    assert runtime.used_precision("auto", "cuda") == "fp16"
    assert runtime.used_precision("auto", "cpu") == "fp32"


def test_without_autocast_a_gpu_computes_in_fp32_and_says_so(monkeypatch, capsys):
    monkeypatch.delattr(torch, "autocast", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(runtime, "_told", set())
    switched = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append, raising=False)
    assert runtime.used_precision("auto", "cuda") == "fp32"
    for _ in range(2):
        assert runtime.pick_device().type == "cuda"
    assert capsys.readouterr().out.count("computes in fp32 on a GPU") == 1
    assert switched == [False, False]
    with pytest.raises(InputError, match="from PyTorch 1.10 on, bf16 or fp16"):
        make_config(precision="fp16")


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 knows no mps")
def test_mps_is_taken_by_name_and_said_to_be_untested(monkeypatch, capsys):
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    monkeypatch.setattr(runtime, "_told", set())
    assert runtime.pick_device("mps").type == "mps"
    assert "never tested" in capsys.readouterr().out
    assert runtime.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 has no fp16 products on a CPU")
@pytest.mark.parametrize("first", [2.0 ** 10, 2.0 ** 40])
def test_fp16_learns_what_fp32_does_and_repeats_steps_that_overflow(tiny_bert, capsys, monkeypatch,
                                                                    first):
    settings = dict(QUICK, model=tiny_bert, clip_norm=0.5)
    expected = helpers.train(TEXTS, LABELS, **settings)["history"]
    capsys.readouterr()
    true_scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind: true_scaler(kind, init_scale=first))
    history = helpers.train(TEXTS, LABELS, **dict(settings, precision="fp16"))["history"]
    said = capsys.readouterr().out
    assert ("overflow in fp16; the step is skipped" in said) == (first > 2 ** 30)
    assert [row["step"] for row in history] == [row["step"] for row in expected], "not counted"
    for key, tolerance in (("loss", 5e-3), ("grad_norm", 5e-2)):  # the norm before clipping
        assert [row[key] for row in history] == pytest.approx(
            [row[key] for row in expected], rel=tolerance, abs=tolerance), key
    assert [row["loss"] for row in history] != [row["loss"] for row in expected], "computed in fp16"


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 has no fp16 products on a CPU")
def test_fp16_goes_on_with_its_scale_and_ends_where_the_gradient_itself_is_infinite(
        tiny_bert, monkeypatch, capsys):
    scales, true_record = [], helpers.run.Run.record

    def record(run, *args):
        true_record(run, *args)
        scales.append(run.scaler.factor)
        if len(scales) == 4:
            raise KeyboardInterrupt

    true_scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind: true_scaler(
        kind, init_scale=4.0, growth_interval=2))
    monkeypatch.setattr(helpers.run.Run, "record", record)
    settings = dict(QUICK, model=tiny_bert, precision="fp16")
    with pytest.raises(KeyboardInterrupt):
        helpers.train(TEXTS, LABELS, **settings)
    helpers.train(TEXTS, LABELS, **settings)
    assert scales[:5] == [4.0, 8.0, 8.0, 16.0, 16.0], "it doubles, and a resumed run keeps it"
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    with pytest.raises(helpers.Diverged, match="gradient norm inf at step 1"):
        helpers.train(TEXTS, LABELS, **dict(settings, seed=1))  # after halving 4, 2, 1
    assert capsys.readouterr().out.count("the step is skipped") == 2


# ---- what else differs on a GPU -------------------------------------------------------------------

@pytest.mark.parametrize("message", [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "CUDA out of memory. Tried to allocate 2 GiB"])
def test_what_is_out_of_memory(message):
    assert runtime.out_of_memory(RuntimeError(message))
    assert not runtime.out_of_memory(RuntimeError("CUDNN_STATUS_NOT_SUPPORTED"))


def test_other_gpus_keep_their_random_numbers(monkeypatch):
    forked, seeded = [], []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    for device in ("cpu", "cuda:1"):
        runtime.kept_random_state(device)
    assert forked == [[], [1]]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    runtime.seed_device(5, torch.device("cuda:1"))
    first = torch.rand(3)
    runtime.seed_device(5, CPU)
    assert seeded == [5] and torch.equal(first, torch.rand(3))


def test_large_checkpoints_are_rare(monkeypatch, tiny_bert):
    """The next one comes after 60 s, or 20 times what the last one took."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(helpers.run.time, "time", lambda: clock.now)
    saved, true_after = [], helpers.run.Run.after_step

    def after_step(run):
        clock.now += 20
        true_after(run)

    def save_checkpoint(*args):
        saved.append(clock.now)
        clock.now += 10  # seconds that it takes
    monkeypatch.setattr(helpers.run.Run, "after_step", after_step)
    monkeypatch.setattr(helpers.run, "save_checkpoint", save_checkpoint)
    helpers.train(TEXTS, LABELS, model=tiny_bert, **dict(QUICK, epochs=8))
    waits = [b - a - 10 for a, b in zip(saved, saved[1:])]
    assert saved[0] - 1000 == 80 and waits and set(waits) == {220}, waits


def test_as_many_reviews_as_fit_go_through_a_gpu_at_once():
    """Padded, on a GPU that computes 4,096 tokens while a pass is queued: it takes so long at least.

    Against what was done before: 8 reviews at most, 1,024 tokens as the price of a pass.
    """
    def time_of(lengths, *limits):
        return sum(max(len(batch) * lengths[batch[0]], gpu.FLOOR)
                   for batch in micro_batches(lengths, *limits))

    limits = micro_limits(dataclasses.replace(make_config(), precision="bf16"), GPU)
    steps = [long_tailed(32, seed) for seed in range(40)]
    gains = [time_of(one, 8, 8 * 512, 1024) / time_of(one, *limits) for one in steps]
    print(f"a step takes 1 / {np.mean(gains):.2f} of the time")
    assert np.mean(gains) > 1.4
