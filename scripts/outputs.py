"""Results in a folder: named after their volumes, written whole, found again, and never of two networks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from scripts.errors import UserError
from scripts.files import write_json
from scripts.weights import Weights

RECORD = "made_with.json"


class Output:
    """A folder of results.

    Args:
        folder: its path.
        suffix: what follows a volume's name, e.g. "_recon.nii.gz".
        weights: that the results come from.
        settings: that they depend on.
        bundle_version: recorded with them.
        overwrite: make results anew that are there already.

    Raises:
        UserError: where the folder holds results of other weights or settings, which `overwrite` replaces.
    """

    def __init__(
        self,
        folder: str,
        suffix: str,
        weights: Weights,
        settings: Mapping[str, Any] | None = None,
        bundle_version: str = "",
        overwrite: bool = False,
    ) -> None:
        self.folder, self.suffix, self.overwrite = Path(folder), suffix, overwrite
        self.facts = {**weights.facts(), "bundle_version": bundle_version}
        record = self.folder / RECORD
        if record.is_file() and not overwrite:
            self._compare(json.loads(record.read_text(encoding="utf-8")), dict(settings or {}))
        idist.barrier()
        if idist.get_rank() == 0:
            write_json(record, self.facts | {"settings": settings or {}})

    def _compare(self, earlier: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        remedy = "give another output_dir, or --overwrite True to replace them"
        if earlier["weights_sha256"] != self.facts["weights_sha256"]:
            raise UserError(f"{self.folder}: holds results of other weights ({earlier['weights']}); {remedy}")
        was = earlier["settings"]
        for name in settings:
            if was.get(name) != settings[name]:
                change = f"{name} was {was.get(name)}, now it is {settings[name]}"
                raise UserError(f"{self.folder}: holds results of other settings ({change}); {remedy}")

    def path(self, name: str) -> Path:
        """Of the result of the volume `name`."""
        return self.folder / f"{name}{self.suffix}"

    def done(self, name: str) -> bool:
        """Whether that result is there and is to stay."""
        return not self.overwrite and self.path(name).is_file()

    def sidecar(self, name: str) -> Path:
        """Of the JSON file beside that result."""
        return self.folder / f"{name}{self.suffix}.json"
