from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from scripts.measure.pictures import comparison_planes, save_comparison, three_planes


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


def test_titles_may_hold_any_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    draw = Figure.suptitle
    monkeypatch.setattr(Figure, "suptitle", lambda self, t, **kwargs: titles.append(t) or draw(self, t, **kwargs))
    volume = np.random.default_rng(0).random((6, 8, 10))
    for title in ("$x$ $ 100% <b>", "li\nne", "no\udcff", "é"):
        save_comparison(volume, volume, (1, 1, 1), tmp_path / "a.png", title)
    assert [t.partition(", window")[0] for t in titles] == ["$x$ $ 100% <b>", r"li\nne", r"no\udcff", "é"]


def test_planes_stand_side_by_side_at_one_scale() -> None:
    original = np.full((20, 24, 14), 0.35)  # 20 x 24 x 28 mm
    found = comparison_planes(
        original, original + np.where(np.arange(20) < 10, 0.2, -0.2)[:, None, None], (1, 1, 2), 2000.0, 56
    )
    pictures = {name: Image.open(BytesIO(b64decode(uri.partition(",")[2]))) for name, uri in found.items()}
    assert list(pictures) == ["original", "reconstruction", "error"]
    assert {p.size for p in pictures.values()} == {(40 + 40 + 48 + 2 * 2, 56)}  # 2 pixels a mm, and two gaps
    gray, error = np.asarray(pictures["original"]), np.asarray(pictures["error"]).astype(int)
    assert abs(int(gray[28, 20]) - 127) < 6 and gray[1, 20] < 20  # axial: 48 pixels high, in the middle
    red, blue = error[28, 5], error[28, 35]
    assert red[0] - red[2] > 50 and blue[2] - blue[0] > 50  # too bright, too dark
