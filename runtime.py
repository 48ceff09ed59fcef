"""What differs between machines and stacks: versions, precision, terminals, processes, signals.

One function or table a difference, so that no other module asks which stack it runs on.
"""
from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import logging
import os
import re
import signal
import sys
import threading
import time

import torch
import transformers
from tqdm import tqdm

from files import InputError, digest, one_line, remove_if_there, say, warn


def supported_options(function, **options):
    """Return the options that the function has on this stack."""
    return {k: v for k, v in options.items() if k in inspect.signature(function).parameters}


LEGACY_FORMAT = supported_options(torch.save, _use_new_zipfile_serialization=False)
WEIGHTS_ONLY = supported_options(torch.load, weights_only=True)
SAFETENSORS = hasattr(getattr(transformers, "utils", None), "SAFE_WEIGHTS_NAME")  # not in 2.1
inference_mode = getattr(torch, "inference_mode", torch.no_grad)
VERSIONS = {"python": "%d.%d.%d" % sys.version_info[:3], "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__}
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


def seed_of(*parts):
    """Return a seed (63 bits) that depends on all the parts: the same on every machine."""
    return int(digest(*parts)[:16], 16) >> 1


def generator(*parts):
    """Return a CPU random generator seeded by `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


HALF = {"bf16": "bfloat16", "fp16": "float16"}  # a Config's precision: PyTorch's name


def used_precision(precision, kind):
    """Return what a Config's precision is on a kind of device (cuda, cpu): fp32, bf16 or fp16.

    auto is fp32 on a CPU: every CPU then gives nearly the same, and bf16 pays on those alone that
    multiply in it (AVX512-BF16, AMX). On a GPU it is bf16 where its cores multiply in it, fp16
    on older ones (V100, T4), which only emulate bf16, and fp32 where PyTorch has no autocast.
    """
    if precision != "auto":
        return precision
    if kind != "cuda" or not hasattr(torch, "autocast") or not torch.cuda.is_available():
        return "fp32"
    able = torch.cuda.is_bf16_supported
    return "bf16" if able(**supported_options(able, including_emulation=False)) else "fp16"


def autocast(device, precision):
    """Return a context that computes in a Config's precision."""
    used = used_precision(precision, device.type)
    if used in HALF:
        return torch.autocast(device.type, dtype=getattr(torch, HALF[used]))
    return contextlib.nullcontext()


_told = set()  # what this process has said of its devices


def tell_once(text):
    """Say a line that holds for the whole process, once."""
    if text not in _told:
        _told.add(text)
        say(text)


def pick_device(device=""):
    """Return the torch.device asked for, or cuda if there is one, else cpu."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=chosen)
    except Exception as error:
        raise InputError(f"device={device!r} cannot be used ({one_line(error)}); "
                         f"try device='cpu'") from None
    if chosen.type == "cuda" and hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new shape
    if chosen.type == "cuda" and not hasattr(torch, "autocast"):
        tell_once(f"PyTorch {torch.__version__} computes in fp32 on a GPU; from 1.10 on in fewer "
                  f"bits, which is faster")
    if chosen.type == "mps":
        tell_once("device mps: never tested with this project; compare with device='cpu'")
    return chosen


def kept_random_state(device=""):
    """Return a context after which PyTorch's random numbers go on as before: the CPU's, and those
    of this one GPU."""
    chosen = pick_device(device)
    if chosen.type != "cuda":
        return torch.random.fork_rng([])
    index = torch.cuda.current_device() if chosen.index is None else chosen.index
    return torch.random.fork_rng([index])


def seed_device(seed, device):
    """Seed PyTorch's random numbers of the CPU and of one device, not of other GPUs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def out_of_memory(error):
    """Tell whether an exception says that memory ran out, of a GPU or of the computer."""
    return isinstance(error, MemoryError) or re.search(
        r"out of memory|can't allocate memory|not enough memory|(CUBLAS|CUDNN)\w*_ALLOC_FAILED",
        str(error)) is not None


class OutOfMemory(RuntimeError):
    """Memory ran out in a step, in this process or in another that shares it."""


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


def is_watched():
    """Tell whether a person is at this notebook: who runs it headless leaves no way to ask."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return bool(getattr(getattr(shell, "kernel", None), "_allow_stdin", False))


def is_notebook():
    """Tell whether what is printed goes to a notebook's page."""
    return hasattr(sys.stdout, "pub_thread")


def duration(seconds):
    """Return seconds in words: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5970 else f"{seconds / 3600:.1f} h"


_whole = threading.local()  # .bars: those that the work of this thread is part of, outermost first


class Progress:
    """How far some work is, in one line: "learning rates 3/6 · step 12/30 · 40 s left".

    Used as a context, it is the whole of which the bars begun within are parts: they are shown in
    its line. A terminal and a notebook have the line rewritten, from half a second on; a notebook
    keeps a last one, of how long it took. A log gets a line a minute. FILIMDB_PROGRESS, from the
    environment, names a file that holds the line for who watches the run from outside.
    """

    def __init__(self, total, what, unit, costs=None, budget=0.0):
        """Take the number of units, e.g. what = "training", unit = "step".

        costs: of each unit, where they differ, for the time left. budget: seconds at most, or 0.
        """
        self.total, self.what, self.unit, self.budget = total, what, unit, budget
        self.costs, self.done, self.skipped = costs, 0, 0
        self.parents, self.part = list(getattr(_whole, "bars", [])), None
        self.began, self.shown, self.line = time.time(), time.time(), None
        self.live, self.notebook = sys.stdout.isatty() or is_notebook(), is_notebook()
        if self.parents:
            self.parents[-1].part = self

    def __enter__(self):
        _whole.bars = [*self.parents, self]
        return self

    def __exit__(self, *_):
        _whole.bars = self.parents
        self.close()

    def skip(self, n):
        """Count units that were done before: they say nothing of how long others take."""
        self.done, self.skipped = self.done + n, self.skipped + n

    def update(self, n=1):
        """Count n units; show the line where that is due."""
        self.done += n
        root = (self.parents or [self])[0]
        if time.time() - root.shown >= (0.5 if root.live else 60):
            root.show()

    def close(self):
        """Take the line away; a notebook keeps how long it took, if that was to be seen."""
        if self.parents:
            self.parents[-1].part = None
        elif self.line:
            self.line.leave = self.notebook
            self.line.set_description_str(self.summary(), refresh=False)
            self.line.close()
        if not self.parents and os.environ.get("FILIMDB_PROGRESS"):
            remove_if_there(os.environ["FILIMDB_PROGRESS"])

    def levels(self):
        """Return this bar and its parts, the outermost first."""
        return [self, *self.part.levels()] if self.part else [self]

    def share(self):
        """Return the share, 0 to 1, that is done of what was to be done since it began."""
        within = self.part.share() if self.part and self.done < self.total else 0
        if not self.costs:
            return (self.done - self.skipped + within) / max(1, self.total - self.skipped)
        done, costs = sum(self.costs[self.skipped:self.done]), self.costs[self.done:]
        return (done + within * costs[0] if costs else done) / (done + sum(costs) or 1)

    def left(self):
        """Return the seconds left, estimated, or None while too little is done to tell."""
        share, spent = self.share(), time.time() - self.began
        if not share:
            return None
        seconds = spent * (1 - share) / share
        return max(0.0, min(seconds, self.budget - spent)) if self.budget else seconds

    def text(self, between=", ", of=" of "):
        """Return the line, in words: "rates: trial 3 of 6, step 12 of 30, 40 s left"."""
        words = []
        for level in self.levels():
            number = min(level.done + (level.part is not None), level.total)
            name = level.unit if words and level.unit == "step" else level.what
            if of != "/":
                name = f"{level.what}: {level.unit}" if not words else level.unit
            words.append(f"{name} {number:,}{of}{level.total:,}")
        left = self.left()
        return between.join([*words, *([] if left is None else [f"{duration(left)} left"])])

    def summary(self):
        """Return what was done, in one line."""
        new = self.done - self.skipped
        stored = f", {self.skipped:,} of them before" * (self.skipped > 0 and new > 0)
        of = f" of {self.total:,}" * (self.done < self.total)
        return (f"{self.what}: {self.done:,}{of} {self.unit}{'s' * (self.total != 1)}{stored}, "
                f"{duration(time.time() - self.began)}")

    def show(self):
        """Show the line where a person looks."""
        self.shown = time.time()
        if not self.live:
            print(self.text(), flush=True)
        else:
            filled, dot = round(20 * self.share()), " \u00b7 "
            if not dot.strip().encode(getattr(sys.stdout, "encoding", "") or "utf-8", "ignore"):
                dot = ", "  # a terminal that knows ASCII alone
            if self.line is None:
                self.line = tqdm(total=1, desc=" ", bar_format="{desc}", file=sys.stdout,
                                 position=0, ncols=99, leave=False)
            self.line.set_description_str(
                f"[{'#' * filled}{'.' * (20 - filled)}] {self.text(dot, '/')}"[:99])
        if os.environ.get("FILIMDB_PROGRESS"):
            with contextlib.suppress(OSError), open(os.environ["FILIMDB_PROGRESS"], "w") as file:
                file.write(self.text())


def progress_bar(total, what, unit, **options):
    """Return a Progress: what, e.g. "tokenizing", is a work of `total` units, e.g. "review"."""
    return Progress(total, what, unit, **options)


def open_writer(log_dir):
    """Return a TensorBoard writer when log_dir asks for one and one is installed, else None."""
    try:
        if log_dir:
            from torch.utils.tensorboard import SummaryWriter
            return SummaryWriter(os.path.expanduser(log_dir))
    except Exception as error:
        warn(f"no TensorBoard log ({one_line(error)}): today's stack gets it by `pip install "
             f"tensorboard`; PyTorch 1.3 wants 1.14 or later, which the pinned 1.9 is not")


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


def processes():
    """Return (rank, number of processes): (0, 1) outside of `joined_processes`."""
    group = torch.distributed
    if group.is_available() and group.is_initialized():
        return group.get_rank(), group.get_world_size()
    return 0, 1


def launch_number(key, least):
    """Return the number in a variable that torchrun sets; InputError where there is none."""
    value = os.environ.get(key)
    if value is None or not re.match(r"\d+$", value) or int(value) < least:
        raise InputError(f"{key}={'(not set)' if value is None else repr(value)}: must be a "
                         f"number of at least {least}; start several processes by torchrun, or "
                         f"unset WORLD_SIZE for one")
    return int(value)


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


PATIENCE = datetime.timedelta(hours=3)  # with the first process, which tokenizes for all


def exchange_options(device, local_rank):
    """Return how processes exchange tensors of a device: options of init_process_group.

    Today's stack exchanges a GPU's and a CPU's tensors; PyTorch 1.3 those of one kind.
    """
    start, backend, own = torch.distributed.init_process_group, "gloo", {}
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        own = supported_options(start, device_id=torch.device("cuda", local_rank))
        backend = "cpu:gloo,cuda:nccl" if own else "gloo" if device == "cpu" else "nccl"
    return dict(own, backend=backend, timeout=PATIENCE)


@contextlib.contextmanager
def joined_processes(device=""):
    """Join the processes that torchrun started, if it did; the first of them alone prints.

    All run the same code on the same data: a step's reviews are dealt out, gradients added up.
    One that dies ends the others: their next exchange fails. device: "cpu" where all work there.
    """
    count, local_rank = launched_processes()
    if count < 2:
        yield
        return
    try:
        torch.distributed.init_process_group(**exchange_options(device, local_rank))
    except (RuntimeError, ValueError, OSError) as error:
        raise InputError(f"the {count} processes of WORLD_SIZE cannot be joined "
                         f"({one_line(error)}); start them by torchrun") from None
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
            nowhere if processes()[0] else sys.stdout):
        yield
        wait_for_all()
    torch.distributed.destroy_process_group()


def wait_for_all():
    """Wait until every process is here."""
    if processes()[1] > 1:
        torch.distributed.barrier()


def all_sum(value, device="cpu"):
    """Return the sum of a number, or of a tensor in place, over all processes."""
    if processes()[1] == 1:
        return value
    tensor = value if torch.is_tensor(value) else torch.tensor(
        value, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(tensor)
    return tensor if torch.is_tensor(value) else float(tensor)


def deal(costs, count):
    """Return `count` lists of the numbers 0..n-1, of nearly equal cost: each goes, the dearest
    first, to the list that costs least so far (Graham 1969: at most 4/3 of the best)."""
    lists, loads = [[] for _ in range(count)], [0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        lists[least].append(i)
        loads[least] += costs[i]
    return [sorted(numbers) for numbers in lists]


def my_share(items, costs=None):
    """Return this process's share of a list, in its order: every item belongs to one process."""
    rank, count = processes()
    return [items[i] for i in deal(costs or [1] * len(items), count)[rank]]


def sum_step(parameters, loss, short=""):
    """Add up a step's gradients, in place, and its loss over all processes; return the loss.

    All travel in one flat tensor: the gradients, for each parameter whether there is one, the
    loss, whether memory ran out. A parameter without a gradient in any process keeps None.
    short: how memory ran out here. Raises OutOfMemory in all processes where it did in one: all
    repeat the step.
    """
    if processes()[1] == 1:
        if short:
            raise OutOfMemory(short)
        return loss
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(sizes) + len(sizes) + 2, device=loss.device)
    notes = flat[sum(sizes):]
    if not short:
        for parameter, part in zip(parameters, flat.split(sizes + [len(notes)])):
            if parameter.grad is not None:
                part.copy_(parameter.grad.reshape(-1))
        has = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        if loss.device.type == "cuda":
            has = has.pin_memory()  # else its copy would be waited for
        notes[:-2] = has.to(loss.device, non_blocking=True)
        notes[-2] = loss
    notes[-1] = float(bool(short))
    torch.distributed.all_reduce(flat)
    *has, _, lacking = notes.tolist()  # the one wait for the others
    if lacking:
        raise OutOfMemory(short or "out of memory in another process")
    for parameter, part, some in zip(parameters, flat.split(sizes + [len(notes)]), has):
        parameter.grad = part.view_as(parameter) if some else None
    return notes[-2]
