"""Which volumes are compared with which: generated ones, and real ones by what they are needed for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.common.errors import UserError
from scripts.data.datalist import SPLITS
from scripts.data.nifti import read_header
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
) -> Entries:
    """The CT volumes to compare, as `scripts.use.inputs.find` gives them, with `sets`: which of `SETS` each is in.

    Args:
        generated_dir: a file, a datalist or a folder of generated volumes.
        dataset_dir: the same of real ones.
        json_data_list: datalists of the real ones instead.
        data_base_dir: what paths in these are relative to.
        reference_splits: the splits of the real ones that are the reference; None takes validation and testing where
            there are such, else training.
        output_dir: of results; these are no input.

    Raises:
        UserError: where a set has fewer than two volumes, or a volume is both generated and real.
    """
    generated = _generated(generated_dir, output_dir)
    found: Entries = list(find(dataset_dir, json_data_list, output_dir=output_dir, data_base_dir=data_base_dir))
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
    return [entry for entry in generated + real if "sets" in entry]


def _generated(generated_dir: str, output_dir: str | None) -> Entries:
    try:
        return list(find(generated_dir, output_dir=output_dir))
    except UserError as error:  # it speaks of dataset_dir
        raise UserError(f"{str(error).rpartition(';')[0]}; generate volumes, or correct generated_dir") from error


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
            header = read_header(entry["image"])
        except UserError as error:
            refusal = refusal or error
            continue
        axes = [next(i for i, code in enumerate(header.axcodes) if code in ends) for ends in ("RL", "AP", "SI")]
        return [header.spacing[axis] for axis in axes], [header.shape[axis] for axis in axes]
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
