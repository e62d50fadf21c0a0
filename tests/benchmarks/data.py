"""Patches per second of one core: this bundle's data path against MONAI's stock transforms in MAISI's order.

python -m tests.benchmarks.data [--repeats 5] [--volume FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import CacheDataset, Dataset
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    Orientationd,
    RandFlipd,
    RandRotate90d,
    RandRotated,
    RandScaleIntensityd,
    RandShiftIntensityd,
    RandSpatialCropd,
    RandZoomd,
    ScaleIntensityRanged,
    SpatialPadd,
)

from scripts.data.datasets import PatchDataset
from scripts.data.patches import RandomPatch
from scripts.data.store import Store
from scripts.phantom import phantom_image
from tests.benchmarks.table import median, print_table

SHAPE, SPACING, PATCH = (512, 512, 140), (0.8, 0.8, 2.5), (96, 96, 96)


def stock_transforms(patch_size: tuple[int, ...] = PATCH) -> Compose:
    """MAISI's training transforms for CT with `spacing_type` "rand_zoom" (NV-Generate-CTMR, scripts/transforms.py)."""
    keys = "image"
    return Compose(
        [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS"),
            ScaleIntensityRanged(keys, a_min=-1000, a_max=1000, b_min=0.0, b_max=1.0, clip=True),
            *(RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3)),
            *(RandRotate90d(keys, prob=0.5, spatial_axes=axes) for axes in ((0, 1), (1, 2), (0, 2))),
            RandScaleIntensityd(keys, prob=0.3, factors=(0.9, 1.1)),
            RandShiftIntensityd(keys, prob=0.3, offsets=0.05),
            RandZoomd(keys, prob=0.3, min_zoom=0.5, max_zoom=1.5, keep_size=False, mode="bilinear"),
            RandRotated(keys, prob=0.3, range_x=0.1, range_y=0.1, range_z=0.1, keep_size=True, mode="bilinear"),
            SpatialPadd(keys, spatial_size=patch_size),
            RandSpatialCropd(keys, roi_size=patch_size, random_size=False, random_center=True),
            EnsureTyped(keys, dtype=torch.float16),
        ]
    )


def seconds(draw: Callable[[int], object], count: int) -> list[float]:
    times = []
    for index in range(count):
        started = time.perf_counter()
        draw(index)
        times.append(time.perf_counter() - started)
    return times


def machine_limits() -> dict[str, float]:
    """Seconds to copy one float32 patch in memory, and GB/s of one core."""
    source = np.random.default_rng(0).random((64, *PATCH), dtype=np.float32)
    target = np.empty_like(source)
    runs = []
    for _ in range(5):
        started = time.perf_counter()
        np.copyto(target, source)
        runs.append(time.perf_counter() - started)
    return {"copy GB/s": 2 * source.nbytes / median(runs) / 1e9, "copy of a patch, ms": 1e3 * median(runs) / 64}


def _grow(folder: Path, patches: int, queue: Any) -> None:
    entries = [{"image": str(path), "class": "ct"} for path in sorted(folder.glob("volume_*.nii.gz"))]
    dataset = PatchDataset(entries, RandomPatch(PATCH), Store(folder / "store"))
    before = resident_mb()
    for index in range(patches):
        dataset[(1 + index // len(entries), index % len(entries))]
    queue.put(resident_mb() - before)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def memory_growth(folder: Path, source: Path, patches: int = 500, volumes: int = 50) -> list[float]:
    """MB by which each of two fresh processes grows that draws `patches` patches from `volumes` volumes."""
    store = Store(folder / "store")
    converted = store.convert({"image": str(source)})
    for index in range(volumes):  # links to one volume and its conversion: files of their own, space of one
        link = folder / f"volume_{index:02d}.nii.gz"
        os.link(source, link)
        os.link(converted, store.path({"image": str(link)}))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_grow, args=(folder, patches, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    growth = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    return growth


def main(repeats: int = 5, patches: int = 100, volume: str | None = None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(volume) if volume else folder / "ct.nii.gz"
        if volume is None:
            nib.save(phantom_image(SHAPE, SPACING, seed=1), source)
        entry = [{"image": str(source), "class": "ct"}]
        started = time.perf_counter()
        store = Store(folder / "store")
        converted = store.convert(entry[0])
        conversion = time.perf_counter() - started
        ours = PatchDataset(entry, RandomPatch(PATCH), store)
        growth = [] if volume else memory_growth(folder, source)
        disk = Dataset(entry, stock_transforms())
        cached = CacheDataset(entry, stock_transforms(), cache_rate=1.0, progress=False, num_workers=1)
        torch.manual_seed(0)
        rows = []
        # In turns, so that a machine that slows down slows all three.
        times: dict[str, list[float]] = {"ours": [], "disk": [], "ram": []}
        for index in range(repeats):
            times["ours"] += seconds(lambda i, k=index: ours[(1 + k * patches + i, 0)], patches)
            times["disk"] += seconds(lambda _: disk[0], 2)
            times["ram"] += seconds(lambda _: cached[0], 3)
        mean = {key: sum(values) / len(values) for key, values in times.items()}
        limits = machine_limits()
        shape = " x ".join(map(str, nib.load(source).shape))
        rows = [
            (f"this bundle, {shape}", f"{1e3 * mean['ours']:.1f} ms", f"{1 / mean['ours']:.1f}", "1"),
            ("stock MONAI, deterministic part in RAM", f"{1e3 * mean['ram']:.0f} ms", f"{1 / mean['ram']:.2f}",
             f"{mean['ram'] / mean['ours']:.0f} x"),
            ("stock MONAI, from disk", f"{1e3 * mean['disk']:.0f} ms", f"{1 / mean['disk']:.2f}",
             f"{mean['disk'] / mean['ours']:.0f} x"),
        ]  # fmt: skip
        print_table(("96^3 patches, one core", "a patch (mean)", "patches/s", "slower than ours"), rows)
        print_table(
            ("data path", "figure"),
            [
                ("conversion, once a volume", f"{conversion:.2f} s"),
                ("converted size / .nii.gz", f"{converted.stat().st_size / source.stat().st_size:.2f}"),
                ("growth of two processes, 500 patches of 50 volumes each", ", ".join(f"{g:.0f} MB" for g in growth)),
                ("limit: writing a patch once at memory speed", f"{limits['copy of a patch, ms']:.1f} ms"),
                ("memory copy, one core", f"{limits['copy GB/s']:.1f} GB/s"),
            ],
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patches", type=int, default=100)
    parser.add_argument("--volume", default=None, help="a CT .nii.gz of your own instead of the phantom")
    main(**vars(parser.parse_args()))
