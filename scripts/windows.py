"""A network over a whole volume, window by window, with memory for a window and not for the volume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer

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
    """

    def __init__(
        self,
        roi_size: Sequence[int] | None = None,
        factor: int = 4,
        overlap: float = 0.25,
        sw_device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.roi_size, self.factor, self.overlap, self.sw_device = roi_size, factor, overlap, sw_device

    def window(self, size: Sequence[int]) -> list[int]:
        """The window that a volume of `size` is taken in: multiples of `factor`."""
        whole = [n + -n % self.factor for n in size]
        return [min(r - r % self.factor, n) for r, n in zip(self.roi_size or whole, whole, strict=True)]

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
        after_window: Callable[[], None] | None = None,
    ) -> Slabs:
        """Finished parts of the outputs, one after the other along the first axis.

        Args:
            inputs: (B, 1, X, Y, Z), of any type, on the CPU.
            network: takes a window on `sw_device`; gives one tensor or several.
            normalise: makes windows of `inputs` what the network takes; padding with 0 comes after it.
            after_window: called after each window.

        Yields:
            the first of the voxels of `inputs` that are finished, and for each output its part, float32 on the CPU:
            (B, C, x, Y, Z) for one of the input's resolution, else (B, C, x / factor, ...) of the padded volume.
        """
        size = inputs.shape[2:]
        roi, starts = self.window(size), self.starts(size)
        shares = [_shares(begins, r) for begins, r in zip(starts, roi, strict=True)]
        sums: list[torch.Tensor] = []  # of weighted outputs, for the windows that begin at `x`
        for i, x in enumerate(starts[0]):
            for (j, y), (k, z) in itertools.product(enumerate(starts[1]), enumerate(starts[2])):
                window = normalise(_box(inputs, (x, y, z), roi).to(self.sw_device))
                short = [r - n for r, n in zip(roi, window.shape[2:], strict=True)]
                outputs = network(F.pad(window, [p for s in reversed(short) for p in (0, s)]))
                outputs = [t.float().cpu() for t in (outputs if isinstance(outputs, (tuple, list)) else (outputs,))]
                ratios = [roi[0] // t.shape[2] for t in outputs]
                if not sums:
                    height, width = (begins[-1] + r for begins, r in zip(starts[1:], roi[1:], strict=True))
                    pairs = zip(outputs, ratios, strict=True)
                    sums = [t.new_zeros(*t.shape[:3], height // q, width // q) for t, q in pairs]
                for output, total, ratio in zip(outputs, sums, ratios, strict=True):
                    a, b, c = (share[n][::ratio] for share, n in zip(shares, (i, j, k), strict=True))
                    place = _box(total, (0, y // ratio, z // ratio), output.shape[2:])
                    place += output * (a[:, None, None] * b[:, None] * c)
                if after_window is not None:
                    after_window()
            done = starts[0][i + 1] - x if i + 1 < len(starts[0]) else roi[0]
            parts = []
            for index, (total, ratio) in enumerate(zip(sums, ratios, strict=True)):
                ended = done // ratio
                part = total[:, :, :ended]
                parts.append(_box(part, (0, 0, 0), (size[0] - x, *size[1:])) if ratio == 1 else part)
                sums[index] = F.pad(total[:, :, ended:], (0, 0, 0, 0, 0, ended))
            yield x, parts


def joined(slabs: Slabs) -> tuple[torch.Tensor, ...]:
    """The whole outputs of what `VolumeInferer.slabs` yields."""
    parts = [slab for _, slab in slabs]
    return tuple(torch.cat(output, dim=2) for output in zip(*parts, strict=True))


def _box(volume: torch.Tensor, corner: Sequence[int], size: Sequence[int]) -> torch.Tensor:
    x, y, z = (slice(c, c + n) for c, n in zip(corner, size, strict=True))
    return volume[:, :, x, y, z]


def _shares(starts: Sequence[int], roi: int) -> list[torch.Tensor]:
    """The weights of windows along one axis; in each voxel those of all windows sum to 1."""
    centred = torch.arange(roi, dtype=torch.float64) - (roi - 1) / 2
    weight = torch.exp(-0.5 * (centred / (roi / 8)) ** 2)
    total = torch.zeros(starts[-1] + roi, dtype=torch.float64)
    for start in starts:
        total[start : start + roi] += weight
    return [(weight / total[start : start + roi]).float() for start in starts]
