from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.data.search import ENDINGS, Found, find

NAMES = (
    "a.nii.gz",
    "b.nii",
    "C.NII.GZ",
    "._a.nii.gz",
    "notes.txt",
    "d e#f.nii.gz",
    "\udcfc.nii",
    "ü.nii.gz",
    "x.nii.gz.json",
)
FOLDERS = ("p", "q r", ".hidden", "s.nii.gz", "\udce9")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def named(found: Found, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in found.files]


def test_links_are_followed_and_hidden_files_left_out(tmp_path: Path) -> None:
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    touch(
        data / "p1" / "ct.nii.gz",
        elsewhere / "p2" / "ct.nii.gz",
        elsewhere / "p2" / "._ct.nii.gz",
        elsewhere / "one.nii",
    )
    (data / "p2").symlink_to(elsewhere / "p2")
    (data / "one.nii").symlink_to(elsewhere / "one.nii")
    (data / "two.nii").symlink_to(elsewhere / "one.nii")  # the same file by another name
    (data / "gone.nii").symlink_to(elsewhere / "gone.nii")
    (data / "p1" / "up").symlink_to(data)
    (data / "above").symlink_to(tmp_path)
    touch(data / "notes.txt", data / ".git" / "a.nii")
    found = find(data)
    assert named(found, data) == ["one.nii", "p1/ct.nii.gz", "p2/ct.nii.gz"]
    assert str(found) == (
        "3 files; left out: 1 broken links, 1 hidden files, 1 hidden folders, "
        "1 links to files that are listed already, 2 links to folders that are searched already, 1 of other kinds"
    )


def test_a_file_keeps_the_path_without_links(tmp_path: Path) -> None:
    touch(tmp_path / "z" / "real.nii")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "b.nii").symlink_to(tmp_path / "z" / "real.nii")
    assert named(find(tmp_path), tmp_path) == ["z/real.nii"]


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("*.nii.gz", ["a/ct.nii.gz", "b/c/ct.nii.gz", "b/mask.nii.gz"]),
        ("ct.nii.gz", ["a/ct.nii.gz", "b/c/ct.nii.gz"]),
        ("a/*", ["a/ct.nii.gz"]),
        ("**/ct.*", ["a/ct.nii.gz", "b/c/ct.nii.gz"]),
        ("b/**/*.gz", ["b/c/ct.nii.gz", "b/mask.nii.gz"]),
        ("*.NII", []),
    ],
)
def test_patterns_are_those_of_globs(tmp_path: Path, pattern: str, wanted: list[str]) -> None:
    touch(*(tmp_path / name for name in ("a/ct.nii.gz", "b/c/ct.nii.gz", "b/mask.nii.gz", "b/x.nii")))
    found = find(tmp_path, pattern)
    assert named(found, tmp_path) == wanted
    assert found.left_out == {f"that do not match {pattern}": 4 - len(wanted)}


def test_a_folder_that_is_not_searched(tmp_path: Path) -> None:
    touch(tmp_path / "in" / "a.nii", tmp_path / "out" / "a_recon.nii.gz")
    assert named(find(tmp_path, skip=tmp_path / "out"), tmp_path) == ["in/a.nii"]
    assert named(find(tmp_path / "out", skip=tmp_path / "out"), tmp_path) == ["out/a_recon.nii.gz"]


def reachable(root: Path) -> set[str]:
    """The real paths of all volumes beneath `root`, found another way: from folder to folder, until none is new."""
    known, files = {root.resolve()}, set()
    while True:
        items = [item for folder in known for item in folder.iterdir() if not item.name.startswith(".")]
        files = {os.path.realpath(item) for item in items if item.is_file() and item.name.lower().endswith(ENDINGS)}
        fresh = known | {item.resolve() for item in items if item.is_dir()}
        if fresh == known:
            return files
        known = fresh


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_volume_is_found_once(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("tree") / "root"
    outside = root.parent / "outside"
    folders = [root, outside]
    for _ in range(data.draw(st.integers(0, 5))):
        folders.append(data.draw(st.sampled_from(folders)) / data.draw(st.sampled_from(FOLDERS)))
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for _ in range(data.draw(st.integers(0, 8))):
        touch(data.draw(st.sampled_from(folders)) / data.draw(st.sampled_from(NAMES)))
    within = [folder for folder in folders if folder != outside]
    for number in range(data.draw(st.integers(0, 4))):  # to folders, files, and what is not there; circles among them
        target = data.draw(st.sampled_from([*folders, *(f / "a.nii.gz" for f in folders)]))
        (data.draw(st.sampled_from(within)) / f"link {number}.nii").symlink_to(target)
    found = find(root)
    real = [os.path.realpath(path) for path in found.files]
    assert len(real) == len(set(real)) and set(real) == reachable(root)
    assert not any(part.startswith(".") for path in found.files for part in path.relative_to(root).parts)
    assert found.files == sorted(found.files) and all(path.exists() for path in found.files)
