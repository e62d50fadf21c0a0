"""New volumes of noise: the flow is integrated in latent space, and the latent decoded by windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from scripts.common.precision import amp_dtype, autocast
from scripts.networks.controlnet import Control
from scripts.networks.flow import Flow, check_sampling, integrate
from scripts.networks.unet import predict
from scripts.networks.windows import VolumeInferer


class Generator:
    """Makes volumes: each is a function of its seed, size, conditions and label map alone.

    Args:
        unet: tells velocities.
        autoencoder: has `decode` and `latent_channels`.
        inferer: cuts latents into windows; its `factor` is the autoencoder's.
        scale_factor: latents times this are what the UNet knows.
        noise_flow: whose times are gone through.
        steps: of the integration.
        integrator: see `flow.integrate`.
        guidance: scale of classifier-free guidance; 0 for none.
        device: where the networks are.
        amp: compute in `amp_dtype`.
        controlnet: for volumes of label maps.
    """

    def __init__(
        self,
        *,
        unet: nn.Module,
        autoencoder: Any,
        inferer: VolumeInferer,
        scale_factor: float,
        noise_flow: Flow,
        steps: int = 30,
        integrator: str = "euler",
        guidance: float = 0.0,
        device: torch.device | str = "cpu",
        amp: bool = True,
        controlnet: nn.Module | None = None,
    ) -> None:
        self.unet, self.autoencoder, self.inferer = unet, autoencoder, inferer
        self.controlnet: Any = controlnet
        self.scale_factor, self.flow, self.integrator, self.guidance = scale_factor, noise_flow, integrator, guidance
        self.steps, self.device = steps, torch.device(device)
        self.dtype = amp_dtype(self.device, amp)
        check_sampling(steps, integrator, guidance)

    def latent(
        self,
        seed: int,
        size: Sequence[int],
        conditions: Mapping[str, Any],
        step_done: Callable[[], object] | None = None,
        labels: torch.Tensor | None = None,
        unguided: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A latent (1, C, X / factor, ...), as the autoencoder encodes, on `device`.

        Args:
            seed: of the noise, which is drawn on the CPU, so that it is the same on every device.
            size: X, Y, Z of the volume, in voxels.
            conditions: for `unet.predict`, by the names of its arguments, (1, ...) each.
            step_done: called after each step of the integration.
            labels: the label map that the ControlNet is told, (1, 1, X, Y, Z) uint8; None for no ControlNet.
            unguided: the map that guidance leads away from, in the same shape; None for `labels`.
        """
        shape = [n // self.inferer.factor for n in size]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((1, self.autoencoder.latent_channels, *shape), generator=generator).to(self.device)
        given: dict[str, Any] = {name: value.to(self.device) for name, value in conditions.items()}
        if labels is not None:
            assert self.controlnet is not None
            with autocast(self.device, self.dtype):
                other = None if unguided is None else unguided.to(self.device)
                given["control"] = Control.embedded(self.controlnet, labels.to(self.device), other)

        def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with autocast(self.device, self.dtype):
                return predict(self.unet, x, t * self.flow.num_train_timesteps, guidance=self.guidance, **given)

        times = self.flow.times(self.steps, shape)
        return integrate(velocity, noise, times, self.integrator, step_done) / self.scale_factor

    def slabs(
        self, latent: torch.Tensor, after_window: Callable[[], object] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """The decoded latent, finished part by part along the first axis: where each begins, and (x, Y, Z), on the CPU.

        Intensities are float32, [0, 1] as far as the network keeps to it.
        """

        def decode(window: torch.Tensor) -> torch.Tensor:
            with autocast(self.device, self.dtype):
                return self.autoencoder.decode(window)

        for x, (part,) in self.inferer.slabs(latent.cpu(), decode, after_window=after_window, latents=True):
            yield x, part[0, 0]
            del part  # not to be held while the next ones are computed

    def volume(self, latent: torch.Tensor) -> torch.Tensor:
        """The decoded latent in one piece, (X, Y, Z) float32 on the CPU."""
        return torch.cat([part for _, part in self.slabs(latent)])
