"""Which label map belongs to which volume, in the layouts that data sets come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.data.build import build
from scripts.data.pairs import Pairing


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def pairs(root: Path, **options: str) -> dict[str, str | None]:
    """What `build` makes of the volumes beneath `root`: by each volume's path its label map's."""
    build(str(root / "list.json"), relative_to=str(root), val_fraction=0.4, test_fraction=0, **options)
    entries = [entry for split in json.loads((root / "list.json").read_text()).values() for entry in split]
    assert all(
        list(entry) == (["image", "label", "class"] if "label" in entry else ["image", "class"]) for entry in entries
    )
    return {entry["image"]: entry.get("label") for entry in entries}


LAYOUTS = {
    "Medical Segmentation Decathlon": (
        "imagesTr", {"label_dir": "labelsTr"},
        {"imagesTr/a.nii.gz": "labelsTr/a.nii.gz", "imagesTr/b.nii.gz": "labelsTr/b.nii.gz"},
    ),
    "the same, by a pattern over both": (
        ".", {"label_pattern": "s/imagesTr/labelsTr/"},
        {"imagesTr/a.nii.gz": "labelsTr/a.nii.gz", "imagesTr/b.nii.gz": "labelsTr/b.nii.gz"},
    ),
    "nnU-Net": (
        "imagesTr", {"label_dir": "labelsTr", "label_pattern": "s/_0000$//"},
        {"imagesTr/a_0000.nii.gz": "labelsTr/a.nii.gz", "imagesTr/b_0000.nii.gz": "labelsTr/b.nii.gz"},
    ),
    "one folder": (
        ".", {"label_pattern": "s/_ct/_label/"},
        {"pt_1_ct.nii.gz": "pt_1_label.nii.gz", "pt_10_ct.nii.gz": "pt_10_label.nii.gz"},
    ),
    "our phantoms": (
        ".", {"label_pattern": "s/$/_label/"},
        {"phantom_000.nii.gz": "phantom_000_label.nii.gz", "phantom_001.nii.gz": "phantom_001_label.nii.gz"},
    ),
    "a folder for each": (
        ".", {"label_pattern": "s|([^/]*)/ct$|\\1/masks/seg|"},
        {"s1/ct.nii.gz": "s1/masks/seg.nii.gz", "s2/ct.nii.gz": "s2/masks/seg.nii.gz"},
    ),
    "label maps beneath the volumes": (
        ".", {"label_dir": "labels"},
        {"x/a.nii.gz": "labels/x/a.nii.gz", "b.nii": "labels/b.nii.gz"},
    ),
    "none": (".", {}, {"a.nii.gz": None, "b.nii.gz": None}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, options, wanted = LAYOUTS[layout]
    touch(tmp_path, *wanted, *filter(None, wanted.values()))
    monkeypatch.chdir(tmp_path)
    given = {key: str(tmp_path / value) if key == "label_dir" else value for key, value in options.items()}
    assert pairs(tmp_path, data_dir=str(tmp_path / folder), **given) == wanted


def test_label_maps_are_counted_as_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path, *(f"{i}_{kind}.nii.gz" for i in range(3) for kind in ("ct", "label")))
    pairs(tmp_path, data_dir=str(tmp_path), label_pattern="s/_ct/_label/")
    assert f"{tmp_path}: 3 files; left out: 3 label maps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"label_dir": "labels"},
            r"b_ct\.nii: has no label map \(no .*labels/b_ct\.nii\), as 2 of 3 volumes; correct --label_dir or "
            r"--label_pattern, or leave these volumes out by --pattern",
        ),
        ({"label_dir": "label"}, r"label: no such folder; correct --label_dir"),
        ({"label_pattern": "s/_CT/_label/"}, r"\(--label_pattern 's/_CT/_label/' finds nothing in 'a_ct'\), as 3 of 3"),
        ({"label_pattern": "s/_ct/_ct/"}, r"a_ct\.nii\.gz: has no label map \(no .*a_ct\.nii\.gz\), as 3 of 3"),
        ({"label_pattern": "_ct"}, r"--label_pattern '_ct' is no substitution; write it like s/_ct\$/_label/: a"),
        ({"label_pattern": "s/_ct/_label"}, "is no substitution"),
        ({"label_pattern": "s/_ct/_label/g"}, "is no substitution"),
        ({"label_pattern": "s"}, "is no substitution"),
        ({"label_pattern": "s//_label/"}, "is no substitution"),
        ({"label_pattern": "s/(ct/_label/"}, r"'s/\(ct/_label/' is no regular expression \(missing \), .*; write it"),
        ({"label_pattern": r"s/ct/\1/"}, r"is no regular expression \(invalid group reference 1 .*\); write it like"),
        ({"label_pattern": r"s/ct/\g<n>/"}, r"is no regular expression \(unknown group name 'n'\); write it like"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(tmp_path: Path, options: dict[str, str], told: str) -> None:
    touch(tmp_path, "ct/a_ct.nii.gz", "ct/b_ct.nii", "ct/c_ct.nii.gz", "labels/a_ct.nii.gz")
    if "label_dir" in options:
        options = {"label_dir": str(tmp_path / options["label_dir"])}
    with pytest.raises(UserError, match=told):
        pairs(tmp_path, data_dir=str(tmp_path / "ct"), **options)
    assert not (tmp_path / "list.json").exists()


def test_a_mark_within_the_parts_is_escaped(tmp_path: Path) -> None:
    touch(tmp_path, "a/ct/1.nii.gz", "a/seg/1.nii.gz")
    pairing = Pairing(label_pattern=r"s/\/ct\//\/seg\//")
    files = sorted(tmp_path.rglob("*.nii.gz"))
    assert pairing.pair(files, str(tmp_path)) == files[:1] and pairing.labels == {files[0]: files[1]}


def test_folders_of_splits_are_paired_each_by_itself(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{split}/{name}.nii.gz" for split in ("tr", "va") for name in (f"{split}1", f"{split}2")))
    touch(tmp_path, *(f"labels/{split}{i}.nii.gz" for split in ("tr", "va") for i in (1, 2)))
    folders = {f"{split}_dir": str(tmp_path / split[:2]) for split in ("train", "val")}
    found = pairs(tmp_path, label_dir=str(tmp_path / "labels"), **folders)
    assert found == {f"{s}/{s}{i}.nii.gz": f"labels/{s}{i}.nii.gz" for s in ("tr", "va") for i in (1, 2)}


def test_a_map_of_several_volumes_is_told_and_may_not_join_two_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path, *(f"tr/{name}.nii.gz" for name in ("p1_art", "p1_ven", "p1_label", "p2_art", "p2_label")))
    touch(tmp_path, "va/p1_art.nii.gz", "va/p1_label.nii.gz")
    folders = {"train_dir": str(tmp_path / "tr"), "val_dir": str(tmp_path / "va")}
    found = pairs(tmp_path, label_pattern="s/_(art|ven)$/_label/", **folders)
    assert found["tr/p1_art.nii.gz"] == found["tr/p1_ven.nii.gz"] == "tr/p1_label.nii.gz"
    tr = tmp_path / "tr"
    told = f"warning: {tr}/p1_label.nii.gz: is the label map of {tr}/p1_art.nii.gz and of {tr}/p1_ven.nii.gz; correct"
    assert told in capsys.readouterr().err
    touch(tmp_path, "labels/p1_art.nii.gz", "labels/p1_ven.nii.gz", "labels/p2_art.nii.gz")
    with pytest.raises(UserError, match=r"labels/p1_art\.nii\.gz: is the label map of .*, which are in training and"):
        pairs(tmp_path, label_dir=str(tmp_path / "labels"), pattern="*_???.nii.gz", **folders)
