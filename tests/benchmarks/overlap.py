"""Windows a second where the host stitches while a device computes, against one after the other.

python -m tests.benchmarks.overlap [--size 168 512 256] [--window 96 96 64] [--pairs 9]

The network sleeps as long as a GPU would take: as long as the host needs for a window, so that twice as many windows a
second are the limit. Both ways take turns.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import quantiles
from typing import Any

import torch

from scripts.data.intensity import CT_WINDOW, Intensity
from scripts.networks.stitching import Stitching
from scripts.networks.windows import VolumeInferer, padded
from tests.benchmarks.table import median, print_table

FACTOR, CHANNELS = 4, 4
INTENSITY = Intensity(CT_WINDOW, clip=True)


class Sleeper:
    """Stands for a network on a GPU: takes `seconds`, in which the host is free, and gives `outputs`.

    Attributes:
        taken: how long its calls took, all together.
    """

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self.outputs, self.seconds, self.taken = outputs, 0.0, 0.0

    def __call__(self, window: torch.Tensor) -> Sequence[torch.Tensor]:
        start = time.perf_counter()
        time.sleep(self.seconds)
        self.taken += time.perf_counter() - start
        return self.outputs


Way = Callable[[VolumeInferer, torch.Tensor, Sleeper], Iterator[Any]]


def in_turn(inferer: VolumeInferer, inputs: torch.Tensor, network: Sleeper, latents: bool = False) -> Iterator[Any]:
    """Load, compute, stitch: one window after the other, in one thread."""
    scale = FACTOR if latents else 1
    size = [n * scale for n in inputs.shape[2:]]
    roi, starts = inferer.window(size), inferer.starts(size)
    stitching = Stitching(size, roi, starts)
    for corner in itertools.product(*starts):
        i, j, k = (slice(a // scale, (a + n) // scale) for a, n in zip(corner, roi, strict=True))
        part = inputs[:, :, i, j, k]
        window = padded(part.float() if latents else INTENSITY.normalise(part), [n // scale for n in roi])
        yield stitching.add(corner, [output.float().cpu() for output in network(window)])


def overlapping(inferer: VolumeInferer, inputs: torch.Tensor, network: Sleeper, latents: bool = False) -> Iterator[Any]:
    """What the uses of a trained network do."""
    normalise = torch.Tensor.float if latents else INTENSITY.normalise
    return inferer.slabs(inputs, network, normalise, latents=latents)


def seconds_for(way: Way, inferer: VolumeInferer, inputs: torch.Tensor, network: Sleeper) -> tuple[float, float]:
    """A window's, and the network's share of them."""
    count = inferer.count([n * (1 if inputs.shape[1] == 1 else FACTOR) for n in inputs.shape[2:]])
    network.taken, start = 0.0, time.perf_counter()
    for _ in way(inferer, inputs, network):
        pass
    return (time.perf_counter() - start) / count, network.taken / count


def row(name: str, inferer: VolumeInferer, inputs: torch.Tensor, outputs: Sequence[torch.Tensor], pairs: int) -> tuple:
    network = Sleeper(outputs)
    ways = [partial(way, latents=inputs.shape[1] > 1) for way in (in_turn, overlapping)]
    for _ in range(3):  # the host is slower where it slept in between, so it is timed as it will be
        times = [seconds_for(ways[0], inferer, inputs, network) for _ in range(3)]
        network.seconds = median([whole - taken for whole, taken in times])
    turns = [[seconds_for(way, inferer, inputs, network) for way in ways] for _ in range(pairs)]
    host, device = (1000 * median(one) for one in zip(*((w - t, t) for (w, t), _ in turns), strict=True))
    plain, ours = (1 / median([whole for whole, _ in times]) for times in zip(*turns, strict=True))
    low, middle, high = quantiles([one / other for (one, _), (other, _) in turns], n=4)
    spent = f"{host:.1f}, {device:.1f} ms"
    return name, spent, f"{plain:.0f}", f"{ours:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"


@torch.inference_mode()
def main(size: list[int], window: list[int], overlap: float, pairs: int) -> None:
    torch.set_num_threads(1)
    inferer = VolumeInferer(window, FACTOR, overlap)
    voxels = torch.randint(-1000, 1000, (1, 1, *size), dtype=torch.int16)
    whole, latent = torch.rand(1, 1, *window), torch.rand(1, CHANNELS, *(n // FACTOR for n in window))
    latents = torch.rand(1, CHANNELS, *(n // FACTOR for n in size))
    rows = [
        row("reconstruction: one output", inferer, voxels, [whole], pairs),
        row("encoding: two latents", inferer, voxels, [latent, latent], pairs),
        row("validation, evaluation: three outputs", inferer, voxels, [whole, latent, latent], pairs),
        row("generation: latents decoded", inferer, latents, [whole], pairs),
    ]
    shape = " x ".join(map(str, window))
    head = (f"windows of {shape}", "host, network", "a second: in turn", "overlapping", "ratio (quartiles)")
    print_table(head, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=[168, 512, 256])
    parser.add_argument("--window", type=int, nargs=3, default=[96, 96, 64])
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--pairs", type=int, default=9)
    main(**vars(parser.parse_args()))
