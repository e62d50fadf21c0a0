from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.metrics.regression import SSIMMetric
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from scripts.measure.metrics import TISSUES, reconstruction_metrics, tissue_errors


@pytest.mark.parametrize("shape", [(20, 24, 28), (75, 13, 40), (11, 33, 12)])
def test_reconstruction_metrics_equal_scikit_image(shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(1)
    y = rng.random(shape).astype(np.float32)
    x = np.clip(y + rng.normal(0, 0.1, shape), 0, 1).astype(np.float32)
    got = reconstruction_metrics(torch.from_numpy(x), torch.from_numpy(y), 2000.0)
    error = x.astype(np.float64) - y
    assert got["psnr"] == pytest.approx(peak_signal_noise_ratio(y, x, data_range=1.0), abs=1e-4)
    assert got["mae_hu"] == pytest.approx(2000 * np.abs(error).mean(), rel=1e-6)
    assert got["rmse_hu"] == pytest.approx(2000 * math.sqrt((error**2).mean()), rel=1e-6)
    wanted = structural_similarity(
        y.astype(np.float64), x.astype(np.float64), gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=1.0,
    )  # fmt: skip
    assert got["ssim"] == pytest.approx(wanted, abs=1e-5)


def test_ssim_equals_monai_also_of_thin_volumes() -> None:
    torch.manual_seed(0)
    for shape, window in (((30, 30, 30), 11), ((30, 30, 6), 5)):
        x, y = torch.rand(1, 1, *shape), torch.rand(1, 1, *shape)
        wanted = SSIMMetric(3, win_size=window)(x, y)
        assert reconstruction_metrics(x, y, 1.0)["ssim"] == pytest.approx(float(wanted), abs=1e-5)
        assert reconstruction_metrics(y, y, 1.0)["ssim"] == pytest.approx(1)
    assert reconstruction_metrics(y, y, 1.0) | {"ssim": 1} == {"psnr": 120, "ssim": 1, "mae_hu": 0, "rmse_hu": 0}


def test_tissues_share_out_all_voxels_and_the_whole_error() -> None:
    rng = np.random.default_rng(2)
    hu = rng.integers(-1000, 1001, (40, 12, 9)).astype(np.float32)
    error = rng.normal(0, 50, hu.shape).astype(np.float32)
    original = torch.from_numpy((hu + 1000) / 2000)
    found = tissue_errors(original + torch.from_numpy(error / 2000), original, (-1000.0, 1000.0))
    for tissue, (low, high) in TISSUES.items():
        inside = (hu >= low) & (hu < high)
        assert found[f"voxels_{tissue}"] == inside.sum()
        assert found[f"mae_hu_{tissue}"] == pytest.approx(np.abs(error[inside]).mean(), rel=1e-4)
    shares = [found[f"mae_hu_{t}"] * found[f"voxels_{t}"] for t in TISSUES]  # type: ignore[operator]
    assert sum(shares) / hu.size == pytest.approx(np.abs(error).mean(), rel=1e-4)
    nothing = tissue_errors(torch.zeros(3, 4, 5), torch.zeros(3, 4, 5), (-1000.0, 1000.0))
    assert nothing["mae_hu_bone"] is None and nothing["voxels_bone"] == 0 and nothing["voxels_air"] == 60
