"""Which volumes a workflow takes, and each of them as its file has it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from scripts import datalist as datalists
from scripts.common.errors import UserError
from scripts.data.datalist import CLASSES, SPLITS
from scripts.use.outputs import ENDINGS, RECORD

logger = logging.getLogger(__name__)

DATALIST = "datalist_ct.json"


def find(
    dataset_dir: str,
    json_data_list: str | Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    modality: str = "ct",
    output_dir: str | None = None,
) -> list[dict[str, str]]:
    """The volumes to work on.

    Args:
        dataset_dir: a NIfTI file; a datalist (`.json`); or a folder: the datalist `datalist_ct.json` in it, else all
            `.nii.gz` and `.nii` files in it and in its subfolders.
        json_data_list: a datalist, instead; relative paths in it are those under `dataset_dir`.
        splits: which lists of a datalist are taken.
        modality: `class` of files that no datalist describes.
        output_dir: of results; these are no input, if it lies in `dataset_dir`.

    Returns:
        entries with `image`, the path; `class`; `split`; and `name`, under which results are stored: the path without
        its ending, relative to `dataset_dir`, else to the datalist's folder, else to the deepest folder that holds
        all volumes of the datalist.

    Raises:
        UserError: where there is no volume, or two would have results of the same name.
    """
    splits = [splits] if isinstance(splits, str) else list(splits)
    if not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"splits is {splits}; use some of {', '.join(SPLITS)}")
    if modality not in CLASSES:
        raise UserError(f"modality is {modality!r}; use one of {', '.join(CLASSES)}")
    root = _absolute(dataset_dir)
    listed = json_data_list or None
    if listed is not None and not isinstance(listed, str):
        listed = listed[0]
    if listed is None and not root.exists():
        raise UserError(f"{dataset_dir}: no such file or folder; correct dataset_dir")
    if listed is None and root.suffix == ".json":
        listed, root = str(root), root.parent
    if listed is None and (root / DATALIST).is_file():
        listed = str(root / DATALIST)
    if listed is not None:
        entries = _listed(Path(listed), root, splits)
    elif root.is_dir():
        files = _search(root, None if output_dir is None else _absolute(output_dir))
        entries = [{"image": str(p), "name": _stem(p.relative_to(root))} for p in files]
    else:
        entries = [{"image": str(root), "name": _stem(Path(root.name))}]
    entries = [{"class": modality, "split": "training", **entry} for entry in entries]
    what = f"{listed}: {' and '.join(splits)}" if listed else str(root)
    if not entries:
        raise UserError(f"{what}: no volume (.nii.gz or .nii) is there; correct dataset_dir or json_data_list")
    seen: dict[str, str] = {}
    for entry in entries:
        if (other := seen.setdefault(entry["name"], entry["image"])) != entry["image"]:
            raise UserError(f"{entry['image']}: its results would overwrite those of {other}; rename one of them")
    logger.info("%s: %d volumes", what, len(entries))
    return entries


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 (keeps links, but no "..")


def _stem(path: Path) -> str:
    return path.as_posix().removesuffix(".gz").removesuffix(".nii")


def _search(root: Path, output_dir: Path | None) -> list[Path]:
    """NIfTI files beneath `root`, also through links, but for hidden ones and those of `output_dir`."""
    files, known = [], set()
    for folder, folders, names in os.walk(root, followlinks=True):
        here, real = Path(folder), os.path.realpath(folder)
        if real in known or (here == output_dir and here != root):
            folders.clear()
            continue
        known.add(real)
        folders[:] = sorted(f for f in folders if f[0] != ".")
        files += [here / name for name in sorted(names) if name.endswith((".nii", ".nii.gz")) and name[0] != "."]
    if output_dir == root and list(root.glob(RECORD.format("*"))):
        results = {f"{_stem(p)}{ending}" for p in files for ending in ENDINGS}
        if ours := [p for p in files if _stem(p) in results]:
            logger.info("%s: %d files are results of earlier runs, and no input", root, len(ours))
        files = [p for p in files if p not in set(ours)]
    return files


def _listed(path: Path, root: Path, splits: Sequence[str]) -> list[dict[str, str]]:
    content = datalists.load(path, root)
    images = {str(_absolute(e["image"])): e | {"split": s} for s in SPLITS for e in content[s]}
    if not images:
        return []
    folders = [root, _absolute(path).parent, Path(os.path.commonpath([Path(i).parent for i in images]))]
    folder = next(f for f in folders if all(Path(i).is_relative_to(f) for i in images))
    entries = [e | {"image": i, "name": _stem(Path(i).relative_to(folder))} for i, e in images.items()]
    chosen = {str(_absolute(e["image"])) for split in splits for e in content[split]}
    return [entry for entry in entries if entry["image"] in chosen]
