from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scripts.common.errors import UserError
from scripts.data.build import build
from scripts.data.datalist import load, load_split
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
        {"image": str(tree / "a" / "v.nii.gz"), "class": "mri", "name": "v"}
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


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_building_and_using_agree_on_the_files_of_a_folder(data: st.DataObject, tmp_path_factory) -> None:
    root = tmp_path_factory.mktemp("tree")
    names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=12).filter(
        lambda name: name not in (".", "..")
    )
    for number, name in enumerate(data.draw(st.lists(names, min_size=3, max_size=8, unique=True))):
        folder = root / data.draw(st.sampled_from(["p", "q r", "\udcfc#", ".h"]))
        folder.mkdir(exist_ok=True)
        (folder / f"{name}{number}{data.draw(st.sampled_from(['.nii.gz', '.nii', '.NII.GZ', '.txt']))}").touch()
    (root / "up").symlink_to(root)
    (root / "q").symlink_to(root / "p")
    try:
        used = find(str(root))
    except UserError:
        assume(False)
    assume(len(used) >= 3)
    output = root.parent / f"{root.name}.json"
    build(str(output), data_dir=str(root), val_fraction=0.3, test_fraction=0)
    listed = load(output)
    assert sorted(e["image"] for split in listed.values() for e in split) == [e["image"] for e in used]
    assert {(e["image"], e["name"]) for e in find(str(root), str(output))} == {(e["image"], e["name"]) for e in used}


def test_several_datalists_are_joined_each_with_its_own_folder(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ct.nii.gz").touch()
        (tmp_path / f"{folder}.json").write_text(json.dumps({"training": [{"image": "ct.nii.gz"}], "testing": []}))
    files, folders = ([str(tmp_path / f"{name}{end}") for name in ("one", "two")] for end in (".json", ""))
    assert names(str(tmp_path), files, data_base_dir=folders) == ["one/ct", "two/ct"]
    assert [e["image"] for e in load_split(files, "training", None, folders)] == [f"{f}/ct.nii.gz" for f in folders]
    assert len(load_split(files, "training", folders[0])) == 2
    with pytest.raises(UserError, match="data_base_dir has 1 entries, but json_data_list 2; give one folder for each"):
        load_split(files, "training", None, folders[:1])
    with pytest.raises(UserError, match=r"one\.json, .*two\.json: the list 'testing' is empty or missing"):
        load_split(files, "testing", None, folders)
