"""Label maps: read, compared with the grid of their volume, completed by the body, and without a region."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from scripts.common.errors import UserError
from scripts.data.labels import (
    BODY,
    NEIGHBOURS,
    LabelStore,
    body,
    check_grid,
    read_labels,
    resampled,
    with_body,
    without,
)
from scripts.data.nifti import read_nifti
from scripts.phantom import Label, labelled_phantom
from tests.helpers import REAL_CT, oriented_affine, save_nifti

SHAPE = (6, 7, 8)


def some_labels() -> np.ndarray:
    return np.random.default_rng(0).choice([0, 1, 7, 200, 255], SHAPE).astype(np.uint8)


# Reading


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_a_map_is_read_whatever_its_type_and_orientation(tmp_path: Path, dtype: type) -> None:
    stored = some_labels().astype(dtype)
    path = save_nifti(tmp_path / "l.nii.gz", stored, oriented_affine("PIR", (1.0, 2.0, 3.0)))
    labels, affine = read_labels(path)
    assert labels.dtype == np.uint8 and np.array_equal(labels, np.moveaxis(some_labels()[::-1, ::-1], 2, 0))
    assert nib.aff2axcodes(affine) == ("R", "A", "S") and np.allclose(nib.affines.voxel_sizes(affine), (3, 1, 2))


def test_what_scaling_leaves_of_an_integer_is_one(tmp_path: Path) -> None:
    image = nib.Nifti1Image(some_labels().astype(np.float32), np.eye(4))
    image.set_data_dtype(np.int16)  # with slope and intercept, so that 7 comes back as 7.0000...
    nib.save(image, tmp_path / "l.nii.gz")
    assert nib.load(tmp_path / "l.nii.gz").dataobj.slope != 1
    assert np.array_equal(read_labels(tmp_path / "l.nii.gz")[0], some_labels())


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (6.5, np.float32, r"has the label 6\.5, which is no integer; resample label maps by nearest"),
        (256, np.int16, r"has the label 256; use labels 0 to 255, 0 for no body"),
        (-1, np.int16, r"has the label -1; use labels 0 to 255, 0 for no body"),
        (40000, np.int32, r"has the label 40000; use labels 0 to 255, 0 for no body"),
        (np.nan, np.float32, r"has voxels that are not finite \(NaN or infinite\); repair or remove the file"),
    ],
)
def test_what_is_no_label_is_named(tmp_path: Path, value: float, dtype: type, told: str) -> None:
    labels = some_labels().astype(dtype)
    labels[2, 3, 4] = value
    with pytest.raises(UserError, match=rf"l\.nii\.gz: {told}"):
        read_labels(save_nifti(tmp_path / "l.nii.gz", labels))


# Grids


def test_grids_may_differ_by_a_tenth_of_a_voxel() -> None:
    affine = oriented_affine("RAS", (0.7, 0.8, 5.0))
    for shift in (0.0, 0.09, -0.09):
        moved = affine.copy()
        moved[2, 3] += 5.0 * shift
        check_grid("l.nii", (SHAPE, moved), "v.nii", (SHAPE, affine))


def test_another_grid_is_named_with_both_files() -> None:
    affine = oriented_affine("RAS", (0.7, 0.8, 5.0))
    remedy = "give the label map that was drawn on this volume, or resample it to the volume's grid by nearest"
    with pytest.raises(UserError) as caught:
        check_grid("l.nii", ((6, 7, 9), affine), "v.nii", (SHAPE, affine))
    assert str(caught.value) == f"l.nii: is 6 x 7 x 9 voxels, but v.nii is 6 x 7 x 8; {remedy}"
    wider = affine @ np.diag([1, 1, 1.1, 1])  # at the last of 8 slices 0.7 slices further
    with pytest.raises(UserError) as caught:
        check_grid("l.nii", (SHAPE, wider), "v.nii", (SHAPE, affine))
    assert str(caught.value) == f"l.nii: lies up to 0.7 voxels beside v.nii; {remedy}"
    with pytest.raises(UserError, match=r"lies up to .* voxels beside v\.nii"):
        check_grid("l.nii", (SHAPE, np.eye(4)), "v.nii", (SHAPE, affine))


@pytest.mark.parametrize("size", [(3, 14, 8), (12, 7, 5), (5, 9, 24)])
def test_a_new_voxel_has_the_label_at_its_centre(size: tuple[int, ...]) -> None:
    labels = some_labels()
    got = resampled(torch.from_numpy(labels)[None, None], size)
    nearest = [((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(size, SHAPE, strict=True)]
    assert got.dtype == torch.uint8 and np.array_equal(got[0, 0], labels[np.ix_(*nearest)])


# The body


def pieces_of(mask: np.ndarray) -> int:
    return ndimage.label(mask)[1]


@pytest.mark.parametrize("seed", range(3))
def test_the_body_of_a_phantom_has_lungs_and_no_table(seed: int) -> None:
    hu, labels = labelled_phantom((96, 80, 96), (4, 4, 4), seed)
    found, wanted = body(hu), labels > 0
    assert pieces_of(found) == 1
    assert (wanted & ~found).sum() < 10 and found[np.isin(labels, (Label.LEFT_LUNG, Label.RIGHT_LUNG))].all()
    assert (found & ~wanted).sum() < 0.08 * wanted.sum()  # a voxel of skin all around, which it fills in part
    table = (hu > -800) & ~ndimage.binary_dilation(wanted, iterations=3)
    assert table.sum() > 3000 and (found & table).sum() < 0.15 * table.sum()


def test_with_body_fills_what_has_no_label() -> None:
    hu, labels = labelled_phantom((64, 60, 56), (6, 6, 6), 1)
    organs = np.where(labels == BODY, 0, labels).astype(np.uint8)
    filled = with_body(organs, hu)
    assert filled.dtype == np.uint8 and np.array_equal(filled[organs > 0], organs[organs > 0])
    assert np.array_equal(filled[organs == 0] == BODY, body(hu)[organs == 0]) and set(
        np.unique(filled[organs == 0])
    ) == {0, 200}
    assert np.array_equal(with_body(organs, hu, 99) == 99, filled == BODY)
    assert with_body(labels, hu) is labels  # the body has its label already


def test_no_body_is_found_in_air() -> None:
    assert not body(np.full(SHAPE, -1000, np.int16)).any()


@pytest.mark.skipif(not REAL_CT.is_dir(), reason=f"no real CT in {REAL_CT}")
def test_the_body_of_a_patient_lies_on_the_table() -> None:
    hu, _ = read_nifti(REAL_CT / "chest_abdomen_3mm.nii.gz")  # on a curved mat, which touches the back
    found = body(hu)
    assert pieces_of(found) == 1 and found[hu > 200].all()  # bones are
    assert (hu[:, :2] > -800).sum() > 2000 and not found[:, :2].any()  # the lowest part of the table
    assert ((hu > -800) & ~ndimage.binary_dilation(found, iterations=3)).sum() > 10000


@pytest.mark.skipif(not REAL_CT.is_dir(), reason=f"no real CT in {REAL_CT}")
def test_the_lungs_of_a_patient_are_body_and_what_holds_the_head_is_not() -> None:
    hu, _ = read_nifti(REAL_CT / "openkbp" / "pt_106_ct.nii.gz")
    labels, _ = read_labels(REAL_CT / "openkbp" / "pt_106_label.nii.gz")
    found = body(hu)
    assert pieces_of(found) == 1
    organs = (labels > 0) & (labels != BODY)
    assert organs.sum() > 3000 and (found & organs).sum() > 0.998 * organs.sum()
    lungs, count = ndimage.label((hu < -700)[:, :, :8])
    lungs = lungs == 1 + np.argsort(np.bincount(lungs.ravel())[1:])[-2]  # the largest piece is the air around
    assert count > 1 and lungs.sum() > 4000 and found[:, :, :8][lungs].all()
    assert (
        (hu > -800) & ~ndimage.binary_dilation(found, iterations=2)
    ).sum() > 10000  # the mask, the headrest, the table


# Without a region


def test_labels_give_way_to_others() -> None:
    labels = some_labels()
    found, removed = without(labels, {7: 1, 26: 4, 255: 200})
    assert removed == [7, 255] and np.array_equal(found == 1, (labels == 1) | (labels == 7))
    assert np.array_equal(found == 200, (labels == 200) | (labels == 255)) and 4 not in found
    same, none = without(labels, {26: 4})
    assert same is labels and none == []
    assert np.array_equal(labels, some_labels())  # what is given stays


def test_each_piece_becomes_what_is_commonest_around_it() -> None:
    labels = np.zeros((12, 10, 10), np.uint8)
    labels[:6], labels[6:] = 28, 30
    labels[2:4, 4:6, 4:6] = 23  # in the one lobe, with a vessel and another lesion beside it
    labels[4, 5, 5], labels[1, 4, 4] = 6, 24
    labels[8:10, 2:4, 2:4] = 23  # in the other
    labels[0, 0, 0] = 23  # at the corner
    found, removed = without(labels, {23: NEIGHBOURS, 24: 4})
    assert removed == [23, 24]
    assert (found[2:4, 4:6, 4:6] == 28).all() and (found[8:10, 2:4, 2:4] == 30).all() and found[0, 0, 0] == 28
    assert found[4, 5, 5] == 6 and found[1, 4, 4] == 4 and set(np.unique(found)) == {4, 6, 28, 30}


def test_a_region_is_no_neighbour_of_itself() -> None:
    labels = np.full((5, 5, 5), 200, np.uint8)
    labels[1:4, 1:4, 1:4] = 24
    labels[2, 2, 2] = 23  # all around it is what is to go as well
    found, _ = without(labels, {23: NEIGHBOURS, 24: 4})
    assert found[2, 2, 2] == 0 and (found == 4).sum() == 26
    found, _ = without(labels, {24: 4, 23: NEIGHBOURS})  # in the order of the table
    assert (found == 4).sum() == 27


# The store


def test_the_store_counts_labels(tmp_path: Path) -> None:
    affine = oriented_affine("LPS", (1.0, 1.0, 2.0))
    entry = {"image": str(save_nifti(tmp_path / "l.nii.gz", some_labels(), affine))}
    store = LabelStore(tmp_path / "store")
    assert store.convert_missing([entry], progress=False) == 1 and store.convert_missing([entry], progress=False) == 0
    labels = store.open(entry)
    assert labels.dtype == np.uint8 and np.array_equal(labels, some_labels()[::-1, ::-1])
    assert store.counts(entry) == {int(v): int((some_labels() == v).sum()) for v in (0, 1, 7, 200, 255)}
    wrong = {"image": str(save_nifti(tmp_path / "w.nii.gz", some_labels() + np.float32(0.5)))}
    with pytest.raises(UserError, match=r"^\S*w\.nii\.gz: has the label [\d.]+, which is no integer; resample"):
        store.convert_missing([entry, wrong], progress=False)
