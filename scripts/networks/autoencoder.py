"""The autoencoder as one function of one tensor, in operations that TorchScript and ONNX know."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import (
    AutoencoderKlMaisi,
    MaisiConvolution,
    MaisiDownsample,
    MaisiGroupNorm3D,
    MaisiResBlock,
    MaisiUpsample,
)
from torch import nn


class Convolution(nn.Module):
    """A `MaisiConvolution` in one piece, whatever its `num_splits`."""

    def __init__(self, block: MaisiConvolution) -> None:
        super().__init__()
        self.conv = block.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class ResBlock(nn.Module):
    """A `MaisiResBlock`: twice normalisation, SiLU and convolution, beside a shortcut that fits the channels."""

    def __init__(self, block: MaisiResBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.nin_shortcut = block.nin_shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return self.nin_shortcut(x) + h


class Downsample(nn.Module):
    """A `MaisiDownsample`: half the size along each axis, (B, C, X, Y, Z) to (B, C, X/2, Y/2, Z/2)."""

    def __init__(self, block: MaisiDownsample) -> None:
        super().__init__()
        self.pad, self.conv = block.pad, block.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, self.pad))


class Upsample(nn.Module):
    """A `MaisiUpsample`: twice the size along each axis, trilinear before a convolution or by a transposed one."""

    def __init__(self, block: MaisiUpsample) -> None:
        super().__init__()
        self.conv = block.conv
        self.scale = 1.0 if block.use_convtranspose else 2.0  # before `conv`; a transposed one doubles by itself

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            x = F.interpolate(x, scale_factor=self.scale, mode="trilinear")
        return self.conv(x)


class Stack(nn.Module):
    """MAISI's encoder or decoder: its blocks, one after the other."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


Replacements = Mapping[type[nn.Module], Callable[..., nn.Module]]


def _converted(module: nn.Module, replacements: Replacements) -> nn.Module:
    """`module`, in which MAISI's blocks, at any depth, became others with the same parameters, names and results."""
    for name, child in module.named_children():
        setattr(module, name, _converted(child, replacements))
    if isinstance(module, MaisiGroupNorm3D):
        norm = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, module.affine)
        norm.weight, norm.bias = module.weight, module.bias
        return norm
    replacement = replacements.get(type(module))
    return module if replacement is None else replacement(module)


class Reconstructor(nn.Module):
    """An `AutoencoderKlMaisi`, with its parameters and their names, for use: without what only training needs.

    Args:
        network: MONAI's network; its modules are used up.

    Attributes:
        factor: image voxels along an axis for one latent voxel; sizes must be multiples of it.
        latent_channels: C of the latents.
    """

    # A subclass may run other blocks; these keep the names under which MONAI's network has their parameters.
    replacements: Replacements = {
        MaisiConvolution: Convolution,
        MaisiResBlock: ResBlock,
        MaisiDownsample: Downsample,
        MaisiUpsample: Upsample,
    }
    stack: Callable[..., nn.Module] = Stack

    def __init__(self, network: AutoencoderKlMaisi) -> None:
        super().__init__()
        self.factor: int = 2 ** sum(isinstance(m, MaisiDownsample) for m in network.encoder.modules())
        self.latent_channels: int = network.latent_channels
        network = _converted(network, self.replacements)  # type: ignore[assignment]
        self.encoder, self.decoder = type(self).stack(network.encoder.blocks), type(self).stack(network.decoder.blocks)
        self.quant_conv_mu = network.quant_conv_mu
        self.quant_conv_log_sigma = network.quant_conv_log_sigma
        self.post_quant_conv = network.post_quant_conv

    @torch.jit.export
    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation, float32 (B, C, X/4, Y/4, Z/4), of images (B, 1, X, Y, Z) in [0, 1]."""
        h = self.encoder(x)
        log_variance = self.quant_conv_log_sigma(h).float().clamp(-30.0, 20.0)
        return self.quant_conv_mu(h).float(), torch.exp(log_variance / 2)

    @torch.jit.export
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, X, Y, Z), in the compute type, of latents (B, C, X/4, Y/4, Z/4)."""
        return self.decoder(self.post_quant_conv(z))

    @torch.jit.export
    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction from the posterior mean, posterior mean and standard deviation."""
        mu, sigma = self.encode(x)
        return self.decode(mu), mu, sigma

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction (B, 1, X, Y, Z) from the posterior mean: deterministic."""
        return self.decode(self.encode(x)[0])
