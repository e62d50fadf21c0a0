"""Ending a training that cannot go well: losses that stay not finite, volumes that keep breaking."""

from __future__ import annotations

import logging
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events

from scripts.errors import UserError

logger = logging.getLogger(__name__)


class Guard:
    """Names what made a step not finite, and ends the training when that happens too often; on all ranks alike.

    The weights stay as they were in such a step: the trainer sees to that on the device. A volume that cannot be read
    comes as a patch of NaN (see `PatchDataset`), so its step is passed over too. Looks at each step when the next one
    is on its way, so that none waits for it.

    Args:
        max_bad_steps: how many steps in a row may be not finite before the training ends.
        max_bad_volumes: how many volumes may break before it ends.
    """

    def __init__(self, max_bad_steps: int = 20, max_bad_volumes: int = 5) -> None:
        self.max_bad_steps, self.max_bad_volumes = max_bad_steps, max_bad_volumes
        self.in_a_row = 0
        self.broken: dict[str, str] = {}
        self.last: tuple | None = None

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _iteration_completed(self, engine: Any) -> None:
        earlier, state = self.last, engine.state
        self.last = (state.iteration, state.output, state.own_losses, state.batch["path"], state.batch["error"])
        if earlier is not None:
            self._look(*earlier)

    def _epoch_completed(self, engine: Any) -> None:
        if self.last is not None:
            self._look(*self.last)
            self.last = None

    def _look(self, step: int, means: dict, own: dict, paths: list[str], errors: list[str]) -> None:
        if bool(torch.stack(list(means.values())).isfinite().all()):
            self.in_a_row = 0
            return
        broken = {path: error for path, error in zip(paths, errors, strict=True) if error}
        terms = [f"{name} is {float(value)}" for name, value in own.items() if not bool(value.isfinite())]
        reports: Any = idist.all_gather((broken, f"{', '.join(terms)} ({', '.join(paths)})" if terms else ""))
        for found, _ in reports:
            self.broken |= found
        if any(found for found, _ in reports):
            text = "; ".join(error for found, _ in reports for error in found.values())
            self._tell(f"step {step} is passed over, as a volume cannot be read: {text}")
            if len(self.broken) > self.max_bad_volumes:
                raise UserError(
                    f"{len(self.broken)} volumes broke during training (max_bad_volumes is {self.max_bad_volumes}), "
                    f"the last: {text}; see python -m scripts.datalist check"
                )
            return
        self.in_a_row += 1
        text = "; ".join(report for _, report in reports if report) or "the mean gradient over the ranks"
        self._tell(f"step {step} is passed over, as it is not finite: {text}")
        if self.in_a_row >= self.max_bad_steps:
            raise UserError(
                f"{self.in_a_row} steps in a row were not finite (max_bad_steps), the last: {text}; the last good "
                "checkpoint is kept; lower autoencoder_train#lr, set max_grad_norm, or check the data"
            )

    def _tell(self, text: str) -> None:
        if idist.get_rank() == 0:
            logger.warning(text)
