"""What a person sees of a training: progress bar, log lines, TensorBoard, pictures, and the summary at its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
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

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # losses are read from the device no more often than this


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """A bar that goes away when it is done, and that fills no log file: there, a line every half minute."""
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False, mininterval=interval)


class Validate(ValidationHandler):
    """Validates after the first epoch, after every `interval` epochs, and after the last.

    The first is early so that a validation that cannot work is found out before hours are spent. The metrics are
    appended to the trainer's `state.validations`.
    """

    def attach(self, engine: Any) -> None:
        def due(engine: Any, epoch: int) -> bool:
            return epoch == 1 or epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)

    def __call__(self, engine: Any) -> None:
        started = time.perf_counter()
        super().__call__(engine)
        metrics = self.validator.state.metrics  # type: ignore[union-attr]
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
    """Owns the event file of a training in `log_dir`; written by the other handlers through `writer`."""

    def __init__(self, log_dir: str) -> None:
        self.log_dir = log_dir
        self._writer: SummaryWriter | None = None

    def writer(self, purge_step: int | None = None) -> SummaryWriter:
        """The writer, made when it is first needed; `purge_step` hides what an earlier run logged from there on."""
        if self._writer is None:
            self._writer = SummaryWriter(self.log_dir, purge_step=purge_step, flush_secs=30)
        return self._writer

    def close(self) -> None:
        """Finish the event file, if one was begun."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


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
        done = state.iteration - (state.epoch - 1) * state.epoch_length
        self.bar = progress_bar(state.epoch_length, f"epoch {state.epoch}/{state.max_epochs}", "step", done)
        self.pending: list[torch.Tensor] = []
        self.sums: dict[str, float] = {}
        self.steps = 0
        self.waited = 0.0
        self.started = self.shown = self.wanted = time.perf_counter()
        self.log.writer(purge_step=state.iteration + 1)

    def _batch_wanted(self, engine: Any) -> None:
        self.wanted = time.perf_counter()

    def _batch_there(self, engine: Any) -> None:
        self.waited += time.perf_counter() - self.wanted

    def _iteration_completed(self, engine: Any) -> None:
        self.names = list(engine.state.output)
        self.pending.append(torch.stack(list(engine.state.output.values())))
        if time.perf_counter() - self.shown >= REPORT_SECONDS:
            self._show(engine)

    def _show(self, engine: Any) -> None:
        if not self.pending:
            return
        values = torch.stack(self.pending).cpu().tolist()
        first = engine.state.iteration - len(values) + 1
        rate = self.optimizer.param_groups[0]["lr"]
        writer = self.log.writer()
        for step, row in enumerate(values, first):
            for name, value in zip(self.names, row, strict=True):
                writer.add_scalar(f"train_iter/{name}", value, step)
                self.sums[name] = self.sums.get(name, 0.0) + value
            writer.add_scalar("train_iter/learning_rate", rate, step)
        self.steps += len(values)
        self.pending.clear()
        self.shown = time.perf_counter()
        last = dict(zip(self.names, values[-1], strict=True))
        shown = {k: f"{last[k]:.3g}" for k in ("recons_loss", "p_loss", "adv_loss", "d_loss")}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(len(values))

    def _epoch_completed(self, engine: Any) -> None:
        self._show(engine)
        self.bar.close()
        seconds = time.perf_counter() - self.started
        means = {name: total / self.steps for name, total in self.sums.items()}
        means["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        means["data_wait_share"] = self.waited / seconds
        means["patches_per_second"] = self.steps * self.batch_size / seconds
        epoch = engine.state.epoch
        for name, value in means.items():
            self.log.writer().add_scalar(f"train_epoch/{name}", value, epoch)
        left = seconds * (engine.state.max_epochs - epoch)
        text = "  ".join(f"{k} {means[k]:.4f}" for k in ("loss", "recons_loss", "p_loss", "adv_loss", "d_loss"))
        logger.info(
            "epoch %d/%d: %s  lr %.1e  %.2f patches/s  data wait %.0f %%  left %s",
            epoch, engine.state.max_epochs, text, means["learning_rate"], means["patches_per_second"],
            100 * means["data_wait_share"], tqdm.format_interval(left),
        )  # fmt: skip

    def _end(self, engine: Any) -> None:
        if hasattr(self, "bar"):
            self._show(engine)
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
        epoch, writer = engine.state.epoch, self.log.writer()
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
    part = path.with_name(f".part-{path.name}")
    figure.savefig(part, dpi=100, format="png")
    part.replace(path)


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
