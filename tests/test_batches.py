"""The order of the reviews, micro-batches of like length, and their labels."""
import math
import os
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import helpers
from helpers import (
    classifier_batches,
    make_config,
    micro_batches,
    micro_limits,
    pad,
    sample_of_step,
    tokenize_all,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LENGTHS = st.lists(st.integers(2, 512), min_size=1, max_size=80)


@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 4), st.integers(0, 3))
def test_an_epoch_takes_every_review_once(n, batch_size, epoch, data_seed):
    per_epoch = math.ceil(n / batch_size)
    steps = [sample_of_step(n, batch_size, epoch * per_epoch + step, data_seed)
             for step in range(per_epoch)]
    assert sorted(i for step in steps for i in step) == list(range(n))
    assert all(len(step) == batch_size for step in steps[:-1]) and steps[-1]


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return [i for step in range(10) for i in sample_of_step(100, 10, epoch * 10 + step, seed)]

    torch.manual_seed(1)
    before = order(0, 0), order(0, 1), order(1, 0)
    torch.manual_seed(2)
    backwards = [sample_of_step(100, 10, step, 0) for step in reversed(range(20))][::-1]
    assert [i for step in backwards for i in step] == before[0] + before[1]
    assert len({tuple(o) for o in before} | {tuple(range(100))}) == 4
    assert before[0][:10] == ORDER  # the same on both stacks


ORDER = [79, 42, 47, 61, 49, 35, 63, 31, 28, 24]


@given(LENGTHS, st.integers(1, 40), st.integers(1, 4000))
def test_micro_batches_split_within_their_limits(lengths, max_count, max_tokens):
    batches = micro_batches(lengths, max_count, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_count
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= max_tokens
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(flat, reverse=True)  # the longest first


def cheapest(lengths, max_count, max_tokens, launch, floor):
    """Return the least cost of a split, by trying all of them."""
    ordered = sorted(lengths, reverse=True)
    if not ordered:
        return 0
    return min(max(n * ordered[0], floor) + launch
               + cheapest(ordered[n:], max_count, max_tokens, launch, floor)
               for n in range(1, min(len(ordered), max_count) + 1)
               if n == 1 or n * ordered[0] <= max_tokens)


@given(st.lists(st.integers(2, 40), max_size=9), st.integers(1, 10), st.integers(1, 200),
       st.integers(0, 60), st.integers(0, 200))
def test_no_split_is_cheaper(lengths, max_count, max_tokens, launch, floor):
    batches = micro_batches(lengths, max_count, max_tokens, launch, floor)
    cost = sum(max(len(batch) * max(lengths[i] for i in batch), floor) + launch
               for batch in batches)
    assert cost == cheapest(lengths, max_count, max_tokens, launch, floor)


def test_micro_batches_by_hand():
    assert micro_batches([5, 9, 5, 1], 4, 100) == [[1], [0, 2], [3]]  # nothing is padded
    assert micro_batches([5, 9, 5, 1], 2, 100, 8) == [[1, 0], [2, 3]]
    assert micro_batches([5, 9, 5, 1], 9, 10, 8) == [[1], [0, 2], [3]]
    assert micro_batches([5, 9, 5, 1], 9, 100, 0, 100) == [[1, 0, 2, 3]]  # a GPU: one takes as long
    assert micro_batches([], 2, 100) == []


@given(LENGTHS, st.data())
def test_a_full_step_is_split_into_accumulation_parts_at_least(lengths, data):
    accumulation = data.draw(st.integers(1, len(lengths)))
    config = make_config(batch_size=len(lengths), accumulation=accumulation, seq_len=512)
    batches = micro_batches(lengths, *micro_limits(config, CPU))
    assert len(batches) >= accumulation
    assert max(map(len, batches)) <= len(lengths) // accumulation


@given(st.integers(1, 64), st.integers(1, 64), st.integers(3, 512),
       st.sampled_from(["auto", "fp32"] + ["bf16", "fp16"] * hasattr(torch, "autocast")))
def test_limits_bound_the_memory(batch_size, accumulation, seq_len, precision):
    config = make_config(batch_size=batch_size, accumulation=accumulation, seq_len=seq_len,
                         precision=precision)
    count, tokens, *_ = micro_limits(config, CPU)
    assert 1 <= count <= max(1, batch_size / accumulation)
    of_a_core = {"bf16": 2048, "fp16": 2048}.get(precision, 1024)
    assert tokens == min(count * seq_len, of_a_core)
    # A GPU takes what it is given, until memory runs out: `accumulation` bounds nothing there.
    assert micro_limits(config, GPU)[:3] == (batch_size, batch_size * seq_len, 0)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6))
def test_padding(rows):
    batch = pad(rows, 0)
    longest = max(map(len, rows))
    assert batch["input_ids"].tolist() == [row + [0] * (longest - len(row)) for row in rows]
    assert batch["attention_mask"].tolist() == [
        [1] * len(row) + [0] * (longest - len(row)) for row in rows]
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.fixture(scope="module")
def labelled(tokenizer):
    """Reviews of 1..40 tokens of which every one says its own number, with a label by number."""
    texts = [" ".join(["good"] * (i * 7 % 40) + [str(i // 26), "abcdefghijklmnopqrstuvwxyz"[i % 26]])
             for i in range(60)]
    tokens = tokenize_all(texts, tokenizer)
    return tokens, [int(i * i % 7 < 3) for i in range(60)]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(3, 60), st.sampled_from(
    ["head", "tail", "head+tail"]), st.integers(0, 2))
def test_every_review_keeps_its_label(tokenizer, labelled, batch_size, accumulation, seq_len, keep,
                                      data_seed):
    tokens, label_ids = labelled
    config = make_config(batch_size=batch_size, accumulation=accumulation, seq_len=seq_len,
                         keep=keep, data_seed=data_seed)
    batches = classifier_batches(tokens, label_ids, config, tokenizer, CPU)
    for step in range(math.ceil(60 / batch_size)):
        got = Counter()
        for batch in batches(step):
            for ids, mask, label in zip(*(batch[key].tolist() for key in (
                    "input_ids", "attention_mask", "labels"))):
                got[tuple(ids[:sum(mask)]), label] += 1
        expected = Counter(
            (tuple(helpers.add_special_tokens(tokens[i], seq_len, keep, tokenizer)), label_ids[i])
            for i in sample_of_step(60, batch_size, step, data_seed))
        assert got == expected


def test_little_is_padded(sample, tokenizer):
    texts = helpers.read_lines(os.path.join(sample, "train.texts"))
    tokens = tokenize_all(texts, tokenizer)
    config = make_config(batch_size=16, accumulation=2)
    batches = classifier_batches(tokens, [0] * len(texts), config, tokenizer, CPU)
    masks = [batch["attention_mask"] for step in range(30)
             for batch in batches(step)]
    real, all_of_it = (sum(float(value) for value in values) for values in (
        [mask.sum() for mask in masks], [mask.numel() for mask in masks]))
    share = 1 - real / all_of_it
    print(f"padding: {share:.1%} of the positions")
    assert share < 0.08
