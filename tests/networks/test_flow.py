"""Rectified flow: the formulas, MONAI's scheduler, and flows whose end is known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler, RFlowScheduler

from scripts.common.errors import UserError
from scripts.networks.flow import (
    Flow,
    check_sampling,
    dropped,
    from_scheduler,
    guided,
    integrate,
    noisy,
    shifted,
    velocity,
)

SHAPE = (24, 16, 40)
THEIRS = {  # as NV-Generate-CTMR's network file has it
    "_target_": "monai.networks.schedulers.rectified_flow.RFlowScheduler",
    "num_train_timesteps": 1000,
    "use_discrete_timesteps": False,
    "use_timestep_transform": True,
    "sample_method": "uniform",
    "scale": 1.4,
}


def scheduler(**changes: Any) -> RFlowScheduler:
    return RFlowScheduler(**{key: value for key, value in (THEIRS | changes).items() if key != "_target_"})


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_noisy_latents_and_velocity_are_those_of_the_formulas_and_of_monai() -> None:
    latents, noise = randn(3, 4, 6, 4, 8), randn(3, 4, 6, 4, 8, seed=1)
    t = torch.tensor([0.0, 0.3, 1.0])
    points = noisy(latents, noise, t)
    assert torch.equal(points[0], latents[0]) and torch.equal(points[2], noise[2])
    assert torch.equal(points[1], (1 - t[1]) * latents[1] + t[1] * noise[1])
    torch.testing.assert_close(points, scheduler().add_noise(latents, noise, 1000 * t), atol=1e-6, rtol=0)
    way = points + t.reshape(-1, 1, 1, 1, 1) * velocity(latents, noise)  # from any point, straight to the latent
    torch.testing.assert_close(way, latents, atol=1e-6, rtol=0)


def test_times_are_shifted_as_written_and_as_by_monai() -> None:
    t = torch.rand(50, generator=torch.Generator().manual_seed(0))
    ratio = (24 * 16 * 40 / 32**3) ** (1 / 3)
    assert torch.equal(shifted(t, SHAPE), ratio * t / (1 + (ratio - 1) * t))
    assert torch.equal(shifted(t, (32, 32, 32)), t)
    assert shifted(torch.tensor([0.5]), (64, 64, 64)).item() == pytest.approx(2 / 3)
    assert shifted(torch.tensor([0.0, 1.0]), SHAPE).tolist() == [0, 1]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_timestep_transform": False},
        {"use_discrete_timesteps": True},
        {"base_img_size_numel": 16**3, "num_train_timesteps": 500},
    ],
)
def test_times_of_training_are_those_of_monai_for_the_same_draws(changes: dict[str, Any]) -> None:
    wanted, latents = scheduler(**changes), randn(40, 1, *SHAPE)
    torch.manual_seed(3)
    uniform = torch.rand(40)
    torch.manual_seed(3)
    theirs = wanted.sample_timesteps(latents) / wanted.num_train_timesteps
    flow = from_scheduler(wanted)
    assert flow.num_train_timesteps == wanted.num_train_timesteps
    torch.testing.assert_close(flow.drawn(uniform, SHAPE), theirs, atol=1e-6, rtol=0)


def test_logit_normal_times_are_the_sigmoid_of_a_normal_distribution() -> None:
    flow = from_scheduler(scheduler(sample_method="logit-normal", loc=0.5, scale=1.4, use_timestep_transform=False))
    assert flow == Flow(base=None, logit_normal=(pytest.approx(0.5), pytest.approx(1.4)))
    below = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # of a normal distribution, up to 1 standard deviation
    times = flow.drawn(torch.tensor([0.0, 1 - below, 0.5, below]), SHAPE)
    wanted = [0, *(1 / (1 + math.exp(-(0.5 + 1.4 * z))) for z in (-1, 0, 1))]
    assert times.tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 1000])
@pytest.mark.parametrize("shape", [(8, 8, 8), SHAPE, (128, 128, 128)])
def test_times_of_sampling_fall_from_1_to_0(steps: int, shape: tuple[int, int, int]) -> None:
    times = Flow().times(steps, shape)
    assert times.dtype == torch.float32 and times.shape == (steps + 1,)
    assert times[0] == 1 and times[-1] == 0 and (times[1:] < times[:-1]).all()
    assert abs((times[:-1] - times[1:]).sum().item() - 1) < 1e-6
    theirs = scheduler()
    theirs.set_timesteps(steps, input_img_size_numel=math.prod(shape))
    half = 2.0**-11 * 1000  # what their float16 may be off
    torch.testing.assert_close(1000 * times[:-1], theirs.timesteps.float(), atol=half, rtol=0)


def test_a_linear_flow_is_integrated_exactly() -> None:
    latents, noise = randn(2, 4, 6, 4, 8), randn(2, 4, 6, 4, 8, seed=1)
    before, calls = noise.clone(), []

    def straight(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t)
        return velocity(latents, noise)

    for integrator, evaluations in (("euler", 1), ("midpoint", 2)):
        for steps in (1, 30):
            calls.clear()
            done: list[int] = []
            times = Flow().times(steps, SHAPE)
            found = integrate(straight, noise, times, integrator, lambda done=done: done.append(1))
            torch.testing.assert_close(found, latents, atol=2e-6, rtol=0)
            assert len(calls) == evaluations * steps and len(done) == steps
            assert torch.equal(torch.stack(calls[::evaluations]), times[:-1, None].expand(-1, 2))
    assert torch.equal(noise, before)


@pytest.mark.parametrize(("integrator", "ratio"), [("euler", 2), ("midpoint", 4)])
def test_errors_fall_by_the_order_of_the_integrator(integrator: str, ratio: float) -> None:
    noise, wanted = torch.ones(1, 1, 1, 1, 1), math.exp(0.5)

    def error(steps: int) -> float:
        """dx/ds = s x, where s = 1 - t: from 1 to the square root of e."""
        times = Flow().times(steps, SHAPE)
        found = integrate(lambda x, t: (1 - t).reshape(-1, 1, 1, 1, 1) * x, noise, times, integrator)
        return abs(found.item() - wanted)

    assert error(8) / error(16) == pytest.approx(ratio, rel=0.15)
    assert error(16) / error(32) == pytest.approx(ratio, rel=0.1)


def test_steps_of_a_low_precision_network_are_added_up_in_float32() -> None:
    noise = randn(1, 1, 4, 4, 4)
    found = integrate(lambda x, t: torch.full_like(x, 2.0**-12).bfloat16(), noise, Flow().times(100, SHAPE))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, noise + 2.0**-12, atol=1e-6, rtol=0)


def test_guidance_goes_from_the_unconditional_velocity_through_the_conditional_one() -> None:
    conditional, unconditional = randn(2, 3), randn(2, 3, seed=1)
    torch.testing.assert_close(guided(conditional, unconditional, 1), conditional)
    torch.testing.assert_close(guided(conditional, unconditional, 15), 15 * conditional - 14 * unconditional)


def test_labels_are_dropped_in_order() -> None:
    keep, drop = 0.1, 0.0999  # a draw of just the probability changes no kind, but does make a label unknown
    modality = torch.tensor([0, 1, 2, 7, 8, 9, 32])
    for draws, wanted in (
        ((keep, keep, 0.11), [0, 1, 2, 7, 8, 9, 32]),
        ((drop, keep, 0.11), [0, 1, 1, 1, 8, 9, 32]),
        ((keep, drop, 0.11), [0, 1, 2, 7, 8, 8, 8]),
        ((drop, drop, 0.11), [0, 1, 1, 1, 8, 8, 8]),
        ((keep, keep, 0.1), [0] * 7),
    ):
        uniform = torch.stack([torch.full((7,), draw) for draw in draws])
        assert dropped(modality, uniform).tolist() == wanted
    assert modality.tolist() == [0, 1, 2, 7, 8, 9, 32]


def test_labels_are_dropped_as_often_as_they_should() -> None:
    uniform = torch.rand(3, 100_000, generator=torch.Generator().manual_seed(0))
    for number, kind in ((3, 1), (12, 8)):
        found = dropped(torch.full((100_000,), number), uniform)
        assert found.dtype == torch.int64 and set(found.tolist()) == {0, kind, number}
        assert (found == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)
        assert (found == kind).float().mean().item() == pytest.approx(0.09, abs=0.005)


def test_other_schedulers_are_refused() -> None:
    for other in (DDPMScheduler(1000), DDIMScheduler(1000)):
        with pytest.raises(
            UserError, match=rf"^noise_scheduler is {type(other).__name__}, which is not supported; use"
        ):
            from_scheduler(other)


def test_settings_without_effect_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    from_scheduler(scheduler(), THEIRS | {"transform_scale": 2.0})
    from_scheduler(scheduler(sample_method="logit-normal"), THEIRS | {"sample_method": "logit-normal"})
    assert [record.message for record in caplog.records] == [
        "noise_scheduler#scale 1.4 has no effect here (sample_method is uniform)",
        "noise_scheduler#transform_scale 2.0 has no effect here (sample_method is uniform)",
    ]
    caplog.clear()
    config = {
        "imports": ["$import scripts.networks.flow as flow"],
        "noise_scheduler": THEIRS,
        "flow": "$flow.from_scheduler(@noise_scheduler)",
        "run": ["@flow"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = ConfigWorkflow(str(tmp_path / "config.json"), workflow_type="infer", logging_file=False)
    assert run.run() == [Flow()]
    said = [record.message for record in caplog.records if record.name.startswith("scripts")]
    assert said == ["noise_scheduler#scale 1.4 has no effect here (sample_method is uniform)"]


def test_knobs_of_sampling_are_checked() -> None:
    check_sampling(1, "midpoint", 15)
    group = "diffusion_unet_inference"
    for knobs, wanted in (
        ((0, "euler"), f"{group}#num_inference_steps is 0; use a whole number from 1, e.g. 30"),
        ((2.5, "euler"), f"{group}#num_inference_steps is 2.5; use a whole number"),
        ((True, "euler"), f"{group}#num_inference_steps is True; use a whole number"),
        ((30, "heun"), "integrator is 'heun'; use one of euler, midpoint"),
        ((30, "euler", -1), f"{group}#cfg_guidance_scale is -1; use 0 for no guidance, or a larger number"),
        ((30, "euler", math.nan), f"{group}#cfg_guidance_scale is nan; use 0"),
        ((30, "euler", "1"), f"{group}#cfg_guidance_scale is '1'; use 0"),
    ):
        with pytest.raises(UserError) as caught:
            check_sampling(*knobs)
        assert str(caught.value).startswith(wanted)
    with pytest.raises(UserError, match="num_inference_steps is 0"):
        Flow().times(0, SHAPE)
    with pytest.raises(UserError, match="integrator is 'heun'"):
        integrate(lambda x, t: x, torch.ones(1, 1), torch.tensor([1.0, 0.0]), "heun")
