"""Grids of voxels: sizes that networks take, and what becomes of spacing and affine in another size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def nearest_size(size: Sequence[int], multiple: int) -> list[int]:
    """The nearest sizes (voxels) that are multiples of a number, at least one of it."""
    return [max(round(n / multiple), 1) * multiple for n in size]


def resized_grid(
    size: Sequence[int], wanted: Sequence[int], spacing: Sequence[float], affine: np.ndarray
) -> tuple[list[float], np.ndarray]:
    """Spacing and affine of another size over the same field of view.

    Args:
        size: X, Y, Z in voxels.
        wanted: the other size.
        spacing: mm along the axes.
        affine: 4 x 4, mm.
    """
    step = np.array(size) / wanted  # old voxels for one new one
    change = np.diag([*step, 1.0])
    change[:3, 3] = (step - 1) / 2  # voxels are areas: the first one's centre moves
    return [float(s * q) for s, q in zip(spacing, step, strict=True)], affine @ change
