from __future__ import annotations

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.common.errors import UserError
from scripts.data.nifti import plausible, read_header, read_nifti, stem, write_like
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
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(UserError, match="is no regular file"):
        read_header(tmp_path / "pipe.nii")
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
    names = ("a.nii.gz", "b.nii", "c.d.nii.gz", "E.NII.GZ", "f.nii.gz.nii", "g.gz", "")
    assert [stem(name) for name in names] == ["a", "b", "c.d", "E", "f.nii.gz", "g.gz", ""]


def test_damage_within_a_gzip_file_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "v.nii.gz", noise((40, 40, 40)))
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # of the checksum; the size after it stays right
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"v\.nii\.gz: is truncated or damaged \(CRC check failed.*\); copy it again"):
        read_nifti(path)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]), r"has voxels of colours \(RGB\), which are no intensities"),
        (np.dtype(np.complex64), "has voxels of the type complex64, which are no intensities"),
    ],
)
def test_voxels_that_are_no_intensities_are_refused(tmp_path: Path, dtype: np.dtype, message: str) -> None:
    path = save_nifti(tmp_path / "v.nii.gz", np.ones((8, 9, 10), dtype))
    for read in (read_header, read_nifti):
        with pytest.raises(UserError, match=rf"v\.nii\.gz: {message}"):
            read(path)


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_lengths_are_in_mm_whatever_the_unit(tmp_path: Path, caplog, unit: str, factor: float) -> None:
    affine = np.diag([0.7, 0.8, 2.5, 1.0])
    affine[:3, 3] = [-100, 20, 3]
    image = nib.Nifti1Image(noise(), np.diag([1 / factor] * 3 + [1]) @ affine)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "v.nii.gz")
    caplog.set_level("INFO")
    assert read_nifti(tmp_path / "v.nii.gz")[1] == pytest.approx(affine, rel=1e-6)
    assert ("are taken as mm" in caplog.text) == (factor != 1)
    header = read_header(tmp_path / "v.nii.gz")
    assert header.spacing == pytest.approx((0.7, 0.8, 2.5), rel=1e-6) and bool(header.notes) == (factor != 1)
    write_like(tmp_path / "v.nii.gz", noise(), tmp_path / "w.nii.gz")  # in the file's own unit
    assert nib.load(tmp_path / "w.nii.gz").header.get_xyzt_units()[0] == unit
    assert read_nifti(tmp_path / "w.nii.gz")[1] == pytest.approx(affine, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e3])
def test_an_affine_is_singular_whatever_the_size_of_a_voxel(tmp_path: Path, scale: float) -> None:
    good, flat = np.diag([scale, scale, 2 * scale, 1]), np.diag([scale, scale, scale, 1.0])
    flat[:3, 2] = flat[:3, 0] + flat[:3, 1] + [0, 0, 1e-5 * scale]
    assert read_header(save_nifti(tmp_path / "v.nii", noise(), good)).spacing == pytest.approx(
        (scale, scale, 2 * scale)
    )
    with pytest.raises(UserError, match="affine is singular"):
        read_header(save_nifti(tmp_path / "v.nii", noise(), flat))


def by_header(path: Path, **fields: object) -> Path:
    """A volume whose header has been changed behind nibabel's back."""
    image = nib.Nifti1Image(noise(), np.diag([2.0, 2.0, 2.5, 1.0]))
    content = bytearray(image.to_bytes())
    header = np.ndarray((), nib.Nifti1Header.template_dtype, content)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("excess", [0, 5e-7, 1e-6, 1e-4])
def test_a_quaternion_that_is_rounded_up_is_half_a_turn(tmp_path: Path, excess: float) -> None:
    fields = {"sform_code": 0, "qform_code": 1, "quatern_b": 0, "quatern_c": 0, "quatern_d": 1 + excess}
    data, affine = read_nifti(by_header(tmp_path / "v.nii.gz", **fields))
    assert affine[:3, :3] == pytest.approx(np.diag([2.0, 2.0, 2.5]), abs=1e-3)
    assert np.array_equal(data, noise()[::-1, ::-1])  # turned about the third axis, so read from its ends
    with pytest.raises(UserError, match="is not a readable NIfTI file"):
        read_nifti(by_header(tmp_path / "w.nii.gz", **(fields | {"quatern_d": 1.1})))


def test_headers_are_read_where_their_meaning_is_clear(tmp_path: Path) -> None:
    path = tmp_path / "v.nii"
    expected = np.diag([2.0, 2.0, 2.5])
    assert np.array_equal(read_nifti(by_header(path, vox_offset=0))[0], noise())  # it cannot lie in the header
    qform = {"qform_code": 1, "quatern_b": 0, "quatern_c": 0, "quatern_d": 0, "srow_z": np.nan}
    assert read_nifti(by_header(path, **qform))[1][:3, :3] == pytest.approx(expected)
    assert "sform is singular" in read_header(path).notes[0]
    assert (
        read_header(by_header(path, sform_code=0, qform_code=0)).notes[0].startswith("it has neither qform nor sform")
    )
    assert read_header(by_header(path, xyzt_units=7)).spacing == (2.0, 2.0, 2.5)  # no unit that there is
    five = save_nifti(path, noise((8, 9, 10, 1, 1)))
    assert np.array_equal(read_nifti(five)[0], noise((8, 9, 10, 1, 1))[..., 0, 0])
    write_like(five, np.zeros((8, 9, 10), np.int16), tmp_path / "w.nii.gz")
    assert nib.load(tmp_path / "w.nii.gz").shape == (8, 9, 10, 1, 1)
    with pytest.raises(UserError, match=r"has shape \(8, 9, 10, 1, 3\), not 3D"):
        read_header(save_nifti(path, noise((8, 9, 10, 1, 3))))


def test_a_file_is_what_its_bytes_say(tmp_path: Path) -> None:
    plain = save_nifti(tmp_path / "v.nii", noise()).read_bytes()
    for name, content in {"a.nii": gzip.compress(plain), "b.nii.gz": plain, "C.NII.GZ": gzip.compress(plain)}.items():
        (tmp_path / name).write_bytes(content)
        assert read_header(tmp_path / name).shape == (20, 24, 18)
        assert np.array_equal(read_nifti(tmp_path / name)[0], noise())
    second = tmp_path / "d.nii.gz"
    nib.save(nib.Nifti2Image(noise(), np.diag([2.0, 2.0, 2.5, 1.0])), second)
    assert np.array_equal(read_nifti(second)[0], noise())
    (tmp_path / "f.nii.gz").write_bytes(gzip.compress(plain) + b"what a tape or a tool has added")
    assert np.array_equal(read_nifti(tmp_path / "f.nii.gz")[0], noise())
    (tmp_path / "e.nii.gz").write_bytes(gzip.compress(plain[:-10]))  # whole as gzip, not as NIfTI
    with pytest.raises(UserError, match="is truncated or damaged"):
        read_header(tmp_path / "e.nii.gz")


def test_a_few_voxels_of_metal_are_clipped_and_many_are_an_overflow(tmp_path: Path, caplog) -> None:
    data = noise(dtype=np.int32)
    data[3, 4, 5] = 31743
    clipped = plausible(data.astype(np.int16), "v.nii", "ct")
    assert clipped[3, 4, 5] == 30000 and clipped.dtype == np.int16 and (clipped == data).sum() == data.size - 1
    assert "v.nii: reaches 31743 HU; 1 voxels are clipped to 30000" in caplog.text
    assert plausible((data + 30000 * (data > 31000)).astype(np.float32), "v.nii", "ct").dtype == np.int16
    assert plausible(data.astype(np.int16), "v.nii", "mri")[3, 4, 5] == 31743
    data[:2] = 64512  # a slab of air that wrapped
    with pytest.raises(UserError, match="v.nii: reaches 64512 HU; uint16 overflow or wrong scaling; convert it again"):
        plausible(data.astype(np.float32), "v.nii", "ct")
