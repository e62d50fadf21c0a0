"""All state of a training named once: where it starts from, what is saved, how it resumes."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from signal import Signals
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from torch.optim.lr_scheduler import LRScheduler

from scripts.errors import UserError
from scripts.weights import AUTOENCODER, BEST, load_weights, save_weights, write_tensors

logger = logging.getLogger(__name__)

CHECKPOINT, DISCRIMINATOR = "checkpoint.pt", "discriminator.pt"
EPOCH_SECONDS = 60.0  # an epoch this long is worth a checkpoint before its validation


class Checkpointing:
    """Saves and resumes a training.

    Args:
        trainer: a `VaeTrainer`; its `state.validations` lists the metrics of each validation.
        state: everything with a `state_dict`: networks, optimizers, schedulers, scalers, by name; among them
            `autoencoder` and `discriminator`.
        model_dir: folder of the weights and of the checkpoint.
        settings: what a resumed training must have in common with the earlier one, by the names of its keys.
        is_main: whether this process writes.
    """

    def __init__(
        self,
        trainer: Any,
        state: Mapping[str, Any],
        model_dir: str,
        settings: Mapping[str, Any] | None = None,
        is_main: bool = True,
    ) -> None:
        self.trainer, self.is_main = trainer, is_main
        self.state = {**state, "scaler_g": trainer.scaler_g}
        self.settings = _flat(settings or {})
        for name in ("autoencoder", "discriminator"):
            self.settings |= _layers(f"{name}_def", self.state[name])
        self.folder = Path(model_dir)
        self.started_from: str | None = None
        self.begins = False  # until the first save, files of an earlier training stay where they are
        self.saved = time.monotonic()
        self.signal = 0
        trainer.state.validations = []

    def start(
        self, resume: bool, finetune: bool, trained_autoencoder_path: str | None, overwrite: bool = False
    ) -> None:
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
        if not resume and not overwrite and (self.folder / AUTOENCODER).exists():
            raise UserError(
                f"{self.folder}: holds a trained model, and resume is false; give another model_dir, or "
                "--overwrite True to begin anew in this one (its files are kept in previous_N)"
            )
        if finetune:
            load_weights(self.state["autoencoder"], str(trained_autoencoder_path))
        self.begins = True

    def attach(self, checkpoint_minutes: float) -> None:
        """Save at the end of each epoch, after its validation, and the checkpoint every so many minutes.

        After SIGTERM, SIGINT or SIGUSR1 the step, or the volume that is being validated, is finished, the checkpoint
        written, and the training terminated.
        """
        self.seconds = 60 * checkpoint_minutes
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)
        self.trainer.add_event_handler(Events.INTERRUPT, self._interrupted)

    def _iteration_completed(self, engine: Any) -> None:
        self.signal = self.signal or self.trainer.stop.agreed()
        engine.state.epoch_pending = engine.state.iteration % engine.state.epoch_length == 0
        # What ends an epoch may take long; an epoch that did is safe before it.
        limit = min(self.seconds, EPOCH_SECONDS) if engine.state.epoch_pending else self.seconds
        if self.is_main and (self.signal or time.monotonic() - self.saved > limit):
            self._write()
        self._stop_if_asked(engine)

    def _stop_if_asked(self, engine: Any) -> None:
        finished = engine.state.iteration == engine.state.max_epochs * engine.state.epoch_length
        if not self.signal or (finished and not engine.state.epoch_pending):
            return
        if self.is_main:
            logger.warning(
                "stopped by %s after step %d; the same command goes on from %s",
                Signals(self.signal).name, engine.state.iteration, self.folder / CHECKPOINT,
            )  # fmt: skip
        engine.terminate()

    def _interrupted(self, engine: Any) -> None:
        """A validation was, before anything that follows it: it is done again on resuming."""
        if self.is_main:
            self._write()
            logger.warning("stopped in a validation; the same command goes on from %s", self.folder / CHECKPOINT)

    def _epoch_completed(self, engine: Any) -> None:
        if engine.should_terminate:  # interrupted in its validation, which is done again
            return
        engine.state.epoch_pending = False
        epoch = engine.state.epoch
        validations = engine.state.validations
        best = bool(validations) and validations[-1]["epoch"] == epoch == self.best_epoch()
        if self.is_main:
            self._save(epoch, best)
        self._stop_if_asked(engine)

    def _save(self, epoch: int, best: bool) -> None:
        if not self._finite():
            return
        self._set_aside()
        save_weights(self.state["autoencoder"], self.folder / AUTOENCODER)
        save_weights(self.state["discriminator"], self.folder / DISCRIMINATOR)
        if best:
            save_weights(self.state["autoencoder"], self.folder / BEST.format(epoch))
        self._write()
        for other in self.folder.glob(BEST.format("*")):
            if best and other.name != BEST.format(epoch) and str(other.resolve()) != self.started_from:
                other.unlink()

    def best_epoch(self) -> int:
        """The epoch of the lowest validation loss so far."""
        losses = [(v["loss"], v["epoch"]) for v in self.trainer.state.validations]
        return min((loss if math.isfinite(loss) else math.inf, epoch) for loss, epoch in losses)[1]

    def _content(self) -> dict[str, Any]:
        engine = self.trainer.state
        return {
            "iteration": engine.iteration,
            "epoch": engine.iteration // engine.epoch_length,
            "epoch_pending": engine.epoch_pending,
            "epoch_length": engine.epoch_length,
            "batch_size": self._batch_size(),
            "settings": self.settings,
            "digest": hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest(),
            "validations": engine.validations,
            "started_from": self.started_from,
            "state": {name: item.state_dict() for name, item in self.state.items()},
        }

    def _batch_size(self) -> int:
        sampler = self.trainer.data_loader.sampler
        return getattr(sampler, "global_batch_size", self.trainer.data_loader.batch_size)

    def _finite(self) -> bool:
        """Whether the weights are worth keeping."""
        weights = [p for name in ("autoencoder", "discriminator") for p in self.state[name].parameters()]
        if finite := bool(torch.stack([p.isfinite().all() for p in weights]).all()):
            return True
        logger.error("the weights are not finite; %s keeps the last good ones", self.folder)
        return finite

    def _write(self) -> None:
        if not self._finite():
            return
        self._set_aside()
        write_tensors(self._content(), self.folder / CHECKPOINT)
        self.saved = time.monotonic()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if "settings" not in content:
                raise KeyError("written by an earlier version")
            if not self.state.keys() <= content["state"].keys():
                raise KeyError(f"no state of {min(self.state.keys() - content['state'].keys())}")
            return content
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"{path}: cannot be resumed from ({reason}); move it away, or start over with --resume False "
                "--overwrite True"
            ) from error

    def _restore(self, content: Mapping[str, Any], path: Path) -> None:
        engine = self.trainer.state
        changed = [k for k in content["settings"] if content["settings"][k] != self.settings.get(k)]
        changed += [k for k in self.settings if k not in content["settings"]]
        if changed:
            was, now = content["settings"].get(changed[0]), self.settings.get(changed[0])
            more = f" (and {', '.join(changed[1:4])}{', ...' if len(changed) > 4 else ''})" if len(changed) > 1 else ""
            raise UserError(
                f"{path}: {changed[0]} was {was}, now it is {now}{more}; restore it, or start over in another model_dir"
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
                    "start over in another model_dir"
                ) from error
        done, batches = divmod(content["iteration"], content["epoch_length"])
        # Another number of ranks or another batch size: the batches that hold the volumes not yet seen.
        batches = min(batches * content["batch_size"] // self._batch_size(), engine.epoch_length - 1)
        engine.iteration = done * engine.epoch_length + batches
        engine.epoch, engine.epoch_pending = done, content["epoch_pending"]
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
            if file.name not in names and str(file.resolve()) != self.started_from:
                file.unlink()
        logger.info("%s holds an earlier training; its files are kept in %s", self.folder, folder)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested groups by one key each, `group#knob`; long lists by a digest."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}#")
        elif isinstance(value, (list, tuple)) and len(value) > 8:
            digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
            flat[prefix + key] = f"{len(value)} entries ({digest})"
        else:
            flat[prefix + key] = list(value) if isinstance(value, (list, tuple)) else value
    return flat


def _layers(name: str, network: torch.nn.Module) -> dict[str, str]:
    """What each layer of a network is, by its name."""
    return {f"{name}: {key}": repr(m) for key, m in network.named_modules() if not any(True for _ in m.children())}


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
    overwrite: bool = False,
    settings: Mapping[str, Any] | None = None,
    is_main: bool = True,
) -> None:
    """Start or resume `trainer` and save it from now on; see `Checkpointing`."""
    checkpointing = Checkpointing(trainer, state, model_dir, settings, is_main)
    checkpointing.start(resume, finetune, trained_autoencoder_path, overwrite)
    checkpointing.attach(checkpoint_minutes)
    steps: Any = idist.all_gather([trainer.state.iteration])
    if any(step != [trainer.state.iteration] for step in steps):
        raise UserError(f"{model_dir}: the ranks found different checkpoints there; put model_dir on a shared disk")
