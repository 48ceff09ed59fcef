"""The attention for a CPU: dropout as PyTorch does it, and without dropout the library's own."""
import pytest
import torch
import torch.nn.functional as F
from tools import ROOT, TODAY

import checkpoints
import cpu
import helpers

pytestmark = pytest.mark.skipif(not TODAY, reason="transformers 2.1 keeps its own attention")
SAMPLE = str(ROOT / "data" / "sample" / "bert")


def tensors(batch=3, heads=2, seq=40, size=8):
    random = torch.Generator().manual_seed(1)
    made = [torch.randn(batch, heads, seq, size, generator=random).requires_grad_()
            for _ in range(3)]
    mask = torch.ones(batch, 1, seq, seq, dtype=torch.bool)
    mask[1:2, :, :, 30:] = False
    mask[2:3, :, :, 7:] = False
    return made, mask


def slow_attention(query, key, value, mask, keep, dropped, scaling):
    """Attend to all at once, the mask of dropout given: the definition."""
    scores = query @ key.transpose(2, 3) * scaling
    weights = F.softmax(scores.masked_fill(~mask, float("-inf")), -1)
    return (weights * keep / (1 - dropped) @ value).transpose(1, 2)


@pytest.mark.parametrize("cached", [1, 3 * 40 ** 2, 2 ** 18])
def test_output_and_gradients_equal_the_definition(monkeypatch, cached):
    made, mask = tensors()
    keep, asked = cpu.keep_mask((3 * 2, 40, 40), round(65536 * 0.3), 1), []

    def given(shape, cut, seed):
        assert cut == round(65536 * 0.3)
        asked.append(shape[0])
        return keep[seed[1]:seed[1] + shape[0]].numpy() > 0

    monkeypatch.setattr(cpu, "CACHED", cached)
    monkeypatch.setattr(cpu, "kept_positions", given)
    ours = cpu.cpu_attention(None, *made, mask, dropout=0.3, scaling=0.35)[0]
    chunks = {1: 6, 3 * 40 ** 2: 2, 2 ** 18: 1}[cached]
    assert sum(asked) == 6 and len(asked) == chunks
    wanted = slow_attention(*made, mask, keep.view(3, 2, 40, 40), 19661 / 65536,
                            0.35)
    assert ours.shape == wanted.shape == (3, 40, 2, 8)
    assert torch.allclose(ours, wanted, atol=1e-6)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), made),
                    torch.autograd.grad((wanted * weight).sum(), made)):
        assert torch.allclose(a, b, atol=1e-5)
    assert len(asked) == chunks, "what is dropped is drawn once"


def test_what_is_dropped_stays_what_it_was():
    """Another draw would change every training's losses: then RESULTS_VERSION has to rise."""
    mask = cpu.keep_mask((3, 5, 7), 6554, [11, 2])
    assert mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask.view(-1) == 0).nonzero().view(-1).tolist() == [14, 26, 38, 56, 59, 62, 63, 64, 78, 89, 94, 99]
    assert torch.equal(mask, torch.from_numpy(cpu.kept_positions((3, 5, 7), 6554, [11, 2])).float())


def test_gradients_are_those_of_finite_differences():
    made, mask = tensors(batch=1, heads=1, seq=5, size=3)
    torch.manual_seed(6)
    ours = cpu.cpu_attention(None, *made, None, dropout=0.4, scaling=0.5)[0]
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(7))
    grads = torch.autograd.grad((ours * weight).sum(), made)
    for tensor, grad in zip(made, grads):
        for i in range(0, 15, 4):
            values = []
            for step in (1e-2, -1e-2):
                moved = [x.detach().clone() for x in made]
                moved[[x is tensor for x in made].index(True)].view(-1)[i] += step
                torch.manual_seed(6)
                out = cpu.cpu_attention(None, *moved, None, dropout=0.4, scaling=0.5)[0]
                values.append(float((out * weight).sum()))
            assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(grad.view(-1)[i]), abs=2e-3)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same(monkeypatch, kind):
    made, mask = tensors()
    made = [x.detach().to(kind).requires_grad_() for x in made]
    monkeypatch.setattr(cpu, "CACHED", 1)  # a chunk for each head of each review
    outcomes, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        out = cpu.cpu_attention(None, *made, mask, dropout=0.1, scaling=1.0)[0]
        assert torch.get_num_threads() == threads
        outcomes.append([out, *torch.autograd.grad(out.pow(2).sum(), made)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*outcomes))


def test_each_alone_keeps_the_order_and_holds_little(two_threads):
    begun, device = [], torch.device("cpu")

    def work(i):
        begun.append(i)
        if i == 12:
            raise ValueError("no")
        return i * i

    results = cpu.parallel_map(work, iter(range(10)), device)
    assert next(results) == 0 and max(begun) <= 3 - 1  # two threads and one more
    assert list(results) == [i * i for i in range(1, 10)]
    with pytest.raises(ValueError):
        list(cpu.parallel_map(work, range(11, 1000), device))
    assert len(begun) < 20 and list(cpu.parallel_map(work, [], device)) == []


def test_no_mask_is_a_mask_of_ones():
    made, mask = tensors()
    outcomes = []
    for some in (None, torch.ones_like(mask)):
        torch.manual_seed(3)
        outcomes.append(cpu.cpu_attention(None, *made, some, dropout=0.1, scaling=1.0)[0])
    assert torch.equal(*outcomes)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_positions_are_dropped_with_the_given_probability(p):
    lost = 1 - cpu.keep_mask((1000, 1000), round(65536 * p), 4)
    five_sigma = 5 * (p * (1 - p) / 1e6) ** 0.5
    assert abs(float(lost.mean()) - p) < five_sigma
    for lane in range(4):  # the four that come from one random number
        assert abs(float(lost.view(-1)[lane::4].mean()) - p) < 2 * five_sigma
    for shift in (1, 2, 3, 4, 1000):  # neighbours are independent of each other
        both = float((lost.view(-1)[shift:] * lost.view(-1)[:-shift]).mean())
        assert abs(both - p * p) < five_sigma


def test_dropout_leaves_the_mean_of_the_output():
    made, mask = tensors(seq=12)
    mask = mask[:, :, :12, :12] | True
    torch.manual_seed(5)
    with torch.no_grad():
        many = torch.stack([cpu.cpu_attention(None, *made, mask, dropout=0.2, scaling=0.35)[0]
                            for _ in range(4000)])
        exact = cpu.cpu_attention(None, *made, mask, dropout=0.0, scaling=0.35,
                                      is_causal=False)[0]
    error = (many.mean(0) - exact) / (many.std(0) / 4000 ** 0.5)
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize("kind, least, most", [  # rounding what comes out alone: 0.0026, 0.0003
    (torch.bfloat16, 0.003, 0.012), (torch.float16, 0.0001, 0.0004)])
def test_under_autocast_it_computes_in_bf16_or_in_fp32(kind, least, most):
    """Against fp32 on the same rounded numbers and dropout: fp16 goes in and out alone."""
    made, mask = tensors()
    made[1].data[1, :, 30:] += 1e3  # padding that would drown all else
    outcomes = []
    for work in (kind, torch.float32):
        leaves = [x.detach().to(kind).to(work).requires_grad_() for x in made]
        torch.manual_seed(4)
        with torch.autocast("cpu", dtype=kind):
            out = cpu.cpu_attention(None, *leaves, mask, dropout=0.1, scaling=0.35)[0]
        assert out.dtype == work
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        outcomes.append([out, *torch.autograd.grad((out.float() * weight).sum(), leaves)])
    for rounded, exact in zip(*outcomes):
        error = float(((rounded.float() - exact).norm() / exact.norm()).detach())
        assert least < error < most
    assert not outcomes[0][3][1, :, 30:].any() and outcomes[0][3][1, :, :30].all(), "padding"


def test_loaded_models_use_it_in_training_alone(monkeypatch):
    asked, true_mask = [], cpu.kept_positions

    def spy(shape, cut, seed):
        asked.append((tuple(shape), cut))
        return true_mask(shape, cut, seed)

    monkeypatch.setattr(cpu, "kept_positions", spy)
    for head in ("classifier", "mlm"):
        model, _ = helpers.load_bert(SAMPLE, head, attention_dropout=0.25)
        ids = torch.ones(2, 10, dtype=torch.int64)
        model(ids, attention_mask=ids)
        assert not asked
        model.train()(ids, attention_mask=ids)
        config = model.config
        weights, outputs = (2 * config.num_attention_heads, 10, 10), (2, 10, config.hidden_size)
        assert asked.count((weights, 16384)) == config.num_hidden_layers
        assert asked.count((outputs, 6554)) == 2 * config.num_hidden_layers + 1  # 1: embeddings
        assert asked.count(((2, config.hidden_size), 6554)) == (head == "classifier")
        assert len(asked) == 3 * config.num_hidden_layers + 1 + (head == "classifier")
        asked.clear()


def test_dropout_is_that_of_pytorch_but_for_its_random_numbers():
    layer, ones = cpu.Dropout(0.3), torch.ones(400, 500, requires_grad=True)
    out = layer(ones)
    assert abs(float((out == 0).float().mean()) - 0.3) < 5 * (0.21 / 2e5) ** 0.5
    assert torch.allclose(out[out != 0], torch.tensor(1 / 0.7), rtol=1e-4)
    assert torch.equal(torch.autograd.grad(out.sum(), ones)[0], out)
    assert torch.equal(layer.eval()(ones), ones)
    assert isinstance(layer, torch.nn.Dropout) and cpu.Dropout(0.0)(ones) is not None
    assert torch.isfinite(cpu.Dropout(0.999999)(ones)).all()  # finer than a mask can be


def test_a_stream_alone_decides_what_its_thread_drops():
    layer, ones = cpu.Dropout(0.5), torch.ones(64)

    def drop(*seeds):
        with cpu.random_stream(*seeds):
            return torch.stack([layer(ones), layer(ones)])

    first = drop(1, 2)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(drop(1, 2), first) and not torch.equal(*first)
    assert not torch.equal(drop(1, 3), first) and not torch.equal(drop(2, 2), first)
    assert torch.equal(torch.get_rng_state(), state)
    layer(ones)  # without a stream: PyTorch's
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("head", ["classifier", "mlm"])
def test_gradients_do_not_depend_on_the_number_of_threads(head):
    model, tokenizer = helpers.load_bert(SAMPLE, head)
    model.train()
    rows = [[2, *range(10, 10 + n), 3] for n in (30, 20, 9, 7, 5)]
    window = [dict(helpers.pad([row, row], 0)) for row in rows]
    for batch in window:
        batch["labels"] = (torch.tensor([0, 1]) if head == "classifier" else
                           batch["input_ids"].masked_fill(batch["input_ids"] % 3 > 0, -100))
    forward = helpers.classifier_forward if head == "classifier" else helpers.mlm_forward
    outcomes, before = [], torch.get_num_threads()
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(9)
        loss = helpers.accumulate(model, window, 10, forward, torch.device("cpu"), seed=9)
        outcomes.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
    torch.set_num_threads(before)
    for other in outcomes[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outcomes[0], other))


def test_a_saved_model_does_not_name_it(tmp_path):
    model, tokenizer = helpers.load_bert(SAMPLE, "mlm")
    checkpoints.save_bert(str(tmp_path / "bert"), model, tokenizer, {})
    assert "cpu_attention" not in (tmp_path / "bert" / "config.json").read_text()
