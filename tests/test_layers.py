"""A CPU's own layers: linear and GELU in one operation, a masked-LM head's gradients apart."""
import shutil
import types

import pytest
import torch
import torch.nn.functional as F
from tools import TODAY, rewrite

import cpu
import helpers

CPU = torch.device("cpu")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return cpu.GeluLinear(24, 70)


def plain(layer, x):
    return F.gelu(F.linear(x, layer.weight, layer.bias))


@pytest.fixture
def asked(monkeypatch):
    """Every call of the private operator."""
    calls, operator = [], cpu.fused_gelu()

    def spy(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(cpu, "fused_gelu", lambda: spy)
    monkeypatch.setattr(cpu._switch, "product", "oneDNN")
    return calls


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 has no such operator")
@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 7, 24), (1, 512, 24), (0, 24)])
def test_the_private_operator_is_what_it_is_taken_for(layer, asked, shape):
    assert cpu.fused_gelu() is not None
    x = torch.randn(shape) * 2
    with torch.inference_mode():
        given = layer(x)
    assert len(asked) == 1 and given.shape == shape[:-1] + (70,)
    assert torch.allclose(given, plain(layer, x), atol=1e-6)


def operators(work):
    return types.SimpleNamespace(mkldnn=types.SimpleNamespace(_linear_pointwise=work))


def not_built(*args):
    raise RuntimeError("_linear_pointwise: ATen not compiled with MKLDNN support")


@pytest.mark.parametrize("ops", [
    types.SimpleNamespace(), types.SimpleNamespace(mkldnn=types.SimpleNamespace()),
    operators(lambda x, w, b: x), operators(lambda x, w, b, *rest: F.linear(x, w, b)),
    operators(not_built)])
def test_any_other_operator_is_done_without(monkeypatch, layer, ops):
    cpu.fused_gelu.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "ops", ops)
            assert cpu.fused_gelu() is None
            patch.setattr(cpu._switch, "product", "oneDNN")
            x = torch.randn(3, 24)
            with torch.no_grad():
                assert torch.equal(layer(x), plain(layer, x))
    finally:
        cpu.fused_gelu.cache_clear()


@pytest.mark.skipif(not TODAY, reason="PyTorch 1.3 has no autocast")
def test_where_it_learns_or_rounds_it_is_pytorchs_own(layer, asked):
    x = torch.randn(3, 24, requires_grad=True)
    grads = torch.autograd.grad(layer(x).sum(), [x, layer.weight, layer.bias])
    wanted = torch.autograd.grad(plain(layer, x).sum(), [x, layer.weight, layer.bias])
    assert all(torch.equal(*pair) for pair in zip(grads, wanted))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.no_grad():
        assert layer.double()(x.double()).dtype == torch.float64
    assert not asked


@pytest.mark.parametrize("product", ["default", ""])
def test_with_the_default_product_it_is_pytorchs_own(layer, asked, monkeypatch, product):
    monkeypatch.setattr(cpu._switch, "product", product)
    x = torch.randn(3, 24)
    with torch.no_grad():
        assert torch.equal(layer(x), plain(layer, x)) and not asked


@pytest.mark.skipif(not TODAY, reason="transformers 2.1 keeps its own layers")
def test_loaded_models_use_it_and_are_the_same(tiny_bert, asked):
    model, _ = helpers.load_bert(tiny_bert)
    ids = torch.randint(5, 90, (3, 11))
    wanted = model(ids)[0]
    assert not asked
    with torch.inference_mode():
        given = model(ids)[0]
    assert len(asked) == model.config.num_hidden_layers
    assert torch.allclose(given, wanted, atol=1e-5)


@pytest.mark.skipif(not TODAY, reason="transformers 2.1 keeps its own layers")
def test_another_activation_is_left_alone(tiny_bert, tmp_path, asked):
    folder = shutil.copytree(tiny_bert, str(tmp_path / "relu"))
    model, _ = helpers.load_bert(rewrite(folder, hidden_act="relu"))
    with torch.inference_mode():
        model(torch.randint(5, 90, (3, 11)))
    assert not asked and not any(isinstance(m, cpu.GeluLinear) for m in model.modules())


# ---- masked LM: the head's gradients apart from those of the embeddings --------------------------

def masked_micro_batches():
    rows = [[2, *range(10, 10 + n), 3] for n in (30, 20, 9, 7, 5)]
    made = [helpers.pad([row, row[::-1]], 0) for row in rows]
    return [dict(batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] % 3 > 0, -100))
            for batch in made]


def test_a_tied_head_gets_the_gradients_of_one_large_batch(tiny_bert):
    model, _ = helpers.load_bert(tiny_bert, "mlm")
    words, decoder = model.bert.embeddings.word_embeddings, model.cls.predictions.decoder
    window, seen = masked_micro_batches(), []
    n_targets = helpers.count_targets(window)
    loss = sum(helpers.summed_loss(helpers.mlm_forward, model, batch, CPU) for batch in window)
    (loss / n_targets).backward()
    wanted = [p.grad for p in model.parameters()]
    helpers.clear_gradients(model)

    def forward(model, batch):
        seen.append((decoder.weight is words.weight, decoder.weight.data_ptr(), words.sparse))
        return helpers.mlm_forward(model, batch)

    for factor in (1, 2):  # what was there already is added to
        helpers.accumulate(model, window, n_targets, forward)
        for parameter, grad in zip(model.parameters(), wanted):
            if grad is None:
                assert parameter.grad is None
            else:
                assert not parameter.grad.is_sparse
                assert torch.allclose(parameter.grad, factor * grad, atol=1e-6)
    assert set(seen) == {(False, words.weight.data_ptr(), True)}
    assert decoder.weight is words.weight and not words.sparse


def test_an_error_leaves_the_head_tied(tiny_bert):
    model, _ = helpers.load_bert(tiny_bert, "mlm")
    with pytest.raises(KeyError), cpu.sparse_embeddings(model, CPU):
        assert model.cls.predictions.decoder.weight is not model.bert.embeddings.word_embeddings.weight
        raise KeyError
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


def test_a_frozen_encoders_matrix_gets_no_gradient(tiny_bert):
    model, _ = helpers.load_bert(tiny_bert, "mlm")
    helpers.freeze_encoder(model)
    window = masked_micro_batches()
    helpers.accumulate(model, window, helpers.count_targets(window), helpers.mlm_forward)
    assert model.bert.embeddings.word_embeddings.weight.grad is None
    assert model.cls.predictions.transform.dense.weight.grad is not None
    assert not model.cls.predictions.decoder.weight.requires_grad
