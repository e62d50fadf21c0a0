from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.common.errors import UserError
from scripts.data.nifti import read_header, read_nifti, stem
from tests.helpers import oriented_affine, save_nifti


def noise(shape: tuple[int, ...] = (20, 24, 18), dtype: type = np.int16) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(dtype)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SAL"])
def test_every_orientation_reads_as_ras(tmp_path: Path, axcodes: str) -> None:
    data = noise()
    path = save_nifti(tmp_path / "v.nii.gz", data, oriented_affine(axcodes, (1.0, 2.0, 3.0)))
    got, affine = read_nifti(path)
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    for index in [(0, 0, 0), (3, 17, 9)]:  # the same voxel is at the same place in the world
        world = oriented_affine(axcodes, (1.0, 2.0, 3.0)) @ [*index, 1]
        there = np.rint(np.linalg.solve(affine, world)[:3]).astype(int)
        assert got[tuple(there)] == data[index]
    header = read_header(path)
    assert (header.axcodes, header.shape, header.spacing) == (axcodes, (20, 24, 18), (1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (noise(), np.int16),
        (noise(dtype=np.int32), np.int16),
        (noise(dtype=np.float64), np.int16),
        (noise(dtype=np.float32) + np.float32(0.5), np.float32),
        (noise(dtype=np.int32) + 40000, np.float32),
    ],
)
def test_int16_where_it_loses_nothing(tmp_path: Path, data: np.ndarray, dtype: type) -> None:
    got, _ = read_nifti(save_nifti(tmp_path / "v.nii.gz", data))
    assert got.dtype == dtype and np.array_equal(got, data)


def test_scaled_volumes_are_in_scaled_units(tmp_path: Path) -> None:
    image = nib.Nifti1Image(noise(), np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    nib.save(image, tmp_path / "v.nii.gz")
    stored = nib.load(tmp_path / "v.nii.gz")
    assert np.array_equal(read_nifti(tmp_path / "v.nii.gz")[0], np.asanyarray(stored.dataobj).astype(np.float32))


def test_a_fourth_axis_is_refused_for_ct_and_selected_for_mri(tmp_path: Path) -> None:
    data = noise((8, 9, 10, 3))
    path = save_nifti(tmp_path / "v.nii.gz", data)
    with pytest.raises(UserError, match=r"v\.nii\.gz: has shape \(8, 9, 10, 3\), not 3D"):
        read_header(path)
    assert np.array_equal(read_nifti(path, "mri", 2)[0], data[..., 2])
    with pytest.raises(UserError, match="has 3 channels, but select_channel is 5"):
        read_nifti(path, "mri", 5)
    assert read_nifti(save_nifti(path, data[..., :1]))[0].shape == (8, 9, 10)


@pytest.mark.parametrize("keep", [100, 0.5, -9])
def test_truncated_gzip_is_found_from_the_header(tmp_path: Path, keep: float) -> None:
    path = save_nifti(tmp_path / "v.nii.gz", noise((40, 40, 40)))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    for read in (read_header, read_nifti):
        with pytest.raises(UserError, match=r"v\.nii\.gz: is (truncated or damaged|not a readable NIfTI)"):
            read(path)


def test_truncated_uncompressed_file_is_found(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "v.nii", noise())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is truncated"):
        read_header(path)


def test_gzip_of_several_members_is_complete(tmp_path: Path) -> None:
    plain = save_nifti(tmp_path / "v.nii", noise()).read_bytes()
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    assert read_header(tmp_path / "v.nii.gz").shape == (20, 24, 18)


def test_other_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "v.nii.gz"
    cases: list[tuple[str, bytes | None]] = [
        ("no such file", None),
        ("is empty", b""),
        ("not a readable", b"text" * 200),
    ]
    for message, content in cases:
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"v\.nii\.gz: .*{message}"):
            read_header(path)
    with pytest.raises(UserError, match="is a directory"):
        read_header(tmp_path)
    bad = noise(dtype=np.float32)
    bad[3, 4, 5] = np.nan
    with pytest.raises(UserError, match="not finite"):
        read_nifti(save_nifti(path, bad))
    image = nib.Nifti1Image(noise(), None)
    image.header.set_sform(np.diag([1, 1, 0, 1]), code=1)
    nib.save(image, path)
    with pytest.raises(UserError, match="affine is singular"):
        read_header(path)
    with pytest.raises(UserError, match=r"has shape \(8, 9\), not 3D"):
        read_header(save_nifti(path, noise((8, 9))))


def test_stems_are_without_the_ending() -> None:
    assert [stem(name) for name in ("a.nii.gz", "b.nii", "c.d.nii.gz")] == ["a", "b", "c.d"]
