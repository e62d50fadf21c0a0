"""Label maps that volumes are made for: which there are, on which grids, and what the networks are told of each."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from scripts.common.errors import UserError
from scripts.data.datalist import SPLITS
from scripts.data.faults import attempt
from scripts.data.grids import nearest_size, resized_grid
from scripts.data.labels import BODY, read_labels, replacements, resampled, without
from scripts.data.nifti import read_header
from scripts.networks.controlnet import ControlNetWeights, encoder_of
from scripts.networks.unet import UNetWeights
from scripts.use.inputs import find_labels
from scripts.use.wanted import Wanted, checked_seed, warn

LABEL = "_label.nii.gz"  # what follows the name of a generated volume, in the name of its label map


class LabelMaps(Dataset):
    """What is to be generated for label maps: a volume for each, over its field of view.

    A volume has the size of its map, or the nearest one that the networks take, to which the map is resampled then.

    Args:
        mask_dir: where the maps are, see `inputs.find_labels`.
        output_dir: of the volumes.
        wanted: what all volumes have in common.
        unet: its weights.
        controlnet: its weights.
        random_seed: of the first map, in the order of their paths; the others follow it.
        splits: which lists of a datalist are taken.
        guidance: its scale; 0 for none.
        roi_labels: which labels make the region that guidance is towards, and what takes their place, see
            `labels.without`.
        resample_back: whether volumes get the grid of their map's file, and not that on which they were generated.

    Raises:
        UserError: where there are no maps, they would be overwritten, or the ControlNet is none for this UNet. One that
            was trained for another UNet is warned of.
    """

    def __init__(
        self,
        *,
        mask_dir: str,
        output_dir: str,
        wanted: Wanted,
        unet: UNetWeights,
        controlnet: ControlNetWeights,
        random_seed: int = 0,
        splits: str | Sequence[str] = SPLITS,
        guidance: float = 0.0,
        roi_labels: Mapping[str, int | str] | None = None,
        resample_back: bool = True,
    ) -> None:
        encoder_of(controlnet.network, unet.network)
        self.wanted, self.trained = wanted, controlnet.file.facts.get("labels")
        self.table = replacements(roi_labels) if guidance else {}
        self.resample_back = resample_back
        first, entries = checked_seed(random_seed), find_labels(mask_dir, splits, output_dir)
        self.data: list[dict[str, Any]] = [{**entry, "seed": first + number} for number, entry in enumerate(entries)]
        for entry in self.data:
            if os.path.realpath(Path(output_dir, entry["name"] + LABEL)) == os.path.realpath(entry["image"]):
                raise UserError(f"{entry['image']}: would be overwritten; give an output_dir of its own")
        warn(filter(None, [controlnet.other_unet(unet)]))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A label map.

        Returns:
            `image` (path of the map), `name`, `seed`; `dim` (voxels) and `spacing` (mm) of the volume to generate;
            `maps`, what `Generator.latent` takes of them; `labels`, (X, Y, Z) uint8 in RAS, on the grid that the volume
            shall have in the end, and `affine` (4 x 4, mm) of that; `own_grid`, whether that is the file's; `notes`,
            sentences. Instead of what follows `seed`, `error`, why the map cannot be used.
        """
        entry = self.data[index]
        found, error = attempt(entry, lambda: self._read(entry["image"]))
        return {**entry, "error": error} if found is None else {**entry, **found}

    def largest(self) -> tuple[str, list[int]]:
        """X, Y, Z of the largest volume to generate, in voxels, and a text that says so; 0 where no map is good."""
        sizes: dict[str, list[int]] = {}
        for entry in self.data:
            size, _ = attempt(entry, partial(self._expected, entry["image"]))
            if size:
                sizes[entry["image"]] = size
        path, dim = max(sizes.items(), key=lambda item: math.prod(item[1]), default=("", [0, 0, 0]))
        return f"{path}: the volume for it has {' x '.join(map(str, dim))} voxels", dim

    def _expected(self, path: str) -> list[int]:
        return self._size(path, read_header(path).in_ras()[0])

    def _size(self, path: str, shape: Sequence[int]) -> list[int]:
        """The size of the volume for a label map of a shape."""
        multiple = self.wanted.multiple
        if min(shape) < multiple:
            raise UserError(
                f"{path}: is {' x '.join(map(str, shape))} voxels, but the networks take {multiple} or more along each "
                "axis; resample it to more voxels, or pad it with 0"
            )
        return nearest_size(shape, multiple)

    def _read(self, path: str) -> dict[str, Any]:
        labels, affine = read_labels(path)
        dim = self._size(path, labels.shape)
        spacing, other = resized_grid(labels.shape, dim, nib.affines.voxel_sizes(affine).tolist(), affine)
        whole = torch.from_numpy(np.ascontiguousarray(labels))[None, None]
        told = resampled(whole, dim)
        fewer, there = without(told[0, 0].numpy(), self.table)
        own_grid = self.resample_back or dim == list(labels.shape)
        return {
            "dim": dim,
            "spacing": spacing,
            "maps": {"labels": told, "unguided": torch.from_numpy(fewer)[None, None] if there else None},
            "labels": labels if own_grid else told[0, 0].numpy(),
            "affine": affine if own_grid else other,
            "own_grid": own_grid,
            "notes": [*self._notes(labels, dim, spacing), *self._unguided(there)],
        }

    def _unguided(self, there: Sequence[int]) -> list[str]:
        """What is to be said where no region is left away."""
        if not self.table or there:
            return []
        labels = ", ".join(map(str, self.table))
        return [f"has none of the labels of roi_labels ({labels}): guidance is towards the modality alone"]

    def _notes(self, labels: np.ndarray, dim: Sequence[int], spacing: Sequence[float]) -> list[str]:
        """What may not be meant of a label map."""
        there = np.unique(labels).tolist()
        notes = []
        if BODY not in there and BODY in (self.trained or [BODY]):
            notes.append(
                f"lacks {BODY}, the body: generated voxels of label 0 become air; give the maps that encode.json "
                "writes, with body_label 200"
            )
        if other := [str(label) for label in there if label and self.trained and label not in self.trained]:
            notes.append(f"has labels that the ControlNet was not trained on: {', '.join(other)}")
        return [*notes, *self.wanted.unfamiliar(dim, spacing)]


def on_grid(voxels: torch.Tensor, volume: Mapping[str, Any], outside: float) -> torch.Tensor:
    """A generated volume (X, Y, Z) int16 on the grid of its label map, with `outside` where that is 0.

    Args:
        voxels: as generated.
        volume: an item of `LabelMaps`.
        outside: what is no body, in the volume's unit.
    """
    labels = volume["labels"]
    if voxels.shape != labels.shape:
        finer = F.interpolate(voxels[None, None].float(), labels.shape, mode="trilinear", align_corners=False)
        voxels = finer[0, 0].round_().to(voxels.dtype)
    voxels[torch.from_numpy(np.ascontiguousarray(labels == 0))] = int(outside)
    return voxels


def settings(
    controlnet: ControlNetWeights | None, of_all: Mapping[str, Any], of_maps: Mapping[str, Any]
) -> dict[str, Any]:
    """What results depend on: `of_all`; with a ControlNet without its grid, which each map has its own of, and more.

    Args:
        controlnet: its weights, or None.
        of_all: `dim`, `spacing` and others.
        of_maps: what only volumes for label maps depend on.
    """
    if controlnet is None:
        return dict(of_all)
    others = {name: value for name, value in of_all.items() if name not in ("dim", "spacing")}
    return {**others, "controlnet_sha256": controlnet.file.sha256, **of_maps}
