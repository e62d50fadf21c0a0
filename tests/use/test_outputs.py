"""Folders of results: which are done, and which may be mixed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.use.outputs import Output


def output(folder: Path, sha256: str = "1", window: int = 64, **options: Any) -> Output:
    facts = {"weights": f"{sha256}.pt", "weights_sha256": sha256}
    weights: Any = SimpleNamespace(facts=lambda: facts)
    return Output(str(folder), "_recon", weights, {"window": window}, bundle_version="7", **options)


def age(path: Path) -> None:
    path.touch()
    os.utime(path, (1e9, 1e9))


def test_results_are_named_after_volumes_and_the_record_says_how_they_were_made(tmp_path: Path) -> None:
    made = output(tmp_path)
    assert made.path("a/v") == tmp_path / "a" / "v_recon.nii.gz"
    assert made.sidecar("a/v") == tmp_path / "a" / "v_recon.nii.gz.json"
    wanted = {"weights": "1.pt", "weights_sha256": "1", "bundle_version": "7", "settings": {"window": 64}}
    assert json.loads((tmp_path / "made_with_recon.json").read_text()) == wanted


def test_a_result_is_done_once_it_is_there(tmp_path: Path) -> None:
    made = output(tmp_path)
    assert not made.done("v")
    made.path("v").touch()
    assert made.done("v") and output(tmp_path).done("v")
    whole = output(tmp_path, sidecars=True)
    assert not whole.done("v")
    whole.sidecar("v").touch()
    assert whole.done("v")


def test_what_is_older_than_the_record_is_not_done(tmp_path: Path) -> None:
    output(tmp_path).path("v").touch()
    anew = output(tmp_path, sha256="2", overwrite=True)
    age(anew.path("v"))
    assert not anew.done("v") and not output(tmp_path, sha256="2").done("v")


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    made = output(tmp_path)
    age(made.path("v"))
    with pytest.raises(UserError, match=r"v_recon\.nii\.gz: is there, but is no result of an earlier run; move it"):
        made.done("v")
    assert not output(tmp_path / "other", overwrite=True).done("v")


def test_results_of_other_weights_or_settings_are_refused(tmp_path: Path) -> None:
    output(tmp_path)
    with pytest.raises(UserError, match=r"holds results of other weights \(1\.pt\); give another output_dir, or --ov"):
        output(tmp_path, sha256="2")
    with pytest.raises(UserError, match=r"holds results of other settings \(window was 64, now it is 32\); give"):
        output(tmp_path, window=32)
    (tmp_path / "made_with_recon.json").write_text("{")
    with pytest.raises(UserError, match=r"made_with_recon\.json: is damaged, so it is not known what results are"):
        output(tmp_path)
    output(tmp_path, sha256="2", window=32, overwrite=True)
    assert json.loads((tmp_path / "made_with_recon.json").read_text())["settings"] == {"window": 32}
