"""Joining the group of processes that torchrun starts."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import ignite.distributed as idist
import torch

from scripts.errors import UserError

# Ranks wait for each other while volumes are converted or validated; a rank that fails is torchrun's to notice.
TIMEOUT = timedelta(hours=12)


def join() -> torch.device:
    """Join the group and return this process's device: GPU number LOCAL_RANK with NCCL, or the CPU with Gloo.

    Only rank 0 logs from here on; warnings and errors are every rank's.

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
    os.environ.pop("SLURM_JOB_ID", None)  # else ignite takes srun's tasks, one a node, for the ranks
    idist.initialize("nccl" if gpus else "gloo", timeout=TIMEOUT)
    if idist.get_rank() > 0:
        logging.disable(logging.INFO)
    return idist.device()


def join_if_launched() -> torch.device:
    """As `join` under torchrun; else the device of a single process: the GPU where there is one."""
    if "LOCAL_RANK" in os.environ:
        return join()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks; the tensor itself where there is no group."""
    ranks = idist.get_world_size()
    return values if ranks == 1 else idist.all_reduce(values) / ranks  # type: ignore[return-value]
