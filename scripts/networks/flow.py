"""Rectified flow (Liu et al. 2023): a network learns the straight way from noise, at time 1, to a latent, at time 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.schedulers.rectified_flow import RFlowScheduler

from scripts.common.errors import UserError
from scripts.common.monai_bundle import live_parser

logger = logging.getLogger(__name__)

BASE = 32**3  # latent voxels at which times are not shifted
INTEGRATORS = ("euler", "midpoint")
CT, MRI = 1, 8  # modality numbers from which the kinds of CT, and those of MRI, begin; 0 is unknown

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _by_sample(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))  # (B, 1, 1, 1, 1)


def noisy(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The points (1 - t) x + t n of the ways from noise to latents, (B, C, X, Y, Z), at times t (B,) in 0..1."""
    t = _by_sample(t, latents)
    return (1 - t) * latents + t * noise


def velocity(latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the network is to tell anywhere on these ways: x - n, towards the latent, (B, C, X, Y, Z)."""
    return latents - noise


def shifted(t: torch.Tensor, shape: Sequence[int], base: int = BASE) -> torch.Tensor:
    """Times moved towards noise for large latents, in which the same noise hides less (Esser et al. 2024).

    Args:
        t: in 0..1, which stay 0 and 1 at the ends.
        shape: of the latent, without batch and channels.
        base: voxels of a latent at which times stay as they are.

    Returns:
        r t / (1 + (r - 1) t), where r is the latent's edge in units of that of `base`.
    """
    ratio = (math.prod(shape) / base) ** (1 / len(shape))
    return ratio * t / (1 + (ratio - 1) * t)


@dataclass(frozen=True)
class Flow:
    """How times are drawn and shifted: the part of MONAI's `RFlowScheduler` that its settings are about.

    Attributes:
        num_train_timesteps: the network is told a time times this.
        base: latent voxels at which times are not shifted; None never shifts them.
        discrete: times of training are whole numbers out of `num_train_timesteps`, before any shift.
        logit_normal: location and scale of the normal distribution whose sigmoid times of training are; None draws
            them evenly.
    """

    num_train_timesteps: int = 1000
    base: int | None = BASE
    discrete: bool = False
    logit_normal: tuple[float, float] | None = None

    def drawn(self, uniform: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Times of training (B,) in 0..1, made of even draws (B,) from [0, 1), for latents of a shape."""
        t = uniform
        if self.logit_normal is not None:
            location, scale = self.logit_normal
            t = torch.sigmoid(location + scale * torch.special.ndtri(t))
        if self.discrete:
            t = (t * self.num_train_timesteps).floor() / self.num_train_timesteps
        return self._shifted(t, shape)

    def times(self, steps: int, shape: Sequence[int]) -> torch.Tensor:
        """The times (steps + 1,) between which to integrate, falling from 1 to 0, float32 on the CPU.

        Raises:
            UserError: for less than one step.
        """
        check_sampling(steps)
        even = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
        return self._shifted(even, shape).float()

    def _shifted(self, t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        return t if self.base is None else shifted(t, shape, self.base)


def from_scheduler(scheduler: Any, definition: Mapping[str, Any] | None = None) -> Flow:
    """The flow that a config's `noise_scheduler` means; says which of its settings change nothing.

    Args:
        scheduler: MONAI's `RFlowScheduler`.
        definition: as the config has it; None takes it from the workflow that is running.

    Raises:
        UserError: for any other scheduler.
    """
    if not isinstance(scheduler, RFlowScheduler):
        raise UserError(
            f"noise_scheduler is {type(scheduler).__name__}, which is not supported; use RFlowScheduler, as in "
            "NV-Generate-CTMR's config_network_rflow.json, and weights trained with it"
        )
    if definition is None and (parser := live_parser()) is not None:
        definition = parser.get("noise_scheduler")
    written = definition if isinstance(definition, Mapping) else {}
    logit_normal = None
    idle = {"transform_scale", "steps_offset"}  # MONAI's own transform does not read the first
    if scheduler.sample_method == "logit-normal":
        normal: Any = scheduler.distribution.base_dist
        logit_normal = (float(normal.mean), float(normal.stddev))
    else:
        idle |= {"loc", "scale"}
    for name in sorted(idle & written.keys()):
        why = f"sample_method is {scheduler.sample_method}"
        logger.info("noise_scheduler#%s %s has no effect here (%s)", name, written[name], why)
    return Flow(
        num_train_timesteps=scheduler.num_train_timesteps,
        base=scheduler.base_img_size_numel if scheduler.use_timestep_transform else None,
        discrete=scheduler.use_discrete_timesteps,
        logit_normal=logit_normal,
    )


def check_sampling(steps: Any = 1, integrator: Any = INTEGRATORS[0], guidance: Any = 0.0) -> None:
    """Refuse knobs that no volume can be sampled with.

    Args:
        steps: of the integrator.
        integrator: one of `INTEGRATORS`.
        guidance: scale of classifier-free guidance.

    Raises:
        UserError: naming the knob.
    """
    group = "diffusion_unet_inference"
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise UserError(f"{group}#num_inference_steps is {steps!r}; use a whole number from 1, e.g. 30")
    if integrator not in INTEGRATORS:
        raise UserError(f"integrator is {integrator!r}; use one of {', '.join(INTEGRATORS)}")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 0 <= guidance < math.inf:
        raise UserError(f"{group}#cfg_guidance_scale is {guidance!r}; use 0 for no guidance, or a larger number")


def integrate(
    velocity: Velocity,
    noise: torch.Tensor,
    times: torch.Tensor,
    integrator: str = "euler",
    step_done: Callable[[], object] | None = None,
) -> torch.Tensor:
    """Go from noise to latents.

    Args:
        velocity: of points (B, C, X, Y, Z) and their times (B,), float32 in 0..1, on the device of `noise`.
        noise: (B, C, X, Y, Z) at the first time; stays as it is.
        times: falling, as of `Flow.times`.
        integrator: "euler": one evaluation a step, first order; "midpoint": two, second order.
        step_done: called after each step, e.g. the `update` of a progress bar.

    Returns:
        latents (B, C, X, Y, Z) at the last time, float32.

    Raises:
        UserError: for an unknown integrator.
    """
    check_sampling(integrator=integrator)

    def at(x: torch.Tensor, t: float) -> torch.Tensor:
        return velocity(x, torch.full((len(x),), t, device=x.device)).float()

    x, points = noise.float(), times.tolist()
    for t, following in zip(points, points[1:], strict=False):
        v = at(x, t)
        if integrator == "midpoint":
            middle = (t + following) / 2
            v = at(x + (t - middle) * v, middle)
        x = x + (t - following) * v
        if step_done is not None:
            step_done()
    return x


def guided(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): u + scale (c - u), of velocities with and without the modality.

    Args:
        conditional: the velocity for the wanted modality.
        unconditional: that for modality 0, unknown.
        scale: 1 gives the conditional velocity, more goes beyond it.
    """
    return unconditional + scale * (conditional - unconditional)


def dropped(modality: torch.Tensor, uniform: torch.Tensor, probability: float = 0.1) -> torch.Tensor:
    """Modality numbers (B,), some of them made less exact, so that the network also learns what kinds have in common.

    In this order: a kind of CT (2 to 7) becomes CT (1), a kind of MRI (9 and more) becomes MRI (8), any becomes 0.

    Args:
        modality: (B,), whole numbers; stays as it is.
        uniform: (3, B), one draw from [0, 1) for each of the three.
        probability: of each of the three.
    """
    to_ct, to_mri, to_unknown = uniform
    modality = modality.where(~((modality > CT) & (modality < MRI) & (to_ct < probability)), CT)
    modality = modality.where(~((modality > MRI) & (to_mri < probability)), MRI)
    return modality.where(to_unknown > probability, 0)
