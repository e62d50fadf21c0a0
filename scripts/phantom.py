"""Synthetic thorax-like CT volumes in Hounsfield units, with label maps, for the demo and the tests.

python -m scripts.phantom write --output_dir data/phantom --count 12
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, ornt_transform
from tqdm import tqdm

from scripts.common.words import door
from scripts.data.nifti import save_nifti

# Hounsfield units of the tissues, rounded from any CT textbook.
AIR, LUNG, FAT, MUSCLE, BLOOD, LIVER, BONE, MARROW, DISC = -1000, -850, -100, 50, 160, 65, 700, 250, 90

Point = Sequence[float] | np.ndarray


class Label(IntEnum):
    """Numbers of NV-Generate-CTMR's label maps; one lobe stands for each lung, one vertebra or rib for all of them."""

    NONE = 0
    LIVER = 1
    AORTA = 6
    LEFT_LUNG = 28
    RIGHT_LUNG = 30
    VERTEBRA = 42
    LEFT_RIB = 67
    RIGHT_RIB = 79
    HEART = 115
    SPINAL_CORD = 121
    STERNUM = 122
    BODY = 200


class _Canvas:
    """A float32 volume in HU, and its uint8 label map, with coordinates in mm about the patient's axis, which lies
    `place` from the volume's; shapes are painted one over another."""

    def __init__(self, shape: Sequence[int], spacing: Sequence[float], place: Point, taper: float) -> None:
        self.voxel = float(np.mean(spacing))
        grid = zip(shape, spacing, (*place, 0.0), strict=True)
        axes = [(np.arange(n, dtype=np.float32) - (n - 1) / 2) * s - np.float32(off) for n, s, off in grid]
        self.x, self.y, self.z = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.hu = np.full(tuple(shape), AIR, dtype=np.float32)
        self.labels = np.zeros(tuple(shape), dtype=np.uint8)
        top = np.clip(self.z / abs(axes[2][0]), 0, 1)
        self.taper = 1 - taper * top**2  # a chest is narrower at its top

    def paint(self, mask: np.ndarray, hu: float | np.ndarray, label: int | np.ndarray) -> None:
        np.copyto(self.hu, hu, where=mask)
        np.copyto(self.labels, np.uint8(label), where=mask)

    def ellipse(self, centre: Sequence[Any] | np.ndarray, radii: Point) -> np.ndarray:
        """Squared radius (1 on the border) of an elliptic cylinder along z, which follows the taper of the chest.

        `centre` is two numbers, or depends on z.
        """
        x, y = self.x / self.taper - centre[0], self.y / self.taper - centre[1]
        return (x / radii[0]) ** 2 + (y / radii[1]) ** 2

    def ellipsoid(self, centre: Point, radii: Point) -> np.ndarray:
        return self.ellipse(centre, radii) + ((self.z - centre[2]) / radii[2]) ** 2

    def tube(self, start: np.ndarray, end: np.ndarray, radius: float, hu: float, within: np.ndarray) -> None:
        """A straight vessel, painted in its own bounding box only; voxels that it fills in part get their share."""
        box = []
        for axis, grid in enumerate((self.x, self.y, self.z)):
            line = grid.ravel()
            low, high = min(start[axis], end[axis]) - radius, max(start[axis], end[axis]) + radius
            box.append(slice(*np.searchsorted(line, (low - self.voxel, high + self.voxel))))
        if any(s.start >= s.stop for s in box):
            return
        x, y, z = self.x[box[0]], self.y[:, box[1]], self.z[:, :, box[2]]
        length = max(float(np.linalg.norm(end - start)), 1e-6)
        direction = (end - start) / length
        along = (x - start[0]) * direction[0] + (y - start[1]) * direction[1] + (z - start[2]) * direction[2]
        distance2 = (x - start[0]) ** 2 + (y - start[1]) ** 2 + (z - start[2]) ** 2 - along**2
        inside = np.clip((radius - np.sqrt(np.maximum(distance2, 0))) / self.voxel + 0.5, 0, 1)
        inside *= np.clip(np.minimum(along, length - along) / self.voxel + 1, 0, 1)
        part = self.hu[tuple(box)]
        np.maximum(part, part + inside * (hu - part), out=part, where=within[tuple(box)])


def _vessel_tree(
    canvas: _Canvas,
    rng: np.random.Generator,
    start: np.ndarray,
    direction: np.ndarray,
    radius: float,
    depth: int,
    within: np.ndarray,
) -> None:
    end = start + direction * radius * rng.uniform(4, 6)
    canvas.tube(start, end, radius, BLOOD - 110, within)
    if depth > 0:
        for _ in range(2):
            turned = direction + rng.normal(0, 0.55, 3)
            _vessel_tree(canvas, rng, end, turned / np.linalg.norm(turned), radius * 0.78, depth - 1, within)


def _paint_lung(
    canvas: _Canvas, rng: np.random.Generator, side: int, inner: np.ndarray, extent: Point, diaphragm: float, hu: float
) -> None:
    """The lung of one side, above the dome of the diaphragm, with the vessels that spring from its hilum."""
    centre = (side * 0.52 * inner[0], 0.0, diaphragm + 0.75 * extent[2])
    lobe = canvas.ellipsoid(centre, (0.43 * inner[0], 0.82 * inner[1], 0.95 * extent[2]))
    dome = diaphragm + 0.25 * extent[2] * (1 - ((canvas.x - centre[0]) / (0.5 * inner[0])) ** 2)
    air = (lobe < 1) & (canvas.z > dome)
    label = Label.LEFT_LUNG if side < 0 else Label.RIGHT_LUNG
    canvas.paint(air, hu - 60 * canvas.y / inner[1], label)  # what lies lowest is fullest
    hilum = np.array([side * 0.2 * inner[0], 0.0, 0.1 * extent[2]])
    for _ in range(4):
        direction = np.array([side, rng.normal(0, 0.6), rng.normal(0, 0.7)])
        _vessel_tree(canvas, rng, hilum, direction / np.linalg.norm(direction), 0.07 * inner[0], 5, air)


def _paint_organs(
    canvas: _Canvas, rng: np.random.Generator, inner: np.ndarray, extent: Point, diaphragm: float, chest: np.ndarray
) -> None:
    heart = np.array([-0.16 * inner[0], 0.2 * inner[1], diaphragm + 0.35 * extent[2]])
    canvas.paint(
        canvas.ellipsoid(heart, (0.36 * inner[0], 0.42 * inner[1], 0.4 * extent[2])) < 1, BLOOD - 90, Label.HEART
    )
    canvas.paint(canvas.ellipsoid(heart, (0.2 * inner[0], 0.25 * inner[1], 0.22 * extent[2])) < 1, BLOOD, Label.HEART)
    liver = (0.3 * inner[0], 0.05 * inner[1], diaphragm - 0.4 * extent[2])
    organ = canvas.ellipsoid(liver, (0.6 * inner[0], 0.75 * inner[1], 0.6 * extent[2]))
    canvas.paint((organ < 1) & (chest < 1), LIVER + rng.normal(0, 8), Label.LIVER)


def _paint_skeleton(canvas: _Canvas, rng: np.random.Generator, chest: np.ndarray, body: np.ndarray) -> None:
    vertebra, pitch = 0.13 * body[0], rng.uniform(24, 30)
    swing, turn = rng.uniform(0, 0.12) * body[0], rng.uniform(0, 2 * np.pi)
    bend = swing * np.sin(canvas.z / 90 + turn)  # to one side and the other, as in a scoliosis
    spine = (bend, -0.62 * body[1])
    phase = np.mod(canvas.z / pitch + rng.uniform(), 1.0)
    column = canvas.ellipse(spine, (vertebra, 0.8 * vertebra))
    canvas.paint(column < 1, BONE, Label.VERTEBRA)
    canvas.paint(column < 0.75, MARROW, Label.VERTEBRA)
    canvas.paint((column < 0.9) & (phase < 0.2), DISC, Label.BODY)
    canal = (bend, spine[1] - 1.35 * vertebra)
    canvas.paint(canvas.ellipse(canal, (0.7 * vertebra, 0.6 * vertebra)) < 1, BONE, Label.VERTEBRA)
    canvas.paint(canvas.ellipse(canal, (0.45 * vertebra, 0.4 * vertebra)) < 1, 20, Label.SPINAL_CORD)
    # Ribs: bands of the chest wall that fall from back to front.
    shell = np.sqrt(chest)
    band = np.mod((canvas.z + rng.uniform(0.3, 0.5) * canvas.y) / pitch, 1.0)
    ribs = (np.abs(shell - 1.06) < 0.06) & (band < 0.4) & (np.abs(canvas.x) > 0.12 * body[0])
    canvas.paint(ribs, BONE, np.where(canvas.x < 0, Label.LEFT_RIB, Label.RIGHT_RIB))
    canvas.paint(canvas.ellipse((0, 0.84 * body[1], 0), (0.1 * body[0], 0.05 * body[1])) < 1, MARROW, Label.STERNUM)


def _blur(hu: np.ndarray) -> None:
    """A scanner's point spread, in place: weights 1/4, 1/2, 1/4 along each axis."""
    for axis in range(3):
        line = np.moveaxis(hu, axis, 0)
        before = line[:-2] + line[2:]
        line[1:-1] *= 0.5
        line[1:-1] += 0.25 * before


def make_phantom(
    shape: Sequence[int] = (96, 96, 96), spacing: Sequence[float] = (4.0, 4.0, 4.0), seed: int = 0
) -> np.ndarray:
    """The volume of `labelled_phantom`."""
    return labelled_phantom(shape, spacing, seed)[0]


def labelled_phantom(
    shape: Sequence[int] = (96, 96, 96), spacing: Sequence[float] = (4.0, 4.0, 4.0), seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A thorax in RAS axes: body wall, lungs with vessels, heart, aorta, liver, spine, ribs, table, noise.

    Args:
        shape: voxels along x (left to right), y (back to front) and z (feet to head).
        spacing: voxel size in mm; 1 mm to 5 mm look sensible.
        seed: chooses the anatomy and the noise; the same seed gives the same volume.

    Returns:
        int16 array of `shape` in HU, within -1024..1500; and uint8 array of `shape`, the label map, in the numbers of
        NV-Generate-CTMR: 0 for air around the body and the table, 200 for what has no number of its own.
    """
    rng = np.random.default_rng(seed)
    extent = np.array(shape) * np.array(spacing) / 2
    body = extent[:2] * rng.uniform([0.64, 0.50], [0.92, 0.74])
    room = np.maximum(extent[:2] - body - (5, 20), 0)  # behind the patient there is the table
    place = rng.uniform(-1, 1, 2) * room
    canvas = _Canvas(shape, spacing, place, taper=rng.uniform(0.1, 0.35))
    outline = canvas.ellipse((0, 0), body)
    canvas.paint(outline < 1, FAT + rng.normal(0, 8), Label.BODY)
    wall = canvas.ellipse((0, 0), body - rng.uniform(5, 22))
    canvas.paint(wall < 1, MUSCLE + rng.normal(0, 6), Label.BODY)
    inner = 0.78 * body
    chest = canvas.ellipse((0, 0.02 * body[1]), inner)
    diaphragm = -extent[2] * rng.uniform(0.25, 0.6)
    lung = rng.uniform(-20, 20) + LUNG
    for side in (-1, 1):
        _paint_lung(canvas, rng, side, inner, extent, diaphragm, lung)
    _paint_organs(canvas, rng, inner, extent, diaphragm, chest)
    _paint_skeleton(canvas, rng, chest, body)
    canvas.paint(canvas.ellipse((-0.12 * inner[0], -0.42 * body[1]), (0.09 * inner[0],) * 2) < 1, BLOOD, Label.AORTA)
    canvas.paint(
        (canvas.y < -body[1] - 8) & (canvas.y > -body[1] - 14) & (np.abs(canvas.x) < 0.7 * body[0]), -300, Label.NONE
    )
    _blur(canvas.hu)
    canvas.hu += rng.standard_normal(canvas.hu.shape, dtype=np.float32) * rng.uniform(20, 40)
    _blur(canvas.hu)  # noise too is as smooth as the scanner makes it
    return np.clip(np.rint(canvas.hu), -1024, 1500).astype(np.int16), canvas.labels


def phantom_image(
    shape: Sequence[int] = (96, 96, 96),
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    seed: int = 0,
    axcodes: str = "LPS",
) -> nib.Nifti1Image:
    """`make_phantom` as a NIfTI image stored in the orientation `axcodes`, with a scanner-like affine in mm."""
    return _image(make_phantom(shape, spacing, seed), spacing, axcodes)


def _image(data: np.ndarray, spacing: Sequence[float], axcodes: str) -> nib.Nifti1Image:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -(np.array(data.shape) - 1) / 2 * np.array(spacing) + [0, -150, 800]
    change = ornt_transform(axcodes2ornt(("R", "A", "S")), axcodes2ornt(tuple(axcodes)))
    stored = nib.orientations.apply_orientation(data, change)
    image = nib.Nifti1Image(np.asarray(stored, dtype=data.dtype), affine @ inv_ornt_aff(change, data.shape))
    image.header.set_xyzt_units("mm")
    return image


def write(
    output_dir: str,
    count: int = 12,
    shape: Sequence[int] = (96, 96, 96),
    spacing: Sequence[float] = (4.0, 4.0, 4.0),
    seed: int = 0,
    axcodes: str = "LPS",
    labels: bool = False,
) -> str:
    """Write `count` phantoms as `output_dir/phantom_000.nii.gz`, ...; what is there already is kept.

    With `labels`, the label map of each is written beside it, `phantom_000_label.nii.gz`, ...
    """
    folder = Path(output_dir)
    for i in tqdm(range(count), desc="phantoms", unit="volume"):
        paths = [folder / f"phantom_{i:03d}{ending}.nii.gz" for ending in (("", "_label") if labels else ("",))]
        if all(path.exists() for path in paths):
            continue
        for path, data in zip(paths, labelled_phantom(shape, spacing, seed + i), strict=False):
            if not path.exists():
                save_nifti(_image(data, spacing, axcodes), path)
    return f"{count} phantoms in {folder}"


if __name__ == "__main__":
    door({"write": write})
