"""A GPU kept busy: reviews without padding, batches made ahead, copies that nothing waits for.

A GPU works through a queue that the host fills. It stands idle where the host waits for it (a
number is read, memory is copied that is not pinned) and where many small kernels are queued more
slowly than they run. Hence few, large passes, and numbers that are read a step late.
"""
from __future__ import annotations

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import transformers

from runtime import all_sum, processes, used_precision

QUEUED = {"cuda"}   # kinds of devices that work through a queue
# Tokens of a pass that a GPU computes while the host queues its kernels, which takes 8 to 15 ms:
FLOOR = 4096        # at some 400 tokens a ms (bf16) ...
OLD_FLOOR = 1024    # ... or some 80 (a V100, a T4, or fp32)
CALM_TOKENS = 2 ** 15  # at most, of a pass that only predicts or goes unpadded
TODAY = hasattr(transformers, "AttentionInterface")  # the library lets us say how BERT attends


def unpadding(device, precision):
    """Tell whether reviews can go through a device one after another, without padding.

    PyTorch's kernel of flash attention takes their boundaries: in bf16 or fp16, on NVIDIA GPUs of
    compute capability 8.0 (A100, RTX 30) or newer.
    """
    return (device.type == "cuda" and TODAY and torch.version.cuda is not None
            and used_precision(precision, "cuda") in ("bf16", "fp16")
            and torch.cuda.get_device_capability(device) >= (8, 0))


def unpads(model, precision):
    """Tell whether a model goes unpadded on its device: its heads must be of 8, 16, ... 256."""
    size = model.config.hidden_size // model.config.num_attention_heads
    return (size % 8 == 0 and size <= 256
            and unpadding(next(model.parameters()).device, precision))


def micro_floor(device, precision):
    """Return the tokens below which a pass through a GPU takes no less time."""
    new = used_precision(precision, device.type) == "bf16"
    return FLOOR if new else OLD_FLOOR


def calm_limits(device, precision, unpadded):
    """Return max_count, max_tokens, launch, floor of `micro_batches` for passes that predict."""
    floor = CALM_TOKENS if unpadded else micro_floor(device, precision)
    return CALM_TOKENS, CALM_TOKENS, 0, floor


def token_limit(model):
    """Return the most tokens of an unpadded pass that trains, by the GPU's free memory.

    What a layer keeps of a token in 16 bits is about 34 bytes for each hidden unit (Korthikanti et
    al. 2022, equation 2, without the attention matrix, which flash attention keeps none of); twice
    that is taken, as LayerNorm and GELU are in fp32. The first process decides for all.
    """
    device, config = next(model.parameters()).device, model.config
    if device.type != "cuda" or not hasattr(torch.cuda, "mem_get_info"):
        return math.inf
    held = 2 * 34 * config.hidden_size * config.num_hidden_layers
    if hasattr(model, "cls"):  # logits of the 15 % that are masked, their softmax and gradients
        held += 0.15 * 3 * 4 * config.vocab_size
    weights = 16 * sum(p.numel() for p in model.parameters())  # gradients, Adam's moments, casts
    free = torch.cuda.mem_get_info(device)[0]
    own = max(512, int((0.9 * free - weights) / held))
    return int(all_sum(0 if processes()[0] else own, device))


# ---- batches ------------------------------------------------------------------------------------

def unpad(batch):
    """Return a padded batch as one row: its reviews one after another.

    input_ids, position_ids (from 0 in every review), labels of tokens: (1, tokens). starts: where
    each review begins and the last one ends, (reviews + 1,) int32. longest: tokens of the longest.
    """
    real = batch["attention_mask"].bool()
    lengths = real.sum(1)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    places = torch.arange(real.shape[1]).expand_as(real)
    row = {"input_ids": batch["input_ids"][real][None], "position_ids": places[real][None],
           "starts": starts, "longest": int(lengths.max())}
    labels = batch.get("labels")
    if labels is not None:
        row["labels"] = labels if labels.dim() == 1 else labels[real][None]
    return row


def pick_targets(batch):
    """Return a masked-LM batch with its targets alone as labels, and their places as `masked`.

    Places count over all tokens of the batch; a label below 0 is no target. A GPU that had to
    look for them would be waited for.
    """
    labels = batch["labels"].flatten()
    masked = (labels >= 0).nonzero()[:, 0]
    return dict(batch, labels=labels[masked], masked=masked)


def ready_batch(batch, device, unpadded=False):
    """Return a padded batch as it is for a CPU; for a GPU unpadded where it can, and pinned."""
    if device.type not in QUEUED:
        return batch
    if unpadded:
        batch = unpad(batch)
    if "labels" in batch and batch["labels"].dim() == 2:
        batch = pick_targets(batch)
    return pinned(batch)


def pinned(batch):
    """Return a batch in memory that a GPU copies from while the host goes on.

    Without a mask where nothing is padded; else with one that BERT takes as it is: it would ask
    the GPU whether all are ones, and wait for the answer.
    """
    mask = batch.get("attention_mask")
    if mask is not None and bool(mask.bool().all()):
        batch = {key: value for key, value in batch.items() if key != "attention_mask"}
    elif mask is not None and TODAY:
        batch = dict(batch, attention_mask=mask.bool()[:, None, None])
    return {key: value.pin_memory() if torch.is_tensor(value) else value
            for key, value in batch.items()}


def to_device(batch, device):
    """Return a batch on a device; pinned memory is copied without waiting."""
    return {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()}


def rows_of(batch):
    """Return the number of reviews in a batch."""
    return len(batch["starts"]) - 1 if "starts" in batch else len(batch["input_ids"])


def tokens_of(batch, unpadded=False):
    """Return the tokens of a batch that a pass computes: with padding, unless it goes unpadded."""
    return int(batch["attention_mask"].sum()) if unpadded else batch["input_ids"].numel()


def split_batch(batch, most_tokens, unpadded=False):
    """Return a padded batch in halves of halves, of at most most_tokens tokens or one review."""
    size = rows_of(batch)
    if size == 1 or tokens_of(batch, unpadded) <= most_tokens:
        return [batch]
    return [part for rows in (slice(0, size // 2), slice(size // 2, size))
            for part in split_batch({key: value[rows] for key, value in batch.items()},
                                    most_tokens, unpadded)]


def ready_batches(batches, device, unpadded, most_tokens):
    """Return batches as the device takes them, split where they have more than most_tokens."""
    return [ready_batch(part, device, unpadded) for batch in batches
            for part in split_batch(batch, most_tokens, unpadded)]


class Ahead:
    """make(step), which a thread does for the next step while a GPU works on this one."""

    def __init__(self, make, device, n_steps):
        self.make = make
        self.n_steps = n_steps
        self.thread = ThreadPoolExecutor(1) if device.type in QUEUED else None
        self.waiting = {}  # {step: what the thread makes of it}

    def __call__(self, step):
        """Return make(step)."""
        made = self.waiting.pop(step, None)
        outcome = self.make(step) if made is None else made.result()
        if self.thread and step + 1 < self.n_steps:
            self.waiting = {step + 1: self.thread.submit(self.make, step + 1)}
        return outcome

    def forget(self):
        """Make the next step anew: what it depends on has changed."""
        self.waiting = {}

    def close(self):
        """End the thread."""
        if self.thread:
            self.thread.shutdown(wait=False)


# ---- BERT without padding -----------------------------------------------------------------------

def attend_apart(query, key, value, dropout, scaling, starts, longest):
    """Attend within each review of an unpadded row: (1, heads, tokens, size) each.

    Return (1, tokens, heads, size). On a GPU by PyTorch's own flash attention (Dao 2024), which
    takes the boundaries; elsewhere review by review, the definition that tests compare with.
    """
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if query.device.type in QUEUED:
        return torch.ops.aten._flash_attention_forward(
            query, key, value, starts, starts, longest, longest, dropout, False, False,
            scale=scaling)[0][None]
    parts, bounds = [], starts.tolist()
    for start, end in zip(bounds, bounds[1:]):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        weights = torch.softmax(torch.matmul(q, k.transpose(1, 2)).float() * scaling, -1)
        weights = torch.nn.functional.dropout(weights, dropout).to(v.dtype)
        parts.append(torch.matmul(weights, v).transpose(0, 1))
    return torch.cat(parts)[None]


def hidden_states(model, batch):
    """Return the last hidden states: (reviews, longest, hidden); unpadded (1, tokens, hidden)."""
    if "starts" not in batch:
        return model.bert(batch["input_ids"], attention_mask=batch.get("attention_mask"))[0]
    attend = functools.partial(attend_apart, starts=batch["starts"], longest=batch["longest"])
    return model.bert(batch["input_ids"], position_ids=batch["position_ids"], attend=attend)[0]


def first_states(hidden, batch):
    """Return the last hidden state of each review's [CLS], (reviews, hidden)."""
    if "starts" in batch:
        return hidden[0].index_select(0, batch["starts"][:-1])
    return hidden[:, 0]


def mean_states(hidden, batch):
    """Return the mean of each review's last hidden states, of [CLS] and [SEP] too.

    As sentence encoders are trained (Reimers & Gurevych 2019). (reviews, hidden), in fp32.
    """
    hidden, mask = hidden.float(), batch.get("attention_mask")
    if "starts" in batch:
        ends = batch["starts"][1:]
        places = torch.arange(hidden.shape[1], dtype=ends.dtype, device=ends.device)
        review = torch.searchsorted(ends, places, right=True)  # that each token is of
        sums = hidden.new_zeros(len(ends), hidden.shape[2]).index_add(0, review, hidden[0])
        return sums / (ends - batch["starts"][:-1])[:, None]
    if mask is None:  # nothing is padded
        return hidden.mean(1)
    mask = mask.flatten(1).to(hidden.dtype)  # of four dimensions where `pinned` made it
    return (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]


# A new pooling is an entry here; it gets the last hidden states and their batch, padded or not.
POOLINGS = {"cls": first_states, "mean": mean_states}


def classifier_outputs(model, batch):
    """Return the logits of a classifier, (reviews, labels), for a batch, padded or not.

    BERT's pooler belongs to [CLS]; any other pooling goes to the classifier as it is.
    """
    pooling = getattr(model.config, "pooling", "cls")
    if pooling == "cls" and "starts" not in batch:
        return model(batch["input_ids"], attention_mask=batch.get("attention_mask"))[0]
    pooled = POOLINGS[pooling](hidden_states(model, batch), batch)
    if pooling == "cls":
        pooled = model.bert.pooler(pooled[:, None])
    return model.classifier(model.dropout(pooled))


# ---- numbers that come to the host --------------------------------------------------------------

def later(tensor):
    """Begin to copy a tensor to the host; return a function that waits for it and returns it."""
    if tensor.device.type not in QUEUED:
        return tensor.cpu
    copied, done = tensor.to("cpu", non_blocking=True), None
    if tensor.device.type == "cuda":
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(tensor.device))

    def wait():
        if done is not None:
            done.synchronize()
        return copied
    return wait


def floats_later(*numbers):
    """Return a function that gives scalars as floats; a GPU's are copied by `later`, as one."""
    if not torch.is_tensor(numbers[0]) or numbers[0].device.type not in QUEUED:
        return lambda: list(map(float, numbers))
    device = numbers[0].device
    read = later(torch.stack([torch.as_tensor(n, device=device).float() for n in numbers]))
    return lambda: read().tolist()


def one_behind(tensors, device):
    """Yield the tensors of an iterator on the CPU; a GPU is given the next before one is read."""
    waiting = []
    for tensor in tensors:
        waiting.append(later(tensor))
        if len(waiting) > (device.type in QUEUED):
            yield waiting.pop(0)()
    for read in waiting:
        yield read()


# ---- fp16 ---------------------------------------------------------------------------------------

class LossScaler:
    """PyTorch's GradScaler where a Config's precision is fp16; else it changes nothing.

    Small gradients are 0 in fp16; so the loss is scaled up and the gradients down again, by a
    factor that halves when they overflow (Micikevicius et al. 2018, section 3.2).
    """

    def __init__(self, device, precision):
        self.scaler = None
        if used_precision(precision, device.type) == "fp16":
            self.scaler = (torch.amp.GradScaler(device.type) if hasattr(torch.amp, "GradScaler")
                           else torch.cuda.amp.GradScaler())
            self.scaler.scale(torch.zeros((), device=device))  # begins, before threads use it

    @property
    def factor(self):
        """Return what the loss is multiplied by."""
        return self.scaler.get_scale() if self.scaler else 1.0

    def scale(self, loss):
        """Return a loss scaled up."""
        return self.scaler.scale(loss) if self.scaler else loss

    def unscale(self, optimizer):
        """Divide an optimizer's gradients by what the loss was multiplied by."""
        if self.scaler:
            self.scaler.unscale_(optimizer)

    def overflowed(self, loss, norm):
        """Tell whether gradients are infinite because the loss, which is not, was scaled.

        Then the factor halves; it doubles after 2,000 steps without.
        """
        if not self.scaler:
            return False
        if math.isfinite(float(norm)):
            self.scaler.update()
            return False
        factor = self.factor
        self.scaler.update(factor / 2)
        return factor > 1 and math.isfinite(float(loss))

    def state_dict(self):
        """Return the state for a checkpoint, or None."""
        return self.scaler and self.scaler.state_dict()

    def load_state_dict(self, state):
        """Take the state of a checkpoint."""
        if self.scaler and state:
            self.scaler.load_state_dict(state)
