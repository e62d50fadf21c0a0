"""Which volumes a workflow takes: one file, those of a datalist, or all that a folder holds."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

from scripts.common.errors import UserError
from scripts.data import search
from scripts.data.datalist import CLASSES, SPLITS, Datalist, load_all, located
from scripts.data.latent_items import read_list
from scripts.data.nifti import stem
from scripts.use.outputs import ENDINGS, RECORD

logger = logging.getLogger(__name__)

DATALIST = "datalist_ct.json"
LABEL_NAME = re.compile(r"(?<=[^/])_(label|seg)$")  # what the names of label maps end with, besides their volumes'

Entries = list[dict[str, str]]


def find(
    dataset_dir: str,
    json_data_list: str | Sequence[str] | None = None,
    splits: str | Sequence[str] = SPLITS,
    modality: str = "ct",
    output_dir: str | None = None,
    data_base_dir: str | Sequence[str] | None = None,
) -> Entries:
    """The volumes to work on.

    Args:
        dataset_dir: a NIfTI file; a datalist (`.json`); or a folder: the datalist `datalist_ct.json` in it, else all
            `.nii.gz` and `.nii` files in it and in its subfolders, as `scripts.data.search` finds them.
        json_data_list: a datalist, or several, instead; relative paths in it are those under `dataset_dir`.
        splits: which lists of a datalist are taken.
        modality: `class` of files that no datalist describes.
        output_dir: of results; these are no input, if it lies in `dataset_dir`.
        data_base_dir: what paths in datalists are relative to, instead of `dataset_dir`; or one for each datalist.

    Returns:
        entries with `image`, the path; `class`; `split`, where a datalist says it; and `name`, under which results are
        stored: the path without its ending, relative to `dataset_dir`, else to the datalist's folder, else to the
        deepest folder that holds all volumes of the datalist.

    Raises:
        UserError: where there is no volume, or two would have results of the same name.
    """
    splits = _checked_splits(splits, modality)
    root = _absolute(dataset_dir)
    if not json_data_list and not root.exists():
        raise UserError(f"{dataset_dir}: no such file or folder; correct dataset_dir")
    source = str(root)
    if files := _datalists(root, json_data_list):
        source = f"{', '.join(files)}: {' and '.join(splits)}"
        base = root.parent if root.is_file() else root
        content = load_all(files, base, data_base_dir)
        entries = _from_datalists(content, [base, _absolute(files[0]).parent], splits)
    elif root.is_dir():
        entries = _from_folder(root, None if output_dir is None else _absolute(output_dir))
    else:
        entries = [_entry(root, root.parent)]
    entries = [{"class": modality, **entry} for entry in entries]
    _check(entries, source)
    logger.info("%s: %d volumes", source, len(entries))
    return entries


def find_labels(mask_dir: str, splits: str | Sequence[str] = SPLITS, output_dir: str | None = None) -> Entries:
    """The label maps to make volumes for, in the order of their paths.

    Args:
        mask_dir: a NIfTI file; a datalist (`.json`), of which `label` is taken, or `image` of entries without it, and
            all else is let be, so that it may be one of latents; or a folder: the files in it and in its subfolders
            whose names end in `_label` or `_seg`, or all where there are none such.
        splits: which lists of a datalist are taken; `validation`, where there is no such list, is what has fold 0.
        output_dir: of results; these are no input, if it lies in `mask_dir`.

    Returns:
        entries with `image`, the path; and `name`, as `find` has it, but without `_label` or `_seg` at its end.

    Raises:
        UserError: where there is no label map, or two would have results of the same name.
    """
    root, splits = _absolute(mask_dir), _checked_splits(splits)
    if not root.exists():
        raise UserError(f"{mask_dir}: no such file or folder; correct mask_dir")
    if root.suffix == ".json":
        entries = _from_datalists(_label_lists(root), [root.parent], splits)
    elif root.is_dir():
        entries = _from_folder(root, None if output_dir is None else _absolute(output_dir))
        entries = [entry for entry in entries if LABEL_NAME.search(entry["name"])] or entries
    else:
        entries = [_entry(root, root.parent)]
    if not entries:
        where = f"{mask_dir}: {' and '.join(splits)}" if root.suffix == ".json" else mask_dir
        raise UserError(f"{where}: no label map (.nii.gz or .nii) is there; correct mask_dir or splits")
    entries = [entry | {"name": LABEL_NAME.sub("", entry["name"])} for entry in entries]
    entries.sort(key=lambda entry: entry["image"])
    _check(entries, mask_dir)
    logger.info("%s: %d label maps", mask_dir, len(entries))
    return entries


def _label_lists(datalist: Path) -> Datalist:
    """The label maps of a datalist, as `image`, whatever else its entries have."""
    read = {split: read_list(str(datalist), split, "correct mask_dir") for split in SPLITS}
    lists: Datalist = {split: [] for split in SPLITS}
    for split, items in read.items():
        for number, item in enumerate(items):
            path = (item.get("label") or item.get("image")) if isinstance(item, dict) else None
            if not isinstance(path, str):
                raise UserError(f"{datalist}: {split}[{number}] has no label path (label is {path!r}); give one")
            held_back = split == "training" and item.get("fold") == 0 and not read["validation"]
            lists["validation" if held_back else split].append({"image": located(path, [datalist.parent, Path()])})
    return lists


def _checked_splits(splits: str | Sequence[str], modality: str = "ct") -> list[str]:
    splits = [splits] if isinstance(splits, str) else list(splits)
    if not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"splits is {splits}; use some of {', '.join(SPLITS)}")
    if modality not in CLASSES:
        raise UserError(f"modality is {modality!r}; use one of {', '.join(CLASSES)}")
    return splits


def _datalists(root: Path, json_data_list: str | Sequence[str] | None) -> list[str]:
    """The datalists that say which volumes there are, if there are some."""
    if json_data_list:
        return [json_data_list] if isinstance(json_data_list, str) else list(json_data_list)
    if root.suffix == ".json":
        return [str(root)]
    return [str(root / DATALIST)] if (root / DATALIST).is_file() else []


def _from_datalists(content: Datalist, folders: Sequence[Path], splits: Sequence[str]) -> Entries:
    """The entries of `splits`, named relative to the first of `folders` that holds all volumes."""
    every = {str(_absolute(entry["image"])) for split in content.values() for entry in split}
    if not every:
        return []
    # The folder that names are relative to is that of all splits, so that a volume has one name whatever is chosen.
    folders = [*folders, Path(os.path.commonpath([Path(image).parent for image in every]))]
    folder = next(f for f in folders if all(Path(image).is_relative_to(f) for image in every))
    chosen: dict[str, dict[str, str]] = {}  # by path: a volume that several lists have is taken once
    for split in (split for split in SPLITS if split in splits):
        for entry in content[split]:
            image = _absolute(entry["image"])
            chosen[str(image)] = entry | _entry(image, folder) | {"split": split}
    return list(chosen.values())


def _from_folder(root: Path, output_dir: Path | None) -> Entries:
    """NIfTI files beneath `root`, but for those of `output_dir`."""
    found = search.find(root, skip=output_dir)
    files = found.files
    if output_dir == root and list(root.glob(RECORD.format("*"))):
        results = {f"{stem(str(p))}{ending}" for p in files for ending in ENDINGS}
        files = [p for p in files if stem(str(p)) not in results]
        if ours := len(found.files) - len(files):
            found.left_out["results of earlier runs"] = ours
            found.files = files
    logger.info("%s: %s", root, found)
    return [_entry(path, root) for path in files]


def _check(entries: Entries, source: str) -> None:
    """Whether there are volumes, whose results have names of their own."""
    if not entries:
        raise UserError(f"{source}: no volume (.nii.gz or .nii) is there; correct dataset_dir or json_data_list")
    seen: dict[str, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry["name"], entry["image"])) != entry["image"]:
            raise UserError(f"{entry['image']}: its results would overwrite those of {other}; rename one of them")


def _entry(path: Path, folder: Path) -> dict[str, str]:
    return {"image": str(path), "name": stem(path.relative_to(folder).as_posix())}


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (keeps links, but no "..")
