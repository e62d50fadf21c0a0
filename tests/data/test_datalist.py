from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.data.build import build
from scripts.data.datalist import entries_of, identities, load, load_split, shared_volumes


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Three folders of empty files, and six patients with three scans each in a fourth."""
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        for i in range(count):
            (tmp_path / split / f"CVAI-{i:03d}-tar.nii.gz").write_bytes(b"x" * (i + 1))
        (tmp_path / split / "notes.txt").touch()
    for patient in range(6):
        for scan in range(3):
            path = tmp_path / "all" / f"patient{patient}" / f"scan{scan}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return tmp_path


def test_build_from_three_folders(folders: Path, capsys) -> None:
    output = folders / "out" / "datalist.json"
    arguments = {f"{s}_dir": str(folders / s) for s in ("train", "val", "test")}
    build(str(output), pattern="CVAI-*-tar.nii.gz", **arguments)
    content = json.loads(output.read_text())
    assert [len(content[s]) for s in ("training", "validation", "testing")] == [4, 2, 1]
    assert content["training"][0] == {"image": str(folders / "train/CVAI-000-tar.nii.gz"), "class": "ct"}
    images = [e["image"] for e in content["training"]]
    assert images == sorted(images)
    assert "training        4 files" in capsys.readouterr().out
    first = output.read_bytes()
    build(str(output), pattern="CVAI-*-tar.nii.gz", **arguments)
    assert output.read_bytes() == first


def test_build_splits_one_folder_by_patient(folders: Path) -> None:
    output = folders / "datalist.json"
    options = {"val_fraction": 0.17, "test_fraction": 0.17, "group_by": r"patient\d+"}
    build(str(output), data_dir=str(folders / "all"), **options)
    content = json.loads(output.read_text())
    patients = {s: {Path(e["image"]).parent.name for e in entries} for s, entries in content.items()}
    assert [len(patients[s]) for s in ("training", "validation", "testing")] == [4, 1, 1]
    assert len(set.union(*patients.values())) == 6
    assert sum(map(len, content.values())) == 18
    build(str(folders / "other.json"), data_dir=str(folders / "all"), seed=1, **options)
    assert (folders / "other.json").read_text() != output.read_text()


def test_build_relative_paths_load_from_their_folder(folders: Path) -> None:
    output = folders / "datalist.json"
    build(str(output), train_dir=str(folders / "train"), val_dir=str(folders / "val"), relative_to=str(folders))
    assert json.loads(output.read_text())["training"][1]["image"] == "train/CVAI-001-tar.nii.gz"
    assert load(output)["training"][1]["image"] == str(folders / "train/CVAI-001-tar.nii.gz")


def test_relative_paths_are_found_under_base_dir(folders: Path) -> None:
    output = folders / "elsewhere" / "datalist.json"
    build(str(output), data_dir=str(folders / "all"), relative_to=str(folders / "all"))
    entry = load(output, folders / "all")["training"][0]["image"]
    assert Path(entry).is_file() and Path(entry).is_absolute()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_dir": "nowhere"}, "nowhere: no such folder"),
        ({"data_dir": "all", "pattern": "*.dcm"}, r"no file matches the pattern '\*\.dcm'"),
        ({"data_dir": "all", "val_fraction": 0.7, "test_fraction": 0.4}, "leave no training data"),
        ({"data_dir": "all", "train_dir": "train"}, "--data_dir excludes"),
        ({"data_dir": "all", "group_by": "subject"}, "finds nothing in this path"),
        ({"train_dir": "train"}, "give --train_dir and --val_dir"),
        ({"train_dir": "train", "val_dir": "train"}, "is in training and in validation"),
        ({"data_dir": "all", "modality": "pet"}, "'pet' is unknown"),
        ({"data_dir": "all", "group_by": "patient", "val_fraction": 0.5}, "the training list would be empty"),
    ],
)
def test_build_refuses(folders: Path, monkeypatch, options: dict, message: str) -> None:
    monkeypatch.chdir(folders)
    with pytest.raises(UserError, match=message):
        build("datalist.json", **options)
    assert not Path("datalist.json").exists()


GOOD = {"image": "/a.nii.gz", "class": "ct"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{training", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([GOOD], "holds a list, not an object"),
        ({"trainning": [GOOD]}, r"unknown list 'trainning' \(did you mean 'training'\?\)"),
        ({"training": GOOD}, "'training' is a dict, not a list"),
        ({"training": ["/a.nii.gz"]}, r"training\[0\] is a str, not an object"),
        (
            {"training": [GOOD, {"imge": "/a.nii.gz"}]},
            r"training\[1\] has the unknown key 'imge' \(did you mean 'image'",
        ),
        ({"training": [{"image": "/a.nii.gz", "clas": "ct"}]}, "unknown key 'clas'"),
        ({"training": [GOOD | {"age": 61}]}, "unknown key 'age'.*; the keys are image, label and class"),
        ({"training": [GOOD | {"lable": "/l.nii.gz"}]}, r"unknown key 'lable' \(did you mean 'label'\?\)"),
        (
            {"training": [GOOD | {"label": None}]},
            r"training\[0\] has no label path \(label is None\); give the path of",
        ),
        ({"training": [GOOD | {"label": ""}]}, r"has no label path \(label is ''\)"),
        ({"training": [GOOD], "name": "mine"}, "unknown list 'name'"),
        ({"training": [{"class": "ct"}]}, "has no image path"),
        ({"training": [{"image": 3}]}, "has no image path"),
        ({"training": [{"image": "/a.nii.gz", "class": "pet"}]}, "has class 'pet'; use one of ct, mri"),
    ],
)
def test_load_names_what_is_wrong(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "datalist.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=rf"datalist\.json: .*{message}"):
        load(path)


def test_load_fills_in_and_keeps(tmp_path: Path) -> None:
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": [{"image": "/a.nii.gz", "class": "CT"}]}))
    assert load(path) == {"training": [GOOD], "validation": [], "testing": []}
    with pytest.raises(UserError, match="the list 'validation' is empty or missing"):
        entries_of(load(path), "validation", path)
    with pytest.raises(UserError, match="no such datalist"):
        load(tmp_path / "nothing.json")


def test_label_maps_are_found_as_volumes_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("here/l.nii.gz", "base/m.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    labels = ["l.nii.gz", "m.nii.gz", "/abs/l.nii.gz", "~/l.nii.gz", "none.nii.gz"]
    entries = [{"image": f"/{number}.nii.gz", "label": label} for number, label in enumerate(labels)]
    (tmp_path / "here" / "list.json").write_text(json.dumps({"training": [*entries, GOOD]}))
    found = load(tmp_path / "here" / "list.json", tmp_path / "base")["training"]
    here, base = str(tmp_path / "here"), str(tmp_path / "base")
    paths = [f"{here}/l.nii.gz", f"{base}/m.nii.gz", "/abs/l.nii.gz", "/home/me/l.nii.gz", f"{base}/none.nii.gz"]
    wanted = [{"image": f"/{number}.nii.gz", "label": path, "class": "ct"} for number, path in enumerate(paths)]
    assert found == [*wanted, GOOD]


def test_what_must_not_change_is_the_same_with_label_maps(datalist: Path) -> None:
    entries = load(datalist)["training"]
    assert identities([entry | {"label": "/nowhere/l.nii.gz"} for entry in entries]) == identities(entries)


def test_volumes_in_two_splits_are_found(datalist: Path) -> None:
    splits = load(datalist)
    assert shared_volumes(splits) == []
    splits["validation"].append(splits["training"][0])
    splits["validation"].append(splits["validation"][0])
    assert len(shared_volumes(splits)) == 2


def test_a_split_is_loaded_and_must_not_be_empty(datalist: Path) -> None:
    assert [Path(e["image"]).name for e in load_split(str(datalist), "testing")] == [
        "phantom 6.nii.gz",
        "phantom 7.nii.gz",
    ]
    assert load_split([str(datalist)], "training") == load(datalist)["training"]
    datalist.write_text(json.dumps({"training": [GOOD]}))
    with pytest.raises(
        UserError, match=r"datalist\.json: the list 'validation' is empty or missing; add volumes to it"
    ):
        load_split(str(datalist), "validation")


def test_the_home_folder_is_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "~/ct/a.nii.gz"}, {"image": "~b.nii"}]}))
    images = [entry["image"] for entry in load(tmp_path / "list.json")["training"]]
    assert images == ["/home/me/ct/a.nii.gz", str(tmp_path / "~b.nii")]


def test_a_byte_order_mark_is_no_fault(datalist: Path) -> None:
    wanted = load(datalist)
    text = datalist.read_text()
    for encoding in ("utf-8-sig", "utf-16"):  # as editors and shells of Windows write
        datalist.write_text(text, encoding=encoding)
        assert load(datalist) == wanted


def test_building_follows_links_and_names_what_it_leaves_out(tmp_path: Path, capsys) -> None:
    for name in ("data/s1/ct.nii.gz", "data/._ct.nii.gz", "elsewhere/ct.nii.gz", "data/s3/ct.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "data" / "s2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "s2" / "again").symlink_to(tmp_path / "data")
    build(str(tmp_path / "list.json"), data_dir=str(tmp_path / "data"), val_fraction=0.4, test_fraction=0)
    images = sorted(e["image"] for split in load(tmp_path / "list.json").values() for e in split)
    assert images == [str(tmp_path / "data" / f"s{i}/ct.nii{'.gz' if i < 3 else ''}") for i in (1, 2, 3)]
    assert (
        "data: 3 files; left out: 1 hidden files, 1 links to folders that are searched already"
        in capsys.readouterr().out
    )
    (tmp_path / "data" / "s1" / "ct.nii").touch()
    with pytest.raises(
        UserError, match=r"s1/ct\.nii\.gz: has the name of .*s1/ct\.nii; choose between them by --pattern"
    ):
        build(str(tmp_path / "list.json"), data_dir=str(tmp_path / "data"))


def test_names_that_are_no_text_are_written_and_read_back(tmp_path: Path) -> None:
    for name in ("a\udcfc.nii.gz", "b\udcff\udcfe.nii.gz", 'ü\n"$.nii.gz'):
        (tmp_path / name).touch()
    build(str(tmp_path / "list.json"), data_dir=str(tmp_path), val_fraction=0.4, test_fraction=0)
    images = {e["image"] for split in load(tmp_path / "list.json").values() for e in split}
    assert images == {str(path) for path in tmp_path.glob("*.nii.gz")} and all(Path(image).exists() for image in images)
