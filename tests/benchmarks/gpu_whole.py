"""Whole runs on a GPU: a training with its data, a validation, an inference, and whether a CPU finds the same."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from scripts.common.precision import autocast
from scripts.data.nifti import save_nifti
from scripts.phantom import make_phantom
from tests.benchmarks import card
from tests.benchmarks.gpu_steps import TINY
from tests.benchmarks.step import timed
from tests.helpers import folders, scalars, workflow

VOLUMES, EPOCHS = 64, 3  # the last epoch counts: in the first one workers start and cuDNN chooses
FIELD = 384.0  # mm that a phantom is wide
HU = 2000  # of what is 1 for a network
MODES = {"float32 without TF32": (torch.float32, False), "float32 with TF32": (torch.float32, True),
         "bfloat16": (torch.bfloat16, True)}  # fmt: skip


def write_volume(path: Path, shape: Sequence[int]) -> Path:
    """A phantom of `shape`, which is even; it is drawn at half the size, since large ones take a minute."""
    half = make_phantom([n // 2 for n in shape], [2 * FIELD / n for n in shape])
    for axis in range(3):
        half = half.repeat(2, axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(nib.Nifti1Image(half, np.diag([*(FIELD / n for n in shape), 1.0])), path)
    return path


def _listed(path: Path, training: Sequence[Path], validation: Sequence[Path]) -> Path:
    splits = {"training": training, "validation": validation}
    path.write_text(json.dumps({name: [{"image": str(p)} for p in paths] for name, paths in splits.items()}))
    return path


def _options(device: str, small: bool) -> dict[str, Any]:
    """Of configs/train.json; where `small`, those of a dry run."""
    options: dict[str, Any] = {"device": device, "perceptual_pretrained": False, "discriminator_start": 0}
    sizes = ("patch_size", "val_sliding_window_patch_size")
    dry = {"num_workers": 0, **TINY, **{f"autoencoder_train#{size}": [32, 32, 32] for size in sizes}}
    return options | (dry if small else {})


def training(folder: Path, shape: Sequence[int], device: str, small: bool) -> dict[str, float]:
    """Patches a second of configs/train.json on phantoms, and the share of the time that it waits for them."""
    first, count = folder / "phantoms" / "v00.nii.gz", 4 if small else VOLUMES
    write_volume(first, shape)
    volumes = [first.with_name(f"v{number:02d}.nii.gz") for number in range(count)]
    for volume in volumes[1:]:
        os.link(first, volume)  # a file of its own for the store
    options = {"autoencoder_train#val_patch_size": [32 if small else 96] * 3, "autoencoder_train#n_epochs": EPOCHS}
    datalist = _listed(folder / "training.json", volumes[1:], volumes[:1])
    started = workflow("train", **options, **_options(device, small), **folders(folder / "training", datalist))
    started.run()
    started.finalize()
    log = scalars(folder / "training/outputs/tfevent_ct/autoencoder")
    last = {name: log.Scalars(f"train_epoch/{name}")[-1].value for name in ("patches_per_second", "data_wait_share")}
    return {"size": started.parser["autoencoder_train"]["patch_size"][0], "patches": len(volumes) - 1, **last}


class Watched:
    """An inferer that notes how many windows it took, for how long, and which share of that the GPU was idle."""

    def __init__(self, inferer: Any, device: str) -> None:
        self.inferer, self.device = inferer, device
        self.profiled = False
        self.windows, self.seconds, self.idle = 0, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inferer, name)

    def slabs(self, inputs: torch.Tensor, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if self.profiled:
            with card.watched(self.device) as found:
                yield from self.inferer.slabs(inputs, *args, **kwargs)
            self.idle = found["idle"]
            return
        started = time.perf_counter()
        yield from self.inferer.slabs(inputs, *args, **kwargs)
        self.windows, self.seconds = self.inferer.count(inputs.shape[2:]), time.perf_counter() - started


def _watch(evaluator: Any, function: Callable[[torch.Tensor], Any], device: str) -> dict[str, float]:
    """What `Watched` says of a run over one volume, and how many seconds the whole of it took.

    The GPU is watched in a second run, so that watching takes no time from the first.
    """
    evaluator.inferer = watched = Watched(evaluator.inferer, device)
    window = torch.zeros(1, 1, *(watched.roi_size or (32, 32, 32)), device=device)
    with torch.inference_mode(), autocast(device, evaluator.dtype):
        function(window)  # cuDNN chooses
    seconds = timed(evaluator.run, device)
    watched.profiled = True
    evaluator.run()
    rate = watched.windows / watched.seconds
    return {"windows": watched.windows, "windows_per_second": rate, "idle_share": watched.idle, "seconds": seconds}


def _large(folder: Path, shape: Sequence[int]) -> Path:
    path = folder / "large.nii.gz"
    return path if path.exists() else write_volume(path, shape)


def validation(folder: Path, shape: Sequence[int], device: str, small: bool) -> dict[str, float]:
    """A validation of one volume as in configs/train.json."""
    volume = _large(folder, shape)
    datalist = _listed(folder / "validation.json", [volume], [volume])
    started: Any = workflow("train", **_options(device, small), **folders(folder / "validation", datalist))
    evaluator = started.parser.get_parsed_content("validate#evaluator")
    return _watch(evaluator, evaluator.network.reconstruct, device)


def _use(folder: Path, device: str, small: bool, **options: Any) -> Any:
    """configs/inference.json with the weights that `training` made."""
    network = {key: value for key, value in TINY.items() if key.startswith("autoencoder_def")}
    dry = network | {"val_sliding_window_patch_size": [32, 32, 32]} if small else {}
    weights = str(folder / "training/models/autoencoder.pt")
    return workflow("inference", device=device, trained_autoencoder_path=weights, **dry, **options)


def inference(folder: Path, shape: Sequence[int], device: str, small: bool) -> dict[str, float]:
    """The reconstruction of one volume as in configs/inference.json: read, computed and written."""
    volume = str(_large(folder, shape))
    started = _use(folder, device, small, dataset_dir=volume, output_dir=str(folder / "reconstruction"))
    evaluator = started.parser.get_parsed_content("evaluator")
    return _watch(evaluator, evaluator.network, device)


def agreement(folder: Path, shape: Sequence[int], device: str, small: bool) -> dict[str, Any]:
    """How far a reconstruction on `device`, in one window, is from the CPU's in float32, in HU, by mode."""
    network = _use(folder, "cpu", small, output_dir=str(folder)).parser.get_parsed_content("network").eval()
    voxels = torch.from_numpy(make_phantom(shape, [FIELD / n for n in shape])).float()[None, None]
    image, found = ((voxels + 1000) / HU).clamp(0, 1), {}
    with torch.inference_mode():
        started = time.perf_counter()
        expected = network(image)
        cpu = time.perf_counter() - started
        network, image = network.to(device), image.to(device)
        for mode, (dtype, tf32) in MODES.items():
            torch.backends.cudnn.allow_tf32 = tf32
            with autocast(device, dtype):
                away = HU * (network(image).float().cpu() - expected).abs()
                seconds = timed(lambda: network(image), device)
            found[mode] = {"mean": float(away.mean()), "most": float(away.max()), "seconds": seconds}
    return {"cpu_seconds": cpu, **found}
