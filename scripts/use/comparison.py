"""What is found out about generated and real volumes: sums that ranks share, and the numbers that come of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from scripts.measure.features import PLANES, Gaussian, frechet_distance, nearest, wasserstein
from scripts.use.sets import GENERATED, HELD_OUT, REFERENCE, SETS, TRAINING, YARDSTICK


@dataclass
class Findings:
    """What one rank found out.

    Attributes:
        cases: of each volume `name`, `path`, `sets`, `split`, `size`, `spacing`, `mean_hu`, `thumbnail`, `planes`, a
            picture, and `obeying`, what `scripts.use.obedience.Obedience` says of it, or None.
        gaussians: of the features, by network, set and plane.
        histograms: sums over volumes, by set.
        labels: histograms by label, sums over volumes, as it gives them.
    """

    cases: list[dict[str, Any]] = field(default_factory=list)
    gaussians: dict[tuple[str, str, str], Gaussian] = field(default_factory=dict)
    histograms: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def merged(parts: Sequence[Findings]) -> Findings:
        """Those of all ranks together, cases in the order of their paths."""
        whole = Findings(sorted((case for part in parts for case in part.cases), key=lambda case: case["path"]))
        for key in {key: None for part in parts for key in part.gaussians}:
            whole.gaussians[key] = Gaussian.merged([p.gaussians[key] for p in parts if key in p.gaussians])
        for name in SETS:
            if shares := [part.histograms[name] for part in parts if name in part.histograms]:
                whole.histograms[name] = np.sum(shares, axis=0)
        for part in parts:
            whole.add_labels(part.labels)
        return whole

    def add_labels(self, histograms: Mapping[str, np.ndarray]) -> None:
        """Add those of a volume, or of a rank."""
        for name, counts in histograms.items():
            self.labels[name] = self.labels.get(name, 0) + counts

    def of(self, name: str) -> list[dict[str, Any]]:
        """The cases of a set, or those of the reference that are held out."""
        if name == HELD_OUT:
            return [case for case in self.of(REFERENCE) if TRAINING not in case["sets"]]
        return [case for case in self.cases if name in case["sets"]]

    def find_nearest(self) -> None:
        """Note with the generated and the held-out cases their nearest training volume and its distance."""
        training = self.of(TRAINING)
        others = torch.stack([case["thumbnail"] for case in training])
        for name in (GENERATED, HELD_OUT):
            if cases := self.of(name):
                which, distances = nearest(torch.stack([case["thumbnail"] for case in cases]), others)
                for case, index, distance in zip(cases, which, distances, strict=True):
                    case |= {"nearest": training[index], "rmse_hu": distance}

    def distances(self) -> dict[str, dict[str, float]]:
        """`median`, `min` and number of volumes of the distances to the nearest training volume."""
        values = {name: [case["rmse_hu"] for case in self.of(name)] for name in (GENERATED, HELD_OUT)}
        found: dict[str, dict[str, float]] = {
            name: {"median": statistics.median(those), "min": min(those), "volumes": len(those)}
            for name, those in values.items()
            if those
        }
        if HELD_OUT in found:
            closer = [value for value in values[GENERATED] if value < found[HELD_OUT]["min"]]
            found[GENERATED]["closer_than_any_held_out"] = len(closer)
        return found

    def fid(self, network: str) -> dict[str, dict[str, float]]:
        """Of the generated and the yardstick's volumes against the reference: FID by plane, and the `mean`."""
        found = {}
        for name in (GENERATED, YARDSTICK):
            if self.of(name):
                pairs = {plane: [self.gaussians[network, s, plane] for s in (name, REFERENCE)] for plane in PLANES}
                by_plane = {plane: frechet_distance(*pair) for plane, pair in pairs.items()}
                found[name] = by_plane | {"mean": statistics.fmean(by_plane.values())}
        return found

    def slices(self) -> dict[str, int]:
        """How many slices of a plane FID has of each set; of the plane that has the fewest."""
        counts: dict[str, int] = {}
        for (_, name, _), gaussian in self.gaussians.items():
            counts[name] = min(gaussian.count, counts.get(name, gaussian.count))
        return counts

    def hu_distances(self) -> dict[str, float]:
        """Wasserstein distances of the sets' mean histograms, HU; the last one is real against real."""
        means = {name: total / len(self.of(name)) for name, total in self.histograms.items()}
        pairs = [(GENERATED, TRAINING)]
        if self.of(HELD_OUT):
            pairs += [(GENERATED, REFERENCE), (REFERENCE, TRAINING)]
        return {f"{a}_to_{b}": wasserstein(means[a], means[b]) for a, b in pairs}

    def field_of_view(self, name: str) -> list[float]:
        """The median extent of a set's volumes along each axis, mm."""
        extents = np.array([np.array(case["size"]) * case["spacing"] for case in self.of(name)])
        return np.median(extents, axis=0).round(1).tolist()


def notes_on(summary: Mapping[str, Any], features: Mapping[str, int]) -> list[str]:
    """What a reader of the numbers must know; `features` is how many each network gives, by its label."""
    notes = []
    fewest = min(summary["slices"].values())
    for label, count in features.items():
        if fewest <= count:
            notes.append(
                f"{label}: {fewest} slices of a plane are no more than its {count} features, so the covariance is "
                "rank-deficient and FID strongly biased: compare only with sets of as many volumes"
            )
        if "untrained" in label:
            notes.append(f"{label}: the features are random (perceptual_pretrained is false), for tries only")
    if YARDSTICK not in summary["slices"]:
        notes.append(
            "the reference holds training volumes, so there is no yardstick of real volumes, and a network that "
            "copies its training volumes gets a good FID"
        )
    extents = [np.array(summary["field_of_view_mm"][name]) for name in (GENERATED, REFERENCE)]
    if (np.abs(extents[0] / extents[1] - 1) > 0.1).any():
        shown = [" x ".join(f"{length:.0f}" for length in extent) for extent in extents]
        notes.append(
            f"the generated volumes show {shown[0]} mm, the reference {shown[1]} mm (medians): the difference "
            "counts in every measure"
        )
    return notes
