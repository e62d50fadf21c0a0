"""Main memory and GPU memory that ran out, or will."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import torch

from scripts.common.errors import UserError

# How CUDA, cuBLAS, cuDNN and NCCL say that a GPU's memory ran out, and how C++ and Linux say it of main memory.
_GPU = re.compile(r"CU(BLAS|DNN)\w*ALLOC\w*_FAILED|(CUDA|NCCL).*out of memory", re.IGNORECASE | re.DOTALL)
_HOST = re.compile(r"DefaultCPUAllocator|std::bad_alloc|cannot allocate memory", re.IGNORECASE)

# A control group's limit, its use, and the line of memory.stat that says how much of that is cache.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of main memory that this process can still get (Linux), within the limits of its container or job.

    Args:
        proc: where the kernel shows processes.
        cgroups: where it shows control groups, of either version.

    Returns:
        the least that the machine and any limit leave; None where neither is known.
    """
    left = [1024 * kib for name, kib in _numbers(proc / "meminfo").items() if name == "MemAvailable:"]
    for folder, (limit, used, cache) in _control_groups(proc, cgroups):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # no such group in this container, or a limit of "max"
            continue
        left.append(max(most - now + _numbers(folder / "memory.stat").get(cache, 0), 0))
    return min(left, default=None)


def _control_groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The folders of this process's memory groups and of all above them, with the names of their files."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:  # "4:memory:/a/b" in version 1, "0::/a/b" in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (cgroups / "memory", _VERSION_1) if controllers else (cgroups, _VERSION_2)
        place = PurePosixPath(path.lstrip("/"))
        for group in (place, *place.parents):
            yield root / group, names


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file of the kernel; empty where there is none."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


@contextmanager
def memory_advice(device: torch.device, what: Callable[[], str], remedy: str) -> Iterator[None]:
    """Turn an error that says that memory ran out into advice with this run's numbers; others pass.

    Args:
        device: where is computed.
        what: what is being computed, asked only when it failed.
        remedy: which knobs to turn.

    Raises:
        UserError: where memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not (where := _exhausted(error, device)):
            raise
        raise UserError(f"out of memory with {what()} ({where}); {remedy}") from error


def _exhausted(error: BaseException, device: torch.device) -> str:
    """Which memory ran out; empty where that is not what happened."""
    if isinstance(error, torch.OutOfMemoryError) or _GPU.search(str(error)):
        return _of_gpu(device) if device.type == "cuda" else str(device)
    full = getattr(error, "errno", None) == errno.ENOMEM
    if full or isinstance(error, MemoryError) or _HOST.search(str(error)):
        left = available_memory()
        return "of this machine" if left is None else f"this machine has {left / 2**30:.1f} GiB left"
    return ""


def _of_gpu(device: torch.device) -> str:
    try:
        free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
        used = torch.cuda.max_memory_allocated(device) / 2**30
    except Exception:  # after some errors of CUDA any call raises the same again
        return str(device)
    return f"{device} has {total:.1f} GiB, of which {free:.1f} are free; this run took up to {used:.1f}"
