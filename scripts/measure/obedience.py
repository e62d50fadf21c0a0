"""How far a volume obeys a label map: HU within each label, and where bone, lung and air are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scripts.measure.features import HU_BINS, HU_RANGE, hu_bins

LABELS = 256  # 0 to 255
_SLAB = 32  # slices that are counted at a time: temporaries stay small


@dataclass(frozen=True)
class Tissue:
    """What is told by a threshold.

    Attributes:
        above: HU that it has at the least.
        below: HU that it stays under.
        labels: those that stand for it in label maps.
    """

    above: float = -math.inf
    below: float = math.inf
    labels: Sequence[int] = ()

    def within(self, hu: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Where HU are those of the tissue, inside the map: where its label is not 0."""
        return (hu >= self.above) & (hu < self.below) & (labels > 0)


def label_histograms(hu: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many voxels of each label have each whole number of HU from -1000 to 1000; what lies beyond counts there.

    Args:
        hu: (X, Y, Z).
        labels: (X, Y, Z) uint8.

    Returns:
        (256, 2001) int64; of several volumes they add up.
    """
    counts = np.zeros(LABELS * HU_BINS, np.int64)
    for start in range(0, len(hu), _SLAB):
        part = slice(start, start + _SLAB)
        place = labels[part].astype(np.int32) * HU_BINS + hu_bins(hu[part])
        counts += np.bincount(place.ravel(), minlength=len(counts))
    return counts.reshape(LABELS, HU_BINS)


def median(histogram: np.ndarray) -> int:
    """The median HU (the lower one of two) of a histogram (2001,) of counts, which must not be empty."""
    reached = np.cumsum(histogram)
    return int(np.searchsorted(reached, (reached[-1] + 1) // 2)) + HU_RANGE[0]


def dice(a: np.ndarray, b: np.ndarray) -> float | None:
    """Twice what two masks share over what both have together; None where both are empty."""
    together = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / together if together else None
