"""Which latents there are to train on: those that `configs/encode.json` wrote, and those of NV-Generate-CTMR."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import nibabel as nib

from scripts.common.errors import UserError, reason
from scripts.common.files import read_json
from scripts.common.progress import progress_bar
from scripts.data.faults import attempt, first_of
from scripts.data.latent_items import ENCODE, listed
from scripts.data.nifti import read_header
from scripts.data.nifti_file import check_complete, opened

Entry = dict[str, Any]
FACTOR = 4  # voxels of a volume for one of its latent, along each axis
REGIONS = ("top_region_index", "bottom_region_index")


def read_mapping(path: str) -> dict[str, int]:
    """The number of each modality, from a JSON file like `{"ct": 1, "mri": 8}`.

    Raises:
        UserError: naming the file, where it is none.
    """
    remedy = "correct modality_mapping_path"
    try:
        mapping = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no readable JSON file ({reason(error)}); {remedy}") from error
    if not isinstance(mapping, dict) or not mapping:
        raise UserError(f"{path}: holds no object like {{'ct': 1}}; {remedy}")
    for name, number in mapping.items():
        if type(number) is not int or number < 0:
            raise UserError(f"{path}: has the number {number!r} for {name!r}; use a whole number from 0")
    return mapping


def load_latents(
    json_data_list: str | Sequence[str],
    split: str,
    embedding_base_dir: str | Sequence[str] | None = None,
    modality_mapping: Mapping[str, int] | None = None,
    latent_channels: int = 4,
    include_body_region: bool = False,
    default_modality: str | None = None,
    labels: bool = False,
    fold: int | None = None,
) -> list[Entry]:
    """The latents of one split, as their headers and side files describe them; no voxel is read.

    The volume `a/b.nii.gz` of a datalist has the latent `a/b_emb.nii.gz` and the side file `a/b_emb.nii.gz.json`. What
    the side file lacks may stand in the datalist.

    Args:
        json_data_list: a datalist, or several that are joined; of its entries, `image` is the volume or its latent.
        split: "training", which must not be empty, or another one, which may be.
        embedding_base_dir: what relative paths are relative to, one folder for all datalists or one for each; None for
            each datalist's own folder.
        modality_mapping: the number of each modality; None where the network takes none, which is number 0.
        latent_channels: of each latent.
        include_body_region: whether the network takes body regions, which the side files must have then.
        default_modality: of latents for which none is given.
        labels: whether each must have a label map, `label` in the datalist, relative to the same folder.
        fold: which is held back for validation, where a datalist has folds and no list `validation`.

    Returns:
        for each latent: `image` (its path), `shape` (C, X, Y, Z), `spacing` (mm), `modality`, `modality_number`, with
        `include_body_region` the two vectors of four in `REGIONS`, and where they are known `dim`, `noise` (the
        posterior's variance) and `weights_sha256` (of the autoencoder); and, where they are wanted, `label` (path).

    Raises:
        UserError: naming the first file that is missing or wrong, what to do, and how many more there are.
    """
    default = {} if default_modality is None else {"modality": default_modality}
    items = [{**default, **item} for item in listed(json_data_list, split, embedding_base_dir, fold)]

    def read(item: dict[str, Any]) -> Entry:
        entry = _entry(item, modality_mapping, latent_channels, include_body_region)
        return entry | {"label": _label(item, entry["shape"])} if labels else entry

    return _each(items, read)


def _each(items: Sequence[dict[str, Any]], read: Callable[[dict[str, Any]], Entry]) -> list[Entry]:
    """What `read` makes of each item, in parallel; a UserError for those of which it makes nothing."""
    found = []
    with ThreadPoolExecutor(16) as pool, progress_bar(len(items), "latents", "latent") as bar:
        for result in pool.map(lambda item: attempt(item, lambda: read(item)), items):
            found.append(result)
            bar.update()
    if faults := [fault for _, fault in found if fault]:
        raise UserError(first_of(faults, of_volumes=False))
    return [entry for entry, _ in found if entry is not None]


def _entry(item: Mapping[str, Any], mapping: Mapping[str, int] | None, channels: int, regions: bool) -> Entry:
    """What header and side file say of the latent of an item; the side file's word counts before the datalist's."""
    path = item["image"]
    facts = {**item, **_side_file(path, needed="spacing" not in item), "image": path}
    with opened(Path(path)) as (image, stream):
        shape = latent_shape(image, path, channels)
        check_complete(Path(path), image, stream)
    entry: Entry = {"image": path, "shape": shape, **_conditions(facts, regions), **_modality(facts, mapping)}
    return entry | {key: facts[key] for key in ("dim", "weights_sha256") if key in facts} | _noise(facts)


def _side_file(latent: str, needed: bool) -> dict[str, Any]:
    """What a latent's side file says; nothing where there is none, and none is needed."""
    if not Path(latent).is_file():
        raise UserError(f"{latent}: no such latent; {ENCODE}, or correct embedding_base_dir")
    path = f"{latent}.json"
    try:
        facts = read_json(path)
    except FileNotFoundError as error:
        if not needed:
            return {}
        raise UserError(
            f"{path}: no such side file; {ENCODE}, or write one with spacing and modality as NV-Generate-CTMR does"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged ({reason(error)}); {ENCODE} again") from error
    if not isinstance(facts, dict):
        raise UserError(f"{path}: is damaged (a {type(facts).__name__}, not an object); {ENCODE} again")
    return facts


def latent_shape(image: nib.Nifti1Image, path: str, channels: int) -> list[int]:
    """(C, X, Y, Z) of a latent, in whose file the channels come last.

    Raises:
        UserError: naming the file, where it is of another shape.
    """
    shape = [int(n) for n in image.shape]
    if len(shape) != 4:
        raise UserError(f"{path}: has shape {tuple(shape)}, not the (X, Y, Z, {channels}) of a latent; {ENCODE} again")
    if shape[3] != channels:
        raise UserError(
            f"{path}: has {shape[3]} channels, but latent_channels is {channels}; correct that, or {ENCODE} again"
        )
    return [channels, *shape[:3]]


def _label(item: Mapping[str, Any], shape: Sequence[int]) -> str:
    """The path of a latent's label map, which has its field of view in full resolution."""
    path, wanted = item.get("label"), [n * FACTOR for n in shape[1:]]
    if not isinstance(path, str):
        raise UserError(
            f"{item['image']}: has no label (label is {path!r}) in the datalist; {ENCODE} again with a datalist whose "
            "entries have label, and train on the datalist_controlnet.json that it writes"
        )
    found, _ = read_header(path).in_ras()
    if found != wanted:
        raise UserError(
            f"{path}: is {_text(found)} voxels, but its latent is {_text(shape[1:])}, which takes exactly {FACTOR} "
            f"times as many, {_text(wanted)}; encode.json writes the label map that fits"
        )
    return path


def _numbers(facts: Mapping[str, Any], key: str, count: int) -> list[float] | None:
    """`count` finite numbers under `key`; None where it holds anything else."""
    value = facts.get(key)
    if not isinstance(value, list) or len(value) != count or any(type(n) not in (int, float) for n in value):
        return None
    return [float(n) for n in value] if all(map(math.isfinite, value)) else None


def _conditions(facts: Mapping[str, Any], include_body_region: bool) -> Entry:
    """Spacing and, where it is wanted, body region."""
    path, spacing = f"{facts['image']}.json", _numbers(facts, "spacing", 3)
    if spacing is None or min(spacing) <= 0:
        raise UserError(
            f"{path}: spacing is {facts.get('spacing')!r}, not three lengths in mm; write it, or {ENCODE} again"
        )
    found: Entry = {"spacing": spacing}
    for key in REGIONS if include_body_region else ():
        if (region := _numbers(facts, key, 4)) is None:
            raise UserError(
                f"{path}: {key} is {facts.get(key)!r}, not four numbers; write it, or set include_body_region to false"
            )
        found[key] = region
    return found


def _modality(facts: Mapping[str, Any], mapping: Mapping[str, int] | None) -> Entry:
    name = facts.get("modality")
    if mapping is None:
        return {"modality": str(name), "modality_number": 0}
    path = f"{facts['image']}.json"
    if name is None:
        raise UserError(
            f"{path}: has no modality; write it there or into the datalist, or set default_modality, e.g. to ct"
        )
    if name not in mapping:
        close = get_close_matches(str(name), mapping, n=1, cutoff=0)
        raise UserError(
            f"{path}: modality {name!r} is not in the modality mapping (the closest is {close[0]!r}); correct it, or "
            "add it to the file of modality_mapping_path"
        )
    return {"modality": name, "modality_number": mapping[name]}


def _noise(facts: Mapping[str, Any]) -> Entry:
    """The posterior's variance, mean over a latent, which `configs/encode.json` has summed up."""
    try:
        return {"noise": float(facts["latent_sums"]["noise"]) / int(facts["latent_sums"]["count"])}
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return {}


def sizes(entries: Sequence[Entry]) -> list[tuple[int, ...]]:
    """(X, Y, Z) of each latent."""
    return [tuple(entry["shape"][1:]) for entry in entries]


def check_sizes(entries: Sequence[Entry], multiple: int) -> None:
    """Whether the network can take latents of these sizes.

    Args:
        entries: of all splits.
        multiple: by which every axis must be divisible: 2 for each level of the UNet but the first, multiplied.

    Raises:
        UserError: naming the first latent of another size, how many there are, and what to do.
    """
    wrong = [i for i, size in enumerate(sizes(entries)) if any(n % multiple for n in size)]
    if wrong:
        first = entries[wrong[0]]
        raise UserError(
            f"{first['image']}: is {_text(first['shape'][1:])}; {len(wrong)} of {len(entries)} latents have sizes that "
            f"are no multiples of {multiple}; encode again with configs/encode.json --resize_multiple "
            f"{multiple * FACTOR} (NV-Generate-CTMR's is 128)"
        )


def _text(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


def ranges(entries: Sequence[Entry]) -> dict[str, Any]:
    """What is trained on.

    Returns:
        `sizes` in latent voxels, the numbers of `modalities`, and, from least to most by axis in mm, `spacing` and
        `field_of_view`.
    """
    spacings = [entry["spacing"] for entry in entries]
    extents = [
        [n * FACTOR * s for n, s in zip(size, spacing, strict=True)]
        for size, spacing in zip(sizes(entries), spacings, strict=True)
    ]
    return {
        "sizes": [list(size) for size in sorted(set(sizes(entries)))],
        "spacing": [[min(axis), max(axis)] for axis in zip(*spacings, strict=True)],
        "field_of_view": [[min(axis), max(axis)] for axis in zip(*extents, strict=True)],
        "modalities": {entry["modality"]: entry["modality_number"] for entry in entries},
    }


def described(entries: Sequence[Entry], most: int = 5) -> dict[str, str]:
    """Rows for the table of the start: latents by size, of which the `most` common are named, spacings, modalities."""
    counts = Counter(sizes(entries)).most_common()
    latents = ", ".join(f"{count} of {_text(size)}" for size, count in counts[:most])
    if rest := counts[most:]:
        latents += f", {sum(count for _, count in rest)} of {len(rest)} other sizes"
    spacing = " x ".join(f"{low:.3g}..{high:.3g}" for low, high in ranges(entries)["spacing"])
    names = Counter((entry["modality"], entry["modality_number"]) for entry in entries).most_common()
    modalities = ", ".join(f"{count} {name} ({number})" for (name, number), count in names)
    return {"latents": latents, "spacing": f"{spacing} mm", "modalities": modalities}
