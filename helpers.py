"""Fine-tune BERT on film reviews: everything that the notebooks and evaluate.py share.

    from helpers import load_filimdb, train, classify, accuracy
    data = load_filimdb("data/FILIMDB")
    params = train(data["train"].texts, data["train"].labels, seq_len=256, epochs=2)
    print(accuracy(data["dev"].labels, classify(data["dev"].texts, params)))

One file that reads in the order in which the data flows: hyperparameters -> files -> data -> text
to pieces -> model -> batches -> optimizer and schedule -> training loop -> classifier -> masked LM
-> floor to beat. It needs torch, transformers, numpy and tqdm only, works alone under another name
(`cp helpers.py classifier.py` is how it is handed in), and importing it changes nothing.
"""
from __future__ import annotations

import array
import collections
import collections.abc
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import functools
import glob
import hashlib
import inspect
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
)

HERE = os.path.dirname(os.path.abspath(__file__))
LABEL_IDS = {"neg": 0, "pos": 1}
IGNORE = -100  # the label id of a position that no loss is taken at
GRADING_MINUTES = 30  # what the grading server allows for pretrain, for train, for classification


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line with the remedy."""

    def __init__(self, message):
        """Take the message, less what a terminal would obey."""
        super().__init__(printable(message))


class Diverged(ArithmeticError):
    """The loss or the gradient became NaN or infinite."""


def warn(message):
    """Print a warning, one line."""
    say(f"Warning: {printable(message)}")


def printable(text):
    """Return a text with a blank for each terminal escape and each other control character."""
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x1f\x7f-\x9f]", " ", text)


# ---- hyperparameters ---------------------------------------------------------------------------

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
    seq_len: int = 512         # pieces with [CLS] and [SEP]; the model's limit [S]
    keep: str = "head+tail"    # pieces that survive truncation; best of three in [S], table 2
    words: int = 0             # first/last words kept before tokenization (side: keep); 0 = all
    batch_size: int = 32       # reviews an optimizer step sees [A]; 24 in [S]
    accumulation: int = 4      # least number of micro-batches they are split into [A]
    epochs: int = 3            # passes over the texts; at most 4 in [S], 2-4 in [D]
    lr: float = 2e-5           # peak learning rate [S], figure 3
    optimizer: str = "adam"    # adam [A] (weight_decay is then L2 in the gradient) or adamw
    weight_decay: float = 0.0  # on matrices only, not on biases and LayerNorm [A]; 0.01 in [D]
    warmup: float = 0.1        # share of all optimizer steps [S, D]
    decay: str = "linear"      # after warm-up: linear (to 0) or none [D]
    clip_norm: float = 1.0     # largest L2 norm of the whole gradient; 0 = no clipping [D's code]
    dropout: float = 0.1       # on embeddings, layer outputs and the classifier's input [D]
    attention_dropout: float = 0.1  # on attention weights [D]
    whole_word: bool = False   # pretrain only: mask whole words instead of single pieces
    max_minutes: float = 0.0   # time budget of the call; 0 = none
    seed: int = 0              # new layers and dropout
    data_seed: int = 0         # order of the reviews, masks
    precision: str = "auto"    # fp32, bf16, or auto: bf16 on a GPU that can, else fp32 [M]
    device: str = ""           # cuda, cuda:1, cpu; empty = cuda if there is one, else cpu


# [S] section 5.4: batch 32, 128 pieces, lr 5e-5; [D]: Adam with decoupled weight decay of 0.01.
MLM_DEFAULTS = {"seq_len": 128, "batch_size": 32, "accumulation": 1, "epochs": 2, "lr": 5e-5,
                "optimizer": "adamw", "weight_decay": 0.01}
RULES = {  # key: (what its value must be, in words, the check)
    "seq_len": ("3 or more", lambda v: v >= 3),
    "keep": ("head, tail or head+tail", lambda v: v in ("head", "tail", "head+tail")),
    "optimizer": ("adam or adamw", lambda v: v in ("adam", "adamw")),
    "decay": ("linear or none", lambda v: v in ("linear", "none")),
    "lr": ("more than 0 and finite", lambda v: 0 < v < math.inf),
    "precision": ("auto, fp32 or, from PyTorch 1.10 on, bf16",
                  lambda v: v in ("auto", "fp32") or v == "bf16" and hasattr(torch, "autocast")),
    "model": ("a hub name or a folder", bool), "device": ("a device's name", lambda v: True),
    **dict.fromkeys(("batch_size", "accumulation", "epochs"), ("1 or more", lambda v: v >= 1)),
    "warmup": ("a share of all steps, at least 0 and below 1", lambda v: 0 <= v < 1),
    **dict.fromkeys(("dropout", "attention_dropout"),
                    ("at least 0 and below 1", lambda v: 0 <= v < 1)),
}
AT_LEAST_0 = ("0 or more, and finite", lambda v: 0 <= v < math.inf)  # every other key


def make_config(defaults=None, **overrides):
    """Return a Config; InputError for an unknown key, a changed type, a value out of bounds."""
    config = dataclasses.replace(Config(), **(defaults or {}))
    for key, value in overrides.items():
        if key not in vars(config):
            near = difflib.get_close_matches(key, vars(config), 1) or ["one of", *vars(config)]
            raise InputError(f"unknown hyperparameter {key!r}; did you mean {' '.join(near)}?")
        kind = type(getattr(config, key))
        if kind is float and type(value) is int:
            value = overrides[key] = float(value)
        if type(value) is not kind:
            raise InputError(f"{key}={value!r}: must be of type {kind.__name__}, "
                             f"not {type(value).__name__}")
        rule, holds = RULES.get(key, AT_LEAST_0)
        if not holds(value):
            raise InputError(f"{key}={value!r}: must be {rule}")
    return dataclasses.replace(config, **overrides)


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


# ---- files, checksums and seeds ----------------------------------------------------------------

def find_path(path):
    """Return `path`, ~ expanded, as seen from the working folder, else from this file's own."""
    path = os.path.expanduser(path)
    beside = os.path.join(HERE, path)
    return beside if not os.path.exists(path) and os.path.exists(beside) else path


def cache_dir(*parts):
    """Return a folder for files that can be made again, creating it.

    FILIMDB_CACHE from the environment, else .cache/ beside this file, else the system's temporary
    folder when that place cannot be written.
    """
    given = os.environ.get("FILIMDB_CACHE")
    roots = [os.path.abspath(os.path.expanduser(given))] if given else [
        os.path.join(HERE, ".cache"), os.path.join(tempfile.gettempdir(), "filimdb-cache")]
    for root in roots:
        folder = os.path.join(root, *parts)
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    raise InputError(f"no folder to write to: tried {', '.join(roots)}; set FILIMDB_CACHE to one")


@contextlib.contextmanager
def writing(path, size):
    """Turn an OSError of the block into one line: the path, the bytes, and how many are free."""
    try:
        yield
    except OSError as error:
        room = "an unknown number"
        with contextlib.suppress(OSError):
            room = f"{shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free:,}"
        raise InputError(f"{path}: cannot be written ({error.strerror or one_line(error)}): it "
                         f"needs {size:,} bytes, {room} are free; make room or name another "
                         f"place; what was there is intact") from None


@contextlib.contextmanager
def written_whole(path, mode="w"):
    """Open a file in memory; when the block ends well it takes the place of `path`: old or new.

    Raises InputError for a full or read-only disk.
    """
    with (io.BytesIO() if "b" in mode else io.StringIO()) as file:
        yield file
        if "b" not in mode:
            return put(path, file.getvalue().encode("utf-8"))
        with file.getbuffer() as data:
            put(path, data)


def put(path, data):
    """Write bytes aside, to the disk, then rename: a crash leaves the old file or the new one."""
    path = os.path.abspath(os.path.expanduser(path))
    (folder, name), aside = os.path.split(path), ""
    with writing(path, len(data)):
        try:
            os.makedirs(folder, exist_ok=True)
            clear_asides(path)
            handle, aside = tempfile.mkstemp(dir=folder, prefix=name, suffix=".tmp")
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(aside)
            raise


def clear_asides(path):
    """Remove what a killed process left beside `path` a day ago or earlier."""
    for aside in glob.glob(glob.escape(path) + "????????.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - os.path.getmtime(aside) > 86400:
                shutil.rmtree(aside) if os.path.isdir(aside) else os.remove(aside)


def save_json(path, value):
    """Write `value` as JSON, whole or not at all."""
    with written_whole(path) as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.write("\n")


def set_aside(path):
    """Rename a damaged file or folder so that it is never used, and say so."""
    warn(f"{path} is damaged (its checksum differs): set aside as .damaged and done again")
    shutil.rmtree(path + ".damaged", ignore_errors=True)
    with contextlib.suppress(OSError):
        os.replace(path, path + ".damaged")


def save_state(path, state):
    """Write tensors and plain values, led by the SHA-256 of what follows."""
    with written_whole(path, "wb") as file:
        file.write(bytes(32))
        torch.save(state, file, **LEGACY_FORMAT)
        with file.getbuffer() as data, data[32:] as payload:
            data[:32] = hashlib.sha256(payload).digest()


def load_state(path):
    """Return what `save_state` wrote; None when there is nothing, or nothing sound, at `path`."""
    try:
        with open(path, "rb") as file:
            checksum, payload = file.read(32), file.read()
    except FileNotFoundError:
        return None
    with contextlib.suppress(pickle.UnpicklingError):  # what is no tensor and no plain value
        if hashlib.sha256(payload).digest() == checksum:
            return torch.load(io.BytesIO(payload), map_location="cpu", **WEIGHTS_ONLY)
    return set_aside(path)


@contextlib.contextmanager
def locked(path):
    """Hold a lock file; yield whether it is ours. It falls with its process, even by SIGKILL."""
    with writing(path, 0):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, "a").close()
    with open(path, "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except (ImportError, OSError):  # Windows, or a disk without locks: one process, please
            pass
        yield True


def digest(*parts):
    """Return the hex SHA-256 of arrays, bytes and JSON-able values, in order."""
    return digest_of(parts)


def digest_of(parts):
    """Return what `digest` does of an iterable, which need not fit the memory."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).tobytes()
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        sha.update(b"%d:" % len(part) + part)
    return sha.hexdigest()


def file_digest(path):
    """Return the hex SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha.update(block)
    return sha.hexdigest()


def seed_of(*parts):
    """Return a seed (63 bits) that depends on all the parts: the same on every machine."""
    return int(digest(*parts)[:16], 16) >> 1


def generator(*parts):
    """Return a CPU random generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


_whole_process = threading.RLock()  # for what is one in a process: PyTorch's random numbers, logs


def exclusive(function):
    """Make a function wait until no other thread of this process is in one of its kind.

    Trainings then give the same numbers in threads as one after another: on a GPU, and with
    PyTorch 1.3, all threads draw from one random generator. Classifying waits for nobody.
    """
    @functools.wraps(function)
    def in_turn(*args, **kwargs):
        with _whole_process:
            return function(*args, **kwargs)
    return in_turn


# ---- what differs between PyTorch 1.3 + transformers 2.1 and today's, and on a terminal ---------

def known_options(function, **options):
    """Return the options that the function has on this stack."""
    return {k: v for k, v in options.items() if k in inspect.signature(function).parameters}


LEGACY_FORMAT = known_options(torch.save, _use_new_zipfile_serialization=False)
WEIGHTS_ONLY = known_options(torch.load, weights_only=True)
inference_mode = getattr(torch, "inference_mode", torch.no_grad)
RESULTS_VERSION = 6  # raise it when the same run gives other numbers (tests/reference_trials.json)
VERSIONS = {"python": "%d.%d.%d" % sys.version_info[:3], "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__}


def used_precision(precision, kind):
    """Return what a Config's precision is on a kind of device (cuda, cpu): fp32 or bf16.

    auto is fp32 on a CPU: every CPU then gives nearly the same, and bf16 pays on those alone that
    multiply in it (AVX512-BF16, AMX).
    """
    if precision != "auto":
        return precision
    gpu = kind == "cuda" and hasattr(torch, "autocast") and torch.cuda.is_available()
    return "bf16" if gpu and torch.cuda.is_bf16_supported() else "fp32"


def autocast(device, precision):
    """Return a context that computes in a Config's precision."""
    if used_precision(precision, device.type) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


@contextlib.contextmanager
def quiet_transformers():
    """Silence transformers' load reports and bars: load_bert checks the same things itself."""
    bars = None
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as bars
    with _whole_process:  # else another thread might take this silence for what was before
        before, shown = logging.root.manager.disable, bars and bars.is_progress_bar_enabled()
        try:
            logging.disable(logging.CRITICAL)
            if shown:
                bars.disable_progress_bar()
            yield
        finally:
            logging.disable(before)
            if shown:
                bars.enable_progress_bar()


class Lines(io.StringIO):
    """A stream for tqdm that prints each state of a bar as a line, but for the empty first one."""

    def write(self, text):
        """Print the state of the bar."""
        if text.strip() and " 0%|" not in text:
            print(text.strip(), flush=True)


def progress_bar(total, what, unit):
    """Return a tqdm bar on stdout: rewritten on a terminal or notebook, else a line every 10 s."""
    live = sys.stdout.isatty() or hasattr(sys.stdout, "pub_thread")  # a notebook's stdout
    return tqdm(total=total, desc=what, unit=unit, ascii=True, leave=False, ncols=88, position=0,
                file=sys.stdout if live else Lines(), mininterval=0.5 if live else 10)


def say(text):
    """Print a line; bars that are shown give way and stand below it."""
    tqdm.write(text)
    sys.stdout.flush()


# ---- several processes, one GPU each ------------------------------------------------------------

def processes():
    """Return (rank, number of processes): (0, 1) outside of `joined_processes`."""
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        return group.get_rank(), group.get_world_size()
    return 0, 1


@contextlib.contextmanager
def joined_processes():
    """Join the processes that torchrun started, if it did; the first of them alone prints.

    All run the same code on the same data: a step's micro-batches are dealt out, gradients added
    up. One that dies ends the others: their next exchange fails.
    """
    count, local_rank = launched_processes()
    if count < 2:
        yield
        return
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.set_device(local_rank)
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"the {count} processes of WORLD_SIZE cannot be joined "
                         f"({one_line(error)}); start them by torchrun") from None
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
            nowhere if processes()[0] else sys.stdout):
        yield
        wait_for_all()
    torch.distributed.destroy_process_group()


def launched_processes():
    """Return (number of processes, this one's GPU) by the variables that torchrun sets.

    (1, 0) without WORLD_SIZE; InputError when one is missing, no number or out of bounds.
    """
    if "WORLD_SIZE" not in os.environ:
        return 1, 0
    count = launch_number("WORLD_SIZE", 1)
    if count == 1:
        return 1, 0
    if launch_number("RANK", 0) >= count:
        raise InputError(f"RANK={os.environ['RANK']}: must be below WORLD_SIZE={count}; start "
                         f"several processes by torchrun, or unset WORLD_SIZE for one")
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if not os.environ.get(key):
            raise InputError(f"WORLD_SIZE={count} without {key}; start several processes by "
                             f"torchrun, or unset WORLD_SIZE for one")
    launch_number("MASTER_PORT", 1)
    return count, launch_number("LOCAL_RANK", 0)


def launch_number(key, least):
    """Return the number in a variable that torchrun sets; InputError where there is none."""
    value = os.environ.get(key)
    if value is None or not re.match(r"\d+$", value) or int(value) < least:
        raise InputError(f"{key}={'(not set)' if value is None else repr(value)}: must be a "
                         f"number of at least {least}; start several processes by torchrun, or "
                         f"unset WORLD_SIZE for one")
    return int(value)


def wait_for_all():
    """Wait until every process is here."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def total(value, device="cpu"):
    """Return the sum of a number, or of a tensor in place, over all processes."""
    if processes()[1] == 1:
        return value
    tensor = value if torch.is_tensor(value) else torch.tensor(
        value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor if torch.is_tensor(value) else float(tensor)


def mine(items):
    """Return this process's share of a list: every item belongs to one process."""
    rank, count = processes()
    return items[rank::count]


# ---- data --------------------------------------------------------------------------------------

PARTS = ("train", "dev", "test", "dev-b", "test-b")  # in the order of preds.tsv
Part = namedtuple("Part", "ids texts labels")        # lists of str; labels None without a file


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

    def __missing__(self, name):
        """Name the file that would hold the part."""
        raise InputError(f"{os.path.join(self.folder, name)}.texts: no such file, and it is "
                         f"needed here; `make data` fetches all of FILIMDB")


def load_filimdb(data_dir, parts=PARTS):
    """Return {part: Part(ids, texts, labels)} from a folder of PART.texts and PART.labels.

    A part without any file is left out, which is said. Raises InputError that names the file, and
    both counts where they differ. A relative folder is tried from the working folder, then from
    this file's own.
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
    """
    if n <= 0 or n >= len(part.texts):
        return part
    order = torch.randperm(len(part.texts), generator=generator("subset", seed)).tolist()
    by_label = [order] if part.labels is None else [
        [i for i in order if part.labels[i] == label] for label in LABEL_IDS]
    in_turn = [i for pair in itertools.zip_longest(*by_label) for i in pair if i is not None]
    return Part(*(column and [column[i] for i in sorted(in_turn[:n])] for column in part))


# ---- text to pieces ----------------------------------------------------------------------------

def split_kept(n, keep):
    """Return (first, last): how many of n kept items come from the head and from the tail.

    head+tail is a quarter head, the rest tail: the best of Sun et al. 2019, table 2 (128 + 382).
    """
    first = {"head": n, "tail": 0, "head+tail": n // 4}[keep]
    return first, n - first


def kept(items, n, keep):
    """Return the n items of a list that survive truncation, all where there are no more."""
    first, last = split_kept(n, keep)
    return items if len(items) <= n else items[:first] + items[len(items) - last:]


def kept_words(text, k, keep):
    """Return the first and/or last k words of a text, spelled as they were; k = 0 keeps all."""
    words = [match.span() for match in re.finditer(r"\S+", text)] if k else []
    if len(words) <= k:
        return text
    first, last = split_kept(k, keep)
    head = text[:words[first - 1][1]] if first else ""
    tail = text[words[-last][0]:] if last else ""
    return f"{head} {tail}".strip()


def check_seq_len(seq_len, tokenizer):
    """Raise InputError unless [CLS], [SEP] and a piece fit and the model has the positions."""
    limit = getattr(tokenizer, "model_max_length", None) or 512
    limit = 512 if limit > 10 ** 6 else limit  # transformers' number for "unset" is huge
    if not 3 <= seq_len <= limit:
        raise InputError(f"seq_len={seq_len}: must be at least 3 and at most {limit}, the model's "
                         f"number of positions")


def vectorize_ex(text, label, seq_len, tokenizer, keep="head", label_ids=LABEL_IDS):
    """Turn one review into what BERT takes: (input_ids, segment_ids, input_mask, label_id).

    input_ids: [CLS] pieces [SEP] [PAD] ..., segment_ids: 0 (there is one segment), input_mask: 1
    for real pieces, 0 for padding; each a list of exactly `seq_len` ints. `keep` says which pieces
    survive truncation (head, tail, head+tail). label_id: by `label_ids`, None for label None.
    Raises ValueError for a seq_len under 3 or over the model's, and for an unknown label.
    """
    check_seq_len(seq_len, tokenizer)
    check_texts([text])
    if label is not None and label not in label_ids:
        raise InputError(f"label {label!r}: known are {', '.join(map(str, label_ids))}")
    pieces = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(whole_characters(text)))
    input_ids = framed(pieces, seq_len, keep, tokenizer)
    padding = seq_len - len(input_ids)
    return (input_ids + [tokenizer.pad_token_id] * padding, [0] * seq_len,
            [1] * len(input_ids) + [0] * padding, None if label is None else label_ids[label])


def framed(pieces, seq_len, keep, tokenizer):
    """Return [CLS] + the pieces that survive + [SEP], a list of at most seq_len ids."""
    return ([tokenizer.cls_token_id] + kept(pieces, seq_len - 2, keep) + [tokenizer.sep_token_id])


class Pieces:
    """The pieces of many texts: `pieces[i]` is the list of ids of text i, no special tokens.

    They lie one after another in one int32 array, memory-mapped from the cache:
    [checksum of the rest, n, n + 1 offsets, ids ...].
    """

    def __init__(self, table):
        n = int(table[1])
        self.offsets, self.ids = table[2:n + 3].astype(np.int64), table[n + 3:]
        self.lengths = np.diff(self.offsets).tolist()  # pieces of each text

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        return self.ids[self.offsets[i]:self.offsets[i + 1]].tolist()


def tokenize_all(texts, tokenizer):
    """Return the Pieces of the texts; done once, then found in the cache by content."""
    texts = check_many(texts)
    key = digest_of(itertools.chain([tokenizer_digest(tokenizer)], map(utf8, texts)))
    path = os.path.join(cache_dir("pieces"), key[:32] + ".npy")
    if processes()[0]:
        wait_for_all()  # the first process tokenizes, the others find its table
    table = load_table(path)
    if table is None:
        table = sealed_table(tokenize(texts, tokenizer))
        with written_whole(path, "wb") as file:
            np.save(file, table)
    if not processes()[0]:
        wait_for_all()
    return Pieces(table)


def tokenizer_digest(tokenizer):
    """Return the hex SHA-256 of all that decides how a tokenizer splits texts and frames them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        how = json.loads(backend.to_str())
        del how["truncation"], how["padding"]  # calls leave them behind; tokenize clears them
    else:
        basic = getattr(tokenizer, "basic_tokenizer", None)
        how = basic and vars(basic), getattr(tokenizer, "added_tokens_encoder", None)
    return digest(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), how,
                  [getattr(tokenizer, key + "_id") for key in SPECIAL],
                  tokenizer.tokenize("A\u00e9 B\u96fb\u5f71, a.b [MASK]don't"))


def whole_characters(text):
    """Return a text without lone surrogates: BERT's cleaning drops them, today's code refuses."""
    return text.encode("utf-8", "ignore").decode()


def utf8(text):
    """Return a text as bytes, lone surrogates too."""
    return text.encode("utf-8", "surrogatepass")


def sealed_table(rows):
    """Return arrays of ids, one after another, as the one int32 array that `Pieces` describes."""
    ids, offsets = array.array("i"), [0]  # 4 bytes an id, whatever the number of rows
    for row in rows:
        ids.frombytes(row.tobytes())
        offsets.append(len(ids))
    table = np.empty(len(offsets) + 2 + len(ids), dtype=np.int32)
    table[1], table[2:len(offsets) + 2] = len(offsets) - 1, offsets
    table[len(offsets) + 2:] = ids
    table[0] = zlib.crc32(table[1:].data) >> 1
    return table


def load_table(path):
    """Return a sound table from the cache, memory-mapped, or None."""
    try:
        table = np.load(path, mmap_mode="r")
        if zlib.crc32(table[1:].data) >> 1 == table[0]:
            return table
    except FileNotFoundError:
        return None
    except Exception:  # whatever numpy makes of a damaged header
        pass
    return set_aside(path)


def tokenize(texts, tokenizer, chunk=500):
    """Yield an int32 array of piece ids for each text, in bulk where the tokenizer can."""
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


# ---- cores that compute alone; dropout and attention on a CPU -----------------------------------

CACHED = 2 ** 19  # attention weights that a core works on at once: 2 MB, about its cache


_beginning = threading.Lock()  # the number of threads that `begin` sets is the process's


@functools.lru_cache(maxsize=None)
def lone_threads(n):
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


def each_alone(work, items, device):
    """Yield work(item) for every item in order: on a CPU each by a core of its own.

    No more than one result a core, and one, is held, so memory stays bounded.
    """
    threads, waiting = torch.get_num_threads(), collections.deque()
    if device.type != "cpu" or threads == 1 or inference_mode is torch.no_grad:  # PyTorch 1.3
        yield from map(work, items)
        return
    try:
        for item in items:
            waiting.append(lone_threads(threads).submit(work, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for one in waiting:  # after an error or Ctrl-C
            one.cancel()


class DroppedAttention(torch.autograd.Function):
    """softmax(query key' + bias), dropout, times value; in pieces, each by a core of its own.

    query, key, value: (n, seq, size), bias: (n, 1, seq). The backward pass makes weights and masks
    again instead of keeping them: n x seq x seq numbers are never held, as Dao et al. 2022 do it.
    """

    @staticmethod
    def by_pieces(work, query, key, bias, cut, seed):
        """Call work(slice, softmax weights, mask) on all pieces of the n."""
        step = max(1, CACHED // query.shape[1] ** 2)

        def one(start):
            some = slice(start, start + step)
            scores = torch.bmm(query[some], key[some].transpose(1, 2)).add_(bias[some])
            work(some, scores.softmax(-1), keep_mask(scores.shape, cut, [seed, start]))

        list(each_alone(one, range(0, len(query), step), query.device))  # list: wait for all

    @staticmethod
    def forward(ctx, query, key, value, bias, p, seed):
        """Return (n, seq, size)."""
        out, (cut, ctx.share) = torch.empty_like(query), cut_of(p)

        def attend(some, weights, mask):
            torch.bmm(weights.mul_(mask), value[some], out=out[some])

        DroppedAttention.by_pieces(attend, query, key, bias, cut, seed)
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

        DroppedAttention.by_pieces(go_back, query, key, bias, ctx.cut, ctx.seed)
        return to_query, to_key, to_value, None, None, None


def cpu_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attend as BERT does; with dropout on a CPU by DroppedAttention, else by the library.

    query, key, value: (batch, heads, seq, size); returns (batch, seq, heads, size). PyTorch's own
    kernel has no dropout on a CPU and falls back to one several times slower.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
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


# ---- model -------------------------------------------------------------------------------------

PUZZLES = {  # what a library says (a regular expression): what it means here
    "(?i)weights.only": "the file is damaged, or holds more than tensors",  # not its advice, ever
    "ignore_mismatched_sizes": "its tensors have other shapes than config.json says"}


def one_line(error):
    """Return an exception as one short line that a terminal shows as it is."""
    text = printable(str(error))
    for sign, meaning in PUZZLES.items():
        text = meaning if re.search(sign, text) else text
    return f"{type(error).__name__}: {' '.join(text.split())[:200]}"


def pick_device(device=""):
    """Return the torch.device asked for, or cuda if there is one, else cpu."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except Exception as error:
        raise InputError(f"device={device!r} cannot be used ({one_line(error)}); "
                         f"try device='cpu'") from None
    return chosen


HEADS = {"classifier": BertModel, "mlm": BertForPreTraining,
         "trained": BertForSequenceClassification}  # what load_bert reads for each head


@exclusive
def load_bert(model=None, head="classifier", dropout=0.1, attention_dropout=0.1, seed=0,
              num_labels=2):
    """Load a pretrained BERT: return (model in eval mode on the CPU, tokenizer).

    model: a local folder (config.json, vocab.txt, weights) or a name on the hub; the argument
    beats BERT_MODEL from the environment, which beats bert-base-uncased. head: "classifier" (a
    new layer over the pooler, N(0, 0.02) by `seed`, the same on both stacks), "mlm" (the
    checkpoint's masked-LM head, tied to the embeddings; what it lacks is made new) or "trained"
    (the checkpoint's classifier).
    Raises InputError that says what was tried and how to give a local folder.
    """
    name = model or default_model()
    folder = find_path(name)
    if os.path.isdir(folder):
        check_folder(folder, name)
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r}: no such folder; give one that holds config.json, "
                         f"vocab.txt and pytorch_model.bin")
    with quiet_transformers():
        entries = attempt("config.json", name, config_entries, folder)
        check_entries(entries, BERT_SETTINGS["only"], f"model {name!r}: its config.json")
        check_activation(entries, name)
        config = attempt("config.json", name, BertConfig.from_dict, {
            key: value for key, value in entries.items()
            if key not in BERT_SETTINGS["left out"] and key not in BERT_SETTINGS["only"]})
        config.hidden_dropout_prob, config.num_labels = dropout, num_labels
        config.attention_probs_dropout_prob = attention_dropout
        loader = HEADS[head]
        bert, info = attempt("weights", name, loader.from_pretrained, folder, config=config,
                             output_loading_info=True)
        tokenizer = attempt("vocab.txt", name, BertTokenizer.from_pretrained, folder,
                            do_lower_case=True)
    new = new_layers(bert, info, folder, name)
    unused = [key for key in info["unexpected_keys"] if re.match(r"classifier\b", key)]
    if head == "classifier" and not WEIGHTS_ONLY:  # transformers 2.1 names no key outside "bert."
        unused = "BertForSequenceClassification" in (getattr(config, "architectures", 0) or [])
    if unused:
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
    use_own_dropout(bert)
    return bert.float().eval(), tokenizer


# What changes what BERT computes, in config.json: followed (and part of `model_digest`); set by
# load_bert's arguments; left out, so that the library's default holds; or no other than that.
BERT_SETTINGS = {
    "followed": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                 "intermediate_size", "hidden_act", "max_position_embeddings", "type_vocab_size",
                 "layer_norm_eps"),
    "arguments": ("hidden_dropout_prob", "attention_probs_dropout_prob", "num_labels"),
    "left out": ("classifier_dropout",  # so that `dropout` is meant
                 "chunk_size_feed_forward", "gradient_checkpointing", "use_cache",  # memory only
                 "attn_implementation", "_attn_implementation", "dtype", "torch_dtype",
                 "output_attentions", "output_hidden_states", "return_dict", "torchscript",
                 "pad_token_id", "problem_type", "initializer_range"),
    "only": {"model_type": "bert", "is_decoder": False, "add_cross_attention": False,
             "is_encoder_decoder": False, "position_embedding_type": "absolute",
             "tie_word_embeddings": True, "pruned_heads": {}, "use_bfloat16": False,
             "quantization_config": None, "per_layer_config": None}}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
           "mask_token": "[MASK]"}
SAFETENSORS = hasattr(getattr(transformers, "utils", None), "SAFE_WEIGHTS_NAME")  # not in 2.1
FOREIGN_WEIGHTS = {  # how a file's name ends: whose weights it holds
    ".h5": "TensorFlow's", ".ckpt.index": "TensorFlow's", ".ckpt.meta": "TensorFlow's",
    ".msgpack": "Flax's", ".onnx": "ONNX's", "adapter_config.json": "an adapter's"}
NOT_THE_FILE = {  # how a file begins: what it is, and the remedy
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run `git lfs pull` "
                                "where it was cloned, or download the file",
    b"\xef\xbb\xbf": "begins with a byte-order mark; save it as UTF-8 without one",
    b"<!doctype html": "is a web page; download the file itself",
    b"<html": "is a web page; download the file itself"}


def check_folder(folder, name):
    """Refuse a folder that cannot be a model's, and say what it is and what to give instead."""
    names = sorted(os.listdir(folder))
    if not names:
        raise InputError(f"model {name!r}: {os.path.abspath(folder)} is an empty folder; fill it, "
                         f"or remove it to have the hub's model of that name")
    if "snapshots" in names:
        inside = sorted(glob.glob(os.path.join(glob.escape(folder), "snapshots", "*")))
        raise InputError(f"model {name!r}: a folder of the hub's cache; give the one in it that "
                         f"holds config.json: {inside[-1] if inside else 'none is there'}")
    for one in names:
        if one.startswith(("config.json", "vocab.txt", "tokenizer", "pytorch_model", "model.")):
            with contextlib.suppress(OSError), open(os.path.join(folder, one), "rb") as file:
                head = file.read(200).lstrip().lower()
                for sign, what in NOT_THE_FILE.items():
                    if head.startswith(sign):
                        raise InputError(f"model {name!r}: its {one} {what}")
    if not any(one.startswith(("pytorch_model", "model.safetensors")) for one in names):
        for end, whose in FOREIGN_WEIGHTS.items():
            for one in names:
                if one.endswith(end):
                    raise InputError(f"model {name!r}: holds {whose} weights only ({one}); give "
                                     f"the same model's PyTorch weights, pytorch_model.bin")
    elif not SAFETENSORS and not any(one.startswith("pytorch_model") for one in names):
        raise InputError(f"model {name!r}: holds model.safetensors only, which transformers "
                         f"{transformers.__version__} cannot read; give pytorch_model.bin")


def config_entries(folder):
    """Return the entries of config.json, a dict, in a local folder or on the hub."""
    if not os.path.isdir(folder):
        return BertConfig.from_pretrained(folder).to_dict()
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        entries = json.load(file)
    if not isinstance(entries, dict):
        raise TypeError("it holds no table of settings")
    return entries


def check_entries(entries, only, where):
    """Refuse entries with a value other than the `only` one: it would be dropped, or misled by."""
    for key, allowed in only.items():
        value = entries.get(key)
        if value is not None and value != allowed and (value or allowed):
            raise InputError(f"{where} says {key}: {json.dumps(value)}; only "
                             f"{json.dumps(allowed)} is supported: give a BERT made with it")


def check_activation(entries, name):
    """Refuse a hidden_act that this stack does not have."""
    try:
        from transformers.activations import ACT2FN
    except ImportError:
        from transformers.modeling_bert import ACT2FN
    value = entries.get("hidden_act", "gelu")
    if not isinstance(value, str) or value not in ACT2FN:
        raise InputError(f"model {name!r}: its config.json says hidden_act: {json.dumps(value)}; "
                         f"transformers {transformers.__version__} has {', '.join(ACT2FN)}")


def attempt(what, name, load, *args, **kwargs):
    """Return load(...); turn any failure into one clear error that names the model."""
    try:
        return load(*args, **kwargs)
    except Exception as error:
        keep_alive(error)
        folder = find_path(name)
        place = "" if os.path.isdir(folder) else " from the hub, nor is there such a folder"
        fault = weights_fault(folder) if what == "weights" else ""
        raise InputError(f"model {name!r}: its {what} could not be loaded{place}" + (
            f": {fault}" if fault else
            f" ({one_line(error)}); give a folder with config.json, vocab.txt and "
            f"pytorch_model.bin as model=, --model or BERT_MODEL")) from None


def keep_alive(error):
    """Never free an exception: PyTorch 1.3 aborts when it frees a tensor that it read by half."""
    if not WEIGHTS_ONLY:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))


def stored_weights(folder):
    """Return what lies in a folder's file of weights, or None: {name: tensor} in a sound one.

    Of model.safetensors, which today's stack prefers, the values are descriptions.
    """
    path = os.path.join(folder, "model.safetensors")
    if SAFETENSORS and os.path.isfile(path):
        with open(path, "rb") as file:
            return json.loads(file.read(int.from_bytes(file.read(8), "little")).decode())
    path = os.path.join(folder, "pytorch_model.bin")
    return torch.load(path, map_location="cpu", **WEIGHTS_ONLY) if os.path.isfile(path) else None


def weights_fault(folder, lacking=()):
    """Return what is wrong with a folder's weights and the remedy, or "" where it is not known.

    lacking: the names of tensors that were looked for in vain.
    """
    whole = ("pytorch_model.bin holds a whole pickled model or other objects, not only tensors; "
             "save the model anew: torch.save(model.state_dict(), 'pytorch_model.bin')")
    try:
        stored = stored_weights(folder)
    except Exception as error:
        keep_alive(error)
        return whole if "GLOBAL" in str(error) else ""
    if isinstance(stored, torch.nn.Module):
        return whole
    for key, value in stored.items() if isinstance(stored, dict) else ():
        if isinstance(value, dict) and any(map(torch.is_tensor, value.values())):
            return (f"pytorch_model.bin holds them in a dict, under {key!r}; save them alone: "
                    f"torch.save(torch.load(FILE)[{key!r}], FILE)")
        match = re.match(r"(.+\.)(bert\.)?embeddings\.word_embeddings\.weight$", key)
        start = match.group(1).replace("bert.", "") if match else ""
        if start and lacking and all(
                {start + one, start + "bert." + one} & set(stored) for one in lacking):
            return (f"their names begin with {start!r}; save them without it: torch.save("
                    f"{{key[{len(start)}:]: value for key, value in torch.load(FILE).items()}}, "
                    f"FILE)")
    return ""


def new_layers(bert, info, folder, name):
    """Return the names of the parameters that a checkpoint lacks and that are made new.

    InputError where it lacks any other, or holds some of an encoder that have no place.
    """
    named = dict(bert.named_parameters())  # transformers 2.1 puts "bert." before a BertModel's
    missing = {key if key in named else key.replace("bert.", "", 1)
               for key in info["missing_keys"] if "position_ids" not in key}
    if not SAFETENSORS and "cls.predictions.bias" in named and os.path.isdir(folder):
        stored = stored_weights(folder)  # where names have no "bert." 2.1 says nothing of heads
        missing.update(key for key in named if key.startswith("cls.") and key not in stored)
    new = sorted(key for key in missing if key.startswith(("cls.", "pooler.", "bert.pooler.")))
    lacking = sorted(missing - set(new))
    if lacking:
        fault = weights_fault(folder, [key.replace("bert.", "", 1) for key in lacking])
        raise InputError(f"model {name!r}: its weights lack {len(lacking)} tensors of a BERT "
                         f"({lacking[0]}, ...); {fault or 'give a whole BERT'}")
    unplaced = sorted(key for key in info["unexpected_keys"] if "position_ids" not in key
                      and re.match(r"(bert\.)?(embeddings|encoder)\.", key))
    if unplaced:
        raise InputError(f"model {name!r}: its weights hold {len(unplaced)} tensors that its "
                         f"config.json has no place for ({unplaced[0]}, ...); give the "
                         f"config.json that they were saved with")
    return new


def fit_embeddings(bert, config, tokenizer):
    """Cut embeddings and the masked-LM head's outputs to the vocabulary; name its padding."""
    encoder, n = getattr(bert, "bert", bert), len(tokenizer)
    words = encoder.embeddings.word_embeddings
    words.padding_idx = tokenizer.pad_token_id
    if words.num_embeddings == n:
        return
    words.weight = torch.nn.Parameter(words.weight.detach()[:n].clone())
    words.num_embeddings = n
    if bert is not encoder:
        head = bert.cls.predictions
        head.bias = torch.nn.Parameter(head.bias.detach()[:n].clone())
        head.decoder.weight, head.decoder.out_features = words.weight, n
        if head.decoder.bias is not None:
            head.decoder.bias = head.bias
    for one in (config, bert.config, encoder.config):
        one.vocab_size = n


def fill_new(model, names, seed):
    """Initialize the named parameters as BERT does: matrices N(0, 0.02), biases 0, LayerNorm 1."""
    random = generator("new layers", seed)
    for name, parameter in sorted(model.named_parameters()):
        if name in names and parameter.dim() > 1:
            parameter.data.normal_(0, 0.02, generator=random)
        elif name in names:
            parameter.data.fill_(float(name.endswith("LayerNorm.weight")))


def check_tokenizer(tokenizer, config, name):
    """Refuse a vocabulary that does not fit or is cased; give the tokenizer its model's limit."""
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.max_len = int(1e12)  # transformers 2.1 warns past it, but vectorize_ex cuts itself
    getattr(tokenizer, "deprecation_warnings", {})[  # and today's, once
        "sequence-length-is-longer-than-the-specified-maximum"] = True
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.get_vocab(with_added_tokens=False) if fast else tokenizer.vocab
    special = [getattr(tokenizer, key) for key in SPECIAL]
    lacking = [word for word in special if word not in vocabulary]
    if lacking:
        raise InputError(f"model {name!r}: its vocabulary lacks {', '.join(lacking)}; is "
                         f"vocab.txt there, and this model's?")
    added = [word for word in tokenizer.added_tokens_encoder if word not in special]
    if added:
        raise InputError(f"model {name!r}: tokens were added to its tokenizer "
                         f"({', '.join(added[:3])}), which vocab.txt cannot say; give the model "
                         f"as it was before that")
    check_entries(tokenizer.init_kwargs, dict({"do_basic_tokenize": True, "never_split": None}, **(
        {} if fast else {"strip_accents": True})), f"model {name!r}: its tokenizer_config.json")
    spare = config.vocab_size - len(tokenizer)
    if 0 < spare < 128 and config.vocab_size % 8 == 0:
        warn(f"model {name!r}: its embeddings have {config.vocab_size} rows for "
             f"{len(tokenizer)} vocabulary entries, as padded to a multiple of 8; the last "
             f"{spare} are left out")
    elif spare:
        raise InputError(f"model {name!r}: its vocabulary has {len(tokenizer)} entries, its "
                         f"embeddings {config.vocab_size}; is vocab.txt there, and this model's?")
    ids = list(range(len(tokenizer)))
    words = tokenizer.convert_ids_to_tokens(ids)
    if None in words or tokenizer.convert_tokens_to_ids(words) != ids:
        raise InputError(f"model {name!r}: its vocabulary of {len(tokenizer)} pieces names one "
                         f"twice; vocab.txt is damaged")
    cased = sum(word != word.lower() and word[0] != "[" for word in words)
    if tokenizer.tokenize("Good") != tokenizer.tokenize("good") or cased > len(words) // 100:
        raise InputError(f"model {name!r}: its vocabulary is cased; use an uncased BERT")


def check_vocabularies(tokenizer, folder, name):
    """Refuse a folder whose tokenizer.json, which today's stack reads, is not its vocab.txt's."""
    paths = [os.path.join(folder, one) for one in ("tokenizer.json", "vocab.txt")]
    if all(map(os.path.isfile, paths)):
        with open(paths[1], encoding="utf-8") as file:
            words = [line.rstrip("\n") for line in file]
        if words != tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
            raise InputError(f"model {name!r}: its tokenizer.json and vocab.txt hold different "
                             f"vocabularies; remove the wrong one")


def save_bert(folder, model, tokenizer, note, history=None, replace=False, **entries):
    """Write a folder that `load_bert` reads on both stacks; it appears whole or not at all.

    note: a dict for note.json, which also gets the SHA-256 of the weights, and a checksum of all
    that makes the model. history: for history.json and .csv. replace: take the place of a folder
    that is there; else that one stays. entries: of config.json, beside the model's own.
    """
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    config = {key: value for key, value in model.config.to_dict().items()
              if key not in ("dtype", "_name_or_path", "pruned_heads")}
    parent, name = os.path.split(os.path.abspath(folder))
    with writing(folder, sum(value.numel() * value.element_size() for value in state.values())):
        os.makedirs(parent, exist_ok=True)
        clear_asides(folder)
        aside = tempfile.mkdtemp(dir=parent, prefix=name, suffix=".tmp")
        try:
            config.update(model_type="bert", **entries)
            save_json(os.path.join(aside, "config.json"), config)
            save_json(os.path.join(aside, "tokenizer_config.json"), tokenizer_entries(
                tokenizer, model.config.max_position_embeddings))
            with written_whole(os.path.join(aside, "vocab.txt")) as file:
                file.writelines(word + "\n" for word in tokenizer.convert_ids_to_tokens(
                    list(range(len(tokenizer)))))
            with written_whole(os.path.join(aside, "pytorch_model.bin"), "wb") as file:
                torch.save(state, file, **LEGACY_FORMAT)
            if history:
                save_history(os.path.join(aside, "history"), history)
            note = dict(note, sha256=file_digest(os.path.join(aside, "pytorch_model.bin")))
            save_json(os.path.join(aside, "note.json"), dict(note, checksum=seal(aside, note)))
            os.chmod(aside, 0o755)
            (replace_folder if replace else rename_if_first)(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def rename_if_first(aside, folder):
    """Rename a folder, unless another process was first, with the same."""
    try:
        os.rename(aside, folder)
    except OSError:
        if not os.path.isdir(folder):
            raise


def replace_folder(aside, folder):
    """Rename a folder to take the place of another, which is removed, or back after an error."""
    older = aside[:-len(".tmp")] + ".older"
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, older)
    try:
        os.rename(aside, folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(older, folder)
        raise
    shutil.rmtree(older, ignore_errors=True)


def tokenizer_entries(tokenizer, limit):
    """Return what tokenizer_config.json holds, for load_bert and for transformers' own loaders.

    Beside what those want: the settings that are other than BERT's usual.
    """
    usual = dict(SPECIAL, tokenize_chinese_chars=True, strip_accents=None)
    entries = dict({key: tokenizer.init_kwargs.get(key, usual[key]) for key in usual},
                   **{key: getattr(tokenizer, key) for key in SPECIAL})
    return dict({"do_lower_case": True, "tokenizer_class": "BertTokenizer",
                 "model_max_length": limit},
                **{key: value for key, value in entries.items() if value != usual[key]})


def seal(folder, note):
    """Return the checksum of a note and of the files that make its folder a model."""
    paths = [os.path.join(folder, name) for name in (
        "config.json", "vocab.txt", "pytorch_model.bin", "tokenizer_config.json")]
    return digest(note, *(file_digest(path) for path in paths[:3] + [
        path for path in paths[3:] if os.path.exists(path)]))


def weights_digest(model):
    """Return the hex SHA-256 of a model's weights."""
    return digest(*itertools.chain.from_iterable(
        (name, value.cpu().numpy()) for name, value in sorted(model.state_dict().items())
        if not name.endswith("position_ids")))


def model_digest(model, tokenizer):
    """Return the hex SHA-256 of all of a loaded model that decides what comes of it.

    Weights, what it follows of config.json, the tokenizer; not load_bert's own arguments.
    """
    return digest(weights_digest(model), tokenizer_digest(tokenizer),
                  {key: getattr(model.config, key) for key in BERT_SETTINGS["followed"]})


# ---- batches -----------------------------------------------------------------------------------

CPU_TOKENS = 1024  # of a micro-batch, which one core of a CPU works on: small enough to share out


@functools.lru_cache(maxsize=2)
def order_of_epoch(n, data_seed, epoch):
    """Return the epoch's order of the numbers below n, a tensor; drawn once."""
    return torch.randperm(n, generator=generator("order", data_seed, epoch))


def sample_of_step(n, batch_size, step, data_seed):
    """Return the indices of the step's random sample: fixed by (data_seed, epoch, step) alone."""
    epoch, within = divmod(step, math.ceil(n / batch_size))
    order = order_of_epoch(n, data_seed, epoch)
    return order[within * batch_size:(within + 1) * batch_size].tolist()


def micro_batches(lengths, max_count, max_tokens, launch=0):
    """Split positions 0..n-1 into lists of like length, the longest first, as cheaply as can be.

    Each list holds at most max_count, and count x longest is at most max_tokens (or count is 1).
    Least cost by dynamic programming: the padded tokens, and `launch` tokens for each list.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], -i))
    cost, starts = np.zeros(len(order) + 1), []  # of the cheapest split of the first i
    for end, i in enumerate(order, 1):
        first = max(0, end - max(1, min(max_count, max_tokens // lengths[i])))
        tokens = np.arange(end - first, 0, -1) * lengths[i]  # if this list starts there
        best = int(np.argmin(cost[first:end] + tokens))
        starts.append(first + best)
        cost[end] = cost[first + best] + tokens[best] + launch
    batches, end = [], len(order)
    while end:
        batches.append(order[starts[end - 1]:end][::-1])
        end = starts[end - 1]
    return batches


def micro_limits(config, device):
    """Return max_count, max_tokens and launch of a step's `micro_batches` on a device.

    `accumulation` bounds the memory; a GPU gains from large micro-batches, a CPU does not: there
    every core works on one of CPU_TOKENS, so the number of threads bounds it.
    """
    count = max(1, config.batch_size // max(config.accumulation, processes()[1]))
    if device.type == "cpu":
        return count, min(count * config.seq_len, CPU_TOKENS), 48
    return count, count * config.seq_len, 1024


def padded(rows, pad):
    """Return rows of ids as a dict of input_ids and attention_mask, (batch, longest) int64."""
    input_ids = torch.full((len(rows), max(map(len, rows), default=0)), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, :len(row)] = torch.tensor(row)
        attention_mask[i, :len(row)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def classifier_batches(pieces, label_ids, config, tokenizer, device):
    """Return step -> the micro-batches of that optimizer step, with one label per review."""
    def batches(step):
        chosen = sample_of_step(len(pieces), config.batch_size, step, config.data_seed)
        rows = [framed(pieces[i], config.seq_len, config.keep, tokenizer) for i in chosen]
        return [dict(padded([rows[i] for i in micro], tokenizer.pad_token_id),
                     labels=torch.tensor([label_ids[chosen[i]] for i in micro]))
                for micro in micro_batches(list(map(len, rows)), *micro_limits(config, device))]
    return batches


# ---- optimizer and schedule --------------------------------------------------------------------

def make_optimizer(model, config):
    """Return Adam (weight_decay is L2 in the gradient) or AdamW (decoupled weight decay).

    Weight decay is for matrices; biases and LayerNorm are left alone, as in BERT's own code.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() > 1],
               "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0}]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8,
                **known_options(kind, fused=True))  # one pass over the weights instead of ten


def lr_factor(progress, warmup, decay="linear"):
    """Return what the peak learning rate is multiplied by, for progress 0..1 in optimizer steps.

    Linear warm-up over the share `warmup`, then linear decay to 0 (Devlin et al. 2019, A.2).
    """
    if progress < warmup:
        return progress / warmup
    return max(0.0, (1 - progress) / (1 - warmup)) if decay == "linear" else 1.0


# ---- training loop -----------------------------------------------------------------------------

CHECKPOINT_SECONDS = 60  # between checkpoints; each is some 3 times the weights' size
CHECKPOINT_DAYS = 7      # that a checkpoint waits for the command that goes on from it
EVALUATIONS = 4          # points of a run's learning curve, evenly over its progress


def classifier_forward(model, batch):
    """Return (logits (batch, labels), label ids (batch,))."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    return logits, batch["labels"]


def mlm_forward(model, batch):
    """Return (logits (masked, vocabulary), ids (masked,)): the head runs where a loss is taken."""
    hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
    masked = batch["labels"] != IGNORE  # (batch, seq)
    return model.cls.predictions(hidden[masked]), batch["labels"][masked]


def count_targets(window):
    """Return the number of targets that a loss is taken at in some micro-batches."""
    return sum(int((batch["labels"] != IGNORE).sum()) for batch in window)


def summed_loss(forward, model, batch, device, precision="auto"):
    """Return the sum of cross entropies over the targets of a micro-batch, a scalar tensor."""
    if not count_targets([batch]):  # torch 1.3 cannot take the loss of nothing
        return next(model.parameters()).sum() * 0
    with autocast(device, precision):
        logits, targets = forward(model, {key: value.to(device) for key, value in batch.items()})
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def out_of_memory(error):
    """Tell whether an exception says that memory ran out, of a GPU or of the computer."""
    return isinstance(error, MemoryError) or re.search(
        r"out of memory|can't allocate memory|not enough memory", str(error)) is not None


def halved(window):
    """Return the micro-batches split in two each, where they hold more than one example."""
    halves = []
    for batch in window:
        size = len(batch["labels"])
        for rows in [slice(0, size // 2), slice(size // 2, size)] if size > 1 else [slice(0, 1)]:
            halves.append({key: value[rows] for key, value in batch.items()})
    return halves


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


def accumulate(model, window, targets, forward, device, precision="auto", seed=0):
    """Add up the gradients of a window's mean loss; return the loss, None if memory ran out.

    seed: of what is dropped on a CPU today; a GPU, and PyTorch 1.3, drop by PyTorch's generator.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(numbered):
        number, batch = numbered
        with torch.enable_grad(), random_stream(seed, number):
            part = summed_loss(forward, model, batch, device, precision) / max(targets, 1)
            if device.type != "cpu":
                part.backward()
                return part.detach(), ()
            return part.detach(), torch.autograd.grad(part, parameters, allow_unused=True)

    loss, short = torch.zeros((), device=device), 0
    try:
        with sparse_embeddings(model, device):
            for part, grads in each_alone(gradients, mine(list(enumerate(window))), device):
                loss += part
                add_gradients(parameters, grads)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or max(len(batch["labels"]) for batch in window) == 1:
            raise
        short = 1
    if total(short, device):  # in any process
        return None
    for parameter in model.parameters() if processes()[1] > 1 else ():
        if parameter.requires_grad:
            parameter.grad = total(torch.zeros_like(parameter) if parameter.grad is None
                                   else parameter.grad)
    return total(loss)


def fit(model, batches, n_steps, steps_per_epoch, forward, config, evaluate=None, run="",
        log_dir="", what="training"):
    """Train for n_steps optimizer steps (or max_minutes); return the history, a list of dicts.

    batches(step) gives the micro-batches of a step, forward is classifier_forward or mlm_forward,
    evaluate(model) gives a dict of figures, at the start and EVALUATIONS times. run: the
    checkpoint's file; the run goes on from it, on a CPU bit for bit, and leaves one on Ctrl-C.
    Raises Diverged when the loss or the gradient is NaN or infinite.
    """
    device, rank, halvings = next(model.parameters()).device, processes()[0], 0
    writer = None if rank else open_writer(log_dir)
    optimizer = make_optimizer(model, config)
    step, history, used = resume(run, model, optimizer)
    started, saved, lr = time.time() - used, time.time(), history[-1].get("lr", 0) if step else 0
    bar = progress_bar(n_steps, what, "step")
    bar.update(step)
    model.train()

    def progress_at(step):
        spent = (time.time() - started) / 60 / config.max_minutes if config.max_minutes else 0
        return max(step / n_steps, total(0 if rank else spent, device))

    try:
        if evaluate and not history:
            history.append(dict(step=0, epoch=0.0, seconds=0.0, **evaluate(model)))
        if history and "due" in history[-1]:  # it was interrupted while it was measured
            measure_due(history[-1], evaluate, model)
        progress = progress_at(step)
        while progress < 1:
            lr = config.lr * lr_factor(progress, config.warmup, config.decay)
            for group in optimizer.param_groups:
                group["lr"] = lr
            seed = seed_of("dropout", config.seed, step, *([rank] if rank else []))
            torch.manual_seed(seed)
            window = batches(step)
            for _ in range(halvings):
                window = halved(window)
            targets = count_targets(window)  # of the whole accumulation window
            loss = accumulate(model, window, targets, forward, device, config.precision, seed)
            if loss is None:
                clear_gradients(model)
                halvings += 1
                say(f"{what}: out of memory at step {step + 1}; micro-batches are halved, the "
                    f"step is repeated, the optimizer's batch stays the same")
                continue
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf)
            loss, norm = float(loss), float(norm)
            if not math.isfinite(loss + norm):
                raise Diverged(f"loss {loss}, gradient norm {norm} at step {step + 1} of "
                               f"{n_steps} with lr {lr:.3g}; lower lr or lengthen warmup")
            before, progress = progress, progress_at(step + 1)
            with uninterrupted():  # so that whatever stops the run, a step is whole
                optimizer.step()
                clear_gradients(model)
                step += 1
                row = dict(step=step, epoch=step / steps_per_epoch, lr=lr, grad_norm=norm,
                           loss=loss if targets else None, targets=targets,
                           seconds=time.time() - started)
                if evaluate and int(progress * EVALUATIONS) > int(before * EVALUATIONS):
                    row["due"] = True
                history.append(row)
            if "due" in row:
                measure_due(row, evaluate, model)
                progress = progress_at(step)  # measuring takes time too
            for key in row if writer else ():
                if row[key] is not None:  # a loss of no targets
                    writer.add_scalar(key, row[key], step)
            bar.update(1)
            if run and not rank and time.time() - saved > CHECKPOINT_SECONDS:
                checkpoint(run, model, optimizer, history, time.time() - started)
                saved = time.time()
    except KeyboardInterrupt:
        if run and not rank and history:
            checkpoint(run, model, optimizer, history, time.time() - started)
        print(f"\n{what} interrupted at step {step} of {n_steps}"
              f"{'; the same call goes on from its last checkpoint' if run else ''}", flush=True)
        raise
    finally:
        bar.close()
        model.eval()
        if writer:
            writer.close()
    if step < n_steps:
        say(f"{what}: the budget of {config.max_minutes:g} minutes ended it after {step} of "
            f"{n_steps} steps, the last with lr {lr:.2g}")
    return history


def clear_gradients(model):
    """Forget all gradients; PyTorch 1.3's zero_grad leaves zeros, which a resumed run lacks."""
    for parameter in model.parameters():
        parameter.grad = None


def measure_due(row, evaluate, model):
    """Add the figures of evaluate(model) to a row of the history that they are due in."""
    row.update(evaluate(model))
    del row["due"]


@contextlib.contextmanager
def uninterrupted():
    """Hold Ctrl-C, and SIGTERM where it is handled, back until the block is done."""
    came, handlers = [], {}
    with contextlib.suppress(ValueError):  # not the main thread: no signal comes here
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda *args: came.append(args))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in came:
        handlers[number](number, frame)


def checkpoint(path, model, optimizer, history, seconds):
    """Write all that the run needs to go on; what is random depends on seeds and step alone."""
    save_state(path, {"model": model.state_dict(), "history": history, "seconds": seconds,
                      "optimizer": optimizer and optimizer.state_dict()})


def resume(path, model, optimizer):
    """Load the checkpoint at `path`, if there is one; return (step, history, seconds used)."""
    state = load_state(path) if path else None
    if state is None:
        return 0, [], 0.0
    model.load_state_dict(state["model"])
    if state["optimizer"]:  # a finished run needs it no more
        optimizer.load_state_dict(state["optimizer"])
    step = state["history"][-1]["step"]
    say(f"goes on from the checkpoint after step {step}")
    return step, state["history"], state["seconds"]


@contextlib.contextmanager
def tended(path):
    """Hold the lock on a run's checkpoint; before, tend those that other runs have left."""
    if not processes()[0]:
        tend_checkpoints(path)
    with locked(path + ".lock") as mine:
        try:
            yield
        finally:
            if mine:
                forget(path + ".lock")


_told = set()  # checkpoints that this process has named already


def tend_checkpoints(own):
    """Say once what checkpoints wait in the cache; remove those that wait for nobody.

    These are older than CHECKPOINT_DAYS, and no running process holds their lock. own: the
    checkpoint of the run that begins.
    """
    waiting, removed = {}, {}  # {file: MB}
    for path in [path for folder in (cache_dir("runs"), cache_dir("pretrained"))
                 for path in glob.glob(os.path.join(glob.escape(folder), "*.checkpoint*"))]:
        run = path[:path.rindex(".checkpoint")] + ".checkpoint"  # path: this, its lock, a damaged
        if run == own:
            continue
        with contextlib.suppress(OSError, InputError), locked(run + ".lock") as mine:
            if mine:
                size, age = os.path.getsize(path) / 2 ** 20, time.time() - os.path.getmtime(path)
                if age > 86400 * CHECKPOINT_DAYS:
                    os.remove(path)
                    removed[path] = size
                elif path == run:
                    waiting[path] = size
                forget(run + ".lock")
    if removed or set(waiting) - _told:
        say(f"checkpoints of stopped runs in {cache_dir()}: {len(waiting)} "
            f"({sum(waiting.values()):,.1f} MB) wait, {CHECKPOINT_DAYS} days at most, for the "
            f"command that goes on from them; {len(removed)} ({sum(removed.values()):,.1f} MB) "
            f"older than that removed")
    _told.update(waiting)


def open_writer(log_dir):
    """Return a TensorBoard writer when log_dir asks for one and one is installed, else None."""
    try:
        if log_dir:
            from torch.utils.tensorboard import SummaryWriter
            return SummaryWriter(os.path.expanduser(log_dir))
    except Exception as error:
        warn(f"no TensorBoard log ({one_line(error)}): it needs tensorboard >= 1.14, which the "
             f"pinned 1.9 is not")


def save_table(path, rows):
    """Write a list of dicts as CSV, whole or not at all; a key that a row lacks stays empty."""
    with written_whole(path) as file:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def save_history(stem, history):
    """Write the history as STEM.json and STEM.csv."""
    save_json(stem + ".json", history)
    save_table(stem + ".csv", history)


# ---- classifier: train, predict, classify ------------------------------------------------------

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
    """Return the Pieces of the texts, of their first/last `words` when asked to."""
    check_seq_len(config.seq_len, tokenizer)
    return tokenize_all([kept_words(text, config.words, config.keep) for text in texts], tokenizer)


def start(config, head, content):
    """Return (model on its device, tokenizer, key of the run) for `train` and `pretrain`."""
    model, tokenizer = load_bert(config.model, head, config.dropout, config.attention_dropout,
                                 config.seed)
    known = (head, named_settings(config), model_digest(model, tokenizer), VERSIONS,
             RESULTS_VERSION)
    key = digest_of(itertools.chain(known, content))[:32]
    return model.to(pick_device(config.device)), tokenizer, key


@exclusive
def train(texts, labels, pretrain_params=None, dev=None, n_eval=500, log_dir="", save_as="",
          hold=False, **overrides):
    """Fine-tune BERT on all the given reviews; return the params that `classify` takes.

    pretrain_params: what `pretrain` returned: BERT starts from there. dev: (texts, labels) held
    out; n_eval of them, and of the training reviews, give the learning curve. log_dir: of
    TensorBoard. save_as: stem of the history's .json and .csv. overrides: fields of Config.
    An unfinished run of the same texts, labels, model and settings is resumed; a finished one is
    never reused, unless hold=True leaves it to the same call until forget(params["run"]).
    """
    config = make_config(**overrides)
    if pretrain_params is not None:
        config = dataclasses.replace(config, model=pretrained_folder(pretrain_params))
        say(f"training starts from {describe(pretrain_params)}")
    texts, label_ids = check_texts(texts, labels)
    if dev and (isinstance(dev, str) or len(dev) != 2):
        raise InputError("dev must be (texts, labels): of a Part, part[1:]")
    if len(set(label_ids)) < 2:
        raise InputError("the training reviews do not carry both labels, neg and pos")
    curves = {"train": (texts, label_ids), "dev": check_texts(*dev)} if dev else {}
    measured = curves.get("dev", ([], 0)) + (n_eval if dev else 0,)
    with torch.random.fork_rng():  # whoever calls keeps their own random stream
        model, tokenizer, key = start(config, "classifier", itertools.chain(
            [label_ids, measured[1:]], map(utf8, texts + measured[0])))
        for name, (some, ids) in curves.items():
            if not some or len(some) != len(ids) or n_eval < 1:
                raise InputError("dev must be (texts, labels), not empty, and n_eval 1 or more")
            every = math.ceil(len(some) / n_eval)
            curves[name] = prepare(some[::every], tokenizer, config), ids[::every]

        def evaluate(model):
            return {f"{name}_{key}": value for name, (some, ids) in curves.items()
                    for key, value in measure(model, some, ids, tokenizer, config).items()}

        per_epoch = math.ceil(len(texts) / config.batch_size)
        batches = classifier_batches(prepare(texts, tokenizer, config), label_ids, config,
                                     tokenizer, next(model.parameters()).device)
        run = os.path.join(cache_dir("runs"), key + ".checkpoint")
        with tended(run):
            history = fit(model, batches, config.epochs * per_epoch, per_epoch,
                          classifier_forward, config, evaluate if dev else None, run, log_dir)
    if not hold:
        forget(run)
    elif not processes()[0]:
        checkpoint(run, model, None, history, math.inf)  # inf: no time is left of a budget
    if save_as:
        save_history(save_as, history)
    return {"model": model, "tokenizer": tokenizer, "config": config, "history": history,
            "pretrained": pretrain_params, "run": run}


def forget(path):
    """Remove a file that has served."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def predict_logits(model, pieces, tokenizer, config, what=""):
    """Return the logits of all texts in their order, float32 (n, labels) on the CPU.

    Reviews of like length go together, so little is padded; padding changes no prediction.
    what: a name for the progress bar and the estimate; silent without one.
    """
    device = next(model.parameters()).device
    lengths = [min(n, config.seq_len - 2) + 2 for n in pieces.lengths]
    limits = micro_limits(dataclasses.replace(config, batch_size=64, accumulation=1), device)
    logits = torch.zeros(len(pieces), model.config.num_labels)
    bar = progress_bar(sum(lengths), what, "piece") if what else None
    training, started, done, told = model.training, time.time(), 0, not what
    model.eval()

    def logits_of(group):
        rows = [framed(pieces[i], config.seq_len, config.keep, tokenizer) for i in group]
        batch = padded(rows, tokenizer.pad_token_id)
        with inference_mode(), autocast(device, config.precision):
            some = model(**{key: value.to(device) for key, value in batch.items()})[0]
        return some.float().cpu()

    groups = mine(micro_batches(lengths, *limits))
    for group, some in zip(groups, each_alone(logits_of, groups, device)):
        logits[group] = some
        done += sum(lengths[i] for i in group)
        if what:
            bar.update(sum(lengths[i] for i in group))
        elapsed = time.time() - started
        if not told and elapsed > 5:
            told = True
            tell_estimate(what, len(pieces), elapsed * sum(lengths) / done / 60)
    if what:
        bar.close()
    model.train(training)
    return finite(total(logits.to(device)).cpu())


def finite(outcome):
    """Return what a model gave, a tensor or a number; Diverged where it is NaN or infinite.

    The loss of a step is taken before its update, so the last update may break a model unseen.
    """
    if not torch.isfinite(torch.as_tensor(outcome)).all():
        raise Diverged("the model gives NaN or infinite numbers: its training diverged; lower lr "
                       "or lengthen warmup")
    return outcome


def tell_estimate(what, n, minutes):
    """Print how long a prediction will take, and warn when grading would cut it off."""
    say(f"{what} {n:,} reviews: about {minutes:.1f} minutes")
    if minutes > GRADING_MINUTES:
        warn(f"that is more than the {GRADING_MINUTES} minutes that grading allows; a smaller "
             f"seq_len is faster")


def measure(model, pieces, label_ids, tokenizer, config):
    """Return {loss: mean cross entropy in nats, accuracy: share right} on labelled pieces."""
    logits, targets = predict_logits(model, pieces, tokenizer, config), torch.tensor(label_ids)
    return {"loss": float(F.cross_entropy(logits, targets)),
            "accuracy": float((logits.argmax(1) == targets).float().mean())}


LABELS = sorted(LABEL_IDS, key=LABEL_IDS.get)  # in the order of the model's outputs


def classify(texts, params, **overrides):
    """Return the label of each text, in order; params: of `train` or `load_classifier`."""
    logits = classifier_logits(texts, params, **overrides)
    return [LABELS[i] for i in logits.argmax(1).tolist()] if len(logits) else []


def probabilities(texts, params, **overrides):
    """Return each label's probability, float32 (n, 2): columns as in LABEL_IDS, rows sum to 1."""
    return classifier_logits(texts, params, **overrides).softmax(1)


def classifier_logits(texts, params, **overrides):
    """Return the logits of texts, float32 (n, 2) on the CPU, as params' own settings cut them."""
    check_params(params)
    config = make_config(vars(params["config"]), **overrides)
    texts, _ = check_texts(texts)
    if not texts:
        return torch.zeros(0, len(LABELS))
    model = params["model"].to(pick_device(config.device))
    return predict_logits(model, prepare(texts, params["tokenizer"], config),
                          params["tokenizer"], config, "classifying")


def check_params(params):
    """Refuse what neither `train` nor `load_classifier` returned."""
    if not isinstance(params, dict) or not {"model", "tokenizer", "config"} <= set(params):
        raise InputError(f"params is of type {type(params).__name__} without model, tokenizer and "
                         f"config; give what train or load_classifier returned")


def check_place(folder):
    """Return the real path of a place for a classifier; refuse where anything else lies."""
    place = os.path.realpath(os.path.expanduser(folder))
    parent = os.path.dirname(place)
    if not folder or not os.path.isdir(parent) or not os.access(parent, os.W_OK):
        raise InputError(f"{folder}: not a place in a folder that can be written; name another")
    if os.path.lexists(place) and "labels" not in (sound_note(place) or {}) and not (
            os.path.isdir(place) and not os.listdir(place)):
        raise InputError(f"{folder}: is there already, and is no sound classifier that "
                         f"save_classifier wrote; name another folder, or remove it")
    return place


def save_classifier(folder, params):
    """Write a trained classifier as a folder; it appears whole, in the place of an older one.

    `load_classifier` reads it, and so do transformers' own BertForSequenceClassification and
    BertTokenizer, on either stack, whichever wrote it.
    """
    check_params(params)
    place = check_place(folder)
    for parameter in params["model"].parameters():
        finite(parameter)
    config = params["config"]
    note = {"labels": LABELS, "model": config.model, "config": settings(config),
            "versions": VERSIONS, "pretrained": params.get("pretrained")}
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
    config = make_config(**dict(note["config"], model=place))
    model, tokenizer = load_bert(place, "trained", config.dropout, config.attention_dropout)
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


# ---- masked LM: pretrain -----------------------------------------------------------------------

HELD_OUT = 200     # texts (a tenth of all at most) that the MLM loss is measured on
MASKED_SHARE = 0.15  # of the pieces; 80/10/10 as in Devlin et al. 2019, 3.1


def flat_texts(texts):
    """Return the distinct non-blank texts of an iterable of texts, or of iterables of texts."""
    flat = itertools.chain.from_iterable(
        [item] if isinstance(item, str) or not hasattr(item, "__iter__") else check_many(item)
        for item in check_many(texts))
    return [text for text in dict.fromkeys(check_texts(flat)[0]) if text.strip()]


def spans(lengths, size):
    """Return (text, start, end) windows of at most `size` pieces; nothing is dropped or glued.

    A long text gives windows of equal length (to a piece), so that none is a short rest.
    """
    windows = []
    for i, n in enumerate(lengths):
        parts = math.ceil(n / size)
        edges = [n * part // max(parts, 1) for part in range(parts + 1)]
        windows.extend((i, start, end) for start, end in zip(edges, edges[1:]))
    return windows


def mask_pieces(input_ids, maskable, mask_id, vocab_size, random, continues=None):
    """Return (corrupted input_ids, labels), both (batch, seq) int64; Devlin et al. 2019, 3.1.

    15 % of the maskable pieces are chosen; of these 80 % become [MASK], 10 % a random piece and
    10 % stay. labels: the original id where chosen, else IGNORE. random: a CPU torch.Generator.
    continues: (batch, seq) bool, pieces that go on a word: then whole words are chosen.
    """
    draw, fate = (torch.rand(input_ids.shape, generator=random) for _ in range(2))
    if continues is not None:
        word = (~continues).to(torch.int64).cumsum(1) - 1  # index of a piece's word, (batch, seq)
        draw = draw.gather(1, word.clamp(min=0))
    chosen = (draw < MASKED_SHARE) & maskable
    labels = torch.where(chosen, input_ids, torch.full_like(input_ids, IGNORE))
    other = torch.randint(vocab_size, input_ids.shape, generator=random, dtype=torch.int64)
    corrupted = torch.where(chosen & (fate < 0.8), torch.full_like(input_ids, mask_id), input_ids)
    return torch.where(chosen & (fate >= 0.9), other, corrupted), labels


def mlm_batches(pieces, tokenizer, config, device):
    """Return (windows, random) -> their micro-batches, with fresh masks drawn from `random`."""
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    continues = torch.tensor([word.startswith("##") for word in words])
    ordinary = torch.ones(len(tokenizer), dtype=torch.bool)
    ordinary[tokenizer.all_special_ids] = False

    def batches(windows, random):
        rows = [framed(pieces[i][start:end], config.seq_len, "head", tokenizer)
                for i, start, end in windows]
        lengths, whole = list(map(len, rows)), padded(rows, tokenizer.pad_token_id)
        ids = whole["input_ids"]  # masked as a whole: micro-batches change no mask
        whole["input_ids"], whole["labels"] = mask_pieces(
            ids, ordinary[ids], tokenizer.mask_token_id, len(tokenizer), random,
            continues[ids] if config.whole_word else None)
        return [{key: value[micro, :lengths[micro[0]]] for key, value in whole.items()}
                for micro in micro_batches(lengths, *micro_limits(config, device))]
    return batches


def mlm_loss(model, batches, device, precision="auto"):
    """Return the mean cross entropy in nats over some batches' masked positions; None for none."""
    def loss_of(batch):
        with inference_mode():
            return float(summed_loss(mlm_forward, model, batch, device, precision))

    training = model.training
    model.eval()
    loss, targets = sum(each_alone(loss_of, mine(batches), device)), count_targets(batches)
    model.train(training)
    return finite(total(loss, device) / targets) if targets else None


@exclusive
def pretrain(texts, parts=(), log_dir="", **overrides):
    """Train BERT further by masked LM on the texts; return what `train` takes, small to pickle.

    texts: an iterable of str or of iterables of str; blank and repeated ones are left out. parts:
    names of the parts they come from, for the record. overrides: fields of Config; some default to
    MLM_DEFAULTS. A finished pretraining of the same texts, model and settings is found again by
    content; an unfinished one goes on.
    """
    config = make_config(MLM_DEFAULTS, **overrides)
    texts, parts = flat_texts(texts), check_many(parts, "parts")
    if len(texts) < 2:
        raise InputError(f"{len(texts)} different non-blank texts; pretrain needs 2 or more")
    with torch.random.fork_rng():
        model, tokenizer, key = start(config, "mlm", map(utf8, texts))
        folder = os.path.join(cache_dir("pretrained"), key)
        note = read_note(folder)
        if note is None:
            with tended(folder + ".checkpoint"):
                run_mlm(model, tokenizer, texts, config, folder, log_dir)
            note = read_note(folder)
        else:
            say("pretraining of the same texts and settings found: not repeated")
    return dict(note, path=folder, parts=parts)


def run_mlm(model, tokenizer, texts, config, folder, log_dir=""):
    """Train by masked LM and save the model as a folder with its note and history."""
    device, pieces = next(model.parameters()).device, prepare(texts, tokenizer, config)
    order = torch.randperm(len(texts), generator=generator("held out")).tolist()
    held = set(order[:min(HELD_OUT, max(1, len(texts) // 10))])
    windows = spans(pieces.lengths, config.seq_len - 2)
    make = mlm_batches(pieces, tokenizer, config, device)
    fixed = make([w for w in windows if w[0] in held], generator("held-out masks"))
    windows = [w for w in windows if w[0] not in held]
    if not windows:
        raise InputError("the texts hold no pieces to learn from")

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
        forget(folder + ".checkpoint")
    wait_for_all()


def read_note(folder):
    """Return the note of a finished pretraining, or None; a damaged one is set aside."""
    return sound_note(folder) or (set_aside(folder) if os.path.isdir(folder) else None)


def sound_note(folder):
    """Return the note of a folder that `save_bert` wrote and nobody changed, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        with open(os.path.join(folder, "note.json"), encoding="utf-8") as file:
            note = json.load(file)
        if note.pop("checksum") == seal(folder, note):
            return note
    return None


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
        return "loss not measured: no piece of the held-out texts is masked"
    return "loss %.3f -> %.3f, perplexity %.1f -> %.1f" % (*losses, *map(perplexity, losses))


def perplexity(loss):
    """Return e to the mean cross entropy in nats."""
    return math.exp(min(loss, 700))


# ---- floor to beat -----------------------------------------------------------------------------

def majority_accuracy(train_labels, labels):
    """Return the accuracy of always saying the commonest training label."""
    commonest = Counter(check_many(train_labels, "labels")).most_common(1)[0][0]
    return accuracy(labels, [commonest] * len(labels))


def naive_bayes(texts, labels, unseen):
    """Return labels for the `unseen` texts by a naive Bayes over words, with add-one smoothing.

    A word counts once a text: whether it occurs tells more than how often. Source: Wang & Manning
    2012, Baselines and Bigrams, ACL, section 2.1 (their "binarized" counts).
    """
    def words(text):
        return list(dict.fromkeys(re.findall(r"\w+", text.lower())))  # once, in order

    texts, labels, unseen = map(check_many, (texts, labels, unseen), ("texts", "labels", "unseen"))
    counts, priors = {label: Counter() for label in sorted(set(labels))}, Counter(labels)
    for text, label in zip(texts, labels):
        counts[label].update(words(text))
    vocabulary = set().union(*counts.values())
    totals = {label: sum(counts[label].values()) + len(vocabulary) for label in counts}

    def score(label, known):
        return math.log(priors[label]) + sum(
            math.log((counts[label][word] + 1) / totals[label]) for word in known)

    kept = ([word for word in words(text) if word in vocabulary] for text in unseen)
    return [max(counts, key=lambda label: score(label, known)) for known in kept]
