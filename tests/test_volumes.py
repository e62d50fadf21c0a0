from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from monai.transforms import ScaleIntensityRange, ScaleIntensityRangePercentiles

from scripts.errors import UserError
from scripts.nifti import read_nifti
from scripts.phantom import make_phantom
from scripts.volumes import Volume, VolumeDataset, convert, prepare, stored_path
from tests.conftest import oriented_affine, save_nifti


def test_boxes_equal_the_whole_volume(phantoms: list[Path], tmp_path: Path) -> None:
    data, affine = read_nifti(phantoms[0])
    volume = Volume(convert(phantoms[0], tmp_path))
    assert volume.shape == data.shape and np.array_equal(volume.affine, affine)
    assert volume.spacing == pytest.approx((8, 8, 9))
    box = (slice(3, 30), slice(0, 36), slice(40, 44))
    got = volume.read(box)
    assert got.dtype == np.int16 and np.array_equal(got, data[box])


def test_ct_is_windowed_as_monai_does(phantoms: list[Path], tmp_path: Path) -> None:
    data, _ = read_nifti(phantoms[1])
    volume = Volume(convert(phantoms[1], tmp_path))
    expected = ScaleIntensityRange(-1000, 1000, 0, 1, clip=True)(data.astype(np.float32))
    assert np.array_equal(volume.intensity.normalise(data).numpy(), np.asarray(expected))


def test_mri_is_scaled_by_percentiles_without_clipping(tmp_path: Path) -> None:
    data = np.random.default_rng(0).gamma(2.0, 100.0, (20, 24, 18)).astype(np.float32)
    volume = Volume(convert(save_nifti(tmp_path / "m.nii.gz", data), tmp_path, "mri"), "mri")
    expected = ScaleIntensityRangePercentiles(0.0, 99.5, 0, 1, clip=False)(data[None])[0]
    assert np.allclose(volume.intensity.normalise(read_nifti(tmp_path / "m.nii.gz")[0]), expected, atol=1e-4)
    assert volume.intensity.normalise(data).max() > 1


def test_conversion_is_found_again_until_something_changes(phantoms: list[Path], tmp_path: Path) -> None:
    source = tmp_path / "copy.nii.gz"
    source.write_bytes(phantoms[0].read_bytes())
    first = convert(source, tmp_path / "store")
    written = first.stat().st_mtime_ns
    assert convert(source, tmp_path / "store") == first and first.stat().st_mtime_ns == written
    assert stored_path(source, tmp_path / "store", "mri") != first
    os.utime(source, ns=(1, 1))
    assert stored_path(source, tmp_path / "store") != first


def test_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    constant = save_nifti(tmp_path / "c.nii.gz", np.zeros((8, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"c\.nii\.gz: is constant"):
        convert(constant, tmp_path / "store", "mri")
    broken = tmp_path / "b.nii.gz"
    broken.write_bytes(constant.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"b\.nii\.gz: is truncated"):
        prepare([{"image": str(broken), "class": "ct"}], tmp_path / "store", progress=False)
    assert not list((tmp_path / "store").glob("*")) if (tmp_path / "store").exists() else True


def test_prepare_converts_what_is_missing(phantoms: list[Path], tmp_path: Path, capsys) -> None:
    entries = [{"image": str(p), "class": "ct"} for p in phantoms]
    convert(phantoms[0], tmp_path)
    assert prepare(entries, tmp_path, num_workers=2) == len(phantoms) - 1
    assert "7 volumes to convert" in capsys.readouterr().out
    assert prepare(entries, tmp_path, num_workers=2) == 0
    assert len(list(tmp_path.iterdir())) == len(phantoms)


def test_prepare_refuses_a_full_disk(phantoms: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("scripts.volumes.shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and _Usage())
    with pytest.raises(UserError, match="converting needs about .* GB, but 0.00 GB is free; set store_dir"):
        prepare([{"image": str(phantoms[0])}], tmp_path / "store", progress=False)


class _Usage:
    free = 10


def test_whole_volumes_for_validation(phantoms: list[Path], tmp_path: Path) -> None:
    entries = [{"image": str(phantoms[0]), "class": "ct"}]
    item = VolumeDataset(entries, tmp_path)[0]
    assert item["image"].shape == (1, 40, 36, 44) and item["range"] == 2000
    assert VolumeDataset(entries, tmp_path).voxels(0) == 40 * 36 * 44
    crop = VolumeDataset(entries, tmp_path, patch_size=(20, 20, 60))[0]["image"]
    assert crop.shape == (1, 20, 20, 60)
    assert np.array_equal(crop[0, :, :, 8:52], item["image"][0, 10:30, 8:28])


def test_paths_with_spaces_and_other_letters(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(-900, 900, (9, 10, 11)).astype(np.int16)
    path = save_nifti(tmp_path / "胸部 CT é.nii.gz", data, oriented_affine("RAS", (1, 1, 1)))
    assert np.array_equal(
        Volume(convert(path, tmp_path / "ä store")).read([slice(0, 9), slice(0, 10), slice(0, 11)]), data
    )


def _convert_all(arguments: tuple[list[Path], Path]) -> list[Path]:
    sources, store = arguments
    return [convert(source, store) for source in sources]


def test_processes_that_convert_the_same_volumes_do_no_harm(phantoms: list[Path], tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_convert_all, [(phantoms, tmp_path)] * 4)
    assert all(r == results[0] for r in results)
    assert sorted(tmp_path.iterdir()) == sorted(results[0])  # and nothing half done
    for source, target in zip(phantoms, results[0], strict=True):
        data, _ = read_nifti(source)
        assert np.array_equal(Volume(target).read([slice(0, n) for n in data.shape]), data)


def test_conversion_is_no_larger_than_the_nifti(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "p.nii.gz", make_phantom((128, 128, 96), (3, 3, 3), seed=2))
    assert convert(path, tmp_path / "store").stat().st_size < 1.15 * path.stat().st_size
