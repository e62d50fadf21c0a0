"""Which volumes are compared with which: generated ones, and real ones by what they are needed for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.common.errors import UserError
from scripts.data.datalist import SPLITS
from scripts.data.nifti import read_header, stem
from scripts.use.generate import DATALIST
from scripts.use.inputs import find

GENERATED, TRAINING, REFERENCE, YARDSTICK = SETS = ("generated", "training", "reference", "yardstick")
HELD_OUT = "held_out"  # those of the reference that are none of the training
FEWEST = 2  # volumes of a set

Entries = list[dict[str, Any]]


def find_sets(
    generated_dir: str,
    dataset_dir: str,
    json_data_list: str | Sequence[str] | None = None,
    data_base_dir: str | Sequence[str] | None = None,
    reference_splits: str | Sequence[str] | None = None,
    output_dir: str | None = None,
    unconditional_dir: str | None = None,
) -> Entries:
    """The CT volumes to compare, as `scripts.use.inputs.find` gives them, with `sets`: which of `SETS` each is in.

    Where generated volumes have label maps, also with what `pair` notes.

    Args:
        generated_dir: a file, a datalist or a folder of generated volumes; the folder's `datalist.json` where that
            pairs them with label maps.
        dataset_dir: the same of real ones.
        json_data_list: datalists of the real ones instead.
        data_base_dir: what paths in these are relative to.
        reference_splits: the splits of the real ones that are the reference; None takes validation and testing where
            there are such, else training.
        output_dir: of results; these are no input.
        unconditional_dir: generated volumes without label maps, to be compared with those that have some.

    Raises:
        UserError: where a set has fewer than two volumes, or a volume is both generated and real.
    """
    generated = _generated(generated_dir, "generated_dir", output_dir)
    found = _listed(find(dataset_dir, json_data_list, output_dir=output_dir, data_base_dir=data_base_dir))
    real = [entry for entry in found if entry["class"] == "ct"]
    _check_apart(generated, real)
    splits = _reference_splits(reference_splits, {entry["split"] for entry in real})
    training = [entry for entry in real if entry["split"] == "training"]
    reference = [entry for entry in real if entry["split"] in splits]
    _check_enough(f"{generated_dir} (generated_dir)", generated)
    _check_enough(f"{json_data_list or dataset_dir}: training", training)
    _check_enough(f"{json_data_list or dataset_dir}: {' and '.join(splits)} (reference_splits)", reference)
    count = 0 if "training" in splits else min(len(generated), len(training))
    yardstick = [training[i * len(training) // count] for i in range(count)]
    for name, volumes in zip(SETS, (generated, training, reference, yardstick), strict=True):
        for entry in volumes:
            entry.setdefault("sets", []).append(name)
    free = [] if unconditional_dir is None else _generated(unconditional_dir, "unconditional_dir", output_dir)
    pair([entry for entry in generated if "label" in entry], real, free)
    return [entry for entry in generated + real if "sets" in entry]


def _generated(generated_dir: str, knob: str, output_dir: str | None) -> Entries:
    pairs = Path(generated_dir) / DATALIST
    paired = pairs.is_file() and '"label"' in pairs.read_text(encoding="utf-8", errors="replace")
    try:
        return _listed(find(str(pairs) if paired else generated_dir, output_dir=output_dir))
    except UserError as error:  # it speaks of dataset_dir
        raise UserError(f"{str(error).rpartition(';')[0]}; generate volumes, or correct {knob}") from error


def _listed(entries: Sequence[Mapping[str, Any]]) -> Entries:
    """Entries with `split`: `training` where no datalist says it."""
    return [{"split": "training", **entry} for entry in entries]


def pair(generated: Entries, real: Entries, free: Entries) -> None:
    """Note with generated volumes that have label maps what they are compared with, each None where there is none such.

    `counterpart`: the path of the real volume that the map belongs to; `another`: `label` and `counterpart` of the next
    volume of the same size and another map; `unconditional`: the path of a volume without map. Of the real volumes only
    those of the reference keep their `label`, where generated ones have some.

    Args:
        generated: entries with `label`, the path of the map that the volume was made for.
        real: the real volumes, of which some may have `label`.
        free: volumes made without map; they are taken in turn.
    """
    known: dict[str, set[str]] = {}
    for entry in real:
        keys = [f"{_name(entry['image'])}_label"]  # as configs/encode.json calls the maps that it writes
        keys += [os.path.realpath(entry["label"]), _name(entry["label"])] if "label" in entry else []
        for key in keys:
            known.setdefault(key, set()).add(entry["image"])
    sources: list[str] = [entry["source_label"] if "source_label" in entry else entry["label"] for entry in generated]
    sizes = [_size(entry["image"]) for entry in generated]
    for i, (entry, source) in enumerate(zip(generated, sources, strict=True)):
        found = known.get(os.path.realpath(source)) or known.get(_name(source)) or set()
        entry["counterpart"] = min(found) if len(found) == 1 else None
        entry["unconditional"] = free[i % len(free)]["image"] if free else None
    for i, entry in enumerate(generated):
        others = [j for j in (*range(i + 1, len(sizes)), *range(i)) if sources[j] != sources[i]]
        nearest = next((j for j in others if sizes[j] == sizes[i]), others[0] if others else None)
        other = {} if nearest is None else generated[nearest]
        entry["another"] = {key: other[key] for key in ("label", "counterpart")} if other else None
    for entry in real:
        if not generated or REFERENCE not in entry.get("sets", ()):
            entry.pop("label", None)


def _name(path: str) -> str:
    return stem(Path(path).name)


def _size(path: str) -> list[int] | None:
    """Voxels along the axes in RAS; None for a file that cannot be read, which is said where it is to be compared."""
    try:
        return read_header(path).in_ras()[0]
    except UserError:
        return None


def _check_apart(generated: Entries, real: Entries) -> None:
    known = {os.path.realpath(entry["image"]) for entry in real}
    for entry in generated:
        if os.path.realpath(entry["image"]) in known:
            raise UserError(
                f"{entry['image']}: is both a generated and a real volume; correct generated_dir or dataset_dir"
            )


def _check_enough(what: str, volumes: Entries) -> None:
    if len(volumes) < FEWEST:
        raise UserError(f"{what}: has {len(volumes)} CT volumes, but sets of {FEWEST} or more are compared; add some")


def _reference_splits(wanted: str | Sequence[str] | None, there: set[str]) -> list[str]:
    if wanted is None:
        return [split for split in SPLITS if split in there and split != "training"] or ["training"]
    splits = [wanted] if isinstance(wanted, str) else list(wanted)
    if not splits or not set(splits) <= set(SPLITS):
        raise UserError(f"reference_splits is {splits}; use some of {', '.join(SPLITS)}")
    return splits


def first_geometry(entries: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[int]]:
    """Spacing (mm) and size (voxels) in RAS of the first generated volume that can be read.

    Raises:
        UserError: where none can.
    """
    refusal: UserError | None = None
    for entry in entries:
        if GENERATED not in entry["sets"]:
            continue
        try:
            size, spacing = read_header(entry["image"]).in_ras()
            return spacing, size
        except UserError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def three_numbers(name: str, value: Any, kind: type[int] | type[float]) -> list[Any]:
    """A knob of three positive numbers, whole ones where `kind` is int.

    Raises:
        UserError: naming it, where it is none.
    """
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    legal = (int,) if kind is int else (int, float)
    if len(numbers) != 3 or not all(type(n) in legal and 0 < n < float("inf") for n in numbers):
        example = "[128, 128, 128]" if kind is int else "[2, 2, 2]"
        raise UserError(f"{name} is {value!r}; use three {'whole ' * (kind is int)}numbers above 0, e.g. {example}")
    return [kind(n) for n in numbers]
