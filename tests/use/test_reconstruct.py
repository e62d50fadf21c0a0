"""configs/inference.json: what comes out has the geometry of what went in."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.helpers import SMALL, call, last_line_of, oriented_affine, printed_last, run, save_nifti, workflow

IDENTITY: dict[str, Any] = {"network_def": {"_target_": "torch.nn.Identity"}}
OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.2, -0.3, 0.4) @ np.diag([1.0, 1.5, 2.0]), [-40.0, 12.0, 7.5]
)


def hounsfield(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1400, 1800, shape).astype(np.int16)


def volume_of(kind: str, path: Path) -> np.ndarray:
    """Write a volume, and return its HU as stored."""
    shape = (101, 75, 37) if kind == "odd" else (40, 33, 26)
    data = hounsfield(shape)
    affine = oriented_affine("LPS", (1.5, 1.5, 1.5))
    if kind == "oblique":
        affine = OBLIQUE
    elif kind == "anisotropic":
        affine = oriented_affine("RAS", (0.7, 0.7, 2.5))
    elif kind == "PIR":
        affine = oriented_affine("PIR", (1.0, 1.0, 3.0))
    image = nib.Nifti1Image(data, affine)
    if kind in ("float64", "int32"):
        image = nib.Nifti1Image(data.astype(kind), affine)
    elif kind == "scaled":
        image.header.set_slope_inter(0.5, -100)
        image = nib.Nifti1Image(data * 0.5 - 100, affine, image.header)
        image.header.set_data_dtype(np.int16)
    elif kind == "one channel":
        image = nib.Nifti1Image(data[..., None], affine)
    elif kind == "nifti2":
        image = nib.Nifti2Image(data, affine)
    elif kind == "qform only":
        image.header.set_sform(None, code=0)
        image.header.set_qform(OBLIQUE, code=1)
        image = nib.Nifti1Image(data, None, image.header)
    image.header["descrip"] = b"from the scanner"
    image.header.set_xyzt_units("mm", "sec")
    if kind == "scaled":  # kept in the file, as scanners do
        image.header.set_slope_inter(0.5, -100)
    nib.save(image, path)
    return np.asarray(nib.load(path).dataobj)


KINDS = (
    "LPS", "oblique", "anisotropic", "PIR", "odd", "float64", "int32", "scaled", "one channel", "nifti2", "qform only",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_gives_back_the_clipped_volume_in_its_own_geometry(kind: str, tmp_path: Path) -> None:
    source = tmp_path / "in" / f"{kind}.nii.gz"
    source.parent.mkdir()
    stored = volume_of(kind, source)
    windows = {"val_sliding_window_patch_size": [32, 32, 32]}
    run("inference", dataset_dir=str(source), output_dir=str(tmp_path / "out"), **IDENTITY, **windows)
    before, after = nib.load(source), nib.load(tmp_path / "out" / f"{kind}_recon.nii.gz")
    assert after.shape == before.shape and type(after) is type(before)
    assert np.array_equal(after.affine, before.affine)
    assert nib.aff2axcodes(after.affine) == nib.aff2axcodes(before.affine)
    assert after.get_data_dtype() == np.int16
    for field in ("descrip", "qform_code", "sform_code", "xyzt_units", "pixdim"):
        assert np.array_equal(after.header[field], before.header[field]), field
    assert np.abs(np.asarray(after.dataobj) - np.clip(stored, -1000, 1000)).max() <= 1


def test_mri_keeps_its_type_and_is_not_clipped(tmp_path: Path) -> None:
    data = np.random.default_rng(0).gamma(2.0, 0.1, (20, 24, 18)).astype(np.float32)
    path = save_nifti(tmp_path / "m.nii.gz", data)
    run("inference", dataset_dir=str(path), output_dir=str(tmp_path / "out"), modality="mri", **IDENTITY)
    after = nib.load(tmp_path / "out" / "m_recon.nii.gz")
    assert after.get_data_dtype() == np.float32 and np.allclose(np.asarray(after.dataobj), data, atol=1e-5)


def test_a_folder_is_mirrored_and_its_results_are_not_taken_for_input(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/v.nii.gz", "v.nii", "CT_recon.nii.gz"):
        save_nifti(tmp_path / name, hounsfield((20, 18, 16)))
    for _ in range(2):
        run("inference", dataset_dir=str(tmp_path), output_dir=str(tmp_path), **IDENTITY)
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*_recon.nii.gz"))
    assert found == ["CT_recon.nii.gz", "CT_recon_recon.nii.gz", "a/v_recon.nii.gz", "v_recon.nii.gz"]
    assert not list(tmp_path.rglob(".part*"))


def test_results_beneath_the_input_are_no_input_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    save_nifti(tmp_path / "elsewhere" / "v.nii.gz", hounsfield((20, 18, 16)))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "patient").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    for _ in range(2):
        run("inference", dataset_dir=str(tmp_path / "in"), output_dir=str(tmp_path / "in" / "recon"), **IDENTITY)
    found = [str(p.relative_to(tmp_path / "in")) for p in (tmp_path / "in" / "recon").rglob("*.nii.gz")]
    assert found == ["recon/patient/v_recon.nii.gz"]


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    for name in ("scan.nii.gz", "scan_recon.nii.gz"):
        save_nifti(tmp_path / name, hounsfield((20, 18, 16)))
    os.utime(tmp_path / "scan_recon.nii.gz", (1e9, 1e9))
    before = (tmp_path / "scan_recon.nii.gz").read_bytes()
    last = last_line_of("inference", dataset_dir=str(tmp_path / "scan.nii.gz"), output_dir=str(tmp_path), **IDENTITY)
    assert "scan_recon.nii.gz: is there, but is no result of an earlier run; move it" in last
    assert (tmp_path / "scan_recon.nii.gz").read_bytes() == before


def test_a_result_whose_name_is_too_long_does_not_stop_the_others(tmp_path: Path) -> None:
    names = ("a" * 240, "b" * 247, "c")  # of results, 253, 260 and 14 bytes
    (tmp_path / "in").mkdir()
    for name in names:
        save_nifti(tmp_path / "in" / f"{name}.nii.gz", hounsfield((20, 18, 16)))
    options = {"dataset_dir": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), **IDENTITY}
    for _ in range(2):  # the second time, all but that one are there
        last = last_line_of("inference", **options)
        assert f"1 of 3 volumes could not be reconstructed: {tmp_path}/in/bbb" in last and "File name too long" in last
        found = sorted(p.name for p in (tmp_path / "out").glob("*.gz"))
        assert found == [f"{names[0]}_recon.nii.gz", "c_recon.nii.gz"]


class Poisoned(torch.nn.Module):
    """NaN for volumes of one size, an error for those of another."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] == 24:
            raise RuntimeError("out of luck")
        return x * torch.nan if x.shape[2] == 16 else x


def test_a_volume_that_the_network_cannot_do_does_not_stop_the_others(tmp_path: Path) -> None:
    for size in (16, 20, 24, 28):
        save_nifti(tmp_path / f"v{size}.nii.gz", hounsfield((size, 18, 16)))
    network = {"network_def": {"_target_": "tests.use.test_reconstruct.Poisoned"}}
    options = {"dataset_dir": str(tmp_path), "output_dir": str(tmp_path / "out")}
    last = last_line_of("inference", **options, **network)
    assert "2 of 4 volumes could not be reconstructed: " in last and "v16.nii.gz: what the network makes of it" in last
    assert sorted(p.name for p in (tmp_path / "out").glob("*.gz")) == ["v20_recon.nii.gz", "v28_recon.nii.gz"]
    last = last_line_of("inference", **options, **network)
    assert "2 of 4 volumes could not be reconstructed: " in last


def test_the_network_is_used_and_what_is_done_is_skipped(
    datalist: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"dataset_dir": str(datalist), "output_dir": str(out), "model_dir": str(weights.parent)}
    options |= {"splits": ["testing"], **SMALL}
    caplog.set_level("INFO")
    started = run("inference", **options)
    assert started.check_properties() == []
    assert f"weights loaded from {weights}" in caplog.text and "2 volumes reconstructed, 0 failed" in caplog.text
    results = sorted(out.glob("*_recon.nii.gz"))
    assert [p.name for p in results] == ["phantom 6_recon.nii.gz", "phantom 7_recon.nii.gz"]
    entries = [entry["image"] for entry in json.loads(datalist.read_text())["testing"]]
    source = nib.load(entries[0])
    image = np.clip((np.asarray(nib.as_closest_canonical(source).dataobj, np.float32) + 1000) / 2000, 0, 1)
    with torch.no_grad():
        wanted = started.parser.get_parsed_content("network")(torch.from_numpy(image)[None, None])
    got = np.asarray(nib.as_closest_canonical(nib.load(results[0])).dataobj)
    assert np.abs(got - wanted[0, 0].clamp(0, 1).numpy() * 2000 + 1000).max() <= 1

    times = [p.stat().st_mtime_ns for p in results]
    results[1].unlink()
    run("inference", **options)
    assert "1 volumes reconstructed, 1 were there already, 0 failed" in caplog.text
    assert results[0].stat().st_mtime_ns == times[0] and results[1].is_file()
    other = tmp_path / "other.pt"
    torch.save({k: v + 1 for k, v in torch.load(weights, weights_only=True).items()}, other)
    last = last_line_of("inference", trained_autoencoder_path=str(other), **options)
    assert f"out: holds results of other weights ({weights}); give another output_dir" in last
    changed = {"trained_autoencoder_path": str(other)}
    run("inference", overwrite=True, **changed, **options | {"dataset_dir": entries[0], "splits": ["training"]})
    assert results[0].stat().st_mtime_ns != times[0]  # the other one is of the old weights still
    caplog.clear()
    run("inference", **changed, **options)
    assert "1 volumes reconstructed, 1 were there already, 0 failed" in caplog.text


def test_one_bad_volume_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    save_nifti(folder / "1 good.nii.gz", hounsfield((20, 18, 16)))
    (folder / "2 bad.nii.gz").write_bytes(b"hello " * 99)
    save_nifti(folder / "3 cut.nii.gz", hounsfield((30, 30, 30)))
    (folder / "3 cut.nii.gz").write_bytes((folder / "3 cut.nii.gz").read_bytes()[:-3000])
    save_nifti(folder / "4 good.nii.gz", hounsfield((20, 18, 16)))
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(folder), "--output_dir", str(tmp_path / "out")]
    command += ["--network_def", json.dumps(IDENTITY["network_def"])]
    done = call(command)
    assert done.returncode == 1
    last = printed_last(done)
    assert last.startswith("error: 2 of 4 volumes could not be reconstructed: ")
    assert "2 bad.nii.gz: is not a readable NIfTI file" in last
    assert "3 cut.nii.gz: is truncated or damaged" in done.stdout
    results = sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz"))
    assert results == ["1 good_recon.nii.gz", "4 good_recon.nii.gz"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no such file": ({"dataset_dir": "no/v.nii.gz"}, "no/v.nii.gz: no such file or folder; correct dataset_dir"),
    "no such folder": ({"dataset_dir": "no/where"}, "no/where: no such file or folder"),
    "empty folder": ({"dataset_dir": "docs"}, "docs: no volume (.nii.gz or .nii) is there"),
    "no weights": ({"model_dir": "docs"}, "docs: holds no weights (autoencoder_best_epoch*.pt, autoencoder.pt or"),
    "no such weights": ({"trained_autoencoder_path": "no.pt"}, "no.pt: no such weights file; correct trained_auto"),
    "unknown split": ({"splits": ["tests"]}, "splits is ['tests']; use some of training, validation, testing"),
    "one split as text": ({"splits": "tests"}, "splits is ['tests']; use some of training"),
    "window": ({"val_sliding_window_patch_size": [64, 64, 30]}, "val_sliding_window_patch_size is [64, 64, 30], not"),
    "overlap": ({"val_overlap": 1}, "val_overlap is 1; use a number from 0 up to below 1"),
    "modality": ({"modality": "pet"}, "modality is 'pet'; use one of ct, mri"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_in_one_line(name: str, phantoms: list[Path], weights: Path, tmp_path: Path) -> None:
    overrides, message = BAD[name]
    options = {"dataset_dir": str(phantoms[0]), "output_dir": str(tmp_path), "model_dir": str(weights.parent), **SMALL}
    last = last_line_of("inference", **{**options, **overrides})
    assert message in last
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_the_newest_best_weights_are_used(weights: Path, phantoms: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    options = {"dataset_dir": str(phantoms[0]), "output_dir": str(tmp_path), "model_dir": str(folder), **SMALL}
    for name in ("model.pt", "autoencoder.pt", "autoencoder_best_epoch9.pt", "autoencoder_best_epoch12.pt"):
        (folder / name).write_bytes(weights.read_bytes())
        found = workflow("inference", **options).parser.get_parsed_content("weights")
        assert found.path == folder / name
