"""What is measured on a reconstructed volume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

# Bands of the original's HU, lower limit inclusive; together they hold every voxel.
TISSUES = {
    "air": (-math.inf, -900.0),
    "lung": (-900.0, -500.0),
    "soft_tissue": (-500.0, 200.0),
    "bone": (200.0, math.inf),
}
_WINDOW, _SIGMA = 11, 1.5  # of SSIM (Wang et al. 2004)
_C1, _C2 = 0.01**2, 0.03**2
_SLAB = 32  # slices that are measured at a time: temporaries stay small


def reconstruction_metrics(
    reconstruction: torch.Tensor, target: torch.Tensor, intensity_range: float, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """PSNR (dB) and 3D SSIM of range 1, and mean absolute and root mean square error in HU, of one volume.

    SSIM is that of Wang et al. 2004 with a Gaussian window of 11 voxels and sigma 1.5 along each axis (the largest odd
    number where the volume is thinner), population covariances, averaged over the windows inside the volume.

    Args:
        reconstruction: (..., X, Y, Z), of one channel.
        target: in the same shape, normalised.
        intensity_range: what 1.0 is in HU.
        device: where slabs of the volumes are compared.
    """
    reconstruction, target = (t.reshape(t.shape[-3:]) for t in (reconstruction, target))
    kernel = _gaussian(target.shape).tolist()
    halo = len(kernel) - 1  # slices beyond a slab that the windows beginning in it reach
    absolute = square = similarity = 0.0
    for start, stop in _slabs(target.shape[0]):
        ours, theirs = (t[start : min(stop + halo, len(t))].to(device).float() for t in (reconstruction, target))
        error = (ours - theirs)[: stop - start]
        absolute += float(error.abs().sum(dtype=torch.float64))
        square += float(error.square().sum(dtype=torch.float64))
        if len(ours) > halo:
            similarity += float(_ssim(ours, theirs, kernel).sum(dtype=torch.float64))
    count = target.numel()
    mean_square = square / count
    return {
        "psnr": -10 * math.log10(max(mean_square, 1e-12)),
        "ssim": similarity / math.prod(n - halo for n in target.shape),
        "mae_hu": absolute / count * intensity_range,
        "rmse_hu": math.sqrt(mean_square) * intensity_range,
    }


def tissue_errors(
    reconstruction: torch.Tensor, target: torch.Tensor, window: Sequence[float]
) -> dict[str, float | int | None]:
    """`mae_hu_<tissue>` (None where there is none) and `voxels_<tissue>`, for the bands of HU in `TISSUES`.

    Args:
        reconstruction: (X, Y, Z), normalised.
        target: in the same shape; its voxels decide the band.
        window: HU of 0 and 1.
    """
    low, width = window[0], window[1] - window[0]
    edges = torch.tensor([(limit - low) / width for limit, _ in list(TISSUES.values())[1:]])
    sums, counts = torch.zeros(len(TISSUES), dtype=torch.float64), torch.zeros(len(TISSUES), dtype=torch.int64)
    for start, stop in _slabs(len(target)):
        original = target[start:stop]
        error = (reconstruction[start:stop] - original).abs().flatten()
        band = torch.bucketize(original.flatten(), edges, right=True)
        counts += torch.bincount(band, minlength=len(TISSUES))
        sums += torch.bincount(band, error.double(), minlength=len(TISSUES))
    found: dict[str, float | int | None] = {}
    for tissue, total, count in zip(TISSUES, sums.tolist(), counts.tolist(), strict=True):
        found[f"mae_hu_{tissue}"] = total / count * width if count else None
        found[f"voxels_{tissue}"] = count
    return found


def _slabs(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _SLAB, length)) for start in range(0, length, _SLAB))


def _gaussian(shape: Sequence[int]) -> torch.Tensor:
    size = min(_WINDOW, *shape)
    size -= 1 - size % 2
    x = torch.arange(size, dtype=torch.float64) - size // 2
    kernel = torch.exp(-0.5 * (x / _SIGMA) ** 2)
    return kernel / kernel.sum()


def _ssim(x: torch.Tensor, y: torch.Tensor, kernel: Sequence[float]) -> torch.Tensor:
    mean_x, mean_y = _smooth(x, kernel), _smooth(y, kernel)
    xx, yy, xy = mean_x.square(), mean_y.square(), mean_x * mean_y
    variances = _smooth(x.square(), kernel) - xx + _smooth(y.square(), kernel) - yy
    covariance = _smooth(x * y, kernel) - xy
    return (2 * xy + _C1) * (2 * covariance + _C2) / ((xx + yy + _C1) * (variances + _C2))


def _smooth(x: torch.Tensor, kernel: Sequence[float]) -> torch.Tensor:
    """The part of the separable convolution that lies inside; shifted sums beat PyTorch's conv3d of one channel."""
    for axis in range(3):
        count = x.shape[axis] - len(kernel) + 1
        total = x.narrow(axis, 0, count) * kernel[0]
        for shift, weight in enumerate(kernel[1:], 1):
            total.add_(x.narrow(axis, shift, count), alpha=weight)
        x = total
    return x
