"""All state of a training named once: where it starts from, what is saved, how it resumes."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from ignite.engine import Events
from torch.optim.lr_scheduler import LRScheduler

from scripts.autoencoder import load_weights, save_weights, write_tensors
from scripts.errors import UserError

logger = logging.getLogger(__name__)

CHECKPOINT, AUTOENCODER, DISCRIMINATOR = "checkpoint.pt", "autoencoder.pt", "discriminator.pt"
BEST = "autoencoder_best_epoch{}.pt"


class Checkpointing:
    """Saves and resumes a training.

    Args:
        trainer: a `VaeTrainer`; its `state.validations` lists the metrics of each validation.
        state: everything with a `state_dict`: networks, optimizers, schedulers, scalers, by name; among them
            `autoencoder` and `discriminator`.
        model_dir: folder of the weights and of the checkpoint.
        is_main: whether this process writes.
    """

    def __init__(self, trainer: Any, state: Mapping[str, Any], model_dir: str, is_main: bool = True) -> None:
        self.trainer, self.is_main = trainer, is_main
        self.state = {**state, "scaler_g": trainer.scaler_g}
        self.folder = Path(model_dir)
        self.started_from: str | None = None
        self.begins = False  # until the first save, files of an earlier training stay where they are
        self.saved = time.monotonic()
        self.signal = 0
        trainer.state.validations = []

    def start(self, resume: bool, finetune: bool, trained_autoencoder_path: str | None) -> None:
        """Continue what `model_dir` holds, or else begin, from given weights if `finetune`, from scratch if not.

        A checkpoint that began from other weights belongs to another training: its files are set aside, and a new
        training begins.
        """
        self.started_from = str(Path(str(trained_autoencoder_path)).resolve()) if finetune else None
        checkpoint = self.folder / CHECKPOINT
        if resume and checkpoint.exists():
            content = self._read(checkpoint)
            if content["started_from"] == self.started_from:
                self._restore(content, checkpoint)
                return
            logger.warning(
                "%s began from other weights (%s): a new training begins", checkpoint, content["started_from"]
            )
        if finetune:
            load_weights(self.state["autoencoder"], str(trained_autoencoder_path))
        self.begins = True

    def attach(self, checkpoint_minutes: float) -> None:
        """Save at the end of each epoch, after its validation, and the checkpoint every so many minutes.

        After SIGTERM, SIGINT or SIGUSR1 the step is finished, the checkpoint written, and the training terminated; at
        the end of an epoch after its validation.
        """
        self.seconds = 60 * checkpoint_minutes
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _iteration_completed(self, engine: Any) -> None:
        self.signal = self.signal or self.trainer.stop.agreed()
        if engine.state.iteration % engine.state.epoch_length == 0:
            return  # what ends an epoch is saved with it
        if self.is_main and (self.signal or time.monotonic() - self.saved > self.seconds):
            self._write(self.folder / CHECKPOINT)
        self._stop_if_asked(engine)

    def _stop_if_asked(self, engine: Any) -> None:
        if not self.signal or engine.state.iteration == engine.state.max_epochs * engine.state.epoch_length:
            return
        if self.is_main:
            logger.warning(
                "stopped by %s after step %d; %s is written, and the same command goes on from there",
                Signals(self.signal).name, engine.state.iteration, self.folder / CHECKPOINT,
            )  # fmt: skip
        engine.terminate()

    def _epoch_completed(self, engine: Any) -> None:
        epoch = engine.state.epoch
        validations = engine.state.validations
        best = bool(validations) and validations[-1]["epoch"] == epoch == self.best_epoch()
        if self.is_main:
            self._save(epoch, best)
        self._stop_if_asked(engine)

    def _save(self, epoch: int, best: bool) -> None:
        self._set_aside()
        save_weights(self.state["autoencoder"], self.folder / AUTOENCODER)
        save_weights(self.state["discriminator"], self.folder / DISCRIMINATOR)
        if best:
            save_weights(self.state["autoencoder"], self.folder / BEST.format(epoch))
        self._write(self.folder / CHECKPOINT)
        for other in self.folder.glob(BEST.format("*")):
            if best and other.name != BEST.format(epoch) and str(other.resolve()) != self.started_from:
                other.unlink()

    def best_epoch(self) -> int:
        """The epoch of the lowest validation loss so far."""
        return min(self.trainer.state.validations, key=lambda v: (v["loss"], v["epoch"]))["epoch"]

    def _content(self) -> dict[str, Any]:
        engine = self.trainer.state
        return {
            "iteration": engine.iteration,
            "epoch_length": engine.epoch_length,
            "validations": engine.validations,
            "started_from": self.started_from,
            "state": {name: item.state_dict() for name, item in self.state.items()},
        }

    def _write(self, path: Path) -> None:
        self._set_aside()
        write_tensors(self._content(), path)
        self.saved = time.monotonic()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if not self.state.keys() <= content["state"].keys():
                raise KeyError(f"no state of {min(self.state.keys() - content['state'].keys())}")
            return content
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{path}: cannot be resumed from ({reason}); move it away, or start over with --resume False"
            ) from error

    def _restore(self, content: Mapping[str, Any], path: Path) -> None:
        engine = self.trainer.state
        if content["epoch_length"] != engine.epoch_length:
            raise UserError(
                f"{path}: an epoch had {content['epoch_length']} steps, now it has {engine.epoch_length}; restore the "
                "training data and batch_size, or start over with --resume False and another model_dir"
            )
        for name, item in self.state.items():
            if not content["state"][name]:  # a gradient scaler of a run that needed none
                continue
            try:
                _load(item, content["state"][name])
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:160]
                raise UserError(
                    f"{path}: does not fit this configuration ({name}: {reason}); restore the network definition, or "
                    "start over with --resume False and another model_dir"
                ) from error
        engine.iteration = content["iteration"]
        engine.epoch = engine.iteration // engine.epoch_length
        engine.validations = list(content["validations"])
        logger.info("resuming from %s after epoch %d (step %d)", path, engine.epoch, engine.iteration)

    def _set_aside(self) -> None:
        """Keep the files of another training that used this folder, in `previous_1`, `previous_2`, ..."""
        if not self.begins:
            return
        self.begins = False
        names = (CHECKPOINT, AUTOENCODER, DISCRIMINATOR)
        files = [f for f in (*(self.folder / n for n in names), *self.folder.glob(BEST.format("*"))) if f.exists()]
        if not files:
            return
        number = 1
        while (folder := self.folder / f"previous_{number}").exists():
            number += 1
        folder.mkdir()
        for file in files:
            try:  # a second name, so that the file is here until a new one replaces it
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)
        for file in files:
            if file.name not in (AUTOENCODER, DISCRIMINATOR) and str(file.resolve()) != self.started_from:
                file.unlink()
        logger.info("%s holds an earlier training; its files are kept in %s", self.folder, folder)


def _load(item: Any, state: dict[str, Any]) -> None:
    """Load `state`, but let the configuration decide on learning rates: a changed `lr` or warm-up is obeyed."""
    if isinstance(item, LRScheduler):
        item.last_epoch, item._step_count = state["last_epoch"], state["_step_count"]
        item._last_lr = [base * item.lr_lambdas[0](item.last_epoch) for base in item.base_lrs]  # type: ignore[attr-defined]
        for group, rate in zip(item.optimizer.param_groups, item._last_lr, strict=True):
            group["lr"] = rate
        return
    item.load_state_dict(state)


def attach_checkpointing(
    trainer: Any,
    state: Mapping[str, Any],
    model_dir: str,
    resume: bool = True,
    checkpoint_minutes: float = 30,
    finetune: bool = False,
    trained_autoencoder_path: str | None = None,
    is_main: bool = True,
) -> None:
    """Start or resume `trainer` and save it from now on; see `Checkpointing`."""
    checkpointing = Checkpointing(trainer, state, model_dir, is_main)
    checkpointing.start(resume, finetune, trained_autoencoder_path)
    checkpointing.attach(checkpoint_minutes)
