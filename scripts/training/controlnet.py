"""The step of a ControlNet: the UNet is frozen, and is told by label maps what is to be where."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from ignite.engine import Events
from torch import nn

from scripts.common.errors import UserError
from scripts.common.precision import autocast
from scripts.networks import flow
from scripts.networks.controlnet import Control, coded
from scripts.networks.diffusion_files import CONTROLNET
from scripts.training.diffusion import CONDITIONS, DiffusionTrainer, mean_errors, told_velocity
from scripts.training.engine import TrainingEngine
from scripts.training.flow_validation import FlowValidation
from scripts.training.region_losses import RegionLosses


def frozen(network: nn.Module) -> nn.Module:
    """A network that only takes part: in evaluation mode, without gradients of its own."""
    return network.eval().requires_grad_(False)


class ControlNetTrainer(DiffusionTrainer):
    """Trains a ControlNet, which starts as the UNet's encoder; its network is `controlnet`.

    Batches are those of `LatentDataset` with label maps: `label` (B, 1, 4 X, 4 Y, 4 Z) uint8, and with a contrast
    `label_without` and `removed`.

    Args:
        unet: frozen; the weights that generate.
        losses: what they make of regions.
        kwargs: of `DiffusionTrainer`.
    """

    remedy = "lower controlnet_train#batch_size, or train on smaller latents (memory goes with their voxels)"
    trained, kind = "controlnet", CONTROLNET

    def __init__(self, *, unet: nn.Module, losses: RegionLosses, **kwargs: Any) -> None:
        super().__init__(label_dropout=0.0, **kwargs)
        self.unet, self.losses = frozen(unet), losses

    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One step: `loss` is the weighted mean absolute error of the velocity, told by quarter of the times too.

        With a contrast: `region_contrast` and `region_background`, see `RegionLosses.contrast`. A batch without any
        region takes one pass, the second being the same.
        """
        latents = batch["latent"] * self.scale_factor
        noise, t, _ = self.draw(latents)
        noisy, velocity = flow.noisy(latents, noise, t), flow.velocity(latents, noise)
        maps = [batch["label"]]
        if self.losses.contrast_weight and any(batch["removed"]):
            maps.append(batch["label_without"])
        # Both passes in one: DistributedDataParallel expects a single one for each backward pass.
        points, times = torch.cat([noisy] * len(maps)), torch.cat([t] * len(maps))
        names = [name for name in ("modality", *CONDITIONS.values()) if name in batch]
        given = {name: torch.cat([batch[name]] * len(maps)) for name in names}
        control = Control(self.networks["controlnet"], coded(torch.cat(maps)))
        with self.autocast():
            told, *others = told_velocity(self.unet, self.flow, points, times, given, control).split(len(latents))
        errors = mean_errors(told, velocity, self.losses.weights(batch["label"]))
        losses = {"loss": errors.mean()} | self._by_quarter(errors.detach(), latents.shape[2:])
        minimised = losses["loss"]
        if self.losses.contrast_weight:
            other = others[0] if others else told
            contrast = self.losses.contrast(told, other, velocity, batch["label"], batch["label_without"])
            losses |= dict(zip(("region_contrast", "region_background"), contrast, strict=True))
            minimised = minimised + self.losses.contrast_weight * sum(contrast)
        self.update("optimizer", minimised)
        return losses


class ControlNetValidation(FlowValidation):
    """Measures the velocity that the UNet tells of label maps; `loss` is weighted as in training.

    Args:
        unet: frozen.
        losses: what weighs.
        kwargs: of `FlowValidation`; the network is the ControlNet, the dataset has label maps.
    """

    nothing = f"{FlowValidation.nothing}, and no entry of controlnet_train#fold"

    def __init__(self, *, unet: nn.Module, losses: RegionLosses, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.unet, self.losses = frozen(unet), losses

    def draw_errors(
        self, latent: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, batch: dict[str, Any]
    ) -> torch.Tensor:
        """The weighted mean absolute error (1,) of the velocity at one draw of time and noise."""
        control = Control(self.network, coded(batch["label"]))
        with autocast(self.state.device, self.dtype):
            told = told_velocity(self.unet, self.flow, flow.noisy(latent, noise, t), t, batch, control)
        return mean_errors(told, flow.velocity(latent, noise), self.losses.weights(batch["label"]))


class Unchanged:
    """Sees to it that a network stays, byte by byte, as it is while another is trained.

    Args:
        interval: in epochs, at whose end it looks; also after the first one and the last.
        network: that is not to change.
        name: for the error.
    """

    def __init__(self, interval: int, network: nn.Module, name: str) -> None:
        self.interval, self.network, self.name, self.before = interval, network, name, digest(network)

    def attach(self, engine: TrainingEngine) -> None:
        """Look as `engine` trains."""

        def due(engine: Any, epoch: int) -> bool:
            return epoch == 1 or epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)

    def __call__(self, engine: Any) -> None:
        """Look now.

        Raises:
            UserError: where it has changed.
        """
        if digest(self.network) != self.before:
            raise UserError(
                f"{self.name} changed while it should be frozen; the last checkpoint is kept; take out of the "
                "configuration whatever trains it"
            )


def digest(network: nn.Module) -> str:
    """The SHA-256 of a network's parameters and buffers, hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
