"""A simulated GPU: real numbers on the CPU, tensors on two devices refused, launches counted.

    with fake_gpu.pretend() as gpu:
        params = helpers.train(texts, labels, device="fakegpu", **settings)
    print(gpu.launches, gpu.syncs)

PyTorch lets a backend be written in Python under the name PrivateUse1 (experimental in 2.13). A
tensor there is a `Remote`: a shell with the device's name around a tensor on the CPU. Whatever is
computed passes through `Gpu.run`, which counts a kernel launch for each operation that is no view,
and a synchronization for all that makes the host wait: scalars read, copies of memory that is not
pinned, indices by a mask. Numbers are fp32: autocast knows no table of this device.
"""
import collections
import contextlib
import traceback

import torch
import torch.nn.functional as F
from torch.utils import _foreach_utils, _pytree, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

NAME = "fakegpu"
CPU = torch.device("cpu")
OUR_FILES = ("/helpers.py", "/gpu.py", "/cpu.py", "/runtime.py", "/studies.py", "/checkpoints.py", "/run.py",
             "/modeling_bert.py", "/masking_utils.py")
# What launches no kernel: views, and memory that is taken without being written.
FREE = set("""view _unsafe_view t transpose expand slice select unsqueeze squeeze detach alias permute
as_strided split split_with_sizes unbind _reshape_alias lift_fresh empty empty_like empty_strided
new_empty new_empty_strided set_ is_pinned resize_ diagonal""".split())
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}  # a number comes to the host
WAITS = {"nonzero", "masked_select", "_unique2", "repeat_interleave"}  # their size does


class Backend(backend_registration._DummyBackendModule):
    """What PyTorch asks a device's module for: here, that there is one such device."""

    def get_rng_state(self, device=0):
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state, device=0):
        pass

    manual_seed = set_rng_state

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


class Remote(torch.Tensor):
    """A tensor that says it lies on the device; .here: its numbers, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here):
        shell = torch.Tensor._make_wrapper_subclass(
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(),
            dtype=here.dtype, layout=here.layout, device=torch.device(NAME, 0))
        shell.here = here
        return shell

    def __repr__(self):
        return f"Remote({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Gpu.now.run(func, args, kwargs or {})


def here(x):
    return x.here if isinstance(x, Remote) else x


def remote(x):
    return Remote(x) if isinstance(x, torch.Tensor) and not isinstance(x, Remote) else x


def by_mask(indices):
    """Tell whether a tensor is indexed by a mask, or by numbers that lie on the host."""
    return any(x is not None and (not isinstance(x, Remote) or x.dtype in (torch.bool, torch.uint8))
               for x in indices)


def our_line():
    """Return the innermost line of the project, or of the library's BERT, that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.endswith(OUR_FILES):
            return f"{frame.filename.split('/')[-1]}:{frame.lineno} {frame.line}"
    return "elsewhere"


class Gpu(TorchDispatchMode):
    """The device: `launches` {operation: times}, `syncs` {(what, line): times}."""

    now = None

    def __init__(self):
        super().__init__()
        self.launches = collections.Counter()
        self.syncs = collections.Counter()
        self.pinned = set()  # ids of tensors in pinned memory, with these (so that ids stay theirs)
        self.kept = []

    def reset(self):
        """Count from zero."""
        self.launches.clear()
        self.syncs.clear()

    def wait(self, what):
        """Count that the host waits for the device."""
        self.syncs[what, our_line()] += 1

    def pin(self, tensor):
        """Return a copy in "pinned memory", which copies need not wait for."""
        copy = tensor.clone()
        self.kept.append(copy)
        self.pinned.add(id(copy))
        return copy

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """Do an operation: count it, refuse tensors of two devices, compute on the CPU."""
        flat = _pytree.tree_leaves((args, kwargs))
        remotes = [x for x in flat if isinstance(x, Remote)]
        locals_ = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Remote)]
        name, device = func._schema.name.split("::")[1], kwargs.get("device")
        goes_there = bool(remotes) if device is None else torch.device(device).type == NAME
        if name == "_to_copy":
            self.copy(args[0], goes_there, kwargs)
        elif name == "copy_":
            if isinstance(args[0], Remote) != isinstance(args[1], Remote):
                self.wait("copy_ between devices")
            self.launches[name] += bool(remotes)
        elif remotes and name in READS:
            self.wait("a number read")
        elif remotes:
            self.check(name, args, locals_)
        if name not in FREE and name not in READS | {"_to_copy", "copy_"} and goes_there:
            self.launches[name] += 1
        if not remotes and not goes_there:
            return func(*args, **kwargs)
        ours = {key: CPU if key == "device" and value is not None else value
                for key, value in kwargs.items() if key != "non_blocking"}
        out = KERNELS.get(name, func)(*_pytree.tree_map(here, args), **_pytree.tree_map(here, ours))
        if name in READS or not goes_there:
            return out
        out = _pytree.tree_map(remote, out)
        if remotes and name != "_to_copy":
            return return_and_correct_aliasing(func, args, kwargs, out)
        return out

    def copy(self, tensor, goes_there, kwargs):
        """Count a copy: on the device a launch, from it or of unpinned memory a wait."""
        if isinstance(tensor, Remote) and goes_there:
            self.launches["_to_copy"] += 1
        elif isinstance(tensor, Remote):
            self.wait("a copy to the host")
        elif goes_there and not (kwargs.get("non_blocking") and id(tensor) in self.pinned):
            self.wait("a copy of memory that is not pinned, or waited for")

    def check(self, name, args, locals_):
        """Refuse an operation on tensors of two devices as CUDA does; count what waits."""
        indexes = name in ("index", "index_put", "index_put_", "_index_put_impl_")
        if name in WAITS or indexes and by_mask(args[1]):
            self.wait(name)
        written = isinstance(args[0], torch.Tensor) and name.endswith("_")
        if indexes and isinstance(args[0], Remote):
            return
        if any(x.dim() for x in locals_) or written and not isinstance(args[0], Remote):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least "
                               f"two devices: {name} in {our_line()}")


# ---- attention ----------------------------------------------------------------------------------

def weights_of(query, key, mask, scale):
    """softmax(query key' scale) for (..., heads, tokens, size)."""
    scores = (query @ key.transpose(-1, -2)) * scale
    return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1)


def attend(query, key, value, mask, scale):
    """Attend by the definition."""
    return weights_of(query, key, mask, scale) @ value


def attend_back(query, key, value, mask, scale, grad):
    """Return the gradients of query, key and value, by the formula."""
    weights = weights_of(query, key, mask, scale)
    to_weights = grad @ value.transpose(-1, -2)
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True)) * scale
    return (to_scores @ key, to_scores.transpose(-1, -2) @ query,
            weights.transpose(-1, -2) @ grad)


def apart(work, starts, *tensors):
    """Do something with each review of (tokens, heads, size) tensors; join what comes of it."""
    bounds, parts = starts.tolist(), []
    for start, end in zip(bounds, bounds[1:]):
        parts.append(work(*(x[start:end].transpose(0, 1) for x in tensors)))
    return [torch.cat([x.transpose(0, 1) for x in one]) for one in zip(*parts)]


def flash_forward(query, key, value, starts, _, longest, __, dropout, causal, debug, scale=None):
    """Stand in for PyTorch's kernel of flash attention over reviews of different lengths."""
    assert query.dim() == 3 and starts.dtype == torch.int32 and not causal and not debug
    assert int(starts.diff().max()) == longest and int(starts[-1]) == len(query), "the boundaries"
    assert not dropout, "no numbers to compare"
    nothing = query.new_zeros(0)
    out, = apart(lambda *qkv: (attend(*qkv, None, scale),), starts, query, key, value)
    return out, nothing, nothing, nothing, nothing


def flash_backward(grad, query, key, value, out, _, starts, *rest, scale=None):
    return tuple(apart(lambda *qkvg: attend_back(*qkvg[:3], None, scale, qkvg[3]), starts,
                       query, key, value, grad))


KERNELS = {"_flash_attention_forward": flash_forward, "_flash_attention_backward": flash_backward}
library_attention = F.scaled_dot_product_attention


class Attend(torch.autograd.Function):
    """F.scaled_dot_product_attention as CUDA launches it: a fused kernel, and a mask's conversion."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        Gpu.now.launches["attention"] += 1 if mask is None else 3
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return Remote(attend(*map(here, (query, key, value, mask)), scale))

    @staticmethod
    def backward(ctx, grad):
        *inputs, mask = map(here, ctx.saved_tensors)
        Gpu.now.launches["attention, back"] += 3
        return (*map(Remote, attend_back(*inputs, mask, ctx.scale, grad.here)), None, None)


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
              **kwargs):
    if not isinstance(query, Remote):
        return library_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p,
                                 is_causal=is_causal, scale=scale, **kwargs)
    assert not is_causal and not dropout_p, "no numbers to compare"
    assert attn_mask is None or isinstance(attn_mask, Remote), "the mask is on another device"
    return Attend.apply(query, key, value, attn_mask, scale or query.shape[-1] ** -0.5)


# ---- the device ---------------------------------------------------------------------------------

library_to = torch.nn.Module.to


def move(self, *args, **kwargs):
    """Move a module as Module.to does, tied weights as one (shells cannot take each other's place)."""
    try:
        device = torch.device(args[0])
    except TypeError:
        return library_to(self, *args, **kwargs)
    moved = {}

    def there(tensor):
        if id(tensor) not in moved:
            copy = tensor.detach().to(device)
            if isinstance(tensor, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, tensor.requires_grad)
            moved[id(tensor)] = tensor, copy
        return moved[id(tensor)][1]

    for module in self.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: there(value) for key, value in tensors.items()
                            if value is not None and value.device != device})
    return self


def register():
    """Make the device known to PyTorch, once a process and for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=Backend())


def register_as_cuda():
    """Pretend to be CUDA itself, in a process that has loaded fake_cuda.cpp before PyTorch.

    Then autocast computes by CUDA's table, in bf16, and the project takes the device for an H100.
    """
    global NAME
    NAME = "cuda"

    class Event:
        """What has always happened."""

        record = synchronize = lambda *args: None

    pretended = {"_lazy_init": None, "is_available": True, "is_bf16_supported": True,
                 "device_count": 1, "current_device": 0, "current_stream": None,
                 "manual_seed": None, "manual_seed_all": None, "set_rng_state": None,
                 "get_rng_state": torch.zeros(16, dtype=torch.uint8),
                 "device": contextlib.nullcontext(), "get_device_capability": (9, 0),
                 "mem_get_info": (80 * 2 ** 30, 80 * 2 ** 30)}
    for name, answer in pretended.items():
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch.cuda.Event, torch.version.cuda = Event, "13.0"


@contextlib.contextmanager
def pretend():
    """Work with a simulated GPU; yield what counts its launches and waits."""
    torch.nn.Module.to, F.scaled_dot_product_attention = move, attention
    torch.Tensor.pin_memory = lambda tensor: Gpu.now.pin(tensor)
    _foreach_utils._foreach_supported_types.append(Remote)
    Gpu.now = Gpu()
    try:
        with Gpu.now:
            yield Gpu.now
    finally:
        torch.nn.Module.to, F.scaled_dot_product_attention = library_to, library_attention
        del torch.Tensor.pin_memory
        _foreach_utils._foreach_supported_types.remove(Remote)
