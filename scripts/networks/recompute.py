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
    MaisiGroupNorm3D,
    MaisiResBlock,
    MaisiUpsample,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.networks.autoencoder import Reconstructor, ResBlock, Stack, Upsample

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


class _Upsample(Upsample):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scale == 1.0:
            return super().forward(x)
        inner: nn.Conv3d = self.conv.conv.conv  # type: ignore[assignment]
        dtype = compute_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            return _UpsampleConv.apply(x.to(dtype), inner.weight, inner.bias, inner.padding)


class _ResBlock(ResBlock):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = _norm_conv(x, self.norm1, self.conv1, activate=True)
        return self.nin_shortcut(x) + _norm_conv(h, self.norm2, self.conv2, activate=True)


class _Stack(Stack):
    """MAISI's encoder or decoder: blocks, of which the last two are a normalisation and a convolution."""

    activation_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *blocks, norm, conv = self.blocks
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return _norm_conv(x, norm, conv, activate=False)  # type: ignore[arg-type]


class FastAutoencoderKlMaisi(Reconstructor):
    """The `Reconstructor` for training: less memory, less time, and a forward pass from a posterior sample.

    Args:
        network: MONAI's network; its modules are used up.
        activation_checkpointing: keep only what enters each block and compute the block again in the backward
            pass: 61 % of the saved activations at 96 voxels, for a third more time.
    """

    replacements = {**Reconstructor.replacements, MaisiResBlock: _ResBlock, MaisiUpsample: _Upsample}
    stack = _Stack

    def __init__(self, network: AutoencoderKlMaisi, activation_checkpointing: bool = False) -> None:
        if any(m.norm_float16 for m in network.modules() if isinstance(m, MaisiGroupNorm3D)):
            logger.info("norm_float16 of the network definition is ignored: amp decides the type of normalisation")
        if asked := {m.num_splits for m in network.modules() if isinstance(m, MaisiConvolution)} - {1}:
            logger.info("num_splits %s of the network definition is ignored: 1 is used", *asked)
        super().__init__(network)
        for part in (self.encoder, self.decoder):
            part.activation_checkpointing = activation_checkpointing  # type: ignore[assignment]

    def forward(  # type: ignore[override]
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


def for_training(
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
