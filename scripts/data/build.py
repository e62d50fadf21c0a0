"""How a datalist is built: from a folder for each split, or from one that is split at random."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts.common.errors import UserError
from scripts.common.files import write_json
from scripts.data.datalist import CLASSES, SPLITS, shared_volumes
from scripts.data.nifti import stem
from scripts.data.pairs import Pairing, check_shared
from scripts.data.search import find


def _find(folder: str, pattern: str | None, pairing: Pairing) -> list[Path]:
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; correct --train_dir, --val_dir, --test_dir or --data_dir")
    found = find(folder, pattern, skip=pairing.label_dir)
    volumes = pairing.pair(found.files, folder)
    if maps := len(found.files) - len(volumes):
        found.left_out["label maps"] = maps
        found.files = volumes
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
    label_dir: str | None = None,
    label_pattern: str | None = None,
) -> None:
    """Write a datalist from a folder for each split, or from one folder that is split at random.

    Args:
        output: the JSON file to write; the same input gives the same bytes.
        train_dir: folder of the training volumes, searched with its subfolders (so are the others).
        val_dir: folder of the validation volumes.
        test_dir: folder of the test volumes; may be left out.
        data_dir: one folder for all, instead of the three.
        pattern: which files, as a glob (quote it); without it, all `.nii` and `.nii.gz` files but hidden ones.
        val_fraction: share of the files of `data_dir` to validate on.
        test_fraction: share of the files of `data_dir` to test on.
        seed: of the random split.
        group_by: regular expression on the path; files of the same match, or first group, land in one split.
        relative_to: write paths relative to this folder instead of absolute.
        modality: `class` of the entries, "ct" or "mri".
        label_dir: folder of label maps, which have their volumes' names there.
        label_pattern: makes a label map's name of its volume's, as `s/_ct$/_label/` (a regular expression) does.
    """
    pairing = Pairing(label_dir, label_pattern)
    if data_dir is not None:
        if train_dir or val_dir or test_dir:
            raise UserError("--data_dir excludes --train_dir, --val_dir and --test_dir; give one or the other")
        splits = _split_folder(data_dir, _find(data_dir, pattern, pairing), val_fraction, test_fraction, seed, group_by)
    elif train_dir and val_dir:
        folders = zip(SPLITS, (train_dir, val_dir, test_dir), strict=True)
        splits = {split: _find(folder, pattern, pairing) if folder else [] for split, folder in folders}
    else:
        raise UserError("give --train_dir and --val_dir (and --test_dir), or --data_dir")
    _write(output, splits, pairing.labels, relative_to, modality)


def _split_folder(
    folder: str, files: Sequence[Path], val_fraction: float, test_fraction: float, seed: int, group_by: str | None
) -> dict[str, list[Path]]:
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise UserError(f"--val_fraction {val_fraction} and --test_fraction {test_fraction} leave no training data")
    fractions = {"validation": val_fraction, "testing": test_fraction}
    splits = _split(files, fractions, seed, group_by)
    for split in ("training", *(s for s, fraction in fractions.items() if fraction)):
        if not splits[split]:
            raise UserError(
                f"{folder}: the {split} list would be empty (too few files or groups); "
                "change --val_fraction, --test_fraction or --group_by"
            )
    return splits


def _write(
    output: str,
    splits: Mapping[str, Sequence[Path]],
    labels: Mapping[Path, Path],
    relative_to: str | None,
    modality: str,
) -> None:
    if modality not in CLASSES:
        raise UserError(f"--modality {modality!r} is unknown; use one of {', '.join(CLASSES)}")

    def entry(file: Path, folder: str | None) -> dict[str, str]:
        paths = {"image": file} | ({"label": labels[file]} if file in labels else {})
        return {**{key: _path(path, folder) for key, path in paths.items()}, "class": modality}

    if shared := shared_volumes({split: [entry(f, None) for f in files] for split, files in splits.items()}, False):
        raise UserError(f"{shared[0]}; a volume may be in one split only")
    check_shared(splits, labels)
    write_json(output, {split: [entry(f, relative_to) for f in sorted(files)] for split, files in splits.items()})
    for split, files in splits.items():
        print(f"{split:<10} {len(files):>6} files {sum(f.stat().st_size for f in files) / 1e9:>9.2f} GB")
    print(f"datalist written to {Path(output)}")


def _path(path: Path, relative_to: str | None) -> str:
    absolute = os.path.abspath(path)  # noqa: PTH100 (keeps links, which resolve() would not)
    return os.path.relpath(absolute, relative_to) if relative_to else absolute
