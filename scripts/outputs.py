"""Results in a folder: named after their volumes, written whole, found again, and never of two networks."""

from __future__ import annotations

import json
from pathlib import Path

import ignite.distributed as idist

from scripts.errors import UserError
from scripts.files import write_json
from scripts.weights import Weights

RECORD = "weights.json"


class Output:
    """A folder of results.

    Args:
        folder: its path.
        suffix: what follows a volume's name, e.g. "_recon.nii.gz".
        weights: that the results come from.
        bundle_version: recorded with them.
        overwrite: make results anew that are there already.

    Raises:
        UserError: where the folder holds results of other weights, which `overwrite` replaces.
    """

    def __init__(
        self, folder: str, suffix: str, weights: Weights, bundle_version: str = "", overwrite: bool = False
    ) -> None:
        self.folder, self.suffix, self.overwrite = Path(folder), suffix, overwrite
        self.facts = {**weights.facts(), "bundle_version": bundle_version}
        record = self.folder / RECORD
        if record.is_file() and not overwrite:
            earlier = json.loads(record.read_text(encoding="utf-8"))
            if earlier.get("weights_sha256") != weights.sha256:
                raise UserError(
                    f"{self.folder}: holds results of other weights ({earlier.get('weights')}); give another "
                    "output_dir, or --overwrite True to replace them"
                )
        idist.barrier()
        if idist.get_rank() == 0:
            write_json(record, self.facts)

    def path(self, name: str) -> Path:
        """Of the result of the volume `name`."""
        return self.folder / f"{name}{self.suffix}"

    def done(self, name: str) -> bool:
        """Whether that result is there and is to stay."""
        return not self.overwrite and self.path(name).is_file()

    def sidecar(self, name: str) -> Path:
        """Of the JSON file beside that result."""
        return self.folder / f"{name}{self.suffix}.json"
