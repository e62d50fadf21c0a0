"""A patch is what MONAI's stock transforms make of the whole volume with the same parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    Flip,
    LoadImage,
    Orientation,
    Rotate,
    Rotate90,
    ScaleIntensityRange,
    Spacing,
    SpatialCrop,
    SpatialPad,
    Zoom,
)

from scripts.common.errors import UserError
from scripts.data.patches import PatchParameters, RandomPatch, draw, place
from scripts.data.store import Store
from scripts.phantom import make_phantom
from tests.helpers import oriented_affine, save_nifti

SHAPE, PATCH = (52, 44, 38), (24, 28, 20)
SMALL = (18, 40, 17)  # smaller than the patch along two axes
ORIENTATIONS = ["LPS", "RAS", "PIR"]


def smooth(shape: tuple[int, ...]) -> np.ndarray:
    """Slow waves in HU: what interpolation of any kind gets right."""
    x, y, z = np.meshgrid(*[np.linspace(0, 2, n) for n in shape], indexing="ij")
    return (500 * np.sin(2 * x + y) * np.cos(1.5 * z + 0.5)).astype(np.int16)


def make_volume(folder: Path, data: np.ndarray, axcodes: str, spacing: tuple[float, float, float]) -> Path:
    return save_nifti(folder / f"{axcodes}.nii.gz", data, oriented_affine(axcodes, spacing))


def moved(rng: np.random.Generator, zoomed: bool = False, rotated: bool = False) -> PatchParameters:
    """A draw that moves the volume and leaves its intensities."""
    zoom = float(rng.uniform(0.5, 1.5)) if zoomed else 1.0
    angles = tuple(rng.uniform(-0.1, 0.1, 3)) if rotated else (0.0, 0.0, 0.0)
    return replace(draw(rng, rand_zoom=False), intensity_scale=1.0, intensity_shift=0.0, zoom=zoom, angles=angles)


@cache
def loaded(path: Path) -> torch.Tensor:
    """The whole volume, as the reference begins with it."""
    load = Compose([LoadImage(), EnsureChannelFirst(), Orientation("RAS")])
    return ScaleIntensityRange(-1000, 1000, 0, 1, clip=True)(load(path))  # type: ignore[return-value]


def stock(path: Path, parameters: PatchParameters, patch: tuple[int, ...], lazy: bool, spacing=None) -> torch.Tensor:
    """The reference's order of transforms on the whole volume, with given parameters."""
    image = loaded(path)
    steps = [] if spacing is None else [Spacing(spacing, mode="bilinear")]
    steps += [Flip(axis) for axis, flip in enumerate(parameters.flips) if flip]
    planes = [(0, 1), (1, 2), (0, 2)]
    steps += [Rotate90(k, plane) for k, plane in zip(parameters.quarter_turns, planes, strict=True) if k]
    if parameters.zoom != 1:
        steps.append(Zoom(parameters.zoom, mode="bilinear", padding_mode="border", keep_size=False))
    if any(parameters.angles):
        steps.append(Rotate(parameters.angles, keep_size=True, mode="bilinear", padding_mode="border"))
    moved = Compose(steps, lazy=lazy)(image) if steps else image
    padded = SpatialPad(patch)(torch.as_tensor(moved))
    room = np.array(padded.shape[1:]) - patch
    start = [int(np.floor(u * (r + 1))) for u, r in zip(parameters.position, room, strict=True)]
    cropped = SpatialCrop(roi_start=start, roi_end=[s + p for s, p in zip(start, patch, strict=True)])(padded)
    return torch.as_tensor(cropped)


def ours(path: Path, folder: Path, parameters: PatchParameters, patch: tuple[int, ...], **options) -> torch.Tensor:
    volume = Store(folder / "store").open({"image": str(path)})
    return RandomPatch(patch, **options).apply(volume, parameters)


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("shape", [SHAPE, SMALL])
def test_flips_and_quarter_turns_are_exact(tmp_path: Path, axcodes: str, shape: tuple[int, int, int]) -> None:
    path = make_volume(tmp_path, make_phantom(shape, (7, 7, 8), seed=1), axcodes, (1.0, 1.0, 2.5))
    rng = np.random.default_rng([0, ORIENTATIONS.index(axcodes), *shape])
    for _ in range(12):
        parameters = moved(rng)
        expected = stock(path, parameters, PATCH, lazy=False)
        assert torch.equal(ours(path, tmp_path, parameters, PATCH), expected), parameters


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
@pytest.mark.parametrize("shape", [SHAPE, SMALL])
def test_zoom_and_rotation_match_lazy_resampling(tmp_path: Path, axcodes: str, spacing, shape) -> None:
    path = make_volume(tmp_path, make_phantom(shape, (7, 7, 8), seed=2), axcodes, spacing)
    rng = np.random.default_rng([1, ORIENTATIONS.index(axcodes), *shape, spacing == (1.0, 1.0, 1.0)])
    for kind in range(6):
        parameters = moved(rng, zoomed=kind % 3 != 1, rotated=kind % 3 != 0)
        difference = ours(path, tmp_path, parameters, PATCH) - stock(path, parameters, PATCH, lazy=True)
        assert difference.abs().mean() < 1e-3, (parameters, difference.abs().mean())


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
@pytest.mark.parametrize("shape", [SHAPE, SMALL])
def test_zoom_and_rotation_match_eager_resampling_of_a_smooth_volume(tmp_path: Path, axcodes: str, shape) -> None:
    path = make_volume(tmp_path, smooth(shape), axcodes, (1.0, 1.0, 2.5))
    rng = np.random.default_rng([2, ORIENTATIONS.index(axcodes), *shape])
    for _ in range(6):
        parameters = moved(rng, zoomed=True, rotated=True)
        difference = ours(path, tmp_path, parameters, PATCH) - stock(path, parameters, PATCH, lazy=False)
        assert difference.abs().mean() < 3e-3, (parameters, difference.abs().mean())


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_fixed_spacing_matches_monai(tmp_path: Path, axcodes: str) -> None:
    path = make_volume(tmp_path, make_phantom(SHAPE, (7, 7, 8), seed=3), axcodes, (0.9, 0.7, 2.5))
    rng = np.random.default_rng([3, ORIENTATIONS.index(axcodes)])
    for _ in range(4):
        parameters = moved(rng)
        expected = stock(path, parameters, PATCH, lazy=False, spacing=(1.2, 1.1, 1.5))
        got = ours(path, tmp_path, parameters, PATCH, spacing_type="fixed", spacing=(1.2, 1.1, 1.5))
        assert (got - expected).abs().max() < 1e-4


def test_intensity_jitter_leaves_padding_at_zero(tmp_path: Path) -> None:
    data = np.full((10, 40, 40), 200, np.int16)
    data[0, 0, 0] = 0  # outside the patch; a constant volume would be refused
    path = make_volume(tmp_path, data, "RAS", (1.0, 1.0, 1.0))
    parameters = PatchParameters(intensity_scale=1.1, intensity_shift=-0.05)
    patch = ours(path, tmp_path, parameters, (20, 20, 20))
    assert torch.equal(patch[:, :5], torch.zeros(1, 5, 20, 20))
    assert torch.allclose(patch[:, 5:15], torch.tensor(0.6 * 1.1 - 0.05))


def test_draw_has_the_references_distribution() -> None:
    rng = np.random.default_rng(4)
    draws = [draw(rng) for _ in range(4000)]
    for axis in range(3):
        assert np.mean([d.flips[axis] for d in draws]) == pytest.approx(0.5, abs=0.03)
        turns = np.bincount([d.quarter_turns[axis] for d in draws], minlength=4) / len(draws)
        assert turns == pytest.approx([1 / 2, 1 / 6, 1 / 6, 1 / 6], abs=0.03)
        angles = np.array([d.angles[axis] for d in draws])
        assert np.mean(angles != 0) == pytest.approx(0.3, abs=0.03)
        assert np.abs(angles).max() == pytest.approx(0.1, abs=0.003)
    for values, centre, half in (
        (np.array([d.zoom for d in draws]), 1.0, 0.5),
        (np.array([d.intensity_scale for d in draws]), 1.0, 0.1),
        (np.array([d.intensity_shift for d in draws]), 0.0, 0.05),
    ):
        drawn = values[values != centre]
        assert len(drawn) / len(draws) == pytest.approx(0.3, abs=0.03)
        assert drawn.mean() == pytest.approx(centre, abs=half / 10)
        assert np.abs(drawn - centre).max() == pytest.approx(half, rel=0.02)


def test_every_place_is_equally_likely() -> None:
    rng = np.random.default_rng(5)
    starts = [place(draw(rng, random_aug=False), (10, 10, 10), (8, 8, 8)).offset for _ in range(3000)]
    assert np.bincount(np.array(starts)[:, 0].astype(int)) / 3000 == pytest.approx([1 / 3] * 3, abs=0.03)


def test_bad_options_are_named() -> None:
    with pytest.raises(UserError, match="'zoomed' is unknown; use one of original, fixed, rand_zoom"):
        RandomPatch((8, 8, 8), spacing_type="zoomed")
    with pytest.raises(UserError, match="'fixed' needs spacing"):
        RandomPatch((8, 8, 8), spacing_type="fixed")
