"""The quick autoencoder computes what MONAI's does, with the same parameters, in less memory."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from scripts.common.errors import UserError
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.networks.weights import load_weights, save_weights
from tests.benchmarks.step import saved_bytes

SMALL = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": [16, 32, 32],
    "num_res_blocks": [1, 2, 1], "norm_num_groups": 8, "norm_eps": 1e-6, "attention_levels": [False, False, False],
    "num_splits": 1, "dim_split": 1,
}  # fmt: skip


def stock_network(**changes) -> AutoencoderKlMaisi:
    torch.manual_seed(0)
    network = AutoencoderKlMaisi(**{**SMALL, **changes})
    for name, parameter in network.named_parameters():  # norms that are not the identity, biases that are not 0
        if "norm" in name or "bias" in name or parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("weight" in name), 0.3)
    return network


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


def test_weights_go_both_ways(tmp_path: Path) -> None:
    stock = stock_network()
    fast = FastAutoencoderKlMaisi(copy.deepcopy(stock))
    save_weights(fast.bfloat16(), tmp_path / "ours.pt")
    state = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert all(t.dtype == torch.float32 for t in state.values())
    AutoencoderKlMaisi(**SMALL).load_state_dict(state, strict=True)
    for layout in (stock.state_dict(), {"unet_state_dict": stock.state_dict(), "epoch": 3}):
        torch.save(layout, tmp_path / "theirs.pt")
        other = FastAutoencoderKlMaisi(AutoencoderKlMaisi(**SMALL))
        load_weights(other, tmp_path / "theirs.pt")
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in stock.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pt", "theirs.pt"]


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError, match=r"weights\.pt: no such weights file"):
        load_weights(network, path)
    torch.save(stock_network(num_channels=[32, 32, 32]).state_dict(), path)
    with pytest.raises(UserError, match=r"weights\.pt: encoder\.blocks\.0\.conv\.conv\.weight is \(32, 1, 3, 3, 3\)"):
        load_weights(network, path)
    torch.save({k: v for k, v in network.state_dict().items() if "quant_conv_mu" not in k}, path)
    with pytest.raises(UserError, match="lacks quant_conv_mu.conv.bias"):
        load_weights(network, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="is damaged"):
        load_weights(network, path)
    with path.open("wb") as file:
        pickle.dump(Attack(tmp_path / "owned"), file)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(network, path)
    torch.save({"weights": Attack(tmp_path / "owned")}, path)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(network, path)
    assert not (tmp_path / "owned").exists()


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
