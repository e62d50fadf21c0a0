"""The step of latent diffusion, by rectified flow."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from torch import nn

from scripts.networks import diffusion_files, flow
from scripts.networks.diffusion_files import UNET
from scripts.networks.flow import Flow
from scripts.networks.unet import Control, predict
from scripts.training.engine import TrainingEngine

logger = logging.getLogger(__name__)

# What a batch calls the arguments of `predict`.
CONDITIONS = {"spacing": "spacing", "top": "top_region_index", "bottom": "bottom_region_index"}


def conditions(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What `predict` takes of a batch beside latents, times and modality."""
    return {argument: batch[name] for argument, name in CONDITIONS.items() if name in batch}


def quarter(t: torch.Tensor) -> list[int]:
    """Which quarter of 0..1 each time (B,) is in, from 1 to 4."""
    return ((t * 4).floor().clamp(0, 3) + 1).int().tolist()


def told_velocity(
    network: nn.Module,
    noise_flow: Flow,
    noisy: torch.Tensor,
    t: torch.Tensor,
    batch: Mapping[str, Any],
    control: Control | None = None,
) -> torch.Tensor:
    """The velocity that a UNet tells, (B, C, X, Y, Z) float32.

    Args:
        network: wrapped in DistributedDataParallel or not.
        noise_flow: whose number of timesteps the network is told.
        noisy: latents (B, C, X, Y, Z), scaled and noisy.
        t: times (B,).
        batch: has `modality` and the conditions.
        control: adds to what the UNet makes of it.
    """
    timesteps = t * noise_flow.num_train_timesteps
    given = {"modality": batch["modality"], **conditions(batch)}
    return predict(network, noisy, timesteps, **given, control=control).float()


def mean_errors(told: torch.Tensor, velocity: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean absolute error of each sample, (B,), of voxels that may have `weights`."""
    errors = (told - velocity).abs()
    return (errors if weights is None else errors * weights).flatten(1).mean(1)


class DiffusionTrainer(TrainingEngine):
    """Trains a UNet to tell the way from noise to latents.

    Batches are those of `LatentDataset`: `latent` (B, C, X, Y, Z), `spacing`, `modality`, ...; the network is `unet`,
    its optimizer `optimizer`. The loss is the mean absolute error of the velocity, in float32.

    Args:
        scale_factor: brings latents to the variance of the noise.
        noise_flow: how times are drawn.
        label_dropout: how probably a modality is told less exactly; see `flow.dropped`.
        facts: plain values that are kept with the weights.
        kwargs: of `TrainingEngine`.
    """

    remedy = "lower diffusion_unet_train#batch_size, or train on smaller latents (memory goes with their voxels)"
    trained, kind = "unet", UNET  # the network that is trained, and what its file is

    def __init__(
        self,
        *,
        scale_factor: float,
        noise_flow: Flow,
        label_dropout: float = 0.1,
        facts: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.scale_factor, self.flow, self.label_dropout = scale_factor, noise_flow, label_dropout
        self.facts = dict(facts or {})

    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One step; beside the loss, it is told by quarter of the times, `loss_quarter_<1 to 4>`, 1 nearest to data."""
        latents = batch["latent"] * self.scale_factor
        noise, t, uniform = self.draw(latents)
        told = batch | {"modality": flow.dropped(batch["modality"], uniform, self.label_dropout)}
        with self.autocast():
            velocity = told_velocity(self.networks["unet"], self.flow, flow.noisy(latents, noise, t), t, told)
        errors = mean_errors(velocity, flow.velocity(latents, noise))
        loss = errors.mean()
        self.update("optimizer", loss)
        return {"loss": loss} | self._by_quarter(errors.detach(), latents.shape[2:])

    def draw(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noise (B, C, X, Y, Z), times (B,), and even draws (3, B) for the modality, of this step."""
        noise = []
        for seed in self.seeds(len(latents), streams=2)[:, 0]:
            generator = torch.Generator(latents.device).manual_seed(int(seed))
            noise.append(torch.randn(latents.shape[1:], generator=generator, device=latents.device))
        even = self._even(len(latents), self.state.rank)
        t = self.flow.drawn(even[0], latents.shape[2:])
        t, uniform = (draws.to(latents.device, non_blocking=True) for draws in (t, even[1:]))
        return torch.stack(noise), t, uniform

    def _even(self, samples: int, rank: int) -> torch.Tensor:
        """Draws (4, samples) from [0, 1) on the CPU: of the time, and of the modality."""
        seeds = self.seeds(samples, streams=2, rank=rank)[:, 1]
        draws = np.stack([np.random.default_rng(int(seed)).random(4) for seed in seeds], axis=1)
        return torch.from_numpy(draws).float().clamp_max(1 - 2**-24)  # below 1 in float32 too

    def _by_quarter(self, errors: torch.Tensor, shape: Sequence[int]) -> dict[str, torch.Tensor]:
        """Losses whose means over the ranks are means over all samples of a quarter; none for one without samples.

        Times are functions of the step, so each rank knows those of all, and which quarters there are.
        """
        ranks = idist.get_world_size()
        own = [quarter(self.flow.drawn(self._even(len(errors), rank)[0], shape)) for rank in range(ranks)]
        counts = Counter(q for quarters in own for q in quarters)
        losses = {}
        for q in sorted(counts):
            weights = torch.tensor([ranks * (mine == q) / counts[q] for mine in own[self.state.rank]])
            losses[f"loss_quarter_{q}"] = (errors * weights.to(errors.device, non_blocking=True)).sum()
        return losses

    def contents(self) -> dict[str, dict[str, Any]]:
        """Weights files in NV-Generate-CTMR's layout; the loss is that of the last validation, else of the last step.

        It is NaN where an epoch without validation ends as soon as it is resumed, with no step before.
        """
        validations = self.progress.validations
        loss = validations[-1]["loss"] if validations else float((self.state.output or {}).get("loss", math.nan))
        return {
            self.trained: diffusion_files.content(
                self.results()[self.trained],
                self.kind,
                epoch=self.state.epoch,
                loss=loss,
                scale_factor=self.scale_factor,
                num_train_timesteps=self.flow.num_train_timesteps,
                facts=self.facts,
            )
        }
