"""The quick autoencoder computes what MONAI's does, with the same parameters, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch

from scripts.networks.recompute import FastAutoencoderKlMaisi
from tests.benchmarks.step import saved_bytes
from tests.helpers import stock_network


def gradients(network, x: torch.Tensor) -> dict[str, torch.Tensor]:
    mu, sigma = network.encode(x)
    reconstruction = network.decode(mu + 0.1 * sigma)
    ((reconstruction.float() - x).abs().mean() + 1e-3 * mu.float().square().mean() + sigma.float().mean()).backward()
    return {name: p.grad for name, p in network.named_parameters()}


VARIANTS = [
    {},
    {"num_splits": 2},
    {"use_convtranspose": True},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_output_and_gradients_as_monai(changes: dict, checkpointing: bool) -> None:
    stock = stock_network(**changes)
    fast = FastAutoencoderKlMaisi(copy.deepcopy(stock), activation_checkpointing=checkpointing)
    x = torch.rand(2, 1, 16, 32, 20)
    with torch.no_grad():
        for ours, theirs in zip(fast.encode(x), stock.encode(x), strict=True):
            assert (ours - theirs).abs().max() < 1e-4
        z = torch.randn(2, 4, 4, 8, 5)
        assert (fast.decode(z) - stock.decode(z)).abs().max() < 1e-4
        assert (fast.reconstruct(x)[0] - stock.reconstruct(x)).abs().max() < 1e-4
    expected, got = gradients(stock, x), gradients(fast, x)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        assert (got[name] - gradient).abs().max() / scale < 1e-3, name


def test_forward_samples_with_the_given_noise() -> None:
    fast = FastAutoencoderKlMaisi(stock_network())
    x, noise = torch.rand(1, 1, 16, 16, 16), torch.randn(1, 4, 4, 4, 4)
    reconstruction, mu, sigma = fast(x, noise)
    assert torch.allclose(reconstruction, fast.decode(mu + sigma * noise))
    assert torch.allclose(fast(x, torch.zeros_like(noise))[0], fast.reconstruct(x)[0])


def test_keeps_a_fraction_of_the_activations() -> None:
    stock = stock_network(num_channels=[32, 64, 64], norm_num_groups=32)
    fast = FastAutoencoderKlMaisi(copy.deepcopy(stock))
    x = torch.rand(1, 1, 16, 16, 16)
    assert saved_bytes(fast, x, amp=True) < 0.4 * saved_bytes(stock, x, amp=True)


def test_bfloat16_stays_close_to_float32() -> None:
    fast = FastAutoencoderKlMaisi(stock_network())
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        exact = fast.reconstruct(x)[0]
        with torch.autocast("cpu", torch.bfloat16):
            narrow = fast.reconstruct(x)[0]
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.slow
def test_compiled_step_equals_the_eager_one() -> None:
    eager = FastAutoencoderKlMaisi(stock_network())
    compiled = copy.deepcopy(eager)
    compiled.compile()
    x, noise = torch.rand(1, 1, 16, 16, 16), torch.randn(1, 4, 4, 4, 4)
    for network in (eager, compiled):
        (network(x, noise)[0] - x).abs().mean().backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), eager.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None:
            assert (ours.grad - theirs.grad).abs().max() < 1e-3 * theirs.grad.abs().max().clamp(min=1e-6), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gradients_on_a_gpu_stay_near_float32_on_the_cpu() -> None:
    fast = FastAutoencoderKlMaisi(stock_network())
    x = torch.rand(1, 1, 16, 16, 16)
    expected = gradients(fast, x)
    gpu = copy.deepcopy(fast).cuda()
    gpu.zero_grad(set_to_none=True)
    with torch.autocast("cuda", torch.bfloat16):
        got = gradients(gpu, x.cuda())
    for name, gradient in expected.items():
        assert (got[name].cpu() - gradient).norm() < 0.1 * gradient.norm() + 1e-6, name
