"""A CPU's cores kept busy: dropout, attention and micro-batches by threads that compute alone."""
from __future__ import annotations

import collections
import collections.abc
import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
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
    n = int(np.prod(shape))
    bits = np.random.SFC64(seed).random_raw(n // 4 + 1).view(np.int16)[:n]
    return torch.ge(torch.from_numpy(bits).view(shape), cut - 32768, out=torch.empty(shape))


def parallel_map(work, items, device):
    """Yield work(item) for every item in order: on a CPU each by a core of its own.

    No more than one result a core, and one, is held, so memory stays bounded.
    """
    threads, waiting = torch.get_num_threads(), collections.deque()
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


class DroppedAttention(torch.autograd.Function):
    """softmax(query key' + bias), dropout, times value; in chunks, each by a core of its own.

    query, key, value: (n, seq, size), bias: (n, 1, seq). The backward pass makes weights and masks
    again instead of keeping them: n x seq x seq numbers are never held, as Dao et al. 2022 do it.
    """

    @staticmethod
    def by_chunks(work, query, key, bias, cut, seed):
        """Call work(slice, softmax weights, mask) on all chunks of the n."""
        step = max(1, CACHED // query.shape[1] ** 2)

        def one(start):
            some = slice(start, start + step)
            scores = torch.bmm(query[some], key[some].transpose(1, 2)).add_(bias[some])
            work(some, scores.softmax(-1), keep_mask(scores.shape, cut, [seed, start]))

        list(parallel_map(one, range(0, len(query), step), query.device))  # list: wait for all

    @staticmethod
    def forward(ctx, query, key, value, bias, p, seed):
        """Return (n, seq, size)."""
        out, (cut, ctx.share) = torch.empty_like(query), cut_of(p)

        def attend(some, weights, mask):
            torch.bmm(weights.mul_(mask), value[some], out=out[some])

        DroppedAttention.by_chunks(attend, query, key, bias, cut, seed)
        out.mul_(1 / ctx.share)
        ctx.save_for_backward(query, key, value, bias, out)
        ctx.cut, ctx.seed = cut, seed
        return out

    @staticmethod
    def backward(ctx, grad):
        """Return the gradients of query, key and value."""
        query, key, value, bias, out = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(query) for _ in range(3))
        mean = (grad * out).sum(-1, keepdim=True)  # of a row's gradients, by its weights
        grad = grad * (1 / ctx.share)

        def go_back(some, weights, mask):
            to_weights = torch.bmm(grad[some], value[some].transpose(1, 2)).mul_(mask)
            torch.bmm(mask.mul_(weights).transpose(1, 2), grad[some], out=to_value[some])
            to_scores = to_weights.sub_(mean[some]).mul_(weights)
            torch.bmm(to_scores, key[some], out=to_query[some])
            torch.bmm(to_scores.transpose(1, 2), query[some], out=to_key[some])

        DroppedAttention.by_chunks(go_back, query, key, bias, ctx.cut, ctx.seed)
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
    bias = torch.zeros(batch, 1, 1, seq)
    if attention_mask is not None:  # the same for every query: padding is not attended to
        bias.masked_fill_(~attention_mask[:, :, :1], torch.finfo(torch.float32).min)
    bias = bias.expand(batch, heads, 1, seq).reshape(-1, 1, seq)
    query, key, value = query.float() * scaling, key.float(), value.float()
    rows = [x.reshape(-1, seq, size) for x in (query, key, value)]
    with torch.autocast("cpu", enabled=False):  # fp32 in here whatever the precision around it
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


def use_own_dropout(model):
    """Make a model drop and attend as this section does; transformers 2.1 keeps its own."""
    with contextlib.suppress(ImportError):
        register_attention()
        for module in model.modules():
            if type(module) is torch.nn.Dropout:
                module.__class__ = Dropout
            if isinstance(module, BertModel):
                module.set_attn_implementation(ATTENTION)


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
    """
    words = model.bert.embeddings.word_embeddings
    words.sparse = device.type == "cpu"
    try:
        yield
    finally:
        words.sparse = False
        if words.weight.grad is not None and words.weight.grad.is_sparse:
            words.weight.grad = words.weight.grad.to_dense()
