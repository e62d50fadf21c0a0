from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from scripts.common.errors import UserError
from scripts.data.datalist import load
from scripts.data.examine import check, check_headers, examine
from tests.helpers import save_nifti


def test_check_reports_and_passes(datalist: Path, capsys) -> None:
    check(str(datalist))
    printed = capsys.readouterr().out
    assert "0 problems, 0 warnings" in printed
    assert "40 x 36 x 44  8 x 8 x 9 mm  LPS  int16  p1 -10" in printed


def test_check_finds_what_would_fail(datalist: Path, tmp_path: Path, capsys) -> None:
    content = json.loads(datalist.read_text())
    large = save_nifti(
        tmp_path / "large.nii.gz", 31000 + np.arange(20, dtype=np.int32) + np.zeros((20, 20, 20), np.int32)
    )
    positive = save_nifti(tmp_path / "positive.nii.gz", np.arange(8000).reshape(20, 20, 20).astype(np.int16))
    for path in (large, positive, tmp_path / "missing.nii.gz"):
        content["training"].append({"image": str(path), "class": "ct"})
    content["testing"].append(content["training"][0])
    datalist.write_text(json.dumps(content))
    with pytest.raises(UserError, match="2 of its volumes would fail; first: .*large.nii.gz: reaches 31019 HU; uint16"):
        check(str(datalist))
    printed = capsys.readouterr().out
    assert "missing.nii.gz: no such file" in printed
    assert "positive.nii.gz: minimum 0 HU, no air; is it rescaled to HU?" in printed
    assert "is in training and in testing" in printed


def test_examine_finds_what_cannot_be_converted(tmp_path: Path) -> None:
    data = np.zeros((12, 13, 14), np.float32)
    data[0, 0, 0] = 1.0
    path = str(save_nifti(tmp_path / "m.nii.gz", data))
    assert examine({"image": path, "class": "mri"}).problems == [
        f"{path}: is constant (99.5 % of its voxels are 0); remove it"
    ]
    thin = examine({"image": path})  # without a class: CT
    assert thin.problems == [] and [w.partition(": ")[2] for w in thin.warnings] == [
        "minimum 0 HU, no air; is it rescaled to HU?",
        "only 12 slices along one axis; patches will be padded",
    ]


def test_headers_are_read_and_broken_ones_counted(datalist: Path) -> None:
    assert {h.shape for h in check_headers(load(datalist)["training"], progress=False)} == {(40, 36, 44)}
    broken = [{"image": "/nowhere/a.nii.gz", "class": "ct"}] * 3
    with pytest.raises(UserError, match=r"/nowhere/a\.nii\.gz: no such file.*\(2 more;"):
        check_headers(broken, progress=False)


# Label maps


def give_labels(datalist: Path, root: Path, maps: list[np.ndarray | None]) -> list[str]:
    """Label maps for the volumes of a datalist, on their grid but stored in another orientation; their paths."""
    content, paths = json.loads(datalist.read_text()), []
    for entry, labels in zip([entry for split in content.values() for entry in split], maps, strict=True):
        if labels is not None:
            image = nib.as_closest_canonical(nib.Nifti1Image(labels, nib.load(entry["image"]).affine))
            entry["label"] = str(root / f"labels {len(paths)}.nii.gz")
            nib.save(image, entry["label"])
            paths.append(entry["label"])
    datalist.write_text(json.dumps(content))
    return paths


def blocks(**sizes: int) -> np.ndarray:
    """A map of 40 x 36 x 44 voxels in which label `l<number>` has so many of them."""
    flat = np.repeat([int(name[1:]) for name in sizes], list(sizes.values()))
    return np.pad(flat, (0, 40 * 36 * 44 - flat.size)).reshape(40, 36, 44).astype(np.uint8)


def test_labels_are_counted_and_their_lack_is_told(
    datalist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = [blocks(l3=10, l200=99), blocks(l3=30), blocks(l255=7, l200=1), None, *[blocks(l3=20, l200=1)] * 4]
    paths = give_labels(datalist, tmp_path, maps)
    check(str(datalist))
    printed = capsys.readouterr().out
    table = "7 of 8 volumes have label maps\n  label  volumes  voxels, median of these volumes\n"
    rows = [
        f"{label:>7}  {volumes:>7}  {voxels:>14}" for label, volumes, voxels in ((3, 6, 20), (200, 6, 1), (255, 1, 7))
    ]
    assert table + "\n".join(rows) in printed
    assert [line.rpartition("  ")[2] for line in printed.splitlines() if " labels" in line and "window" in line] == [
        "2 labels", "1 labels, no 200", "2 labels", "2 labels", "2 labels", "2 labels", "2 labels",
    ]  # fmt: skip
    bare = json.loads(datalist.read_text())["training"][3]["image"]
    assert f"warning: {bare}: has no label map, as 1 of 8 volumes; no ControlNet can be trained on them" in printed
    told = "has no label 200 (body), as 1 of 7 label maps; encode.json gives it to the rest of the body, found by HU"
    assert f"warning: {paths[1]}: {told} (body_label)\n0 problems, 2 warnings" in printed


def test_maps_that_are_wrong_are_problems(datalist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = give_labels(datalist, tmp_path, [blocks(l200=1)] * 8)
    good = nib.load(paths[0])
    data, affine = np.asarray(good.dataobj), good.affine
    nib.save(nib.Nifti1Image(data[:-1], affine), paths[0])
    nib.save(nib.Nifti1Image(data, affine + 4 * np.eye(4, k=3)), paths[1])
    nib.save(nib.Nifti1Image(data + np.float32(0.5), affine), paths[2])
    nib.save(nib.Nifti1Image(data + np.int16(256), affine), paths[3])
    nib.save(nib.Nifti1Image(data - np.int16(1), affine), paths[4])
    Path(paths[5]).unlink()
    with pytest.raises(
        UserError, match=r"6 of its volumes would fail; first: .*labels 0\.nii\.gz: is 39 x 36 x 44 voxels"
    ):
        check(str(datalist))
    printed = capsys.readouterr().out
    problems = [line.removeprefix("problem: ") for line in printed.splitlines() if line.startswith("problem: ")]
    remedy = "give the label map that was drawn on this volume, or resample it to the volume's grid by nearest"
    images = [entry["image"] for split in load(datalist).values() for entry in split]
    assert problems == [
        f"{paths[0]}: is 39 x 36 x 44 voxels, but {images[0]} is 40 x 36 x 44; {remedy}",
        f"{paths[1]}: lies up to 0.5 voxels beside {images[1]}; {remedy}",
        f"{paths[2]}: has the label 0.5, which is no integer; resample label maps by nearest",
        f"{paths[3]}: has the label 456; use labels 0 to 255, 0 for no body",
        f"{paths[4]}: has the label -1; use labels 0 to 255, 0 for no body",
        f"{paths[5]}: no such file; correct the path",
    ]
    assert "2 of 2 volumes have label maps" in printed


def test_maps_of_mri_need_no_body(tmp_path: Path) -> None:
    image = save_nifti(tmp_path / "m.nii.gz", np.random.default_rng(0).normal(100, 20, (16, 17, 18)).astype(np.float32))
    label = save_nifti(tmp_path / "l.nii.gz", np.full((16, 17, 18), 5, np.uint8))
    (tmp_path / "list.json").write_text(
        json.dumps(
            {s: [{"image": str(image), "label": str(label), "class": "mri"}] for s in ("training", "validation")}
        )
    )
    found = examine(load(tmp_path / "list.json")["training"][0])
    assert found.labels == {5: 16 * 17 * 18} and found.problems == found.warnings == []
