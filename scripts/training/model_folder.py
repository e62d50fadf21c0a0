"""The folder of a training: which weights and which checkpoint lie there, and what happens to older ones."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.networks.weights import write_tensors

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"


class ModelFolder:
    """Weights, of which those of the best epoch are kept beside the newest, and a checkpoint.

    Files of an earlier training are kept in `previous_1`, `previous_2`, ... once a new one first writes.

    Args:
        path: of the folder.
        weights: which network a file holds, by its name; a name with `{}` in it, for the number of the epoch, is that
            of the best weights, any other that of the newest.
        protected: files that are never removed: the weights that the training starts from.
        checkpoint: the name of its file; trainings of one folder have different ones.
    """

    def __init__(
        self,
        path: str | Path,
        weights: Mapping[str, str],
        protected: tuple[str, ...] = (),
        checkpoint: str = CHECKPOINT,
    ) -> None:
        self.path, self.weights, self.protected = Path(path), dict(weights), protected
        self.checkpoint = self.path / checkpoint
        self.is_new = False  # nothing of this training is here; until it is, files of an earlier one stay
        self._newest = [name for name in self.weights if "{}" not in name]
        self._best = [name for name in self.weights if "{}" in name]

    def begin(self, overwrite: bool) -> None:
        """A new training begins here.

        Raises:
            UserError: where the folder holds a model, unless `overwrite`.
        """
        if not overwrite and any((self.path / name).exists() for name in self._newest):
            raise UserError(
                f"{self.path}: holds a trained model, and resume is false; give another model_dir, or "
                "--overwrite True to begin anew in this one (its files are kept in previous_N)"
            )
        self.is_new = True

    def save(
        self, contents: Mapping[str, dict[str, Any]], checkpoint: Mapping[str, Any], epoch: int, best: bool
    ) -> None:
        """Write the weights of an epoch, then the checkpoint, and drop what was the best before, if `best`.

        Args:
            contents: of the weights files, by the names of the networks.
            checkpoint: its content.
            epoch: that has ended.
            best: whether its validation was the best so far.
        """
        self._set_aside()
        for name in self._newest:
            write_tensors(contents[self.weights[name]], self.path / name)
        for name in self._best if best else ():
            write_tensors(contents[self.weights[name]], self.path / name.format(epoch))
        self.save_checkpoint(checkpoint)
        for name in self._best if best else ():
            for other in self.path.glob(name.format("*")):
                if other.name != name.format(epoch):
                    self._remove(other)

    def save_checkpoint(self, content: Mapping[str, Any]) -> None:
        """Write the checkpoint alone."""
        self._set_aside()
        write_tensors(dict(content), self.checkpoint)

    def _remove(self, file: Path) -> None:
        if str(file.resolve()) not in self.protected:
            file.unlink()

    def _set_aside(self) -> None:
        if not self.is_new:
            return
        self.is_new = False
        kept = [file for name in (self.checkpoint.name, *self._newest) if (file := self.path / name).exists()]
        gone = [file for name in self._best for file in self.path.glob(name.format("*"))]
        if not kept and not gone:
            return
        number = 1
        while (folder := self.path / f"previous_{number}").exists():
            number += 1
        folder.mkdir()
        for file in (*kept, *gone):
            try:  # a second name, so that the file is here until a new one replaces it
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)
        for file in gone:
            self._remove(file)
        logger.info("%s holds an earlier training; its files are kept in %s", self.path, folder)
