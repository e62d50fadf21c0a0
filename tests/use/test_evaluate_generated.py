"""configs/evaluate_generated.json: what it finds out about volumes that are known, and the files that it leaves."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.measure.features import hu_histogram, wasserstein
from scripts.phantom import make_phantom
from scripts.use.generated_report import PUBLISHED
from scripts.use.sets import find_sets
from tests.helpers import finish, last_line_of, oriented_affine, run, save_nifti, start_ranks

SHAPE, SPACING = (40, 36, 44), (8.0, 8.0, 9.0)


@pytest.fixture(scope="module")
def generated(phantoms: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three new phantoms, one of them at half the resolution, and a copy of the third training volume."""
    folder = tmp_path_factory.mktemp("generated")
    for seed in (50, 51):
        affine = oriented_affine("RAS", SPACING)
        save_nifti(folder / f"gen_{seed}.nii.gz", make_phantom(SHAPE, SPACING, seed), affine)
    affine = oriented_affine("SLP", (18.0, 16.0, 16.0))
    coarse = make_phantom((20, 18, 22), (16, 16, 18), 52)[::-1, ::-1].transpose(2, 0, 1)
    save_nifti(folder / "gen_52.nii.gz", coarse, affine)
    shutil.copy(phantoms[2], folder / "gen_copy.nii.gz")
    return folder


@pytest.fixture(scope="module")
def settings(generated: Path, datalist_file: Path) -> dict[str, Any]:
    return {
        "generated_dir": str(generated), "json_data_list": str(datalist_file), "perceptual_pretrained": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "out"
    started = run("evaluate_generated", **settings, output_dir=str(folder))
    assert started.check_properties() == []
    return folder


@pytest.fixture
def options(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return settings | {"output_dir": str(tmp_path / "out")}


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "generated.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_sets_are_those_of_the_datalist(compared: Path) -> None:
    summary = summary_of(compared)
    assert summary["volumes"] == {"generated": 4, "training": 4, "reference": 4, "yardstick": 4}
    assert summary["reference_splits"] == ["testing", "validation"] and summary["failed"] == []
    assert summary["size"] == list(SHAPE) and summary["spacing"] == list(SPACING)
    assert "obeying" not in summary and not (compared / "obeying.png").exists()  # no volume has a label map
    # int(0.3 n) up to int(0.7 n) of 40, 36 and 44 slices, of which the middle axis has the fewest
    assert summary["slices"] == dict.fromkeys(("generated", "reference", "yardstick"), 4 * (25 - 10))


def test_a_copy_is_found_and_named(compared: Path, phantoms: list[Path]) -> None:
    rows = {row["name"]: row for row in rows_of(compared)}
    assert list(rows) == ["gen_50", "gen_51", "gen_52", "gen_copy"]
    assert rows["gen_copy"]["nearest_training_volume"] == str(phantoms[2]) and float(rows["gen_copy"]["rmse_hu"]) == 0
    others = [float(row["rmse_hu"]) for name, row in rows.items() if name != "gen_copy"]
    assert min(others) > 50
    assert rows["gen_52"]["size"] == "20x18x22" and rows["gen_52"]["spacing_mm"] == "16x16x18"
    near = summary_of(compared)["nearest"]
    assert near["generated"]["min"] == 0 and near["generated"]["closer_than_any_held_out"] >= 1
    assert near["held_out"]["min"] > 50 and near["held_out"]["volumes"] == 4


def test_hu_distances_are_those_of_the_volumes(compared: Path, phantoms: list[Path], generated: Path) -> None:
    def mean(volumes: list[np.ndarray]) -> np.ndarray:
        return np.mean([hu_histogram(volume) for volume in volumes], axis=0)

    real = [make_phantom(SHAPE, (8, 8, 9), seed=seed) for seed in range(8)]
    ours = mean(
        [make_phantom(SHAPE, SPACING, s) for s in (50, 51)] + [make_phantom((20, 18, 22), (16, 16, 18), 52), real[2]]
    )
    found = summary_of(compared)["hu_wasserstein"]
    assert found["generated_to_training"] == pytest.approx(wasserstein(ours, mean(real[:4])))
    assert found["generated_to_reference"] == pytest.approx(wasserstein(ours, mean(real[4:])))
    assert found["reference_to_training"] == pytest.approx(wasserstein(mean(real[4:]), mean(real[:4])))
    whole = float(np.mean(real[2].clip(-1000, 1000)))
    assert float(rows_of(compared)[3]["mean_hu"]) == pytest.approx(whole)


def test_fid_is_0_of_the_same_volumes_and_rises_with_noise(
    options: dict[str, Any], phantoms: list[Path], tmp_path: Path
) -> None:
    fids = []
    for noise in (0, 50, 400):
        folder = tmp_path / f"noise {noise}"
        folder.mkdir()
        for seed in range(4, 8):
            data = make_phantom(SHAPE, (8, 8, 9), seed)
            rough = np.random.default_rng(seed).normal(0, noise, SHAPE) if noise else 0
            affine = oriented_affine("LPS", SPACING)
            save_nifti(folder / f"{seed}.nii.gz", np.rint(data + rough).astype(np.int16), affine)
        run("evaluate_generated", **options | {"generated_dir": str(folder)})
        fid = summary_of(tmp_path / "out")["fid"]["squeezenet"]
        assert fid["generated"]["mean"] == pytest.approx(np.mean([fid["generated"][p] for p in ("xy", "yz", "zx")]))
        fids.append(fid["generated"]["mean"] / fid["yardstick"]["mean"])
    assert fids[0] == pytest.approx(0, abs=1e-6) and 0.1 < fids[1] < fids[2] > 1


def test_the_page_has_the_numbers_and_needs_no_other_file(compared: Path) -> None:
    page, summary = (compared / "report.html").read_text(), summary_of(compared)
    for distances in summary["fid"].values():
        for name in ("generated", "yardstick"):
            assert all(f"<td>{distances[name][key]:.4g}</td>" in page for key in PUBLISHED)
    for distance in summary["hu_wasserstein"].values():
        assert f"<td>{distance:.1f} HU</td>" in page
    assert all(f"<td>{value:g}</td>" in page for value in PUBLISHED.values()) and "autoPET 2023" in page
    for name in ("gen_50", "gen_51", "gen_52", "gen_copy", "phantom 2", "phantom 4", "phantom 7"):
        assert f"<h3>{name}<small>" in page
    assert page.count('src="data:image/jpeg;base64,') == 3 * 2 + 4 + 4
    assert "rank-deficient" in page and "features are random" in page
    assert "http" not in page and "href" not in page
    told = (compared / "summary.md").read_text()
    assert "cannot be compared" in told and f"| {summary['nearest']['held_out']['median']:.1f} HU |" in told


def test_the_reference_may_be_the_training_volumes(options: dict[str, Any], tmp_path: Path) -> None:
    more = {"reference_splits": ["training"], "spacing": [16, 16, 16], "size": [20, 18, 24], "center_slices_ratio": 1}
    run("evaluate_generated", **options | more)
    summary = summary_of(tmp_path / "out")
    assert summary["volumes"] == {"generated": 4, "training": 4, "reference": 4, "yardstick": 0}
    assert list(summary["hu_wasserstein"]) == ["generated_to_training"] and list(summary["nearest"]) == ["generated"]
    assert "yardstick" not in summary["fid"]["squeezenet"] and summary["slices"] == {"generated": 72, "reference": 72}
    assert "no yardstick" in (tmp_path / "out" / "report.html").read_text()


def test_features_have_their_published_weights_or_an_error_says_how(
    options: dict[str, Any], tmp_path: Path, weight_files: dict[str, Path]
) -> None:
    options |= {"perceptual_pretrained": True, "perceptual_backbone_path": str(weight_files["backbone_path"])}
    run("evaluate_generated", **options)
    assert summary_of(tmp_path / "out")["fid"]["squeezenet"]["label"] == "SqueezeNet 1.1 (ImageNet)"
    last = last_line_of("evaluate_generated", **options | {"perceptual_backbone_path": str(tmp_path / "gone.pth")})
    assert last.startswith(f"error: {tmp_path}/gone.pth: perceptual weights are missing; fetch them with python -m")


def evaluate(options: dict[str, Any]) -> None:
    run("evaluate_generated", **options)


def test_two_ranks_find_what_one_does(compared: Path, options: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(2, evaluate, options, log=log), log)
    assert "12 volumes compared, 0 failed" in printed
    assert rows_of(tmp_path / "out") == rows_of(compared)
    ours, theirs = summary_of(tmp_path / "out"), summary_of(compared)
    assert ours.pop("hu_wasserstein") == pytest.approx(theirs.pop("hu_wasserstein"), rel=1e-9)
    mine, other = (summary.pop("fid")["squeezenet"] for summary in (ours, theirs))
    for name in ("generated", "yardstick"):
        assert mine[name] == pytest.approx(other[name], rel=1e-6)
    assert ours == theirs


def test_a_broken_volume_is_named_and_the_others_count(
    options: dict[str, Any], generated: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    shutil.copytree(generated, folder)
    first = folder / "gen_50.nii.gz"  # whose geometry would have been the common one
    first.write_bytes(first.read_bytes()[:-3000])
    last = last_line_of("evaluate_generated", **options | {"generated_dir": str(folder)})
    assert last.startswith(f"error: 1 of 12 volumes could not be compared: {first}: is truncated")
    summary = summary_of(tmp_path / "out")
    assert summary["volumes"]["generated"] == 3 and "gen_50.nii.gz: is truncated" in summary["failed"][0]
    assert "Could not be compared" in (tmp_path / "out" / "report.html").read_text()
    for path in sorted(folder.glob("*"))[1:3]:
        path.write_bytes(path.read_bytes()[:-3000])
    shutil.rmtree(tmp_path / "out")
    last = last_line_of("evaluate_generated", **options | {"generated_dir": str(folder)})
    assert "3 of 12 volumes could not be compared" in last and not (tmp_path / "out" / "report.html").exists()


def test_what_cannot_be_compared_is_an_error(options: dict[str, Any], generated: Path, tmp_path: Path) -> None:
    def last(**changes: Any) -> str:
        return last_line_of("evaluate_generated", **options | changes)

    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    shutil.copy(generated / "gen_50.nii.gz", tmp_path / "one")
    assert last(generated_dir=str(tmp_path / "empty")) == (
        f"error: {tmp_path}/empty: no volume (.nii.gz or .nii) is there; generate volumes, or correct generated_dir"
    )
    assert last(generated_dir=str(tmp_path / "gone")).startswith(f"error: {tmp_path}/gone: no such file or folder; gen")
    assert "one (generated_dir): has 1 CT volumes, but sets of 2 or more" in last(generated_dir=str(tmp_path / "one"))
    same = last(json_data_list=None, dataset_dir=str(generated))
    assert same == (
        f"error: {generated}/gen_50.nii.gz: is both a generated and a real volume; correct generated_dir or dataset_dir"
    )
    assert last(reference_splits=["test"]).startswith("error: reference_splits is ['test']; use some of training, ")
    assert last(center_slices_ratio=0).startswith("error: center_slices_ratio is 0; use a number above 0 up to 1")
    assert last(spacing=[1, 0, 1]) == "error: spacing is [1, 0, 1]; use three numbers above 0, e.g. [2, 2, 2]"
    assert last(size=[64, 64]) == "error: size is [64, 64]; use three whole numbers above 0, e.g. [128, 128, 128]"


def test_each_set_has_its_volumes(phantoms: list[Path], generated: Path, datalist_file: Path) -> None:
    def sets(**options: Any) -> list[list[str]]:
        entries = find_sets(str(generated), str(phantoms[0].parent), **options)
        assert [entry["sets"] for entry in entries[:4]] == [["generated"]] * 4
        return [entry["sets"] for entry in entries[4:]]

    assert sets(json_data_list=str(datalist_file)) == [["training", "yardstick"]] * 4 + [["reference"]] * 4
    few = sets(json_data_list=str(datalist_file), reference_splits="testing")
    assert few == [["training", "yardstick"]] * 4 + [["reference"]] * 2


def test_without_held_out_volumes_the_training_ones_are_the_reference(
    phantoms: list[Path], generated: Path, tmp_path: Path
) -> None:
    for path in phantoms[:5]:
        shutil.copy(path, tmp_path)
    entries = find_sets(str(generated), str(tmp_path))
    assert [entry["sets"] for entry in entries[4:]] == [["training", "reference"]] * 5
