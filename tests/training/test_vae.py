"""The adversarial step: what a plain loop does, and the discriminator's gradients its own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.losses import PatchAdversarialLoss
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.nn.utils import parameters_to_vector

from scripts.common.errors import UserError
from scripts.training.losses import LeastSquaresAdversarialLoss
from scripts.training.vae import VaeTrainer, check_patch
from tests.helpers import stock_network
from tests.training.small_vae import make_trainer


def plain_loop(trainer: VaeTrainer) -> tuple[nn.Module, nn.Module]:
    """The same training written out with MONAI's parts."""
    network = stock_network()
    network.load_state_dict(trainer.bare["autoencoder"].state_dict())
    discriminator = copy.deepcopy(trainer.bare["discriminator"])
    perceptual, adversarial = trainer.generator_loss.perceptual, PatchAdversarialLoss(criterion="least_squares")
    adam_g = torch.optim.Adam(network.parameters(), 1e-4, eps=1e-3)
    adam_d = torch.optim.Adam(discriminator.parameters(), 1e-4, eps=1e-3)
    for iteration, batch in enumerate(trainer.data_loader, 1):
        images = batch["image"]
        seeds = [np.random.SeedSequence([11, iteration, b]).generate_state(2) for b in range(len(images))]
        noise = torch.stack(
            [torch.randn(4, 6, 6, 6, generator=torch.Generator().manual_seed(int(s[0]))) for s in seeds]
        )
        mu, sigma = network.encode(images)
        reconstruction = network.decode(mu + sigma * noise)
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
    expected_g, expected_d = plain_loop(trainer)
    trainer.run()
    assert trainer.state.iteration == 3
    for network, expected, start in zip(trainer.bare.values(), (expected_g, expected_d), before, strict=True):
        ours, theirs, first = (parameters_to_vector(n.parameters()) for n in (network, expected, start))
        # Where rounding moves a value over the kink of an activation, single weights differ by more.
        assert (ours - theirs).norm() < 2e-3 * (ours - first).norm() and (ours - first).abs().max() > 1e-4
        assert (ours - theirs).abs().quantile(0.999) < 1e-5


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


def test_patch_too_small_for_the_discriminator() -> None:
    discriminator = PatchDiscriminator(spatial_dims=3, channels=4, in_channels=1, norm="INSTANCE")
    check_patch([32, 32, 32], discriminator)
    with pytest.raises(UserError, match=r"patch_size is \[32, 16, 32\], too small for the discriminator"):
        check_patch([32, 16, 32], discriminator)


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


@pytest.mark.parametrize("start", [-0.1, 1.5, "half", True])
def test_a_start_that_is_no_share_is_refused(start: Any) -> None:
    with pytest.raises(UserError, match=r"discriminator_start is .*; use a share of the training, from 0 to 1"):
        VaeTrainer(
            device="cpu",
            max_epochs=1,
            train_data_loader=[0],  # type: ignore[arg-type]
            networks={},
            optimizers={},
            generator_loss=torch.nn.Identity(),
            adversarial_loss=torch.nn.Identity(),
            discriminator_start=start,
        )
