"""Learning rates and patch sizes over the course of a training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from scripts.common.errors import UserError


class LearningRate:
    """Learning-rate factor of an epoch (from 0): that of the warm-up times that of the decay.

    Args:
        epochs: of the warm-up, ascending.
        factors: `factors[i]` before `epochs[i]`, then 1.
        decay: over this last share of the training the rate falls, in a line, to what would be 0 after the last epoch;
            0 for a rate that stays. Small steps at the end settle what large ones overshoot.
        max_epochs: of the training.

    Raises:
        UserError: unless there is one factor for each epoch, epochs ascending; or for a decay that is no share.
    """

    def __init__(
        self, epochs: Sequence[int], factors: Sequence[float], decay: float = 0.0, max_epochs: int = 1
    ) -> None:
        if len(epochs) != len(factors) or sorted(epochs) != list(epochs):
            raise UserError(f"warmup_epochs {epochs} must ascend and have one of warmup_factors {factors} each")
        check_share("lr_decay", decay)
        self.steps = list(zip(epochs, factors, strict=True))
        self.decay, self.max_epochs = decay * max_epochs, max_epochs

    def __call__(self, epoch: int) -> float:
        warmup = next((factor for until, factor in self.steps if epoch < until), 1.0)
        return warmup * (min(1.0, (self.max_epochs - epoch) / self.decay) if self.decay else 1.0)


class PatchCurriculum:
    """Patch size of an epoch (from 1): small ones first, of which a training sees more in the same time.

    Args:
        stages: of `[until, [x, y, z]]`, shares of the training ascending: patches of that size in the epochs that begin
            before that share of them is done; None for one size.
        patch_size: after the stages, in voxels.
        max_epochs: of the training.

    Raises:
        UserError: unless stages are such pairs, their shares ascending. Sizes are checked by `check_patches`.
    """

    def __init__(self, stages: Sequence[Any] | None, patch_size: Sequence[int], max_epochs: int) -> None:
        self.stages = [] if stages is None else stages
        pairs = isinstance(self.stages, (list, tuple)) and all(
            isinstance(stage, (list, tuple)) and len(stage) == 2 for stage in self.stages
        )
        if not pairs:
            raise UserError(
                f"patch_curriculum is {stages!r}; use pairs of a share and a size, e.g. [[0.5, [64, 64, 64]]]"
            )
        shares = [until for until, _ in self.stages]
        for until in shares:
            check_share("patch_curriculum", until)
        if shares != sorted(set(shares)):
            raise UserError(f"patch_curriculum has the shares {shares}, which must ascend; put them in order")
        self.patch_size, self.max_epochs = patch_size, max_epochs

    def __call__(self, epoch: int) -> Sequence[int]:
        done = (epoch - 1) / self.max_epochs
        return next((size for until, size in self.stages if done < until), self.patch_size)

    def sizes(self) -> list[tuple[str, Sequence[int]]]:
        """All of the training, each with the knob that it comes from."""
        early = [("patch_curriculum", size) for _, size in self.stages]
        return [*early, ("autoencoder_train#patch_size", self.patch_size)]

    def shrinkage(self, epoch: int) -> float:
        """Voxels of a patch of `patch_size` over those of a patch of the epoch."""
        return math.prod(self.patch_size) / math.prod(self(epoch))


def check_share(name: str, value: object) -> None:
    """Whether the knob `name` is a share of the training.

    Raises:
        UserError: where it is not.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise UserError(f"{name} is {value!r}; use a share of the training, from 0 to 1")


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
