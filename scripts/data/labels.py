"""Label maps: integers 0 to 255 on the grid of a volume; 0 is what is no body, 200 the body where it has no other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from scripts.common.errors import UserError
from scripts.data.nifti import read_nifti
from scripts.data.store import ArrayStore

BODY = 200
MOST = 255  # what 8 bits hold
AIR_BELOW = -800.0  # HU; the body is above
THIN = 5  # voxels from back to front; what is thinner is no body, but a table
NEIGHBOURS = "neighbours"  # in a table of what takes a label's place: the commonest label around each of its pieces
Grid = tuple[Sequence[int], np.ndarray]  # shape, and 4 x 4 affine in mm
TOLERANCE = 0.1  # voxels, by which the corners of a map may lie beside those of its volume
ROUNDING = 1e-3  # by which a label may miss its integer: what scaling in the file's header leaves


def read_labels(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """A whole label map in the closest canonical orientation: (X, Y, Z) uint8, and its 4 x 4 affine (mm) in RAS+.

    Raises:
        UserError: naming the file, what is wrong and what to do.
    """
    data, affine = read_nifti(path)
    if data.dtype != np.int16:
        wrong = data[np.abs(data - np.rint(data)) > ROUNDING]
        if wrong.size:
            raise UserError(f"{path}: has the label {wrong[0]:g}, which is no integer; resample label maps by nearest")
        data = np.rint(data)
    low, high = data.min(), data.max()
    if low < 0 or high > MOST:
        raise UserError(f"{path}: has the label {low if low < 0 else high:g}; use labels 0 to {MOST}, 0 for no body")
    return data.astype(np.uint8), affine


def check_grid(path: str, grid: Grid, image: str, wanted: Grid) -> None:
    """Whether a label map has the grid of its volume.

    Args:
        path: of the label map.
        grid: its shape, and its 4 x 4 affine (mm), in the same orientation as the volume's.
        image: path of the volume.
        wanted: shape and affine of the volume.

    Raises:
        UserError: naming both, where it has not.
    """
    (shape, affine), (other_shape, other_affine) = grid, wanted
    remedy = "give the label map that was drawn on this volume, or resample it to the volume's grid by nearest"
    if tuple(shape) != tuple(other_shape):
        sizes = [" x ".join(map(str, size)) for size in (shape, other_shape)]
        raise UserError(f"{path}: is {sizes[0]} voxels, but {image} is {sizes[1]}; {remedy}")
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij")).reshape(4, -1)
    moved = np.linalg.solve(other_affine, np.asarray(affine) @ corners) - corners
    if (furthest := float(np.abs(moved).max())) > TOLERANCE:
        raise UserError(f"{path}: lies up to {furthest:.3g} voxels beside {image}; {remedy}")


def resampled(labels: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """A label map (1, 1, X, Y, Z) uint8 in another size over the same field of view, by the nearest voxel's centre."""
    return F.interpolate(labels, list(size), mode="nearest-exact")


def with_body(labels: np.ndarray, hu: np.ndarray, value: int = BODY) -> np.ndarray:
    """A label map in which the rest of the body has a label too, unless some voxel has that already.

    Args:
        labels: (X, Y, Z) uint8.
        hu: (X, Y, Z) in Hounsfield units.
        value: what voxels of the body become where the map has 0.
    """
    if (labels == value).any():
        return labels
    return np.where((labels == 0) & body(hu), np.uint8(value), labels)


def body(hu: np.ndarray) -> np.ndarray:
    """Where the body is in a CT volume (X, Y, Z), RAS: what is above -800 HU, and what lies within it in its slice.

    It is the largest piece once all is gone that is thinner than three voxels, or than `THIN` from back to front, as
    the table is, and what covers a patient. That takes the thinnest parts of the body too: the edge of an ear.
    """
    dense = _filled(ndimage.binary_opening(hu > AIR_BELOW))  # a wall of the chest is no thinner than the chest
    pieces, count = ndimage.label(ndimage.binary_opening(dense, np.ones((1, THIN, 1))))
    if count == 0:
        return np.zeros(hu.shape, bool)
    voxels = np.zeros(count + 1, np.int64)
    for part in pieces:  # since counting copies
        voxels += np.bincount(part.ravel(), minlength=count + 1)
    largest = pieces == np.argmax(voxels[1:]) + 1
    # Closing treats what is outside as empty, so that it would eat at the borders: they are repeated for it.
    return _filled(ndimage.binary_closing(np.pad(largest, 2, mode="edge"), iterations=2)[2:-2, 2:-2, 2:-2])


def _filled(mask: np.ndarray) -> np.ndarray:
    """A mask (X, Y, Z) without holes in its slices along Z."""
    return np.stack([ndimage.binary_fill_holes(mask[:, :, z]) for z in range(mask.shape[2])], axis=2)


def replacements(roi_labels: Mapping[Any, Any] | None) -> dict[int, int | str]:
    """The table `roi_labels` of a config, whose labels are texts: what takes the place of each, see `without`.

    Raises:
        UserError: for what is no table; naming an entry that is neither a label nor `NEIGHBOURS`.
    """
    table: dict[int, int | str] = {}
    if roi_labels is None:
        return table
    if not isinstance(roi_labels, Mapping):
        raise UserError(
            f"roi_labels is {roi_labels!r}; use a table of what takes the place of each label, as "
            f'{{"23": "{NEIGHBOURS}", "26": 1}}'
        )
    for key, place in roi_labels.items():
        label = int(key) if str(key).isdecimal() else -1
        legal = place == NEIGHBOURS or (type(place) is int and 0 <= place <= MOST)
        if not 0 < label <= MOST or not legal:
            raise UserError(
                f"roi_labels has {key!r}: {place!r}; use a label from 1 to {MOST}, and another one or {NEIGHBOURS!r}"
            )
        table[label] = place
    return table


def without(labels: np.ndarray, table: Mapping[int, int | str]) -> tuple[np.ndarray, list[int]]:
    """A label map in which labels gave way to others.

    Args:
        labels: (X, Y, Z) uint8.
        table: for each label what takes its place: another label, or `NEIGHBOURS`.

    Returns:
        the map, `labels` itself where it has none of them, and which labels it had.
    """
    there = [label for label in table if (labels == label).any()]
    found = labels
    for label in there:
        region, place = found == label, table[label]
        found = found.copy() if found is labels else found
        if place != NEIGHBOURS:
            found[region] = place
            continue
        (box,) = ndimage.find_objects(region.view(np.uint8))
        near = found[_grown(box)]  # pieces of a whole volume would take seconds
        pieces, _ = ndimage.label(near == label, np.ones((3, 3, 3)))
        for number, box in enumerate(ndimage.find_objects(pieces), 1):
            piece = pieces[_grown(box)] == number
            shell = ndimage.binary_dilation(piece, np.ones((3, 3, 3))) & ~piece
            counts = np.bincount(near[_grown(box)][shell], minlength=MOST + 1)
            counts[list(table)] = 0  # what is to go is no neighbour
            near[_grown(box)][piece] = counts.argmax()
    return found, there


def _grown(box: tuple[slice, ...]) -> tuple[slice, ...]:
    """A box with a voxel more on all sides."""
    return tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in box)


class LabelStore(ArrayStore):
    """The store of label maps: (X, Y, Z) uint8 in RAS, and how many voxels each label has."""

    unit = "label map"
    of_volumes = False

    def preprocessing(self, entry: Mapping[str, Any]) -> list[Any]:
        """That it is a label map."""
        return ["label"]

    def read(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """As `read_labels`, with the counts of its labels."""
        labels, affine = read_labels(entry["image"])
        values, counts = np.unique(labels, return_counts=True)
        return labels, {"affine": affine.tolist(), "counts": dict(zip(map(str, values), counts.tolist(), strict=True))}

    def open(self, entry: Mapping[str, Any]) -> np.ndarray:
        """The whole map, converted now if it was not before."""
        return blosc2.open(str(self.convert(entry)), mode="r")[...]

    def counts(self, entry: Mapping[str, Any]) -> dict[int, int]:
        """How many voxels each label of a map has."""
        array = blosc2.open(str(self.convert(entry)), mode="r")  # held, since its metadata do not outlive it
        return {int(label): count for label, count in array.schunk.vlmeta["volume"]["counts"].items()}
