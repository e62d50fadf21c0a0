"""Whole volumes by windows: the seams they leave, and the memory they take.

python -m tests.benchmarks.windows [--volume FILE] [--weights demo/models/autoencoder.pt] [--network configs/demo.json]
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.bundle import ConfigParser

from scripts.data.datasets import Volumes
from scripts.networks.autoencoder import Reconstructor
from scripts.networks.weights import load_weights
from scripts.networks.windows import VolumeInferer
from scripts.phantom import phantom_image
from tests.benchmarks.table import print_table
from tests.helpers import run


def volume_of(path: str | Path) -> dict[str, Any]:
    return Volumes([{"image": str(path), "class": "ct", "name": "volume"}])[0]


def reconstructor(network: str, weights: str) -> Reconstructor:
    parser = ConfigParser()
    parser.read_config(["configs/inference.json", network] if network else "configs/inference.json")
    found = parser.get_parsed_content("network_def")
    load_weights(found, weights)
    return found.eval()


def seam_step(out: torch.Tensor, whole: torch.Tensor, starts: list[list[int]], window: list[int]) -> float:
    """Mean step between neighbours where windows meet, over that of the reconstruction in one piece: 1 is no seam.

    Windows meet between the last voxel of one alone and the first of the next alone; the worst axis counts.
    """
    ratios = [1.0]
    for axis, (begins, roi) in enumerate(zip(starts, window, strict=True)):
        ours, theirs = (v.diff(dim=axis).abs().transpose(0, axis).flatten(1).mean(1) for v in (out, whole))
        meet = torch.zeros(len(ours), dtype=torch.bool)
        for before, after in zip(begins, begins[1:], strict=False):
            meet[after - 1 : before + roi] = True
        if meet.any():
            ratios.append(float(ours[meet].mean() / theirs[meet].mean()))
    return max(ratios)


@torch.inference_mode()
def seams(volume: dict[str, Any], network: Reconstructor, windows: list[int], overlaps: list[float]) -> None:
    voxels, intensity = volume["voxels"], volume["intensity"]
    original = intensity.normalise(voxels[0, 0])

    def reconstruct(inferer: VolumeInferer) -> torch.Tensor:
        parts = [slab[0, 0] for _, (slab,) in inferer.slabs(voxels, network, intensity.normalise)]
        return torch.cat(parts).clamp(0, 1)

    whole = reconstruct(VolumeInferer(None))
    rows = [("one piece", "", "", "", f"{2000 * float((whole - original).abs().mean()):.2f} HU", "")]
    for window in windows:
        for overlap in overlaps:
            inferer = VolumeInferer([window] * 3, overlap=overlap)
            out = reconstruct(inferer)
            difference = 2000 * (out - whole).abs()
            mae = 2000 * float((out - original).abs().mean())
            size = voxels.shape[2:]
            step = seam_step(out, whole, inferer.starts(size), inferer.window(size))
            tail = float(difference.flatten()[:: max(difference.numel() // 2**23, 1)].quantile(0.999))
            figures = (f"{float(difference.mean()):.2f} HU", f"{tail:.0f} HU", f"{mae:.2f} HU", f"{step:.3f}")
            rows.append((f"{window}^3", f"{overlap:g}", *figures))
    head = ("windows", "overlap", "mean difference to one piece", "99.9 %", "MAE to the original", "step at seams")
    print_table(head, rows)


def _peak(queue: multiprocessing.Queue, options: dict[str, Any]) -> None:
    run("inference", **options)
    status = Path("/proc/self/status").read_text()  # getrusage would tell the peak of whoever started this process
    queue.put(int(status.partition("VmHWM:")[2].split()[0]) / 2**10)


def peak(size: int, weights: str, window: int) -> float:
    """MiB that a reconstruction of a phantom of size^3 takes, with the interpreter and the libraries."""
    with tempfile.TemporaryDirectory() as folder:
        nib.save(phantom_image((size,) * 3, (384 / size,) * 3), f"{folder}/v.nii.gz")
        options: dict[str, Any] = {"dataset_dir": f"{folder}/v.nii.gz", "output_dir": f"{folder}/out"}
        options |= {"trained_autoencoder_path": weights, "val_sliding_window_patch_size": [window] * 3}
        options |= {"autoencoder_def#num_channels": [32, 32, 64], "autoencoder_def#norm_num_groups": 16}
        options |= {"autoencoder_def#num_res_blocks": [1, 1, 1]}
        queue = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=_peak, args=(queue, options))
        process.start()
        result = queue.get()
        process.join()
        return result


def main(volume: str | None, weights: str, network: str, windows: list[int], overlaps: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if volume is None:
            volume = f"{folder}/v.nii.gz"
            nib.save(phantom_image((160, 160, 160), (2.4, 2.4, 2.4), seed=1000), volume)
        seams(volume_of(volume), reconstructor(network, weights), windows, overlaps)
    peaks = {size: peak(size, weights, 64) for size in (128, 192)}
    rows = [(f"{size}^3", f"{value:.0f} MiB", f"{value / peaks[128]:.2f}") for size, value in peaks.items()]
    print_table(("volume, windows of 64^3", "peak memory", "of 128^3"), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volume")
    parser.add_argument("--weights", default="demo/models/autoencoder.pt")
    parser.add_argument("--network", default="configs/demo.json")
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--overlaps", type=float, nargs="+", default=[0.0, 0.25])
    main(**vars(parser.parse_args()))
