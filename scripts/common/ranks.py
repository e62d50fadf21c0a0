"""The group of processes that torchrun starts: joining it, and what its ranks tell each other."""

from __future__ import annotations

import logging
import os
from datetime import timedelta
from typing import Any, TypeVar

import ignite.distributed as idist
import torch

from scripts.common.errors import UserError

T = TypeVar("T")

# Ranks wait for each other while volumes are converted or validated; a rank that fails is torchrun's to notice.
TIMEOUT = timedelta(hours=12)


def join() -> torch.device:
    """Join the group and return this process's device: GPU number LOCAL_RANK with NCCL, or the CPU with Gloo.

    Raises:
        UserError: where torchrun did not start this process, or started more processes than there are GPUs.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError(
            "configs/multi_gpu_train.json needs torchrun; start it with torchrun --standalone --nproc_per_node=N "
            "-m monai.bundle run ..., or leave this layer out"
        )
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if 0 < gpus <= local_rank:
        raise UserError(
            f"--nproc_per_node is {os.environ['LOCAL_WORLD_SIZE']}, but this node shows {gpus} GPUs "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}); start one process for each"
        )
    job = os.environ.pop("SLURM_JOB_ID", None)  # ignite would take srun's tasks, one a node, for the ranks
    try:
        idist.initialize("nccl" if gpus else "gloo", timeout=TIMEOUT)
    finally:
        if job is not None:
            os.environ["SLURM_JOB_ID"] = job
    return idist.device()


def join_if_launched() -> torch.device:
    """As `join` under torchrun; else the device of a single process: the GPU where there is one."""
    if "LOCAL_RANK" in os.environ:
        return join()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
