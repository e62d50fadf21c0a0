"""Fréchet distance, histograms of HU, and nearest neighbours, against closed formulas and laws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics.fid import get_fid_score
from scipy.stats import wasserstein_distance

from scripts.measure.features import (
    Gaussian,
    frechet_distance,
    hu_histogram,
    in_geometry,
    nearest,
    plane_features,
    thumbnail,
    wasserstein,
)


def of(vectors: torch.Tensor, *cuts: int) -> Gaussian:
    """The Gaussian of vectors (N, C), put together from parts."""
    parts = []
    for part in torch.tensor_split(vectors, cuts):
        gaussian = Gaussian(vectors.shape[1])
        gaussian.update(part)
        parts.append(gaussian)
    return Gaussian.merged(parts)


def drawn(count: int, features: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator)
    return torch.randn(count, features, generator=generator) @ mix + torch.randn(features, generator=generator)


def exactly(mean: torch.Tensor, covariance: torch.Tensor) -> Gaussian:
    gaussian = Gaussian(len(mean))
    gaussian.count, gaussian.sum = 100, 100 * mean
    gaussian.square = 99 * covariance + 100 * torch.outer(mean, mean)
    return gaussian


def test_a_gaussian_has_mean_and_covariance_of_its_vectors() -> None:
    vectors = drawn(50)
    gaussian = of(vectors, 7, 20)
    assert gaussian.count == 50
    assert gaussian.mean.numpy() == pytest.approx(vectors.double().numpy().mean(0), abs=1e-12)
    assert gaussian.covariance.numpy() == pytest.approx(np.cov(vectors.double().numpy().T), abs=1e-11)


@pytest.mark.parametrize("count", [100, 5])  # of full rank, and not
def test_the_distance_of_a_set_to_itself_is_0_in_any_order(count: int) -> None:
    vectors = drawn(count)
    assert frechet_distance(of(vectors), of(vectors.flip(0), 3)) == pytest.approx(0, abs=1e-6)


def test_the_distance_is_that_of_the_closed_formula() -> None:
    mean, other = torch.tensor([1.0, 2, 3]).double(), torch.tensor([2.0, 0, 3]).double()
    a, b = torch.tensor([1.0, 4, 9]).double(), torch.tensor([4.0, 1, 0]).double()
    # Of covariances that commute: |difference of means|^2 + sum of (root a - root b)^2.
    wanted = 5 + (1 - 2) ** 2 + (2 - 1) ** 2 + 3**2
    assert frechet_distance(exactly(mean, a.diag()), exactly(other, b.diag())) == pytest.approx(wanted)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    turned = [exactly(turn @ m, turn @ v.diag() @ turn.T) for m, v in ((mean, a), (other, b))]
    assert frechet_distance(*turned) == pytest.approx(wanted)


def test_the_distance_is_symmetric_and_that_of_monai() -> None:
    x, y = drawn(80), drawn(60, seed=1)
    there, back = frechet_distance(of(x), of(y)), frechet_distance(of(y), of(x))
    assert there == pytest.approx(back, rel=1e-9) and there == pytest.approx(float(get_fid_score(x, y)), rel=1e-3)


def test_a_shift_costs_its_square_whatever_the_rank() -> None:
    vectors = drawn(6)
    assert frechet_distance(of(vectors), of(vectors + 0.5)) == pytest.approx(12 * 0.25, abs=1e-5)


def test_histograms_shifted_by_10_hu_are_10_hu_apart() -> None:
    rng = np.random.default_rng(0)
    voxels = rng.integers(-900, 900, (12, 10, 8)).astype(np.int16)
    here, there = hu_histogram(voxels), hu_histogram(voxels.astype(np.float32) + 10)
    assert here.shape == (2001,) and here.sum() == pytest.approx(1)
    assert wasserstein(here, there) == pytest.approx(10) == wasserstein(there, here) and wasserstein(here, here) == 0
    other = rng.normal(0, 300, (9, 9, 9)).astype(np.float32)
    wanted = wasserstein_distance(voxels.ravel(), np.rint(other.clip(-1000, 1000)).ravel())
    assert wasserstein(here, hu_histogram(other)) == pytest.approx(wanted)
    beyond = hu_histogram(np.array([-3000, 3000], np.int16))
    assert beyond[0] == beyond[-1] == 0.5


def test_volumes_come_to_one_geometry() -> None:
    volume = torch.rand(8, 10, 12)
    assert torch.equal(in_geometry(volume, [1, 1, 2], [1, 1, 2], [8, 10, 12]), volume)
    small = in_geometry(volume, [1, 1, 2], [2, 2, 2], [4, 9, 6])
    assert small.shape == (4, 9, 6) and small[:, :2].abs().max() == small[:, 7:].abs().max() == 0
    centre = torch.nn.functional.interpolate(volume[None, None], (4, 5, 12), mode="trilinear")[0, 0, :, :, 3:9]
    assert torch.allclose(small[:, 2:7], centre)


@pytest.mark.parametrize(
    ("ratio", "xy", "yz", "zx"),
    [(1, range(10), range(6), range(8)), (0.4, range(3, 7), range(1, 4), range(2, 5)), (0.01, [4], [2], [3])],
)
def test_slices_are_the_central_ones_of_each_plane(ratio: float, xy: range, yz: range, zx: range) -> None:
    x, y, z = torch.meshgrid(*(torch.arange(n).float() for n in (6, 8, 10)), indexing="ij")
    for volume, plane, wanted in ((z, "xy", xy), (x, "yz", yz), (y, "zx", zx)):
        vectors = plane_features(volume, lambda slices: slices.mean((2, 3)), ratio)[plane]
        assert vectors.flatten().tolist() == list(wanted)


def test_a_thumbnail_has_the_mean_hu_of_boxes() -> None:
    volume = torch.rand(64, 32, 96)
    boxes = volume.reshape(32, 2, 32, 1, 32, 3).mean((1, 3, 5)) * 2000 - 1000
    assert torch.allclose(thumbnail(volume), boxes, atol=1e-3)
    assert thumbnail(torch.rand(20, 30, 40)).shape == (32, 32, 32)


def test_a_copy_is_nearest_at_distance_0() -> None:
    others = torch.rand(5, 32, 32, 32) * 2000 - 1000
    which, distances = nearest(torch.stack([others[3], others[1] + 7]), others)
    assert which == [3, 1] and distances[0] == 0 and distances[1] == pytest.approx(7, abs=1e-3)
