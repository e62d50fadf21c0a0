"""A network over a whole volume, window by window, with memory for a row of windows and not for the volume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.pipeline import Arriving, pipelined, sent
from scripts.networks.stitching import Stitching

Slabs = Iterator[tuple[int, list[torch.Tensor]]]


class VolumeInferer(Inferer):
    """Sliding windows for autoencoders: any volume size, several outputs, also at a fraction of the resolution.

    Windows overlap and are blended with Gaussian weights (sigma an eighth of the window, as MONAI's). They form a
    grid, so the weights that sum to 1 in every voxel are products of three vectors: nothing as large as the volume is
    needed to normalise them. They are stitched on the CPU, slab by slab along the first axis, while the device computes
    the next one.

    Args:
        roi_size: window in voxels, no larger than the volume is used; None takes the volume in one piece.
        factor: of the network; volumes are padded with 0 at their ends to multiples of it, and windows start there.
        overlap: share of a window along each axis that the next one covers again, from 0 up to below 1.
        sw_device: where the network is.

    Raises:
        UserError: for a window that is no multiple of `factor`, and for an overlap out of range.
    """

    def __init__(
        self,
        roi_size: Sequence[int] | None = None,
        factor: int = 4,
        overlap: float = 0.25,
        sw_device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        check_size("val_sliding_window_patch_size", roi_size, factor, optional=True)
        if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
            raise UserError(f"val_overlap is {overlap!r}; use a number from 0 up to below 1, e.g. 0.25")
        self.roi_size, self.factor, self.overlap = roi_size, factor, overlap
        self.sw_device = torch.device(sw_device)

    def window(self, size: Sequence[int]) -> list[int]:
        """The window that a volume of `size` is taken in: multiples of `factor`."""
        whole = [n + -n % self.factor for n in size]
        return [min(pair) for pair in zip(self.roi_size or whole, whole, strict=True)]

    def starts(self, size: Sequence[int]) -> list[list[int]]:
        """Where windows begin along each axis of a volume of `size`."""
        starts = []
        for n, roi in zip(size, self.window(size), strict=True):
            last = n + -n % self.factor - roi
            step = max(int(roi * (1 - self.overlap)) // self.factor, 1) * self.factor
            starts.append([min(step * i, last) for i in range(math.ceil(last / step) + 1)])
        return starts

    def count(self, size: Sequence[int]) -> int:
        """How many windows a volume of `size` takes."""
        return math.prod(map(len, self.starts(size)))

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What `slabs` yields, put together: one tensor, or a tuple where the network gives several."""
        wholes = joined(self.slabs(inputs, lambda window: network(window, *args, **kwargs)))
        return wholes[0] if len(wholes) == 1 else wholes

    def slabs(
        self,
        inputs: torch.Tensor,
        network: Callable[..., Any],
        normalise: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.float,
        after_window: Callable[[], object] | None = None,
        latents: bool = False,
    ) -> Slabs:
        """Finished parts of the outputs, one after the other along the first axis.

        Args:
            inputs: (B, 1, X, Y, Z), of any type, on the CPU; or (B, C, X / factor, ...), if they are `latents`.
            network: takes a window on `sw_device`; gives one tensor or several.
            normalise: makes windows of `inputs` what the network takes; padding with 0 comes after it.
            after_window: called after each window, which on a GPU may still be computed then.
            latents: whether `inputs` are of the lower resolution; windows are in voxels of the volume all the same.

        Yields:
            the first of the volume's voxels that are finished, and for each output its part, float32 on the CPU:
            (B, C, x, Y, Z) for one of the volume's resolution, else (B, C, x / factor, ...) of the padded volume.
        """
        scale = self.factor if latents else 1
        size = [n * scale for n in inputs.shape[2:]]
        roi, starts = self.window(size), self.starts(size)
        stitching = Stitching(size, roi, starts)

        def load(corner: Sequence[int]) -> torch.Tensor:
            i, j, k = (slice(a // scale, (a + n) // scale) for a, n in zip(corner, roi, strict=True))
            return padded(normalise(sent(inputs[:, :, i, j, k], self.sw_device)), [n // scale for n in roi])

        def compute(window: torch.Tensor) -> Arriving:
            outputs = Arriving(network(window))
            if after_window is not None:
                after_window()
            return outputs

        def store(corner: Sequence[int], outputs: Arriving) -> tuple[int, list[torch.Tensor]] | None:
            return stitching.add(corner, outputs.tensors())

        yield from pipelined(list(itertools.product(*starts)), load, compute, store, self.sw_device)


def joined(slabs: Slabs) -> tuple[torch.Tensor, ...]:
    """The whole outputs of what `VolumeInferer.slabs` yields."""
    parts = [slab for _, slab in slabs]
    return tuple(torch.cat(output, dim=2) for output in zip(*parts, strict=True))


def padded(volumes: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """(B, C, X, Y, Z) with zeros at the ends of the axes that are shorter than those of `size`."""
    short = [max(wanted - n, 0) for wanted, n in zip(size, volumes.shape[2:], strict=True)]
    return F.pad(volumes, [n for missing in reversed(short) for n in (0, missing)])  # F.pad begins with the last axis


def factor_of(network: nn.Module) -> int:
    """Voxels along an axis for one of the latents': sizes must be multiples of it. 1 for a network without `factor`."""
    return int(getattr(network, "factor", 1))


def check_size(name: str, size: Any, factor: int, optional: bool) -> None:
    """Whether `size` is a patch or window that a network can take.

    Args:
        name: of the knob.
        size: three integers, in voxels; or None, where it is `optional`.
        factor: what they must be multiples of.
        optional: whether None will do.

    Raises:
        UserError: naming the knob, its value, and a size that can be used.
    """
    if size is None and optional:
        return
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise UserError(f"{name} is {size!r}; use three positive integers")
    if any(n % factor for n in size):
        below = [max(n // factor, 1) * factor for n in size]
        raise UserError(f"{name} is {list(size)}, not divisible by the network's factor {factor}; use e.g. {below}")
