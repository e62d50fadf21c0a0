"""What operators on fake CUDA tensors would cost on a GPU, and where the host would wait for it."""

from __future__ import annotations

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[2]
OURS = tuple(str(ROOT / place) for place in ("scripts/", "tests/gpu/planted.py"))
BLOCK = 512  # bytes: what the caching allocator rounds to

# What these give, or its shape, is known only when the device is done.
READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "repeat_interleave",
}  # fmt: skip
COPIES = {"_to_copy", "copy_", "_foreach_copy_"}  # also from one device to another
ANY_DEVICE = COPIES | {"index", "index_put_"}
OVERWRITES = {"copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_", "normal_", "uniform_"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@dataclass
class Counts:
    """Of what was done since the last `Tracker.take`.

    Attributes:
        operators: that read or write memory of the device, so neither views nor allocations; about as many launches.
        bytes: what each kind of operator reads and writes: each tensor once and whole, as if nothing were cached.
        products: the part of `bytes` that convolutions, matrix products and attention have.
        flop: of these, by the type of what they give.
        wide: the part of `flop` in float32, by line of ours.
        peak: the most bytes that tensors held at once, in blocks of the allocator, among them those there before.
        held: the bytes that tensors hold at the end.
        waits: where the host waits for the device: the operator and the line of ours.
        mixed: where an operator gets tensors of several devices, likewise.
    """

    operators: int = 0
    bytes: Counter[str] = field(default_factory=Counter)
    products: int = 0
    flop: Counter[str] = field(default_factory=Counter)
    wide: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    held: int = 0
    waits: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)


class Tracker(TorchDispatchMode):
    """Counts what is dispatched while it is active, within a `FakeTensorMode`.

    Attributes:
        launched: operators since its beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.launched, self.held = Counts(), 0, 0
        self.storages: dict[int, int] = {}  # bytes on the device, by identity
        self.pinned: set[int] = set()  # host memory that copies need not wait for

    def take(self) -> dict[str, Any]:
        """What was counted since the last call."""
        counts, self.counts = self.counts, Counts(peak=self.held)
        return vars(counts) | {"held": self.held}

    def waits(self, what: str) -> None:
        """Take note that the host waits."""
        self.counts.waits.append(f"{what} at {line()}")

    def hold(self, tensor: torch.Tensor, pinned: bool = False) -> None:
        """Count a tensor's memory on the device until it is freed; remember the host's where it is pinned."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.storages or key in self.pinned:
            return
        if _on_device(tensor):
            self.storages[key] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.held += self.storages[key]
            self.counts.peak = max(self.counts.peak, self.held)
        elif pinned:
            self.pinned.add(key)
        else:
            return
        weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.held -= self.storages.pop(key, 0)
        self.pinned.discard(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # quicker than by the fake mode
            return args[0].device
        if func.namespace != "aten":
            return func(*args, **kwargs)
        if _is_composite(func):  # in inference mode they come whole
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        name, taken = func.overloadpacket.__name__, _tensors((args, kwargs))
        devices = {t.device.type for t in taken if t.dim() > 0}  # a number on the host is an argument of the kernel
        if len(devices) > 1 and name not in ANY_DEVICE:
            self.counts.mixed.append(f"{name} at {line()}")
        if _reads(name, args):
            self.waits(name)
        if name == "_local_scalar_dense":
            return _value(func, args[0])
        out = func(*args, **kwargs)
        given = _tensors(out)
        for tensor in given:
            self.hold(tensor, bool(kwargs.get("pin_memory")))
        if name in COPIES:
            self._check_copies(name, args, kwargs, given)
        written = given + _written(func, args, kwargs)
        if any(map(_on_device, written)) and not func.is_view and name not in NO_KERNEL:
            self._count(func, name, args, kwargs, out, taken, written)
        return out

    def _count(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, taken: Sequence[Any], written: Sequence[Any]
    ) -> None:
        self.launched += 1
        self.counts.operators += 1
        read = [t for t in taken if name not in OVERWRITES or all(t is not w for w in written)]
        moved = _bytes(read) + _bytes(written)
        self.counts.bytes[name] += moved
        formula = flop_registry.get(func.overloadpacket)
        if formula is None:
            return
        flop, dtype = formula(*args, **kwargs, out_val=out), written[0].dtype
        self.counts.products += moved
        self.counts.flop[str(dtype).removeprefix("torch.")] += flop
        if dtype == torch.float32:
            self.counts.wide[line()] += flop

    def _check_copies(self, name: str, args: Any, kwargs: Any, given: Sequence[torch.Tensor]) -> None:
        """A copy between devices waits unless it is told not to; one to the host also where that is not pinned."""
        sources = _tensors(args[0] if name == "_to_copy" else args[1])
        targets = given if name == "_to_copy" else _tensors(args[0])
        told = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for source, target in zip(sources, targets, strict=True):
            if source.device.type == target.device.type:
                continue
            if told and name == "_to_copy":
                self.hold(target, pinned=True)  # PyTorch sees to that
            if not told or (_on_device(source) and target.untyped_storage()._cdata not in self.pinned):
                self.waits(f"{name} from {source.device.type} to {target.device.type}")


def line() -> str:
    """The innermost line of ours that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of ours"


@functools.cache
def _is_composite(func: Any) -> bool:
    kernels = torch._C._dispatch_has_kernel_for_dispatch_key
    return kernels(func.name(), "CompositeImplicitAutograd") and not kernels(func.name(), "CPU")


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"  # `is_cuda` of a fake tensor is an operator of its own


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def _reads(name: str, args: Any) -> bool:
    """Whether the host waits for what an operator gives, or for its shape."""
    if not isinstance(args[0] if args else None, torch.Tensor) or not _on_device(args[0]):
        return False
    masks = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
    return name in READS or (masks and (name == "index" or args[2].numel() > 1))  # one value: filled in


def _value(func: Any, tensor: torch.Tensor) -> Any:
    """The number in a tensor where it is known, else 1, which is finite."""
    try:
        return func(tensor)
    except DataDependentOutputException:
        return 1.0 if tensor.is_floating_point() else tensor.dtype == torch.bool or 1


@functools.cache
def _written_places(func: Any) -> tuple[list[int], list[str]]:
    arguments = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
    return [i for i, a in arguments if not a.kwarg_only], [a.name for _, a in arguments]


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operator changes."""
    places, names = _written_places(func)
    return _tensors([[args[i] for i in places if i < len(args)], [kwargs.get(name) for name in names]])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the device, each memory once; what is expanded counts as it lies there."""
    sizes = {}
    for t in tensors:
        if _on_device(t):
            storage = t.untyped_storage()
            sizes[storage._cdata, t.storage_offset(), t.shape] = min(t.numel() * t.element_size(), storage.nbytes())
    return sum(sizes.values())
