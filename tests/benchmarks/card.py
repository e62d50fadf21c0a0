"""What a GPU could do, and what it does: its peak, its memory, how often the host waits for it, how long it idles."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Dense TFLOP/s of matrix products with float32 sums, in bfloat16 (V100: float16), from NVIDIA's data sheets; a card is
# the first one whose name is found in what the driver calls it.
PEAKS = {
    "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362,
    "A6000": 155, "V100": 125,
}  # fmt: skip
COSTLY = 12  # kernels to name


def dense_peak(name: str) -> float | None:
    """TFLOP/s of the card that the driver calls so; None for one that is not in `PEAKS`."""
    return next((rate for card, rate in PEAKS.items() if re.search(rf"\b{card}\b", name)), None)


def described(device: str) -> dict[str, str]:
    """Card, memory and versions, for the head of a table."""
    versions = {"PyTorch": torch.__version__}
    if device != "cuda":
        return {"device": "CPU", **versions}
    card = torch.cuda.get_device_properties(0)
    memory = {"memory": f"{card.total_memory / 2**30:.0f} GiB"}
    versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    return {"device": card.name, **memory, **versions}


def allocated(device: str) -> int:
    """Bytes of the GPU's memory that tensors hold; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def peak(call: Callable[[], object], device: str) -> int:
    """Bytes by which tensors and workspaces exceed, at most, what they held before `call`; 0 on a CPU."""
    if device != "cuda":
        call()
        return 0
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def waits(call: Callable[[], object], device: str) -> Counter[str]:
    """How often the host waits for the GPU in `call`, by line (`guard.py:81`); what PyTorch itself notices.

    It does not notice a wait for an event, as that for the step before (see `Guard`).
    """
    if device != "cuda":
        call()
        return Counter()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message))


def busy_share(spans: Sequence[tuple[int, int]]) -> float:
    """The share of the time from the first beginning to the last end that lies in one span at least.

    Args:
        spans: begin and end of each; they may overlap.
    """
    busy, until = 0, min((begin for begin, _ in spans), default=0)
    first = until
    for begin, end in sorted(spans):
        busy += max(end - max(begin, until), 0)
        until = max(until, end)
    return busy / (until - first) if until > first else 0.0


@contextmanager
def watched(device: str) -> Iterator[dict[str, Any]]:
    """Watch the kernels that run inside; on a CPU operators take their place.

    Yields:
        what is filled in at the end: `idle`, the share of the time between first and last kernel without any; and
        `kernels`, the shares of those that took most of what all took, by their names.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    found: dict[str, Any] = {}
    with profile(activities=[activity]) as profiler:
        yield found
    events = profiler.profiler.kineto_results.events()  # the raw ones: a list of FunctionEvents takes minutes
    kernels = [e for e in events if device == "cpu" or _is_kernel(e)]
    taken: Counter[str] = Counter()
    for kernel in kernels:
        taken[kernel.name()] += kernel.duration_ns()
    found["idle"] = 1 - busy_share([(e.start_ns(), e.end_ns()) for e in kernels])
    found["kernels"] = {name: time / max(taken.total(), 1) for name, time in taken.most_common(COSTLY)}


def _is_kernel(event: Any) -> bool:
    on_gpu = event.device_type() == torch.autograd.DeviceType.CUDA
    return on_gpu and not event.name().startswith(("Memcpy", "Memset")) and event.duration_ns() > 0
