"""The order of a training: which sample comes when, on which rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from scripts.common.errors import UserError


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index): every volume once an epoch, in an order that is a function of (seed, epoch).

    With `num_replicas` ranks, global batch `b` holds the same volumes as with one rank and a batch that many times
    as large; what does not fill a global batch is left out of that epoch.

    Args:
        length: number of volumes.
        batch_size: of one rank.
        seed: of all epochs.
        rank: of this process.
        num_replicas: number of ranks.
    """

    def __init__(self, length: int, batch_size: int = 1, seed: int = 0, rank: int = 0, num_replicas: int = 1) -> None:
        self.batch_size, self.seed, self.rank, self.num_replicas = batch_size, seed, rank, num_replicas
        self.length = length
        self.num_batches = length // self.global_batch_size
        self.epoch, self.start = 1, 0
        if self.num_batches == 0:
            raise UserError(
                f"batch_size {batch_size} x {num_replicas} ranks is more than the {length} training volumes; lower it"
            )

    @property
    def global_batch_size(self) -> int:
        """Volumes in a step, over all ranks."""
        return self.batch_size * self.num_replicas

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch (from 1) and how many of its batches to pass over (when resuming)."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        order = order[: self.num_batches * self.global_batch_size]
        mine = order.reshape(self.num_batches, self.num_replicas, self.batch_size)[self.start :, self.rank]
        return iter([(self.epoch, int(index)) for index in mine.ravel()])
