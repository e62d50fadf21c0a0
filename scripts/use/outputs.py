"""Results in a folder: named after their volumes, written whole, found again, and all made with the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from scripts.common.errors import UserError
from scripts.common.files import write_json
from scripts.networks.weights import Weights

RECORD = "made_with{}.json"
ENDINGS = ("_recon", "_emb", "_emb_sigma")


class Output:
    """A folder of results, and the record of the weights and settings that they were made with.

    What is older than the record counts as not done: so results of two networks do not mix, and an overwriting that
    was interrupted goes on.

    Args:
        folder: where the results go.
        ending: what follows a volume's name, before `.nii.gz`: one of `ENDINGS`.
        weights: the results come from them.
        settings: the results depend on them.
        bundle_version: recorded with the weights.
        overwrite: make results anew that are there already.
        sidecars: whether a result is whole only with its JSON file.

    Raises:
        UserError: where the folder holds results of other weights or settings, which `overwrite` replaces.
    """

    def __init__(
        self,
        folder: str,
        ending: str,
        weights: Weights,
        settings: Mapping[str, Any],
        bundle_version: str = "",
        overwrite: bool = False,
        sidecars: bool = False,
    ) -> None:
        self.folder, self.ending = Path(folder), ending
        self.facts = {**weights.facts(), "bundle_version": bundle_version}
        self.record = self.folder / RECORD.format(ending)
        self.ours = self.record.is_file()
        self.overwrite, self.sidecars = overwrite, sidecars
        if self.ours and not overwrite:
            self._compare(settings)
        idist.barrier()  # every rank has looked before rank 0 writes, and none goes on before it has written
        if idist.get_rank() == 0 and (overwrite or not self.ours):
            write_json(self.record, self.facts | {"settings": settings})
        idist.barrier()

    def _compare(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder whose results come from other weights or settings than these."""
        remedy = "give another output_dir, or --overwrite True to replace them"
        try:
            earlier = json.loads(self.record.read_text(encoding="utf-8"))
            weights, sha256, was = earlier["weights"], earlier["weights_sha256"], dict(earlier["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.record}: is damaged, so it is not known what results are there; {remedy}"
            ) from error
        if sha256 != self.facts["weights_sha256"]:
            raise UserError(f"{self.folder}: holds results of other weights ({weights}); {remedy}")
        for name, value in settings.items():
            if was.get(name) != value:
                change = f"{name} was {was.get(name)}, now it is {value}"
                raise UserError(f"{self.folder}: holds results of other settings ({change}); {remedy}")

    def path(self, name: str) -> Path:
        """The file that the result of the volume `name` is written to."""
        return self.folder / f"{name}{self.ending}.nii.gz"

    def sidecar(self, name: str) -> Path:
        """The JSON file beside the result of the volume `name`."""
        return self.folder / f"{name}{self.ending}.nii.gz.json"

    def done(self, name: str) -> bool:
        """Whether the result of the volume `name` is there, and was made with the present weights and settings.

        Raises:
            UserError: where a file of that name is there, but no earlier run of this has made it.
        """
        path = self.path(name)
        if not path.is_file():
            return False
        if path.stat().st_mtime_ns >= self.record.stat().st_mtime_ns:
            return not self.sidecars or self.sidecar(name).is_file()
        if not self.ours and not self.overwrite:
            raise UserError(
                f"{path}: is there, but is no result of an earlier run; move it, give another output_dir, or "
                "--overwrite True to replace it"
            )
        return False
