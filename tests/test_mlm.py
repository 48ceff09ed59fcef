"""Masked LM: masks, windows, its loss, and the pretrained folder that `train` starts from."""
import json
import math
import os
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tools import fill, made_up_reviews

import helpers
import runtime
from checkpoints import weights_digest
from files import InputError
from helpers import (
    IGNORE,
    distinct_texts,
    load_bert,
    make_config,
    mask_tokens,
    masked_batches,
    mlm_loss,
    pretrain,
    tokenize_all,
    train,
    windows_of,
)

CPU = torch.device("cpu")
TEXTS = list(dict.fromkeys(made_up_reviews(60, length=30)[0]))
QUICK = dict(seq_len=32, batch_size=16, accumulation=2, epochs=2, lr=1e-3, device="cpu")
TUNING = dict(seq_len=32, batch_size=8, accumulation=1, epochs=1, lr=1e-3, device="cpu")


@pytest.fixture
def cache(cache, monkeypatch):
    monkeypatch.setattr(helpers.run, "EVALUATIONS", 4)
    return cache


def state_of(folder):
    return torch.load(os.path.join(folder, "pytorch_model.bin"))


# ---- masks -------------------------------------------------------------------------------------

def near(count, n, share):
    """Say whether a count is within 4 standard errors of a binomial's mean."""
    return abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))


def test_masking_statistics():
    n, vocabulary = 10 ** 6, 1000
    ids = torch.randint(5, vocabulary, (1000, 1000), generator=runtime.generator(1))
    maskable = torch.rand(ids.shape, generator=runtime.generator(2)) < 0.9
    corrupted, labels = mask_tokens(ids, maskable, 4, vocabulary, runtime.generator(3))
    chosen = labels != IGNORE
    assert not bool((chosen & ~maskable).any())
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    assert labels.dtype == corrupted.dtype == torch.int64
    of_them = int(chosen.sum())
    assert near(of_them, int(maskable.sum()), 0.15) and int(maskable.sum()) > 0.89 * n
    masked = corrupted[chosen] == 4
    same = corrupted[chosen] == ids[chosen]
    other = corrupted[chosen][~masked & ~same]
    assert near(int(masked.sum()), of_them, 0.8 + 0.1 / vocabulary)
    assert near(int(same.sum()), of_them, 0.1 + 0.1 / vocabulary)
    assert near(len(other), of_them, 0.1 * (1 - 2 / vocabulary))
    assert abs(float(other.float().mean()) - vocabulary / 2) < 4 * vocabulary / math.sqrt(
        12 * len(other))  # any token of the vocabulary
    by_column = chosen.float().sum(0) / maskable.float().sum(0)
    assert 0.1 < float(by_column.min()) and float(by_column.max()) < 0.2  # anywhere in a text


def test_whole_words_are_masked_whole():
    ids = torch.randint(5, 1000, (500, 400), generator=runtime.generator(1))
    continues = torch.rand(ids.shape, generator=runtime.generator(2)) < 0.4
    continues[:, 0] = False
    corrupted, labels = mask_tokens(ids, torch.ones_like(continues), 4, 1000, runtime.generator(3),
                                    continues)
    chosen = labels != IGNORE
    assert torch.equal(chosen[:, 1:][continues[:, 1:]], chosen[:, :-1][continues[:, 1:]])
    starts = ~continues
    assert near(int(chosen[starts].sum()), int(starts.sum()), 0.15)
    assert torch.equal(labels[chosen], ids[chosen])
    assert near(int((corrupted[chosen] == 4).sum()), int(chosen.sum()), 0.8)


def test_without_whole_word_neighbours_are_independent():
    ids = torch.full((500, 400), 7, dtype=torch.int64)
    chosen = mask_tokens(ids, torch.ones(500, 400).bool(), 4, 1000, runtime.generator(3))[1] == 7
    both = int((chosen[:, 1:] & chosen[:, :-1]).sum())
    assert near(both, 500 * 399, 0.15 ** 2)


@pytest.fixture(scope="module")
def batches_of(tokenizer):
    """Return a function that gives the micro-batches of some texts."""
    def made(texts, seed=0, **overrides):
        config = make_config(**dict(QUICK, **overrides))
        tokens = tokenize_all(texts, tokenizer)
        windows = windows_of(tokens.lengths, config.seq_len - 2)
        return masked_batches(tokens, tokenizer, config, CPU)(windows, runtime.generator(seed))
    return made


@pytest.mark.parametrize("whole_word", [False, True])
def test_special_pieces_are_never_masked(tokenizer, batches_of, whole_word):
    texts = ["[SEP] good [CLS] film [PAD] [UNK] \u4e2d \U0001f600 unlovely"] * 300 + TEXTS
    count = 0
    for batch in batches_of(texts, whole_word=whole_word, batch_size=64):
        chosen = batch["labels"] != IGNORE
        count += int(chosen.sum())
        assert not set(batch["labels"][chosen].tolist()) & set(tokenizer.all_special_ids)
        assert not bool((chosen & (batch["attention_mask"] == 0)).any())
        assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert count > 100


def test_whole_words_by_the_vocabulary(tokenizer, batches_of):
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    seen = 0
    for batch in batches_of(["unlovelyness greatestness xyzzy"] * 200, whole_word=True):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist()):
            for j in range(2, len(ids)):
                token = tokens[labels[j] if labels[j] != IGNORE else ids[j]]
                if token.startswith("##") and labels[j] != IGNORE:
                    assert labels[j - 1] != IGNORE
                    seen += 1
    assert seen > 100


def test_masks_are_fresh_in_each_epoch(cache, tiny_bert, monkeypatch):
    seen, seeds, real = {}, set(), helpers.mask_tokens

    def spy(input_ids, *args):
        seeds.add(args[3].initial_seed())
        corrupted, labels = real(input_ids, *args)
        for row, chosen in zip(input_ids.tolist(), (labels != IGNORE).tolist()):
            seen.setdefault(tuple(i for i in row if i), []).append(tuple(chosen[:10]))
        return corrupted, labels

    monkeypatch.setattr(helpers, "mask_tokens", spy)
    note = pretrain(TEXTS, model=tiny_bert, **dict(QUICK, epochs=3))
    assert len(seeds) == 1 + 3 * math.ceil(note["n_windows"] / 16)  # held-out texts and each step
    several = [masks for masks in seen.values() if len(masks) == 3]
    assert len(several) > 50
    assert sum(len(set(masks)) == 3 for masks in several) > 0.5 * len(several)


# ---- windows -----------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 700), max_size=20), st.integers(1, 130))
def test_windows_cover_everything(lengths, size):
    windows = windows_of(lengths, size)
    covered = [[] for _ in lengths]
    for i, start, end in windows:
        assert 0 < end - start <= size
        covered[i] += range(start, end)
    assert covered == [list(range(n)) for n in lengths]  # in order, none twice
    for i, n in enumerate(lengths):
        sizes = [end - start for j, start, end in windows if j == i]
        assert len(sizes) == math.ceil(n / size)
        assert not sizes or max(sizes) - min(sizes) <= 1


def test_windows_reach_the_batches_whole(tokenizer, batches_of):
    tokens = tokenize_all(TEXTS, tokenizer)
    expected = sorted(i for n in range(len(TEXTS)) for i in tokens[n])
    found = []
    for batch in batches_of(TEXTS):
        original = torch.where(batch["labels"] != IGNORE, batch["labels"], batch["input_ids"])
        assert original.shape[1] <= 32
        found += [i for i in original.view(-1).tolist() if i not in (0, 2, 3)]
    assert sorted(found) == [i for i in expected if i not in (0, 2, 3)]


def test_texts_of_any_shape():
    flat = ["one", "two", "three"]
    for texts in (flat, tuple(flat), iter(flat), [["one"], ["two", "three"]], (t for t in [flat]),
                  [("one", "two"), iter(["three"])], ["one", ["two"], "three"],
                  ["one", "", " \t\n", "two", "one", "three", "two"], [[], flat, flat]):
        assert distinct_texts(texts) == flat


@pytest.mark.parametrize("texts", [[], ["one"], [[], ["one", "one"]], ["", " "], ["one", "\n"]])
def test_too_few_texts(cache, texts):
    with pytest.raises(InputError, match="[01] different non-blank texts"):
        pretrain(texts, model="/no/such/model")


def test_texts_that_hold_no_tokens(cache, tiny_bert):
    with pytest.raises(InputError, match="no tokens"):
        pretrain(["\u200b", "\u200b\u200b"], model=tiny_bert, **QUICK)


# ---- loss --------------------------------------------------------------------------------------

def test_the_loss_is_the_slow_one(tiny_bert, batches_of):
    model = fill(load_bert(tiny_bert, "mlm", 0.0, 0.0)[0], seed=2)
    batches = batches_of(TEXTS)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            for ids, mask, labels in zip(*(batch[k] for k in ("input_ids", "attention_mask",
                                                              "labels"))):
                logits = model(ids[None, :int(mask.sum())])[0][0]
                for j, label in enumerate(labels.tolist()):
                    if label != IGNORE:
                        total -= float(torch.log_softmax(logits[j].double(), 0)[label])
                        count += 1
    assert count == helpers.count_targets(batches) > 100
    model.train()
    assert mlm_loss(model, batches, CPU) == pytest.approx(total / count, abs=1e-5)
    assert model.training


def test_uneven_masks_accumulate_as_one_big_batch(tiny_bert, batches_of):
    model = fill(load_bert(tiny_bert, "mlm", 0.0, 0.0)[0], seed=2)
    window = [batch for batch in batches_of(TEXTS, accumulation=8)
              if int((batch["labels"] != IGNORE).sum())][:20]
    counts = [int((batch["labels"] != IGNORE).sum()) for batch in window]
    assert len(set(counts)) > 3
    losses = []
    for batch in window:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
        losses.append(F.cross_entropy(logits.reshape(-1, logits.shape[-1]),
                                      batch["labels"].reshape(-1), reduction="sum",
                                      ignore_index=IGNORE))
    (sum(losses) / sum(counts)).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for batch in window:
        (helpers.summed_loss(helpers.mlm_forward, model, batch, CPU)
         / helpers.count_targets(window)).backward()
    for name, p in model.named_parameters():
        if p.grad is not None and name in expected:
            largest = max(1.0, float(expected[name].abs().max()))
            assert float((p.grad - expected[name]).abs().max()) < 1e-6 * largest, name


def test_short_texts_in_small_micro_batches(cache, tiny_bert):
    """Most of these have no masked token at all."""
    texts = [f"good {word}" for text in TEXTS for word in text.split()]
    note = pretrain(texts, model=tiny_bert, **dict(QUICK, accumulation=16))
    assert note["n_texts"] == len(set(texts)) and math.isfinite(note["loss_after"])


@pytest.mark.parametrize("texts", [["good", "bad", "film", "plot", "story"], ["a film", "a plot"]])
def test_a_loss_of_no_masked_piece_is_not_measured(cache, tiny_bert, texts, monkeypatch):
    """Five words, a held-out text of one: no token of it is masked, which is not a loss of 0."""
    one_by_one, logged = dict(QUICK, batch_size=1, accumulation=1), []
    writer = types.SimpleNamespace(add_scalar=lambda key, value, step: logged.append(float(value)),
                                   close=lambda: None)
    monkeypatch.setattr(helpers.run, "open_writer", lambda log_dir: writer)
    note = pretrain(texts, model=tiny_bert, **one_by_one)
    assert logged and note["loss_before"] is None and note["loss_after"] is None
    line = helpers.describe(note)
    assert "held-out loss not measured: no token of the held-out texts is masked" in line
    assert "perplexity" not in line and "0.000" not in line and "\n" not in line
    assert all(row["held_out_loss"] is None for row in note["curve"])
    with open(os.path.join(note["path"], "history.json")) as file:
        history = json.loads(file.read(), parse_constant=pytest.fail)  # no NaN
    steps = [row for row in history if row["step"]]
    assert steps and all((row["loss"] is None) == (row["targets"] == 0) for row in steps)
    assert any(row["loss"] is None for row in steps), "the case that this is about"
    again = pretrain(texts, model=tiny_bert, **one_by_one)
    assert again == note and "not measured" in helpers.held_out_loss(again)
    made_up, labels = made_up_reviews(8)
    train(made_up, labels, note, **TUNING)


# ---- pretrain ----------------------------------------------------------------------------------

def test_what_pretraining_changes_and_keeps(cache, tiny_bert):
    note = pretrain(TEXTS, model=tiny_bert, weight_decay=0.1, **QUICK)
    before, after = state_of(tiny_bert), state_of(note["path"])
    assert {key for key in before if "position_ids" not in key} <= set(after)
    for key, value in before.items():
        if "pooler" in key or "seq_relationship" in key or "position_ids" in key:
            assert torch.equal(after[key], value), key
        elif value.dim() > 1 and "position" not in key:
            assert not torch.equal(after[key], value), key
    assert torch.equal(after["cls.predictions.decoder.weight"],
                       after["bert.embeddings.word_embeddings.weight"])


def test_what_it_returns(cache, tiny_bert):
    note = pretrain(TEXTS + TEXTS[:5] + [""], parts=["train", "train_unlabeled"], model=tiny_bert,
                    **dict(QUICK, epochs=4))
    assert note is not None and json.loads(json.dumps(note)) == note
    assert pickle.loads(pickle.dumps(note)) == note and len(pickle.dumps(note)) < 100000
    assert note["parts"] == ["train", "train_unlabeled"]
    assert (note["n_texts"], note["n_held_out"]) == (len(TEXTS), len(TEXTS) // 10)
    assert note["loss_after"] < note["loss_before"] - 0.1  # it learns
    assert note["curve"][0]["step"] == 0 and note["minutes"] > 0
    assert note["curve"][-1]["held_out_loss"] == note["loss_after"]
    with open(os.path.join(note["path"], "history.json")) as file:
        history = json.load(file)
    assert [row for row in history if "held_out_loss" in row] == note["curve"]
    assert not list(cache.glob("pretrained/*.checkpoint"))
    line = helpers.describe(note)
    assert f"{len(TEXTS)} texts of train, train_unlabeled" in line and "\n" not in line
    assert "perplexity %.1f" % math.exp(note["loss_before"]) in line


def test_held_out_texts_are_not_trained_on(cache, tiny_bert, monkeypatch):
    trained, real = set(), helpers.fit

    def spy(model, batches, n_steps, *args, **kwargs):
        for step in range(n_steps):
            for batch in batches(step):
                original = torch.where(batch["labels"] != IGNORE, batch["labels"],
                                       batch["input_ids"])
                trained.update(tuple(i for i in row if i) for row in original.tolist())
        return real(model, batches, n_steps, *args, **kwargs)

    monkeypatch.setattr(helpers, "fit", spy)
    note = pretrain(TEXTS, model=tiny_bert, **QUICK)
    tokenizer = load_bert(tiny_bert)[1]
    tokens = tokenize_all(TEXTS, tokenizer)
    windows = [(i, tuple(helpers.add_special_tokens(tokens[i][start:end], 32, "head", tokenizer)))
               for i, start, end in windows_of(tokens.lengths, 30)]
    left_out = {i for i, window in windows if window not in trained}
    assert len(left_out) == note["n_held_out"]
    assert trained == {window for i, window in windows if i not in left_out}
    assert note["n_windows"] == len([i for i, _ in windows if i not in left_out])


def test_training_starts_from_the_pretrained_weights(cache, tiny_bert, capsys):
    texts, labels = made_up_reviews(40)
    note = pickle.loads(pickle.dumps(pretrain(TEXTS, ["train"], model=tiny_bert, **QUICK)))
    capsys.readouterr()
    after = train(texts, labels, note, model=tiny_bert, **TUNING)
    assert "training starts from MLM pretraining on" in capsys.readouterr().out
    by_hand = train(texts, labels, model=note["path"], **TUNING)
    without = train(texts, labels, model=tiny_bert, **TUNING)
    assert weights_digest(after["model"]) == weights_digest(by_hand["model"])
    assert weights_digest(after["model"]) != weights_digest(without["model"])
    assert after["history"][0]["loss"] == by_hand["history"][0]["loss"]
    assert after["history"][0]["loss"] != without["history"][0]["loss"]
    assert after["pretrained"] == note and without["pretrained"] is None


@pytest.mark.parametrize("wrong", ["a folder", {}, [1], {"path": "/no/such/folder"}])
def test_other_pretrain_params_are_refused(cache, tiny_bert, wrong):
    with pytest.raises(InputError, match="pretrain") as caught:
        train(["good", "bad"], ["pos", "neg"], wrong, model=tiny_bert, **TUNING)
    assert "\n" not in str(caught.value)


def test_a_second_call_finds_the_first(cache, tiny_bert, monkeypatch):
    first = pretrain(TEXTS, ["train"], model=tiny_bert, **QUICK)

    def refuse(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(helpers, "fit", refuse)
    again = pretrain([TEXTS[:7], iter(TEXTS[7:]), TEXTS[:3]], ["other"], model=tiny_bert, **QUICK)
    assert dict(again, parts=0) == dict(first, parts=0) and again["parts"] == ["other"]
    for texts, overrides in ((TEXTS[1:], {}), (TEXTS, {"lr": 2e-3}), (TEXTS, {"whole_word": True}),
                             (TEXTS, {"data_seed": 1}), (TEXTS[::-1], {})):
        with pytest.raises(AssertionError):
            pretrain(texts, model=tiny_bert, **dict(QUICK, **overrides))


def test_overrides_reach_it(cache, tiny_bert, monkeypatch):
    seen, real = [], helpers.fit

    def spy(model, batches, n_steps, per_epoch, forward, config, *args, **kwargs):
        seen.append((config, n_steps, max(batch["input_ids"].shape[1] for batch in batches(0))))
        return real(model, batches, n_steps, per_epoch, forward, config, *args, **kwargs)

    monkeypatch.setattr(helpers, "fit", spy)
    note = pretrain(TEXTS, model=tiny_bert, seq_len=32, device="cpu")
    config, n_steps, longest = seen[0]
    assert (config.seq_len, config.lr, config.batch_size, config.epochs) == (32, 5e-5, 32, 2)
    assert (config.optimizer, config.weight_decay) == ("adamw", 0.01) and 25 < longest <= 32
    assert n_steps == 2 * math.ceil(note["n_windows"] / 32)
    assert note["config"]["seq_len"] == 32
    with pytest.raises(InputError, match="seqlen"):
        pretrain(TEXTS, model=tiny_bert, seqlen=32)


SPOILS = [(name, how) for name in ("pytorch_model.bin", "note.json", "config.json", "vocab.txt")
          for how in ("flip", "truncate", "remove")]


@pytest.mark.parametrize("name,how", SPOILS)
def test_a_damaged_folder_is_set_aside_and_done_again(cache, tiny_bert, capsys, name, how):
    first = pretrain(TEXTS, model=tiny_bert, **QUICK)
    sound = state_of(first["path"])
    path = os.path.join(first["path"], name)
    with open(path, "rb") as file:
        whole = file.read()
    at = len(whole) // 3
    with open(path, "wb") as file:
        file.write(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:] if how == "flip"
                   else whole[:len(whole) // 2])
    if how == "remove":
        os.remove(path)
    with pytest.raises(InputError, match="call pretrain again"):
        train(["good", "bad"], ["pos", "neg"], first, model=tiny_bert, **TUNING)
    again = pretrain(TEXTS, model=tiny_bert, **QUICK)
    said = capsys.readouterr().out
    assert "found: not repeated" not in said and said.count("is damaged") == 1
    assert again["path"] == first["path"] and again["loss_after"] == first["loss_after"]
    assert os.path.isdir(first["path"] + ".damaged")
    assert all(torch.equal(value, sound[key]) for key, value in state_of(again["path"]).items())


# ---- the head alone ----------------------------------------------------------------------------

def test_with_a_frozen_encoder_the_head_alone_learns(cache, tiny_bert, monkeypatch):
    trained, real = [], helpers.make_optimizer

    def spy(model, config):
        optimizer = real(model, config)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        trained.extend(names[id(parameter)] for group in optimizer.param_groups
                       for parameter in group["params"])
        return optimizer

    monkeypatch.setattr(helpers, "make_optimizer", spy)
    before = {key: value.clone() for key, value in load_bert(tiny_bert, "mlm")[0].state_dict().items()}
    note = pretrain(TEXTS, model=tiny_bert, freeze=True, **QUICK)
    after = state_of(note["path"])
    assert set(after) == set(before)
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    head = ["bias", "transform.dense.weight", "transform.dense.bias", "transform.LayerNorm.weight",
            "transform.LayerNorm.bias"]
    assert sorted(trained) == sorted("cls.predictions." + name for name in head)
    # today's stack stores the head's bias a second time, as the output layer's
    assert changed - {"cls.predictions.decoder.bias"} == set(trained)
    assert note["loss_after"] < note["loss_before"] - 0.01 and note["config"]["freeze"] is True
    model = load_bert(note["path"], "mlm")[0]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pretraining_of_all_goes_on_from_the_frozen_one(cache, tiny_bert):
    frozen = pretrain(TEXTS, model=tiny_bert, freeze=True, **QUICK)
    whole = pretrain(TEXTS, model=frozen["path"], **QUICK)
    assert whole["path"] != frozen["path"]
    assert whole["loss_before"] == pytest.approx(frozen["loss_after"], abs=1e-5)
    assert whole["loss_after"] < whole["loss_before"]
    before, after = state_of(frozen["path"]), state_of(whole["path"])
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(before[name], after[name])


def test_freezing_is_part_of_the_name_where_it_is_used(cache, tiny_bert):
    key = pretrain(TEXTS, model=tiny_bert, **QUICK)["key"]
    assert pretrain(TEXTS, model=tiny_bert, freeze=False, **QUICK)["key"] == key
    assert pretrain(TEXTS, model=tiny_bert, freeze=True, **QUICK)["key"] != key


def test_a_step_of_a_frozen_encoder_may_have_no_target(cache, tiny_bert, monkeypatch):
    real = helpers.mask_tokens

    def rarely(*args):  # every other call masks nothing
        corrupted, labels = real(*args)
        rarely.calls += 1
        return corrupted, labels if rarely.calls % 2 else torch.full_like(labels, IGNORE)

    rarely.calls = 0
    monkeypatch.setattr(helpers, "mask_tokens", rarely)
    note = pretrain(TEXTS, model=tiny_bert, freeze=True, **QUICK)
    with open(os.path.join(note["path"], "history.json")) as file:
        assert [row["step"] for row in json.load(file) if row.get("loss", 0) is None]


def test_settings_of_the_other_phase_are_refused(cache, tiny_bert):
    with pytest.raises(InputError, match="whole_word=True: for pretrain only"):
        helpers.train(["good", "bad"], ["pos", "neg"], model=tiny_bert, whole_word=True)
    with pytest.raises(InputError, match="pooling='mean': for train only"):
        pretrain(TEXTS, model=tiny_bert, pooling="mean")
    with pytest.raises(InputError, match="views=True: for classifying only"):
        pretrain(TEXTS, model=tiny_bert, views=True)


def test_a_classifier_cannot_freeze(cache, tiny_bert):
    with pytest.raises(InputError, match="freeze=True: for pretrain only") as caught:
        train(["good", "bad"], ["pos", "neg"], freeze=True, model=tiny_bert, **TUNING)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("freeze", [False, True])
def test_interrupted_pretraining_goes_on_bit_for_bit(cache, tiny_bert, monkeypatch, capsys, freeze):
    undisturbed = pretrain(TEXTS, model=tiny_bert, freeze=freeze, **QUICK)
    expected = state_of(undisturbed["path"])
    with open(os.path.join(undisturbed["path"], "history.json")) as file:
        history = json.load(file)
    monkeypatch.setenv("FILIMDB_CACHE", str(cache / "second"))
    for name, calls in (("sample_of_step", 4), ("mlm_loss", 2), ("mlm_loss", 1),
                        ("sample_of_step", 2)):
        real, count = getattr(helpers, name), [0]

        def interrupted(*args, **kwargs):
            count[0] += 1
            if count[0] == calls:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(helpers, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                pretrain(TEXTS, model=tiny_bert, freeze=freeze, **QUICK)
    capsys.readouterr()
    resumed = pretrain(TEXTS, model=tiny_bert, freeze=freeze, **QUICK)
    assert "resuming from the checkpoint at step" in capsys.readouterr().out
    assert resumed["path"] != undisturbed["path"]
    for key, value in state_of(resumed["path"]).items():
        assert torch.equal(value, expected[key]), key
    with open(os.path.join(resumed["path"], "history.json")) as file:
        again = json.load(file)
    for one, two in zip(history, again):
        assert dict(one, seconds=0) == dict(two, seconds=0)
    assert len(history) == len(again)


def test_whoever_calls_keeps_their_random_stream(cache, tiny_bert):
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state().clone()
        note = pretrain(TEXTS, model=tiny_bert, **dict(QUICK, max_minutes=1000.0 + seed, warmup=0.5))
        assert torch.equal(torch.get_rng_state(), before)
        found.append(note["loss_after"])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_pretrained_folder_is_read_by_the_library(cache, tiny_bert):
    from transformers import BertForPreTraining
    note = pretrain(TEXTS, model=tiny_bert, **QUICK)
    model = BertForPreTraining.from_pretrained(note["path"])
    assert weights_digest(model) == weights_digest(load_bert(note["path"], "mlm")[0])
