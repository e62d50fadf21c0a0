"""Datalists: which volumes train, validate and test."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError, reason
from scripts.common.files import read_json

SPLITS = ("training", "validation", "testing")
CLASSES = ("ct", "mri")
KEYS = ("image", "label", "class", "source_label")  # of an entry; the last, of what configs/generate.json made
Datalist = dict[str, list[dict[str, str]]]


def load(path: str | Path, base_dir: str | Path | None = None) -> Datalist:
    """Read and check a datalist; relative paths are made absolute.

    Args:
        path: a JSON file with the lists `training`, `validation` and perhaps `testing`, of entries
            `{"image": path, "label": path of its label map, "class": "ct" or "mri"}` (`label` may be left out, and
            `class`: "ct"; generated volumes may have `source_label`, the path of the map that `label` was made of).
        base_dir: what relative paths are relative to, where the file is there; else the datalist's own folder, or the
            working directory.

    Raises:
        UserError: naming the file and the key, what is wrong and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such datalist; make one with python -m scripts.datalist build")
    try:
        content = read_json(path)
    except (ValueError, RecursionError) as error:  # of its text, its encoding, or lists in lists without end
        raise UserError(
            f"{path}: is not JSON ({reason(error)}); build it with python -m scripts.datalist build"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an object with the lists {', '.join(SPLITS)}")
    for key in content:
        if key not in SPLITS:
            raise UserError(f"{path}: unknown list {key!r}{_suggest(key, SPLITS)}; the lists are {', '.join(SPLITS)}")
    folders = [Path(base_dir)] if base_dir else []
    folders += [path.parent, Path()]
    splits: Datalist = {}
    for split in SPLITS:
        entries = content.get(split, [])
        if not isinstance(entries, list):
            raise UserError(f"{path}: {split!r} is a {type(entries).__name__}, not a list of entries")
        splits[split] = [_checked_entry(e, f"{path}: {split}[{i}]", folders) for i, e in enumerate(entries)]
    return splits


def _suggest(key: str, known: Sequence[str]) -> str:
    close = get_close_matches(key, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _checked_entry(entry: object, where: str, folders: Sequence[Path]) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}, not an object like {{'image': path, 'class': 'ct'}}")
    for key in entry:
        if key not in KEYS:
            close = _suggest(key, KEYS)
            raise UserError(f"{where} has the unknown key {key!r}{close}; the keys are image, label and class")
    paths = {}
    for key in ("image", *(key for key in ("label", "source_label") if key in entry)):
        if not isinstance(path := entry.get(key), str) or not path:
            raise UserError(f"{where} has no {key} path ({key} is {path!r}); give the path of a .nii.gz file")
        paths[key] = located(path, folders)
    modality = entry.get("class", "ct")
    if not isinstance(modality, str) or modality.lower() not in CLASSES:
        raise UserError(f"{where} has class {modality!r}; use one of {', '.join(CLASSES)}")
    return {**paths, "class": modality.lower()}


def located(path: str, folders: Sequence[Path]) -> str:
    """A path of a datalist, relative to the first of `folders` that has such a file, else to the first of all."""
    if path.startswith("~/"):
        path = str(Path(path).expanduser())
    if Path(path).is_absolute():
        return path
    return str((next((f for f in folders if (f / path).exists()), folders[0]) / path).absolute())


def entries_of(datalist: Datalist, split: str, path: str | Path) -> list[dict[str, str]]:
    """The entries of `split`; a UserError that names the datalist where there are none."""
    if not datalist[split]:
        raise UserError(f"{path}: the list {split!r} is empty or missing; add volumes to it")
    return datalist[split]


def with_folders(
    json_data_list: str | Sequence[str], knob: str, folders: str | Sequence[str] | None
) -> list[tuple[str, str | None]]:
    """Each datalist with the folder that its relative paths are in.

    Args:
        json_data_list: a datalist, or a list of them.
        knob: where `folders` stand, for the error.
        folders: one for all datalists, or one for each; None where none is given.

    Raises:
        UserError: where there are as many datalists as folders for them.
    """
    files = [json_data_list] if isinstance(json_data_list, str) else list(json_data_list)
    one = folders is None or isinstance(folders, str)
    each: list[Any] = [folders] * len(files) if one else list(folders or ())
    if len(each) != len(files):
        raise UserError(
            f"{knob} has {len(each)} entries, but json_data_list {len(files)}; give one folder for each datalist, or "
            "one for all"
        )
    return list(zip(files, each, strict=True))


def identities(entries: Sequence[Mapping[str, Any]]) -> list[list[str | int]]:
    """What must not change while a training goes on: each file's path beneath the folder of all, and its bytes.

    Where that folder lies may change.
    """
    paths = [os.path.abspath(entry["image"]) for entry in entries]  # noqa: PTH100 (keeps links)
    folder = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    relative = [os.path.relpath(path, folder).encode(errors="backslashreplace").decode() for path in paths]
    return [[name, Path(path).stat().st_size] for name, path in zip(relative, paths, strict=True)]


def load_all(
    json_data_list: str | Sequence[str],
    base_dir: str | Path | None = None,
    data_base_dir: str | Sequence[str] | None = None,
) -> Datalist:
    """Read one datalist or several, whose lists are joined.

    Args:
        json_data_list: the datalist, or a list of them.
        base_dir: what relative paths are relative to, as for `load`, where `data_base_dir` is None.
        data_base_dir: the same; one for all datalists, or one for each.

    Raises:
        UserError: as `load` does; and where there are as many datalists as folders for them.
    """
    joined: Datalist = {split: [] for split in SPLITS}
    for file, folder in with_folders(json_data_list, "data_base_dir", data_base_dir):
        for split, entries in load(file, folder or base_dir).items():
            joined[split] += entries
    return joined


def load_split(
    json_data_list: str | Sequence[str],
    split: str,
    base_dir: str | None = None,
    data_base_dir: str | Sequence[str] | None = None,
) -> list[dict[str, str]]:
    """The entries of one split of one datalist or of several, which must not be empty.

    Args:
        json_data_list: as for `load_all`; so are `base_dir` and `data_base_dir`.
        split: one of `SPLITS`.

    Raises:
        UserError: as `load_all` and `entries_of` do.
    """
    name = json_data_list if isinstance(json_data_list, str) else ", ".join(json_data_list)
    return entries_of(load_all(json_data_list, base_dir, data_base_dir), split, name)


def shared_volumes(datalist: Datalist, within: bool = True) -> list[str]:
    """Volumes that are in more than one split, or (`within`) in one split twice, as sentences."""
    owner: dict[str, str] = {}
    found = []
    for split, entries in datalist.items():
        for entry in entries:
            real = str(Path(entry["image"]).resolve())
            if real in owner and (within or owner[real] != split):
                twice = f"is in {split} twice" if owner[real] == split else f"is in {owner[real]} and in {split}"
                found.append(f"{entry['image']}: {twice}")
            owner[real] = split
    return found
