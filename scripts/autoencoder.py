"""`AutoencoderKlMaisi` made quick to train.

The parameters and their names stay those of MONAI's network, so weights go both ways. What changes is how it runs:
one GroupNorm kernel instead of a Python loop over groups, everything in the compute type, and normalised, activated
or upsampled tensors recomputed in the backward pass (they cost 1 % of a convolution) instead of kept.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

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
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger(__name__)

# Below autocast's reach, and with the statistics that the backward pass needs.
_group_norm = torch.ops.aten.native_group_norm
_group_norm_backward = torch.ops.aten.native_group_norm_backward
_silu_backward = torch.ops.aten.silu_backward
_upsample = torch.ops.aten.upsample_trilinear3d
_upsample_backward = torch.ops.aten.upsample_trilinear3d_backward


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What autocast would compute a convolution of `x` in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class _NormConv(torch.autograd.Function):
    """convolution(silu(group_norm(x))), or without the SiLU, that keeps only `x` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, norm_weight: Any, norm_bias: Any, weight: Any, bias: Any, options: tuple) -> Any:
        groups, eps, activate, padding = options
        x, weight, bias = x.contiguous(), weight.to(x.dtype), bias.to(x.dtype)
        geometry = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        h, mean, rstd = _group_norm(_wide(x), norm_weight, norm_bias, *geometry, eps)
        h = h.to(x.dtype)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        ctx.geometry, ctx.options = geometry, options
        return F.conv3d(F.silu(h, inplace=True) if activate else h, weight, bias, padding=padding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        _, eps, activate, padding = ctx.options
        h = _group_norm(_wide(x), norm_weight, norm_bias, *ctx.geometry, eps)[0].to(x.dtype)
        grad, grad_weight, grad_bias = _conv_backward(grads[0], F.silu(h) if activate else h, weight, padding)
        if activate:
            grad = _silu_backward(grad, h)
        grad_x, grad_scale, grad_shift = _group_norm_backward(
            _wide(grad.contiguous()), _wide(x), mean, rstd, norm_weight, *ctx.geometry, [True] * 3
        )
        return grad_x.to(x.dtype), grad_scale, grad_shift, grad_weight, grad_bias, None


class _UpsampleConv(torch.autograd.Function):
    """convolution(trilinear upsampling by 2), that keeps only the small `x` for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, bias: Any, padding: Sequence[int]) -> Any:
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv3d(_double(x), weight, bias.to(x.dtype), padding=padding)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        grad, grad_weight, grad_bias = _conv_backward(grads[0], _double(x), weight, ctx.padding)
        size = [2 * n for n in x.shape[2:]]
        grad_x = _upsample_backward(_wide(grad), size, list(x.shape), False, 2.0, 2.0, 2.0)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Float32 on CUDA, whose kernels round statistics and sums to their input's type; the CPU's keep float32 inside."""
    return x.float() if x.is_cuda else x


def _double(x: torch.Tensor) -> torch.Tensor:
    return _upsample(x, [2 * n for n in x.shape[2:]], False, 2.0, 2.0, 2.0)


def _conv_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, padding: Sequence[int]) -> Any:
    ones, zeros = [1, 1, 1], [0, 0, 0]
    return torch.ops.aten.convolution_backward(
        grad.to(x.dtype), x, weight, [weight.shape[0]], ones, padding, ones, False, zeros, 1, [True, True, True]
    )


def _norm_conv(x: torch.Tensor, norm: nn.GroupNorm, conv: nn.Module, activate: bool) -> torch.Tensor:
    inner: nn.Conv3d = conv.conv.conv  # type: ignore[assignment, union-attr]
    dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        options = (norm.num_groups, norm.eps, activate, inner.padding)
        return _NormConv.apply(x.to(dtype), norm.weight, norm.bias, inner.weight, inner.bias, options)


class _Upsample(nn.Module):
    def __init__(self, block: MaisiUpsample) -> None:
        super().__init__()
        self.conv = block.conv

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: nn.Conv3d = self.conv.conv.conv  # type: ignore[assignment]
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return _UpsampleConv.apply(x.to(dtype), inner.weight, inner.bias, inner.padding)


class _ResBlock(nn.Module):
    def __init__(self, block: MaisiResBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = block.norm1, block.conv1
        self.norm2, self.conv2 = block.norm2, block.conv2
        self.nin_shortcut = block.nin_shortcut

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = _norm_conv(x, self.norm1, self.conv1, activate=True)
        return self.nin_shortcut(x) + _norm_conv(h, self.norm2, self.conv2, activate=True)


class _Stack(nn.Module):
    """MAISI's encoder or decoder: blocks, of which the last two are a normalisation and a convolution."""

    def __init__(self, blocks: nn.ModuleList, activation_checkpointing: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *blocks, norm, conv = self.blocks
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return _norm_conv(x, norm, conv, activate=False)  # type: ignore[arg-type]


class FastAutoencoderKlMaisi(nn.Module):
    """The networks of an `AutoencoderKlMaisi`, taken over with their parameters and names.

    Args:
        network: MONAI's network; its modules are used up.
        num_splits: pieces a convolution is cut into to save memory; windows do that better, so 1.
        activation_checkpointing: keep only what enters each block and compute the block again in the backward
            pass: 61 % of the saved activations at 96 voxels, for a third more time.

    Attributes:
        latent_channels: C of the latents.
        factor: image voxels along an axis for one latent voxel; patch sizes must be multiples of it.
    """

    def __init__(
        self, network: AutoencoderKlMaisi, num_splits: int = 1, activation_checkpointing: bool = False
    ) -> None:
        super().__init__()
        if any(m.norm_float16 for m in network.modules() if isinstance(m, MaisiGroupNorm3D)):
            logger.info("norm_float16 of the network definition is ignored: amp decides the type of normalisation")
        asked = {m.num_splits for m in network.modules() if isinstance(m, MaisiConvolution)} - {num_splits}
        if asked:
            logger.info("num_splits %s of the network definition is ignored: %d is used", *asked, num_splits)
        for module in network.modules():
            if isinstance(module, MaisiConvolution):
                module.num_splits, module.save_mem = num_splits, False
        self.num_splits = num_splits
        self.latent_channels = network.latent_channels
        self.factor = 2 ** sum(isinstance(m, MaisiDownsample) for m in network.encoder.modules())
        self.encoder = _Stack(self._convert(network.encoder.blocks), activation_checkpointing)  # type: ignore[arg-type]
        self.decoder = _Stack(self._convert(network.decoder.blocks), activation_checkpointing)  # type: ignore[arg-type]
        self.quant_conv_mu = network.quant_conv_mu
        self.quant_conv_log_sigma = network.quant_conv_log_sigma
        self.post_quant_conv = network.post_quant_conv

    def _convert(self, module: nn.Module) -> Any:
        """Replace what is slow, at any depth, by what computes the same with the same parameters."""
        for name, child in module.named_children():
            setattr(module, name, self._convert(child))
        if isinstance(module, MaisiGroupNorm3D):
            norm = nn.GroupNorm(module.num_groups, module.num_channels, module.eps, module.affine)
            norm.weight, norm.bias = module.weight, module.bias
            return norm
        if isinstance(module, MaisiResBlock) and self.num_splits == 1:
            return _ResBlock(module)
        if isinstance(module, MaisiUpsample) and self.num_splits == 1 and not module.use_convtranspose:
            return _Upsample(module)
        return module

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation, float32 (B, C, X/4, Y/4, Z/4), of images (B, 1, X, Y, Z) in [0, 1]."""
        h = self.encoder(x)
        log_variance = self.quant_conv_log_sigma(h).float().clamp(-30.0, 20.0)
        return self.quant_conv_mu(h).float(), torch.exp(log_variance / 2)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Images (B, 1, X, Y, Z), in the compute type, of latents (B, C, X/4, Y/4, Z/4)."""
        return self.decoder(self.post_quant_conv(z))

    def forward(
        self, x: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reconstruction from a posterior sample, posterior mean and standard deviation.

        Args:
            x: (B, 1, X, Y, Z) in [0, 1].
            noise: standard normal, in the latents' shape; drawn here where it is None, as MONAI's network does.
        """
        mu, sigma = self.encode(x)
        noise = torch.randn_like(sigma) if noise is None else noise
        return self.decode(mu + sigma * noise), mu, sigma

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `forward`, but from the posterior mean: deterministic."""
        mu, sigma = self.encode(x)
        return self.decode(mu), mu, sigma


def prepare(
    network: AutoencoderKlMaisi,
    device: torch.device | str,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> FastAutoencoderKlMaisi:
    """The quick form of `network` on `device`, compiled (in place, so that parameter names stay) if wanted."""
    fast = FastAutoencoderKlMaisi(network, activation_checkpointing=activation_checkpointing).to(device)
    if compile:
        fast.compile()
    return fast
