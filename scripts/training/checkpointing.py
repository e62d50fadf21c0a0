"""What a training's checkpoint holds, when it is written, and how a training goes on from it."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from ignite.engine import Events

from scripts.common.errors import UserError, reason
from scripts.common.files import disown, own
from scripts.common.ranks import gather
from scripts.networks.weights import load_weights
from scripts.training.average import AveragedNetwork
from scripts.training.engine import TrainingEngine
from scripts.training.model_folder import CHECKPOINT, ModelFolder
from scripts.training.schedule import hyperparameters

logger = logging.getLogger(__name__)

EPOCH_SECONDS = 60.0  # an epoch this long is worth a checkpoint before its validation


class Checkpointing:
    """Saves and resumes a training.

    Args:
        trainer: whose networks, optimizers and progress are saved.
        folder: where to.
        state: what else has a `state_dict` and belongs to the training, by name.
        settings: what a resumed training must have in common with the earlier one, by the names of its keys.
        is_main: whether this process writes.
    """

    def __init__(
        self,
        trainer: TrainingEngine,
        folder: ModelFolder,
        state: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
        is_main: bool = True,
    ) -> None:
        self.trainer, self.folder, self.is_main = trainer, folder, is_main
        self.state = {**trainer.stateful(), **(state or {})}
        self.settings = _flat(settings or {})
        for name, network in trainer.bare.items():
            self.settings |= _layers(f"{name}_def", network)
        self.started_from: str | None = None
        self.saved = time.monotonic()
        self.signal = 0

    def start(self, resume: bool, start_weights: Mapping[str, str], overwrite: bool = False) -> None:
        """Continue what the folder holds, or else begin, from given weights where there are any.

        A checkpoint that began from other weights belongs to another training: its files are set aside, and a new
        training begins.

        Args:
            resume: whether to continue.
            start_weights: files to begin from, by the names of the networks; empty to begin from scratch.
            overwrite: begin in a folder that holds a model.
        """
        self.started_from = ", ".join(str(Path(path).resolve()) for path in start_weights.values()) or None
        checkpoint = self.folder.checkpoint
        if resume and checkpoint.exists():
            content = self._read(checkpoint)
            if content["started_from"] == self.started_from:
                self._restore(content, checkpoint)
                return
            logger.warning(
                "%s began from other weights (%s): a new training begins", checkpoint, content["started_from"]
            )
        self.folder.begin(overwrite or resume)
        for name, path in start_weights.items():
            load_weights(self.trainer.bare[name], path)
        for average in self.trainer.averages.values():
            average.restart()

    def attach(self, checkpoint_minutes: float) -> None:
        """Save at the end of each epoch, after its validation, and the checkpoint every so many minutes.

        After SIGTERM, SIGINT or SIGUSR1 the step, or the volume that is being validated, is finished, the checkpoint
        written, and the training terminated.
        """
        self.seconds = 60 * checkpoint_minutes
        self.trainer.add_event_handler(Events.ITERATION_COMPLETED, self._iteration_completed)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, self._epoch_completed)

    def _iteration_completed(self, engine: TrainingEngine) -> None:
        self.signal = self.signal or engine.stop.agreed()
        pending = engine.state.iteration % engine.state.epoch_length == 0
        engine.progress.epoch_pending = pending
        # What ends an epoch may take long; an epoch that did is safe before it.
        limit = min(self.seconds, EPOCH_SECONDS) if pending else self.seconds
        if self.signal or time.monotonic() - self.saved > limit:
            self._save_checkpoint()
        self._stop_if_asked(engine)

    def _stop_if_asked(self, engine: TrainingEngine) -> None:
        finished = engine.state.iteration == engine.state.max_epochs * engine.state.epoch_length
        if not self.signal or (finished and not engine.progress.epoch_pending):
            return
        if self.is_main:
            logger.warning(
                "stopped by %s after step %d; the same command goes on from %s",
                Signals(self.signal).name, engine.state.iteration, self.folder.checkpoint,
            )  # fmt: skip
        engine.terminate()

    def _epoch_completed(self, engine: TrainingEngine) -> None:
        if engine.progress.interrupted:  # in its validation, before anything that follows it
            self._save_checkpoint()
            if self.is_main:
                logger.warning("stopped in a validation; the same command goes on from %s", self.folder.checkpoint)
            return
        engine.progress.epoch_pending = False
        epoch = engine.state.epoch
        best = engine.progress.best(engine.best_by) if engine.best_by else None
        if self.is_main and self._finite():
            self.folder.save(engine.contents(), self._content(), epoch, best is not None and best["epoch"] == epoch)
            self.saved = time.monotonic()
        self._stop_if_asked(engine)

    def _content(self) -> dict[str, Any]:
        engine, progress = self.trainer.state, self.trainer.progress
        return {
            "iteration": engine.iteration,
            "epoch": engine.iteration // engine.epoch_length,
            "epoch_pending": progress.epoch_pending,
            "epoch_length": engine.epoch_length,
            "batch_size": self._batch_size(),
            "settings": self.settings,
            "validations": progress.validations,
            "started_from": self.started_from,
            "state": {name: item.state_dict() for name, item in self.state.items()},
        }

    def _batch_size(self) -> int:
        loader: Any = self.trainer.data_loader
        return getattr(loader.sampler, "global_batch_size", loader.batch_size)

    def _finite(self) -> bool:
        """Whether the weights are worth keeping."""
        weights = [p for network in self.trainer.bare.values() for p in network.parameters()]
        finite = bool(torch.stack([p.isfinite().all() for p in weights]).all())
        if not finite:
            logger.error("the weights are not finite; %s keeps the last good ones", self.folder.path)
        return finite

    def _save_checkpoint(self) -> None:
        if self.is_main and self._finite():
            self.folder.save_checkpoint(self._content())
            self.saved = time.monotonic()

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if "settings" not in content:
                raise KeyError("written by an earlier version")
            # An average begins where there was none; all else must be there.
            needed = {name for name, item in self.state.items() if not isinstance(item, AveragedNetwork)}
            if missing := needed - content["state"].keys():
                raise KeyError(f"no state of {min(missing)}")
            return content
        except Exception as error:
            raise UserError(
                f"{path}: cannot be resumed from ({reason(error)}); move it away, or start over with --resume False "
                "--overwrite True"
            ) from error

    def _restore(self, content: Mapping[str, Any], path: Path) -> None:
        self._compare(content["settings"], path)
        configured = {name: hyperparameters(optimizer) for name, optimizer in self.trainer.optimizers.items()}
        for name, item in self.state.items():
            state = content["state"].get(name, {})
            if not state and not isinstance(item, AveragedNetwork):  # a gradient scaler of a run that needed none
                continue
            try:
                item.load_state_dict(state)
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    f"{path}: does not fit this configuration ({name}: {reason(error)}); restore the network "
                    "definition, or start over in another model_dir"
                ) from error
        engine, progress = self.trainer.state, self.trainer.progress
        done, batches = divmod(content["iteration"], content["epoch_length"])
        # Another number of ranks or another batch size: the batches that hold the volumes not yet seen.
        batches = min(batches * content["batch_size"] // self._batch_size(), engine.epoch_length - 1)
        engine.iteration, engine.epoch = done * engine.epoch_length + batches, done
        progress.epoch_pending, progress.validations = content["epoch_pending"], list(content["validations"])
        self.trainer.restore_rates(configured)
        logger.info("resuming from %s after epoch %d (step %d)", path, engine.epoch, engine.iteration)

    def _compare(self, settings: Mapping[str, Any], path: Path) -> None:
        changed = [key for key, value in settings.items() if value != self.settings.get(key)]
        # A layer that was not there is a change; a setting that was not is one that an earlier version did not write.
        changed += [key for key in self.settings if key not in settings and ": " in key]
        if changed:
            was, now = settings.get(changed[0]), self.settings.get(changed[0])
            more = f" (and {', '.join(changed[1:4])}{', ...' if len(changed) > 4 else ''})" if len(changed) > 1 else ""
            raise UserError(
                f"{path}: {changed[0]} was {was}, now it is {now}{more}; restore it, or start over in another model_dir"
            )


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


def attach_checkpointing(
    trainer: TrainingEngine,
    model_dir: str,
    weights: Mapping[str, str],
    state: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    checkpoint_minutes: float = 30,
    resume: bool = True,
    overwrite: bool = False,
    finetune: bool = False,
    start_weights: Mapping[str, str | None] | None = None,
    is_main: bool = True,
    checkpoint: str = CHECKPOINT,
) -> None:
    """Start or resume `trainer` and save it from now on; see `ModelFolder` and `Checkpointing`.

    Args:
        trainer: a training.
        model_dir: folder of the weights and of the checkpoint.
        weights: which network each weights file holds.
        state: what is saved beside the trainer's own state.
        settings: what must not change while the training goes on.
        checkpoint_minutes: between checkpoints within an epoch.
        resume: continue what is in the folder.
        overwrite: begin anew in a folder that holds a model, where `resume` is false.
        finetune: begin from `start_weights`.
        start_weights: a file for each network that does not begin from scratch.
        is_main: whether this process writes.
        checkpoint: the name of its file.

    Raises:
        UserError: where another training writes there; and as `Checkpointing.start` does.
    """
    given = {name: str(path) for name, path in (start_weights or {}).items()} if finetune else {}
    folder = ModelFolder(model_dir, weights, tuple(str(Path(path).resolve()) for path in given.values()), checkpoint)
    checkpointing = Checkpointing(trainer, folder, state, settings, is_main)
    with ExitStack() as closing:
        if is_main:
            own(model_dir)
            closing.callback(disown, model_dir)
        checkpointing.start(resume, given, overwrite)
        trainer.closing = closing.pop_all()
    checkpointing.attach(checkpoint_minutes)
    if len(set(gather(trainer.state.iteration))) > 1:
        raise UserError(f"{model_dir}: the ranks found different checkpoints there; put model_dir on a shared disk")
