"""What a result is served for: this very model, config.json and tokenizer, and nothing by name.

Names of trials, of runs and of pretrained folders, the table of tokens; and a table of every entry
of config.json that changes what BERT computes.
"""
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import types

import pytest
import torch
from tools import TODAY, fill, made_up_reviews, make_part, rewrite, weights_of

import checkpoints
import files
import helpers
import studies
from checkpoints import BERT_SETTINGS
from files import InputError
from helpers import load_bert, make_config, named_settings, settings

TRAIN, DEV = make_part(16), make_part(10, 3)
SMALL = dict(seq_len=16, epochs=1, batch_size=8, accumulation=1, keep="head", device="cpu")


def write(name, entries):
    return lambda folder: files.save_json(os.path.join(folder, name), entries)


def shift_vocabulary(folder):
    """Move every token after the special ones by a line; the last becomes the first."""
    path = os.path.join(folder, "vocab.txt")
    with open(path, encoding="utf-8") as file:
        words = file.read().split("\n")[:-1]
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(word + "\n" for word in words[:5] + words[-1:] + words[5:-1])


def other_weights(folder):
    rewrite(folder, state={key: value * 1.5 if "query" in key else value
                           for key, value in weights_of(folder).items()})


CHANGES = {  # in the model's folder, each of which gives other results
    "heads": lambda folder: rewrite(folder, num_attention_heads=1),
    "activation": lambda folder: rewrite(folder, hidden_act="relu"),
    "epsilon": lambda folder: rewrite(folder, layer_norm_eps=1e-3),
    "vocabulary": shift_vocabulary, "weights": other_weights,
    "chinese": write("tokenizer_config.json", {"tokenize_chinese_chars": False}),
    "special token": write("tokenizer_config.json", {"cls_token": "great"}),
    "unknown": write("tokenizer_config.json", {"unk_token": "a"}),
    **({"accents": write("tokenizer_config.json", {"strip_accents": False})} if TODAY else {})}
SAME = {  # each of which changes nothing
    "dropout": lambda folder: rewrite(folder, hidden_dropout_prob=0.7, classifier_dropout=0.5,
                                      attention_probs_dropout_prob=0.6),
    "labels": lambda folder: rewrite(folder, num_labels=5,
                                     id2label={str(i): str(i) for i in range(5)}),
    "names": lambda folder: rewrite(folder, transformers_version="9", _name_or_path="x", dtype=None,
                                    architectures=["Any"], initializer_range=0.5, use_cache=False),
    "limit": write("tokenizer_config.json", {"model_max_length": 64, "max_len": 64})}


def names(folder):
    """Return what a trial, a run, a pretraining of a model and its tables of tokens are named."""
    config = make_config(model=folder, **SMALL)
    return [studies.trial_key(config, TRAIN, DEV),
            *(helpers.start(config, head, [b"x"])[2] for head in ("classifier", "mlm")),
            checkpoints.tokenizer_digest(load_bert(folder)[1])]


def test_whatever_load_bert_reads_is_in_every_name(folder, tmp_path):
    found = {"first": names(folder)}
    for name, change in CHANGES.items():
        copy = str(tmp_path / "kept")
        os.rename(folder, copy)
        shutil.copytree(copy, folder)  # under the same name
        change(folder)
        found[name] = names(folder)
        shutil.rmtree(folder)
        os.rename(copy, folder)
    for place in range(3):
        assert len({each[place] for each in found.values()}) == len(found), place
    tokenizers = {name: each[3] for name, each in found.items()}
    alike = {name for name, one in tokenizers.items() if one == tokenizers["first"]}
    assert alike == {"first", "heads", "activation", "epsilon", "weights"}
    assert names(folder) == found["first"]


def test_what_changes_nothing_is_in_no_name(folder):
    first = names(folder)
    for name, change in SAME.items():
        change(folder)
        assert names(folder) == first, name


def test_a_call_leaves_no_trace_in_a_tokenizers_digest(folder):
    tokenizer = load_bert(folder)[1]
    before = checkpoints.tokenizer_digest(tokenizer)
    tokenizer.max_len = 16
    if TODAY:
        tokenizer("great film", truncation=True, max_length=4, padding="max_length")
    assert checkpoints.tokenizer_digest(tokenizer) == before


@pytest.mark.parametrize("name", ["heads", "vocabulary", "chinese"])
def test_a_corrected_folder_is_trained_anew(name, folder, cache, tmp_path, monkeypatch):
    """In one process, under one name: a wrong folder's rows are never the right one's."""
    shutil.copytree(folder, str(tmp_path / "right"))
    CHANGES[name](folder)
    grid, texts = [dict(SMALL, model=folder, lr=1e-2)], made_up_reviews(20)[0]
    part = TRAIN._replace(texts=["\u96fb\u5f71 " + text for text in TRAIN.texts])
    wrong = studies.run_trials(grid, part, DEV, str(tmp_path / "store"))
    pretrained = helpers.pretrain(texts, model=folder, **SMALL)
    shutil.rmtree(folder)
    shutil.copytree(str(tmp_path / "right"), folder)
    right = studies.run_trials(grid, part, DEV, str(tmp_path / "store"))
    fresh = studies.run_trials(grid, part, DEV, str(tmp_path / "fresh"))
    assert right[0]["metrics"] == fresh[0]["metrics"] != wrong[0]["metrics"]
    assert helpers.pretrain(texts, model=folder, **SMALL)["path"] != pretrained["path"]


def test_weights_are_loaded_once_while_no_file_changes(folder, monkeypatch):
    calls, load = [], helpers.load_bert
    monkeypatch.setattr(helpers, "load_bert", lambda *args: calls.append(args) or load(*args))
    config = make_config(model=folder, **SMALL)
    keys = [studies.trial_key(config, TRAIN, DEV) for _ in range(3)]
    assert len(set(keys)) == 1 and len(calls) == 1
    other_weights(folder)
    assert studies.trial_key(config, TRAIN, DEV) not in keys and len(calls) == 2


def test_a_model_that_is_replaced_during_a_trial_leaves_no_row(folder, tmp_path, monkeypatch,
                                                              capsys):
    train, runs = helpers.train, []

    def replaced(*args, **kwargs):
        runs.append(1)
        params = train(*args, **kwargs)
        if len(runs) == 1:
            other_weights(folder)
        return params

    grid = [dict(SMALL, model=folder, lr=1e-2)]
    monkeypatch.setattr(helpers, "train", replaced)
    row, = studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "store"))
    assert len(runs) == 2 and "was replaced during a trial" in capsys.readouterr().out
    monkeypatch.setattr(helpers, "train", train)
    fresh, = studies.run_trials(grid, TRAIN, DEV, str(tmp_path / "fresh"))
    assert row["metrics"] == fresh["metrics"]
    assert len(list((tmp_path / "store").glob("*.json"))) == 1


def test_a_model_of_the_hub_is_known_by_its_revision(folder, tmp_path, monkeypatch):
    """Two revisions of a name in the cache; which of them counts is refs/main's to say."""
    hub = types.ModuleType("hub")
    hub.try_to_load_from_cache = lambda name, file: os.path.join(str(tmp_path / main[-1]), file)
    monkeypatch.setitem(sys.modules, "transformers.utils.hub", hub)
    load, loaded, origins, main = helpers.load_bert, [], [], []
    for revision in "one", "two":
        shutil.copytree(folder, str(tmp_path / revision))
    other_weights(str(tmp_path / "two"))
    monkeypatch.setattr(helpers, "load_bert", lambda name, *args: loaded.append(main[-1]) or load(
        str(tmp_path / main[-1]), *args))
    for revision in "one", "one", "two", "two", "one":
        main.append(revision)
        origins.append(studies.origin_of("some/bert"))
    assert loaded == ["one", "two"] and origins[0] == origins[1] == origins[4]
    assert origins[2] == origins[3] != origins[0]


# ---- tokens ------------------------------------------------------------------------------------

def test_tokenizers_that_split_otherwise_share_no_table(folder, cache, reviews):
    texts, tables = reviews[0], set()
    for entries in ({}, {"tokenize_chinese_chars": False}, {"unk_token": "a"}):
        write("tokenizer_config.json", entries)(folder)
        tokenizer = load_bert(folder)[1]
        tokens = helpers.tokenize_all(texts, tokenizer)
        for i, text in enumerate(texts):
            ids, _, mask, _ = helpers.vectorize_ex(text, None, 512, tokenizer)
            assert helpers.add_special_tokens(tokens[i], 512, "head", tokenizer) == ids[:sum(mask)], text
        tables.add(json.dumps([tokens[i] for i in range(len(texts))]))
    assert len(tables) == len(list((cache / "tokens").iterdir())) == 3


@pytest.mark.parametrize("name", ["chinese", "special token", "unknown", *["accents"] * TODAY])
def test_pretraining_keeps_the_tokenizer(name, folder, cache, reviews):
    CHANGES[name](folder)
    note = helpers.pretrain(made_up_reviews(20)[0], model=folder, **SMALL)
    one, two = (load_bert(path)[1] for path in (folder, note["path"]))
    assert checkpoints.tokenizer_digest(one) == checkpoints.tokenizer_digest(two)
    for text in reviews[0]:
        assert helpers.vectorize_ex(text, None, 64, one) == helpers.vectorize_ex(
            text, None, 64, two), text
    assert checkpoints.read_note(note["path"])
    os.remove(os.path.join(note["path"], "tokenizer_config.json"))
    assert checkpoints.read_note(note["path"]) is None, "half a model"


# ---- settings ----------------------------------------------------------------------------------

def test_the_precision_that_was_used_is_named_unless_it_is_fp32(tiny_bert, monkeypatch):
    def key(**overrides):
        return studies.trial_key(make_config(model=tiny_bert, **dict(SMALL, **overrides)), TRAIN,
                                 DEV)

    plain = key()
    assert "precision" not in settings(make_config(device="cpu"))
    assert plain == key(precision="fp32") == key(precision="auto")
    if not TODAY:
        return
    assert plain != key(precision="bf16")
    for able in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)  # noqa: B023
        used = "bf16" if able else "fp16"  # which GPUs of before 2020 multiply in
        for device in ("", "cuda", "cuda:1"):
            assert settings(make_config(device=device)).get("precision", "fp32") == used
            assert key(device=device) == key(precision=used)
            assert key(device=device, precision="fp32") == plain
        assert key(device="cpu") == plain


def test_a_hyperparameter_that_comes_later_renames_nothing(tiny_bert, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Later(helpers.Config):
        newer: float = 0.5

    def key(**overrides):
        return studies.trial_key(make_config(model=tiny_bert, **SMALL, **overrides), TRAIN, DEV)

    assert set(settings(make_config())) - set(helpers.NAMED) == {
        "freeze", "pooling", "views"}, "newer than the names"
    assert "freeze" not in named_settings(make_config())
    before = key()
    monkeypatch.setattr(helpers, "Config", Later)
    assert make_config().newer == 0.5 and key() == before
    assert key(newer=0.5) == before != key(newer=0.25)
    assert settings(make_config(newer=0.5))["newer"] == 0.5, "a row says it all the same"
    assert "newer" not in named_settings(make_config())


def test_a_trial_from_a_pretraining_is_named_by_the_pretrainings_key(tiny_bert, cache, tmp_path):
    def key(path):
        return studies.trial_key(make_config(model=path, **SMALL), TRAIN, DEV)

    texts = made_up_reviews(20)[0]
    note = helpers.pretrain(texts, model=tiny_bert, **SMALL)
    assert note["key"] == os.path.basename(note["path"])
    model, tokenizer = load_bert(note["path"], "mlm")
    again = str(tmp_path / "again")  # as another machine makes it: other last digits
    checkpoints.save_bert(again, fill(model, 3), tokenizer, {"key": note["key"]})
    assert key(again) == key(note["path"]) != key(tiny_bert)
    other = helpers.pretrain(texts, model=tiny_bert, **dict(SMALL, seed=1))
    assert key(other["path"]) != key(note["path"])
    rewrite(again, state={k: v * 2 for k, v in weights_of(again).items()})  # by other hands
    assert key(again) not in (key(note["path"]), key(tiny_bert))
    assert os.path.isdir(again), "naming a trial moves no folder"


# ---- config.json -------------------------------------------------------------------------------

def sources():
    """Return the text of the library's BERT, and the class whose __init__ a loading runs."""
    name = "transformers.models.bert.modeling_bert" if TODAY else "transformers.modeling_bert"
    module = importlib.import_module(name)
    return [inspect.getsource(getattr(module, each)) for each in dir(module)
            if each.startswith("Bert") and hasattr(module, each) and inspect.isclass(
                getattr(module, each)) and not re.search("Config|Lm|LMHead|Question|Token|Multiple"
                                                         "|Next|Output$", each)]


def test_every_entry_that_the_librarys_bert_reads_is_in_the_table():
    known = {key for group in BERT_SETTINGS.values() for key in group}
    read = {key for text in sources() for key in re.findall(r"config\.([a-z_]\w*)", text)}
    assert {"hidden_act", "num_attention_heads", "hidden_size"} < read
    assert read - known <= set(), read - known


OTHERS = {"model_type": "roberta", "position_embedding_type": "relative_key",
          "tie_word_embeddings": False, "pruned_heads": {"0": [1]},
          "quantization_config": {"load_in_8bit": True},
          "per_layer_config": {"0": {"num_attention_heads": 1}}}


@pytest.mark.parametrize("key", BERT_SETTINGS["only"])
def test_what_cannot_be_followed_is_refused(key, folder):
    allowed = BERT_SETTINGS["only"][key]
    for value in (None, allowed):
        rewrite(folder, **{key: value})
        load_bert(folder)
    value = OTHERS.get(key, True)
    rewrite(folder, **{key: value})
    for head in ("classifier", "mlm"):
        with pytest.raises(InputError) as caught:
            load_bert(folder, head)
        said = str(caught.value)
        assert f"config.json says {key}: {json.dumps(value)}; only {json.dumps(allowed)}" in said
        assert "give a BERT" in said and "\n" not in said


LEFT_OUT = {"classifier_dropout": [0.5], "chunk_size_feed_forward": [3, 16], "dtype": ["bfloat16"],
            "torch_dtype": ["float16"], "pad_token_id": [5, None, 5000],
            "attn_implementation": ["flash_attention_2"], "problem_type": ["regression", "x"],
            "_attn_implementation": ["flash_attention_2"], "return_dict": [False],
            "initializer_range": [0.9]}


@pytest.mark.parametrize("key", BERT_SETTINGS["left out"])
def test_what_is_left_out_changes_nothing(key, folder, tiny_bert):
    ids = torch.tensor([[2, 50, 60, 3]])
    for value in LEFT_OUT.get(key, [True]):
        rewrite(folder, **{key: value})
        for head in ("classifier", "mlm"):
            one, two = (load_bert(path, head, dropout=0.25)[0] for path in (tiny_bert, folder))
            assert torch.equal(one(ids)[0], two(ids)[0]) and len(one(ids)) == len(two(ids))
            assert [m.p for m in one.modules() if isinstance(m, torch.nn.Dropout)] == [
                m.p for m in two.modules() if isinstance(m, torch.nn.Dropout)]
            assert checkpoints.model_digest(*load_bert(folder)) == checkpoints.model_digest(
                *load_bert(tiny_bert))


@pytest.mark.parametrize("value", ["foo", ["gelu"], None, 3])
def test_an_activation_that_is_not_there_is_named(value, folder):
    rewrite(folder, hidden_act=value)
    with pytest.raises(InputError, match="hidden_act: .* has gelu.*relu"):
        load_bert(folder)


def test_layers_that_config_json_leaves_out_are_not_dropped(folder):
    rewrite(folder, num_hidden_layers=1)
    for head in ("classifier", "mlm"):
        with pytest.raises(InputError, match="16 tensors that its config.json has no place for"):
            load_bert(folder, head)


def test_weights_without_prefix_get_the_same_new_head_every_time(folder):
    rewrite(folder, state={key[5:]: value for key, value in weights_of(folder).items()
                           if key.startswith("bert.")})
    digests = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        digests.append(checkpoints.model_digest(*load_bert(folder, "mlm")))
    assert digests[0] == digests[1]


# ---- embeddings with spare rows ----------------------------------------------------------------

def pad_embeddings(folder, rows):
    """Give a model more embeddings than tokens, as is done for the speed of tensor cores."""
    state = weights_of(folder)
    for key, value in state.items():
        if value.dim() and len(value) == 214:
            state[key] = torch.cat([value, torch.full_like(value[:1], 9.).expand(
                rows - 214, *value.shape[1:])])
    return rewrite(folder, state=state, vocab_size=rows)


@pytest.mark.parametrize("rows", [216, 256])
def test_padded_embeddings_are_accepted_and_the_spare_rows_left_out(rows, folder, tiny_bert, cache,
                                                                   tmp_path, capsys):
    pad_embeddings(folder, rows)
    ids = torch.tensor([[2, 50, 60, 3]])
    for head in ("classifier", "mlm"):
        (one, _), (two, _) = (load_bert(path, head) for path in (tiny_bert, folder))
        assert torch.equal(one(ids)[0], two(ids)[0]), head
        assert [p.shape for p in one.parameters()] == [p.shape for p in two.parameters()]
        assert f"Warning: model {folder!r}: its embeddings have {rows} rows for 214" in \
            capsys.readouterr().out
    assert two.cls.predictions.decoder.weight is two.bert.embeddings.word_embeddings.weight
    assert checkpoints.model_digest(*load_bert(folder)) == checkpoints.model_digest(*load_bert(tiny_bert))
    texts = made_up_reviews(20)[0]
    note = helpers.pretrain(texts, model=folder, **SMALL)
    assert note["loss_before"] == helpers.pretrain(texts, model=tiny_bert, **SMALL)["loss_before"]
    capsys.readouterr()
    assert load_bert(note["path"], "mlm")[0].config.vocab_size == 214
    assert "Warning" not in capsys.readouterr().out


@pytest.mark.parametrize("rows", [215, 344])
def test_other_spare_rows_are_refused(rows, folder):
    pad_embeddings(folder, rows)
    with pytest.raises(InputError, match=f"has 214 entries, its embeddings {rows}"):
        load_bert(folder)
