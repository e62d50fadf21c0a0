from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.use.inputs import find


def names(*arguments: object, **options: object) -> list[str]:
    return [entry["name"] for entry in find(*arguments, **options)]  # type: ignore[arg-type]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a/v.nii.gz", "b/v.nii", ".hidden/v.nii.gz", "a/.v.nii.gz", "notes.txt", "out/a/v_recon.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    return tmp_path


def test_a_file_a_folder_and_a_datalist(tree: Path) -> None:
    assert find(str(tree / "a" / "v.nii.gz"), modality="mri") == [
        {"image": str(tree / "a" / "v.nii.gz"), "class": "mri", "split": "training", "name": "v"}
    ]
    assert names(str(tree), output_dir=str(tree / "out")) == ["a/v", "b/v"]
    content = {"training": [{"image": "a/v.nii.gz"}], "testing": [{"image": "b/v.nii", "class": "mri"}]}
    (tree / "list.json").write_text(json.dumps(content))
    found = find(str(tree / "list.json"))
    assert [(e["name"], e["class"], e["split"]) for e in found] == [
        ("a/v", "ct", "training"),
        ("b/v", "mri", "testing"),
    ]
    assert names(str(tree), str(tree / "list.json"), "testing") == ["b/v"]
    (tree / "list.json").rename(tree / "datalist_ct.json")
    assert names(str(tree), splits=["training"]) == ["a/v"]


def test_results_of_the_same_name_are_refused(tree: Path) -> None:
    (tree / "a" / "v.nii").touch()
    with pytest.raises(UserError, match=r"a/v\.nii\.gz: its results would overwrite those of .*a/v\.nii; rename one"):
        find(str(tree / "a"))
    with pytest.raises(UserError, match=r"c: no such file or folder; correct dataset_dir"):
        find(str(tree / "c"))
