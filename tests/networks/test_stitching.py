"""Windows blended into the volume, beside a loop that adds them up in a volume of their weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from scripts.networks.stitching import Stitching
from scripts.networks.windows import VolumeInferer, padded

CASES = [  # size of the volume, window, overlap
    ((40, 37, 18), (16, 16, 16), 0.25),
    ((9, 50, 33), (16, 12, 8), 0.0),
    ((33, 9, 21), (20, 8, 12), 0.6),
    ((27, 16, 16), (16, 16, 16), 0.9),
    ((2, 3, 5), (16, 16, 16), 0.25),
    ((30, 21, 12), None, 0.25),
]


def scaled(values: torch.Tensor) -> torch.Tensor:
    return (values.float() + 1000) / 2000


def one_after_the_other(
    inferer: VolumeInferer, inputs: torch.Tensor, network: Callable, latents: bool = False
) -> list[torch.Tensor]:
    """Compute a window, add it to all of the volume, and take the next one."""
    scale = inferer.factor if latents else 1
    size = [n * scale for n in inputs.shape[2:]]
    roi, starts = inferer.window(size), inferer.starts(size)
    axes = []
    for begins, n in zip(starts, roi, strict=True):
        bell = torch.exp(-0.5 * ((torch.arange(n, dtype=torch.float64) - (n - 1) / 2) / (n / 8)) ** 2)
        total = torch.zeros(begins[-1] + n, dtype=torch.float64)
        for begin in begins:
            total[begin : begin + n] += bell
        axes.append({begin: (bell / total[begin : begin + n]).float() for begin in begins})
    wholes: list[torch.Tensor] = []
    for corner in itertools.product(*starts):
        i, j, k = (slice(a // scale, (a + n) // scale) for a, n in zip(corner, roi, strict=True))
        outputs = network(padded(scaled(inputs[:, :, i, j, k]), [n // scale for n in roi]))
        for place, output in enumerate(outputs):
            ratio = roi[0] // output.shape[2]
            if place == len(wholes):
                whole = [(begins[-1] + n) // ratio for begins, n in zip(starts, roi, strict=True)]
                wholes.append(torch.zeros(*output.shape[:2], *whole))
            wx, wy, wz = (axis[begin][::ratio] for axis, begin in zip(axes, corner, strict=True))
            i, j, k = (slice(a // ratio, (a + n) // ratio) for a, n in zip(corner, roi, strict=True))
            wholes[place][:, :, i, j, k] += output.float() * (wx[:, None, None] * wy[:, None] * wz)
    return [whole[..., : size[0], : size[1], : size[2]] for whole in wholes]


class Three(nn.Module):
    """Like an autoencoder: an output of the volume's resolution, and two of a quarter of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, window: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = self.conv(window)
        mu = nn.functional.avg_pool3d(h, 4)
        return h[:, :1], mu.double(), mu.exp().half()


def decode(latents: torch.Tensor) -> Sequence[torch.Tensor]:
    return [nn.functional.interpolate(latents[:, :1] * latents[:, 1:], scale_factor=4, mode="trilinear")]


@pytest.mark.parametrize(("size", "window", "overlap"), CASES)
def test_every_byte_is_that_of_one_window_after_the_other(size: tuple, window: tuple | None, overlap: float) -> None:
    volume = torch.randint(-1000, 1000, (1, 1, *size), dtype=torch.int16)
    latents = torch.randint(-1000, 1000, (1, 2, *(-(-n // 4) for n in size)))
    inferer, network = VolumeInferer(window, overlap=overlap), Three()
    runs: list[tuple] = [(torch.no_grad, volume, lambda window: network(window)[:1], False)]
    runs += [(torch.inference_mode, volume, network, False), (torch.inference_mode, latents, decode, True)]
    for mode, inputs, function, low in runs:
        with mode():
            slabs = list(inferer.slabs(inputs, function, scaled, latents=low))
            wanted = one_after_the_other(inferer, inputs, function, low)
        found = [torch.cat(parts, dim=2) for parts in zip(*(parts for _, parts in slabs), strict=True)]
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype == torch.float32
            assert one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


def test_rows_are_held_only_while_windows_reach_them() -> None:
    inferer = VolumeInferer([16, 8, 8], overlap=0.25)
    size, starts = [64, 16, 16], inferer.starts([64, 16, 16])
    stitching, finished = Stitching(size, inferer.window(size), starts), []
    for corner in itertools.product(*starts):
        row = stitching.add(corner, [torch.ones(1, 1, 16, 8, 8), torch.ones(1, 4, 4, 2, 2)])
        held = {begin for output in stitching.outputs for begin in output.rows}
        assert held <= {corner[0], corner[0] + 12} and all(begin < 64 for begin in held)
        if row is not None:
            finished.append((row[0], [tuple(part.shape) for part in row[1]]))
            assert corner[1:] == tuple(begins[-1] for begins in starts[1:]) and corner[0] not in held
            assert all(torch.allclose(part, torch.ones(())) for part in row[1])
    assert held == set() and [x for x, _ in finished] == starts[0] == [0, 12, 24, 36, 48]
    assert finished[0][1] == [(1, 1, 12, 16, 16), (1, 4, 3, 4, 4)]
    assert finished[-1][1] == [(1, 1, 16, 16, 16), (1, 4, 4, 4, 4)]
