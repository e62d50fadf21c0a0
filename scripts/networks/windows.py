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

Slabs = Iterator[tuple[int, list[torch.Tensor]]]


class VolumeInferer(Inferer):
    """Sliding windows for autoencoders: any volume size, several outputs, also at a fraction of the resolution.

    Windows overlap and are blended with Gaussian weights (sigma an eighth of the window, as MONAI's). They form a
    grid, so the weights that sum to 1 in every voxel are products of three vectors: nothing as large as the volume is
    needed to normalise them. They are stitched on the CPU, slab by slab along the first axis.

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
        self.roi_size, self.factor, self.overlap, self.sw_device = roi_size, factor, overlap, sw_device

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
            after_window: called after each window.
            latents: whether `inputs` are of the lower resolution; windows are in voxels of the volume all the same.

        Yields:
            the first of the volume's voxels that are finished, and for each output its part, float32 on the CPU:
            (B, C, x, Y, Z) for one of the volume's resolution, else (B, C, x / factor, ...) of the padded volume.
        """
        scale = self.factor if latents else 1
        size = [n * scale for n in inputs.shape[2:]]
        roi, (x_starts, y_starts, z_starts) = self.window(size), self.starts(size)
        weights = [_weights(*axis) for axis in zip((x_starts, y_starts, z_starts), roi, strict=True)]
        stitchers: list[_Stitcher] = []  # one for each output; how many there are, the first window shows
        # Windows that begin at the same x make a row. No later row reaches what lies before its own beginning.
        for x, end in zip(x_starts, [*x_starts[1:], x_starts[-1] + roi[0]], strict=True):
            for y, z in itertools.product(y_starts, z_starts):
                i, j, k = (slice(a // scale, (a + n) // scale) for a, n in zip((x, y, z), roi, strict=True))
                window = normalise(inputs[:, :, i, j, k].to(self.sw_device))
                outputs = network(padded(window, [n // scale for n in roi]))
                outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
                stitchers = stitchers or [_Stitcher(size, weights) for _ in outputs]
                for stitcher, output in zip(stitchers, outputs, strict=True):
                    stitcher.add(output.float().cpu(), (x, y, z))
                if after_window is not None:
                    after_window()
            yield x, [stitcher.finish(end) for stitcher in stitchers]


class _Stitcher:
    """Blends windows into one output, from the front of the volume to its back, and holds one row of windows.

    Args:
        size: X, Y, Z of the volume, in voxels of the input, as all that follows.
        weights: for each axis, those of the windows by where they begin.
    """

    def __init__(self, size: Sequence[int], weights: Sequence[dict[int, torch.Tensor]]) -> None:
        self.size, self.weights = size, weights
        self.roi = [len(axis[0]) for axis in weights]
        self.begin = 0  # of the row that is being filled
        self.row: torch.Tensor | None = None  # the weighted sum of its windows
        self.ratio = 1  # input voxels along an axis for one of the output

    def add(self, window: torch.Tensor, corner: Sequence[int]) -> None:
        """Add what the network made of the window at `corner`: (B, C, roi / ratio along each axis)."""
        if self.row is None:
            self.ratio = self.roi[0] // window.shape[2]
            height, width = (max(axis) + n for axis, n in zip(self.weights[1:], self.roi[1:], strict=True))
            self.row = window.new_zeros(*window.shape[:3], height // self.ratio, width // self.ratio)
        # Every ratio-th weight: the sum over windows is 1 in each voxel of the input, so also in those.
        wx, wy, wz = (axis[start][:: self.ratio] for axis, start in zip(self.weights, corner, strict=True))
        y, z = (start // self.ratio for start in corner[1:])
        place = self.row[:, :, :, y : y + len(wy), z : z + len(wz)]
        place += window * (wx[:, None, None] * wy[:, None] * wz)  # (x, 1, 1) * (y, 1) * (z,): into `row`, as a view

    def finish(self, until: int) -> torch.Tensor:
        """The part from the last one's end up to `until`, to which no window is added any more: (B, C, x, ...)."""
        assert self.row is not None
        done = (until - self.begin) // self.ratio
        part, rest = self.row[:, :, :done], self.row[:, :, done:]
        if self.ratio == 1:  # what the volume was padded with is cut off; latents of it stay
            left, height, width = self.size[0] - self.begin, self.size[1], self.size[2]
            part = part[:, :, :left, :height, :width]
        # A new tensor, since `part` is the caller's: the next row is as long, and begins with what is left of this one.
        self.row, self.begin = F.pad(rest, (0, 0, 0, 0, 0, done)), until
        return part


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


def _weights(starts: Sequence[int], roi: int) -> dict[int, torch.Tensor]:
    """The weights (roi,) of the windows along one axis, by their start; in each voxel those of all windows sum to 1."""
    centred = torch.arange(roi, dtype=torch.float64) - (roi - 1) / 2
    weight = torch.exp(-0.5 * (centred / (roi / 8)) ** 2)
    total = torch.zeros(starts[-1] + roi, dtype=torch.float64)
    for start in starts:
        total[start : start + roi] += weight
    return {start: (weight / total[start : start + roi]).float() for start in starts}
