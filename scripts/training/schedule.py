"""Learning rates over the course of a training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from scripts.common.errors import UserError


class Warmup:
    """Learning-rate factor of an epoch (from 0): `factors[i]` before `epochs[i]`, then 1.

    Raises:
        UserError: unless there is one factor for each epoch, epochs ascending.
    """

    def __init__(self, epochs: Sequence[int], factors: Sequence[float]) -> None:
        if len(epochs) != len(factors) or sorted(epochs) != list(epochs):
            raise UserError(f"warmup_epochs {epochs} must ascend and have one of warmup_factors {factors} each")
        self.steps = list(zip(epochs, factors, strict=True))

    def __call__(self, epoch: int) -> float:
        return next((factor for until, factor in self.steps if epoch < until), 1.0)


def adam_eps(amp: bool) -> float:
    """Adam's epsilon as the reference has it: larger where gradients pass through a narrow type."""
    return 1e-6 if amp else 1e-8


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """All that a configuration says of each parameter group: rates, betas, weight decay, ..."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def advance(schedulers: Iterable[LRScheduler], steps: int, metrics: Sequence[float] = ()) -> None:
    """Step each scheduler `steps` times; `ReduceLROnPlateau` once for each of `metrics` instead."""
    with warnings.catch_warnings():  # on resuming no step of the optimizer comes before, and PyTorch warns of that
        warnings.simplefilter("ignore")
        for scheduler in schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                for metric in metrics:
                    scheduler.step(metric)
                continue
            for _ in range(steps):
                scheduler.step()
