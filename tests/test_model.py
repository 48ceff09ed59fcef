"""Loading BERT: what a checkpoint lacks, and that padding moves no logit by 1e-5.

What is refused stands in test_bad_input.py.
"""
import json
import os

import pytest
import torch
import transformers
from tools import encoder_only, fill, make_tiny_bert, rewrite, weights_of
from transformers import BertConfig, BertForPreTraining, BertForSequenceClassification

import checkpoints
import files
import runtime
from checkpoints import save_bert, weights_digest
from files import InputError
from helpers import load_bert, pad

# ---- what is loaded ----------------------------------------------------------------------------

def test_the_new_head_is_drawn_by_the_seed(tiny_bert):
    head = load_bert(tiny_bert)[0].classifier
    assert head.weight.shape == (2, 32) and head.bias.tolist() == [0, 0]
    assert head.weight.view(-1)[[0, 1, 31, 32, 63]].tolist() == pytest.approx(HEAD, abs=1e-6)
    assert 0.015 < float(head.weight.std()) < 0.025
    torch.manual_seed(3)
    again, other = (load_bert(tiny_bert, seed=seed)[0].classifier.weight for seed in (0, 1))
    assert torch.equal(head.weight, again) and not torch.equal(head.weight, other)


HEAD = [0.0323108025, 0.0130808223, -0.0210589003, 0.0374655202, -0.0195698179]


def test_an_evaluating_float32_model_on_the_cpu(tiny_bert):
    for head in ("classifier", "mlm"):
        model = load_bert(tiny_bert, head)[0]
        assert not any(module.training for module in model.modules())
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.float32, "cpu")}


@pytest.mark.parametrize("head", ["classifier", "mlm"])
def test_dropout_is_set_where_it_acts(tiny_bert, head):
    model = load_bert(tiny_bert, head, dropout=0.25, attention_dropout=0.375)[0]
    found = {name: module.p for name, module in model.named_modules()
             if isinstance(module, torch.nn.Dropout)}
    attention = {name for name in found if name.endswith("attention.self.dropout")}
    assert len(attention) == 2 and len(found) == 2 * 3 + 1 + (head == "classifier")
    assert all(p == (0.375 if name in attention else 0.25) for name, p in found.items())


def test_dropout_acts(tiny_bert):
    """On either stack a training pass differs from the next one, unless both are 0."""
    ids = torch.tensor([[2, 50, 60, 70, 3]])
    for dropout, attention in ((0.5, 0.0), (0.0, 0.5), (0.0, 0.0)):
        model = load_bert(tiny_bert, "classifier", dropout, attention)[0].train()
        one, two = (model(ids)[0] for _ in range(2))
        assert torch.equal(one, two) == (dropout == attention == 0)


@pytest.mark.parametrize("head", ["classifier", "mlm"])
def test_weights_are_the_folders(tiny_bert, head):
    model, state = load_bert(tiny_bert, head)[0].state_dict(), weights_of(tiny_bert)
    shared = [key for key in model if key in state]
    assert len(shared) >= 39 and all(torch.equal(model[key], state[key]) for key in shared)
    lacking = {key for key in model if key not in state and "position_ids" not in key}
    assert lacking <= ({"classifier.weight", "classifier.bias"} if head == "classifier" else set())


def test_saving_and_loading_keeps_every_bit(tiny_bert, tmp_path):
    model, tokenizer = load_bert(tiny_bert, "mlm")
    fill(model, seed=5)
    save_bert(str(tmp_path / "saved"), model, tokenizer, {"n": 1})
    back, tokenizer_back = load_bert(str(tmp_path / "saved"), "mlm")
    for (name, one), (other, two) in zip(model.named_parameters(), back.named_parameters()):
        assert name == other and torch.equal(one, two)
    assert weights_digest(back) == weights_digest(model) != weights_digest(
        load_bert(tiny_bert, "mlm")[0])
    ids = list(range(len(tokenizer)))
    assert tokenizer.convert_ids_to_tokens(ids) == tokenizer_back.convert_ids_to_tokens(ids)
    with open(str(tmp_path / "saved" / "note.json")) as file:
        note = json.load(file)
    sealed = {"n": 1, "sha256": files.file_digest(str(tmp_path / "saved" / "pytorch_model.bin"))}
    assert note == dict(sealed, checksum=checkpoints.seal(str(tmp_path / "saved"), sealed))
    assert os.listdir(str(tmp_path)) == ["saved"]


def test_a_folder_is_saved_whole_or_not_at_all(tiny_bert, tmp_path, monkeypatch):
    model, tokenizer = load_bert(tiny_bert, "mlm")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(files.InputError, match="saved: cannot be written .No space"):
        save_bert(str(tmp_path / "saved"), model, tokenizer, {})
    assert os.listdir(str(tmp_path)) == []


def test_the_mlm_decoder_is_tied(tiny_bert, folder):
    for path in (tiny_bert, encoder_only(folder)):
        model = load_bert(path, "mlm")[0]
        embeddings = model.bert.embeddings.word_embeddings.weight
        assert model.cls.predictions.decoder.weight.data_ptr() == embeddings.data_ptr()
        assert torch.equal(embeddings, weights_of(tiny_bert)[
            "bert.embeddings.word_embeddings.weight"])


def test_a_checkpoint_without_mlm_head_gets_a_fresh_one(folder):
    encoder_only(folder)
    one, again, other = (load_bert(folder, "mlm", seed=seed)[0].cls.predictions for seed in (0, 0, 1))
    dense = one.transform.dense
    assert 0.015 < float(dense.weight.std()) < 0.025 and float(dense.bias.abs().max()) == 0
    assert one.transform.LayerNorm.weight.tolist() == [1] * 32 and float(one.bias.abs().max()) == 0
    assert torch.equal(dense.weight, again.transform.dense.weight)
    assert not torch.equal(dense.weight, other.transform.dense.weight)
    assert dense.weight.view(-1)[:3].tolist() == pytest.approx(TRANSFORM, abs=1e-6)


TRANSFORM = [0.0323108025, 0.0130808223, -0.0177038312]


@pytest.mark.parametrize("head", ["classifier", "mlm"])
def test_a_checkpoint_without_pooler_gets_a_fresh_one(folder, head):
    encoder_only(folder, "bert.pooler")
    one, again, other = (load_bert(folder, head, seed=seed)[0].bert.pooler.dense
                         for seed in (0, 0, 1))
    assert 0.015 < float(one.weight.std()) < 0.025 and float(one.bias.abs().max()) == 0
    assert torch.equal(one.weight, again.weight) and not torch.equal(one.weight, other.weight)


def test_keys_without_prefix(folder, tiny_bert):
    """A saved BertModel has no `bert.` before its keys."""
    rewrite(folder, state={key[5:]: value for key, value in weights_of(folder).items()
                           if key.startswith("bert.")})
    one, two = (load_bert(path)[0] for path in (folder, tiny_bert))
    assert weights_digest(one) == weights_digest(two)


def test_a_fine_tuned_checkpoint_gets_a_new_head(folder, tiny_bert):
    config = BertConfig.from_pretrained(folder)
    config.num_labels = 5
    model = fill(BertForSequenceClassification(config), seed=7)
    rewrite(folder, state=model.state_dict(), architectures=["BertForSequenceClassification"],
            num_labels=5, id2label={str(i): f"LABEL_{i}" for i in range(5)},
            label2id={f"LABEL_{i}": i for i in range(5)})
    loaded = load_bert(folder)[0]
    assert torch.equal(loaded.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert torch.equal(loaded.classifier.weight, load_bert(tiny_bert)[0].classifier.weight)
    assert loaded(torch.tensor([[2, 50, 3]]))[0].shape == (1, 2)
    assert load_bert(folder, num_labels=3)[0](torch.tensor([[2, 50, 3]]))[0].shape == (1, 3)


def test_half_precision_is_loaded_as_float32(folder, tiny_bert):
    rewrite(folder, dtype="float16", torch_dtype="float16",
            state={key: value.half() for key, value in weights_of(folder).items()})
    for head in ("classifier", "mlm"):
        model, whole = (load_bert(path, head)[0] for path in (folder, tiny_bert))
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {b.dtype for b in model.buffers()} <= {torch.int64, torch.float32}
        for (name, one), (_, two) in zip(model.named_parameters(), whole.named_parameters()):
            rounded = two.half().float() if name.startswith(("bert", "cls")) else two
            same = torch.equal(one, rounded)  # apart: PyTorch 1.3 crashes on printing half tensors
            assert same, name


def test_transformers_log_is_as_before(tiny_bert):
    import logging
    logger = logging.getLogger("transformers")
    before = logger.level
    load_bert(tiny_bert)
    with pytest.raises(InputError):
        load_bert("/no/such")
    assert logger.level == before


# ---- padding -----------------------------------------------------------------------------------

def test_padding_changes_no_prediction_but_for_the_mask(tiny_bert):
    model, tokenizer = load_bert(tiny_bert)
    fill(model, seed=1)
    rows = [[2, *range(20, 20 + n), 3] for n in (0, 1, 5, 9)]
    alone = torch.cat([model(torch.tensor([row]))[0] for row in rows])
    for longest in (11, 40, 200, 512):
        batch = pad([*rows, [2] * longest], tokenizer.pad_token_id)
        together = model(**batch)[0][:-1]
        assert float((together - alone).abs().max()) < 1e-5
        unmasked = model(batch["input_ids"])[0][:-1]
        assert float((unmasked - alone).abs().max()) > 1e-2


def test_the_logits_are_the_librarys(tiny_bert):
    """The encoder was put into the classifier by hand: compare with transformers' own assembly."""
    model, _ = load_bert(tiny_bert)
    whole = BertForSequenceClassification(model.config)
    whole.load_state_dict(model.state_dict())
    ids = torch.tensor([[2, 50, 60, 3], [2, 70, 80, 3]])
    assert torch.equal(model(ids)[0], whole.eval()(ids)[0])
    mlm, _ = load_bert(tiny_bert, "mlm")
    library = BertForPreTraining.from_pretrained(tiny_bert).eval()
    assert float((mlm(ids)[0] - library(ids)[0]).abs().max()) == 0
    assert transformers.__version__ == runtime.VERSIONS["transformers"]


def test_two_folders_of_a_seed_are_the_same(tiny_bert, tmp_path):
    one = make_tiny_bert(tmp_path / "one")
    assert weights_digest(load_bert(one)[0]) == weights_digest(load_bert(tiny_bert)[0]) == WEIGHTS


WEIGHTS = "420d11f7bb1a573d321c00c28085bae93b95d5e21730af29bc32484b2992a3e1"
