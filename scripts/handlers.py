"""What a person sees of a training: progress bar, log lines, TensorBoard, pictures, and the summary at its end."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from monai.handlers import ValidationHandler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from scripts.errors import UserError

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # losses are read from the device no more often than this


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A bar that goes away when it is done, and that fills no log file: there, a line every half minute."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False, mininterval=interval)


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
        self.pending: list[tuple[int, float, list[str], torch.Tensor]] = []
        self.sums: dict[str, float] = {}
        self.steps = 0

    @contextmanager
    def writing(self) -> Iterator[SummaryWriter]:
        """The writer, made when it is first needed; a new training hides what another one logged here before.

        Raises:
            UserError: where the disk is full or the folder not writable.
        """
        try:
            if self._writer is None:
                options: dict[str, Any] = {"purge_step": None if self.resumed else 1, "flush_secs": 30}
                self._writer = SummaryWriter(self.log_dir, filename_suffix=f".{self.training}", **options)
            yield self._writer
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{self.log_dir}: cannot be written ({reason}); free space or change tfevent_path"
            ) from error

    def add_step(self, step: int, rate: float, losses: Mapping[str, torch.Tensor]) -> None:
        """Take the losses of a step; they stay on the device until `flush`."""
        self.pending.append((step, rate, list(losses), torch.stack(list(losses.values()))))

    def flush(self) -> dict[str, float]:
        """Write the steps that were taken, and return the losses of the last one; none where there was none."""
        if not self.pending:
            return {}
        rows = torch.stack([values for *_, values in self.pending]).cpu().tolist()
        for (step, rate, names, _), row in zip(self.pending, rows, strict=True):
            with self.writing() as writer:
                for name, value in zip(names, row, strict=True):
                    writer.add_scalar(f"train_iter/{name}", value, step)
                writer.add_scalar("train_iter/learning_rate", rate, step)
            if all(map(math.isfinite, row)):
                self.sums = {name: self.sums.get(name, 0.0) + value for name, value in zip(names, row, strict=True)}
                self.steps += 1
        self.pending.clear()
        return dict(zip(names, row, strict=True))

    def epoch_means(self) -> dict[str, float]:
        """Means over the steps since the last call, those that were not finite left out."""
        self.flush()
        means = {name: total / self.steps for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch so far, and how long each event file is."""
        self.flush()
        with self.writing() as writer:
            writer.flush()
            sizes = {file.name: file.stat().st_size for file in self._files()}
        return {"training": self.training, "sums": self.sums, "steps": self.steps, "sizes": sizes}

    def _files(self) -> list[Path]:
        return list(Path(self.log_dir).glob(f"*tfevents*.{self.training}"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Cut the event files back; those begun since then get a name that TensorBoard does not read."""
        self.training, self.resumed = state["training"], True
        self.sums, self.steps = dict(state["sums"]), state["steps"]
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


def _planes(volume: np.ndarray) -> list[np.ndarray]:
    """The sagittal, coronal and axial plane through the centre of a RAS volume, head up, front up."""
    middle = [n // 2 for n in volume.shape]
    return [np.take(volume, middle[axis], axis)[:, ::-1].T for axis in range(3)]


def three_planes(volume: np.ndarray) -> np.ndarray:
    """The three central planes of (X, Y, Z) in [0, 1] side by side, padded to one height: (H, W) in [0, 1]."""
    planes = _planes(volume)
    height = max(p.shape[0] for p in planes)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0))) for p in planes]
    return np.clip(np.concatenate(padded, axis=1), 0, 1)


def save_comparison(
    original: np.ndarray, reconstruction: np.ndarray, spacing: Sequence[float], path: Path, title: str
) -> None:
    """A PNG of original, reconstruction and error (HU), sagittal, coronal and axial.

    Args:
        original: (X, Y, Z) in RAS, in [0, 1] for -1000..1000 HU.
        reconstruction: in the same shape.
        spacing: mm along the axes.
        path: of the PNG.
        title: above the picture.
    """
    volumes = (original, reconstruction, (reconstruction - original) * 2000)
    scales: Sequence[dict[str, Any]] = (
        {"cmap": "gray", "vmin": 0.0, "vmax": 0.7},
        {"cmap": "gray", "vmin": 0.0, "vmax": 0.7},
        {"cmap": "RdBu_r", "vmin": -300, "vmax": 300},
    )
    aspects = (spacing[2] / spacing[1], spacing[2] / spacing[0], spacing[1] / spacing[0])
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3)
    names = ("original", "reconstruction", "error (HU)")
    for column, (volume, scale, name) in enumerate(zip(volumes, scales, names, strict=True)):
        for row, (plane, label) in enumerate(zip(_planes(volume), ("sagittal", "coronal", "axial"), strict=True)):
            picture = axes[row, column].imshow(plane, aspect=aspects[row], **scale)
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                axes[row, column].set_ylabel(label)
        axes[0, column].set_title(name)
    figure.colorbar(picture, ax=axes[:, 2], shrink=0.6)
    figure.suptitle(f"{title}, window -1000..400 HU")
    picture_bytes = BytesIO()
    figure.savefig(picture_bytes, dpi=100, format="png")
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_bytes(picture_bytes.getvalue())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or change output_dir") from error


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
