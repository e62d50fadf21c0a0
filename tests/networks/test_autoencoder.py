"""The reconstructor is MONAI's network: the same parameters, names and results."""

from __future__ import annotations

import copy

import pytest
import torch

from scripts.networks.autoencoder import Reconstructor
from tests.helpers import stock_network


@pytest.mark.parametrize("changes", [{}, {"num_splits": 2}, {"use_convtranspose": True}])
def test_same_parameters_and_results_as_monai(changes: dict) -> None:
    stock = stock_network(**changes)
    ours = Reconstructor(copy.deepcopy(stock)).eval()
    names = list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in stock.named_parameters()]
    assert list(ours.state_dict()) == names
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in stock.state_dict().items())
    x = torch.rand(2, 1, 8, 32, 12)
    with torch.no_grad():
        mu, sigma = stock.eval().encode(x)
        wanted = stock.decode(mu), mu, sigma
        got = ours.reconstruct(x)
        assert torch.equal(ours(x), got[0])
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() < 1e-4


@pytest.mark.parametrize(("levels", "factor"), [(1, 1), (2, 2), (3, 4)])
def test_factor_is_that_of_the_levels(levels: int, factor: int) -> None:
    changes = {"num_channels": [8] * levels, "num_res_blocks": [1] * levels, "attention_levels": [False] * levels}
    network = Reconstructor(stock_network(**changes, latent_channels=3)).eval()
    assert (network.factor, network.latent_channels) == (factor, 3)
    with torch.no_grad():
        mu, sigma = network.encode(torch.rand(1, 1, 8, 12, 16))
    assert mu.shape == sigma.shape == (1, 3, 8 // factor, 12 // factor, 16 // factor)


def test_standard_deviations_are_bounded_and_float32() -> None:
    network = Reconstructor(stock_network()).eval()
    for bias, bound in ((1e4, 10.0), (-1e4, -15.0)):
        torch.nn.init.constant_(network.quant_conv_log_sigma.conv.bias, bias)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mu, sigma = network.encode(torch.rand(1, 1, 8, 8, 8))
        assert mu.dtype == sigma.dtype == torch.float32
        assert torch.allclose(sigma.log(), torch.full_like(sigma, bound))
