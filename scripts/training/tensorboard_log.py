"""The TensorBoard log of a training, with each step in it once, whatever happens to the process."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from scripts.common.errors import UserError, reason
from scripts.training.late import LateLosses


class TensorBoardLog:
    """Owns the event file of a training in `log_dir`, and what is not yet written to it.

    It is part of a training's state: on resuming, the event files are cut back to what they held when the checkpoint
    was written, so that each step is in them once, wherever the earlier run was killed.

    Args:
        log_dir: folder of the event files.
        enabled: whether this process writes.
    """

    def __init__(self, log_dir: str, enabled: bool = True) -> None:
        self.log_dir, self.enabled = log_dir, enabled
        self.training, self.resumed = uuid.uuid4().hex[:8], False  # the training's name in its files' names
        self._writer: SummaryWriter | None = None
        self.pending: deque[tuple[int, float, LateLosses]] = deque()  # step, rate, losses
        self.written: list[tuple[int, dict[str, float]]] = []  # step and losses, of those that `flush` wrote last
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}  # steps differ in what they log

    @contextmanager
    def writing(self) -> Iterator[SummaryWriter]:
        """The writer, made when it is first needed; a new training hides what another one logged here before.

        Raises:
            UserError: where the disk is full or the folder not writable.
        """
        try:
            if self._writer is None:
                # TensorBoard reads files in the order of their names, which begin with the second they were made in.
                while any(f".{int(time.time())}." in file.name for file in self._files()):
                    time.sleep(0.05)
                options: dict[str, Any] = {"purge_step": None if self.resumed else 1, "flush_secs": 30}
                self._writer = SummaryWriter(self.log_dir, filename_suffix=f".{self.training}", **options)
            yield self._writer
        except OSError as error:
            raise UserError(
                f"{self.log_dir}: cannot be written ({reason(error)}); free space or change tfevent_path"
            ) from error

    def write_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write values under `group/<name>`."""
        with self.writing() as writer:
            for name, value in values.items():
                writer.add_scalar(f"{group}/{name}", value, step)

    def add_step(self, step: int, rate: float, losses: LateLosses) -> None:
        """Take the losses of a step; they are not read until `flush`."""
        self.pending.append((step, rate, losses))

    def flush(self, wait: bool = True) -> dict[str, float]:
        """Write the steps that were taken, and return the losses of the last one written; none where there was none.

        Args:
            wait: for the device; else only those are written that have come from it.
        """
        self.written.clear()
        while self.pending and (wait or self.pending[0][-1].there):
            step, rate, losses = self.pending.popleft()
            values = losses.means()
            self.write_scalars("train_iter", values | {"learning_rate": rate}, step)
            self.written.append((step, values))
            if all(map(math.isfinite, values.values())):
                for name, value in values.items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
                    self.counts[name] = self.counts.get(name, 0) + 1
        return self.written[-1][1] if self.written else {}

    def epoch_means(self) -> dict[str, float]:
        """Means over the steps since the last call, those that were not finite left out."""
        self.flush()
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch so far, and how long each event file is."""
        self.flush()
        with self.writing() as writer:
            writer.flush()
            sizes = {file.name: file.stat().st_size for file in self._files()}
        return {"training": self.training, "sums": dict(self.sums), "counts": dict(self.counts), "sizes": sizes}

    def _files(self) -> list[Path]:
        return list(Path(self.log_dir).glob(f"*tfevents*.{self.training}"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the event files back; those begun since then get a name that TensorBoard does not read."""
        self.training, self.resumed = state["training"], True
        self.sums = dict(state["sums"])
        self.counts = dict(state["counts"] if "counts" in state else dict.fromkeys(self.sums, state["steps"]))  # 0.5
        for file in self._files() if self.enabled else ():
            size = state["sizes"].get(file.name)
            if size is None:
                file.rename(file.with_name(file.name.replace("tfevents", "superseded")))
            elif size < file.stat().st_size:
                os.truncate(file, size)

    def close(self) -> None:
        """Finish the event file, if one was begun."""
        self.flush()
        if self._writer is not None:
            with self.writing() as writer:
                self._writer = None
                writer.close()
