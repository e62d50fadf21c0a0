from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from scripts.measure.pictures import save_comparison, three_planes


def test_planes_stand_upright() -> None:
    volume = np.zeros((6, 8, 10))
    volume[:, :, -1] = 1.0  # top of the head
    volume[:, -1, :] = 0.5  # front
    picture = three_planes(volume)
    assert picture.shape == (10, 8 + 6 + 6)
    assert picture[0, :7] == pytest.approx(1) and picture[0, 8:14] == pytest.approx(1)  # top row of sagittal, coronal
    assert picture[0, 14:] == pytest.approx(0.5) and picture[1:, 14:].max() == 0  # front is up in the axial plane


def test_comparison_is_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    original = rng.random((20, 24, 28))
    save_comparison(original, original + 0.01, (1, 1, 2), tmp_path / "a.png", "test")
    picture = imread(tmp_path / "a.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
