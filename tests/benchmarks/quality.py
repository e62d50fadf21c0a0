"""What a recipe reaches at a given cost: named variants, trained from the same start, measured on held-out volumes.

    python -m tests.benchmarks.quality --datalist FILE [--steps 600 | --seconds 600] [--seeds 2] [--threads 2]
        [--variants default reference ...] [--output results.json]

A variant is a layer over configs/train.json; `stock` is the reference's own loop on its own data path. With `--seconds`
each variant trains for as many steps as take that long here, timed before. The `validation` volumes of the datalist are
measured; differences from the first variant are paired over volumes and seeds. LPIPS needs its weights (`--lpips`, a
folder); without, untrained features train all variants.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser, ConfigWorkflow
from torch import nn

from scripts.common.precision import amp_dtype, autocast
from scripts.data.datalist import load_split
from scripts.data.datasets import Volumes
from scripts.measure.latents import LatentHealth
from scripts.measure.metrics import reconstruction_metrics, tissue_errors
from scripts.networks.lpips import PerceptualLoss
from scripts.networks.windows import VolumeInferer, joined
from scripts.training.vae import LEAD
from tests.benchmarks.data import stock_transforms
from tests.benchmarks.step import StockLoop
from tests.benchmarks.table import print_table

REFERENCE = json.loads(Path("configs/reference_recipe.json").read_text())
NOISE = (0.1, 0.2, 0.3)  # of the latents' standard deviation
TIMED = 12  # steps, after as many that warm up
SHOWN = {"psnr": ".2f", "ssim": ".3f", "lpips": ".3f", "mae_hu": ".1f"}


def variants(patch: int) -> dict[str, dict[str, Any]]:
    """By their names, for patches of that size; those of a curriculum begin at two thirds of it, and at 32 at least."""
    small = max(patch * 2 // 3 // 4 * 4, 32)
    curriculum, finish = {"patch_curriculum": [[0.5, [small] * 3]]}, {"decoder_finish": 0.15}
    return {
        "default": {},
        "reference": REFERENCE,
        "no decay": {"lr_decay": 0},
        "no average": {"ema_decay": 0},
        "discriminator from the start": {"discriminator_start": 0},
        "no discriminator": {"discriminator_start": 1},
        "no scale equivariance": {"scale_equivariance": 0},
        "curriculum": curriculum,
        "finish": finish,
        "both": curriculum | finish,
    }


def options(arguments: argparse.Namespace, folder: Path, seed: int, epochs: int) -> dict[str, Any]:
    """What all variants have in common, as overrides of configs/train.json."""
    lpips = arguments.lpips
    return {
        "json_data_list": arguments.datalist, "dataset_dir": str(Path(arguments.datalist).parent),
        "store_dir": arguments.store, "model_dir": str(folder / "models"), "output_dir": str(folder / "outputs"),
        "autoencoder_def#num_channels": arguments.channels, "autoencoder_def#norm_num_groups": arguments.groups,
        "autoencoder_def#num_res_blocks": [1] * len(arguments.channels),
        "autoencoder_train#patch_size": [arguments.patch] * 3, "autoencoder_train#val_patch_size": [32, 32, 32],
        "autoencoder_train#val_sliding_window_patch_size": [arguments.patch] * 3,
        "autoencoder_train#lr": arguments.lr, "autoencoder_train#n_epochs": epochs,
        "autoencoder_train#val_interval": 10**6, "warmup_epochs": [], "warmup_factors": [], "num_workers": 0,
        "seed": seed, "perceptual_pretrained": lpips is not None,
        "perceptual_backbone_path": f"{lpips}/squeezenet1_1-b8a52dc0.pth",
        "perceptual_linear_path": f"{lpips}/lpips_squeeze_v0.1.pth",
    }  # fmt: skip


class Ours:
    """A training through configs/train.json."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, seed: int, epochs: int, variant: Mapping) -> None:
        overrides = options(arguments, folder, seed, epochs) | variant
        self.workflow = ConfigWorkflow("configs/train.json", workflow_type="train", logging_file=False, **overrides)
        with contextlib.redirect_stdout(io.StringIO()):
            self.workflow.initialize()
        self.trainer: Any = self.workflow.trainer

    def run(self) -> int:
        self.trainer.run()
        return self.trainer.state.iteration

    def network(self) -> Any:
        return self.trainer.results()["autoencoder"].eval()


class Stock:
    """The reference's loop, network and data path, until its time or its steps are over."""

    def __init__(self, arguments: argparse.Namespace, entries: Sequence[Mapping[str, str]], seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:  # the same start
            ours = Ours(arguments, Path(folder), seed, 1, REFERENCE).trainer
        stock, self.fast = stock_network(arguments), ours.bare["autoencoder"]
        stock.load_state_dict(self.fast.state_dict())
        parts = stock, ours.bare["discriminator"], ours.generator_loss.perceptual
        # In float32: its autocast is CUDA's, and with bfloat16 a CPU's gradients of its discriminator are garbage.
        self.loop, self.entries = StockLoop("cpu", False, parts, arguments.lr), entries
        self.transforms = stock_transforms((arguments.patch,) * 3).set_random_state(seed)

    def run(self, over: Callable[[int], bool]) -> int:
        step = 0
        while not over(step):
            image = self.transforms({"image": self.entries[step % len(self.entries)]["image"]})["image"]
            self.loop.step(torch.as_tensor(image)[None].float())
            step += 1
        return step

    def network(self) -> Any:
        self.fast.load_state_dict(self.loop.autoencoder.state_dict())
        return self.fast.eval()


def stock_network(arguments: argparse.Namespace) -> Any:
    """MONAI's network, as the reference's notebook sets it."""
    config = json.loads(Path("configs/train.json").read_text())
    definition = {key: config[key] for key in ("spatial_dims", "image_channels", "latent_channels", "autoencoder_def")}
    changes = {"num_channels": arguments.channels, "norm_num_groups": arguments.groups, "save_mem": True}
    definition["autoencoder_def"] |= changes | {"num_res_blocks": [1] * len(arguments.channels)}
    return ConfigParser(definition).get_parsed_content("autoencoder_def")


def measured(network: nn.Module, volume: Mapping[str, Any], window: int, lpips: Any) -> dict[str, float]:
    """Quality and latent health of one volume."""
    inferer = VolumeInferer([window] * 3, factor=4, overlap=0, sw_device="cpu")
    intensity = volume["intensity"]
    slabs = inferer.slabs(volume["voxels"], network.reconstruct, intensity.normalise)  # type: ignore[arg-type]
    whole, mu, sigma = joined(slabs)
    original, result = intensity.normalise(volume["voxels"])[0, 0], whole[0, 0].clamp(0, 1)
    found: dict[str, Any] = dict(reconstruction_metrics(result, original, intensity.range))
    found["lpips"] = lpips.lpips(result, original) if lpips is not None else math.nan
    found |= {k: v for k, v in tissue_errors(result, original, intensity.window).items() if k.startswith("mae")}
    latents = LatentHealth()
    latents.update(mu, sigma)
    found |= latents.compute()
    box = tuple(slice(0, min(n, 96) // 8 * 8) for n in original.shape)
    return found | latent_robustness(network, original[box][None, None])


def latent_robustness(network: nn.Module, image: torch.Tensor) -> dict[str, float]:
    """PSNR lost by noise on the latents, and how well half-size latents decode to the half-size image (dB)."""
    mu, _ = network.encode(image)  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(mu.shape, generator=generator) * mu.std()
    decode: Callable[[torch.Tensor], torch.Tensor] = network.decode  # type: ignore[assignment]
    clean = _psnr(decode(mu), image)
    lost = {f"psnr_lost_{share}": clean - _psnr(decode(mu + share * noise), image) for share in NOISE}
    half = _psnr(decode(F.avg_pool3d(mu, 2)), F.avg_pool3d(image, 2))
    power = torch.fft.rfftn(mu[0] - mu[0].mean((1, 2, 3), keepdim=True), dim=(1, 2, 3)).abs().square()
    axes = [torch.fft.fftfreq(n).abs() for n in mu.shape[2:4]] + [torch.fft.rfftfreq(mu.shape[4])]
    high = torch.stack(torch.meshgrid(*axes, indexing="ij")).amax(0) > 0.25
    return lost | {"half_scale_psnr": half, "power_above_half_nyquist": float(power[:, high].sum() / power.sum())}


def _psnr(reconstruction: torch.Tensor, target: torch.Tensor) -> float:
    return -10 * math.log10(float(F.mse_loss(reconstruction.float().clamp(0, 1), target)))


def train(name: str, arguments: argparse.Namespace, entries: Sequence[Mapping[str, str]], seed: int) -> Any:
    """A trained network of the variant, its steps and its seconds."""
    if name == "stock":
        stock, started = Stock(arguments, entries, seed), time.perf_counter()
        over = {True: lambda step: time.perf_counter() - started >= arguments.seconds,
                False: lambda step: step >= arguments.steps}[arguments.seconds is not None]  # fmt: skip
        return stock.network, stock.run(over), time.perf_counter() - started
    steps, variant = arguments.steps, variants(arguments.patch)[name]
    if arguments.seconds is not None:
        steps = int(arguments.seconds / seconds_a_step(arguments, variant))
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(arguments, Path(folder), seed, max(round(steps / len(entries)), 1), variant)
        started = time.perf_counter()
        done = ours.run()
        return ours.network, done, time.perf_counter() - started


def seconds_a_step(arguments: argparse.Namespace, variant: Mapping[str, Any]) -> float:
    """Of the whole training: steps of each of its phases are timed, and count by the phase's length."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Ours(arguments, Path(folder), 0, 10**6, variant).trainer
        start, stages = trainer.discriminator_start, trainer.patch_sizes.stages
        ends = {start - LEAD, start, 1 - trainer.decoder_finish, 1.0, *(until for until, _ in stages)}
        bounds = [0.0, *sorted(end for end in ends if end > 0)]
        return sum((end - begin) * timed(trainer, (begin + end) / 2) for begin, end in itertools.pairwise(bounds))


def timed(trainer: Any, share: float) -> float:
    """Seconds of a step when that share of the training is done."""
    state = trainer.state
    state.epoch = int(share * state.max_epochs) + 1
    state.iteration = (state.epoch - 1) * state.epoch_length
    trainer.data_loader.sampler.set_epoch(state.epoch)
    loader = iter(trainer.data_loader)
    for step in range(2 * TIMED):
        if step == TIMED:
            begun = time.perf_counter()
        state.iteration += 1
        batch = next(loader, None) or next(loader := iter(trainer.data_loader))
        trainer._iteration(trainer, batch)
    return (time.perf_counter() - begun) / TIMED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datalist", required=True)
    parser.add_argument("--store", default="data/store")
    parser.add_argument("--lpips", default=None, help="folder of the two weights files")
    parser.add_argument("--variants", nargs="+", default=["default", "reference"], choices=["stock", *variants(32)])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 32, 64])
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--output", default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    entries = load_split(arguments.datalist, "training")
    held = Volumes(load_split(arguments.datalist, "validation"))
    lpips = None
    if arguments.lpips:
        paths = (f"{arguments.lpips}/squeezenet1_1-b8a52dc0.pth", f"{arguments.lpips}/lpips_squeeze_v0.1.pth")
        lpips = PerceptualLoss(backbone_path=paths[0], linear_path=paths[1])
    results: dict[str, Any] = {}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in arguments.variants:
            get, steps, took = train(name, arguments, entries, seed)
            with torch.inference_mode(), autocast("cpu", amp_dtype("cpu", True)):
                network = get()
                cases = [measured(network, held[i], arguments.patch, lpips) for i in range(len(held))]
            results.setdefault(name, []).append({"seed": seed, "steps": steps, "seconds": took, "cases": cases})
            print(
                f"{name}, seed {seed}: {steps} steps in {took:.0f} s, {fmean(c['psnr'] for c in cases):.2f} dB",
                flush=True,
            )
            if arguments.output:
                Path(arguments.output).write_text(
                    json.dumps({"arguments": vars(arguments), "results": results}, indent=1)
                )
    report(results)


def report(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Means over volumes and seeds, and what each variant differs by from the first, paired."""
    cases = {name: [case for run in runs for case in run["cases"]] for name, runs in results.items()}
    first = next(iter(cases))
    rows = []
    for name, own in cases.items():
        row = [
            name,
            f"{fmean(r['steps'] for r in results[name]):.0f}",
            f"{fmean(r['seconds'] for r in results[name]):.0f}",
        ]
        row += [f"{fmean(c[key] for c in own):{style}}" for key, style in SHOWN.items()]
        differences = [a["psnr"] - b["psnr"] for a, b in zip(own, cases[first], strict=True)]
        rows.append([*row, f"{fmean(differences):+.2f}"])
    print_table(["variant", "steps", "s", "PSNR, dB", "SSIM", "LPIPS", "MAE, HU", f"dB against {first}"], rows)
    names = [key for key in cases[first][0] if key not in SHOWN and key != "rmse_hu"]
    table = []
    for key in names:
        means = [[c[key] for c in own if c[key] is not None] for own in cases.values()]
        table.append([key, *(f"{fmean(values):.3f}" if values else "–" for values in means)])
    print_table(["mean", *cases], table)


if __name__ == "__main__":
    main()
