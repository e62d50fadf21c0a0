"""Latent diffusion: this bundle's training loop, and its reading of latents, against NV-Generate-CTMR's, on a CPU.

    python -m tests.benchmarks.diffusion [--reference PATH] [--repeats 6]

PATH is a checkout of NV-Generate-CTMR, whose own `prepare_data` and `train_one_epoch` run, as they are, in float32
without autocast. Without it, a loop of stock MONAI parts stands in for them; the tables say which one ran. Ours is
configs/train_diffusion.json with all its handlers and the average of the weights. All have the same latents and begin
at the same weights. They take turns by epochs, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.util
import io
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from monai.data import DataLoader, Dataset
from monai.networks.schedulers import RFlowScheduler
from monai.transforms import Compose, EnsureChannelFirstd, EnsureTyped, Lambdad, LoadImaged

from scripts.common.errors import UserError
from scripts.data.latent_list import load_latents
from scripts.data.latents import LatentDataset, LatentStore
from tests.benchmarks.table import median, print_table

STAND_IN = "stock MONAI parts"
MAPPING = json.loads(Path("configs/modality_mapping.json").read_text())
NETWORK = {"num_channels": [32, 64, 128], "attention_levels": [False, False, True], "num_head_channels": [0, 0, 32]}
SHAPE, BATCH, LR = (16, 16, 16), 2, 1e-4
LOADED = ((64, 64, 32), (128, 128, 128))  # latents of 256 x 256 x 128 and 512 x 512 x 512 voxels


def write_latents(folder: Path, shape: Sequence[int], count: int) -> list[str]:
    """Normal noise as latents of that shape, 4 channels, laid out as by configs/encode.json; their paths."""
    generator, paths = np.random.default_rng(0), []
    folder.mkdir()
    for number in range(count):
        data = generator.standard_normal((*shape, 4), dtype=np.float32)
        path = folder / f"v{number:02d}_emb.nii.gz"
        nib.save(nib.Nifti1Image(data, np.diag([1.5, 1.5, 2.0, 1.0])), path)
        # A tenth of the variance is the posterior's noise, so that the store takes float16.
        sums = {"count": data.size, "noise": 0.1 * data.size}
        facts = {"dim": [4 * n for n in shape], "spacing": [1.5, 1.5, 2.0], "modality": "ct", "latent_sums": sums}
        Path(f"{path}.json").write_text(json.dumps(facts))
        paths.append(str(path))
    training = [{"image": Path(path).name.replace("_emb", "")} for path in paths]
    (folder / "datalist.json").write_text(json.dumps({"training": training}))
    return paths


class Reference:
    """NV-Generate-CTMR's functions for data and training, from its scripts/diff_model_train.py."""

    def __init__(self, checkout: str) -> None:
        root = Path(checkout, "scripts")
        if not (root / "diff_model_train.py").is_file():
            raise UserError(f"{root}/diff_model_train.py: no such file; give a checkout of NV-Generate-CTMR")
        # Its package is called `scripts` too, so it is imported by another name.
        spec = importlib.util.spec_from_file_location(
            "nv_generate", root / "__init__.py", submodule_search_locations=[str(root)]
        )
        assert spec is not None
        sys.modules["nv_generate"] = importlib.util.module_from_spec(spec)
        self.module = importlib.import_module("nv_generate.diff_model_train")

    def loader(self, files: list[dict[str, str]]) -> Any:
        return self.module.prepare_data(files, torch.device("cpu"), 0, batch_size=BATCH, modality_mapping=MAPPING)

    def train_epoch(
        self, loader: Any, unet: Any, optimizer: Any, schedule: Any, noise_scheduler: Any, scale_factor: torch.Tensor
    ) -> None:
        self.module.train_one_epoch(
            epoch=0, unet=unet, train_loader=loader, optimizer=optimizer, lr_scheduler=schedule,
            loss_pt=torch.nn.L1Loss(), scaler=None, scale_factor=scale_factor, noise_scheduler=noise_scheduler,
            num_images_per_batch=BATCH, num_train_timesteps=noise_scheduler.num_train_timesteps,
            device=torch.device("cpu"), logger=logging.getLogger("nv_generate"), local_rank=0, amp=False,
        )  # fmt: skip


class StandIn:
    """The same of stock MONAI parts, for where there is no checkout."""

    def loader(self, files: list[dict[str, str]]) -> Any:
        transforms = Compose(
            [
                LoadImaged("image"),
                EnsureChannelFirstd("image"),
                Lambdad("spacing", lambda path: 100 * torch.tensor(json.loads(Path(path).read_text())["spacing"])),
                Lambdad("modality", lambda path: MAPPING[json.loads(Path(path).read_text())["modality"]]),
                EnsureTyped("modality", dtype=torch.long),
            ]
        )
        return DataLoader(Dataset(files, transforms), num_workers=6, batch_size=BATCH, shuffle=True)

    def train_epoch(
        self, loader: Any, unet: Any, optimizer: Any, schedule: Any, noise_scheduler: Any, scale_factor: torch.Tensor
    ) -> None:
        unet.train()
        total = 0.0
        for batch in loader:
            optimizer.zero_grad(set_to_none=True)
            latents = batch["image"] * scale_factor
            noise, timesteps = torch.randn_like(latents), noise_scheduler.sample_timesteps(latents)
            told = unet(
                x=noise_scheduler.add_noise(latents, noise, timesteps),
                timesteps=timesteps,
                spacing_tensor=batch["spacing"],
                class_labels=batch["modality"],
            )
            loss = torch.nn.functional.l1_loss(told, latents - noise)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()


def reference_files(paths: Sequence[str]) -> list[dict[str, str]]:
    """Latents as NV-Generate-CTMR lists them: what is told of each is read from its side file."""
    return [{"image": path, "spacing": f"{path}.json", "modality": f"{path}.json"} for path in paths]


class Marks:
    """When each step of an optimizer ended."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.times: list[float] = []
        optimizer.register_step_post_hook(lambda *_: self.times.append(time.perf_counter()))

    def seconds_a_step(self, epoch: Callable[[], None]) -> float:
        """Mean over an epoch's steps but its first, which waits for the workers to start."""
        self.times.clear()
        epoch()
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class TheirLoop:
    """Epochs of the reference, or of what stands in for it."""

    def __init__(
        self, functions: Reference | StandIn, paths: Sequence[str], unet: Any, scale_factor: float, epochs: int
    ) -> None:
        settings = json.loads(Path("configs/train_diffusion.json").read_text())["noise_scheduler"]
        del settings["_target_"]
        self.functions, self.loader, self.unet = functions, functions.loader(reference_files(paths)), unet
        self.optimizer = torch.optim.Adam(unet.parameters(), LR)
        steps = epochs * len(self.loader)
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=steps, power=2.0)
        self.noise_scheduler, self.scale_factor = RFlowScheduler(**settings), torch.tensor(scale_factor)
        self.marks = Marks(self.optimizer)

    def epoch(self) -> None:
        self.functions.train_epoch(
            self.loader, self.unet, self.optimizer, self.schedule, self.noise_scheduler, self.scale_factor
        )


class OurLoop:
    """Epochs of configs/train_diffusion.json, as configured but for the network's size and `amp`."""

    def __init__(self, latents: Path, folder: Path, amp: bool, epochs: int) -> None:
        overrides: dict[str, Any] = {
            "embedding_base_dir": str(latents), "store_dir": str(folder / "store"), "model_dir": str(folder / "models"),
            "output_dir": str(folder / "outputs"), "amp": amp, "sample_interval": 0,
            "diffusion_unet_train#batch_size": BATCH, "diffusion_unet_train#lr": LR,
            "diffusion_unet_train#n_epochs": epochs, "diffusion_unet_def#num_res_blocks": 1,
        }  # fmt: skip
        overrides |= {f"diffusion_unet_def#{key}": value for key, value in NETWORK.items()}
        workflow = ConfigWorkflow(
            "configs/train_diffusion.json", workflow_type="train", logging_file=False, **overrides
        )
        with contextlib.redirect_stdout(io.StringIO()):
            workflow.initialize()
        self.trainer: Any = workflow.trainer
        self.trainer.state.max_epochs = 0
        self.marks = Marks(self.trainer.optimizers["optimizer"])

    def epoch(self) -> None:
        self.trainer.state.max_epochs += 1
        self.trainer.run()


def paired(values: Mapping[str, Sequence[float]], base: str, name: str) -> list[str]:
    """The median of `base` over `name`, turn by turn, and its quartiles."""
    ratios = [b / v for b, v in zip(values[base], values[name], strict=True)]
    low, _, high = statistics.quantiles(ratios, method="inclusive")
    return [f"{median(ratios):.2f}", f"{low:.2f} to {high:.2f}"]


def step_table(functions: Reference | StandIn, label: str, repeats: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, epochs = Path(name), repeats + 1
        paths = write_latents(folder / "latents", SHAPE, count)
        single, mixed = (OurLoop(folder / "latents", folder / f"amp_{amp}", amp, epochs) for amp in (False, True))
        unet = single.trainer.bare["unet"]
        mixed.trainer.bare["unet"].load_state_dict(unet.state_dict())
        theirs = TheirLoop(functions, paths, copy.deepcopy(unet), single.trainer.scale_factor, epochs)
        loops = {f"{label}, float32": theirs, "this bundle, float32": single, "this bundle, amp": mixed}
        times: dict[str, list[float]] = {key: [] for key in loops}
        for turn in range(epochs):
            for key, loop in loops.items():
                seconds = loop.marks.seconds_a_step(loop.epoch)
                if turn:  # the first epoch warms up
                    times[key].append(seconds)
    base = next(iter(times))
    rows = [(key, f"{1 / median(value):.2f}", *paired(times, base, key)) for key, value in times.items()]
    size = f"{BATCH} latents of 4 x {' x '.join(map(str, SHAPE))}, UNet {NETWORK['num_channels']}"
    print_table((f"training step, {size}", "steps/s", f"of {label}", "quartiles"), rows)


def load_table(functions: Reference | StandIn, label: str, repeats: int) -> None:
    rows = []
    for shape in LOADED:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = write_latents(folder / "latents", shape, 1)
            entries = load_latents(str(folder / "latents/datalist.json"), "training", modality_mapping=MAPPING)
            store = LatentStore(folder / "store")
            theirs = functions.loader(reference_files(paths)).dataset
            samples = {"ours": LatentDataset(entries, store), "theirs": theirs}
            times: dict[str, list[float]] = {key: [] for key in samples}
            for turn in range(repeats + 1):
                for key, dataset in samples.items():
                    started = time.perf_counter()
                    dataset[0]
                    if turn:  # the first one of ours converts
                        times[key].append(1e3 * (time.perf_counter() - started))
            sizes = [Path(path).stat().st_size for path in (store.path(entries[0]), paths[0])]
        milliseconds = [f"{median(times[key]):.1f} ms" for key in ("theirs", "ours")]
        kept = f"{sizes[0] / sizes[1]:.2f}"
        rows.append((f"4 x {' x '.join(map(str, shape))}", *milliseconds, *paired(times, "theirs", "ours"), kept))
    head = ("one latent, one process", label, "this bundle", "times as quick", "quartiles", "on disk, of .nii.gz")
    print_table(head, rows)


def main(reference: str | None, repeats: int, count: int) -> None:
    logging.disable(logging.WARNING)  # each step of theirs is logged
    functions = Reference(reference) if reference else StandIn()
    label = "NV-Generate-CTMR" if reference else STAND_IN
    step_table(functions, label, repeats, count)
    load_table(functions, label, 2 * repeats)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default=None, help="a checkout of NV-Generate-CTMR")
    parser.add_argument("--repeats", type=int, default=6, help="turns that are measured, 2 at the least")
    parser.add_argument("--count", type=int, default=16, help="latents, two a step")
    main(**vars(parser.parse_args()))
