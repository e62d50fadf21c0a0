"""Ending a training that cannot go well: losses that stay not finite, volumes that keep breaking."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from scripts.common.errors import UserError
from scripts.common.ranks import gather
from scripts.training.engine import TrainingEngine
from scripts.training.late import LateLosses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Step:
    """What is to be looked at, once the next step is on its way."""

    iteration: int
    losses: LateLosses  # their means are equal on all ranks, so all decide alike; this rank's say where it comes from
    paths: list[str]
    errors: list[str]


@dataclass(frozen=True)
class _Finding:
    """What one rank saw of a step that was not finite."""

    broken: dict[str, str]  # by path, why a file cannot be read
    terms: str  # which losses are not finite, and of which files; empty where this rank's are


class Guard:
    """Names what made a step not finite, and ends the training when that happens too often; on all ranks alike.

    The weights stay as they were in such a step: the engine sees to that on the device. A volume that cannot be read
    comes as NaN with its error (see `PatchDataset`), so its step is passed over too. Looks at each step when the next
    one is on its way, so that the device never waits for it.

    Args:
        max_bad_steps: how many steps in a row may be not finite before the training ends.
        max_bad_volumes: how many volumes may break before it ends.
        remedy: what to do when steps stay not finite.
    """

    def __init__(
        self,
        max_bad_steps: int = 20,
        max_bad_volumes: int = 5,
        remedy: str = "lower the learning rate, set max_grad_norm, or check the data",
    ) -> None:
        self.max_bad_steps, self.max_bad_volumes, self.remedy = max_bad_steps, max_bad_volumes, remedy
        self.in_a_row = 0
        self.broken: dict[str, str] = {}
        self.last: _Step | None = None

    def attach(self, engine: TrainingEngine) -> None:
        """Watch `engine`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _iteration_completed(self, engine: TrainingEngine) -> None:
        earlier, batch = self.last, engine.state.batch
        paths, errors = (list(batch.get(key, ())) for key in ("path", "error"))
        self.last = _Step(engine.state.iteration, engine.progress.losses, paths, errors)
        if earlier is not None:
            self._look(earlier)

    def _epoch_completed(self, engine: Any) -> None:
        if self.last is not None:
            self._look(self.last)
            self.last = None

    def _look(self, step: _Step) -> None:
        if all(map(math.isfinite, step.losses.means().values())):
            self.in_a_row = 0
            return
        broken = {path: error for path, error in zip(step.paths, step.errors, strict=True) if error}
        terms = [f"{name} is {value}" for name, value in step.losses.own().items() if not math.isfinite(value)]
        files = f" ({', '.join(step.paths)})" if step.paths else ""
        findings = gather(_Finding(broken, f"{', '.join(terms)}{files}" if terms else ""))
        unreadable = {path: error for finding in findings for path, error in finding.broken.items()}
        if unreadable:
            self._volumes_broke(step.iteration, unreadable)
        else:
            self._was_not_finite(step.iteration, "; ".join(f.terms for f in findings if f.terms))

    def _volumes_broke(self, iteration: int, unreadable: dict[str, str]) -> None:
        self.broken |= unreadable
        text = "; ".join(unreadable.values())
        self._tell(f"step {iteration} is passed over, as a volume cannot be read: {text}")
        if len(self.broken) > self.max_bad_volumes:
            raise UserError(
                f"{len(self.broken)} volumes broke during training (max_bad_volumes is {self.max_bad_volumes}), "
                f"the last: {text}; see python -m scripts.datalist check"
            )

    def _was_not_finite(self, iteration: int, terms: str) -> None:
        self.in_a_row += 1
        text = terms or "the mean gradient over the ranks"
        self._tell(f"step {iteration} is passed over, as it is not finite: {text}")
        if self.in_a_row >= self.max_bad_steps:
            raise UserError(
                f"{self.in_a_row} steps in a row were not finite (max_bad_steps), the last: {text}; the last good "
                f"checkpoint is kept; {self.remedy}"
            )

    def _tell(self, text: str) -> None:
        if idist.get_rank() == 0:
            logger.warning(text)
