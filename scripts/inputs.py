"""Which volumes a workflow takes, and each of them as its file has it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch.utils.data import Dataset

from scripts import datalist as datalists
from scripts.datalist import CLASSES, SPLITS
from scripts.errors import UserError
from scripts.intensity import Intensity
from scripts.nifti import check_values, read_nifti
from scripts.outputs import Output
from scripts.volumes import explain

logger = logging.getLogger(__name__)

DATALIST = "datalist_ct.json"
OURS = ("_recon", "_emb", "_emb_sigma")  # endings of what this bundle writes beside its input


def find(
    dataset_dir: str,
    json_data_list: str | Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    modality: str = "ct",
) -> list[dict[str, str]]:
    """The volumes to work on.

    Args:
        dataset_dir: a NIfTI file; a datalist (`.json`); or a folder: the datalist `datalist_ct.json` in it, else all
            `.nii.gz` and `.nii` files in it and in its subfolders.
        json_data_list: a datalist, instead; relative paths in it are those under `dataset_dir`.
        splits: which lists of a datalist are taken.
        modality: `class` of files that no datalist describes.

    Returns:
        entries with `image`, the path; `class`; `split`; and `name`, under which results are stored: the path without
        its ending, relative to `dataset_dir`, else to the datalist's folder, else to the deepest folder that holds
        all volumes.

    Raises:
        UserError: where there is no volume, or two would have results of the same name.
    """
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise UserError(f"splits is {list(splits)}; use some of {', '.join(SPLITS)}")
    if modality not in CLASSES:
        raise UserError(f"modality is {modality!r}; use one of {', '.join(CLASSES)}")
    root = Path(dataset_dir)
    if not root.exists():
        raise UserError(f"{root}: no such file or folder; correct dataset_dir")
    listed = json_data_list if isinstance(json_data_list, (str, type(None))) else json_data_list[0]
    if listed is None and root.suffix == ".json":
        listed, root = str(root), root.parent
    if listed is None and (root / DATALIST).is_file():
        listed = str(root / DATALIST)
    if listed is not None:
        entries = _listed(Path(listed), root, splits)
    elif root.is_dir():
        entries = [{"image": str(p), "name": _stem(p.relative_to(root))} for p in _search(root)]
    else:
        entries = [{"image": str(root), "name": _stem(Path(root.name))}]
    entries = [{"class": modality, "split": "training", **entry} for entry in entries]
    what = f"{listed}: {' and '.join(splits)}" if listed else str(root)
    if not entries:
        raise UserError(f"{what}: no volume (.nii.gz or .nii) is there; correct dataset_dir or json_data_list")
    seen: dict[str, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry["name"], entry["image"])) != entry["image"]:
            raise UserError(f"{entry['image']}: its results would overwrite those of {other}; rename one of them")
    logger.info("%s: %d volumes", what, len(entries))
    return entries


def _stem(path: Path) -> str:
    return path.as_posix().removesuffix(".gz").removesuffix(".nii")


def _search(root: Path) -> list[Path]:
    files = sorted(p for p in root.rglob("*.nii*") if p.name.endswith((".nii", ".nii.gz")) and p.name[0] != ".")
    stems = {_stem(p) for p in files}
    results = {f"{stem}{ending}" for stem in stems for ending in OURS}
    return [p for p in files if p.is_file() and _stem(p) not in results]


def _listed(path: Path, root: Path, splits: Sequence[str]) -> list[dict[str, str]]:
    content = datalists.load(path, root)
    chosen = [entry | {"split": split} for split in splits for entry in content[split]]
    unique = list({entry["image"]: entry for entry in chosen}.values())
    if not unique:
        return []
    images = [Path(os.path.abspath(entry["image"])) for entry in unique]  # noqa: PTH100 (keeps links)
    folders = [root.absolute(), path.parent.absolute(), Path(os.path.commonpath([i.parent for i in images]))]
    folder = next(f for f in folders if all(image.is_relative_to(f) for image in images))
    return [e | {"name": _stem(i.relative_to(folder))} for e, i in zip(unique, images, strict=True)]


class Volumes(Dataset):
    """Whole volumes in RAS, unscaled, each with what is needed to scale it and to write results in its geometry.

    Args:
        data: entries of `find`.
        output: where results go; what is there already is not read.
        select_channel: of 4D MRI volumes.
    """

    def __init__(self, data: Sequence[dict[str, str]], output: Output | None = None, select_channel: int = 0) -> None:
        self.data, self.output, self.select_channel = data, output, select_channel

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A volume.

        Returns:
            the entry's `image` (path), `class` and `name`, and: `voxels`, (1, 1, X, Y, Z) int16 or float32 in RAS;
            `affine` (4 x 4, mm) and `spacing` (mm) of that array; `intensity`, an `Intensity`. Instead of these,
            `done`, where the results are there, or `error`, why the volume cannot be read.
        """
        entry = self.data[index]
        if self.output is not None and self.output.done(entry["name"]):
            return {**entry, "done": True}
        try:
            data, affine = read_nifti(entry["image"], entry["class"], self.select_channel)
            check_values(data, entry["image"], entry["class"])
            intensity = Intensity.of(data, entry["class"])
        except Exception as problem:  # whatever a broken file raises is the fault of this volume alone
            return {**entry, "error": explain(entry, problem)}
        voxels = torch.from_numpy(np.ascontiguousarray(data))[None, None]
        spacing = nib.affines.voxel_sizes(affine).tolist()
        return {**entry, "voxels": voxels, "affine": affine, "spacing": spacing, "intensity": intensity}


def as_it_is(item: Any) -> Any:
    """For `DataLoader(batch_size=None)`: volumes differ in size, so there is nothing to collate."""
    return item
