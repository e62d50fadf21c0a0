"""The losses of a step, read when the next one is on its way, so that neither device nor host waits for the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class LateLosses:
    """What a step told, on its way from the device since then.

    To read it waits for that step alone, not for what was queued after it; where it is `there`, for nothing.

    Args:
        names: of the losses.
        means: over the ranks, (names,).
        own: of this rank, (names,).
    """

    def __init__(self, names: Iterable[str], means: torch.Tensor, own: torch.Tensor) -> None:
        self.names = tuple(names)
        both = torch.stack([means, own])
        self._values = both.to("cpu", non_blocking=both.is_cuda)  # into pinned memory
        self._event = torch.cuda.Event(blocking=True) if both.is_cuda else None  # waits asleep: loaders need the core
        if self._event is not None:
            self._event.record()

    @property
    def there(self) -> bool:
        """Whether the step is done, so that reading waits for nothing."""
        return self._event is None or self._event.query()

    def means(self) -> dict[str, float]:
        """By name, over the ranks: equal on all."""
        return self._read(0)

    def own(self) -> dict[str, float]:
        """By name, of this rank alone."""
        return self._read(1)

    def _read(self, row: int) -> dict[str, float]:
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self.names, self._values[row].tolist(), strict=True))
