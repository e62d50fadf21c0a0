"""configs/evaluate.json: its numbers against scikit-image, and the files that it leaves."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from markupsafe import escape
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from scripts.measure.metrics import TISSUES
from scripts.use.report import PUBLISHED
from tests.helpers import SMALL, last_line_of, run, save_nifti


@pytest.fixture(scope="module")
def settings(weights: Path, datalist_file: Path) -> dict[str, Any]:
    # Two windows along the first axis. On one core, PyTorch's conv3d is slow up to 20480 values in channels x X x Y.
    window = {"val_sliding_window_patch_size": [36, 36, 44]}
    return {"model_dir": str(weights.parent), "dataset_dir": str(datalist_file)} | SMALL | window


@pytest.fixture(scope="module")
def evaluated(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of four volumes, without LPIPS."""
    folder = tmp_path_factory.mktemp("evaluated") / "out"
    started = run("evaluate", **settings, output_dir=str(folder), splits=["validation", "testing"])
    assert started.check_properties() == []
    return folder


@pytest.fixture
def options(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return settings | {"output_dir": str(tmp_path / "out")}


def test_numbers_are_those_of_the_reconstructions(
    evaluated: Path, settings: dict[str, Any], datalist_file: Path, tmp_path: Path
) -> None:
    run("inference", **settings, output_dir=str(tmp_path / "recon"), splits=["validation", "testing"])
    with (evaluated / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    lists = json.loads(datalist_file.read_text())
    assert [row["path"] for row in rows] == [entry["image"] for entry in lists["validation"] + lists["testing"]]
    for row in rows:
        x = np.clip(np.asarray(nib.load(row["path"]).dataobj, float), -1000, 1000)
        y = np.asarray(nib.load(tmp_path / "recon" / f"{row['name']}_recon.nii.gz").dataobj, float)
        error = np.abs(y - x)
        assert float(row["psnr"]) == pytest.approx(peak_signal_noise_ratio(x, y, data_range=2000), abs=1e-3)
        ssim = structural_similarity(
            (x + 1000) / 2000, (y + 1000) / 2000, gaussian_weights=True, use_sample_covariance=False, data_range=1
        )
        assert float(row["ssim"]) == pytest.approx(ssim, abs=1e-3)
        assert float(row["mae_hu"]) == pytest.approx(error.mean(), rel=1e-3)
        assert float(row["rmse_hu"]) == pytest.approx(np.sqrt((error**2).mean()), rel=1e-3)
        for tissue, (low, high) in TISSUES.items():
            inside = (x >= low) & (x < high)
            assert float(row[f"mae_hu_{tissue}"]) == pytest.approx(error[inside].mean(), rel=1e-3)
        assert row["lpips"] == "" and row["size"] == "40x36x44" and row["spacing_mm"] == "8x8x9"
    summary = json.loads((evaluated / "summary.json").read_text())
    for name in ("psnr", "ssim", "mae_hu", "rmse_hu", "mae_hu_bone"):
        values = [float(row[name]) for row in rows]
        wanted = {"mean": np.mean(values), "std": np.std(values), "count": 4}
        assert summary["metrics"][name] == pytest.approx(wanted)
    assert "lpips" not in summary["metrics"] and summary["failed"] == [] and summary["volumes"] == 4


def test_the_report_shows_every_case_and_needs_no_other_file(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    for number in (4, 5, 6, 7):
        assert page.count(f"<h3>phantom {number}<small>40 × 36 × 44 voxels, 8 × 8 × 9 mm</small></h3>") == 1
        assert (evaluated / "pictures" / f"phantom {number}.png").stat().st_size > 10000
    assert page.count('src="data:image/jpeg;base64,') == 4 * 3
    assert "http" not in page and "href" not in page and "$" not in page
    table = (evaluated / "summary.md").read_text()
    assert all(f" {name} |" in table for name in PUBLISHED) and "| 37.27 | 36.56 |" in table
    statistics = json.loads((evaluated / "latent_stats.json").read_text())
    assert statistics["count"] == 4 * (10 * 9 * 11) * 4 and statistics["volumes"] == 4


def test_lpips_is_measured_where_its_weights_are(
    options: dict[str, Any], tmp_path: Path, weight_files: dict[str, Path]
) -> None:
    run("evaluate", **options, **{f"perceptual_{key}": str(path) for key, path in weight_files.items()})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["metrics"]["lpips"]["count"] == 2 and summary["metrics"]["lpips"]["mean"] > 0


def test_names_may_hold_any_character(options: dict[str, Any], tmp_path: Path) -> None:
    names = ["$x$ $y", "100% <b>\"q'", "li\nne", "no\udcff", "sub/$\udce9"]
    affine, rng = np.diag([2.0, 2.0, 2.5, 1.0]), np.random.default_rng(0)
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for name in names:
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", rng.integers(-1000, 1000, (12, 16, 14)).astype(np.int16), affine)
    (tmp_path / "in" / "bad\udcff.nii.gz").write_bytes(b"no volume")
    out = tmp_path / "out"
    last = last_line_of("evaluate", **options | {"dataset_dir": str(tmp_path / "in")})
    assert "1 of 6 volumes could not be evaluated: " in last
    shown = sorted(name.encode(errors="backslashreplace").decode() for name in names)
    with (out / "metrics.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == shown
    summary = json.loads((out / "summary.json").read_text())
    assert summary["volumes"] == 5 and "bad\udcff.nii.gz: is not a readable NIfTI" in summary["failed"][0]
    pictures = {str(path.relative_to(out / "pictures")) for path in (out / "pictures").rglob("*.png")}
    assert pictures == {f"{name}.png" for name in names}
    page = (out / "report.html").read_text()
    assert [name for name in shown if page.count(f"<h3>{escape(name)}<small>") != 1] == [] and "% <b>" not in page


def test_nothing_of_a_volume_counts_that_fails_late(
    options: dict[str, Any], tmp_path: Path, phantoms: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for name in ("bad", "good"):
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(phantoms[0].read_bytes())

    def fail(*arguments: Any) -> None:
        if arguments[3].name == "bad.png":
            raise RuntimeError("out of luck")

    monkeypatch.setattr("scripts.use.evaluate.save_comparison", fail)
    last = last_line_of("evaluate", **options | {"dataset_dir": str(tmp_path / "in")})
    assert last.endswith("1 of 2 volumes could not be evaluated: " + f"{tmp_path}/in/bad.nii.gz: out of luck")
    statistics = json.loads((tmp_path / "out" / "latent_stats.json").read_text())
    assert statistics["volumes"] == 1 and statistics["count"] == (10 * 9 * 11) * 4


def test_a_broken_volume_is_reported_and_the_others_count(options: dict[str, Any], tmp_path: Path, phantoms) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "good.nii.gz").write_bytes(phantoms[0].read_bytes())
    (folder / "bad.nii.gz").write_bytes(phantoms[0].read_bytes()[:-3000])
    with pytest.raises(Exception, match="evaluator"):
        run("evaluate", **options | {"dataset_dir": str(folder)})
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["volumes"] == 1 and "bad.nii.gz: is truncated" in summary["failed"][0]
    assert "Could not be evaluated" in (tmp_path / "out" / "report.html").read_text()
