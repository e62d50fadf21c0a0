"""Convolutions of single voxels as matrix products, which round alike whatever the number of threads."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


class Pointwise(nn.Conv3d):
    """A convolution with a kernel of 1 x 1 x 1 and a bias, as a product of matrices.

    oneDNN, which computes convolutions on CPUs, sums the float32 products of such a kernel in an order that depends on
    the number of threads, and torchrun starts processes with one, a shell with all.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, X, Y, Z) to (B, C', X, Y, Z)."""
        assert self.bias is not None
        weight = self.weight.flatten(1).expand(len(x), -1, -1)
        return torch.baddbmm(self.bias[:, None], weight, x.flatten(2)).unflatten(2, x.shape[2:])


def steady(network: Network) -> Network:
    """The same network, with `Pointwise` where it can be; parameters and their names stay as they are."""
    for module in network.modules():
        if type(module) is nn.Conv3d and module.bias is not None and _is_pointwise(module):
            module.__class__ = Pointwise
    return network


def _is_pointwise(layer: nn.Conv3d) -> bool:
    return (*layer.kernel_size, *layer.stride, layer.groups) == (1,) * 7 and layer.padding == (0, 0, 0)
