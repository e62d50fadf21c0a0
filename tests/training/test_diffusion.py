"""The step of latent diffusion: what a plain loop does, and losses by quarter that are means over all ranks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch.nn.utils import parameters_to_vector

from scripts.networks.flow import Flow
from scripts.training import diffusion
from scripts.training.diffusion import DiffusionTrainer, conditions, quarter
from tests.helpers import TINY_DIFFUSION, diffusion_folders, make_latents, small_unet, told_of, workflow

RATE, SEED = 1e-2, 7
EPS = 1e-3  # Adam makes whole steps of gradients far above it; of those that are nothing but rounding, hardly any
EXACT = TINY_DIFFUSION | {
    "diffusion_unet_train#lr": RATE, "optimizer#eps": EPS, "seed": SEED, "label_dropout": 0.4, "ema_decay": 0.3,
    "val_interval": 10,
}  # fmt: skip


def less_exact(number: int, draws: np.ndarray) -> int:
    if 2 <= number <= 7 and draws[0] < 0.4:
        number = 1
    if number >= 9 and draws[1] < 0.4:
        number = 8
    return 0 if draws[2] <= 0.4 else number


def plain_loop(trainer: Any, batches: list[list[str]]) -> tuple[torch.nn.Module, torch.nn.Module, list[float]]:
    """The training written out: the UNet, its average, and the losses; `batches` are the files of each step."""
    unet, average = copy.deepcopy(trainer.bare["unet"]), copy.deepcopy(trainer.bare["unet"])
    adam, losses = torch.optim.Adam(unet.parameters(), RATE, eps=EPS), []
    everything = torch.cat([told_of(path)[0].flatten() for path in sorted({p for b in batches for p in b})])
    scale = 1 / everything.std(correction=0)
    for step, paths in enumerate(batches):
        points, targets, times, modalities = [], [], [], []
        for place, path in enumerate(paths):
            latent, _, number = told_of(path)
            one, other = np.random.SeedSequence([SEED, step + 1, place]).generate_state(2)
            draws = np.random.default_rng(int(other)).random(4)
            ratio = (math.prod(latent.shape[1:]) / 32**3) ** (1 / 3)
            t = ratio * draws[0] / (1 + (ratio - 1) * draws[0])
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(int(one)))
            points.append((1 - t) * scale * latent + t * noise)
            targets.append(scale * latent - noise)
            times.append(1000 * t)
            modalities.append(less_exact(number, draws[1:]))
        told = unet(
            x=torch.stack(points), timesteps=torch.tensor(times, dtype=torch.float32),
            spacing_tensor=100 * torch.tensor([told_of(path)[1] for path in paths]),
            class_labels=torch.tensor(modalities),
        )  # fmt: skip
        loss = (told - torch.stack(targets)).abs().mean()
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = RATE * (1 - step / len(batches)) ** 2
        adam.step()
        losses.append(float(loss.detach()))
        decay = min(0.3, (2 + step) / (11 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), unet.parameters(), strict=True):
                slow.copy_(decay * slow + (1 - decay) * fast)
    return unet, average, losses


def test_steps_through_the_config_equal_a_plain_loop(tmp_path: Path) -> None:
    started: Any = workflow("train_diffusion", **EXACT, **diffusion_folders(tmp_path, make_latents(tmp_path / "l")))
    trainer, batches, losses, rates = started.trainer, [], [], []
    before = SimpleNamespace(bare=copy.deepcopy(trainer.bare))
    adam = trainer.optimizers["optimizer"]
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda e: batches.append(e.state.batch["path"]))
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda _: rates.append(adam.param_groups[0]["lr"]))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output["loss"])))
    started.run()
    assert len(batches) == 6 and all(len(files) == 2 for files in batches)
    assert rates == pytest.approx([RATE * (1 - k / 6) ** 2 for k in range(6)], rel=1e-12)
    unet, average, expected = plain_loop(before, batches)
    assert losses == pytest.approx(expected, rel=1e-4)
    for ours, theirs in ((trainer.bare["unet"], unet), (trainer.results()["unet"], average)):
        first, second, start = (parameters_to_vector(n.parameters()) for n in (ours, theirs, before.bare["unet"]))
        assert (first - second).abs().median() < 1e-7 and (first - second).norm() < 1e-3 * (first - start).norm()


def make(**options: Any) -> DiffusionTrainer:
    unet = small_unet()
    adam = torch.optim.Adam(unet.parameters(), 1e-3)
    return DiffusionTrainer(
        device="cpu", max_epochs=1, train_data_loader=[0], networks={"unet": unet}, optimizers={"optimizer": adam},
        scale_factor=2.0, noise_flow=Flow(), amp=False, seed=SEED, **options,
    )  # fmt: skip


def batch(count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latent": torch.randn(count, 4, 8, 4, 4, generator=generator), "spacing": torch.full((count, 3), 150.0),
        "modality": torch.ones(count).long(), "path": ["v"] * count, "error": [""] * count,
    }  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_quarters_have_the_same_names_and_means_however_samples_are_spread(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, trainer = batch(8), make()
    trainer.flow = Flow(base=None)  # all quarters
    monkeypatch.setattr(trainer, "update", lambda *_: None)
    monkeypatch.setattr(diffusion.idist, "get_world_size", lambda: ranks)
    trainer.state.iteration = 5
    shares, counts = [], [0, 0, 0, 0]
    for rank in range(ranks):
        trainer.state.rank = rank
        own = {name: value[rank * 8 // ranks : (rank + 1) * 8 // ranks] for name, value in samples.items()}
        shares.append({name: float(value.detach()) for name, value in trainer.step(own).items()})
        for q in quarter(trainer.draw(own["latent"])[1]):
            counts[q - 1] += 1
    names = ["loss", *(f"loss_quarter_{q}" for q in range(1, 5) if counts[q - 1])]
    assert all(list(share) == names for share in shares) and len(names) > 2 and sum(counts) == 8
    means = {name: sum(share[name] for share in shares) / ranks for name in names}
    weighted = sum(n * means.get(f"loss_quarter_{q}", 0.0) for q, n in enumerate(counts, 1)) / 8
    assert weighted == pytest.approx(means["loss"], rel=1e-5)
    monkeypatch.undo()
    monkeypatch.setattr(trainer, "update", lambda *_: None)
    trainer.state.rank = 0
    whole = {name: float(value.detach()) for name, value in trainer.step(samples).items()}
    assert means == pytest.approx(whole, rel=1e-5)


def test_what_is_drawn_is_of_the_sample_and_the_step() -> None:
    trainer, latents = make(), batch(4)["latent"]
    trainer.state.iteration = 3
    noise, t, uniform = trainer.draw(latents)
    assert noise.shape == latents.shape and t.shape == (4,) and uniform.shape == (3, 4)
    assert bool((t >= 0).all()) and bool((t < 1).all()) and len(set(t.tolist())) == 4
    trainer.state.rank = 1
    for ours, theirs in zip(trainer.draw(latents[2:]), (noise[2:], t[2:], uniform[:, 2:]), strict=True):
        assert torch.equal(ours, theirs)
    trainer.state.iteration = 4
    assert not torch.equal(trainer.draw(latents[2:])[0], noise[2:])


def test_quarters_are_those_of_0_to_1() -> None:
    assert quarter(torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.75, 0.9999, 1.0])) == [1, 1, 2, 3, 4, 4, 4]


def test_a_batch_has_its_conditions_by_the_names_of_the_network() -> None:
    region = torch.eye(4)[:1]
    told = {"latent": 0, "spacing": 1, "top_region_index": region, "bottom_region_index": 2, "path": "v"}
    assert conditions(told) == {"spacing": 1, "top": region, "bottom": 2}
    assert conditions({"latent": 0, "modality": 1}) == {}


def test_a_weights_file_tells_the_last_validation_else_the_last_step() -> None:
    trainer = make(facts={"sizes": [[8, 4, 4]]})
    assert math.isnan(trainer.contents()["unet"]["loss"])
    trainer.state.output = {"loss": torch.tensor(0.75)}
    told = trainer.contents()["unet"]
    assert told["loss"] == 0.75 and float(told["scale_factor"]) == 2.0 and told["facts"] == {"sizes": [[8, 4, 4]]}
    trainer.progress.validations = [{"epoch": 1, "loss": 0.9}, {"epoch": 2, "loss": 0.5}]
    assert trainer.contents()["unet"]["loss"] == 0.5
