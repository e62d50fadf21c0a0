from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
from monai.transforms import ScaleIntensityRange, ScaleIntensityRangePercentiles

from scripts.common.errors import UserError
from scripts.data.datalist import load
from scripts.data.nifti import read_nifti
from scripts.data.store import ArrayStore, Store, Volume
from scripts.phantom import make_phantom
from scripts.volumes import prepare
from tests.helpers import oriented_affine, save_nifti


def entry(path: Path, modality: str = "ct") -> dict[str, str]:
    return {"image": str(path), "class": modality}


def test_boxes_equal_the_whole_volume(phantoms: list[Path], tmp_path: Path) -> None:
    data, affine = read_nifti(phantoms[0])
    volume = Store(tmp_path).open(entry(phantoms[0]))
    assert volume.shape == data.shape and np.array_equal(volume.affine, affine)
    assert volume.spacing == pytest.approx((8, 8, 9))
    box = (slice(3, 30), slice(0, 36), slice(40, 44))
    got = volume.read(box)
    assert got.dtype == np.int16 and np.array_equal(got, data[box])


def test_ct_is_windowed_as_monai_does(phantoms: list[Path], tmp_path: Path) -> None:
    data, _ = read_nifti(phantoms[1])
    volume = Store(tmp_path).open(entry(phantoms[1]))
    expected = ScaleIntensityRange(-1000, 1000, 0, 1, clip=True)(data.astype(np.float32))
    assert np.array_equal(volume.intensity.normalise(data).numpy(), np.asarray(expected))


def test_mri_is_scaled_by_percentiles_without_clipping(tmp_path: Path) -> None:
    data = np.random.default_rng(0).gamma(2.0, 100.0, (20, 24, 18)).astype(np.float32)
    volume = Store(tmp_path).open(entry(save_nifti(tmp_path / "m.nii.gz", data), "mri"))
    expected = ScaleIntensityRangePercentiles(0.0, 99.5, 0, 1, clip=False)(data[None])[0]
    assert np.allclose(volume.intensity.normalise(read_nifti(tmp_path / "m.nii.gz")[0]), expected, atol=1e-4)
    assert volume.intensity.normalise(data).max() > 1


def test_conversion_is_found_again_until_something_changes(phantoms: list[Path], tmp_path: Path) -> None:
    source = tmp_path / "copy.nii.gz"
    source.write_bytes(phantoms[0].read_bytes())
    store = Store(tmp_path / "store")
    first = store.convert(entry(source))
    written = first.stat().st_mtime_ns
    assert store.convert(entry(source)) == first and first.stat().st_mtime_ns == written
    assert store.path(entry(source, "mri")) != first and Store(tmp_path / "store", 1).path(entry(source)) != first
    os.utime(source, ns=(1, 1))
    assert store.path(entry(source)) != first


def test_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    constant = save_nifti(tmp_path / "c.nii.gz", np.zeros((8, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"c\.nii\.gz: is constant"):
        Store(tmp_path / "store").convert(entry(constant, "mri"))
    broken = tmp_path / "b.nii.gz"
    broken.write_bytes(constant.read_bytes()[:-6])
    with pytest.raises(UserError, match=r"b\.nii\.gz: is truncated"):
        Store(tmp_path / "store").convert_missing([entry(broken)], progress=False)
    assert not list(tmp_path.glob("store/*"))


def test_prepare_converts_what_is_missing(phantoms: list[Path], tmp_path: Path, capsys) -> None:
    entries, store = [entry(p) for p in phantoms[:4]], Store(tmp_path)
    store.convert(entries[0])
    assert store.convert_missing(entries, num_workers=2) == 3
    assert "3 volumes to convert" in capsys.readouterr().out
    assert store.convert_missing(entries, num_workers=2) == 0
    assert len(list(tmp_path.iterdir())) == 4


def test_volumes_prepare_converts_a_datalist(datalist: Path, tmp_path: Path) -> None:
    folder = str(tmp_path / "store")
    Store(folder).convert(load(datalist)["testing"][0])
    told = prepare(str(datalist), folder, num_workers=2)
    assert told == f"7 volumes converted, 1 were there already, in {folder}"


def test_prepare_refuses_a_full_disk(phantoms: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("scripts.data.store.shutil.disk_usage", lambda _: _Usage())
    with pytest.raises(UserError, match="converting needs about .* GB, but 0.00 GB is free; set store_dir"):
        Store(tmp_path / "store").convert_missing([entry(phantoms[0])], progress=False)


class _Usage:
    free = 10


def test_paths_with_spaces_and_other_letters(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(-900, 900, (9, 10, 11)).astype(np.int16)
    path = save_nifti(tmp_path / "胸部 CT é.nii.gz", data, oriented_affine("RAS", (1, 1, 1)))
    volume = Store(tmp_path / "ä store").open(entry(path))
    assert np.array_equal(volume.read([slice(0, 9), slice(0, 10), slice(0, 11)]), data)


def _convert_all(arguments: tuple[list[Path], Path]) -> list[Path]:
    sources, folder = arguments
    return [Store(folder).convert(entry(source)) for source in sources]


def test_processes_that_convert_the_same_volumes_do_no_harm(phantoms: list[Path], tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_convert_all, [(phantoms[:3], tmp_path)] * 4)
    assert all(r == results[0] for r in results)
    assert sorted(tmp_path.iterdir()) == sorted(results[0])  # and nothing half done
    for source, target in zip(phantoms[:3], results[0], strict=True):
        data, _ = read_nifti(source)
        assert np.array_equal(Volume(target).read([slice(0, n) for n in data.shape]), data)


def test_conversion_is_no_larger_than_the_nifti(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "p.nii.gz", make_phantom((128, 128, 96), (3, 3, 3), seed=2))
    assert Store(tmp_path / "store").convert(entry(path)).stat().st_size < 1.15 * path.stat().st_size


def test_a_conversion_of_version_0_3_is_found_again(tmp_path: Path) -> None:
    """Its name is a promise: a lab's store is not converted anew."""
    source = tmp_path / "v.nii.gz"
    source.write_bytes(b"x" * 100)
    os.utime(source, ns=(1, 1))
    identity = f'[1, "{source}", 100, 1, "ct", 0]'
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    assert Store("store").path({"image": str(source)}) == Path(f"store/v-{digest}.b2nd")


class Ones(ArrayStore):
    """As many ones as the file has bytes."""

    unit = "file"

    def preprocessing(self, entry: Mapping[str, Any]) -> list[Any]:
        return ["ones"]

    def read(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        if not (size := Path(entry["image"]).stat().st_size):
            raise UserError(f"{entry['image']}: is empty")
        return np.ones((size, 2), np.float16), {"bytes": size}


def test_another_kind_of_file_says_only_what_becomes_of_it(tmp_path: Path, capsys) -> None:
    for name, size in (("a", 70), ("b", 0), ("c", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    entries, store = [{"image": str(tmp_path / name)} for name in "abc"], Ones(tmp_path / "store")
    with pytest.raises(UserError, match=rf"{tmp_path}/b: is empty \(1 more"):
        store.convert_missing(entries)
    assert "3 files to convert into" in capsys.readouterr().out
    (path,) = (tmp_path / "store").iterdir()
    array = blosc2.open(str(path), mode="r")
    assert path == store.convert(entries[0]) and array.dtype == np.float16 and np.all(array[...] == 1)
    assert array.schunk.vlmeta["volume"] == {"bytes": 70, "source": str(tmp_path / "a")}
    assert Store(tmp_path / "store").path(entries[0]) != path
