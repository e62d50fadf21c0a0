from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import PatchDiscriminator
from torch import nn
from torch.utils.data import DataLoader

from scripts.autoencoder import FastAutoencoderKlMaisi
from scripts.errors import UserError
from scripts.evaluator import LatentHealth, VaeEvaluator, VolumeInferer, reconstruction_metrics
from scripts.losses import LeastSquaresAdversarialLoss, PerceptualLoss, VaeLoss
from tests.test_autoencoder import stock_network


class _Pooled(nn.Module):
    """Stands for an autoencoder whose reconstruction is exact and whose latents are 4 x 4 x 4 means."""

    def reconstruct(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mu = nn.functional.avg_pool3d(x, 4)
        return x, mu, mu * 0 + 0.5


def test_windows_of_the_latents_fit_whatever_the_overlap() -> None:
    volume = torch.rand(1, 1, 60, 44, 52)
    for window, overlap in (([24, 24, 24], 0.25), ([20, 16, 28], 0.6), ([16, 16, 16], 0.9)):
        _, mu, _ = VolumeInferer(window, overlap=overlap)(volume, _Pooled().reconstruct)
        assert torch.allclose(mu, nn.functional.avg_pool3d(volume, 4), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16, 16), (40, 37, 18), (9, 50, 33)])
@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_windows_give_back_the_volume_whatever_its_size(size: tuple[int, int, int], overlap: float) -> None:
    volume = torch.rand(1, 1, *size)
    reconstruction, mu, sigma = VolumeInferer([16, 16, 16], overlap=overlap)(volume, _Pooled().reconstruct)
    assert torch.allclose(reconstruction, volume, atol=1e-6)
    padded = [-(-n // 4) for n in size]
    assert list(mu.shape[2:]) == padded and torch.allclose(sigma, torch.tensor(0.5))
    inside = [n // 4 for n in size]
    if list(size) == [4 * n for n in inside]:
        assert torch.allclose(mu, nn.functional.avg_pool3d(volume, 4), atol=1e-6)


def test_no_window_takes_the_volume_in_one_piece() -> None:
    seen = []

    def network(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(tuple(x.shape[2:]))
        return _Pooled().reconstruct(x)

    VolumeInferer(None)(torch.rand(1, 1, 30, 21, 12), network)
    assert seen == [(32, 24, 12)]


def test_latent_health_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.normal(1, 2, (1, 3, 4, 5, n)), rng.uniform(0.1, 0.4, (1, 3, 4, 5, n))) for n in (6, 9)]
    health = LatentHealth()
    for mu, sigma in parts:
        health.update(torch.from_numpy(mu), torch.from_numpy(sigma))
    mu, sigma = (np.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
    got = health.compute()
    assert got["scale_factor"] == pytest.approx(1 / mu.std())
    assert got["latent_std_1"] == pytest.approx(mu[:, 1].std())
    assert got["posterior_noise_share"] == pytest.approx((sigma**2).mean() / ((sigma**2).mean() + mu.var()))


def test_reconstruction_metrics_are_those_of_the_definitions() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.random((1, 1, 20, 24, 28)).astype(np.float32) for _ in range(2))
    got = reconstruction_metrics(torch.from_numpy(x), torch.from_numpy(y), 2000.0)
    assert got["psnr"] == pytest.approx(10 * math.log10(1 / ((x - y) ** 2).mean()), abs=1e-4)
    assert got["mae_hu"] == pytest.approx(2000 * np.abs(x - y).mean(), rel=1e-5)
    same = reconstruction_metrics(torch.from_numpy(y), torch.from_numpy(y), 2000.0)
    assert same["ssim"] == pytest.approx(1) and same["psnr"] > 100 and same["mae_hu"] == 0
    assert abs(got["ssim"]) < 0.1
    thin = torch.rand(1, 1, 30, 30, 6)
    assert reconstruction_metrics(thin, thin, 1.0)["ssim"] == pytest.approx(1)


def make_evaluator(items: list[dict], network: FastAutoencoderKlMaisi, **options: Any) -> VaeEvaluator:
    return VaeEvaluator(
        device="cpu",
        val_data_loader=DataLoader(items, 1),  # type: ignore[arg-type]
        autoencoder=network,
        generator_loss=VaeLoss(PerceptualLoss(pretrained=False), kl_weight=1e-3),
        discriminator=PatchDiscriminator(spatial_dims=3, channels=8, in_channels=1, norm="INSTANCE"),
        adversarial_loss=LeastSquaresAdversarialLoss(),
        inferer=VolumeInferer([16, 16, 16]),
        amp=False,
        **options,
    )


def item(size: int, error: str = "") -> dict[str, Any]:
    image = torch.rand(1, 20, 24, size) if not error else torch.full((1, 4, 4, 4), torch.nan)
    return {"image": image, "range": 2000.0, "error": error}


def test_evaluation_is_deterministic_and_averages_volumes() -> None:
    torch.manual_seed(0)
    volumes = [item(17 + 4 * i) for i in range(3)]
    network = FastAutoencoderKlMaisi(stock_network())

    def evaluate(items: list[dict]) -> dict[str, float]:
        torch.manual_seed(3)  # of the discriminator
        evaluator = make_evaluator(items, network)
        evaluator.run()
        return evaluator.state.metrics

    network.train()
    together = evaluate(volumes)
    assert network.training
    assert together == evaluate(volumes)
    apart = [evaluate([v]) for v in volumes]
    for name in ("loss", "recons_loss", "kl_loss", "p_loss", "psnr", "ssim", "mae_hu", "adv_loss", "d_loss"):
        assert together[name] == pytest.approx(np.mean([a[name] for a in apart]), rel=1e-6)
    expected = together["recons_loss"] + 1e-3 * together["kl_loss"] + 0.3 * together["p_loss"]
    assert together["loss"] == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_validation_has_no_metrics_and_the_next_one_is_whole() -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    evaluator = make_evaluator([item(16), item(16), item(16)], network)
    seen: list[int] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.iteration))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: len(seen) == 1 and e.interrupt())
    evaluator.run()
    assert evaluator.state.metrics == {} and evaluator.interrupted and seen == [1]
    evaluator.run()
    assert evaluator.state.metrics["psnr"] > 0 and seen == [1, 1, 2, 3]


def test_a_volume_that_cannot_be_read_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    good = item(16)
    evaluator = make_evaluator([item(0, "v.nii.gz: gone"), good], network, max_bad_volumes=1)
    torch.manual_seed(0)
    evaluator.run()
    assert "passed over in validation: v.nii.gz: gone" in caplog.text
    alone = make_evaluator([good], network)
    alone.run()
    assert evaluator.state.metrics["psnr"] == alone.state.metrics["psnr"]
    strict = make_evaluator([item(0, "v.nii.gz: gone"), good], network, max_bad_volumes=0)
    with pytest.raises(
        UserError, match=r"1 volumes could not be validated \(max_bad_volumes is 0\), the last: v.nii.gz: gone"
    ):
        strict.run()


def test_running_out_of_memory_says_which_knob_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make_evaluator([item(16)], FastAutoencoderKlMaisi(stock_network()))

    def fail(window: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(evaluator, "_reconstruct", fail)
    with pytest.raises(UserError, match=r"out of memory with windows of \[16, 16, 16\] .*lower .*val_sliding_window"):
        evaluator.run()
