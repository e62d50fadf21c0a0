"""Statistics of the latents of a set of volumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch


class LatentHealth:
    """Sums of posterior means and variances over the latents of any number of volumes."""

    def __init__(self) -> None:
        self.count, self.noise = 0, 0.0
        self.sum, self.square = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)

    def update(self, mu: torch.Tensor, sigma: torch.Tensor) -> None:
        """Add latents (B, C, X, Y, Z)."""
        values = mu.double()
        self.count += values[:, 0].numel()
        self.sum = self.sum + values.sum((0, 2, 3, 4)).cpu()
        self.square = self.square + values.square().sum((0, 2, 3, 4)).cpu()
        self.noise += float(sigma.double().square().sum()) / mu.shape[1]  # mean over channels, as `_moments` needs it

    @staticmethod
    def merged(parts: Sequence[LatentHealth]) -> LatentHealth:
        """The statistics of several volumes' or ranks' latents together."""
        whole = LatentHealth()
        for part in parts:
            whole.count, whole.noise = whole.count + part.count, whole.noise + part.noise
            whole.sum, whole.square = whole.sum + part.sum, whole.square + part.square
        return whole

    def sums(self) -> dict[str, float | int | list[float]]:
        """What `from_sums` needs: voxels, sums of means and of their squares by channel, and of the noise variance."""
        return {"count": self.count, "sum": self.sum.tolist(), "square": self.square.tolist(), "noise": self.noise}

    @classmethod
    def from_sums(cls, sums: Mapping) -> LatentHealth:
        """The inverse of `sums`."""
        health = cls()
        health.count, health.noise = int(sums["count"]), float(sums["noise"])
        health.sum, health.square = (torch.tensor(sums[key], dtype=torch.float64) for key in ("sum", "square"))
        return health

    def _moments(self) -> tuple[torch.Tensor, torch.Tensor, float, float]:
        mean, square = self.sum / self.count, self.square / self.count
        variance = float(square.mean() - mean.mean() ** 2)
        return mean, (square - mean**2).clamp(min=0).sqrt(), max(variance, 1e-20), self.noise / self.count

    def compute(self) -> dict[str, float]:
        """`scale_factor` (1 / std over all), `latent_std_<channel>`, and `posterior_noise_share` of the variance."""
        _, deviations, variance, noise = self._moments()
        health = {"scale_factor": 1 / math.sqrt(variance), "posterior_noise_share": noise / (variance + noise)}
        return health | {f"latent_std_{channel}": float(std) for channel, std in enumerate(deviations)}

    def statistics(self) -> dict[str, float | int | list[float]]:
        """As `compute`, by channel in lists, with the means and with `count`, the number of latent values."""
        mean, deviations, variance, noise = self._moments()
        return {
            "scale_factor": 1 / math.sqrt(variance),
            "std": math.sqrt(variance),
            "channel_mean": mean.tolist(),
            "channel_std": deviations.tolist(),
            "posterior_noise_share": noise / (variance + noise),
            "count": self.count * len(mean),
        }
