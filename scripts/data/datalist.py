"""Datalists: which volumes train, validate and test; how they are built, and how they are read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from scripts.common.errors import UserError, reason
from scripts.common.files import read_json, write_json
from scripts.data.nifti import stem
from scripts.data.search import find

SPLITS = ("training", "validation", "testing")
CLASSES = ("ct", "mri")
Datalist = dict[str, list[dict[str, str]]]


def _find(folder: str, pattern: str | None) -> list[Path]:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; correct --train_dir, --val_dir, --test_dir or --data_dir")
    found = find(folder, pattern)
    print(f"{folder}: {found}")
    if not found.files:
        what = f"no file matches the pattern {pattern!r}; correct --pattern (quote it)" if pattern else "no NIfTI file"
        raise UserError(f"{folder}: {what}")
    names: dict[str, Path] = {}
    for file in found.files:
        if (other := names.setdefault(stem(str(file)), file)) != file:
            raise UserError(f"{file}: has the name of {other}; choose between them by --pattern, '*.nii.gz' say")
    return found.files


def _split(
    files: Sequence[Path], fractions: Mapping[str, float], seed: int, group_by: str | None
) -> dict[str, list[Path]]:
    """Deal groups of files (one group a patient) to the splits, at random, until each has its share of files."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        match = re.search(group_by, str(file)) if group_by else None
        if group_by and match is None:
            raise UserError(f"{file}: --group_by {group_by!r} finds nothing in this path; correct the expression")
        key = (match.group(1) if match.re.groups else match.group(0)) if match else str(file)
        groups.setdefault(key, []).append(file)
    names = sorted(groups)
    order = np.random.default_rng(seed).permutation(len(names))
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for index in order:
        group = groups[names[index]]
        takes = (s for s in ("validation", "testing") if len(splits[s]) < round(fractions[s] * len(files)))
        splits[next(takes, "training")] += group
    return splits


def build(
    output: str = "data/datalist_ct.json",
    train_dir: str | None = None,
    val_dir: str | None = None,
    test_dir: str | None = None,
    data_dir: str | None = None,
    pattern: str | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    group_by: str | None = None,
    relative_to: str | None = None,
    modality: str = "ct",
) -> None:
    """Write a datalist from a folder for each split, or from one folder that is split at random.

    Args:
        output: the JSON file to write; the same input gives the same bytes.
        train_dir: folder of the training volumes, searched with its subfolders (so are the others).
        val_dir: folder of the validation volumes.
        test_dir: folder of the test volumes; may be left out.
        data_dir: one folder for all, instead of the three.
        pattern: which files, as a glob (quote it); all `.nii` and `.nii.gz` files where it is left out. Links are
            followed, hidden files left out.
        val_fraction: share of the files of `data_dir` to validate on.
        test_fraction: share of the files of `data_dir` to test on.
        seed: of the random split.
        group_by: regular expression on the path; files with the same match (its first group, if it has one)
            land in one split, so that no patient is in two.
        relative_to: write paths relative to this folder instead of absolute.
        modality: `class` of the entries, "ct" or "mri".
    """
    if modality not in CLASSES:
        raise UserError(f"--modality {modality!r} is unknown; use one of {', '.join(CLASSES)}")
    if data_dir is not None:
        if train_dir or val_dir or test_dir:
            raise UserError("--data_dir excludes --train_dir, --val_dir and --test_dir; give one or the other")
        fractions = {"validation": val_fraction, "testing": test_fraction}
        splits = _split_folder(data_dir, pattern, fractions, seed, group_by)
    elif train_dir and val_dir:
        folders = zip(SPLITS, (train_dir, val_dir, test_dir), strict=True)
        splits = {split: _find(folder, pattern) if folder else [] for split, folder in folders}
    else:
        raise UserError("give --train_dir and --val_dir (and --test_dir), or --data_dir")
    _write(output, splits, relative_to, modality)


def _split_folder(
    folder: str, pattern: str | None, fractions: Mapping[str, float], seed: int, group_by: str | None
) -> dict[str, list[Path]]:
    val_fraction, test_fraction = fractions.values()
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f"--val_fraction {val_fraction} and --test_fraction {test_fraction} leave no training data")
    splits = _split(_find(folder, pattern), fractions, seed, group_by)
    for split in ("training", *(s for s, fraction in fractions.items() if fraction)):
        if not splits[split]:
            raise UserError(
                f"{folder}: the {split} list would be empty (too few files or groups); "
                "change --val_fraction, --test_fraction or --group_by"
            )
    return splits


def _write(output: str, splits: Mapping[str, Sequence[Path]], relative_to: str | None, modality: str) -> None:
    absolute = {split: [_entry(file, None, modality) for file in files] for split, files in splits.items()}
    if shared := shared_volumes(absolute, within=False):
        raise UserError(f"{shared[0]}; a volume may be in one split only")
    datalist = {split: [_entry(f, relative_to, modality) for f in sorted(files)] for split, files in splits.items()}
    write_json(output, datalist)
    for split, files in splits.items():
        print(f"{split:<10} {len(files):>6} files {sum(f.stat().st_size for f in files) / 1e9:>9.2f} GB")
    print(f"datalist written to {Path(output)}")


def _entry(path: Path, relative_to: str | None, modality: str) -> dict[str, str]:
    absolute = os.path.abspath(path)  # noqa: PTH100 (keeps links, which resolve() would not)
    return {"image": os.path.relpath(absolute, relative_to) if relative_to else absolute, "class": modality}


def load(path: str | Path, base_dir: str | Path | None = None) -> Datalist:
    """Read and check a datalist; relative paths are made absolute.

    Args:
        path: a JSON file with the lists `training`, `validation` and perhaps `testing`, of entries
            `{"image": path, "class": "ct" or "mri"}` (`class` may be left out: "ct").
        base_dir: what relative paths are relative to, where the volume is there; else the datalist's own folder,
            or the working directory.

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
    known = ("image", "class")
    if not isinstance(entry, dict):
        raise UserError(f"{where} is a {type(entry).__name__}, not an object like {{'image': path, 'class': 'ct'}}")
    for key in entry:
        if key not in known:
            raise UserError(f"{where} has the unknown key {key!r}{_suggest(key, known)}; the keys are image and class")
    image, modality = entry.get("image"), entry.get("class", "ct")
    if not isinstance(image, str) or not image:
        raise UserError(f"{where} has no image path (image is {image!r}); give the path of a .nii.gz file")
    if not isinstance(modality, str) or modality.lower() not in CLASSES:
        raise UserError(f"{where} has class {modality!r}; use one of {', '.join(CLASSES)}")
    if image.startswith("~/"):
        image = str(Path(image).expanduser())
    if not Path(image).is_absolute():
        image = str((next((f for f in folders if (f / image).exists()), folders[0]) / image).absolute())
    return {"image": image, "class": modality.lower()}


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
