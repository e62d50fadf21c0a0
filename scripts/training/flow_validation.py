"""Validation of latent diffusion: the loss at times and noise that are the same each time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from scripts.common import ranks
from scripts.common.errors import UserError
from scripts.common.precision import autocast
from scripts.networks.flow import Flow, noisy, velocity
from scripts.networks.whole_volumes import WholeVolumes
from scripts.networks.windows import VolumeInferer
from scripts.training.diffusion import mean_errors, quarter, told_velocity
from scripts.training.validation import together


class FlowValidation(WholeVolumes):
    """Measures the velocity that a UNet tells; `state.metrics` holds means over the latents of all ranks.

    `loss` is the mean absolute error as in training, at `draws` times for each latent, evenly spread before they are
    shifted, each with its own noise; `loss_quarter_<1 to 4>` is that of the times in a quarter of 0..1. What is
    compared between epochs differs in the weights alone, where the loss of a step is mostly that of its time.

    Args:
        scale_factor: of the latents.
        noise_flow: how times are shifted.
        draws: times for each latent.
        amp: compute in `amp_dtype`.
        max_bad_volumes: how many latents that cannot be read are passed over.
        seed: of the noise.
        kwargs: of `WholeVolumes`; the loader is a `VolumeLoader` of a `LatentDataset`, the network the UNet.

    Attributes:
        interrupted: whether the last validation was, on any rank; it has no metrics then.

    Raises:
        UserError: for `draws` that are no number of times.
    """

    remedy = "train on smaller latents"
    nothing = "the datalist has no list 'validation'"  # why there may be no latents
    interrupted = False

    def __init__(
        self,
        *,
        scale_factor: float,
        noise_flow: Flow,
        draws: int = 8,
        amp: bool = True,
        max_bad_volumes: int = 5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            raise UserError(f"val_draws is {draws!r}; use a whole number from 1, e.g. 8")
        super().__init__(inferer=VolumeInferer(factor=1), amp=amp, **kwargs)  # each latent in one piece
        self.scale_factor, self.flow = scale_factor, noise_flow
        self.draws, self.seed, self.max_bad_volumes = draws, seed, max_bad_volumes

    def start(self) -> None:
        """Forget the last validation."""
        self.interrupted = False
        self.errors: list[tuple[int, float]] = []  # quarter and error of each draw
        self.broken: dict[int, str] = {}

    def pass_over(self, why: str) -> None:
        """Take note that a latent cannot be read; how many may be is known at the end."""
        self.broken[self.index] = why

    def interrupt(self) -> None:
        """End this validation after the present latent, on all ranks, without metrics."""
        self.interrupted = True
        self.terminate_epoch()

    def described(self, volume: dict[str, Any]) -> str:
        """What is computed, for the advice where memory runs out."""
        return f"a latent of {tuple(volume['latent'].shape)}"

    def process(self, volume: dict[str, Any]) -> None:
        """Measure one latent."""
        device = self.state.device
        batch = {n: v[None].to(device) for n, v in volume.items() if isinstance(v, torch.Tensor)}
        latent = batch["latent"] * self.scale_factor
        times = self.flow.drawn((torch.arange(self.draws) + 0.5) / self.draws, latent.shape[2:])
        found = []
        for place, t in enumerate(times.split(1)):
            seed = int(np.random.SeedSequence([self.seed, self.index, place]).generate_state(1)[0])
            # On the CPU, so that it is the same noise on every device.
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed)).to(device)
            found.append(self.draw_errors(latent, noise, t.to(device), batch))
        self.errors += zip(quarter(times), torch.cat(found).tolist(), strict=True)

    def draw_errors(
        self, latent: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, batch: dict[str, Any]
    ) -> torch.Tensor:
        """The mean absolute error (1,) of the velocity at one draw of time and noise."""
        with autocast(self.state.device, self.dtype):
            told = told_velocity(self.network, self.flow, noisy(latent, noise, t), t, batch)
        return mean_errors(told, velocity(latent, noise))

    def finish(self) -> None:
        """Set `state.metrics`, on all ranks.

        Raises:
            UserError: where no latent could be measured, or more than `max_bad_volumes` could not.
        """
        self.state.metrics = {}
        self.interrupted = any(ranks.gather(self.interrupted))
        shares = ranks.gather((self.errors, self.broken))
        if self.interrupted:
            return
        errors = together(shares, self.max_bad_volumes, "latents", "encode these volumes again")
        groups = {"loss": [error for _, error in errors]}
        for q in sorted({q for q, _ in errors}):
            groups[f"loss_quarter_{q}"] = [error for place, error in errors if place == q]
        self.state.metrics = {name: math.fsum(group) / len(group) for name, group in groups.items()}

    def cost_rows(self, samples_voxels: float) -> dict[str, str]:
        """What a validation takes, for the table of what will run.

        Args:
            samples_voxels: of one training step, over all ranks.
        """
        latents: Any = self.data_loader.dataset  # type: ignore[union-attr]
        if not len(latents):
            return {"a validation": f"none, and no best epoch: {self.nothing}"}
        voxels = sum(math.prod(size) for size in latents.sizes()) * self.draws
        return {"a validation": f"costs about {max(voxels / samples_voxels / 3, 1):.0f} training steps"}

    def _iteration(self, engine: Any, volume: dict[str, Any]) -> None:  # type: ignore[override]
        if volume["error"]:
            self.pass_over(volume["error"])
        else:
            self.take(volume)
