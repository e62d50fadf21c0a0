"""GroupNorm, up- and downsampling as CUDA is to compute them in training; on a CPU they are PyTorch's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

native_group_norm_backward = torch.ops.aten.native_group_norm_backward

# Into how many pieces GroupNorm's input is divided where it has at least so many elements, forward and backward. Few,
# as CUDA's kernels take one block of threads for each group, or channel, and leave other processors idle.
LARGE, PIECES = 2**27, (2, 3)


class _GroupNormInPieces(torch.autograd.Function):
    """GroupNorm in float32 of a narrower type, which it gives back, a piece of the groups at a time.

    Each group is normalised by itself, so the bits are those of one piece.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float) -> Any:
        x = x.contiguous()
        y, mean = torch.empty_like(x), x.new_empty(len(x), groups, dtype=torch.float32)
        rstd = torch.empty_like(mean)  # the reciprocal of the standard deviation
        for g, c, sizes in _pieces(x, groups, PIECES[0]):
            wide = x[:, c].float(), weight[c], bias[c]
            y[:, c], mean[:, g], rstd[:, g] = torch.native_group_norm(*wide, *sizes, eps)
            del wide
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        for g, c, sizes in _pieces(x, mean.shape[1], PIECES[1]):
            moments = mean[:, g].contiguous(), rstd[:, g].contiguous()
            wide = grad[:, c].float(), x[:, c].float(), *moments, weight[c], *sizes, (True, True, True)
            grad_x[:, c], grad_weight[c], grad_bias[c] = native_group_norm_backward(*wide)
            del wide
        return grad_x, grad_weight, grad_bias, None, None


def _pieces(x: torch.Tensor, groups: int, most: int) -> Iterator[tuple[slice, slice, tuple[int, int, int, int]]]:
    """Groups and channels of each piece of (B, C, X, Y, Z), and its B, C, voxels and number of groups."""
    width, voxels = x.shape[1] // groups, x.shape[2:].numel()
    count = min(groups, math.ceil(most * min(x.numel() / LARGE, 1)))
    for i in range(count):
        low, high = groups * i // count, groups * (i + 1) // count
        sizes = len(x), (high - low) * width, voxels, high - low
        yield slice(low, high), slice(low * width, high * width), sizes


def group_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """`norm(x)` in x's type, computed in float32.

    The CPU's kernels keep float32 inside. CUDA's sum in it, too, but hand mean and deviation to the backward pass
    rounded to x's type, and take weights, and give their gradients, in no other; so there x is widened.
    """
    if not x.is_cuda or x.dtype.itemsize >= 4:
        return norm(x)
    if torch.compiler.is_compiling():  # which widens in registers, not in memory
        return norm(x.float()).to(x.dtype)
    return _GroupNormInPieces.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


class _Doubled(torch.autograd.Function):
    """Trilinear upsampling by two, whose gradient is gathered: a voxel's is 3/4 and 1/4 of those beside it.

    CUDA's kernel scatters it by atomic additions, in any order; PyTorch's own way out indexes eight times.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.upsample_trilinear3d(x, [2 * n for n in x.shape[2:]], False, 2.0, 2.0, 2.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        for axis in (4, 3, 2):
            even, odd = grad.unflatten(axis, (-1, 2)).unbind(axis + 1)
            n = even.shape[axis]
            grad = 0.75 * (even + odd)
            for first, of, second in ((0, even, 1), (1, odd, 0)):
                grad.narrow(axis, first, n - 1).add_(of.narrow(axis, second, n - 1), alpha=0.25)
            for end, of in ((0, even), (n - 1, odd)):  # beyond the border it is repeated
                grad.narrow(axis, end, 1).add_(of.narrow(axis, end, 1), alpha=0.25)
        return grad


def doubled(x: torch.Tensor) -> torch.Tensor:
    """Twice the size, in x's type; in float32 on CUDA, whose kernel sums gradients in its input's type."""
    if not x.is_cuda:
        return F.interpolate(x, scale_factor=2.0, mode="trilinear")
    if torch.are_deterministic_algorithms_enabled():
        return _Doubled.apply(x.float()).to(x.dtype)
    return F.interpolate(x.float(), scale_factor=2.0, mode="trilinear").to(x.dtype)


def halved(x: torch.Tensor) -> torch.Tensor:
    """`F.avg_pool3d(x, 2)`, which on CUDA has no deterministic backward pass."""
    a, b, c = (n // 2 * 2 for n in x.shape[2:])
    corners = [x[..., i:a:2, j:b:2, k:c:2] for i, j, k in itertools.product((0, 1), repeat=3)]
    return sum(corners[1:], corners[0]) / 8
