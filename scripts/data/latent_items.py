"""Which latents datalists name: those of a list, or of the folds that NV-Generate-CTMR's lists have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError, reason
from scripts.common.files import read_json
from scripts.data.datalist import SPLITS, with_folders
from scripts.data.nifti import stem

ENCODE = "encode the volume with configs/encode.json"
ENCODED = "give the datalist.json that configs/encode.json writes beside the latents"
Items = list[dict[str, Any]]


def listed(
    json_data_list: str | Sequence[str],
    split: str,
    embedding_base_dir: str | Sequence[str] | None = None,
    fold: int | None = None,
) -> Items:
    """The datalists' entries of a split, with absolute paths: `image` of the latent, and `label` where it has one.

    Args:
        json_data_list: a datalist, or several that are joined.
        split: "training", which must not be empty, or another one, which may be.
        embedding_base_dir: what relative paths are relative to, one folder for all datalists or one for each; None for
            each datalist's own folder.
        fold: where a datalist has no list `validation`, the entries of `training` with this `fold` are it.

    Raises:
        UserError: naming the datalist, what is wrong and what to do.
    """
    pairs = with_folders(json_data_list, "embedding_base_dir", embedding_base_dir)
    items = []
    for file, folder in pairs:
        for number, item in enumerate(_of_fold(file, split, fold)):
            image = item.get("image") if isinstance(item, dict) else None
            if not isinstance(image, str) or not image:
                raise UserError(f"{file}: {split}[{number}] has no image path (image is {image!r}); give one")
            name, root = stem(image), folder or Path(file).parent
            latent = (name if name.endswith("_emb") else f"{name}_emb") + ".nii.gz"
            paths = {"image": latent} | ({"label": label} if isinstance(label := item.get("label"), str) else {})
            items.append({**item, **{key: os.path.abspath(Path(root, path)) for key, path in paths.items()}})  # noqa: PTH100
    if not items and split == "training":
        files = [file for file, _ in pairs]
        count = sum(len(read_list(file, split)) for file in files)
        why = f"all {count} entries are of fold {fold}, which is held back; choose another fold"
        empty = "the list 'training' is empty or missing; add latents to it"
        raise UserError(f"{', '.join(files)}: {why if count else empty}")
    return items


def _of_fold(file: str, split: str, fold: int | None) -> list[Any]:
    """A list of a datalist; what stands for it where folds take the place of the list `validation`."""
    items = read_list(file, split)
    if fold is None or split not in ("training", "validation") or read_list(file, "validation"):
        return items
    every = read_list(file, "training")
    of_fold = [isinstance(item, dict) and item.get("fold") == fold for item in every]
    return [item for item, held_back in zip(every, of_fold, strict=True) if held_back == (split == "validation")]


def read_list(file: str, split: str, remedy: str = ENCODED) -> list[Any]:
    """A list of a datalist, empty where there is none of that name; what else its entries and it have is let be.

    Raises:
        UserError: with `remedy`, where it cannot be read.
    """
    try:
        content = read_json(file)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such datalist; {ENCODED}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not JSON ({reason(error)}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds a {type(content).__name__}, not an object with lists of latents; {remedy}")
    for key in content:
        if key not in SPLITS and (close := get_close_matches(key, SPLITS, n=1, cutoff=0.8)):
            raise UserError(f"{file}: unknown list {key!r} (did you mean {close[0]!r}?); rename it")
    if not isinstance(items := content.get(split, []), list):
        raise UserError(f"{file}: {split!r} is a {type(items).__name__}, not a list of latents; {remedy}")
    return items
