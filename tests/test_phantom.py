from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.common.errors import UserError
from scripts.phantom import make_phantom, write


def test_phantom_looks_like_a_thorax_in_hu() -> None:
    hu = make_phantom((64, 60, 56), (6, 6, 6), seed=1)
    assert hu.dtype == np.int16 and hu.shape == (64, 60, 56)
    assert abs(np.median(hu[:3, :3]) + 1000) < 40  # air outside
    assert 0.04 < (np.abs(hu + 850) < 80).mean() < 0.4  # lungs
    assert 0.1 < (np.abs(hu - 50) < 80).mean() < 0.7  # soft tissue
    assert 0.002 < (hu > 200).mean() < 0.15  # bone


def test_phantoms_are_seeded_and_varied() -> None:
    assert np.array_equal(make_phantom((32, 32, 32), seed=3), make_phantom((32, 32, 32), seed=3))
    lungs = [(make_phantom((48, 48, 48), (8, 8, 8), seed=s) < -700)[8:-8, 12:-12, 8:-8].mean() for s in range(6)]
    assert np.std(lungs) > 0.01


def test_write_keeps_what_is_there(tmp_path: Path) -> None:
    assert write(str(tmp_path), count=2, shape=(20, 24, 28), spacing=(5, 5, 6)) == f"2 phantoms in {tmp_path}"
    paths = sorted(tmp_path.iterdir())
    image = nib.load(paths[1])
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S") and image.shape == (20, 24, 28)
    assert np.allclose(nib.affines.voxel_sizes(image.affine), (5, 5, 6)) and image.get_data_dtype() == np.int16
    canonical = nib.as_closest_canonical(image)
    assert np.array_equal(canonical.dataobj, make_phantom((20, 24, 28), (5, 5, 6), seed=1))
    before = Path(paths[0]).stat().st_mtime_ns
    write(str(tmp_path), count=3, shape=(20, 24, 28), spacing=(5, 5, 6))
    assert Path(paths[0]).stat().st_mtime_ns == before and len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"file/phantom_000\.nii\.gz: cannot be written .*; free space or choose another"
    ):
        write(str(tmp_path / "file"), count=1, shape=(20, 24, 28), spacing=(5, 5, 6))
