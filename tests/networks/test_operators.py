"""What CUDA computes in training in a form of its own equals PyTorch's; the forms themselves run on a CPU too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from scripts.networks import operators


def results(function: Callable, x: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    """What `function` makes of x, and the gradients of x and parameters."""
    x = x.clone().requires_grad_()
    y = function(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y, *torch.autograd.grad(y, [x, *parameters], gradient)]


def affine_norm() -> nn.GroupNorm:
    torch.manual_seed(0)
    norm = nn.GroupNorm(8, 32, 1e-6)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("large", "pieces"), [(1, (2, 3)), (1, (8, 4)), (1, (99, 99)), (2**13, (4, 4)), (2**27, (2, 3))]
)
def test_group_norm_in_pieces_has_the_bits_of_one_piece(
    batch: int, dtype: torch.dtype, large: int, pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "LARGE", large)
    monkeypatch.setattr(operators, "PIECES", pieces)
    norm, x = affine_norm(), (3 * torch.randn(batch, 32, 6, 5, 7) + 1).to(dtype)
    wanted = results(lambda x: norm(x.float()).to(x.dtype), x, norm.weight, norm.bias)
    got = results(
        lambda x: operators._GroupNormInPieces.apply(x, norm.weight, norm.bias, 8, 1e-6), x, norm.weight, norm.bias
    )
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))


def test_pieces_are_few_and_together_are_all_channels() -> None:
    x = torch.empty(1, 64, 96, 96, 96, device="meta")
    for most, count in ((1, 1), (2, 1), (4, 2), (1000, 32)):
        pieces = list(operators._pieces(x, 32, most))
        assert len(pieces) == count
        assert [c for _, part, _ in pieces for c in range(64)[part]] == list(range(64))
        assert all(sizes == (1, len(range(64)[c]), 96**3, len(range(32)[g])) for g, c, sizes in pieces)


def test_on_a_cpu_group_norm_is_pytorchs() -> None:
    norm, x = affine_norm(), torch.randn(1, 32, 4, 5, 6).bfloat16()
    pairs = zip(
        results(lambda x: operators.group_norm(x, norm), x, *norm.parameters()),
        results(norm, x, *norm.parameters()),
        strict=True,
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 8, 1, 2, 3), (1, 2, 1, 1, 1), (1, 16, 6, 6, 6)])
def test_the_gathered_gradient_of_upsampling_is_pytorchs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    wanted = results(lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"), x)
    got = results(operators._Doubled.apply, x)
    assert torch.equal(got[0], wanted[0]) and (got[1] - wanted[1]).abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(2, 4, 6, 8, 10), (1, 4, 24, 24, 24), (1, 4, 7, 9, 5)])
def test_halving_has_the_bits_of_average_pooling(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    pairs = zip(results(operators.halved, x), results(lambda x: F.avg_pool3d(x, 2), x), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_doubling_keeps_the_type() -> None:
    x = torch.rand(1, 2, 3, 4, 5).bfloat16()
    assert operators.doubled(x).shape == (1, 2, 6, 8, 10) and operators.doubled(x).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden: pytest -m gpu")
def test_on_a_gpu_the_forms_equal_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "LARGE", 1)
    norm, x = affine_norm().cuda(), torch.randn(1, 32, 12, 10, 8).cuda().bfloat16()
    wanted = results(lambda x: norm(x.float()).to(x.dtype), x, norm.weight, norm.bias)
    got = results(lambda x: operators.group_norm(x, norm), x, norm.weight, norm.bias)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    wide = torch.randn(1, 3, 6, 5, 4, dtype=torch.float64).cuda()
    wanted = results(lambda x: F.interpolate(x, scale_factor=2.0, mode="trilinear"), wide)
    assert (results(operators._Doubled.apply, wide)[1] - wanted[1]).abs().max() < 1e-12
