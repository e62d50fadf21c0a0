"""What a ControlNet's loss makes of regions: NV-Generate-CTMR's formulas, written out."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from scripts.training.diffusion import mean_errors
from scripts.training.region_losses import RegionLosses, at_latent

SIZE = (4, 2, 3)


def velocities(count: int, seed: int = 0) -> list[torch.Tensor]:
    """(2, 4, X, Y, Z) each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, *SIZE, generator=generator, requires_grad=True) for _ in range(count)]


def maps(share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Label maps (2, 1, 4 X, 4 Y, 4 Z) of labels 0 to 9, and those without 7 and 8, which are a share of the voxels."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 7, (2, 1, *(4 * n for n in SIZE)), generator=generator)
    region = torch.rand(labels.shape, generator=generator) < share
    labels = torch.where(region, 7 + (labels > 3), labels)
    return labels.to(torch.uint8), torch.where(labels > 6, 1, labels).to(torch.uint8)


def test_the_nearest_voxel_is_the_one_that_pytorch_takes() -> None:
    labels, _ = maps(0.3)
    assert torch.equal(at_latent(labels).float(), F.interpolate(labels.float(), SIZE, mode="nearest"))


@pytest.mark.parametrize("weight", [100.0, 0.0, 2.5])
def test_labels_weigh_more_in_a_mean_over_all(weight: float) -> None:
    told, velocity = velocities(2)
    labels, _ = maps(0.3)
    weights = torch.ones_like(velocity)
    for sample, x, y, z in product(range(2), *map(range, SIZE)):
        if int(labels[sample, 0, 4 * x, 4 * y, 4 * z]) in (3, 7):
            weights[sample, :, x, y, z] = weight
    assert 0 < (weights == weight).float().mean() < 1
    losses = RegionLosses(labels=(3, 7, 200), weight=weight)
    found = mean_errors(told, velocity, losses.weights(labels))
    assert found.shape == (2,)
    torch.testing.assert_close(found.mean(), ((told - velocity).abs() * weights).mean())


def test_nothing_weighs_more_where_nothing_is_to() -> None:
    labels, _ = maps(0.3)
    assert RegionLosses(labels=(3,)).weights(labels) is None and RegionLosses(weight=5.0).weights(labels) is None
    assert RegionLosses(labels=(3,)).weighted == () and RegionLosses(labels=(3,), weight=0.0).weighted == (3,)


def contrast(
    told: torch.Tensor, without: torch.Tensor, velocity: torch.Tensor, region: torch.Tensor, delta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula: `region` (B, 1, 4 X, 4 Y, 4 Z) bool; its dilation has a window of 3 voxels."""
    wide = torch.zeros_like(region)
    for sample, x, y, z in region[:, 0].nonzero().tolist():
        wide[sample, 0, max(x - 1, 0) : x + 2, max(y - 1, 0) : y + 2, max(z - 1, 0) : z + 2] = True
    inside, outside = (
        F.interpolate(m.float(), SIZE, mode="nearest").repeat(1, told.shape[1], 1, 1, 1) for m in (region, ~wide)
    )
    first = -((told - without).abs() * inside).sum() / (inside.sum() + 1e-5)
    second = ((without - velocity).abs() * outside).sum() / (outside.sum() + 1e-5)
    return torch.relu(first + delta) - delta, second


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0], ids=["no region", "some", "nothing else"])
@pytest.mark.parametrize("delta", [2.0, 0.01])
def test_the_contrast_is_the_formula_written_out(share: float, delta: float) -> None:
    told, without, velocity = velocities(3)
    labels, other = maps(share)
    wanted = contrast(told, without, velocity, labels != other, delta)
    found = RegionLosses(contrast_weight=0.01, delta=delta).contrast(told, without, velocity, labels, other)
    torch.testing.assert_close(found, wanted)
    inputs = (told, without)
    ours, theirs = (torch.autograd.grad(sum(pair), inputs, allow_unused=True) for pair in (found, wanted))
    torch.testing.assert_close(ours, theirs)


def test_the_contrast_is_content_with_a_difference_of_delta_and_wants_none_outside() -> None:
    labels = torch.zeros(1, 1, 16, 8, 12, dtype=torch.uint8)
    labels[..., :4, :4, :4] = 9  # one voxel of the latent, of 24
    other, velocity = torch.zeros_like(labels), torch.zeros(1, 4, *SIZE)
    losses = RegionLosses(contrast_weight=1.0, delta=2.0)
    for difference, wanted in ((0.0, 0.0), (1.5, -1.5), (2.0, -2.0), (7.0, -2.0)):
        first, second = losses.contrast(velocity + difference, velocity, velocity, labels, other)
        assert float(first) == pytest.approx(wanted, abs=1e-4) and float(second) == 0
    without = torch.full_like(velocity, 0.5)
    without[..., 0, 0, 0] = 50.0  # within, where it may be anything
    assert float(losses.contrast(velocity, without, velocity, labels, other)[1]) == pytest.approx(0.5, abs=1e-4)


def test_the_knobs_are_those_of_nv_generate_ctmr() -> None:
    knobs = {"weighted_loss_label": [23], "weighted_loss": 100}  # as it was before the contrast
    assert RegionLosses.of(knobs) == RegionLosses((23,), 100.0, 0.0, 2.0)
    knobs |= {"use_region_contrasive_loss": True, "region_contrasive_loss_delta": 3}
    assert RegionLosses.of(knobs) == RegionLosses((23,), 100.0, 0.01, 3.0)
    assert RegionLosses.of(knobs | {"region_contrasive_loss_weight": 0.5}).contrast_weight == 0.5
    assert RegionLosses.of(knobs | {"use_region_contrasive_loss": False}).contrast_weight == 0.0
