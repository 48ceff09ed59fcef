"""A CPU's cores kept busy: dropout, attention and micro-batches by threads that compute alone."""
from __future__ import annotations

import collections
import collections.abc
import contextlib
import functools
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BertModel

from runtime import inference_mode

CACHED = 2 ** 19  # attention weights that a core works on at once: 2 MB, about its cache
_beginning = threading.Lock()  # the number of threads that `begin` sets is the process's


@functools.lru_cache(maxsize=None)
def worker_threads(n):
    """Return a pool of n threads that compute alone: none waits for another after every call."""
    everyone = threading.Barrier(n)

    def begin():
        torch.set_num_threads(1)
        torch.get_num_threads()  # settles it: a thread's first use takes the number set last
        torch.set_grad_enabled(False)
        everyone.wait(60)

    with _beginning:
        pool = ThreadPoolExecutor(n, initializer=begin)
        list(pool.map(int, range(n)))  # all have begun ...
        torch.set_num_threads(n)  # ... and threads of others, if they begin later, have n again
    return pool


# ---- matrix products ----------------------------------------------------------------------------

ACCURATE = 1e-5  # of a product's largest entry: fp32 errs by 1e-6, bf16 by 2e-3
FASTER = 1.4     # times as fast oneDNN must be: well above a measurement's noise
_switch = types.SimpleNamespace(lock=threading.RLock(), product="", users=0, ours=False)


def onednn_setting():
    """Return PyTorch's setting of the products by oneDNN, or None where it has none (2019)."""
    setting = getattr(getattr(torch.backends, "mkldnn", None), "matmul", None)
    return setting if hasattr(setting, "fp32_precision") else None


def measure_products(setting, rounds=5):
    """Return ({value of the setting: seconds of a product}, error with "bf16"), in turns.

    The error is relative to the largest entry. Where it is too large for fp32 no time is taken:
    what other threads compute meanwhile would be as inaccurate.
    """
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random, dtype=torch.float32)
            for shape in ((128, 384), (384, 1536)))
    exact = a.double().mm(b.double())
    best = {"none": float("inf"), "bf16": float("inf")}
    try:
        setting.fp32_precision = "bf16"
        error = float((torch.mm(a, b) - exact).abs().max() / exact.abs().max())
        for value in [*best] * rounds if error < ACCURATE else []:
            setting.fp32_precision = value
            started = time.perf_counter()
            torch.mm(a, b)
            best[value] = min(best[value], time.perf_counter() - started)
    finally:
        setting.fp32_precision = "none"
    return best, error


def product_of(device):
    """Return the name of the matrix product that is used on a device: "oneDNN" or "default".

    Asked to compute in bf16, oneDNN takes a kernel of fp32 on CPUs that it has none of bf16 for;
    on some (AMD's family 26) that is twice as fast as PyTorch's default product. It is taken where
    it is FASTER and ACCURATE; measured once in a process, on one core.
    """
    setting, threads = onednn_setting(), torch.get_num_threads()
    if device.type != "cpu" or setting is None:
        return "default"
    with _switch.lock:
        if not _switch.product and setting.fp32_precision == "none":  # else somebody's own choice
            _switch.product = "default"
            with contextlib.suppress(RuntimeError):  # PyTorch's settings are frozen
                pool = None if threads == 1 else worker_threads(threads)
                best, error = (pool.submit(measure_products, setting).result() if pool else
                               measure_products(setting))
                if error < ACCURATE and best["none"] > FASTER * best["bf16"]:
                    _switch.product = "oneDNN"
        return _switch.product or "default"


@contextlib.contextmanager
def fast_products(device):
    """Compute the block's fp32 products by `product_of`; what others have set stays as it is.

    The setting is the process's: the first of several threads sets it, the last takes it back.
    """
    if product_of(device) == "default":
        yield
        return
    setting = onednn_setting()
    with _switch.lock:
        _switch.users += 1
        if setting.fp32_precision == "none":
            setting.fp32_precision = "bf16"
            _switch.ours = True
    try:
        yield
    finally:
        with _switch.lock:
            _switch.users -= 1
            if _switch.ours and not _switch.users:
                _switch.ours = False
                if setting.fp32_precision == "bf16":
                    setting.fp32_precision = "none"


# ---- random numbers and dropout -----------------------------------------------------------------

_random = threading.local()  # .stream: the random numbers of the micro-batch that a thread is at


@contextlib.contextmanager
def random_stream(*seeds):
    """Give this thread a random stream of its own: what it drops does not depend on the others."""
    _random.stream = np.random.SFC64(seeds)
    try:
        yield
    finally:
        del _random.stream


def next_seed():
    """Return a seed from this thread's random stream, else from PyTorch's."""
    stream = getattr(_random, "stream", None)
    return int(torch.randint(2 ** 62, (1,)) if stream is None else stream.random_raw())


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout with masks by `keep_mask` on a CPU: of the thread's own stream."""

    def forward(self, x):
        """Return x with a share p of its numbers dropped, the others scaled up; in training."""
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        cut, share = cut_of(self.p)
        return x * keep_mask(x.shape, cut, next_seed()).div_(share)

    def __setstate__(self, state):
        """Let a pickled model find its attention in the process that it comes to."""
        super().__setstate__(state)
        register_attention()


def cut_of(p):
    """Return the cut of `keep_mask` for a probability p below 1, and the share that is kept."""
    cut = min(round(65536 * p), 65535)
    return cut, 1 - cut / 65536


def keep_mask(shape, cut, seed):
    """Return a random mask of 1.0 and 0.0: each is 0 with probability cut / 65536.

    A 64-bit random number decides on four positions, a quarter of the cost of bernoulli_().
    """
    return torch.from_numpy(kept_positions(shape, cut, seed).astype(np.float32))


def kept_positions(shape, cut, seed):
    """Return `keep_mask` as an array of bool; numpy compares several times as fast as PyTorch."""
    n = int(np.prod(shape))
    bits = np.random.SFC64(seed).random_raw(n // 4 + 1).view(np.int16)[:n]
    return np.greater_equal(bits, np.int16(cut - 32768)).reshape(shape)


def parallel_map(work, items, device):
    """Yield work(item) for every item in order: on a CPU each by a core of its own.

    No more than one result a core, and one, is held, so memory stays bounded.
    """
    threads, waiting = torch.get_num_threads(), collections.deque()
    with fast_products(device):
        if device.type != "cpu" or threads == 1 or inference_mode is torch.no_grad:  # PyTorch 1.3
            yield from map(work, items)
            return
        try:
            for item in items:
                waiting.append(worker_threads(threads).submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for one in waiting:  # after an error or Ctrl-C
                one.cancel()


def as_array(x):
    """Return a tensor's memory as an array; of bf16, which numpy lacks, the bits: times 0 or 1."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


class DroppedAttention(torch.autograd.Function):
    """softmax(query key' + bias), dropout, times value; in chunks, each by a core of its own.

    query, key, value: (n, seq, size), bias: (n, 1, seq) or None; all in fp32, or all in bf16. The
    backward pass makes the weights again instead of keeping them, as Dao et al. 2022 do it: of
    n x seq x seq numbers only a bit each is held, whether it was dropped.
    """

    @staticmethod
    def by_chunks(work, query, key, bias):
        """Call work(number of the chunk, slice, softmax weights) on all chunks of the n."""
        step = max(1, CACHED // query.shape[1] ** 2)

        def one(start):
            some = slice(start, start + step)
            scores = torch.bmm(query[some], key[some].transpose(1, 2))
            if bias is not None:
                scores.add_(bias[some])
            work(start // step, some, scores.softmax(-1))

        starts = range(0, len(query), step)
        if torch.get_num_threads() == 1:  # a core that `parallel_map` gave a micro-batch
            list(map(one, starts))
        else:
            list(parallel_map(one, starts, query.device))  # list: wait for all

    @staticmethod
    def forward(ctx, query, key, value, bias, p, seed):
        """Return (n, seq, size)."""
        out, (cut, ctx.share), ctx.kept = torch.empty_like(query), cut_of(p), {}

        def attend(number, some, weights):
            kept = kept_positions(weights.shape, cut, [seed, some.start])
            ctx.kept[number] = np.packbits(kept)
            np.multiply(as_array(weights), kept, out=as_array(weights))
            torch.bmm(weights, value[some], out=out[some])

        DroppedAttention.by_chunks(attend, query, key, bias)
        out.mul_(1 / ctx.share)
        ctx.save_for_backward(query, key, value, bias, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of query, key and value."""
        query, key, value, bias, out = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(query) for _ in range(3))
        # Of the gradients of a row of weights, by these weights: summed in fp32.
        minus_mean = -(grad.float() * out).sum(-1, keepdim=True).to(grad.dtype)
        grad = grad * (1 / ctx.share)

        def go_back(number, some, weights):
            bits = np.unpackbits(ctx.kept[number])[:weights.numel()]
            kept = torch.empty_like(weights)
            np.multiply(as_array(weights), bits.view(bool).reshape(weights.shape),
                        out=as_array(kept))
            torch.bmm(kept.transpose(1, 2), grad[some], out=to_value[some])
            to_weights = torch.bmm(grad[some], value[some].transpose(1, 2))
            to_scores = weights.mul_(minus_mean[some]).addcmul_(to_weights, kept)
            torch.bmm(to_scores, key[some], out=to_query[some])
            torch.bmm(to_scores.transpose(1, 2), query[some], out=to_key[some])

        DroppedAttention.by_chunks(go_back, query, key, bias)
        return to_query, to_key, to_value, None, None, None


def cpu_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attend as BERT does; with dropout on a CPU by DroppedAttention, else by the library.

    query, key, value: (batch, heads, seq, size); returns (batch, seq, heads, size). PyTorch's own
    kernel has no dropout on a CPU and falls back to one several times slower. attend, among
    kwargs: what is to be done instead (reviews without padding: gpu.attend_apart).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if "attend" in kwargs:
        return kwargs["attend"](query, key, value, dropout, scaling), None
    if not dropout or query.device.type != "cpu":
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout,
                                      scaling=scaling, **kwargs)
    (batch, heads, seq, size), kind = query.shape, query.dtype
    own = kind if kind == torch.bfloat16 else torch.float32  # fp16 has no range for scores
    bias = None
    if attention_mask is not None:  # the same for every query: padding is not attended to
        bias = torch.zeros(batch, 1, 1, seq, dtype=own).masked_fill_(
            ~attention_mask[:, :, :1], torch.finfo(own).min)
        bias = bias.expand(batch, heads, 1, seq).reshape(-1, 1, seq)
    query, key, value = query.to(own) * scaling, key.to(own), value.to(own)
    rows = [x.reshape(-1, seq, size) for x in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # in here nothing changes its format
        out = DroppedAttention.apply(*rows, bias, dropout, next_seed())
    out = out.view(batch, heads, seq, size).transpose(1, 2)
    return out.contiguous().to(kind), None


ATTENTION = "cpu_attention_of_" + __name__  # a copy of this file has a random stream of its own


def register_attention():
    """Make `cpu_attention` known to this process's transformers; ImportError if it is too old."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register(ATTENTION, cpu_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@functools.lru_cache(maxsize=None)
def fused_gelu():
    """Return PyTorch's private operator for gelu(x weight' + bias), None where it has none."""
    x, weight, bias = (torch.linspace(-3, 3, n).view(size) for n, size in (
        (8, (2, 4)), (12, (3, 4)), (3, (3,))))
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        given = operator(x, weight, bias, "gelu", [], "none")
        expected = F.gelu(F.linear(x, weight, bias))
        return operator if torch.allclose(given, expected, atol=ACCURATE) else None
    except (AttributeError, RuntimeError, TypeError):  # none, none built in, another signature
        return None


class GeluLinear(torch.nn.Linear):
    """A linear layer and GELU; without gradients in one operation, where oneDNN multiplies.

    Bias and GELU are then taken while the product's numbers are in the cache. The operator is
    oneDNN's: where PyTorch's default product is the faster one, nothing is gained.
    """

    def forward(self, x):
        """Return gelu(x weight' + bias)."""
        if (_switch.product != "oneDNN" or not fused_gelu() or torch.is_grad_enabled()
                or x.device.type != "cpu" or x.dtype != torch.float32
                or torch.is_autocast_enabled("cpu")):
            return F.gelu(super().forward(x))
        return fused_gelu()(x, self.weight, self.bias, "gelu", [], "none")


def use_own_layers(model):
    """Make a model drop, attend and activate as this section does; transformers 2.1 does not."""
    with contextlib.suppress(ImportError):
        register_attention()
        for module in model.modules():
            if type(module) is torch.nn.Dropout:
                module.__class__ = Dropout
            if isinstance(module, BertModel):
                module.set_attn_implementation(ATTENTION)
            if type(module).__name__ == "BertIntermediate" and model.config.hidden_act == "gelu":
                module.dense.__class__ = GeluLinear
                module.intermediate_act_fn = torch.nn.Identity()


def gradients_of(loss, parameters):
    """Return a loss's gradients, one a parameter or None; () where they were added up in place.

    The cores of a CPU go backward at once, so none may touch what the others add to.
    """
    if loss.device.type != "cpu":
        loss.backward()
        return ()
    return torch.autograd.grad(loss, parameters, allow_unused=True)


def add_gradients(parameters, grads):
    """Add gradients to those that the parameters have; None is none."""
    for parameter, grad in zip(parameters, grads):
        if parameter.grad is None:
            parameter.grad = grad if grad is None or grad.is_sparse else grad.contiguous()
        elif grad is not None and parameter.grad.is_sparse and not grad.is_sparse:
            parameter.grad = grad + parameter.grad
        elif grad is not None:
            parameter.grad.add_(grad)


@contextlib.contextmanager
def sparse_embeddings(model, device):
    """On a CPU keep the gradients of word embeddings by row; make one dense tensor at the end.

    Else every micro-batch makes, and adds up, one as large as the vocabulary (47 MB and more).
    Within, a masked-LM head that is tied to the embeddings has a parameter of its own, of the same
    memory: its gradients are dense, and adding rows to them would copy all.
    """
    words = model.bert.embeddings.word_embeddings
    decoder = getattr(getattr(getattr(model, "cls", None), "predictions", None), "decoder", None)
    tied = device.type == "cpu" and decoder is not None and decoder.weight is words.weight
    words.sparse = device.type == "cpu"
    if tied:
        decoder.weight = torch.nn.Parameter(words.weight.detach(), words.weight.requires_grad)
    try:
        yield
    finally:
        words.sparse = False
        grad = words.weight.grad
        if tied:
            dense, decoder.weight = decoder.weight.grad, words.weight
            grad = grad if dense is None else dense if grad is None else dense.add_(grad)
        words.weight.grad = grad.to_dense() if grad is not None and grad.is_sparse else grad
