"""The adversarial step: what a plain loop does, and the discriminator's gradients its own."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.nn.utils import parameters_to_vector

from scripts.common.errors import UserError
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.training.losses import LeastSquaresAdversarialLoss, VaeLoss
from scripts.training.schedule import PatchCurriculum
from scripts.training.vae import VaeTrainer, check_patches
from tests.helpers import NETWORK, STOCK, TINY, TRAIN, folders, same, stock_network, workflow
from tests.training.small_vae import make_trainer

RECIPE = json.loads(Path("configs/reference_recipe.json").read_text())


def plain_loop(
    trainer: VaeTrainer, network: nn.Module, rate: float = 1e-4, eps: float = 1e-3
) -> tuple[nn.Module, nn.Module]:
    """The same training written out with MONAI's parts: what becomes of `network` and of the discriminator."""
    network.load_state_dict(trainer.bare["autoencoder"].state_dict())
    discriminator = copy.deepcopy(trainer.bare["discriminator"])
    perceptual, adversarial = trainer.generator_loss.perceptual, PatchAdversarialLoss(criterion="least_squares")
    adam_g = torch.optim.Adam(network.parameters(), rate, eps=eps)
    adam_d = torch.optim.Adam(discriminator.parameters(), rate, eps=eps)
    for iteration, batch in enumerate(trainer.data_loader, 1):
        images = batch["image"]
        seeds = [np.random.SeedSequence([trainer.seed, iteration, b]).generate_state(2) for b in range(len(images))]
        mu, sigma = network.encode(images)
        noise = [torch.randn(mu.shape[1:], generator=torch.Generator().manual_seed(int(s[0]))) for s in seeds]
        reconstruction = network.decode(mu + sigma * torch.stack(noise))
        kl = 0.5 * (mu**2 + sigma**2 - torch.log(sigma**2) - 1).sum() / len(images)
        p_loss = perceptual(reconstruction, images, [torch.Generator().manual_seed(int(s[1])) for s in seeds])
        adv = adversarial(discriminator(reconstruction)[-1], target_is_real=True, for_discriminator=False)
        adam_g.zero_grad()
        (F.l1_loss(reconstruction, images) + 1e-7 * kl + 0.3 * p_loss + 0.1 * adv).backward()
        adam_g.step()

        adam_d.zero_grad()
        fake = adversarial(discriminator(reconstruction.detach())[-1], target_is_real=False, for_discriminator=True)
        real = adversarial(discriminator(images)[-1], target_is_real=True, for_discriminator=True)
        ((fake + real) * 0.5).backward()
        adam_d.step()
    return network, discriminator


def test_three_steps_equal_a_plain_loop() -> None:
    trainer = make_trainer()
    before = copy.deepcopy((trainer.bare["autoencoder"], trainer.bare["discriminator"]))
    expected_g, expected_d = plain_loop(trainer, stock_network())
    trainer.run()
    assert trainer.state.iteration == 3
    for network, expected, start in zip(trainer.bare.values(), (expected_g, expected_d), before, strict=True):
        ours, theirs, first = (parameters_to_vector(n.parameters()) for n in (network, expected, start))
        # Where rounding moves a value over the kink of an activation, single weights differ by more.
        assert (ours - theirs).norm() < 2e-3 * (ours - first).norm() and (ours - first).abs().max() > 1e-4
        assert (ours - theirs).abs().quantile(0.999) < 1e-5


def test_three_steps_by_the_reference_recipe_equal_the_references_loop(datalist: Path, tmp_path: Path) -> None:
    content = json.loads(datalist.read_text())
    datalist.write_text(json.dumps(content | {"training": content["training"][:3]}))
    small = {key: value for key, value in TINY.items() if key not in RECIPE and not key.startswith("warmup")}
    small |= {"autoencoder_train#n_epochs": 1, "autoencoder_train#amp": False, "autoencoder_train#lr": 1e-2}
    started = workflow([str(TRAIN), "configs/reference_recipe.json"], **small, **folders(tmp_path, datalist))
    trainer: Any = started.trainer
    before = copy.deepcopy((trainer.bare["autoencoder"], trainer.bare["discriminator"]))
    network = AutoencoderKlMaisi(**STOCK | NETWORK)
    expected = plain_loop(trainer, network, rate=1e-2 * 0.01, eps=1e-8)  # the first ten epochs warm up
    started.run()
    assert trainer.state.iteration == 3 and trainer.results()["autoencoder"] is trainer.bare["autoencoder"]
    for ours, theirs, start in zip(trainer.bare.values(), expected, before, strict=True):
        moved, apart = (
            parameters_to_vector(n.parameters()) - parameters_to_vector(ours.parameters()) for n in (start, theirs)
        )
        assert moved.abs().median() > 1e-4  # Adam's steps are as long as the rate
        # Rounding decides the sign of a step where a gradient is nearly 0.
        assert apart.abs().median() < 1e-7 and apart.norm() < 5e-3 * moved.norm()


@pytest.mark.parametrize("amp", [False, True])
def test_discriminator_gradient_is_that_of_its_own_loss_alone(amp: bool) -> None:
    trainer = make_trainer(steps=1, amp=amp, size=32, layers=3)  # the last kernel is larger than its input
    discriminator = copy.deepcopy(trainer.bare["discriminator"])
    images = trainer.data_loader.dataset.images
    trainer.state.iteration = 1
    noise, _ = trainer.draw(images)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=trainer.dtype == torch.bfloat16):
        reconstruction = trainer.bare["autoencoder"](images, noise)[0].float()
    loss = LeastSquaresAdversarialLoss()
    fake, real = discriminator(reconstruction)[-1], discriminator(images)[-1]
    (0.5 * (loss(fake, False) + loss(real, True))).backward()
    trainer.state.iteration = 0
    trainer.run()
    for ours, theirs in zip(trainer.bare["discriminator"].parameters(), discriminator.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-4 * theirs.grad.abs().max()


def test_discriminator_does_not_move_in_the_generator_step() -> None:
    trainer = make_trainer(steps=1)
    trainer.optimizers["optimizer_d"].param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(trainer.bare["discriminator"].state_dict())
    trainer.run()
    assert all(torch.equal(t, before[n]) for n, t in trainer.bare["discriminator"].state_dict().items())
    assert all(p.requires_grad for p in trainer.bare["discriminator"].parameters())


@pytest.mark.parametrize("amp", [False, True])
def test_steps_are_reproducible_and_return_named_detached_losses(amp: bool) -> None:
    first, second = (make_trainer(amp=amp, size=32, layers=3) for _ in range(2))
    torch.manual_seed(1)
    first.run()
    torch.manual_seed(2)  # the global state has no say
    second.run()
    for ours, theirs in zip(first.bare.values(), second.bare.values(), strict=True):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    names = ["loss", "recons_loss", "kl_loss", "p_loss", "adv_loss", "d_fake_loss", "d_real_loss", "d_loss"]
    assert list(first.state.output) == [*names, "grad_norm_g", "grad_norm_d"]
    assert not any(v.requires_grad for v in first.state.output.values())


def test_bfloat16_step_stays_near_float32() -> None:
    exact, narrow = make_trainer(steps=2), make_trainer(steps=2, amp=True)
    if narrow.dtype != torch.bfloat16:
        pytest.skip("this CPU has no bfloat16")
    exact.run()
    narrow.run()
    for name in ("recons_loss", "adv_loss", "d_loss"):
        assert float(narrow.state.output[name]) == pytest.approx(float(exact.state.output[name]), rel=0.05)


def test_finished_training_changes_nothing() -> None:
    trainer = make_trainer()
    trainer.run()
    before = copy.deepcopy(trainer.bare["autoencoder"].state_dict())
    trainer.run()
    assert trainer.state.iteration == 3
    assert all(torch.equal(t, before[n]) for n, t in trainer.bare["autoencoder"].state_dict().items())


def test_running_out_of_memory_says_which_knobs_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(steps=1)

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(trainer, "inferer", fail)
    with pytest.raises(UserError, match=r"out of memory with batches of \(2, 1, 24, 24, 24\) .*patch_size.*check"):
        trainer.run()


def test_patches_that_a_network_cannot_take_are_refused_each_by_its_knob() -> None:
    discriminator = PatchDiscriminator(spatial_dims=3, channels=4, in_channels=1, norm="INSTANCE")

    def check(patch_size: list[int], *stages: Any) -> None:
        check_patches(PatchCurriculum(list(stages), patch_size, 10), 4, discriminator)

    check([64, 32, 32], [0.5, [32, 32, 32]])
    with pytest.raises(UserError, match=r"train#patch_size is \[32, 16, 32\], too small for the discriminator"):
        check([32, 16, 32])
    with pytest.raises(UserError, match=r"patch_curriculum is \[16, 32, 32\], too small for the discriminator; use at"):
        check([32, 32, 32], [0.3, [32, 32, 32]], [0.5, [16, 32, 32]])
    with pytest.raises(UserError, match=r"patch_curriculum is \[34, 32, 32\], not divisible by the network's factor 4"):
        check([32, 32, 32], [0.5, [34, 32, 32]])
    with pytest.raises(UserError, match=r"patch_curriculum is 64; use three positive integers"):
        check([32, 32, 32], [0.5, 64])


@pytest.mark.slow
def test_the_discriminator_learns_before_it_counts_and_disturbs_nothing_before() -> None:
    trainer = make_trainer(batch_size=1, steps=20)
    trainer.discriminator_start = 0.5
    seen: list[set[str]] = []
    weights: list[torch.Tensor] = []
    judge = trainer.bare["discriminator"]

    def look(engine: Any) -> None:
        seen.append(set(engine.state.output))
        weights.append(torch.cat([p.detach().flatten() for p in judge.parameters()]))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, look)
    trainer.run()
    assert ["d_loss" in names for names in seen] == [False] * 9 + [True] * 11  # 0.45 of 20 steps are 9
    assert ["adv_loss" in names for names in seen] == [False] * 10 + [True] * 10
    assert all(torch.equal(w, weights[0]) for w in weights[:9]) and not torch.equal(weights[9], weights[8])
    never = make_trainer(batch_size=1, steps=3)
    never.discriminator_start = 1.0
    never.run()
    assert "d_loss" not in never.state.output


def test_latents_of_half_the_size_are_those_of_the_image_of_half_the_size() -> None:
    trainer = make_trainer(batch_size=2, steps=1)
    trainer.scale_equivariance = 0.25
    network = stock_network()
    network.load_state_dict(trainer.bare["autoencoder"].state_dict())
    images = next(iter(trainer.data_loader))["image"]
    with torch.no_grad():
        halved = network.decode(F.avg_pool3d(network.encode(images)[0], 2))
    wanted = F.l1_loss(halved, F.avg_pool3d(images, 2))
    plain = make_trainer(batch_size=2, steps=1)
    for each in (trainer, plain):
        each.run()
    assert float(trainer.state.output["scale_loss"]) == pytest.approx(float(wanted), rel=1e-5)
    assert "scale_loss" not in plain.state.output
    assert not torch.equal(
        *(parameters_to_vector(t.bare["autoencoder"].decoder.parameters()) for t in (trainer, plain))
    )


NO_SHARE, NO_WEIGHT = (-0.1, 1.5, "half", True), (-0.25, float("nan"), float("inf"), "much", True)
BAD = [
    *(("discriminator_start", value, "use a share of the training, from 0 to 1") for value in NO_SHARE),
    *(("decoder_finish", value, "use a share of the training, from 0 to 1") for value in (*NO_SHARE, float("nan"))),
    *(("scale_equivariance", value, "use a weight from 0, e.g. 0.25") for value in NO_WEIGHT),
    *(("term_norm_interval", value, "use a number of steps, or 0 for never") for value in (-1, 1.5, "often", True)),
]


@pytest.mark.parametrize(("knob", "value", "remedy"), BAD)
def test_a_knob_out_of_range_is_refused(knob: str, value: Any, remedy: str) -> None:
    with pytest.raises(UserError, match=f"{knob} is {value!r}; {remedy}"):
        VaeTrainer(
            device="cpu",
            max_epochs=1,
            train_data_loader=[0],  # type: ignore[arg-type]
            networks={},
            optimizers={},
            generator_loss=torch.nn.Identity(),
            adversarial_loss=torch.nn.Identity(),
            **{knob: value},
        )


# The decoder's finish


def encoder_state(trainer: VaeTrainer) -> list[torch.Tensor]:
    """Weights of the encoder's side, and what Adam holds for them."""
    parameters, adam = trainer.bare["autoencoder"].encoder_parameters(), trainer.optimizers["optimizer_g"].state
    return [t.detach().clone() for p in parameters for t in (p, *adam[p].values())]


@pytest.mark.parametrize("fused", [False, True])
def test_in_the_finish_only_the_decoder_learns(fused: bool) -> None:
    trainer = make_trainer(batch_size=1, steps=4, fused=fused)
    trainer.decoder_finish, trainer.scale_equivariance = 0.5, 0.25
    states: list[list[torch.Tensor]] = []
    decoders: list[torch.Tensor] = []

    @trainer.on(Events.ITERATION_COMPLETED)
    def note(engine: VaeTrainer) -> None:
        network = engine.bare["autoencoder"]
        states.append(encoder_state(engine))
        decoders.append(parameters_to_vector([*network.decoder.parameters(), *network.post_quant_conv.parameters()]))

    trainer.run()
    unchanged = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(states)]
    assert unchanged == [False, True, True]
    assert not any(torch.equal(one, other) for one, other in itertools.pairwise(decoders))
    assert float(trainer.state.output["kl_loss"]) > 0 and float(trainer.state.output["scale_loss"]) > 0
    every = {id(p) for p in trainer.bare["autoencoder"].parameters()}
    ours = {id(p) for p in trainer.bare["autoencoder"].encoder_parameters()}
    later = [n for n, p in trainer.bare["autoencoder"].named_parameters() if id(p) in every - ours]
    assert {name.split(".")[0] for name in later} == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize("amp", [False, True])
def test_a_step_of_the_finish_is_the_decoders_half_of_a_step(amp: bool) -> None:
    whole, finish = (make_trainer(batch_size=1, steps=1, amp=amp) for _ in range(2))
    before = copy.deepcopy(finish.bare["autoencoder"].state_dict())
    finish.decoder_finish = 1.0
    for trainer in (whole, finish):
        trainer.run()
    for name, ours in finish.bare["autoencoder"].state_dict().items():
        wanted = whole.bare["autoencoder"].state_dict() if "decoder" in name or "post_quant" in name else before
        assert torch.equal(ours, wanted[name]), name


# Patches that grow


def test_the_pull_of_the_kl_on_a_latent_element_stays_the_same() -> None:
    trainer = make_trainer(steps=1)
    trainer.patch_sizes = PatchCurriculum([[0.5, [24, 24, 24]]], [48, 48, 24], max_epochs=1)
    trainer.generator_loss.kl_weight = 1e-3
    trainer.run()
    found = {name: float(value) for name, value in trainer.state.output.items()}
    told = found["recons_loss"] + 4 * 1e-3 * found["kl_loss"] + 0.3 * found["p_loss"]
    assert found["loss"] == pytest.approx(told, rel=1e-5) and trainer.weights["kl_loss"] == 4e-3
    # Adding up patches of one size to one of another: the mean of their losses is that of the large one.
    loss, mu, sigma = (
        VaeLoss(lambda x, y: x.sum() * 0, kl_weight=0.1),
        torch.randn(1, 4, 4, 2, 2),
        torch.rand(1, 4, 4, 2, 2),
    )
    image, target = torch.rand(2, 1, 1, 16, 8, 8)
    halves = zip(*(t.chunk(2, dim=2) for t in (image, target, mu, sigma)), strict=True)
    small = [float(loss(*half, None, 2.0)["loss"]) for half in halves]
    assert float(loss(image, target, mu, sigma)["loss"]) == pytest.approx(sum(small) / 2, rel=1e-5)


# Which term dominates


def test_norms_at_the_last_layer_are_those_of_each_weighted_term() -> None:
    trainer = make_trainer(batch_size=1, steps=1)
    trainer.term_norm_interval, trainer.scale_equivariance = 1, 0.25
    network, judge = copy.deepcopy(trainer.bare["autoencoder"]), copy.deepcopy(trainer.bare["discriminator"])
    images = next(iter(trainer.data_loader))["image"]
    trainer.state.iteration = 1
    noise, generators = trainer.draw(images)
    trainer.state.iteration = 0
    reconstruction, mu, sigma, half = network(images, noise, half=True)
    losses = trainer.generator_loss(reconstruction, images, mu, sigma, generators)
    terms = {
        "recons_loss": losses["recons_loss"],
        "p_loss": 0.3 * losses["p_loss"],
        "adv_loss": 0.1 * LeastSquaresAdversarialLoss()(judge(reconstruction)[-1], True),
        "scale_loss": 0.25 * F.l1_loss(half, F.avg_pool3d(images, 2)),
    }
    last = next(p for p in reversed(list(network.decoder.parameters())) if p.ndim == 5)
    wanted = {
        f"last_layer_norm_{n}": float(torch.autograd.grad(t, last, retain_graph=True)[0].norm())
        for n, t in terms.items()
    }
    trainer.run()
    found = {name: float(value) for name, value in trainer.state.output.items() if "last_layer" in name}
    assert found == pytest.approx(wanted, rel=1e-4) and min(found.values()) > 0


@pytest.mark.parametrize(("amp", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_norms_at_the_last_layer_change_no_bit_of_the_training(amp: bool, checkpointing: bool) -> None:
    plain, watched = (make_trainer(steps=2, batch_size=1, amp=amp) for _ in range(2))
    watched.term_norm_interval = 1
    for trainer in (plain, watched):
        trainer.scale_equivariance, trainer.decoder_finish = 0.25, 0.5
        for part in (trainer.bare["autoencoder"].encoder, trainer.bare["autoencoder"].decoder):
            part.activation_checkpointing = checkpointing
        trainer.run()
    for ours, theirs in zip(plain.bare.values(), watched.bare.values(), strict=True):
        assert same(ours.state_dict(), theirs.state_dict())
    extra = set(watched.state.output) - set(plain.state.output)
    assert extra == {f"last_layer_norm_{name}_loss" for name in ("recons", "p", "adv", "scale")}


def test_of_a_compiled_network_there_are_no_norms_at_the_last_layer(caplog: pytest.LogCaptureFixture) -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    network.compiled = True
    caplog.set_level("INFO")
    trainer = VaeTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=[0],  # type: ignore[arg-type]
        networks={"autoencoder": network},
        optimizers={},
        generator_loss=torch.nn.Identity(),
        adversarial_loss=torch.nn.Identity(),
        term_norm_interval=5,
    )
    assert trainer.term_norm_interval == 0 and "term_norm_interval is ignored" in caplog.text
