"""Sets of volumes compared: Fréchet distance of slices' features, histograms of HU, nearest neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from monai.transforms import ResizeWithPadOrCrop

# The axis of a RAS volume that slices of a plane lie across.
PLANES = {"xy": 2, "yz": 0, "zx": 1}
HU_RANGE = (-1000, 1000)
HU_BINS = HU_RANGE[1] - HU_RANGE[0] + 1
GRID = 32  # cells along each axis of a thumbnail


class Gaussian:
    """Mean and covariance of any number of feature vectors, from sums that add up over volumes and ranks.

    Args:
        features: how many numbers a vector has.
    """

    def __init__(self, features: int) -> None:
        self.count = 0
        self.sum = torch.zeros(features, dtype=torch.float64)
        self.square = torch.zeros(features, features, dtype=torch.float64)

    def update(self, vectors: torch.Tensor) -> None:
        """Add vectors (N, C)."""
        values = vectors.to("cpu", torch.float64)
        self.count += len(values)
        self.sum += values.sum(0)
        self.square += values.T @ values

    @staticmethod
    def merged(parts: Sequence[Gaussian]) -> Gaussian:
        """That of all vectors of several together."""
        whole = Gaussian(len(parts[0].sum))
        for part in parts:
            whole.count += part.count
            whole.sum += part.sum
            whole.square += part.square
        return whole

    @property
    def mean(self) -> torch.Tensor:
        """(C,)"""
        return self.sum / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """(C, C), over one less than their number."""
        return (self.square - torch.outer(self.mean, self.sum)) / (self.count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Fréchet distance of two Gaussians (Dowson & Landau 1982), FID where they are of features.

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The last trace is the sum of the singular values of
    A^(1/2) B^(1/2), so that no root is drawn of what rounding has left of a product's small eigenvalues.
    """
    roots = [_root(gaussian.covariance) for gaussian in (a, b)]
    traces = sum(float(root.square().sum()) for root in roots)
    overlap = float(torch.linalg.svdvals(roots[0] @ roots[1]).sum())
    return max(float((a.mean - b.mean).square().sum()) + traces - 2 * overlap, 0.0)


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance; directions of rounding errors alone count as none."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    values[values < len(values) * torch.finfo(values.dtype).eps * values.max()] = 0
    return (vectors * values.sqrt()) @ vectors.T


def in_geometry(
    volume: torch.Tensor, spacing: Sequence[float], wanted: Sequence[float], size: Sequence[int]
) -> torch.Tensor:
    """A volume resampled (trilinear) to another spacing, then padded with 0 or cropped about its centre.

    Args:
        volume: (X, Y, Z) in [0, 1].
        spacing: mm along its axes.
        wanted: spacing of the result.
        size: of the result in voxels.
    """
    resampled = [max(round(n * s / w), 1) for n, s, w in zip(volume.shape, spacing, wanted, strict=True)]
    if resampled != list(volume.shape):
        volume = F.interpolate(volume[None, None], resampled, mode="trilinear", align_corners=False)[0, 0]
    return torch.as_tensor(ResizeWithPadOrCrop(size)(volume[None]))[0]


def plane_features(
    volume: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor], ratio: float
) -> dict[str, torch.Tensor]:
    """Features of the central slices of the three planes.

    Args:
        volume: (X, Y, Z) in [0, 1].
        network: gives (N, C) for slices (N, 1, H, W).
        ratio: which share of the slices along each axis is taken, about the centre.

    Returns:
        for each of `PLANES`, (N, C).
    """
    return {plane: network(_central(volume.movedim(axis, 0), ratio)[:, None]) for plane, axis in PLANES.items()}


def _central(slices: torch.Tensor, ratio: float) -> torch.Tensor:
    count = len(slices)
    start = min(int((1 - ratio) / 2 * count), count - 1)
    return slices[start : max(int((1 + ratio) / 2 * count), start + 1)]


def hu_histogram(voxels: np.ndarray) -> np.ndarray:
    """Which share of the voxels has each whole number of HU from -1000 to 1000; what lies beyond counts there.

    Args:
        voxels: HU, of any shape and type.

    Returns:
        (2001,) that sums to 1.
    """
    bins = hu_bins(voxels).ravel()
    return np.bincount(bins, minlength=HU_BINS) / bins.size


def hu_bins(voxels: np.ndarray) -> np.ndarray:
    """Voxels in HU as the numbers, int16, of bins of 1 HU: 0 for -1000 HU and less, 2000 for 1000 HU and more."""
    low, high = HU_RANGE
    return np.rint(np.clip(voxels, low, high)).astype(np.int16) - np.int16(low)


def wasserstein(p: np.ndarray, q: np.ndarray) -> float:
    """The Wasserstein-1 distance of two histograms, in HU: the integral of the difference of their distributions."""
    return float(np.abs(np.cumsum(p - q)[:-1]).sum())


def thumbnail(volume: torch.Tensor) -> torch.Tensor:
    """A volume (X, Y, Z) in [0, 1] as the mean HU of 32 x 32 x 32 equal boxes of its field of view, float32."""
    boxes = F.adaptive_avg_pool3d(volume[None], GRID)[0]
    return boxes * (HU_RANGE[1] - HU_RANGE[0]) + HU_RANGE[0]


def nearest(thumbnails: torch.Tensor, others: torch.Tensor) -> tuple[list[int], list[float]]:
    """For each thumbnail which of `others` is nearest, and the root mean square of their differences in HU.

    Args:
        thumbnails: (N, 32, 32, 32).
        others: (M, 32, 32, 32).
    """
    # Not by matrix products, whose rounding would keep a copy from being at distance 0.
    apart = torch.cdist(thumbnails.flatten(1), others.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    least, which = apart.min(1)
    return which.tolist(), (least / math.sqrt(GRID**3)).tolist()
