"""Whatever stands in a datalist or a NIfTI header: it works, or ends in a sentence for the user."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.common.errors import UserError, last_line
from scripts.data.datalist import entries_of, load
from scripts.data.examine import examine
from scripts.data.nifti import read_header, read_nifti

EXAMPLES = pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
NAMES = st.sampled_from(["training", "validation", "testing", "trainin", "image", "class", "ct", "mri", "", "a.nii.gz"])
TEXT = st.one_of(NAMES, st.text(max_size=8))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


def settings_for(count: int) -> settings:
    return settings(max_examples=count, deadline=5000)


def assert_clear(error: UserError, culprit: str) -> None:
    line = last_line(error)
    assert line.startswith("error: ") and culprit in line and "\n" not in line


@EXAMPLES
def test_any_json_is_a_datalist_or_refused_by_name(count: int, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"

    @settings_for(count)
    @given(content=JSON)
    def holds(content: object) -> None:
        path.write_text(json.dumps(content))
        try:
            datalist = load(path)
            entries_of(datalist, "training", path)
        except UserError as error:
            assert_clear(error, "fuzz.json")
        else:
            assert all(set(entry) == {"image", "class"} for split in datalist.values() for entry in split)

    holds()


@EXAMPLES
def test_any_bytes_are_a_datalist_or_refused_by_name(count: int, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"

    @settings_for(count)
    @given(content=st.binary(max_size=64))
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        try:
            load(path)
        except UserError as error:
            assert_clear(error, "fuzz.json")

    holds()


def volume_bytes() -> bytes:
    data = np.random.default_rng(0).integers(-1000, 1000, (5, 6, 7)).astype(np.int16)
    return nib.Nifti1Image(data, np.diag([2.0, 2.0, 3.0, 1.0])).to_bytes()


@EXAMPLES
def test_any_header_is_read_or_refused_by_name(count: int, tmp_path: Path) -> None:
    whole = volume_bytes()

    @settings_for(count)
    @given(
        places=st.dictionaries(st.integers(0, 351), st.integers(0, 255), min_size=1, max_size=6),
        keep=st.one_of(st.none(), st.integers(0, 800)),
        compressed=st.booleans(),
    )
    def holds(places: dict[int, int], keep: int | None, compressed: bool) -> None:
        content = bytearray(whole)
        for place, value in places.items():
            content[place] = value
        path = tmp_path / ("fuzz.nii.gz" if compressed else "fuzz.nii")
        path.write_bytes(gzip.compress(bytes(content[:keep])) if compressed else bytes(content[:keep]))
        try:
            header = read_header(path)
            data, affine = read_nifti(path)
        except UserError as error:
            assert_clear(error, "fuzz.nii")
        else:
            assert sorted(data.shape) == sorted(header.shape) and np.isfinite(data).all() and affine.shape == (4, 4)
            assert data.dtype in (np.int16, np.float32)
        found = examine({"image": str(path), "class": "ct"})
        assert all("fuzz.nii" in problem for problem in found.problems)

    holds()


@EXAMPLES
def test_a_flipped_bit_changes_nothing_or_is_named(count: int, tmp_path: Path) -> None:
    data = np.random.default_rng(1).integers(-1000, 1000, (16, 17, 18)).astype(np.int16)
    path = tmp_path / "flip.nii.gz"
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 3.0, 1.0])), path)
    whole, rng = path.read_bytes(), np.random.default_rng(2)
    wanted, affine = read_nifti(path)
    refused = 0
    for place, bit in zip(rng.integers(0, len(whole), count), rng.integers(0, 8, count), strict=True):
        content = bytearray(whole)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        try:
            got, where = read_nifti(path)
        except UserError as error:
            assert_clear(error, "flip.nii.gz")
            refused += 1
        else:
            assert np.array_equal(got, wanted) and np.array_equal(where, affine), (place, bit)
    assert refused > 0.95 * count  # but for the fields of gzip's header that say nothing about the content
