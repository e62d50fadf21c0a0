from __future__ import annotations

import json
from pathlib import Path

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
