"""The step of a ControlNet: what a plain loop does, both maps in one pass, and a UNet that stays as it is."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.transforms.utils_morphological_ops import dilate
from torch import nn
from torch.nn.utils import parameters_to_vector

from scripts.common.errors import UserError
from scripts.data.datasets import VolumeLoader
from scripts.networks import diffusion_files
from scripts.networks.diffusion_files import CONTROLNET
from scripts.networks.flow import Flow
from scripts.networks.weights import write_tensors
from scripts.training.controlnet import ControlNetTrainer, ControlNetValidation, Unchanged, digest
from scripts.training.region_losses import RegionLosses
from tests.helpers import (
    TINY_CONTROLNET,
    Items,
    controlnet_folders,
    make_labelled,
    same,
    small_controlnet,
    small_unet,
    told_of,
    workflow,
)

RATE, SEED, SCALE = 1e-2, 7, 1.25
EPS = 1e-3  # Adam makes whole steps of gradients far above it; of those that are nothing but rounding, hardly any
WEIGHT, DELTA, SHARE = 5.0, 0.5, 0.5
LOSSES = RegionLosses(labels=(3, 23), weight=WEIGHT, contrast_weight=SHARE, delta=DELTA)
EXACT = TINY_CONTROLNET | {
    "controlnet_train#batch_size": 2, "controlnet_train#lr": RATE, "controlnet_train#weighted_loss_label": [3, 23],
    "controlnet_train#weighted_loss": WEIGHT, "controlnet_train#use_region_contrasive_loss": True,
    "controlnet_train#region_contrasive_loss_delta": DELTA, "controlnet_train#region_contrasive_loss_weight": SHARE,
    "roi_labels": {"23": 1}, "optimizer#eps": EPS, "seed": SEED, "ema_decay": 0.3, "val_interval": 10,
}  # fmt: skip


# Against a plain loop


def label_of(path: str) -> torch.Tensor:
    """The label map (1, 4 X, 4 Y, 4 Z) of a latent, from its file; float, which interpolation takes."""
    return torch.from_numpy(np.asarray(nib.load(path.replace("_emb", "_label")).dataobj, np.float32))[None]


def bits(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels // 2**k % 2 for k in range(8)], 1)


def small(maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    nearest = nn.functional.interpolate(maps.float(), like.shape[2:], mode="nearest")
    return nearest.repeat(1, like.shape[1], 1, 1, 1)


def losses_of(told: Any, without: Any, velocity: Any, labels: Any, other: Any) -> dict[str, torch.Tensor]:
    """NV-Generate-CTMR's formulas."""
    weights = torch.ones_like(velocity)
    for label in (3, 23):
        weights[small(labels, velocity) == label] = WEIGHT
    region = (labels != other).float()
    inside, outside = small(region, velocity), small(1 - dilate(region, 3), velocity)
    first = -((told - without).abs() * inside).sum() / (inside.sum() + 1e-5)
    return {
        "loss": ((told - velocity).abs() * weights).mean(),
        "region_contrast": torch.relu(first + DELTA) - DELTA,
        "region_background": ((without - velocity).abs() * outside).sum() / (outside.sum() + 1e-5),
    }


def drawn(paths: list[str], step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy latents, their velocities and the timesteps."""
    points, targets, times = [], [], []
    for place, path in enumerate(paths):
        latent = SCALE * told_of(path)[0]
        one, other = np.random.SeedSequence([SEED, step + 1, place]).generate_state(2)
        even = np.random.default_rng(int(other)).random()
        ratio = (math.prod(latent.shape[1:]) / 32**3) ** (1 / 3)
        t = ratio * even / (1 + (ratio - 1) * even)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(int(one)))
        points.append((1 - t) * latent + t * noise)
        targets.append(latent - noise)
        times.append(1000 * t)
    return torch.stack(points), torch.stack(targets), torch.tensor(times, dtype=torch.float32)


def plain_loop(network: nn.Module, batches: list[list[str]]) -> tuple[nn.Module, nn.Module, list[dict[str, float]]]:
    """The training written out: the ControlNet, its average, and the losses; `batches` are the files of each step."""
    unet = small_unet().requires_grad_(False)
    network, average = copy.deepcopy(network), copy.deepcopy(network)
    adam, found = torch.optim.AdamW(network.parameters(), RATE, eps=EPS), []
    for step, paths in enumerate(batches):
        points, velocity, times = drawn(paths, step)
        spacing = 100 * torch.tensor([told_of(path)[1] for path in paths])
        modality = torch.tensor([told_of(path)[2] for path in paths])
        labels = torch.stack([label_of(path) for path in paths])
        other, told = torch.where(labels == 23, 1, labels), []
        for maps in (labels, other):
            down, middle = network(points, times, bits(maps), class_labels=modality)
            told.append(unet(
                points, times, spacing_tensor=spacing, class_labels=modality,
                down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle,
            ))  # fmt: skip
        losses = losses_of(*told, velocity, labels, other)
        adam.zero_grad()
        (losses["loss"] + SHARE * (losses["region_contrast"] + losses["region_background"])).backward()
        adam.param_groups[0]["lr"] = RATE * (1 - step / len(batches)) ** 2
        adam.step()
        found.append({name: float(value.detach()) for name, value in losses.items()})
        decay = min(0.3, (2 + step) / (11 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.copy_(decay * slow + (1 - decay) * fast)
    return network, average, found


def take_away(folder: Path, label: int, *numbers: int) -> None:
    """Let label maps of `make_labelled` have 1 where they have a label."""
    for number in numbers:
        path = folder / f"v{number}_label.nii.gz"
        image = nib.load(path)
        data = np.asarray(image.dataobj)
        nib.save(nib.Nifti1Image(np.where(data == label, np.uint8(1), data), image.affine), path)


def test_steps_through_the_config_equal_a_plain_loop(tmp_path: Path) -> None:
    datalist = make_labelled(tmp_path / "l", [(8, 4, 4)] * 4 + [(8, 4, 6)] * 2 + [(8, 4, 4)] * 2)
    take_away(datalist.parent, 23, 4, 5)  # so that a batch has no region
    network = small_controlnet()
    with torch.no_grad():  # so that maps make a difference
        for parameter in (p for name, p in network.named_parameters() if name.startswith("controlnet_")):
            parameter.mul_(3)
    start = diffusion_files.content(network, CONTROLNET, epoch=1, loss=1.0, scale_factor=1.0)
    write_tensors(start, tmp_path / "start.pt")
    given = controlnet_folders(tmp_path, datalist) | {"existing_ckpt_filepath": str(tmp_path / "start.pt")}
    started: Any = workflow("train_controlnet", **EXACT | given)
    trainer, batches, losses, removed = started.trainer, [], [], []
    before, adam = copy.deepcopy(trainer.bare["controlnet"]), trainer.optimizers["optimizer"]
    assert same(before.state_dict(), network.state_dict())
    rates, names = [], ("loss", "region_contrast", "region_background")
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: batches.append(e.state.batch["path"]))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: removed.append(e.state.batch["removed"]))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda _: rates.append(adam.param_groups[0]["lr"]))
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: losses.append({n: float(e.state.output[n]) for n in names})
    )
    started.run()
    assert len(batches) == 6 and sum(pair == ["", ""] for pair in removed) == 2 and ["23", "23"] in removed
    assert rates == pytest.approx([RATE * (1 - k / 6) ** 2 for k in range(6)], rel=1e-12)
    network, average, expected = plain_loop(before, batches)
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert any(one["region_contrast"] == -DELTA for one in losses)
    assert any(-DELTA < one["region_contrast"] < 0 for one in losses)
    for one, other in ((trainer.bare["controlnet"], network), (trainer.results()["controlnet"], average)):
        first, second, start_at = (parameters_to_vector(n.parameters()) for n in (one, other, before))
        assert (first - second).abs().median() < 1e-7 and (first - second).norm() < 1e-3 * (first - start_at).norm()


# One step


class Counted(nn.Module):
    """A network that notes how many samples each of its passes has, in which mode."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.module, self.seen = network, []

    def forward(self, x: torch.Tensor, **given: Any) -> Any:
        self.seen.append((len(x), self.module.training))
        return self.module(x=x, **given)


def make(losses: RegionLosses = LOSSES, rate: float = 1e-3) -> ControlNetTrainer:
    controlnet, unet = Counted(small_controlnet()), Counted(small_unet().train())
    adam = torch.optim.AdamW(controlnet.parameters(), rate)
    return ControlNetTrainer(
        device="cpu", max_epochs=1, train_data_loader=[0], networks={"controlnet": controlnet}, unet=unet,
        losses=losses, optimizers={"optimizer": adam}, scale_factor=2.0, noise_flow=Flow(base=None), amp=False,
        seed=SEED,
    )  # fmt: skip


def batch(count: int = 2, removed: tuple[int, ...] = (23,)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 30, (count, 1, 8, 4, 4), generator=generator).to(torch.uint8)
    labels = labels.repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    other = labels.clone()
    for label in removed:
        other[other == label] = 1
    return {
        "latent": torch.randn(count, 4, 8, 4, 4, generator=generator), "spacing": torch.full((count, 3), 150.0),
        "modality": torch.ones(count).long(), "label": labels, "label_without": other,
        "removed": [", ".join(map(str, removed))] * count, "path": ["v"] * count, "error": [""] * count,
    }  # fmt: skip


def step(trainer: ControlNetTrainer, given: dict[str, Any]) -> dict[str, float]:
    trainer.state.iteration, trainer._norms = 5, {}
    trainer.networks["controlnet"].train()
    return {name: float(value.detach()) for name, value in trainer.step(given).items()}


def test_both_maps_go_through_in_one_pass_and_only_where_they_differ() -> None:
    trainer = make()
    found = step(trainer, batch())
    assert trainer.networks["controlnet"].seen == [(4, True)] and trainer.unet.seen == [(4, False)]
    alone = step(make(), batch() | {"removed": ["", ""], "label_without": batch()["label"]})
    assert alone["loss"] == pytest.approx(found["loss"], rel=1e-5) and alone["region_contrast"] == 0
    for losses, removed in ((LOSSES, ()), (RegionLosses(), (23,))):
        trainer = make(losses)
        found = step(trainer, batch(removed=removed))
        assert trainer.networks["controlnet"].seen == [(2, True)] and trainer.unet.seen == [(2, False)]
        assert ("region_contrast" in found) == (losses is LOSSES)


def test_a_batch_without_a_region_is_the_same_in_one_pass_as_in_two() -> None:
    one, two = make(), make()
    same_maps = batch(removed=())
    found = step(one, same_maps), step(two, same_maps | {"removed": ["23", "23"]})
    assert two.networks["controlnet"].seen == [(4, True)] and found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["region_contrast"] == 0 < found[0]["region_background"]
    first, second, start = (
        parameters_to_vector(n.parameters()) for n in (*(t.bare["controlnet"] for t in (one, two)), small_controlnet())
    )
    assert (first - start).norm() > 0 and (first - second).norm() < 0.02 * (first - start).norm()


def test_the_unet_is_frozen_and_only_the_controlnet_learns() -> None:
    trainer = make()
    step(trainer, batch())
    assert same(trainer.unet.module.state_dict(), small_unet().state_dict())
    assert all(p.grad is None and not p.requires_grad for p in trainer.unet.parameters())
    moved = [n for n, p in trainer.bare["controlnet"].named_parameters() if p.grad is None or not p.grad.any()]
    assert moved == []


def test_quarters_make_up_the_weighted_loss() -> None:
    found = step(make(), batch(8))
    quarters = [name for name in found if name.startswith("loss_quarter_")]
    counts = dict.fromkeys(quarters, 0)
    trainer = make()
    trainer.state.iteration = 5
    for t in trainer.draw(batch(8)["latent"])[1].tolist():
        counts[f"loss_quarter_{int(4 * t) + 1}"] += 1
    assert sum(n * found[name] for name, n in counts.items()) / 8 == pytest.approx(found["loss"], rel=1e-5)


# The UNet stays


def engine(epoch: int) -> Any:
    return SimpleNamespace(state=SimpleNamespace(epoch=epoch, max_epochs=5))


def test_a_unet_that_changes_ends_the_training() -> None:
    unet = small_unet()
    watch = Unchanged(2, unet, "the UNet")
    watch(engine(1))
    next(unet.parameters()).requires_grad_(False).view(-1)[0].add_(1e-6)
    with pytest.raises(UserError, match="^the UNet changed while it should be frozen; the last checkpoint is kept; "):
        watch(engine(1))


def test_it_is_looked_at_after_the_first_epoch_at_intervals_and_at_the_end() -> None:
    filters: list[Any] = []
    target: Any = SimpleNamespace(add_event_handler=lambda event, handler: filters.append(event.filter))
    Unchanged(2, nn.Linear(1, 1), "").attach(target)
    assert [epoch for epoch in range(1, 6) if filters[0](engine(epoch), epoch)] == [1, 2, 4, 5]


def test_a_digest_is_of_all_bytes_and_names() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.load_state_dict(first.state_dict())
    assert digest(first) == digest(second)
    second.bias.data.copy_(-first.bias.data)
    assert digest(first) != digest(second) and digest(nn.Sequential(first)) != digest(first)
    assert digest(nn.BatchNorm1d(1)) != digest(nn.BatchNorm1d(1, track_running_stats=False))


# Validation


def test_the_validation_is_the_weighted_loss_at_fixed_times_written_out() -> None:
    samples, losses = batch(2), []
    items = [{n: v[i] for n, v in samples.items() if isinstance(v, torch.Tensor)} | {"error": ""} for i in range(2)]
    controlnet, unet = small_controlnet(), small_unet()
    for index, one in enumerate(items):
        x, labels = 1.5 * one["latent"][None], one["label"][None].float()
        given = {"class_labels": one["modality"][None]}
        for place, t in enumerate((0.125, 0.375, 0.625, 0.875)):
            seed = int(np.random.SeedSequence([3, index, place]).generate_state(1)[0])
            n = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            point, timesteps = (1 - t) * x + t * n, torch.tensor([1000 * t])
            with torch.no_grad():
                down, middle = controlnet(point, timesteps, bits(labels), **given)
                told = unet(
                    point, timesteps, spacing_tensor=one["spacing"][None], **given,
                    down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle,
                )  # fmt: skip
            losses.append(float(losses_of(told, told, x - n, labels, labels)["loss"]))
    evaluator = ControlNetValidation(
        device="cpu", val_data_loader=VolumeLoader(Items(items)), network=controlnet, unet=unet, losses=LOSSES,  # type: ignore[arg-type]
        scale_factor=1.5, noise_flow=Flow(base=None), draws=4, amp=False, seed=3,
    )  # fmt: skip
    evaluator.run()
    found = evaluator.state.metrics
    assert list(found) == ["loss", *(f"loss_quarter_{q}" for q in range(1, 5))]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    for q in range(1, 5):
        assert found[f"loss_quarter_{q}"] == pytest.approx(np.mean(losses[q - 1 :: 4]), rel=1e-5)
