"""What a ControlNet's loss makes of regions: some labels count more, and a region makes a difference within alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from scripts.data.latent_list import FACTOR


def at_latent(maps: torch.Tensor) -> torch.Tensor:
    """Maps (B, 1, X, Y, Z) at the resolution of the latent, (B, 1, X / 4, ...), by PyTorch's `nearest`."""
    return maps[..., ::FACTOR, ::FACTOR, ::FACTOR]


@dataclass(frozen=True)
class RegionLosses:
    """NV-Generate-CTMR's losses of regions, as `controlnet_train` names them.

    Attributes:
        labels: whose voxels count more.
        weight: how much more; 1 for as much as all others.
        contrast_weight: of the contrast in what is minimised; 0 for none, and no second pass.
        delta: how large a difference the contrast asks for.
    """

    labels: tuple[int, ...] = ()
    weight: float = 1.0
    contrast_weight: float = 0.0
    delta: float = 2.0

    @classmethod
    def of(cls, knobs: Mapping[str, Any]) -> RegionLosses:
        """What a group `controlnet_train` says; some of NV-Generate-CTMR's leave out the contrast."""
        contrast = bool(knobs.get("use_region_contrasive_loss", False))
        return cls(
            labels=tuple(knobs["weighted_loss_label"]),
            weight=float(knobs["weighted_loss"]),
            contrast_weight=float(knobs.get("region_contrasive_loss_weight", 0.01)) if contrast else 0.0,
            delta=float(knobs.get("region_contrasive_loss_delta", 2.0)),
        )

    @property
    def weighted(self) -> tuple[int, ...]:
        """The labels whose voxels count more or less than others; none where the weight is 1."""
        return self.labels if self.weight != 1 else ()

    def weights(self, labels: torch.Tensor) -> torch.Tensor | None:
        """How much each latent voxel counts, (B, 1, X / 4, ...), by label maps (B, 1, X, Y, Z); None for all alike."""
        if not self.weighted:
            return None
        small = at_latent(labels)
        region = torch.zeros_like(small, dtype=torch.bool)
        for label in self.weighted:  # isin would bring them to the device, for which the step would wait
            region |= small == label
        return torch.where(region, self.weight, 1.0)

    def contrast(
        self,
        told: torch.Tensor,
        told_without: torch.Tensor,
        velocity: torch.Tensor,
        labels: torch.Tensor,
        labels_without: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """That the region makes a difference within, and none beyond it.

        Args:
            told: the velocity told for the maps, (B, C, X, Y, Z) float32.
            told_without: for the maps without the region.
            velocity: what it should be for the maps.
            labels: the maps (B, 1, 4 X, 4 Y, 4 Z).
            labels_without: the same without the region.

        Returns:
            minus the mean difference of both within the region, down to -`delta`; and the mean error of
            `told_without` outside, a voxel of the map away from the region.
        """
        region = (labels != labels_without).float()
        # Dilated by a voxel, of which only those of the latent are needed.
        inside, outside = at_latent(region), 1 - F.max_pool3d(region, 3, stride=FACTOR, padding=1)
        difference = -_mean_within((told - told_without).abs(), inside)
        return (
            F.relu(difference + self.delta) - self.delta,
            _mean_within((told_without - velocity).abs(), outside),
        )


def _mean_within(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of (B, C, ...) where a mask (B, 1, ...) is 1; about 0 where it is 1 nowhere."""
    return (values * mask).sum() / (values.shape[1] * mask.sum() + 1e-5)
