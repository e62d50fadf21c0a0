"""Where a random patch comes from: one affine, one box read, one resampling.

MAISI's training pipeline moves the whole volume (flips, quarter turns, zoom, rotation) and then crops. Here the same
parameters are drawn first, composed into one affine from patch voxels to volume voxels, and only the box that
the patch needs is read and resampled once, or not at all where the affine is a signed permutation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import RandAdjustContrast, RandBiasField, RandGibbsNoise, RandHistogramShift
from monai.transforms.utils import create_rotate

from scripts.common.errors import UserError
from scripts.data.store import Volume

SPACING_TYPES = ("original", "fixed", "rand_zoom")
_PLANES = ((0, 1), (1, 2), (0, 2))


@dataclass(frozen=True)
class PatchParameters:
    """One draw of everything that is random about a patch, in the order in which MAISI applies it.

    Attributes:
        flips: axes to flip.
        quarter_turns: turns by 90 degrees in the planes (0, 1), (1, 2) and (0, 2), as `numpy.rot90`.
        intensity_scale: factor on normalised intensities.
        intensity_shift: offset on normalised intensities.
        zoom: magnification; over 1 enlarges.
        angles: rotation about the three axes in radian, as `monai.transforms.Rotate`.
        position: three numbers in [0, 1) that say where the patch lies between its extreme places.
        intensity_seed: seed of the MRI intensity augmentation.
    """

    flips: tuple[bool, bool, bool] = (False, False, False)
    quarter_turns: tuple[int, int, int] = (0, 0, 0)
    intensity_scale: float = 1.0
    intensity_shift: float = 0.0
    zoom: float = 1.0
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0)
    position: tuple[float, float, float] = (0.5, 0.5, 0.5)
    intensity_seed: int | None = None


def draw(rng: np.random.Generator, random_aug: bool = True, rand_zoom: bool = True) -> PatchParameters:
    """Draw the parameters of one patch with MAISI's probabilities.

    Intensities are jittered by +-10 % (MONAI's `RandScaleIntensity` multiplies by 1 + factor, so the reference's
    factors of 0.9 to 1.1 double them instead).
    """
    position = tuple(rng.random(3))
    if not random_aug:
        return PatchParameters(position=position)
    flips = tuple(bool(f) for f in rng.random(3) < 0.5)
    turns = tuple(int(k) if u < 0.5 else 0 for u, k in zip(rng.random(3), rng.integers(1, 4, 3), strict=True))
    scale, shift = rng.uniform(0.9, 1.1), rng.uniform(-0.05, 0.05)
    zoom, angles = rng.uniform(0.5, 1.5), rng.uniform(-0.1, 0.1, 3)
    happens = rng.random(4) < 0.3
    return PatchParameters(
        flips=flips,  # type: ignore[arg-type]
        quarter_turns=turns,  # type: ignore[arg-type]
        intensity_scale=float(scale) if happens[0] else 1.0,
        intensity_shift=float(shift) if happens[1] else 0.0,
        zoom=float(zoom) if happens[2] and rand_zoom else 1.0,
        angles=tuple(float(a) for a in angles) if happens[3] and rand_zoom else (0.0, 0.0, 0.0),  # type: ignore[arg-type]
        position=position,
        intensity_seed=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class Placement:
    """Where a patch comes from: `matrix` @ patch voxel + `offset` is the volume voxel, for patch voxels in `valid`.

    Patch voxels outside `valid` lie outside the transformed volume and are padding.
    """

    matrix: np.ndarray
    offset: np.ndarray
    valid: tuple[slice, slice, slice]


def _flip_and_turn(parameters: PatchParameters, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Affine (matrix, offset) from the flipped and turned volume to the volume, and the new shape."""
    matrix, offset = np.eye(3), np.zeros(3)
    for axis, flip in enumerate(parameters.flips):
        if flip:
            matrix[axis, axis], offset[axis] = -1.0, shape[axis] - 1.0
    for (a, b), turns in zip(_PLANES, parameters.quarter_turns, strict=True):
        for _ in range(turns):
            # numpy.rot90 in the plane (a, b): new[i, j] = old[j, n_b - 1 - i], with i along a and j along b.
            turn, move = np.eye(3), np.zeros(3)
            turn[[a, b]] = turn[[b, a]]
            turn[b] *= -1.0
            move[b] = shape[b] - 1.0
            matrix, offset = matrix @ turn, matrix @ move + offset
            shape = shape.copy()
            shape[[a, b]] = shape[[b, a]]
    return matrix, offset, shape


def place(
    parameters: PatchParameters,
    shape: Sequence[int],
    patch_size: Sequence[int],
    spacing_ratio: Sequence[float] = (1.0, 1.0, 1.0),
) -> Placement:
    """Compose resampling to a fixed spacing, flips, quarter turns, zoom, rotation, padding and crop into one affine.

    Args:
        parameters: what was drawn.
        shape: of the volume, in voxels.
        patch_size: in voxels.
        spacing_ratio: wanted over present spacing; 1 keeps the volume's own.
    """
    # `matrix` (3, 3) and `offset` (3,) map voxels of what has been made so far to voxels of the volume. Each step that
    # makes something new of it, x_old = m x_new + o, goes in on the right: matrix m, matrix o + offset.
    ratio, size = np.asarray(spacing_ratio, dtype=float), np.asarray(shape)
    size = np.rint((size - 1) / ratio + 1).astype(int)  # as monai.transforms.Spacing: first voxel centres coincide
    matrix, offset, size = _flip_and_turn(parameters, size)
    matrix, offset = ratio[:, None] * matrix, ratio * offset
    if parameters.zoom != 1.0:
        zoomed = np.maximum(np.floor(size * parameters.zoom), 1).astype(int)
        step = size / zoomed  # voxels are areas: the first one's centre moves by half of what it grows or shrinks
        matrix, offset, size = matrix * step, matrix @ ((step - 1) / 2) + offset, zoomed
    if any(parameters.angles):
        centre, rotation = (size - 1) / 2, create_rotate(3, parameters.angles)[:3, :3]
        matrix, offset = matrix @ rotation, matrix @ (centre - rotation @ centre) + offset
    patch = np.asarray(patch_size)
    # Where the volume is larger, one of its places; where it is smaller, in the middle of the patch.
    start = np.floor(parameters.position * (np.maximum(size - patch, 0) + 1)).astype(int)
    start -= np.maximum(patch - size, 0) // 2
    valid = tuple(slice(int(max(0, -s)), int(min(p, n - s))) for s, p, n in zip(start, patch_size, size, strict=True))
    return Placement(matrix, matrix @ start + offset, valid)  # type: ignore[arg-type]


def sample(volume: Volume, placement: Placement, patch_size: Sequence[int]) -> torch.Tensor:
    """Read the box that `placement` needs and resample it once.

    Returns:
        (X, Y, Z) float32 of `patch_size`: normalised intensities, 0 where the patch is padded. Interpolation is
        trilinear; beyond the volume's border the border voxel is repeated, as the reference does.
    """
    first = np.array([s.start for s in placement.valid], dtype=float)
    counts = np.array([s.stop - s.start for s in placement.valid])
    matrix, offset = placement.matrix, placement.matrix @ first + placement.offset
    # The corners of the patch span a parallelepiped; its bounding box in the volume is what has to be read. A margin of
    # 1e-6 keeps rounding from reading one voxel more on each side, and so from losing the exact path below.
    reach = matrix * (counts - 1)
    low = offset + np.minimum(reach, 0).sum(axis=1)
    high = offset + np.maximum(reach, 0).sum(axis=1)
    limit = np.asarray(volume.shape) - 1
    start = np.clip(np.floor(low + 1e-6), 0, limit).astype(int)
    stop = np.clip(np.ceil(high - 1e-6), start, limit).astype(int) + 1
    values = volume.intensity.clipped(volume.read([slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)]))
    axes = np.abs(matrix).argmax(axis=1)  # of the patch, along which each axis of the volume runs
    if np.count_nonzero(np.abs(matrix) > 1e-9) == 3:
        inner = _sample_along_axes(values, matrix[range(3), axes], offset - start, axes, counts)
    else:
        inner = _sample_oblique(values, matrix, offset - start, counts)
    inner = volume.intensity.scale(inner)
    if tuple(counts) == tuple(patch_size):
        return inner
    patch = torch.zeros(tuple(patch_size))
    patch[placement.valid] = inner
    return patch


def _sample_along_axes(
    values: np.ndarray, steps: np.ndarray, offset: np.ndarray, axes: np.ndarray, counts: np.ndarray
) -> torch.Tensor:
    """Resample axis by axis: volume axis `a` runs along patch axis `axes[a]` in steps of `steps[a]` voxels."""
    order = np.argsort(axes)
    exact = np.allclose(np.abs(steps), 1) and np.allclose(offset, np.rint(offset))
    if exact and all(values.shape[a] == counts[axes[a]] for a in range(3)):
        flipped = values[tuple(slice(None, None, int(s)) for s in np.rint(steps))]
        return torch.from_numpy(flipped.transpose(order).astype(np.float32, order="C"))
    result = torch.from_numpy(values)
    for axis in range(3):
        last = result.shape[axis] - 1
        points = (offset[axis] + steps[axis] * np.arange(counts[axes[axis]])).clip(0, last)
        below = np.minimum(np.floor(points), max(last - 1, 0)).astype(int)  # its neighbour is there at the border too
        weight = _along(torch.from_numpy((points - below).astype(np.float32)), axis)
        near = result.index_select(axis, torch.from_numpy(below)).float()
        far = result.index_select(axis, torch.from_numpy(np.minimum(below + 1, last))).float()
        result = torch.lerp(near, far, weight)
    return result.permute(*order.tolist()).contiguous()


def _along(line: torch.Tensor, axis: int) -> torch.Tensor:
    """A 1D tensor as a 3D one that runs along `axis`."""
    return line.reshape([-1 if a == axis else 1 for a in range(3)])


def _sample_oblique(values: np.ndarray, matrix: np.ndarray, offset: np.ndarray, counts: np.ndarray) -> torch.Tensor:
    # grid_sample wants (z, y, x) coordinates in -1..1 over the box: `grid` is (X, Y, Z, 3). Built by broadcasting,
    # three times as quick as torch.nn.functional.affine_grid: i (X, 1, 1) and j (1, Y, 1) add up in float64, and only
    # the sum with k (1, 1, Z), which is as large as the patch, in float32.
    scale = 2.0 / np.maximum(np.array(values.shape) - 1, 1)
    grid = torch.empty((*counts.tolist(), 3))
    lines = [_along(torch.arange(int(n), dtype=torch.float64), axis) for axis, n in enumerate(counts)]
    for axis in range(3):
        i, j, k = (line * (matrix[axis, a] * scale[axis]) for a, line in enumerate(lines))
        grid[..., 2 - axis] = ((i + (offset[axis] * scale[axis] - 1.0)) + j).float() + k.float()
    source = torch.from_numpy(values).float()[None, None]
    result = torch.nn.functional.grid_sample(source, grid[None], "bilinear", "border", align_corners=True)
    return result[0, 0]


class RandomPatch:
    """A random training patch of a volume: draw, place, sample, then intensities.

    Args:
        patch_size: voxels along the three axes.
        random_aug: flips, quarter turns and intensity jitter (and, for "rand_zoom", zoom and rotation).
        spacing_type: "original" keeps the volume's spacing, "fixed" resamples to `spacing`, "rand_zoom" zooms by
            0.5 to 1.5 and rotates by up to 0.1 radian in 30 % of the patches each.
        spacing: mm along the RAS axes, for "fixed".

    Raises:
        UserError: for an unknown `spacing_type`, or "fixed" without `spacing`.
    """

    def __init__(
        self,
        patch_size: Sequence[int],
        random_aug: bool = True,
        spacing_type: str = "rand_zoom",
        spacing: Sequence[float] | None = None,
    ) -> None:
        if spacing_type not in SPACING_TYPES:
            raise UserError(f"spacing_type {spacing_type!r} is unknown; use one of {', '.join(SPACING_TYPES)}")
        if spacing_type == "fixed" and (spacing is None or len(spacing) != 3 or min(spacing) <= 0):
            raise UserError(f"spacing_type 'fixed' needs spacing, three positive numbers in mm; spacing is {spacing}")
        self.patch_size = tuple(patch_size)
        self.random_aug = random_aug
        self.rand_zoom = spacing_type == "rand_zoom"
        self.spacing = np.array(spacing, dtype=float) if spacing_type == "fixed" else None

    def __call__(self, volume: Volume, rng: np.random.Generator) -> torch.Tensor:
        """One patch, (1, X, Y, Z) float32; CT intensities in [0, 1] before jitter."""
        return self.apply(volume, draw(rng, self.random_aug, self.rand_zoom))

    def apply(self, volume: Volume, parameters: PatchParameters) -> torch.Tensor:
        """The patch of given parameters; a pure function."""
        ratio = (1.0, 1.0, 1.0) if self.spacing is None else self.spacing / volume.spacing
        placement = place(parameters, volume.shape, self.patch_size, ratio)
        patch = sample(volume, placement, self.patch_size)
        inner = patch[placement.valid]
        if volume.modality == "mri" and parameters.intensity_seed is not None:
            inner.copy_(_augment_mri(inner, parameters.intensity_seed))
        if parameters.intensity_scale != 1.0:
            inner *= parameters.intensity_scale
        if parameters.intensity_shift != 0.0:
            inner += parameters.intensity_shift
        return patch[None]


def _augment_mri(image: torch.Tensor, seed: int) -> torch.Tensor:
    """MAISI's MRI intensity augmentation, on the patch instead of the whole volume."""
    transforms = (
        RandBiasField(prob=0.3, coeff_range=(0.0, 0.3)),
        RandGibbsNoise(prob=0.3, alpha=(0.5, 1.0)),
        RandAdjustContrast(prob=0.3, gamma=(0.5, 2.0)),
        RandHistogramShift(prob=0.05, num_control_points=10),
    )
    image = image[None]
    for i, transform in enumerate(transforms):
        transform.set_random_state(seed=(seed + i) % 2**32)
        image = transform(image)
    return torch.as_tensor(image)[0]
