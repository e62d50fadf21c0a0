"""Generated volumes beside the label maps they were made for: what is measured of each, and what comes of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from scripts.common.errors import UserError
from scripts.data.labels import read_labels, resampled, with_body
from scripts.data.nifti import read_nifti
from scripts.measure.features import wasserstein
from scripts.measure.obedience import LABELS, Tissue, dice, label_histograms, median
from scripts.measure.pictures import obeying_planes

REAL, OWN, ANOTHER, UNCONDITIONAL = "real", "own", "another", "unconditional"
SHOWN = 8  # volumes in the contact sheet
AIR = -1000.0  # HU, where a real volume does not reach

DEFINITIONS = {
    "obeying": "of generated volumes with label maps. own: a volume within the map it was made for; another: the same "
    "volume within the map of the next one of the same size (of any size, if no other has it); unconditional: a volume "
    "of unconditional_dir, in their order, within that map. Where sizes differ, the map is resampled by nearest over "
    "the whole field of view, whatever its position in mm",
    "obeying_hu": "of all voxels of a label over all volumes, as stored, clipped to -1000..1000 HU, in bins of 1 HU, "
    "beside those of the reference's real volumes within their own label maps (where such a map lacks 200, the rest of "
    "the body gets it, as in encode.json): |difference of medians| and Wasserstein-1 distance; of labels with more "
    "than label_voxels voxels in the generated volumes' maps and in the reference's. nearer: how many labels have a "
    "smaller one within their own than within another's map",
    "obeying_dice": "2 |A and B| / (|A| + |B|), both inside label > 0, mean over volumes. A: the voxels whose HU are "
    "those of the tissue, from above up to, not including, below. B: the same of the real volume that the map belongs "
    "to, or, where none is known, the voxels with the tissue's labels. Bands by default as in evaluate.json: bone from "
    "200 HU, contrast medium too; lung -900 to -500 HU, normally aerated (Gattinoni 2001); air below -900 HU, airways "
    "and the most inflated lung. Voxels on the border of body and air have HU of lung as well",
    "counterpart": "the real volume whose label map is source_label of the generated volume's entry in the datalist "
    "(its label, where it has none), or has its file name, or whose own file name with _label is that",
}


@dataclass
class _Target:
    """A label map, (X, Y, Z) uint8, and HU of the real volume that it belongs to, on the same grid, or None."""

    labels: np.ndarray
    hu: np.ndarray | None

    def in_size(self, size: Sequence[int]) -> _Target:
        """Both over the same field of view in another size, by nearest."""
        if list(size) == list(self.labels.shape):
            return self
        arrays = [self.labels] if self.hu is None else [self.labels, self.hu.astype(np.float32)]
        found = [resampled(torch.from_numpy(array)[None, None], size)[0, 0].numpy() for array in arrays]
        return _Target(found[0], None if self.hu is None else found[1])


def _target(label: str, counterpart: str | None) -> _Target:
    """What the files of a label map and of its real volume hold."""
    labels, affine = read_labels(label)
    return _Target(labels, _on_grid(label, labels.shape, affine, counterpart))


def _on_grid(path: str, shape: Sequence[int], affine: np.ndarray, counterpart: str | None) -> np.ndarray | None:
    """HU of a real volume (trilinear) on the grid, shape and affine, of the label map of `path`; None where none is."""
    if counterpart is None:
        return None
    hu, other = read_nifti(counterpart)
    to_real = np.linalg.inv(other) @ affine
    middle = (to_real @ [*(np.array(shape) - 1) / 2, 1])[:3]
    if (middle < 0).any() or (middle >= hu.shape).any():
        raise UserError(f"{path}: its middle lies outside {counterpart}, the real volume it should be of; correct it")
    if hu.shape == tuple(shape) and np.allclose(to_real, np.eye(4), atol=1e-3):
        return hu
    return ndimage.affine_transform(
        hu.astype(np.float32), to_real, output_shape=tuple(shape), order=1, mode="grid-constant", cval=AIR
    )


class Obedience:
    """What is measured of volumes that have label maps.

    Args:
        tissues: for each its `above` and `below` (HU), one of which may be missing, and its `labels`.
        label_voxels: how many voxels a label must have more than to be compared.
        entries: as `scripts.use.sets.find_sets` gives them.

    Raises:
        UserError: for a knob that is no such.
    """

    def __init__(self, tissues: Mapping[str, Any], label_voxels: int, entries: Sequence[Mapping[str, Any]]) -> None:
        if type(label_voxels) is not int or label_voxels < 0:
            raise UserError(f"label_voxels is {label_voxels!r}; use a whole number from 0, e.g. 500")
        self.label_voxels = label_voxels
        self.tissues = {name: _tissue(name, options) for name, options in tissues.items()}
        self.shown = {entry["image"] for entry in [entry for entry in entries if "another" in entry][:SHOWN]}

    def measure(self, volume: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
        """The histograms of a volume's labels, and of generated volumes the rest.

        Args:
            volume: as `scripts.data.datasets.LabelledVolumes` gives it.

        Returns:
            by `REAL` of a volume of the reference, by `OWN` and, where there are such, `ANOTHER` and `UNCONDITIONAL` of
            a generated one, what `label_histograms` gives; none of others. And None, or `name`; `dice` by the same
            names, of each tissue; `target`, by them, "real" or "labels", what Dice was measured against; and of the
            first volumes `planes`, pictures.

        Raises:
            UserError: for another label map or a real volume that cannot be read, or does not fit.
        """
        if "labels" not in volume:
            return {}, None
        hu, labels = (volume[key][0, 0].numpy() for key in ("voxels", "labels"))
        if "another" in volume:
            return self._of_generated(volume, hu, labels)
        return {REAL: label_histograms(hu, with_body(labels, hu))}, None

    def _of_generated(
        self, volume: Mapping[str, Any], hu: np.ndarray, labels: np.ndarray
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        own = _Target(labels, _on_grid(volume["label"], hu.shape, volume["affine"], volume["counterpart"]))
        compared = {OWN: (hu, own)}
        if volume["another"]:
            compared[ANOTHER] = (hu, _target(**volume["another"]).in_size(hu.shape))
        if volume["unconditional"]:
            free, _ = read_nifti(volume["unconditional"])
            compared[UNCONDITIONAL] = (free, own.in_size(free.shape))
        found: dict[str, Any] = {"name": volume["name"], "target": {}, "dice": {}}
        for name, (voxels, target) in compared.items():
            found["dice"][name] = {tissue: _dice(voxels, target, t) for tissue, t in self.tissues.items()}
            found["target"][name] = "labels" if target.hu is None else "real"
        if volume["image"] in self.shown:
            normalise = volume["intensity"].normalise
            real = None if own.hu is None else normalise(own.hu).numpy()
            found["planes"] = obeying_planes(own.labels, normalise(hu).numpy(), real, volume["spacing"])
        return {name: label_histograms(voxels, target.labels) for name, (voxels, target) in compared.items()}, found


def _tissue(name: str, options: Any) -> Tissue:
    """A row of the table `tissues`."""
    given = options if isinstance(options, Mapping) else {}
    limits, labels = [given[key] for key in ("above", "below") if key in given], given.get("labels", [])
    numbers = all(type(limit) in (int, float) for limit in limits) and isinstance(labels, list)
    known = bool(limits) and set(given) <= {"above", "below", "labels"}
    if not (known and numbers and all(type(label) is int and 0 < label < LABELS for label in labels)):
        raise UserError(
            f"tissues#{name} is {options!r}; use above or below or both, in HU, and labels from 1 to {LABELS - 1}, "
            'e.g. {"above": 200, "labels": [33, 34]}'
        )
    return Tissue(**given)


def _dice(hu: np.ndarray, target: _Target, tissue: Tissue) -> float | None:
    """Dice of a tissue inside a map; None where neither has it, or no label stands for it and nothing else is known."""
    if target.hu is not None:
        wanted = tissue.within(target.hu, target.labels)
    elif not (wanted := np.isin(target.labels, tissue.labels)).any():
        return None
    return dice(tissue.within(hu, target.labels), wanted)


def summarise(cases: Sequence[Mapping[str, Any]], histograms: Mapping[str, np.ndarray], least: int) -> dict[str, Any]:
    """What `summary.json` holds of generated volumes with label maps.

    Args:
        cases: of each volume `name`, `dice` and `target`, as `Obedience.measure` gives them.
        histograms: (256, 2001), sums over all volumes, by `REAL`, `OWN`, `ANOTHER` and `UNCONDITIONAL`.
        least: how many voxels a label must have more than.
    """
    voxels = {name: histogram.sum(1) for name, histogram in histograms.items()}
    real = voxels.get(REAL, np.zeros(LABELS, np.int64))
    drawn = [label for label in range(1, LABELS) if voxels[OWN][label] > least]
    hu = {label: _hu_of(label, histograms) for label in drawn if real[label] > least}
    summary: dict[str, Any] = {
        "volumes": len(cases),
        "counterparts": sum(case["target"][OWN] == "real" for case in cases),
        "label_voxels": least,
        "hu": hu,
        "dice": {tissue: found for tissue in cases[0]["dice"][OWN] if (found := _mean_dice(cases, tissue))},
        "not_compared": [label for label in drawn if label not in hu],
        "by_volume": [{key: case[key] for key in ("name", "target", "dice")} for case in cases],
    }
    both = [found for found in hu.values() if ANOTHER in found["wasserstein"]]
    if both:
        nearer = {
            key.partition("_")[0]: sum(found[key][OWN] < found[key][ANOTHER] for found in both)
            for key in ("median_difference", "wasserstein")
        }
        summary["nearer"] = {"labels": len(both)} | nearer
    return summary


def _hu_of(label: int, histograms: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Medians (HU), their distances to that of the real ones, and Wasserstein distances, of the voxels of a label."""
    counts = {name: histogram[label] for name, histogram in histograms.items() if histogram[label].any()}
    medians = {name: median(those) for name, those in counts.items()}
    shares = {name: those / those.sum() for name, those in counts.items()}
    compared = [name for name in counts if name != REAL]
    return {
        "voxels": int(counts[OWN].sum()),
        "median": medians,
        "median_difference": {name: abs(medians[name] - medians[REAL]) for name in compared},
        "wasserstein": {name: wasserstein(shares[name], shares[REAL]) for name in compared},
    }


def _mean_dice(cases: Sequence[Mapping[str, Any]], tissue: str) -> dict[str, dict[str, float]]:
    """By what a tissue was compared with, the mean Dice of each kind of map, and how many volumes there are."""
    found: dict[str, dict[str, float]] = {}
    for target in ("real", "labels"):
        values: dict[str, list[float]] = {}
        for case in cases:
            for name, by_tissue in case["dice"].items():
                if case["target"][name] == target and by_tissue[tissue] is not None:
                    values.setdefault(name, []).append(by_tissue[tissue])
        if OWN in values:
            found[target] = {"volumes": len(values[OWN])} | {name: statistics.fmean(v) for name, v in values.items()}
    return found


def notes_on(obeying: Mapping[str, Any]) -> list[str]:
    """What a reader of these numbers must know."""
    notes = []
    if not obeying["hu"]:
        notes.append(
            "the real volumes of the reference have no label maps with these labels, so HU per label are not compared; "
            "build their datalist with label maps (python -m scripts.datalist build)"
        )
    elif missing := obeying["not_compared"]:
        notes.append(
            f"labels {', '.join(map(str, missing))} have no more than {obeying['label_voxels']} voxels in the label "
            "maps of the reference, so their HU are not compared"
        )
    if obeying["counterparts"] < obeying["volumes"]:
        notes.append(
            f"of {obeying['volumes'] - obeying['counterparts']} label maps no real volume is known: there, bone, lung "
            "and air are compared with the labels that stand for them"
        )
    return notes
