from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from scripts.networks.pointwise import Pointwise, steady
from tests.helpers import same


def test_networks_stay_what_they_are() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv3d(3, 5, 1), nn.Conv3d(5, 4, 3, padding=1), nn.Conv3d(4, 4, 1, stride=2), nn.Conv3d(4, 6, 1, groups=2),
        nn.Conv3d(6, 4, 1, padding=1), nn.Conv3d(4, 4, 1, bias=False), nn.Conv3d(4, 7, 1),
    )  # fmt: skip
    x = torch.randn(2, 3, 4, 6, 8)
    before = copy.deepcopy(network)
    assert steady(network) is network
    assert [type(m) is Pointwise for m in network] == [True, False, False, False, False, False, True]
    assert same(dict(network.state_dict()), dict(before.state_dict()))
    for module in (network, before):
        module(x).square().sum().backward()
    torch.testing.assert_close(network(x), before(x))
    torch.testing.assert_close(network[0].weight.grad, before[0].weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_the_compute_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Conv3d(16, 8, 1)
    x = torch.randn(1, 16, 4, 6, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = steady(copy.deepcopy(plain))(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), plain(x), atol=0.03 if dtype == torch.bfloat16 else 1e-5, rtol=0.02)


@pytest.mark.parametrize("channels", [(96, 32), (128, 64)])
def test_rounding_does_not_depend_on_the_number_of_threads(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = steady(nn.Conv3d(*channels, 1)), torch.randn(1, channels[0], 16, 16, 16)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(layer(x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
