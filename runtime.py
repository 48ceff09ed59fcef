"""What differs between machines and stacks: versions, precision, terminals, processes, signals.

One function or table a difference, so that no other module asks which stack it runs on.
"""
from __future__ import annotations

import contextlib
import datetime
import functools
import inspect
import io
import logging
import os
import re
import signal
import sys
import threading

import torch
import transformers
from tqdm import tqdm

from files import InputError, digest, one_line, say, warn


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
