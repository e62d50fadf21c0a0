"""When memory does not suffice: what to say."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.errors import UserError


def explained(error: Exception, device: torch.device, what: str, remedy: str) -> Exception:
    """`error`, or, if it says that memory ran out, advice with this run's numbers.

    Args:
        error: what was raised.
        device: where it was raised.
        what: what was being computed.
        remedy: which knobs to turn.
    """
    if isinstance(error, torch.OutOfMemoryError):
        where = str(device)
        if device.type == "cuda":
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info(device))
            used = torch.cuda.max_memory_allocated(device) / 2**30
            where = f"{device} has {total:.1f} GiB, of which {free:.1f} are free; this run took up to {used:.1f}"
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        where = f"this machine has {available() / 2**30:.1f} GiB left"
    else:
        return error
    return UserError(f"out of memory with {what} ({where}); {remedy}")


def available() -> int:
    """Bytes of main memory that processes can still get (Linux); 0 where that is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
