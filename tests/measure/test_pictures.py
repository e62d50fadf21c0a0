from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from PIL import Image

from scripts.measure.pictures import (
    comparison_planes,
    obeying_planes,
    save_comparison,
    save_rows,
    save_sheet,
    three_planes,
)


def test_planes_stand_upright() -> None:
    volume = np.zeros((6, 8, 10))
    volume[:, :, -1] = 1.0  # top of the head
    volume[:, -1, :] = 0.5  # front
    picture = three_planes(volume)
    assert picture.shape == (10, 8 + 6 + 6)
    assert picture[0, :7] == pytest.approx(1) and picture[0, 8:14] == pytest.approx(1)  # top row of sagittal, coronal
    assert picture[0, 14:] == pytest.approx(0.5) and picture[1:, 14:].max() == 0  # front is up in the axial plane


def test_planes_are_to_scale() -> None:
    x, y, z = np.ogrid[:16, :32, :10]
    centres = ((2 * (x - 7.5)) ** 2 + (y - 15.5) ** 2 + (4 * (z - 4.5)) ** 2) ** 0.5  # mm
    ball = (centres < 13).astype(np.int16)
    picture = three_planes(ball, (2.0, 1.0, 4.0))
    assert picture.shape == (40, 32 + 32 + 32) and picture.dtype == np.float32
    for left in (0, 32, 64):  # sagittal, coronal, axial: a disc as high as it is wide
        inside = picture[:, left : left + 32] > 0.5
        extent = [np.flatnonzero(inside.any(axis)) for axis in (0, 1)]
        assert [e[-1] - e[0] + 1 for e in extent] == pytest.approx([26, 26], abs=2)
    assert np.array_equal(three_planes(ball, (0.7, 0.7, 0.7)), three_planes(ball))


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (16, 4, 4), (17, 4, 5)])
def test_a_sheet_shows_all_volumes_with_their_names(
    count: int, columns: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **k: figures.append(self) or save(self, *rest, **k))
    pictures = {f"seed {i} $x$": np.full((20, 60), i / count) for i in range(count)}
    save_sheet(pictures, tmp_path / "a.png", "of a test", intensity_range=2000.0 if count > 1 else 1000.0)
    (figure,) = figures
    assert [axis.get_title() for axis in figure.axes if axis.images] == list(pictures)
    height, width = imread(tmp_path / "a.png").shape[:2]
    assert width == columns * 450 and height == pytest.approx(rows * 180 + 50, abs=1)
    window = "window -1000..400 HU" if count > 1 else "window 0..70 % of the range"
    assert figure.get_suptitle() == f"of a test\nsagittal, coronal, axial; {window}"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


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


def test_a_volume_beside_its_map_and_its_distance_to_the_real_one() -> None:
    labels = np.zeros((6, 8, 10), np.uint8)
    labels[:, 2:6] = 7
    labels[:, 4:6] = 200
    volume = np.full(labels.shape, 0.35, np.float32)
    real = volume + np.where(labels == 7, 0.2, 0.075)  # 400 and 150 HU
    found = obeying_planes(labels, volume, real, (1, 1, 1))
    assert list(found) == ["label map", "generated", "|difference to the real one|"]
    sagittal = {name: picture[:, :8] / 255 for name, picture in found.items()}
    assert {picture.shape for picture in found.values()} == {(10, 8 + 6 + 6, 3)}
    colours = sagittal["label map"][5]
    assert not colours[:2].any() and np.ptp(colours[2]) > 0.5 and np.ptp(colours[4]) == 0 < colours[4, 0] < 0.5
    assert sagittal["generated"] == pytest.approx(0.5, abs=0.01)
    bright = sagittal["|difference to the real one|"][5].sum(axis=1)
    assert bright[2] > bright[4] > bright[0] == bright[7] < 0.02  # outside the map nothing is compared
    assert list(obeying_planes(labels, volume, None, (1, 1, 1))) == ["label map", "generated"]


def test_rows_of_pictures_have_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *rest, **k: figures.append(self) or save(self, *rest, **k))
    whole, part = np.zeros((20, 60, 3)), np.ones((30, 60, 3))
    save_rows({"a $x$": {"map": whole}, "b": {"map": part, "error": part}}, tmp_path / "a.png", "of a test")
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["a $x$", "", "b", ""]
    assert [axis.get_title() for axis in axes] == ["map", "error", "", ""]
    assert [len(axis.images) for axis in axes] == [1, 0, 1, 1]
    assert imread(tmp_path / "a.png").shape[1] == 2 * 450 and figures[0].get_suptitle().startswith("of a test\n")
