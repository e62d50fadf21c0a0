from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from scripts.common.errors import UserError
from scripts.data.labels import BODY
from scripts.phantom import Label, labelled_phantom, make_phantom, write


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


def test_the_label_map_says_what_the_volume_shows() -> None:
    hu, labels = labelled_phantom((96, 80, 96), (4, 4, 4), seed=4)
    assert np.array_equal(hu, make_phantom((96, 80, 96), (4, 4, 4), seed=4))
    assert labels.dtype == np.uint8 and set(np.unique(labels)) == set(Label) and Label.BODY == BODY
    bounds = {
        Label.NONE: (-1010, -985), Label.LIVER: (40, 90), Label.AORTA: (120, 170), Label.LEFT_LUNG: (-880, -780),
        Label.RIGHT_LUNG: (-880, -780), Label.VERTEBRA: (200, 400), Label.LEFT_RIB: (250, 500),
        Label.RIGHT_RIB: (250, 500), Label.HEART: (50, 120), Label.STERNUM: (120, 260), Label.BODY: (-100, 60),
    }  # fmt: skip
    for label, (low, high) in bounds.items():
        assert (labels == label).sum() > 500 and low < np.median(hu[labels == label]) < high, label.name
    centre = {label: np.argwhere(labels == label).mean(0) for label in Label}  # x to the right, y to the front, z up
    assert centre[Label.LEFT_LUNG][0] < 40 and centre[Label.HEART][0] < 47.5 < centre[Label.LIVER][0]
    assert centre[Label.LEFT_RIB][0] < 40 and centre[Label.RIGHT_RIB][0] > 55 and centre[Label.RIGHT_LUNG][0] > 55
    assert centre[Label.SPINAL_CORD][1] < centre[Label.VERTEBRA][1] < centre[Label.HEART][1] < centre[Label.STERNUM][1]
    assert ((hu > -700) & ~ndimage.binary_dilation(labels > 0, iterations=3)).sum() > 3000  # the table


def test_label_maps_are_written_beside_the_volumes(tmp_path: Path) -> None:
    options = {"shape": (20, 24, 28), "spacing": (5, 5, 6), "seed": 3, "axcodes": "PIR"}
    write(str(tmp_path / "bare"), count=2, **options)
    write(str(tmp_path), count=1, **options)
    volume = tmp_path / "phantom_000.nii.gz"
    before = volume.read_bytes()
    write(str(tmp_path), count=2, labels=True, **options)  # also for volumes that are there
    assert sorted(path.name for path in tmp_path.glob("*.nii.gz")) == [
        f"phantom_00{i}{kind}.nii.gz" for i in range(2) for kind in ("", "_label")
    ]
    assert volume.read_bytes() == before
    for i in range(2):
        image, label = (nib.load(tmp_path / f"phantom_00{i}{kind}.nii.gz") for kind in ("", "_label"))
        assert np.array_equal(image.dataobj, nib.load(tmp_path / "bare" / f"phantom_00{i}.nii.gz").dataobj)
        assert np.array_equal(label.affine, image.affine) and label.get_data_dtype() == np.uint8
        canonical = np.asarray(nib.as_closest_canonical(label).dataobj)
        assert np.array_equal(canonical, labelled_phantom((20, 24, 28), (5, 5, 6), 3 + i)[1])


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
