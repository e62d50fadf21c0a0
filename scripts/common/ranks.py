"""The group of processes that torchrun starts: joining it, and what its ranks tell each other."""

from __future__ import annotations

import logging
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import ignite.distributed as idist
import torch
import torch.distributed as dist

from scripts.common.errors import UserError, reason

T = TypeVar("T")

logger = logging.getLogger(__name__)

# Ranks wait for each other while volumes are converted or validated; a rank that fails is torchrun's to notice.
TIMEOUT = timedelta(hours=12)
# Where they meet may have no name yet, or no process, while a job starts.
RENDEZVOUS = timedelta(minutes=5)
DRIVER = Path("/proc/driver/nvidia")  # where the NVIDIA driver shows itself


def join() -> torch.device:
    """Join the group and return this process's device: GPU number LOCAL_RANK with NCCL, or the CPU with Gloo.

    Raises:
        UserError: where torchrun did not start this process, or started more processes than there are GPUs; where the
            processes do not meet within minutes; as `usable_gpus`.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "configs/multi_gpu_*.json need torchrun; start it with torchrun --standalone --nproc_per_node=N "
            "-m monai.bundle run ..., or leave this layer out"
        )
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), usable_gpus()
    if 0 < gpus <= local_rank:
        raise UserError(
            f"--nproc_per_node is {os.environ['LOCAL_WORLD_SIZE']}, but this node shows {gpus} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); start one process for each"
        )
    if gpus:
        torch.cuda.set_device(local_rank)
    store, rank, count = _meet()
    dist.init_process_group("nccl" if gpus else "gloo", store=store, rank=rank, world_size=count, timeout=TIMEOUT)
    job = os.environ.pop("SLURM_JOB_ID", None)  # ignite would take srun's tasks, one a node, for the ranks
    try:
        idist.sync()
    finally:
        if job is not None:
            os.environ["SLURM_JOB_ID"] = job
    return idist.device()


def _meet() -> tuple[dist.Store, int, int]:
    """The store through which the ranks find each other, this process's rank, and how many there are.

    Raises:
        UserError: where they do not meet within `RENDEZVOUS`.
    """
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=RENDEZVOUS))
    except (dist.DistError, ValueError) as error:
        raise cannot_meet(reason(error)) from error
    store.set_timeout(TIMEOUT)
    return store, rank, count


def cannot_meet(why: str) -> UserError:
    """What to tell where processes did not meet at MASTER_ADDR and MASTER_PORT, or no longer do."""
    address, port = (os.environ.get(name) or "not set" for name in ("MASTER_ADDR", "MASTER_PORT"))
    return UserError(
        f"MASTER_ADDR is {address}, MASTER_PORT {port}: the processes did not meet there, or lost each other "
        f"({why.rstrip('.')}); on every node, set them to the first node's name and to a port of it that is free and "
        "that the others can reach"
    )


def join_if_launched() -> torch.device:
    """As `join` under torchrun; else as `single_device`."""
    return join() if "LOCAL_RANK" in os.environ else single_device()


def single_device() -> torch.device:
    """The device of a process that runs alone: the GPU where there is one, else the CPU.

    Raises:
        UserError: as `usable_gpus`.
    """
    return torch.device("cuda" if usable_gpus() else "cpu")


def usable_gpus() -> int:
    """How many GPUs this process sees; a warning where it sees none of those that the machine has.

    Raises:
        UserError: where there are GPUs, but PyTorch cannot use them; most often their driver is too old for it.
    """
    count = torch.cuda.device_count()  # asks the driver's library, whatever CUDA it is for
    if count and not torch.cuda.is_available():
        raise UserError(
            f"there are {count} GPUs, but PyTorch {torch.__version__} for CUDA {torch.version.cuda} cannot use them "
            f"with the driver {_driver()}{_why_not()}; update the driver (CUDA 13 needs 580 or newer), install a "
            'PyTorch for an older CUDA (see README.md), or set CUDA_VISIBLE_DEVICES="" to compute on the CPU'
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles")  # the last one is Slurm's
    there = len(list((DRIVER / "gpus").glob("*")))
    if there and not count and not hidden and os.environ.get("RANK", "0") == "0":
        built = "the CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        logger.warning(
            "this machine has %d NVIDIA GPUs, but PyTorch %s, built for %s, sees none and computes on the CPU; install "
            'a PyTorch for CUDA (see README.md), or set CUDA_VISIBLE_DEVICES="" if that is meant',
            there, torch.__version__, built,
        )  # fmt: skip
    return count


def _driver() -> str:
    """The version of the NVIDIA driver, as its kernel module tells it."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", (DRIVER / "version").read_text())
    except OSError:
        found = None
    return found[0] if found else "of unknown version"


def _why_not() -> str:
    """What CUDA says when it cannot be used, as ": text"."""
    try:
        torch.cuda.init()
    except Exception as error:
        return f": {reason(error, 100).rstrip('.')}"
    return ""


def on_this_node() -> int:
    """How many processes of this run share this node's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def log_on_rank_0(rank: int) -> None:
    """Silence information from the other ranks; warnings and errors are every rank's."""
    if rank > 0:
        logging.disable(logging.INFO)


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order; anything that pickles."""
    shares: Any = idist.all_gather((value,))  # a tuple, since ignite treats numbers and texts in ways of their own
    return [share[0] for share in shares]


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks; the tensor itself where there is one rank."""
    count = idist.get_world_size()
    return values if count == 1 else idist.all_reduce(values) / count  # type: ignore[return-value]
