"""The quick autoencoder computes what MONAI's does, with the same parameters, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch

from scripts.networks import operators
from scripts.networks.autoencoder import Reconstructor, ResBlock
from scripts.networks.recompute import FastAutoencoderKlMaisi
from tests.benchmarks.step import count_operators, saved_bytes
from tests.helpers import same, stock_network


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
def test_same_output_and_gradients_as_monai(changes: dict) -> None:
    stock = stock_network(**changes)
    x, z = torch.rand(2, 1, 8, 32, 12), torch.randn(2, 4, 2, 8, 3)
    variants = [FastAutoencoderKlMaisi(copy.deepcopy(stock), activation_checkpointing=c) for c in (False, True)]
    with torch.no_grad():
        wanted = [*stock.encode(x), stock.decode(z), stock.reconstruct(x)]
        for fast in variants:
            got = [*fast.encode(x), fast.decode(z), fast.reconstruct(x)[0]]
            assert all((ours - theirs).abs().max() < 1e-4 for ours, theirs in zip(got, wanted, strict=True))
    expected = gradients(stock, x)
    for fast in variants:
        got = gradients(fast, x)
        assert expected.keys() == got.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (got[name] - gradient).abs().max() / scale < 1e-3, name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_recomputing_changes_no_bit(checkpointing: bool) -> None:
    plain = Reconstructor(stock_network())
    fast = FastAutoencoderKlMaisi(stock_network(), activation_checkpointing=checkpointing)
    x = torch.rand(1, 1, 8, 16, 12)
    assert same(gradients(plain, x), gradients(fast, x))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_group_norm_as_on_cuda_changes_no_bit_in_pieces(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastAutoencoderKlMaisi(stock_network(), activation_checkpointing=checkpointing)
    x = torch.rand(1, 1, 8, 16, 12)
    found = []
    for large in (2**27, 1):  # one piece, and two or three
        monkeypatch.setattr(operators, "LARGE", large)
        monkeypatch.setattr(
            operators,
            "group_norm",
            lambda x, norm: operators._GroupNormInPieces.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps),
        )
        fast.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(fast, x))
    monkeypatch.setattr(operators, "group_norm", lambda x, norm: norm(x.float()).to(x.dtype))
    fast.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(gradients(fast, x), found[0]) and same(*found)


def test_no_convolution_is_computed_twice() -> None:
    x = torch.rand(1, 1, 8, 8, 8)
    plain = Reconstructor(stock_network())
    layers = sum(isinstance(module, torch.nn.Conv3d) for module in plain.modules())
    assert count_operators(plain, x, True, "convolution") == layers
    assert count_operators(FastAutoencoderKlMaisi(stock_network()), x, True, "convolution") == layers
    # A block that is computed again stops before its second convolution.
    fast = FastAutoencoderKlMaisi(stock_network(), activation_checkpointing=True)
    blocks = sum(isinstance(module, ResBlock) for module in fast.modules())
    shortcuts = sum(isinstance(module, ResBlock) and hasattr(module.nin_shortcut, "conv") for module in fast.modules())
    assert count_operators(fast, x, True, "convolution") == layers + blocks + shortcuts


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
    less = FastAutoencoderKlMaisi(copy.deepcopy(stock), activation_checkpointing=True)
    assert saved_bytes(less, x, amp=True) < 0.7 * saved_bytes(fast, x, amp=True)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden: pytest -m gpu")
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
