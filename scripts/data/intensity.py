"""Intensities as a scanner gives them, and as a network takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from scripts.common.errors import UserError

CT_WINDOW = (-1000.0, 1000.0)  # HU, mapped to 0..1, as MAISI does
MRI_PERCENTILES = (0.0, 99.5)


@dataclass(frozen=True)
class Intensity:
    """A linear map of intensities to [0, 1] and back.

    Attributes:
        window: intensities (HU for CT) that map to 0 and 1.
        clip: whether intensities outside the window are clipped (CT) or not (MRI).
    """

    window: tuple[float, float]
    clip: bool

    @classmethod
    def for_volume(cls, data: np.ndarray, modality: str) -> Intensity:
        """The map for a whole volume: `CT_WINDOW` for "ct", its `MRI_PERCENTILES` for "mri".

        Raises:
            UserError: where these percentiles are the same.
        """
        if modality == "ct":
            return cls(CT_WINDOW, clip=True)
        low, high = (float(p) for p in np.percentile(data, MRI_PERCENTILES))
        if not low < high:
            raise UserError(f"is constant (99.5 % of its voxels are {low:g}); remove it")
        return cls((low, high), clip=False)

    @property
    def range(self) -> float:
        """What 1.0 is, in HU (in stored intensity for MRI)."""
        return self.window[1] - self.window[0]

    def clipped(self, values: np.ndarray) -> np.ndarray:
        """Intensities within `window`, in their own type; as they are where `clip` is false."""
        if not self.clip:
            return values
        return np.clip(values, *(np.array(limit, values.dtype) for limit in self.window))

    def scale(self, values: torch.Tensor) -> torch.Tensor:
        """Float32 intensities to [0, 1] by `window`, in place; linear, so it may come after interpolation."""
        return values.sub_(self.window[0]).div_(self.range)

    def normalise(self, values: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Intensities, on any device, to float32 in [0, 1] by `window` (beyond it where `clip` is false)."""
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.ascontiguousarray(values))
        values = values.to(torch.float32, copy=True)
        return self.scale(values.clamp_(*self.window) if self.clip else values)

    def restore(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The inverse: [0, 1] to intensities, rounded where `dtype` is int16, and clipped to what can be there."""
        values = values * self.range + self.window[0]
        if self.clip:
            values.clamp_(*self.window)
        if dtype == torch.int16:
            values.round_().clamp_(-32768, 32767)
        return values.to(dtype)
