"""What a person sees of a training: progress bar, log lines, validations, and the summary at its end."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from ignite.engine import Events
from monai.handlers import ValidationHandler
from tqdm import tqdm

from scripts.common.progress import progress_bar
from scripts.measure.pictures import save_comparison, three_planes
from scripts.training.engine import TrainingEngine
from scripts.training.tensorboard_log import TensorBoardLog

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # losses are read from the device no more often than this
JUMP = 10.0  # a loss this many times its running median is far from it
MEDIAN_STEPS = (20, 100)  # a running median is that of at least so many steps, and of the last so many


class Validate(ValidationHandler):
    """Validates after the first epoch, after every `interval` epochs, and after the last.

    The first is early so that a validation that cannot work is found out before hours are spent. The metrics are
    appended to the trainer's `progress.validations`. A signal ends it after the volume at hand, and the training with
    it.

    Args:
        interval: in epochs.
        validator: has `run`, `state.metrics` (none where it was interrupted) and `interrupt`.
        shown: the metrics in the log line, and their formats.
    """

    def __init__(self, interval: int, validator: Any = None, shown: Mapping[str, str] | None = None) -> None:
        super().__init__(interval, validator)
        self.shown = dict(shown or {})

    def attach(self, engine: Any) -> None:
        """Validate `engine`."""

        def due(engine: Any, epoch: int) -> bool:
            return epoch == 1 or epoch % self.interval == 0 or epoch == engine.state.max_epochs

        def look(validator: Any) -> None:
            if engine.stop.received:
                validator.interrupt()

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)
        if self.validator is not None:
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, look)

    def __call__(self, engine: Any) -> None:
        """Run the validator; without metrics, mark the epoch as not ended, and terminate."""
        started = time.perf_counter()
        super().__call__(engine)
        metrics = self.validator.state.metrics  # type: ignore[union-attr]
        if not metrics:
            engine.progress.interrupted = True
            engine.terminate()
            return
        engine.progress.validations.append({"epoch": engine.state.epoch, **metrics})
        text = "  ".join(f"{name} {metrics[name]:{style}}" for name, style in self.shown.items() if name in metrics)
        logger.info("epoch %d validation: %s  (%.0f s)", engine.state.epoch, text, time.perf_counter() - started)
        self._say_if_stuck(engine)

    def _say_if_stuck(self, engine: Any) -> None:
        """A line where the best validation lies back by more than a third of the training so far."""
        best = engine.progress.best(engine.best_by) if engine.best_by else None
        if best is None or len(engine.progress.validations) < 4:
            return
        since = engine.state.epoch - best["epoch"]
        if since > engine.state.epoch / 3:
            was = f"that of epoch {best['epoch']:.0f} ({engine.best_by} {best[engine.best_by]:.4f})"
            logger.info("no validation was better than %s for %d epochs, over a third of the training", was, since)


class TrainingLog:
    """Bar, log line and TensorBoard tags `train_iter/*` (step: iteration) and `train_epoch/*` (step: epoch).

    Losses are read as they come from the device, at most once a second, so that no iteration waits for them. After an
    epoch a log line and `train_epoch/share_<name>` tell which share each weighted term had in what is minimised (see
    `TrainingEngine.weights`). A shown loss that jumps far from its running median is warned of, once an epoch.

    Args:
        log: where the tags go.
        optimizer: whose learning rate is logged.
        shown: the losses in bar and log line; TensorBoard gets all.
        batch_size: of one iteration over all ranks.
        samples: what a batch is made of, for `train_epoch/<samples>_per_second`.
    """

    def __init__(
        self,
        log: TensorBoardLog,
        optimizer: torch.optim.Optimizer,
        shown: Sequence[str],
        batch_size: int = 1,
        samples: str = "samples",
    ) -> None:
        self.log, self.optimizer, self.shown, self.batch_size = log, optimizer, shown, batch_size
        self.samples = samples
        self.bar: tqdm | None = None
        self.recent = {name: deque[float](maxlen=MEDIAN_STEPS[1]) for name in shown}
        self.warned = 0  # the last epoch that had a warning

    def attach(self, engine: Any) -> None:
        """Show `engine`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._epoch_started)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._batch_wanted)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._batch_there)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        engine.add_event_handler(Events.TERMINATE, self._end)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._failed)

    def _epoch_started(self, engine: Any) -> None:
        state = engine.state
        self.first = state.iteration - (state.epoch - 1) * state.epoch_length
        self.bar = progress_bar(state.epoch_length, f"epoch {state.epoch}/{state.max_epochs}", "step", self.first)
        self.waited = 0.0
        self.started = self.shown_at = self.wanted = time.perf_counter()

    def _batch_wanted(self, engine: Any) -> None:
        self.wanted = time.perf_counter()

    def _batch_there(self, engine: Any) -> None:
        self.waited += time.perf_counter() - self.wanted

    def _iteration_completed(self, engine: Any) -> None:
        self.log.add_step(engine.state.iteration, self.optimizer.param_groups[0]["lr"], engine.progress.losses)
        if time.perf_counter() - self.shown_at >= REPORT_SECONDS:
            self._show(engine, wait=False)

    def _show(self, engine: Any, wait: bool = True) -> None:
        last = self.log.flush(wait)
        for step, losses in self.log.written:
            self._watch(engine.state.epoch, step, losses)
        self.shown_at = time.perf_counter()
        if self.bar is not None and last:
            self.bar.set_postfix({name: f"{last[name]:.3g}" for name in self.shown if name in last}, refresh=False)
            self.bar.update(engine.state.iteration - (engine.state.epoch - 1) * engine.state.epoch_length - self.bar.n)

    def _watch(self, epoch: int, step: int, losses: Mapping[str, float]) -> None:
        """Warn of a jump, unless this epoch had a warning."""
        for name, recent in self.recent.items():
            value = losses.get(name, math.nan)
            if not math.isfinite(value):  # not in this step, or named by the guard
                continue
            usual = median(recent) if len(recent) >= MEDIAN_STEPS[0] else math.inf
            if value > JUMP * usual and self.warned != epoch:
                self.warned = epoch
                text = "step %d: %s is %.4g, more than %.0f times its median over the last %d steps, %.4g"
                logger.warning(text, step, name, value, JUMP, len(recent), usual)
            recent.append(value)

    def _epoch_completed(self, engine: Any) -> None:
        self._show(engine)
        means = self.log.epoch_means()
        if not means:  # resumed in the validation of this epoch, or none of its steps was finite
            return
        state, left = engine.state, ""
        text = "  ".join(f"{name} {means[name]:.4f}" for name in self.shown if name in means)
        means["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if self.bar is not None:  # None: resumed at the end of an epoch
            self.bar.close()
            seconds, steps = time.perf_counter() - self.started, state.epoch_length - self.first
            speed, wait = steps * self.batch_size / seconds, self.waited / seconds
            means |= {"data_wait_share": wait, f"{self.samples}_per_second": speed}
            remaining = seconds / steps * state.epoch_length * (state.max_epochs - state.epoch)
            left = f"  {speed:.2f} {self.samples}/s  data wait {wait:.0%}  left {tqdm.format_interval(remaining)}"
        shares = _shares(engine.weights, means)
        self.log.write_scalars("train_epoch", means | {f"share_{n}": s for n, s in shares.items()}, state.epoch)
        rate = f"  lr {means['learning_rate']:.1e}"
        logger.info("epoch %d/%d: %s%s%s", state.epoch, state.max_epochs, text, rate, left)
        if shares:
            terms = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            logger.info("epoch %d/%d: of what is minimised, %s", state.epoch, state.max_epochs, terms)

    def _end(self, engine: Any) -> None:
        self._show(engine)
        if self.bar is not None:
            self.bar.close()
        self.log.close()

    def _failed(self, engine: Any, error: BaseException) -> None:
        self._end(engine)  # what led to it is to be seen
        raise error


def _shares(weights: Mapping[str, float], means: Mapping[str, float]) -> dict[str, float]:
    """Of the weighted terms that an epoch had, in their sum."""
    terms = {name: weight * means[name] for name, weight in weights.items() if weight and name in means}
    total = sum(terms.values())
    return {name: term / total for name, term in terms.items()} if total else {}


class ValidationLog:
    """Bar over the volumes, and TensorBoard tags `val_epoch/*` (step: the trainer's epoch)."""

    def __init__(self, log: TensorBoardLog) -> None:
        self.log = log

    def attach(self, engine: Any) -> None:
        """Show the validator `engine`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.bar.update())
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _start(self, engine: Any) -> None:
        self.bar = progress_bar(engine.state.epoch_length, "validation", "volume")

    def _epoch_completed(self, engine: Any) -> None:
        self.bar.close()
        self.log.write_scalars("val_epoch", engine.state.metrics, engine.state.epoch)  # none where it was interrupted


class ComparisonPicture:
    """The first volume that is validated beside its reconstruction: two TensorBoard pictures, and `validation.png`."""

    def __init__(self, log: TensorBoardLog, output_dir: str) -> None:
        self.log, self.output_dir = log, Path(output_dir)

    def attach(self, engine: Any) -> None:
        """Draw what the validator `engine` has in `shown`."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _epoch_completed(self, engine: Any) -> None:
        if not engine.state.metrics or engine.shown is None:
            return
        original, reconstruction, spacing = engine.shown
        epoch = engine.state.epoch
        with self.log.writing() as writer:
            writer.add_image("val_original_image", three_planes(original)[None], epoch)
            writer.add_image("val_reconstructed_image", three_planes(reconstruction)[None], epoch)
            writer.flush()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        save_comparison(original, reconstruction, spacing, self.output_dir / "validation.png", f"epoch {epoch}")


def print_summary(
    trainer: TrainingEngine, log: TensorBoardLog, changes: Mapping[str, str], places: Mapping[str, str]
) -> None:
    """Print the table at the end of a training: first and last validation, and where everything is.

    Args:
        trainer: that has run.
        log: of the training, which is closed.
        changes: metrics of held-out volumes, and how their first and last values are shown, e.g. `{:.2f} -> {:.2f} dB`.
        places: further rows: where to look.
    """
    log.close()
    validations = trainer.progress.validations
    rows = {"epochs": f"{trainer.state.epoch}"}
    if validations:
        first, last = validations[0], validations[-1]
        epochs = f"(epochs {first['epoch']} and {last['epoch']})"
        for name, style in changes.items():
            rows[f"{name} on held-out volumes"] = f"{style.format(first[name], last[name])} {epochs}"
    if trainer.best_by and (best := trainer.progress.best(trainer.best_by)):
        rows[f"best validation {trainer.best_by}"] = f"{best[trainer.best_by]:.4f} (epoch {best['epoch']})"
    rows |= places
    width = max(map(len, rows))
    print("\n".join(["", *(f"{name:<{width}}  {text}" for name, text in rows.items())]))
