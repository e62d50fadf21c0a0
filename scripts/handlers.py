"""What a person sees of a training: progress bar, log lines, validations, and the summary at its end."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.handlers import ValidationHandler
from tqdm import tqdm

from scripts.pictures import save_comparison, three_planes
from scripts.tensorboard_log import TensorBoardLog

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # losses are read from the device no more often than this


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """Rank 0's bar, which goes away when it is done, and fills no log file: there, a line every half minute."""
    looks = {"leave": False, "mininterval": 0.5 if sys.stderr.isatty() else 30.0, "disable": idist.get_rank() > 0}
    return tqdm(total=total, desc=description, unit=unit, initial=initial, **looks)


class Validate(ValidationHandler):
    """Validates after the first epoch, after every `interval` epochs, and after the last.

    The first is early so that a validation that cannot work is found out before hours are spent. The metrics are
    appended to the trainer's `state.validations`. A signal ends it after the volume at hand, and the training with it.
    """

    def attach(self, engine: Any) -> None:
        def due(engine: Any, epoch: int) -> bool:
            return epoch == 1 or epoch % self.interval == 0 or epoch == engine.state.max_epochs

        def look(validator: Any) -> None:
            if engine.stop.received:
                validator.interrupt()

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)
        if self.validator is not None:
            self.validator.add_event_handler(Events.ITERATION_COMPLETED, look)

    def __call__(self, engine: Any) -> None:
        started = time.perf_counter()
        super().__call__(engine)
        metrics = self.validator.state.metrics  # type: ignore[union-attr]
        if not metrics:
            engine.fire_event(Events.INTERRUPT)  # for the checkpoint
            engine.terminate()
            return
        engine.state.validations.append({"epoch": engine.state.epoch, **metrics})
        shown = {
            "loss": ".4f",
            "recons_loss": ".4f",
            "p_loss": ".4f",
            "psnr": ".2f",
            "ssim": ".3f",
            "scale_factor": ".3f",
        }
        text = "  ".join(f"{name} {metrics[name]:{style}}" for name, style in shown.items())
        logger.info("epoch %d validation: %s  (%.0f s)", engine.state.epoch, text, time.perf_counter() - started)


class TrainingLog:
    """Bar, log line and TensorBoard tags `train_iter/*` (step: iteration) and `train_epoch/*` (step: epoch).

    Losses stay on the device until they are shown, at most once a second, so that no iteration waits for them.

    Args:
        log: where the tags go.
        optimizer: whose learning rate is logged.
        batch_size: of one iteration over all ranks, for `train_epoch/patches_per_second`.
    """

    def __init__(self, log: TensorBoardLog, optimizer: torch.optim.Optimizer, batch_size: int = 1) -> None:
        self.log, self.optimizer, self.batch_size = log, optimizer, batch_size
        self.bar: tqdm | None = None

    def attach(self, engine: Any) -> None:
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
        self.started = self.shown = self.wanted = time.perf_counter()

    def _batch_wanted(self, engine: Any) -> None:
        self.wanted = time.perf_counter()

    def _batch_there(self, engine: Any) -> None:
        self.waited += time.perf_counter() - self.wanted

    def _iteration_completed(self, engine: Any) -> None:
        self.log.add_step(engine.state.iteration, self.optimizer.param_groups[0]["lr"], engine.state.output)
        if time.perf_counter() - self.shown >= REPORT_SECONDS:
            self._show(engine)

    def _show(self, engine: Any) -> None:
        last = self.log.flush()
        self.shown = time.perf_counter()
        if self.bar is not None and last:
            shown = {k: f"{last[k]:.3g}" for k in ("recons_loss", "p_loss", "adv_loss", "d_loss")}
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(engine.state.iteration - (engine.state.epoch - 1) * engine.state.epoch_length - self.bar.n)

    def _epoch_completed(self, engine: Any) -> None:
        self._show(engine)
        means = self.log.epoch_means()
        if not means:  # resumed in the validation of this epoch, or none of its steps was finite
            return
        state = engine.state
        if self.bar is not None:  # None: resumed at the end of an epoch
            self.bar.close()
            seconds, steps = time.perf_counter() - self.started, state.epoch_length - self.first
            means["data_wait_share"] = self.waited / seconds
            means["patches_per_second"] = steps * self.batch_size / seconds
        means["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        with self.log.writing() as writer:
            for name, value in means.items():
                writer.add_scalar(f"train_epoch/{name}", value, state.epoch)
        shown = ("loss", "recons_loss", "p_loss", "adv_loss", "d_loss")
        text = "  ".join(f"{name} {means[name]:.4f}" for name in shown if name in means)
        text += f"  lr {means['learning_rate']:.1e}"
        if self.bar is not None:
            left = tqdm.format_interval(seconds / steps * state.epoch_length * (state.max_epochs - state.epoch))
            text += (
                f"  {means['patches_per_second']:.2f} patches/s  data wait {means['data_wait_share']:.0%}  left {left}"
            )
        logger.info("epoch %d/%d: %s", state.epoch, state.max_epochs, text)

    def _end(self, engine: Any) -> None:
        self._show(engine)
        if self.bar is not None:
            self.bar.close()
        self.log.close()

    def _failed(self, engine: Any, error: BaseException) -> None:
        self._end(engine)  # what led to it is to be seen
        raise error


class ValidationLog:
    """TensorBoard tags `val_epoch/*`, the pictures of the first volume, and `validation.png` in `output_dir`."""

    def __init__(self, log: TensorBoardLog, output_dir: str) -> None:
        self.log, self.output_dir = log, Path(output_dir)

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _start(self, engine: Any) -> None:
        self.bar = progress_bar(engine.state.epoch_length, "validation", "volume")

    def _iteration_completed(self, engine: Any) -> None:
        if engine.state.iteration == 1:
            output = engine.state.output
            self.original, self.reconstruction = (output[k][0, 0].numpy() for k in ("image", "reconstruction"))
            self.spacing = engine.state.batch["spacing"][0].tolist()
        self.bar.update()

    def _epoch_completed(self, engine: Any) -> None:
        self.bar.close()
        if not engine.state.metrics:  # interrupted
            return
        epoch = engine.state.epoch
        with self.log.writing() as writer:
            for name, value in engine.state.metrics.items():
                writer.add_scalar(f"val_epoch/{name}", value, epoch)
            writer.add_image("val_original_image", three_planes(self.original)[None], epoch)
            writer.add_image("val_reconstructed_image", three_planes(self.reconstruction)[None], epoch)
            writer.flush()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / "validation.png"
        save_comparison(self.original, self.reconstruction, self.spacing, path, f"epoch {epoch}")
        del self.original, self.reconstruction  # whole volumes, not to be held until the next validation


def report(trainer: Any, model_dir: str, log: TensorBoardLog, output_dir: str) -> None:
    """Print the table at the end of a training: first and last validation, and where everything is."""
    log.close()
    validations = trainer.state.validations
    rows = [("epochs", f"{trainer.state.epoch}")]
    if validations:
        first, last = validations[0], validations[-1]
        best = min(validations, key=lambda v: v["loss"])
        for name, style, unit in (("psnr", ".2f", " dB"), ("ssim", ".3f", ""), ("mae_hu", ".1f", " HU")):
            change = f"{first[name]:{style}} -> {last[name]:{style}}{unit}"
            rows.append((f"{name} on held-out volumes", f"{change} (epochs {first['epoch']} and {last['epoch']})"))
        rows.append(("best validation loss", f"{best['loss']:.4f} (epoch {best['epoch']})"))
    rows += [
        ("model", str(Path(model_dir) / "autoencoder.pt")),
        ("TensorBoard", f"tensorboard --logdir {log.log_dir}"),
        ("picture", str(Path(output_dir) / "validation.png")),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(["", *(f"{name:<{width}}  {text}" for name, text in rows)]))
