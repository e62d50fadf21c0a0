from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.measure.latents import LatentHealth


def test_latent_health_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    parts = [(rng.normal(1, 2, (1, 3, 4, 5, n)), rng.uniform(0.1, 0.4, (1, 3, 4, 5, n))) for n in (6, 9)]
    healths = []
    for mu, sigma in parts:
        healths.append(LatentHealth())
        healths[-1].update(torch.from_numpy(mu), torch.from_numpy(sigma))
    health = LatentHealth.merged([LatentHealth.from_sums(h.sums()) for h in healths])
    mu, sigma = (np.concatenate(p, axis=-1) for p in zip(*parts, strict=True))
    got = health.compute()
    assert got["scale_factor"] == pytest.approx(1 / mu.std())
    assert got["latent_std_1"] == pytest.approx(mu[:, 1].std())
    assert got["posterior_noise_share"] == pytest.approx((sigma**2).mean() / ((sigma**2).mean() + mu.var()))
    statistics = health.statistics()
    assert statistics["count"] == mu.size and statistics["std"] == pytest.approx(mu.std())
    assert statistics["channel_mean"] == pytest.approx(mu.mean((0, 2, 3, 4)).tolist())
    assert statistics["channel_std"] == pytest.approx(mu.std((0, 2, 3, 4)).tolist())
