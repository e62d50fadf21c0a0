from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.common.errors import UserError
from scripts.data.datalist import load
from scripts.data.examine import check, check_headers
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


def test_headers_are_read_and_broken_ones_counted(datalist: Path) -> None:
    assert {h.shape for h in check_headers(load(datalist)["training"], progress=False)} == {(40, 36, 44)}
    broken = [{"image": "/nowhere/a.nii.gz", "class": "ct"}] * 3
    with pytest.raises(UserError, match=r"/nowhere/a\.nii\.gz: no such file.*\(2 more;"):
        check_headers(broken, progress=False)
