"""What data loaders take: patches to train on, and whole volumes to validate and to use."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import torch
from monai.transforms import ResizeWithPadOrCrop
from torch.utils.data import Dataset

from scripts.common.errors import UserError
from scripts.common.ranks import gather
from scripts.data.datalist import identities
from scripts.data.dealing import dealt
from scripts.data.faults import attempt
from scripts.data.intensity import Intensity
from scripts.data.labels import BODY, MOST, check_grid, read_labels, with_body
from scripts.data.nifti import stem
from scripts.data.nifti_file import opened
from scripts.data.patches import RandomPatch
from scripts.data.store import Store, read_volume


class PatchDataset(Dataset):
    """One random patch of each volume; which one is a function of (seed, epoch, index) and of nothing else.

    Args:
        data: datalist entries.
        transform: makes the patch of a volume and a random generator.
        store: of the converted volumes; what is missing there is converted on first use.
        seed: of all patches.
        patch_sizes: that of an epoch, in voxels; None for the transform's own in all.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, str]],
        transform: RandomPatch,
        store: Store,
        seed: int = 0,
        patch_sizes: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self.data, self.transform, self.store, self.seed = data, transform, store, seed
        self.patch_sizes = patch_sizes

    def __len__(self) -> int:
        return len(self.data)

    def names(self) -> list[list[str]]:
        """File name and class of each volume."""
        return [[Path(entry["image"]).name, entry.get("class", "ct")] for entry in self.data]

    def identities(self) -> list[list[str | int]]:
        """What must not change while a training goes on; see `datalist.identities`."""
        return identities(self.data)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """The patch of `(epoch, index)`, or of epoch 1 where only the index is given.

        Returns:
            `image`, (1, X, Y, Z) float32; `path`, the volume it comes from; and `error`: empty, or why that volume
            cannot be read, `image` being NaN then.
        """
        epoch, index = key if isinstance(key, tuple) else (1, key)
        entry = self.data[index]
        rng = np.random.default_rng([self.seed, epoch, index])
        transform = self._transform(epoch)
        image, error = attempt(entry, lambda: transform(self.store.open(entry), rng))
        if image is None:
            image = torch.full((1, *transform.patch_size), torch.nan)
        return {"image": image, "path": entry["image"], "error": error}

    def _transform(self, epoch: int) -> RandomPatch:
        if self.patch_sizes is None:
            return self.transform
        transform = copy.copy(self.transform)
        transform.patch_size = tuple(self.patch_sizes(epoch))
        return transform


class WholeVolumeDataset(Dataset):
    """Whole volumes in RAS, unscaled, each with what is needed to scale it and to write results in its geometry.

    Args:
        data: entries with `image`, the path, and perhaps `class` and `name`.
    """

    def __init__(self, data: Sequence[Mapping[str, str]]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A volume.

        Returns:
            the entry's `image` (path), `class`, `name` and what else it has; and: `voxels`, (1, 1, X, Y, Z) int16 or
            float32 in RAS; `affine` (4 x 4, mm) and `spacing` (mm) of that array; `intensity`, an `Intensity`. Instead
            of these four, `error`, why the volume cannot be read.
        """
        entry = {"class": "ct", "name": stem(Path(self.data[index]["image"]).name), **self.data[index]}
        volume, error = attempt(entry, lambda: self._read(entry))
        if volume is None:
            return {**entry, "error": error}
        data, affine, intensity = volume
        spacing = nib.affines.voxel_sizes(affine).tolist()
        voxels = torch.from_numpy(np.ascontiguousarray(data))[None, None]
        return {**entry, "voxels": voxels, "affine": affine, "spacing": spacing, "intensity": intensity}

    def sizes(self) -> list[tuple[int, ...]]:
        """Three sizes of each volume in voxels, by the headers of the files; () where there is none to be read."""

        def one(entry: Mapping[str, str]) -> tuple[int, ...]:
            with opened(Path(entry["image"])) as (image, _):
                return tuple(image.shape[:3])

        with ThreadPoolExecutor(16) as pool:
            return [size or () for size, _ in pool.map(lambda entry: attempt(entry, lambda: one(entry)), self.data)]

    def _read(self, entry: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray, Intensity]:
        """Voxels, affine and intensity of an entry."""
        raise NotImplementedError


class Volumes(WholeVolumeDataset):
    """Whole volumes as their files have them.

    Args:
        data: entries with `image`, the path, and perhaps `class` and `name`.
        select_channel: of 4D MRI volumes.
    """

    def __init__(self, data: Sequence[Mapping[str, str]], select_channel: int = 0) -> None:
        super().__init__(data)
        self.select_channel = select_channel

    def _read(self, entry: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray, Intensity]:
        return read_volume(entry, self.select_channel)


class LabelledVolumes(Volumes):
    """The same, each with its label map, where it has one.

    Args:
        data: entries with `image`, the path, and perhaps `label`, that of the map, `class` and `name`.
        select_channel: of 4D MRI volumes.
        body_label: what the rest of the body becomes in the maps of CT, see `labels.with_body`; None leaves it.

    Raises:
        UserError: for a `body_label` that is no label.
    """

    def __init__(
        self, data: Sequence[Mapping[str, str]], select_channel: int = 0, body_label: int | None = BODY
    ) -> None:
        super().__init__(data, select_channel)
        if body_label is not None and (type(body_label) is not int or not 0 < body_label <= MOST):
            raise UserError(f"body_label is {body_label!r}; use a label from 1 to {MOST}, {BODY} say, or null for none")
        self.body_label = body_label

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A volume, and `labels`, (1, 1, X, Y, Z) uint8 on its grid; `error` also where the map cannot be used."""
        volume = super().__getitem__(index)
        if "error" in volume or "label" not in volume:
            return volume
        labels, error = attempt(volume, lambda: self._labels(volume))
        return volume | ({"error": error} if labels is None else {"labels": labels})

    def _labels(self, volume: Mapping[str, Any]) -> torch.Tensor:
        labels, affine = read_labels(volume["label"])
        hu = volume["voxels"][0, 0].numpy()
        check_grid(volume["label"], (labels.shape, affine), volume["image"], (hu.shape, volume["affine"]))
        if self.body_label is not None and volume["class"] == "ct":
            labels = with_body(labels, hu, self.body_label)
        return torch.from_numpy(np.ascontiguousarray(labels))[None, None]


class StoredVolumes(WholeVolumeDataset):
    """Whole converted volumes, for validation.

    Args:
        data: datalist entries.
        store: of the converted volumes; what is missing there is converted on first use.
        patch_size: centre crop in voxels, padded with what normalises to 0 where the volume is smaller; None for the
            whole volume.
    """

    def __init__(
        self, data: Sequence[Mapping[str, str]], store: Store, patch_size: Sequence[int] | None = None
    ) -> None:
        super().__init__(data)
        self.store, self.patch_size = store, patch_size

    def voxels(self, index: int) -> int:
        """How many voxels item `index` has."""
        return math.prod(self.patch_size or self.store.open(self.data[index]).shape)

    def sizes(self) -> list[tuple[int, ...]]:
        """Three sizes of each item."""
        return super().sizes() if self.patch_size is None else [tuple(self.patch_size)] * len(self)

    def _read(self, entry: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray, Intensity]:
        volume = self.store.open(entry)
        data = volume.read([slice(0, n) for n in volume.shape])
        if self.patch_size is not None:
            crop = ResizeWithPadOrCrop(self.patch_size, constant_values=volume.intensity.window[0])
            data = torch.as_tensor(crop(torch.from_numpy(data)[None]))[0].numpy().astype(data.dtype)
        return data, volume.affine, volume.intensity


class NamedItems(Protocol):
    """A dataset of items that have names: whole volumes, or what volumes are to be made of.

    One that knows how large they are has `sizes()`: of all, in voxels.

    Attributes:
        data: what is known of each before it is read: `name`; and `image`, its file, or what messages call it.
    """

    data: Sequence[Mapping[str, Any]]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class VolumeLoader:
    """The volumes of one rank; the next one is read while this one is in use.

    Args:
        dataset: of all volumes.
        skip: whether a volume, by its name and its file, has its results already; None takes every volume.
        rank: of this process.
        num_ranks: among which the volumes are dealt, by their sizes where these are known.

    Attributes:
        done: how many of all volumes are skipped.
        indices: of this rank's volumes in the dataset.
    """

    def __init__(
        self,
        dataset: NamedItems,
        skip: Callable[[str, str], bool] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.dataset = dataset
        every = enumerate(dataset.data)
        missing = [i for i, entry in every if skip is None or not skip(entry["name"], entry["image"])]
        known = getattr(dataset, "sizes", None) if num_ranks > 1 else None
        sizes = known() if known else [()] * len(dataset)
        # As rank 0 sees it: another one may already be at work.
        missing, costs = gather((missing, [math.prod(sizes[i]) for i in missing]))[0]
        self.done = len(dataset) - len(missing)
        self.indices = [missing[place] for place in dealt(costs, num_ranks)[rank]]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with ThreadPoolExecutor(1) as pool:
            following = None
            for index in (*self.indices, None):
                current, following = following, None if index is None else pool.submit(self.dataset.__getitem__, index)
                if current is not None:
                    yield current.result()
                    del current  # a whole volume, not to be held while the next one is read
