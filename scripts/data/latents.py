"""Latents as training data: converted once, read without gzip, each with what the network is told of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
from torch.utils.data import Dataset

from scripts.common.errors import UserError
from scripts.data.datalist import identities
from scripts.data.faults import attempt
from scripts.data.labels import LabelStore, without
from scripts.data.latent_items import ENCODE
from scripts.data.latent_list import FACTOR, REGIONS, Entry, latent_shape, sizes
from scripts.data.nifti_file import check_complete, opened, voxels
from scripts.data.store import ArrayStore

ROUNDING = 0.01  # the share of the posterior's noise, in variance, that rounding to float16 may add
UNIT = 100.0  # by which MAISI's networks take spacings and body regions multiplied


class LatentStore(ArrayStore):
    """The store of latents: channels first, float16 where that hardly adds to the posterior's noise, else float32."""

    unit = "latent"
    of_volumes = False

    def preprocessing(self, entry: Mapping[str, Any]) -> list[Any]:
        """That it is a latent."""
        return ["latent"]

    def grid(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """All channels of a box in one chunk, and blocks of one channel."""
        chunks, blocks = super().grid(shape[1:])
        return (shape[0], *chunks), (1, *blocks)

    def read(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """(C, X, Y, Z) from the (X, Y, Z, C) of the file, with the sums that the scale factor needs."""
        path = entry["image"]
        with opened(Path(path)) as (image, stream):
            if (shape := latent_shape(image, path, entry["shape"][0])) != list(entry["shape"]):
                raise UserError(f"{path}: has changed to shape {tuple(shape)} in the meantime; start again")
            check_complete(Path(path), image, stream)
            data = np.moveaxis(voxels(Path(path), image, stream), -1, 0).astype(np.float32)
        if not np.isfinite(data).all():
            raise UserError(f"{path}: has values that are not finite (NaN or infinite); {ENCODE} again")
        total, square = data.sum(dtype=np.float64), np.square(data, dtype=np.float64).sum()
        return rounded(data, entry.get("noise", 0.0)), {"sum": float(total), "square": float(square)}

    def open(self, entry: Mapping[str, Any]) -> blosc2.NDArray:
        """The converted latent, (C, X, Y, Z), of which a box or `[...]` is read; converted now if it was not before."""
        return blosc2.open(str(self.convert(entry)), mode="r")

    def sums(self, entry: Mapping[str, Any]) -> tuple[float, float]:
        """The sums of a latent's values and of their squares, before rounding."""
        array = self.open(entry)  # held, since its metadata do not outlive it
        facts = array.schunk.vlmeta["volume"]
        return facts["sum"], facts["square"]


def rounded(data: np.ndarray, noise: float) -> np.ndarray:
    """A latent in float16, if the mean square of what that rounds away is within `ROUNDING` of `noise`.

    Args:
        data: float32.
        noise: the posterior's variance, mean over the latent; 0 where it is not known, so that only what float16 holds
            exactly becomes float16.
    """
    with np.errstate(over="ignore"):
        half = data.astype(np.float16)
    error = np.square(half - data, dtype=np.float64).mean()
    return half if error <= ROUNDING * noise else data


class LatentDataset(Dataset):
    """Whole latents, each with its conditions, and perhaps its label map.

    Args:
        data: what `load_latents` gives.
        store: of the converted latents; what is missing there is converted on first use.
        labels: the store of their label maps; None where these are not wanted.
        roi_labels: which labels make the region that a second map lacks, and what takes their place; see
            `labels.without`. None for no second map.
    """

    def __init__(
        self,
        data: Sequence[Entry],
        store: LatentStore,
        labels: LabelStore | None = None,
        roi_labels: Mapping[int, int | str] | None = None,
    ) -> None:
        self.data, self.store, self.labels, self.roi_labels = data, store, labels, roi_labels

    def __len__(self) -> int:
        return len(self.data)

    def sizes(self) -> list[tuple[int, ...]]:
        """(X, Y, Z) of each latent, which the sampler keeps apart."""
        return sizes(self.data)

    def voxels(self) -> float:
        """Voxels of a latent, mean over all."""
        return sum(map(math.prod, self.sizes())) / len(self)

    def names(self) -> list[list[str]]:
        """File name and modality of each latent."""
        return [[Path(entry["image"]).name, entry["modality"]] for entry in self.data]

    def identities(self) -> list[list[str | int]]:
        """What must not change while a training goes on; see `datalist.identities`."""
        return identities(self.data)

    def label_identities(self) -> list[list[str | int]]:
        """The same of the label maps."""
        return identities([{"image": entry["label"]} for entry in self.data])

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """The latent of `(epoch, index)`, the same in every epoch.

        Returns:
            `latent`, (C, X, Y, Z) float32, not scaled; `spacing`, (3,) float32 in 1/100 mm; `modality`, its number,
            int64; where the network takes them, `top_region_index` and `bottom_region_index`, (4,) float32, times 100;
            where they are wanted, `label`, (1, 4 X, 4 Y, 4 Z) uint8, and `label_without`, the same without the region,
            with `removed`, which labels that took from it, as text, empty for none;
            `path`; and `error`: empty, or why the latent cannot be read, `latent` being NaN then.
        """
        entry = self.data[key[1] if isinstance(key, tuple) else key]
        read, error = attempt(entry, lambda: (self._read(entry), self._maps(entry)))
        if read is None:
            read = torch.full(tuple(entry["shape"]), torch.nan), self._no_maps(entry)
        latent, maps = read
        conditions = {name: torch.tensor(entry[name]) * UNIT for name in ("spacing", *REGIONS) if name in entry}
        modality = torch.tensor(entry["modality_number"])
        return {"latent": latent, **maps, **conditions, "modality": modality, "path": entry["image"], "error": error}

    def _maps(self, entry: Entry) -> dict[str, Any]:
        if self.labels is None:
            return {}
        labels = self.labels.open({"image": entry["label"]})
        wanted = [n * FACTOR for n in entry["shape"][1:]]
        if list(labels.shape) != wanted:
            raise UserError(f"{entry['label']}: has changed to shape {labels.shape} in the meantime; start again")
        maps: dict[str, Any] = {"label": torch.from_numpy(labels)[None]}
        if self.roi_labels is not None:
            counts = self.labels.counts({"image": entry["label"]})  # which cost nothing, where looking takes a while
            other, removed = without(labels, {n: place for n, place in self.roi_labels.items() if n in counts})
            maps |= {"label_without": torch.from_numpy(other)[None], "removed": ", ".join(map(str, removed))}
        return maps

    def _no_maps(self, entry: Entry) -> dict[str, Any]:
        """What stands for the maps of a latent that cannot be read."""
        if self.labels is None:
            return {}
        empty = torch.zeros((1, *(n * FACTOR for n in entry["shape"][1:])), dtype=torch.uint8)
        return {"label": empty} | ({} if self.roi_labels is None else {"label_without": empty, "removed": ""})

    def _read(self, entry: Entry) -> torch.Tensor:
        latent = torch.from_numpy(self.store.open(entry)[...]).float()
        if list(latent.shape) != list(entry["shape"]):
            raise UserError(
                f"{entry['image']}: has changed to shape {tuple(latent.shape)} in the meantime; start again"
            )
        return latent


def scale_factor(entries: Sequence[Entry], store: LatentStore) -> tuple[float, str]:
    """1 / std over all values of the training latents, which brings them to the variance of the noise.

    Args:
        entries: the training latents.
        store: keeps each one's sums with its conversion.

    Returns:
        the factor, and where it comes from.

    Raises:
        UserError: where there are fewer than two latents, or all values are the same.
    """
    if len(entries) < 2:
        raise UserError(
            f"{entries[0]['image'] if entries else 'json_data_list'}: {len(entries)} training latents are too few to "
            "measure a scale factor; encode more volumes, or start from existing_ckpt_filepath, which has one"
        )
    sums, squares = zip(*map(store.sums, entries), strict=True)
    count = sum(math.prod(entry["shape"]) for entry in entries)
    mean, square = math.fsum(sums) / count, math.fsum(squares) / count
    variance = square - mean**2
    if not variance > 1e-12 * square:
        raise UserError(
            f"{entries[0]['image']}: this and the other training latents have the same value everywhere ({mean:g}); "
            "encode again with a trained autoencoder"
        )
    return 1 / math.sqrt(variance), f"1 / std over all {len(entries)} training latents"
