"""The ControlNet, MONAI's `ControlNetMaisi`: how a label map tells a UNet what is to be where."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from monai.networks.blocks import Swish
from torch import nn

from scripts.common.errors import UserError
from scripts.common.ranks import gather
from scripts.networks.diffusion_files import CONTROLNET, newest, read
from scripts.networks.unet import UNetWeights

_BITS = 8  # of a label, 0 to 255
_FACTOR = 4  # voxels along an axis for one of the latent
_SLAB, _HALO = 64, 12  # voxels that are embedded at a time, and beside them; what is embedded reaches 11 voxels far


def coded(labels: torch.Tensor) -> torch.Tensor:
    """Label maps (B, 1, X, Y, Z) uint8 as MAISI's networks take them: their bits, lowest first, float32 (B, 8, ...)."""
    powers = torch.arange(_BITS, device=labels.device, dtype=torch.uint8).view(1, _BITS, 1, 1, 1)
    bits = (labels >> powers & 1).float()
    # A CPU embeds maps of full resolution, of few channels, in 0.6 of the time if their channels come last.
    return bits if bits.is_cuda else bits.contiguous(memory_format=torch.channels_last_3d)


class Control:
    """What a ControlNet makes of label maps, for `unet.predict`.

    Args:
        network: wrapped in DistributedDataParallel or not.
        conditions: what the network takes of the maps: (B, 8, X, Y, Z), see `coded`.
        unguided: the same of what guidance leads away from, as the maps without a region; None for `conditions`.
    """

    def __init__(self, network: nn.Module, conditions: torch.Tensor, unguided: torch.Tensor | None = None) -> None:
        self.network, self.conditions = network, conditions
        self.unguided = conditions if unguided is None else unguided

    @classmethod
    def embedded(cls, network: nn.Module, labels: torch.Tensor, unguided: torch.Tensor | None = None) -> Control:
        """For many passes over the same maps: these, at full resolution, are embedded once and not in each.

        Args:
            network: not wrapped.
            labels: (B, 1, X, Y, Z) uint8.
            unguided: in the same shape.
        """
        embedding: Any = network.controlnet_cond_embedding
        bare = copy.copy(network)
        bare._modules = {**network._modules, "controlnet_cond_embedding": nn.Identity()}
        maps = (None if m is None else _embedded(embedding, m) for m in (labels, unguided))
        return cls(bare, *maps)  # type: ignore[arg-type]

    def residuals(
        self, x: torch.Tensor, timesteps: torch.Tensor, modality: torch.Tensor | None, unguided: bool = False
    ) -> Mapping[str, Any]:
        """What the UNet adds, by the names of its arguments."""
        bare: Any = getattr(self.network, "module", self.network)
        down, middle = self.network(
            x=x,
            timesteps=timesteps,
            controlnet_cond=self.unguided if unguided else self.conditions,
            class_labels=None if bare.num_class_embeds is None else modality,
        )
        return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


def _embedded(embedding: nn.Module, labels: torch.Tensor) -> torch.Tensor:
    """What a ControlNet adds to a latent: slab by slab along x, since a map in 8 bits takes more memory than a UNet."""
    parts = []
    for x in range(0, labels.shape[2], _SLAB):
        begin = max(x - _HALO, 0)
        part = embedding(coded(labels[:, :, begin : x + _SLAB + _HALO]))
        parts.append(part[:, :, (x - begin) // _FACTOR :][:, :, : _SLAB // _FACTOR].clone())
    return torch.cat(parts, dim=2)


def fused(network: nn.Module) -> nn.Module:
    """The same network, with one kernel for each activation of the embedding.

    MONAI's `Swish` takes three, and keeps three tensors for the backward pass, here of a map's full resolution.
    """
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if type(child) is Swish and child.alpha == 1:
                setattr(parent, name, nn.SiLU())
    return network


def copy_encoder(network: nn.Module, unet: nn.Module) -> None:
    """Let a ControlNet start as the UNet's encoder; its own outputs stay as they are, which is zero.

    Raises:
        UserError: as `encoder_of`.
    """
    network.load_state_dict({**network.state_dict(), **encoder_of(network, unet)})


def encoder_of(network: nn.Module, unet: nn.Module) -> dict[str, torch.Tensor]:
    """What a ControlNet may start from: the UNet's parameters for all that is not the ControlNet's alone.

    The UNet's blocks take spacing and body regions appended to the embedding of time and modality; of the projections
    of that, the ControlNet gets the part for what it is told too.

    Raises:
        UserError: naming the first parameter of the encoder that is of another shape.
    """
    own, theirs = network.state_dict(), unet.state_dict()
    found = {}
    for name in (name for name in own if not name.startswith("controlnet_")):
        wanted = own[name].shape
        copied = theirs.get(name, torch.empty(0))
        if name.endswith("time_emb_proj.weight"):
            copied = copied[:, : wanted[1]]
        if copied.shape != wanted:
            there = tuple(theirs[name].shape) if name in theirs else "there is none"
            raise UserError(
                f"controlnet_def: {name} has shape {tuple(wanted)}, in the UNet {there}; give it the same "
                "num_channels, num_res_blocks, attention_levels, num_head_channels and num_class_embeds as "
                "diffusion_unet_def"
            )
        found[name] = copied
    return found


class ControlNetWeights:
    """The weights of a ControlNet for generating: given ones, or else what a training left in `model_dir`.

    Args:
        network: takes them, strictly.
        model_dir: searched where no path is given: the newest of a training's best ones, else its last ones.
        model_filename: what the training called them.
        trained_controlnet_path: the file to use, or None.

    Attributes:
        network: with the weights in it.
        file: what it says beside them.

    Raises:
        UserError: where there is no such file, or it does not fit the network.
    """

    def __init__(
        self,
        network: nn.Module,
        model_dir: str | Path,
        model_filename: str,
        trained_controlnet_path: str | None = None,
    ) -> None:
        self.network = fused(network)
        path = trained_controlnet_path or newest(Path(model_dir), model_filename)
        if path is None:
            raise UserError(
                f"{model_dir}: holds no weights of a ControlNet ({model_filename} and the like); train with "
                "configs/train_controlnet.json first, or give trained_controlnet_path"
            )
        self.file = read(network, path, CONTROLNET, "trained_controlnet_path")
        if len(set(gather(self.file.sha256))) > 1:
            raise UserError(f"{path}: the ranks read different weights; give trained_controlnet_path")

    def other_unet(self, unet: UNetWeights) -> str:
        """A sentence where the ControlNet was trained on another UNet; empty where it was not, or that is not known."""
        trained = self.file.facts.get("unet_sha256")
        if not trained or trained == unet.file.sha256:
            return ""
        return (
            f"{self.file.path} was trained for the UNet with SHA-256 {trained[:12]}, but {unet.file.path} is "
            f"{unet.file.sha256[:12]}; give the other one as trained_diffusion_path"
        )
