"""Windows blended into the volume that they were cut from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch


class Stitching:
    """Blends what a network makes of the windows of a volume, and gives it away row by row along the first axis.

    Windows that begin at the same x make a row; so do the voxels from there to where the next one begins, which no
    later window reaches. Only rows that windows have reached are held.

    Args:
        size: X, Y, Z of the volume, in voxels of the input, as all that follows.
        roi: the window.
        starts: where windows begin along each axis.
    """

    def __init__(self, size: Sequence[int], roi: Sequence[int], starts: Sequence[Sequence[int]]) -> None:
        self.size, self.weights = size, [_weights(*axis) for axis in zip(starts, roi, strict=True)]
        self.ends = dict(zip(starts[0], [*starts[0][1:], starts[0][-1] + roi[0]], strict=True))
        self.last = [axis[-1] for axis in starts[1:]]  # window of a row
        self.outputs: list[_Output] = []  # how many there are, the first window shows

    def add(self, corner: Sequence[int], windows: Sequence[torch.Tensor]) -> tuple[int, list[torch.Tensor]] | None:
        """Add the outputs (B, C, roi / ratio along each axis) of the window at `corner`, the next one in (x, y, z).

        Returns:
            None, until it is the last of its row: then where that begins, and its part (B, C, x, ...) of each output.
        """
        self.outputs = self.outputs or [_Output(self.size, self.weights, self.ends) for _ in windows]
        for output, window in zip(self.outputs, windows, strict=True):
            output.add(window, corner)
        x, *place = corner
        return (x, [output.finished(x) for output in self.outputs]) if place == self.last else None


class _Output:
    """The weighted sums of the windows of one output, row by row.

    Args:
        size: of the volume.
        weights: for each axis, those of the windows by where they begin.
        ends: of the rows, by where they begin.
    """

    def __init__(
        self, size: Sequence[int], weights: Sequence[dict[int, torch.Tensor]], ends: Mapping[int, int]
    ) -> None:
        self.size, self.weights, self.ends = size, weights, ends
        self.roi = [len(axis[0]) for axis in weights]
        self.ratio = 1  # input voxels along an axis for one of the output
        self.rows: dict[int, torch.Tensor] = {}

    def add(self, window: torch.Tensor, corner: Sequence[int]) -> None:
        """Add what the network made of the window at `corner`: (B, C, roi / ratio along each axis)."""
        self.ratio = self.roi[0] // window.shape[2]
        # Every ratio-th weight: the sum over windows is 1 in each voxel of the input, so also in those.
        wx, wy, wz = (axis[start][:: self.ratio] for axis, start in zip(self.weights, corner, strict=True))
        blended = window * (wx[:, None, None] * wy[:, None] * wz)  # (x, 1, 1) * (y, 1) * (z,)
        x, (y, z) = corner[0], (start // self.ratio for start in corner[1:])
        for begin in [begin for begin in self.ends if x <= begin < x + self.roi[0]]:
            part = blended[:, :, (begin - x) // self.ratio : (self.ends[begin] - x) // self.ratio]
            place = self._row(begin, window.shape)[:, :, : part.shape[2], y : y + len(wy), z : z + len(wz)]
            place += part  # into the row, as a view

    def _row(self, begin: int, shape: Sequence[int]) -> torch.Tensor:
        """The row that begins there, zeros if it is new."""
        if begin not in self.rows:
            height, width = (max(axis) + n for axis, n in zip(self.weights[1:], self.roi[1:], strict=True))
            size = (n // self.ratio for n in (self.ends[begin] - begin, height, width))
            # NumPy's zeros become memory page by page, as they are written; to fill a row would hold up a window.
            self.rows[begin] = torch.from_numpy(np.zeros((*shape[:2], *size), np.float32))
        return self.rows[begin]

    def finished(self, begin: int) -> torch.Tensor:
        """The row that begins there, to which no window is added any more: (B, C, x, ...), the caller's."""
        row = self.rows.pop(begin)
        if self.ratio == 1:  # what the volume was padded with is cut off; latents of it stay
            row = row[:, :, : self.size[0] - begin, : self.size[1], : self.size[2]]
        return row


def _weights(starts: Sequence[int], roi: int) -> dict[int, torch.Tensor]:
    """The weights (roi,) of the windows along one axis, by their start; in each voxel those of all windows sum to 1."""
    centred = torch.arange(roi, dtype=torch.float64) - (roi - 1) / 2
    weight = torch.exp(-0.5 * (centred / (roi / 8)) ** 2)
    total = torch.zeros(starts[-1] + roi, dtype=torch.float64)
    for start in starts:
        total[start : start + roi] += weight
    return {start: (weight / total[start : start + roi]).float() for start in starts}
