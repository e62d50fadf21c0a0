"""The order of a training: which sample comes when, on which rank."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from scripts.common.errors import UserError

logger = logging.getLogger(__name__)

FEWER_SIZES = "encode again with a larger resize_multiple, for fewer sizes"


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index): every volume once an epoch, in an order that is a function of (seed, epoch).

    With `num_replicas` ranks, global batch `b` holds the same volumes as with one rank and a batch that many times
    as large; what does not fill a global batch is left out of that epoch. Where volumes have several sizes, each
    global batch holds one of them, and is at the place where its last volume comes in the order of all.

    Args:
        length: number of volumes.
        batch_size: of one rank.
        seed: of all epochs.
        rank: of this process.
        num_replicas: number of ranks.
        sizes: of the volumes, (X, Y, Z) each; None where any of them may share a batch.

    Raises:
        UserError: where no size has as many volumes as a global batch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int = 1,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.batch_size, self.seed, self.rank, self.num_replicas = batch_size, seed, rank, num_replicas
        self.length = length
        self.buckets: list[Hashable] = [None] * length if sizes is None else [tuple(size) for size in sizes]
        counts = Counter(self.buckets)
        self.num_batches = sum(count // self.global_batch_size for count in counts.values())
        self.epoch, self.start = 1, 0
        if self.num_batches == 0:
            raise UserError(self._too_large(counts))
        unused = {size: count for size, count in counts.items() if count < self.global_batch_size}
        if unused:
            logger.warning(
                "%d of %d volumes are never trained on: each of their %d sizes has fewer than the %d of a step "
                "(batch_size %d x %d ranks); lower batch_size, or %s",
                sum(unused.values()), length, len(unused), self.global_batch_size, batch_size, num_replicas,
                FEWER_SIZES,
            )  # fmt: skip

    def _too_large(self, counts: Counter[Hashable]) -> str:
        step = f"batch_size {self.batch_size} x {self.num_replicas} ranks is more than the"
        if len(counts) < 2:
            return f"{step} {self.length} training volumes; lower it"
        size, count = counts.most_common(1)[0]
        name = " x ".join(map(str, size))  # type: ignore[call-overload]
        return f"{step} {count} training volumes of the commonest size, {name}; lower it, or {FEWER_SIZES}"

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
        waiting: dict[Hashable, list[int]] = {}
        batches = []
        for index in np.random.default_rng([self.seed, self.epoch]).permutation(self.length).tolist():
            bucket = waiting.setdefault(self.buckets[index], [])
            bucket.append(index)
            if len(bucket) == self.global_batch_size:
                batches.append(waiting.pop(self.buckets[index]))
        mine = np.reshape(batches, (self.num_batches, self.num_replicas, self.batch_size))[self.start :, self.rank]
        return iter([(self.epoch, index) for index in mine.ravel().tolist()])
