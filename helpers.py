"""Fine-tune BERT on film reviews: everything that the notebooks and evaluate.py share.

    from helpers import load_filimdb, train, classify, accuracy
    data = load_filimdb("data/FILIMDB")
    params = train(data["train"].texts, data["train"].labels, seq_len=256, epochs=2)
    print(accuracy(data["dev"].labels, classify(data["dev"].texts, params)))

It reads in the order in which the data flows: hyperparameters -> data -> text to tokens ->
batches -> model -> optimizer and schedule -> training loop -> classifier -> masked LM ->
baselines. What keeps that fast, portable and safe stands in run.py, cpu.py, gpu.py,
checkpoints.py, runtime.py and files.py. One file to hand in, joined of the seven: `make
classifier`. Importing changes nothing.
"""
from __future__ import annotations

import collections
import collections.abc
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import math
import os
import re
import time
import types
from collections import Counter, namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

try:
    import checkpoints, cpu, files, gpu, run, runtime  # noqa: E401, F401
except ImportError as error:
    if error.name not in ("checkpoints", "cpu", "files", "gpu", "run", "runtime"):
        raise
    raise ImportError("helpers.py works with the files beside it; `make classifier` joins them to "
                      "one, build/classifier.py, to hand in") from None
from checkpoints import (
    BERT_SETTINGS, attempt, check_activation, check_entries, check_folder, check_place,
    check_tokenizer, check_vocabularies, config_entries, fit_embeddings, locked_checkpoint,
    model_digest, new_layers, read_note, save_bert, save_checkpoint, sound_note,
    tokenizer_digest)
from cpu import (
    add_gradients, gradients_of, parallel_map, random_stream, sparse_embeddings, use_own_layers)
from files import (
    InputError, cache_dir, cut, digest_of, find_path, html_table, load_table, nearest,
    open_atomically, remove_if_there, save_history, say, sealed_table, utf8, warn)
from gpu import (
    CALM_TOKENS, POOLINGS, calm_limits, classifier_outputs, hidden_states, micro_floor,
    one_behind, pick_targets, ready_batch, to_device, unpadding, unpads)
from run import Diverged, Run, clear_gradients
from runtime import (
    VERSIONS, WEIGHTS_ONLY, OutOfMemory, all_sum, autocast, deal, exclusive, generator,
    inference_mode, kept_random_state, my_share, out_of_memory, pick_device, processes,
    progress_bar, quiet_transformers, sum_step, supported_options, uninterrupted,
    used_precision, wait_for_all)

LABEL_IDS = {"neg": 0, "pos": 1}
IGNORE = -100  # the label id of a position that no loss is taken at
# Raise it when the same run in fp32 gives other numbers (tests/reference_trials.json). In 16 bits
# runs differ between machines, and with what a micro-batch holds, as two seeds do.
RESULTS_VERSION = 6


# ---- hyperparameters ----------------------------------------------------------------------------

def default_model():
    """Return the model's name or folder: BERT_MODEL from the environment, or bert-base-uncased."""
    return os.environ.get("BERT_MODEL") or "bert-base-uncased"


@dataclasses.dataclass(frozen=True)
class Config:
    """Every hyperparameter of `train`; `pretrain` takes the same keys with MLM_DEFAULTS.

    Sources: [D] Devlin et al. 2019 (BERT), appendix A; [S] Sun et al. 2019 (How to Fine-Tune BERT
    for Text Classification?), section 5; [A] the course's assignment; [M] Micikevicius et al.
    2018, Mixed Precision Training: weights, gradients and Adam's moments stay fp32.
    """

    model: str = dataclasses.field(default_factory=default_model)  # hub name or folder [A]
    seq_len: int = 512         # tokens with [CLS] and [SEP]; the model's limit [S]
    keep: str = "head+tail"    # tokens that survive truncation; best of three in [S], table 2
    words: int = 0             # first/last words kept before tokenization (side: keep); 0 = all
    batch_size: int = 32       # reviews an optimizer step sees [A]; 24 in [S]
    accumulation: int = 4      # least number of micro-batches they are split into on a CPU [A]
    epochs: int = 3            # passes over the texts; at most 4 in [S], 2-4 in [D]
    lr: float = 2e-5           # peak learning rate [S], figure 3
    optimizer: str = "adam"    # adam [A]: weight_decay is L2 in the gradient; adamw: decoupled
    weight_decay: float = 0.0  # on matrices only, not on biases and LayerNorm [A]; 0.01 in [D]
    warmup: float = 0.1        # share of all optimizer steps [S, D]
    decay: str = "linear"      # of the learning rate after warm-up; linear: to 0 [D]
    clip_norm: float = 1.0     # largest L2 norm of the whole gradient; 0 = no clipping [D's code]
    pooling: str = "cls"       # what the classifier reads: [CLS] [D], or the mean of all tokens
    dropout: float = 0.1       # on embeddings, layer outputs and the classifier's input [D]
    attention_dropout: float = 0.1  # on attention weights [D]
    views: bool = False        # classifying: head, tail and both ends of what is cut; their mean
    whole_word: bool = False   # pretrain only: mask whole words instead of single tokens
    freeze: bool = False       # pretrain only: the encoder stays fixed, the head alone learns
    max_minutes: float = 0.0   # time budget of the steps, loading not counted; 0 = none
    seed: int = 0              # new layers and dropout
    data_seed: int = 0         # order of the reviews, masks
    precision: str = "auto"    # fp32, bf16, fp16; auto: bf16 or fp16 on a GPU, else fp32 [M]
    device: str = ""           # cuda, cuda:1, cpu; empty = cuda if there is one, else cpu


# [S] section 5.4: batch 32, 128 tokens, lr 5e-5; [D]: Adam with decoupled weight decay of 0.01.
MLM_DEFAULTS = {"seq_len": 128, "batch_size": 32, "accumulation": 1, "epochs": 2, "lr": 5e-5,
                "optimizer": "adamw", "weight_decay": 0.01}
RULES = {  # key: (what its value must be, in words, the check)
    "seq_len": ("3 or more", lambda v: v >= 3),
    "lr": ("more than 0 and finite", lambda v: 0 < v < math.inf),
    "precision": ("auto, fp32 or, from PyTorch 1.10 on, bf16 or fp16",
                  lambda v: v in ("auto", "fp32")
                  or v in ("bf16", "fp16") and hasattr(torch, "autocast")),
    "model": ("a hub name or a folder", bool), "device": ("a device's name", lambda v: True),
    **dict.fromkeys(("batch_size", "accumulation", "epochs"), ("1 or more", lambda v: v >= 1)),
    "warmup": ("a share of all steps, at least 0 and below 1", lambda v: 0 <= v < 1),
    **dict.fromkeys(("dropout", "attention_dropout"),
                    ("at least 0 and below 1", lambda v: 0 <= v < 1)),
}
AT_LEAST_0 = ("0 or more, and finite", lambda v: 0 <= v < math.inf)  # every other key


def rule_of(key):
    """Return (what a hyperparameter's value must be, in words, the check)."""
    choices = {"keep": TRUNCATIONS, "optimizer": OPTIMIZERS, "decay": DECAYS,
               "pooling": POOLINGS}.get(key)
    if choices:
        *others, last = choices
        return f"{', '.join(others)} or {last}", choices.__contains__
    return RULES.get(key, AT_LEAST_0)


def make_config(defaults=None, **overrides):
    """Return a Config; InputError for an unknown key, a changed type, a value out of bounds."""
    config = dataclasses.replace(Config(), **(defaults or {}))
    for key, value in overrides.items():
        if key not in vars(config):
            raise InputError(f"unknown hyperparameter {key!r}{nearest(key, vars(config))}")
        kind = type(getattr(config, key))
        if kind is float and type(value) is int:
            value = overrides[key] = float(value)
        if type(value) is not kind:
            raise InputError(f"{key}={value!r}: must be of type {kind.__name__}, "
                             f"not {type(value).__name__}")
        rule, holds = rule_of(key)
        if not holds(value):
            raise InputError(f"{key}={value!r}: must be {rule}")
    config = dataclasses.replace(config, **overrides)
    if config.views and config.words:
        raise InputError(f"views=True with words={config.words}: views read what seq_len cuts; "
                         f"leave out one of the two")
    return config


def refuse_setting(config, key, phase):
    """Refuse a hyperparameter that another phase alone reads, unless it has its default."""
    if getattr(config, key) != getattr(Config, key):
        raise InputError(f"{key}={getattr(config, key)!r}: for {phase}")


def meanings():
    """Return {key of Config: its meaning}: the comments beside the fields, as they stand there."""
    lines = inspect.getsource(Config).splitlines()
    fields = (re.match(r"    (\w+): .*?  # (.+)", line) for line in lines)
    return {field.group(1): field.group(2) for field in fields if field}


def help_of(function, defaults=None):
    """Return what Jupyter shows for `train?`: the docstring, then each setting with its source."""
    config = vars(make_config(defaults))
    pairs = {key: f"{key}={value!r}" for key, value in config.items()}
    width = max(map(len, pairs.values()))
    lines = [f"  {pairs[key]:{width}}  {meaning}" for key, meaning in meanings().items()]
    sources = inspect.getdoc(Config).split("\n")[2:]
    return "\n".join([inspect.getdoc(function), "", "Settings, with their defaults:", "", *lines,
                      "", *sources])


# ---- data ---------------------------------------------------------------------------------------

PARTS = ("train", "dev", "test", "dev-b", "test-b")  # in the order of preds.tsv


class Part(namedtuple("Part", "ids texts labels")):
    """Reviews: lists of ids, texts and labels; labels is None where there is no file of them."""

    __slots__ = ()

    def __repr__(self):
        counts = Counter(self.labels or ())
        known = ", ".join(f"{counts[label]:,} {label}" for label in sorted(counts))
        return f"Part of {len(self.texts):,} reviews ({known or 'no labels'})"

    def _repr_html_(self):
        rows = zip(self.ids[:3], self.labels or [""] * 3, self.texts)
        return f"<p>{self!r}, the first of them:</p>" + html_table(
            [{"id": i, "label": label, "text": cut(text)} for i, label, text in rows])



def read_lines(path):
    """Return a file's lines as the course's harness does: stripped, only "\\n" ends a line.

    Reviews contain \\x85, which str.splitlines() would split at.
    """
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `make data` fetches all of FILIMDB") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:  # a folder, no permission
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a text file") from None
    if text.startswith("\ufeff"):
        warn(f"{path}: byte-order mark dropped")
        text = text[1:]
    if not text.strip():
        raise InputError(f"{path}: empty; one entry a line is expected")
    return [line.strip() for line in text.strip().split("\n")]


def load_part(folder, name):
    """Return one part of FILIMDB: its ids (`train/0` ...), texts, and labels where it has any."""
    texts = read_lines(os.path.join(folder, name + ".texts"))
    path = os.path.join(folder, name + ".labels")
    labels = read_lines(path) if os.path.exists(path) else None
    if labels and len(labels) != len(texts):
        raise InputError(f"{path}: {len(labels)} labels for the {len(texts)} texts of "
                         f"{name}.texts; they must be as many")
    for number, label in enumerate(labels or [], 1):
        if label not in LABEL_IDS:
            raise InputError(f"{path}: line {number} is {label[:20]!r}; labels are neg and pos")
    return Part([f"{name}/{i}" for i in range(len(texts))], texts, labels)


class Filimdb(dict):
    """{part: Part}; asking for a part that the folder does not have raises InputError."""

    def __init__(self, parts, folder):
        super().__init__(parts)
        self.folder = folder

    def __repr__(self):
        return "\n".join([f"Filimdb in {self.folder}", *(
            f"{name}: {part!r}" for name, part in self.items())])

    def _repr_html_(self):
        rows = []
        for name, part in self.items():
            counts = {label: f"{part.labels.count(label):,}" for label in LABEL_IDS
                      if part.labels}
            rows.append({"part": name, "reviews": f"{len(part.texts):,}", "neg": "", "pos": "",
                         **counts, "the first": cut(part.texts[0])})
        return html_table(rows)

    def __missing__(self, name):
        """Name the file that would hold the part."""
        raise InputError(f"{os.path.join(self.folder, name)}.texts: no such file, and it is "
                         f"needed here; `make data` fetches all of FILIMDB")


def load_filimdb(data_dir, parts=PARTS):
    """Return {part: Part(ids, texts, labels)} from a folder of PART.texts and PART.labels.

    A part without any file is left out, which is said. Raises InputError that names the file, and
    both counts where they differ. A relative folder is tried from the working folder, then from
    this file's own.

    >>> load_filimdb("data/sample", parts=["dev-b"])["dev-b"]
    Part of 300 reviews (150 neg, 150 pos)
    """
    folder, parts = find_path(data_dir), check_many(parts, "parts")
    if not data_dir or not os.path.isdir(folder):
        raise InputError(f"{data_dir}: no such folder; `make data` fetches FILIMDB, data/sample "
                         f"is embedded")
    absent = [name for name in parts if not any(
        os.path.lexists(os.path.join(folder, name + end)) for end in (".texts", ".labels"))]
    if len(absent) == len(parts):
        raise InputError(f"{folder}: holds none of {', '.join(parts)} as PART.texts; `make data` "
                         f"fetches FILIMDB")
    if absent:
        say(f"{folder} has no {', '.join(absent)}: left out")
    data = Filimdb({name: load_part(folder, name) for name in parts if name not in absent}, folder)
    for name, part in data.items():
        repeated = len(part.texts) - len(set(part.texts))
        if repeated:
            warn(f"{name}: {repeated} of {len(part.texts)} reviews repeat an earlier one")
    for one, two in itertools.combinations(data, 2):
        shared = set(data[one].texts) & set(data[two].texts)
        if shared:
            warn(f"{len(shared)} reviews stand in {one} and in {two}: a leak")
    return data


def pretrain_parts(data_dir, data, transductive=False):
    """Return {part: texts} that masked LM may see: train, and train_unlabeled where it is there.

    transductive: also the texts, not the labels, of all other parts in `data`.
    """
    texts = {"train": data["train"].texts}
    unlabeled = os.path.join(find_path(data_dir), "train_unlabeled.texts")
    if os.path.exists(unlabeled):
        texts["train_unlabeled"] = read_lines(unlabeled)
    else:
        say(f"{unlabeled}: not there, so masked LM does without")
    if transductive:
        texts.update((part, data[part].texts) for part in data)
    return texts


def subset(part, n, seed=0):
    """Return n reviews of a part, as many of each label as can be, drawn by the seed.

    A draw of n is part of every larger draw, so that learning curves grow one set. 0 = all.

    >>> data = load_filimdb("data/sample", parts=["train"])
    >>> subset(data["train"], 10)
    Part of 10 reviews (5 neg, 5 pos)
    """
    if n <= 0 or n >= len(part.texts):
        return part
    order = torch.randperm(len(part.texts), generator=generator("subset", seed)).tolist()
    by_label = [order] if part.labels is None else [
        [i for i in order if part.labels[i] == label] for label in LABEL_IDS]
    in_turn = [i for pair in itertools.zip_longest(*by_label) for i in pair if i is not None]
    return Part(*(column and [column[i] for i in sorted(in_turn[:n])] for column in part))


# ---- text to tokens -----------------------------------------------------------------------------

def truncate(items, n, keep):
    """Return the n items of a list that survive truncation, all where there are no more.

    >>> truncate([1, 2, 3, 4, 5], 3, keep="tail")
    [3, 4, 5]
    """
    return items if len(items) <= n else TRUNCATIONS[keep](items, n)


def keep_head(items, n):
    """Return the first n items of a list."""
    return items[:n]


def keep_tail(items, n):
    """Return the last n items of a list."""
    return items[len(items) - n:]


def keep_head_and_tail(items, n):
    """Return n items of a list, a quarter from its head: the best of Sun et al. 2019, table 2.

    >>> keep_head_and_tail(list(range(100)), 8)
    [0, 1, 94, 95, 96, 97, 98, 99]
    """
    return items[:n // 4] + items[len(items) - (n - n // 4):]


# A new way to truncate is an entry here; it gets a list of more than n items and gives n of them.
TRUNCATIONS = {"head": keep_head, "tail": keep_tail, "head+tail": keep_head_and_tail}


def truncate_words(text, k, keep):
    """Return the k words of a text that survive, spelled as they were; k = 0 keeps all.

    >>> truncate_words("a  slow start, but what an ending", 3, keep="head")
    'a  slow start,'
    """
    words = [match.span() for match in re.finditer(r"\S+", text)] if k else []
    if len(words) <= k:
        return text
    numbers = truncate(list(range(len(words))), k, keep)
    breaks = [0, *(i for i in range(1, k) if numbers[i] != numbers[i - 1] + 1), k]
    runs = [(words[numbers[a]][0], words[numbers[b - 1]][1]) for a, b in zip(breaks, breaks[1:])]
    return " ".join(text[start:end] for start, end in runs)  # blanks within a run stay


def check_seq_len(seq_len, tokenizer):
    """Raise InputError unless [CLS], [SEP] and a token fit and the model has the positions."""
    limit = getattr(tokenizer, "model_max_length", None) or 512
    limit = 512 if limit > 10 ** 6 else limit  # transformers' number for "unset" is huge
    if not 3 <= seq_len <= limit:
        raise InputError(f"seq_len={seq_len}: must be at least 3 and at most {limit}, the model's "
                         f"number of positions")


def vectorize_ex(text, label, seq_len, tokenizer, keep="head", label_ids=LABEL_IDS):
    """Turn one review into what BERT takes: (input_ids, segment_ids, input_mask, label_id).

    input_ids: [CLS] tokens [SEP] [PAD] ..., segment_ids: 0 (there is one segment), input_mask: 1
    for real tokens, 0 for padding; each a list of exactly `seq_len` ints. `keep` says which tokens
    survive truncation (head, tail, head+tail). label_id: by `label_ids`, None for label None.
    Raises ValueError for a seq_len under 3 or over the model's, and for an unknown label.

    >>> _, tokenizer = load_bert("data/sample/bert")
    >>> input_ids, segment_ids, input_mask, label_id = vectorize_ex("Good!", "pos", 6, tokenizer)
    >>> tokenizer.convert_ids_to_tokens(input_ids)
    ['[CLS]', 'good', '!', '[SEP]', '[PAD]', '[PAD]']
    >>> input_mask, label_id
    ([1, 1, 1, 1, 0, 0], 1)
    """
    check_seq_len(seq_len, tokenizer)
    check_texts([text])
    if label is not None and label not in label_ids:
        raise InputError(f"label {label!r}: known are {', '.join(map(str, label_ids))}")
    tokens = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(whole_characters(text)))
    input_ids = add_special_tokens(tokens, seq_len, keep, tokenizer)
    padding = seq_len - len(input_ids)
    return (input_ids + [tokenizer.pad_token_id] * padding, [0] * seq_len,
            [1] * len(input_ids) + [0] * padding, None if label is None else label_ids[label])


def add_special_tokens(tokens, seq_len, keep, tokenizer):
    """Return [CLS] + the tokens that survive + [SEP], a list of at most seq_len ids.

    >>> _, tokenizer = load_bert("data/sample/bert")
    >>> ids = tokenizer.convert_tokens_to_ids(["a", "very", "good", "film"])
    >>> tokenizer.convert_ids_to_tokens(add_special_tokens(ids, 4, "tail", tokenizer))
    ['[CLS]', 'good', 'film', '[SEP]']
    """
    return [tokenizer.cls_token_id, *truncate(tokens, seq_len - 2, keep), tokenizer.sep_token_id]


class Tokens:
    """The tokens of many texts: `tokens[i]` is the list of ids of text i, no special tokens.

    They lie one after another in one int32 array, memory-mapped from the cache:
    [checksum of the rest, n, n + 1 offsets, ids ...].
    """

    def __init__(self, table):
        n = int(table[1])
        self.offsets, self.ids = table[2:n + 3].astype(np.int64), table[n + 3:]
        self.lengths = np.diff(self.offsets).tolist()  # tokens of each text

    def __len__(self):
        return len(self.lengths)

    def __repr__(self):
        return (f"Tokens of {len(self):,} texts: {sum(self.lengths):,} in all, "
                f"{min(self.lengths, default=0):,} to {max(self.lengths, default=0):,} a text")

    def __getitem__(self, i):
        return self.ids[self.offsets[i]:self.offsets[i + 1]].tolist()

    def take(self, chosen):
        """Return the Tokens of the texts at these indices, in their order."""
        return Tokens(sealed_table(np.array(self[i], dtype=np.int32) for i in chosen))


def tokenize_all(texts, tokenizer):
    """Return the Tokens of the texts; done once, then found in the cache by content.

    >>> _, tokenizer = load_bert("data/sample/bert")
    >>> tokens = tokenize_all(["a good film", "bad"], tokenizer)
    >>> tokenizer.convert_ids_to_tokens(tokens[0]), tokens.lengths
    (['a', 'good', 'film'], [3, 1])
    """
    texts = check_many(texts)
    key = digest_of(itertools.chain([tokenizer_digest(tokenizer)], map(utf8, texts)))
    path = os.path.join(cache_dir("tokens"), key[:32] + ".npy")
    if processes()[0]:
        wait_for_all()  # the first process tokenizes, the others find its table
    table = load_table(path)
    if table is None:
        table = sealed_table(tokenize(texts, tokenizer))
        with open_atomically(path, "wb") as file:
            np.save(file, table)
    if not processes()[0]:
        wait_for_all()
    return Tokens(table)


def whole_characters(text):
    """Return a text without lone surrogates: BERT's cleaning drops them, today's code refuses."""
    return text.encode("utf-8", "ignore").decode()


def tokenize(texts, tokenizer, chunk=500):
    """Yield an int32 array of token ids for each text, in bulk where the tokenizer can.

    >>> _, tokenizer = load_bert("data/sample/bert")
    >>> [len(ids) for ids in tokenize(["a good film", "bad"], tokenizer)]
    [3, 1]
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a checkpoint's tokenizer.json, or an earlier call, may have set them
        backend.no_truncation()
        backend.no_padding()
    bar = progress_bar(len(texts), "tokenizing", "review")
    for start in range(0, len(texts), chunk):
        some = list(map(whole_characters, texts[start:start + chunk]))
        if backend is not None:
            rows = [row.ids for row in backend.encode_batch(some, add_special_tokens=False)]
        else:
            rows = [tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) for text in some]
        yield from (np.array(row, dtype=np.int32) for row in rows)
        bar.update(len(some))
    bar.close()


# ---- batches ------------------------------------------------------------------------------------

CPU_TOKENS = 1024  # of a micro-batch in fp32, which one core of a CPU works on (see cpu_limits)


@functools.lru_cache(maxsize=2)
def order_of_epoch(n, data_seed, epoch):
    """Return the epoch's order of the numbers below n, a tensor; drawn once."""
    return torch.randperm(n, generator=generator("order", data_seed, epoch))


def sample_of_step(n, batch_size, step, data_seed):
    """Return the indices of the step's random sample: fixed by (data_seed, epoch, step) alone."""
    epoch, within = divmod(step, math.ceil(n / batch_size))
    order = order_of_epoch(n, data_seed, epoch)
    return order[within * batch_size:(within + 1) * batch_size].tolist()


def micro_batches(lengths, max_count, max_tokens, launch=0, floor=0):
    """Split positions 0..n-1 into lists of like length, the longest first, as cheaply as can be.

    Each list holds at most max_count, and count x longest is at most max_tokens (or count is 1).
    Least cost by dynamic programming: the padded tokens, or `floor` where they are fewer, and
    `launch` tokens for each list.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
    cost, starts = np.zeros(len(order) + 1), []  # of the cheapest split of the first i
    for end, i in enumerate(order, 1):
        first = max(0, end - max(1, min(max_count, max_tokens // lengths[i])))
        padded_tokens = np.arange(end - first, 0, -1) * lengths[i]  # if this list starts there
        padded_tokens = np.maximum(padded_tokens, floor)
        best = int(np.argmin(cost[first:end] + padded_tokens))
        starts.append(first + best)
        cost[end] = cost[first + best] + padded_tokens[best] + launch
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end - 1]:end][::-1])
        end = starts[end - 1]
    return batches


def micro_limits(config, device):
    """Return max_count, max_tokens, launch and floor of a step's `micro_batches` on a device.

    A GPU gains from large micro-batches and takes all that fit: where memory runs out they are
    halved; several share small ones evenly. A CPU does not: there every core works on one by
    `cpu_limits`, so the number of threads bounds the memory, and `accumulation`.
    """
    count = max(1, config.batch_size // max(config.accumulation, processes()[1]))
    if device.type == "cpu":
        return cpu_limits(count, config)
    several = processes()[1] > 1
    count = math.ceil(config.batch_size / (4 * processes()[1] if several else 1))
    return count, count * config.seq_len, 0, micro_floor(device, config.precision)


def cpu_limits(max_count, config):
    """Return the limits of `micro_batches` on a CPU: in bf16 and fp16, of half the size, more."""
    most = CPU_TOKENS * (1 if used_precision(config.precision, "cpu") == "fp32" else 2)
    return max_count, min(max_count * config.seq_len, most), 48, 0


def split_step(lengths, config, device):
    """Return a step's micro-batches, lists of positions; where nothing is padded as few as can be.

    Those are of like size in tokens, one for each process at least.
    """
    if not unpadding(device, config.precision):
        return micro_batches(lengths, *micro_limits(config, device))
    lists = deal(lengths, max(processes()[1], math.ceil(sum(lengths) / CALM_TOKENS)))
    return [sorted(some, key=lambda i: -lengths[i]) for some in lists if some]


def pad(rows, pad_id):
    """Return rows of ids as a dict of input_ids and attention_mask, (batch, longest) int64."""
    input_ids = torch.full((len(rows), max(map(len, rows), default=0)), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, :len(row)] = torch.tensor(row)
        attention_mask[i, :len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def classifier_batches(tokens, label_ids, config, tokenizer, device):
    """Return step -> the micro-batches of that optimizer step, with one label per review.

    >>> _, tokenizer = load_bert("data/sample/bert")
    >>> config = make_config(seq_len=8, batch_size=2, accumulation=1)
    >>> tokens = prepare(["a good film", "bad"], tokenizer, config)
    >>> batches = classifier_batches(tokens, [1, 0], config, tokenizer, torch.device("cpu"))
    >>> [tuple(batch["input_ids"].shape) for batch in batches(0)]  # of the first step
    [(2, 5)]
    """
    def batches(step):
        chosen = sample_of_step(len(tokens), config.batch_size, step, config.data_seed)
        rows = [add_special_tokens(tokens[i], config.seq_len, config.keep, tokenizer)
                for i in chosen]
        return [dict(pad([rows[i] for i in micro], tokenizer.pad_token_id),
                     labels=torch.tensor([label_ids[chosen[i]] for i in micro]))
                for micro in split_step(list(map(len, rows)), config, device)]
    return batches


# ---- model --------------------------------------------------------------------------------------

HEADS = {"classifier": BertModel, "mlm": BertForPreTraining,
         "trained": BertForSequenceClassification}  # what load_bert reads for each head


@exclusive
def load_bert(model=None, head="classifier", dropout=0.1, attention_dropout=0.1, seed=0,
              num_labels=2, pooling="cls"):
    """Load a pretrained BERT: return (model in eval mode on the CPU, tokenizer).

    model: a local folder (config.json, vocab.txt, weights) or a name on the hub; the argument
    beats BERT_MODEL from the environment, which beats bert-base-uncased. head: "classifier" (a
    new layer over the pooler, N(0, 0.02) by `seed`, the same on both stacks), "mlm" (the
    checkpoint's masked-LM head, tied to the embeddings; what it lacks is made new) or "trained"
    (the checkpoint's classifier). pooling: what the classifier reads, as in Config.
    Raises InputError that says what was tried and how to give a local folder.

    >>> bert, tokenizer = load_bert("data/sample/bert")
    >>> bert.config.num_hidden_layers, bert.config.hidden_size, len(tokenizer)
    (2, 64, 1374)
    """
    name = model or default_model()
    folder = find_path(name)
    if os.path.isdir(folder):
        check_folder(folder, name)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r}: no such folder; give one that holds config.json, "
                         f"vocab.txt and pytorch_model.bin")
    with quiet_transformers():
        config = read_config(name, folder)
        config.hidden_dropout_prob, config.num_labels = dropout, num_labels
        config.attention_probs_dropout_prob, config.pooling = attention_dropout, pooling
        bert, info = attempt("weights", name, HEADS[head].from_pretrained, folder, config=config,
                             output_loading_info=True)
        tokenizer = attempt("vocab.txt", name, BertTokenizer.from_pretrained, folder,
                            do_lower_case=True)
    new = new_layers(bert, info, folder, name)
    if leaves_classifier(head, config, info):
        warn(f"model {name!r} holds a trained classifier, which is not taken; load_classifier or "
             f"--load takes one that save_classifier or --save wrote")
    check_tokenizer(tokenizer, config, name)
    check_vocabularies(tokenizer, folder, name)
    fit_embeddings(bert, config, tokenizer)
    fill_new(bert, new, seed)
    if head == "classifier":
        bert, encoder = BertForSequenceClassification(config), bert
        bert.bert = encoder
        fill_new(bert, ["classifier.weight", "classifier.bias"], seed)
    use_own_layers(bert)
    return bert.float().eval(), tokenizer


def read_config(name, folder):
    """Return the folder's config.json as BertConfig; raise InputError for what is not followed."""
    entries = attempt("config.json", name, config_entries, folder)
    check_entries(entries, BERT_SETTINGS["only"], f"model {name!r}: its config.json")
    check_activation(entries, name)
    left_out = set(BERT_SETTINGS["left out"]) | set(BERT_SETTINGS["only"])
    return attempt("config.json", name, BertConfig.from_dict, {
        key: value for key, value in entries.items() if key not in left_out})


def leaves_classifier(head, config, info):
    """Say whether the folder has a trained classifier that loading with this head left out."""
    if head == "classifier" and not WEIGHTS_ONLY:  # transformers 2.1 names no key outside "bert."
        return "BertForSequenceClassification" in (getattr(config, "architectures", 0) or [])
    return any(re.match(r"classifier\b", key) for key in info["unexpected_keys"])


def fill_new(model, names, seed):
    """Initialize the named parameters as BERT does: matrices N(0, 0.02), biases 0, LayerNorm 1."""
    random = generator("new layers", seed)
    for name, parameter in sorted(model.named_parameters()):
        if name in names and parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=random)
        elif name in names:
            parameter.data.fill_(float(name.endswith("LayerNorm.weight")))


# ---- optimizer and schedule ---------------------------------------------------------------------

def adam(kind, groups, lr):
    """Return an optimizer of Adam's family with BERT's settings (Devlin et al. 2019, A.2)."""
    return kind(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8,
                **supported_options(kind, fused=True))  # one pass over the weights instead of ten


# A new optimizer is an entry here; it gets groups of parameters and the peak learning rate.
OPTIMIZERS = {"adam": functools.partial(adam, torch.optim.Adam),  # its decay: L2 in the gradient
              "adamw": functools.partial(adam, torch.optim.AdamW)}  # decoupled weight decay


def make_optimizer(model, config):
    """Return the optimizer of a config over the parameters that are trained.

    Weight decay is for matrices; biases and LayerNorm are left alone, as in BERT's own code.

    >>> bert, _ = load_bert("data/sample/bert")
    >>> optimizer = make_optimizer(bert, make_config(optimizer="adamw", weight_decay=0.01))
    >>> [group["weight_decay"] for group in optimizer.param_groups]  # matrices, all else
    [0.01, 0.0]
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1],
               "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    return OPTIMIZERS[config.optimizer](groups, config.lr)


def lr_factor(progress, warmup, decay="linear"):
    """Return what the peak learning rate is multiplied by, for progress 0..1 in optimizer steps.

    Linear warm-up over the share `warmup`, then linear decay to 0 (Devlin et al. 2019, A.2).

    >>> [lr_factor(progress, warmup=0.1) for progress in (0.0, 0.05, 0.1, 1.0)]
    [0.0, 0.5, 1.0, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    return DECAYS[decay](max(0.0, (1 - progress) / (1 - warmup)))


# A new decay is an entry here; it gets what is left of the steps after warm-up, from 1 to 0.
DECAYS = {"linear": lambda left: left, "none": lambda left: 1.0}


# ---- training loop ------------------------------------------------------------------------------

def classifier_forward(model, batch):
    """Return (logits (batch, labels), label ids (batch,)).

    >>> bert, tokenizer = load_bert("data/sample/bert")
    >>> batch = dict(pad([[2, 7, 8, 3], [2, 7, 3]], 0), labels=torch.tensor([1, 0]))
    >>> logits, labels = classifier_forward(bert, batch)
    >>> tuple(logits.shape), labels.tolist()
    ((2, 2), [1, 0])
    """
    return classifier_outputs(model, batch), batch["labels"]


def mlm_forward(model, batch):
    """Return (logits (masked, vocabulary), ids (masked,)): the head runs where a loss is taken.

    >>> bert, tokenizer = load_bert("data/sample/bert", "mlm")
    >>> batch = dict(pad([[2, 7, 8, 3]], tokenizer.pad_token_id),
    ...              labels=torch.tensor([[IGNORE, 7, IGNORE, IGNORE]]))
    >>> logits, targets = mlm_forward(bert, batch)
    >>> tuple(logits.shape), targets.tolist()  # at the one position that is asked for
    ((1, 1374), [7])
    """
    if "masked" not in batch:
        batch = pick_targets(batch)
    hidden = hidden_states(model, batch).flatten(0, 1).index_select(0, batch["masked"])
    return model.cls.predictions(hidden), batch["labels"]


def count_targets(window):
    """Return the number of targets that a loss is taken at in some micro-batches."""
    return sum(int((batch["labels"] != IGNORE).sum()) for batch in window)


def summed_loss(forward, model, batch, device, precision="auto"):
    """Return the sum of cross entropies over the targets of a micro-batch, a scalar tensor."""
    if not count_targets([batch]):  # torch 1.3 cannot take the loss of nothing
        return next(p for p in model.parameters() if p.requires_grad).sum() * 0
    with autocast(device, precision):
        logits, targets = forward(model, to_device(batch, device))
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def accumulate(model, micro_batches, n_targets, forward, precision="auto", seed=0, scaler=None):
    """Add up the gradients of a step's mean loss, micro-batch by micro-batch; return that loss.

    Each micro-batch gives the sum of its losses over the number of targets of the whole step, so
    the gradients are those of one large batch, however it was split. (A mean of the micro-batches'
    means is not: a review in a small one would weigh more.) seed: of what is dropped on a CPU.
    scaler: a LossScaler, for fp16. Raises OutOfMemory.

    >>> bert, tokenizer = load_bert("data/sample/bert")
    >>> whole = dict(pad([[2, 7, 8, 3], [2, 7, 9, 3]], 0), labels=torch.tensor([1, 0]))
    >>> loss = accumulate(bert, [whole], 2, classifier_forward)
    >>> bert.classifier.bias.grad is not None
    True
    >>> halves = [{key: value[i:i + 1] for key, value in whole.items()} for i in (0, 1)]
    >>> abs(float(accumulate(bert, halves, 2, classifier_forward) - loss)) < 1e-6
    True
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_and_gradients(numbered):
        number, batch = numbered
        with torch.enable_grad(), random_stream(seed, number):
            part = summed_loss(forward, model, batch, device, precision) / max(n_targets, 1)
            return part.detach(), gradients_of(scaler.scale(part) if scaler else part, learned)

    loss, short = torch.zeros((), device=device), ""
    # Processes deal the micro-batches out; the cores of a CPU take one each at a time.
    share = my_share(list(enumerate(micro_batches)),
                     [batch["input_ids"].numel() for batch in micro_batches])
    try:
        with sparse_embeddings(model, device):
            learned = [p for p in model.parameters() if p.requires_grad]  # tied weights apart
            for part, gradients in parallel_map(loss_and_gradients, share, device):
                loss += part
                add_gradients(learned, gradients)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        short = str(error) or "out of memory"
    return sum_step(parameters, loss, short)


def fit(model, batches, n_steps, steps_per_epoch, forward, config, evaluate=None, checkpoint="",
        log_dir="", what="training"):
    """Train for n_steps optimizer steps (or max_minutes); return the history, a list of dicts.

    batches(step) gives the micro-batches of a step, forward is classifier_forward or mlm_forward,
    evaluate(model) gives a dict of metrics, at the start and EVALUATIONS times. checkpoint: a
    file; the run goes on from it, on a CPU bit for bit, and leaves one when it is stopped.
    Raises Diverged when the loss or the gradient is NaN or infinite; on a GPU, which is not
    waited for, a step later.

    >>> bert, tokenizer = load_bert("data/sample/bert")
    >>> batch = dict(pad([[2, 7, 8, 3], [2, 9, 8, 3]], 0), labels=torch.tensor([1, 0]))
    >>> history = fit(bert, lambda step: [batch], 20, 20, classifier_forward, make_config(lr=1e-3))
    >>> len(history), history[-1]["loss"] < history[0]["loss"]
    (20, True)
    """
    optimizer = make_optimizer(model, config)
    run = Run(model, optimizer, batches, config, n_steps, steps_per_epoch, evaluate, checkpoint,
              log_dir, what)
    with run.guarded():  # resumes, measures, shows progress, keeps a checkpoint when stopped
        while run.progress < 1:  # share of the steps done, or of max_minutes spent
            # Warm-up and decay count optimizer steps, not micro-batches: the last rate is near 0.
            lr = config.lr * lr_factor(run.progress, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Which reviews a step sees and what it drops depend on seeds and step alone, so a
            # resumed run goes on as the undisturbed one would.
            seed = run.seed_dropout()
            micro_batches = run.batches(run.step)  # a GPU's: made while it was at the last step
            n_targets = count_targets(micro_batches)  # reviews, or masked tokens, of the step
            try:
                loss = accumulate(model, micro_batches, n_targets, forward, config.precision,
                                  seed, run.scaler)
            except OutOfMemory as error:
                run.halve(micro_batches, error)
                continue  # the same step again
            run.scaler.unscale(optimizer)  # fp16: before the norm is taken
            # One norm over all gradients, in nats; where it is larger than clip_norm, every
            # gradient shrinks by the same factor. What comes back is the norm before that.
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            if run.scaler.overflowed(loss, norm):
                run.skip()
                continue  # fp16: the same step again, its loss scaled less
            run.expect(lr, n_targets, loss, norm)  # Diverged: on a CPU before the step
            with uninterrupted():  # whatever stops the run, a step is whole
                optimizer.step()
                clear_gradients(model)  # else the next step would add to them
                run.record()
            run.after_step()  # measures where that is due, writes a checkpoint a minute
    return run.history


# ---- classifier: train, predict, classify -------------------------------------------------------

GRADING_MINUTES = 30  # what the grading server allows for pretrain, for train, for classification


def settings(config):
    """Return a config as a dict, less model and device; precision: what is used, if not fp32."""
    kind = (config.device or ("cuda" if torch.cuda.is_available() else "cpu")).split(":")[0]
    used = dict(vars(config), precision=used_precision(config.precision, kind))
    return {key: value for key, value in sorted(used.items())
            if key not in ("model", "device") and (key, value) != ("precision", "fp32")}


NAMED = ("seq_len", "keep", "words", "batch_size", "accumulation", "epochs", "lr", "optimizer",
         "weight_decay", "warmup", "decay", "clip_norm", "dropout", "attention_dropout",
         "whole_word", "max_minutes", "seed", "data_seed", "precision")


def named_settings(config):
    """Return the settings that enter the names of trials, runs and pretrainings.

    Those of NAMED always; of a hyperparameter that is newer only what is not its default, so that
    adding one renames nothing. Whoever changes such a default raises RESULTS_VERSION.
    """
    default = settings(Config())
    return {key: value for key, value in settings(config).items()
            if key in NAMED or value != default[key]}


def check_many(values, what="texts"):
    """Return values as a list; refuse one string, and a mapping or table: they give keys."""
    if isinstance(values, (str, bytes)):
        raise InputError(f"{what}: one string, {values[:20]!r}; give a list of strings")
    if isinstance(values, collections.abc.Mapping) or hasattr(values, "columns") or not hasattr(
            values, "__iter__"):
        raise InputError(f"{what}: of type {type(values).__name__}; give a list of strings")
    return list(values)


def check_texts(texts, labels=None):
    """Return (texts, label ids) as lists; refuse what cannot be trained on or classified."""
    texts, labels = check_many(texts), None if labels is None else check_many(labels, "labels")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {i} is of type {type(text).__name__}; texts are strings")
    ids = [] if labels is None else [LABEL_IDS.get(str(label)) for label in labels]
    if labels is not None and len(texts) != len(ids):
        raise InputError(f"{len(ids)} labels for {len(texts)} texts; they must be as many")
    if None in ids:
        raise InputError(f"label {labels[ids.index(None)]!r}: labels are neg and pos")
    return texts, ids


def prepare(texts, tokenizer, config):
    """Return the Tokens of the texts, of their first/last `words` when asked to.

    >>> _, tokenizer = load_bert("data/sample/bert")
    >>> prepare(["a good film with a bad ending"], tokenizer, make_config(words=2, keep="tail"))
    Tokens of 1 texts: 2 in all, 2 to 2 a text
    """
    check_seq_len(config.seq_len, tokenizer)
    texts = [truncate_words(text, config.words, config.keep) for text in check_many(texts)]
    return tokenize_all(texts, tokenizer)


def start(config, head, content):
    """Return (model on its device, tokenizer, key of the run) for `train` and `pretrain`."""
    model, tokenizer = load_bert(config.model, head, config.dropout, config.attention_dropout,
                                 config.seed, pooling=config.pooling)
    known = (head, named_settings(config), model_digest(model, tokenizer), VERSIONS,
             RESULTS_VERSION)
    key = digest_of(itertools.chain(known, content))[:32]
    return model.to(pick_device(config.device)), tokenizer, key


def check_dev(dev, n_eval):
    """Return (texts, label_ids, n_eval) of the reviews held out, ([], 0, 0) for none."""
    if not dev:
        return [], 0, 0
    if isinstance(dev, str) or len(dev) != 2:
        raise InputError("dev must be (texts, labels): of a Part, part[1:]")
    texts, label_ids = check_texts(*dev)
    if not texts or len(texts) != len(label_ids) or n_eval < 1:
        raise InputError("dev must be (texts, labels), not empty, and n_eval 1 or more")
    return texts, label_ids, n_eval


def learning_curve(parts, n_eval, tokenizer, config):
    """Return evaluate(model), a curve's point: {"train_loss", "train_accuracy", "dev_loss", ...}.

    parts: name -> (texts, label_ids); about n_eval reviews of each, evenly spread, are measured.
    """
    measured = {}
    for name, (texts, label_ids) in parts.items():
        every = math.ceil(len(texts) / n_eval)
        measured[name] = prepare(texts[::every], tokenizer, config), label_ids[::every]

    def evaluate(model):
        return {f"{name}_{key}": value for name, (tokens, label_ids) in measured.items()
                for key, value in measure(model, tokens, label_ids, tokenizer, config).items()}
    return evaluate


@exclusive
def train(texts, labels, pretrain_params=None, dev=None, n_eval=500, log_dir="", save_as="",
          hold=False, **overrides):
    """Fine-tune BERT on all the given reviews; return the params that `classify` takes.

    pretrain_params: what `pretrain` returned: BERT starts from there. dev: (texts, labels) held
    out; n_eval of them, and of the training reviews, give the learning curve. log_dir: of
    TensorBoard. save_as: stem of the history's .json and .csv. overrides: fields of Config.
    An unfinished run of the same texts, labels, model and settings is resumed; a finished one is
    never reused, unless hold=True leaves it to the same call until params["run"] is removed.

    >>> params = train(["a good film", "a bad film"], ["pos", "neg"], model="data/sample/bert",
    ...                seq_len=8, batch_size=2, epochs=20, lr=1e-3)
    >>> params["history"][-1]["step"], classify(["a good film", "a bad film"], params)
    (20, ['pos', 'neg'])
    """
    config = make_config(**overrides)
    refuse_setting(config, "freeze", "pretrain only; a classifier on a fixed BERT is "
                                     "frozen_regression on frozen_features")
    refuse_setting(config, "whole_word", "pretrain only")
    if pretrain_params is not None:
        config = dataclasses.replace(config, model=pretrained_folder(pretrain_params))
        say(f"training starts from {describe(pretrain_params)}")
    texts, label_ids = check_texts(texts, labels)
    if len(set(label_ids)) < 2:
        raise InputError("the training reviews do not carry both labels, neg and pos")
    dev_texts, dev_ids, n_eval = check_dev(dev, n_eval)
    with kept_random_state(config.device):  # whoever calls keeps their own random stream
        model, tokenizer, key = start(config, "classifier", itertools.chain(
            [label_ids, (dev_ids, n_eval)], map(utf8, texts + dev_texts)))
        evaluate = learning_curve({"train": (texts, label_ids), "dev": (dev_texts, dev_ids)},
                                  n_eval, tokenizer, config) if dev else None
        per_epoch = math.ceil(len(texts) / config.batch_size)
        batches = classifier_batches(prepare(texts, tokenizer, config), label_ids, config,
                                     tokenizer, next(model.parameters()).device)
        run = os.path.join(cache_dir("runs"), key + ".checkpoint")
        with locked_checkpoint(run):
            history = fit(model, batches, config.epochs * per_epoch, per_epoch,
                          classifier_forward, config, evaluate, run, log_dir)
    if not hold:
        remove_if_there(run)
    elif not processes()[0]:
        save_checkpoint(run, model, None, history, math.inf)  # inf: no time is left of a budget
    if save_as:
        save_history(save_as, history)
    return {"model": model, "tokenizer": tokenizer, "config": config, "history": history,
            "pretrained": pretrain_params, "run": run}


train.getdoc = functools.partial(help_of, train)  # Jupyter asks for it


def predict_logits(model, tokens, tokenizer, config, what=""):
    """Return the logits of all texts in their order, float32 (n, labels) on the CPU.

    Reviews of like length go together, so little is padded; padding changes no prediction.
    what: a name for the progress bar and the estimate; silent without one.

    >>> bert, tokenizer = load_bert("data/sample/bert")
    >>> config = make_config(seq_len=16)
    >>> tokens = prepare(["a good film", "bad"], tokenizer, config)
    >>> tuple(predict_logits(bert, tokens, tokenizer, config).shape)
    (2, 2)
    """
    device = next(model.parameters()).device
    lengths = [min(n, config.seq_len - 2) + 2 for n in tokens.lengths]
    unpadded = isinstance(model, BertForSequenceClassification) and unpads(model, config.precision)
    # Processes deal the reviews out; the batches of each are as large as those of one alone.
    mine = deal(lengths, processes()[1])[processes()[0]]
    limits = cpu_limits(64, config) if device.type == "cpu" else calm_limits(
        device, config.precision, unpadded)
    logits = torch.zeros(len(tokens), model.config.num_labels)
    bar = progress_bar(sum(lengths[i] for i in mine), what, "token") if what else None
    training, started, done, told = model.training, time.time(), 0, not what
    model.eval()

    def logits_of(group):
        rows = [add_special_tokens(tokens[i], config.seq_len, config.keep, tokenizer)
                for i in group]
        batch = pad(rows, tokenizer.pad_token_id)
        if isinstance(model, BertForSequenceClassification):  # else it needs the mask
            batch = ready_batch(batch, device, unpadded)
        with inference_mode(), autocast(device, config.precision):
            return classifier_outputs(model, to_device(batch, device)).float()

    groups = [[mine[i] for i in group]
              for group in micro_batches([lengths[i] for i in mine], *limits)]
    for group, some in zip(groups, one_behind(parallel_map(logits_of, groups, device), device)):
        logits[group] = some
        done += sum(lengths[i] for i in group)
        if what:
            bar.update(sum(lengths[i] for i in group))
        elapsed = time.time() - started
        if not told and elapsed > 5:
            told = True
            report_estimate(what, len(tokens), elapsed * sum(lengths[i] for i in mine) / done / 60)
    if what:
        bar.close()
    model.train(training)
    if processes()[1] > 1:
        logits = all_sum(logits.to(device)).cpu()
    return check_finite(logits)


def check_finite(outcome):
    """Return what a model gave, a tensor or a number; Diverged where it is NaN or infinite.

    The loss of a step is taken before its update, so the last update may break a model unseen.
    """
    if not torch.isfinite(torch.as_tensor(outcome)).all():
        raise Diverged("the model gives NaN or infinite numbers: its training diverged; lower lr "
                       "or lengthen warmup")
    return outcome


def report_estimate(what, n, minutes):
    """Print how long a prediction will take, and warn when grading would cut it off."""
    say(f"{what} {n:,} reviews: about {minutes:.1f} minutes")
    if minutes > GRADING_MINUTES:
        warn(f"that is more than the {GRADING_MINUTES} minutes that grading allows; a smaller "
             f"seq_len is faster")


def measure(model, tokens, label_ids, tokenizer, config):
    """Return {loss: mean cross entropy in nats, accuracy: share right} on labelled tokens."""
    logits, targets = predict_logits(model, tokens, tokenizer, config), torch.tensor(label_ids)
    return {"loss": float(F.cross_entropy(logits, targets)),
            "accuracy": float((logits.argmax(1) == targets).float().mean())}


LABELS = sorted(LABEL_IDS, key=LABEL_IDS.get)  # in the order of the model's outputs


def classify(texts, params, **overrides):
    """Return the label of each text, in order; params: of `train` or `load_classifier`.

    >>> params = train(["good", "bad"], ["pos", "neg"], model="data/sample/bert", seq_len=8,
    ...                batch_size=2, epochs=20, lr=1e-3)
    >>> classify(["bad", "good"], params)
    ['neg', 'pos']
    """
    return labels_of(classifier_logits(texts, params, **overrides))


def labels_of(logits):
    """Return the label of each text by its logits, (n, 2).

    >>> labels_of(torch.tensor([[0.5, -0.5], [0.1, 0.2]]))
    ['neg', 'pos']
    """
    return [LABELS[i] for i in logits.argmax(1).tolist()] if len(logits) else []


def probabilities(texts, params, **overrides):
    """Return each label's probability, float32 (n, 2): columns as in LABEL_IDS, rows sum to 1.

    >>> params = train(["good", "bad"], ["pos", "neg"], model="data/sample/bert", seq_len=8,
    ...                batch_size=2, epochs=20, lr=1e-3)
    >>> bool(probabilities(["good"], params)[0, LABEL_IDS["pos"]] > 0.5)
    True
    """
    return classifier_logits(texts, params, **overrides).softmax(1)


# What may differ from the training's.
CLASSIFYING = "seq_len", "keep", "words", "views", "precision", "device"


def classifier_logits(texts, params, what="classifying", **overrides):
    """Return the logits of texts, float32 (n, 2) on the CPU, as params' own settings cut them.

    what: a name for the progress bar, silent without one. overrides: those fields of Config that
    CLASSIFYING names; the others were fixed by the training.
    """
    check_params(params)
    config = make_config(vars(params["config"]), **overrides)
    fixed = [key for key in overrides if key not in CLASSIFYING]
    if fixed:
        raise InputError(f"{fixed[0]}={overrides[fixed[0]]!r}: fixed by the training; classifying "
                         f"takes {', '.join(CLASSIFYING)}")
    texts, _ = check_texts(texts)
    if not texts:
        return torch.zeros(0, len(LABELS))
    model, tokenizer = params["model"].to(pick_device(config.device)), params["tokenizer"]
    tokens = prepare(texts, tokenizer, config)
    logits = predict_logits(model, tokens, tokenizer, config, what)
    cut = [i for i, n in enumerate(tokens.lengths) if n > config.seq_len - 2]
    if config.views and cut:
        some = tokens.take(cut)
        logits[cut] = torch.stack([logits[cut], *(predict_logits(
            model, some, tokenizer, dataclasses.replace(config, keep=keep),
            what and f"{what} again by {keep}")
            for keep in TRUNCATIONS if keep != config.keep)]).mean(0)
    return logits


def check_params(params):
    """Refuse what neither `train` nor `load_classifier` returned."""
    if not isinstance(params, dict) or not {"model", "tokenizer", "config"} <= set(params):
        raise InputError(f"params is of type {type(params).__name__} without model, tokenizer and "
                         f"config; give what train or load_classifier returned")


def save_classifier(folder, params):
    """Write a trained classifier as a folder; it appears whole, in the place of an older one.

    `load_classifier` reads it, and so do transformers' own BertForSequenceClassification (which
    knows pooling "cls" alone) and BertTokenizer, on either stack, whichever wrote it.
    """
    check_params(params)
    place = check_place(folder)
    for parameter in params["model"].parameters():
        check_finite(parameter)
    config = params["config"]
    note = {"labels": LABELS, "model": config.model, "versions": VERSIONS,
            "config": dict(settings(config), precision=config.precision),
            "pretrained": params.get("pretrained")}
    save_bert(place, params["model"], params["tokenizer"], note,
              params.get("history"), replace=True, num_labels=len(LABELS), label2id=LABEL_IDS,
              id2label=dict(enumerate(LABELS)), architectures=["BertForSequenceClassification"])


def load_classifier(folder):
    """Return what `train` returned, from a folder of `save_classifier`; InputError if damaged."""
    place = find_path(folder)
    if not folder or not os.path.isdir(place):
        raise InputError(f"{folder}: no such folder; give one that save_classifier, or --save, "
                         f"wrote")
    note = sound_note(place)
    if note is None and os.path.exists(os.path.join(place, "note.json")):
        raise InputError(f"{folder}: a file of it is damaged or missing (the checksum differs); "
                         f"save the classifier again")
    if "labels" not in (note or {}):
        raise InputError(f"{folder}: not written by save_classifier or --save; a BERT to train is "
                         f"given as model= or --model")
    if note["labels"] != LABELS:
        raise InputError(f"{folder}: its labels are {', '.join(note['labels'])}, not "
                         f"{', '.join(LABELS)}")
    unknown = set(note["config"]) - set(vars(Config()))
    if unknown:
        raise InputError(f"{folder}: saved by a version of helpers.py that has other settings "
                         f"({', '.join(sorted(unknown))}); train and save the classifier again")
    kept = dict(note["config"], model=place)
    if not rule_of("precision")[1](kept.get("precision", "auto")):  # a half, on the pinned stack
        kept["precision"] = "auto"
    config = make_config(**kept)
    model, tokenizer = load_bert(place, "trained", config.dropout, config.attention_dropout,
                                 pooling=config.pooling)
    history = []
    with contextlib.suppress(FileNotFoundError), open(
            os.path.join(place, "history.json"), encoding="utf-8") as file:
        history = json.load(file)
    return {"model": model, "tokenizer": tokenizer, "config": config, "history": history,
            "pretrained": note["pretrained"], "run": ""}


def accuracy(labels, predicted):
    """Return the share of labels that equal the predicted ones, compared as strings."""
    labels, predicted = check_many(labels, "labels"), check_many(predicted, "predicted")
    if len(labels) != len(predicted) or not len(labels):
        raise InputError(f"{len(predicted)} predictions for {len(labels)} labels")
    return sum(str(a) == str(b) for a, b in zip(labels, predicted)) / len(labels)


# ---- masked LM: pretrain ------------------------------------------------------------------------

HELD_OUT = 200     # texts (a tenth of all at most) that the MLM loss is measured on
MASKED_SHARE = 0.15  # of the tokens; 80/10/10 as in Devlin et al. 2019, 3.1


def distinct_texts(texts):
    """Return the distinct non-blank texts of an iterable of texts, or of iterables of texts."""
    flat = itertools.chain.from_iterable(
        [item] if isinstance(item, str) or not hasattr(item, "__iter__") else check_many(item)
        for item in check_many(texts))
    return [text for text in dict.fromkeys(check_texts(flat)[0]) if text.strip()]


def windows_of(lengths, size):
    """Return (text, start, end) windows of at most `size` tokens; nothing is dropped or glued.

    A long text gives windows of equal length (to a token), so that none is a short rest.

    >>> windows_of([5, 2], size=3)
    [(0, 0, 2), (0, 2, 5), (1, 0, 2)]
    """
    windows = []
    for i, n in enumerate(lengths):
        parts = math.ceil(n / size)
        edges = [n * part // max(parts, 1) for part in range(parts + 1)]
        windows.extend((i, start, end) for start, end in zip(edges, edges[1:]))
    return windows


def mask_tokens(input_ids, maskable, mask_id, vocab_size, random, continues=None):
    """Return (corrupted input_ids, labels), both (batch, seq) int64; Devlin et al. 2019, 3.1.

    15 % of the maskable tokens are chosen; of these 80 % become [MASK], 10 % a random token and
    10 % stay. labels: the original id where chosen, else IGNORE. random: a CPU torch.Generator.
    continues: (batch, seq) bool, tokens that go on a word: then whole words are chosen.

    >>> ids = torch.arange(10, 110)[None]  # (1, 100)
    >>> corrupted, labels = mask_tokens(ids, ids > 0, mask_id=4, vocab_size=200,
    ...                                 random=torch.Generator().manual_seed(0))
    >>> asked = labels != IGNORE
    >>> bool((corrupted == ids)[~asked].all()), bool((labels == ids)[asked].all())
    (True, True)
    """
    draw, fate = (torch.rand(input_ids.shape, generator=random) for _ in range(2))
    if continues is not None:
        word = (~continues).to(torch.int64).cumsum(1) - 1  # index of a token's word, (batch, seq)
        draw = draw.gather(1, word.clamp(min=0))
    chosen = (draw < MASKED_SHARE) & maskable
    labels = torch.where(chosen, input_ids, torch.full_like(input_ids, IGNORE))
    other = torch.randint(vocab_size, input_ids.shape, generator=random, dtype=torch.int64)
    corrupted = torch.where(chosen & (fate < 0.8), torch.full_like(input_ids, mask_id), input_ids)
    return torch.where(chosen & (fate >= 0.9), other, corrupted), labels


def masked_batches(tokens, tokenizer, config, device):
    """Return (windows, random) -> their micro-batches, with fresh masks drawn from `random`."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    continues = torch.tensor([word.startswith("##") for word in words])
    ordinary = torch.ones(len(tokenizer), dtype=torch.bool)
    ordinary[tokenizer.all_special_ids] = False

    def batches(windows, random):
        rows = [add_special_tokens(tokens[i][start:end], config.seq_len, "head", tokenizer)
                for i, start, end in windows]
        lengths, whole = list(map(len, rows)), pad(rows, tokenizer.pad_token_id)
        ids = whole["input_ids"]  # masked as a whole: micro-batches change no mask
        whole["input_ids"], whole["labels"] = mask_tokens(
            ids, ordinary[ids], tokenizer.mask_token_id, len(tokenizer), random,
            continues[ids] if config.whole_word else None)
        return [{key: value[micro, :lengths[micro[0]]] for key, value in whole.items()}
                for micro in split_step(lengths, config, device)]
    return batches


def mlm_loss(model, batches, device, precision="auto"):
    """Return the mean cross entropy in nats over some batches' masked positions; None for none."""
    def loss_of(batch):
        with inference_mode():
            return float(summed_loss(mlm_forward, model, batch, device, precision))

    training = model.training
    model.eval()
    targets, unpadded = count_targets(batches), unpads(model, precision)
    share = [ready_batch(batch, device, unpadded) for batch in my_share(batches)]
    loss = sum(parallel_map(loss_of, share, device))
    model.train(training)
    return check_finite(all_sum(loss, device) / targets) if targets else None


@exclusive
def pretrain(texts, parts=(), log_dir="", **overrides):
    """Train BERT further by masked LM on the texts; return what `train` takes, small to pickle.

    texts: an iterable of str or of iterables of str; blank and repeated ones are left out. parts:
    names of the parts they come from, for the record. overrides: fields of Config; some default to
    MLM_DEFAULTS. A finished pretraining of the same texts, model and settings is found again by
    content; an unfinished one goes on.

    >>> texts = ["a good film", "a bad film", "the worst film of all", "what a lovely story"]
    >>> params = pretrain(texts, model="data/sample/bert", seq_len=16, epochs=1)
    >>> params["n_texts"], params["n_held_out"]
    (4, 1)
    """
    config = make_config(MLM_DEFAULTS, **overrides)
    refuse_setting(config, "pooling", "train only, masked LM reads all")
    refuse_setting(config, "views", "classifying only, masked LM reads all")
    texts, parts = distinct_texts(texts), check_many(parts, "parts")
    if len(texts) < 2:
        raise InputError(f"{len(texts)} different non-blank texts; pretrain needs 2 or more")
    with kept_random_state(config.device):
        model, tokenizer, key = start(config, "mlm", map(utf8, texts))
        folder = os.path.join(cache_dir("pretrained"), key)
        note = read_note(folder)
        if note is None:
            with locked_checkpoint(folder + ".checkpoint"):
                run_mlm(model, tokenizer, texts, config, folder, log_dir)
            note = read_note(folder)
        else:
            say("pretraining of the same texts and settings found: not repeated")
    return dict(note, path=folder, parts=parts)


pretrain.getdoc = functools.partial(help_of, pretrain, MLM_DEFAULTS)


def run_mlm(model, tokenizer, texts, config, folder, log_dir=""):
    """Train by masked LM and save the model as a folder with its note and history."""
    if config.freeze:
        freeze_encoder(model)
    device, tokens = next(model.parameters()).device, prepare(texts, tokenizer, config)
    order = torch.randperm(len(texts), generator=generator("held out")).tolist()
    held = set(order[:min(HELD_OUT, max(1, len(texts) // 10))])
    windows = windows_of(tokens.lengths, config.seq_len - 2)
    make = masked_batches(tokens, tokenizer, config, device)
    fixed = make([w for w in windows if w[0] in held], generator("held-out masks"))
    windows = [w for w in windows if w[0] not in held]
    if not windows:
        raise InputError("the texts hold no tokens to learn from")

    def batches(step):
        chosen = sample_of_step(len(windows), config.batch_size, step, config.data_seed)
        return make([windows[i] for i in chosen], generator("masks", config.data_seed, step))

    def measure_held_out(model):
        return {"held_out_loss": mlm_loss(model, fixed, device, config.precision)}

    per_epoch = math.ceil(len(windows) / config.batch_size)
    history = fit(model, batches, config.epochs * per_epoch, per_epoch, mlm_forward, config,
                  measure_held_out, folder + ".checkpoint", log_dir, "pretraining")
    curve = [row for row in history if "held_out_loss" in row]
    if not processes()[0]:
        save_bert(folder, model, tokenizer, {
            "key": os.path.basename(folder), "model": config.model, "n_texts": len(texts),
            "n_held_out": len(held), "curve": curve, "n_windows": len(windows),
            "config": settings(config), "versions": VERSIONS,
            "loss_before": curve[0]["held_out_loss"], "loss_after": curve[-1]["held_out_loss"],
            "minutes": history[-1]["seconds"] / 60}, history, architectures=["BertForPreTraining"])
        remove_if_there(folder + ".checkpoint")
    wait_for_all()


def freeze_encoder(model):
    """Let the masked-LM head alone learn, so that a new one is fitted before it moves the encoder.

    Its transform and bias, that is: its output matrix is the encoder's word embeddings (tied).

    >>> bert, _ = load_bert("data/sample/bert", "mlm")
    >>> freeze_encoder(bert)
    >>> [name for name, p in bert.named_parameters() if p.requires_grad][0]
    'cls.predictions.bias'
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("cls.predictions."))


def pretrained_folder(pretrain_params):
    """Return the folder that `pretrain` left; InputError unless it is there and sound."""
    if not isinstance(pretrain_params, dict) or "path" not in pretrain_params:
        raise InputError(f"pretrain_params is of type {type(pretrain_params).__name__}; give what "
                         f"pretrain() returned")
    if read_note(pretrain_params["path"]) is None:
        raise InputError(f"{pretrain_params['path']}: the pretrained weights are gone or damaged; "
                         f"call pretrain again")
    return pretrain_params["path"]


def describe(pretrain_params):
    """Return one line on a pretraining: texts, parts, held-out loss and perplexity."""
    p, parts = pretrain_params, ", ".join(pretrain_params["parts"])
    return (f"MLM pretraining on {p['n_texts']:,} texts{parts and ' of ' + parts} "
            f"(held-out {held_out_loss(p)})")


def held_out_loss(pretrain_params):
    """Return a pretraining's loss and perplexity, before and after, in words."""
    losses = pretrain_params["loss_before"], pretrain_params["loss_after"]
    if None in losses:
        return "loss not measured: no token of the held-out texts is masked"
    return "loss %.3f -> %.3f, perplexity %.1f -> %.1f" % (*losses, *map(perplexity, losses))


def perplexity(loss):
    """Return e to the mean cross entropy in nats."""
    return math.exp(min(loss, 700))


# ---- baselines ----------------------------------------------------------------------------------

def majority_accuracy(train_labels, labels):
    """Return the accuracy of always saying the commonest training label."""
    commonest = Counter(check_many(train_labels, "labels")).most_common(1)[0][0]
    return accuracy(labels, [commonest] * len(labels))


WORD = r"\w+"  # what counts as a word; scikit-learn's default drops those of one letter


def texts_as_read(texts, tokenizer, config):
    """Return what BERT reads of each text, as words: its kept words, then its kept tokens."""
    tokens = prepare(texts, tokenizer, config)
    kept = (truncate(tokens[i], config.seq_len - 2, config.keep) for i in range(len(tokens)))
    return [" ".join(tokenizer.convert_ids_to_tokens(ids)).replace(" ##", "") for ids in kept]


def naive_bayes(texts, labels, unseen):
    """Return labels for the `unseen` texts by a multinomial naive Bayes with add-one smoothing.

    A word counts once a text: whether it occurs tells more than how often. Source: Wang & Manning
    2012, Baselines and Bigrams, ACL, section 2.1 (their "binarized" counts).
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    words = CountVectorizer(binary=True, token_pattern=WORD)
    return fit_and_label(words, MultinomialNB(), texts, labels, unseen)


def tfidf_regression(texts, labels, unseen):
    """Return labels for the `unseen` texts by a logistic regression over words and word pairs.

    Weighted by TF-IDF with logarithmic counts. C = 10 gives the stronger baseline: 80.0 % on the
    sample's dev against 78.2 % with C = 1; by cross-validation 1, 10 and 100 are alike.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=WORD)
    model = LogisticRegression(C=10.0, solver="liblinear", max_iter=1000)  # alike in old and new
    return fit_and_label(words, model, texts, labels, unseen)


def fit_and_label(words, model, texts, labels, unseen):
    """Return the labels of the `unseen` texts by a model over word features, a list of str."""
    labels, (unseen, _) = check_many(labels, "labels"), check_texts(unseen)
    texts, _ = check_texts(texts, labels)
    try:
        features = words.fit_transform(texts)
    except ValueError:  # scikit-learn's word for it: empty vocabulary
        raise InputError("the training reviews hold no word for a baseline; are they empty, or is "
                         "words= too small?") from None
    return [str(label) for label in model.fit(features, labels).predict(words.transform(unseen))]


class Pooled(torch.nn.Module):
    """A BERT whose "logits" are one vector a text, so that `predict_logits` makes its batches."""

    def __init__(self, bert, pooling):
        super().__init__()
        self.bert, self.pool = bert, POOLINGS[pooling]
        self.config = types.SimpleNamespace(num_labels=bert.config.hidden_size)

    def forward(self, input_ids, attention_mask):
        """Return (features,) of a batch, (batch, hidden)."""
        hidden = self.bert(input_ids, attention_mask=attention_mask)[0]
        return (self.pool(hidden.float(), {"attention_mask": attention_mask}),)


def frozen_features(texts, model, tokenizer, config, pooling="mean"):
    """Return one vector a text of a BERT as it is, float32 (n, hidden), as a numpy array.

    pooling: "mean" of the last hidden states of all real tokens, [CLS] and [SEP] too, as sentence
    encoders are trained (Reimers & Gurevych 2019), or "cls", the last hidden state of [CLS].
    model: from load_bert; config: what of a text is read, as in training.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling={pooling!r}: must be {' or '.join(sorted(POOLINGS))}")
    tokens = prepare(texts, tokenizer, config)
    return predict_logits(Pooled(model.bert, pooling).train(model.training), tokens,
                                  tokenizer, config).numpy()


def frozen_regression(features, labels, unseen):
    """Return labels for `unseen` features by a logistic regression over standardized features.

    C = 0.01: of 0.001 to 1 within 1.2 points of the best, by cross-validation on 1,000 reviews.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, solver="liblinear",
                                                               max_iter=1000))
    return [str(label) for label in model.fit(features, labels).predict(unseen)]
