"""Generated volumes beside real ones: 2.5D FID, histograms of HU, and the nearest training volume of each."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.common.errors import UserError
from scripts.common.files import write_json, write_text
from scripts.common.precision import computed_in
from scripts.common.progress import progress_bar
from scripts.measure.features import HU_RANGE, Gaussian, hu_histogram, in_geometry, plane_features, thumbnail
from scripts.measure.pictures import comparison_planes, save_rows
from scripts.networks.whole_volumes import NotFiniteError
from scripts.use import obedience
from scripts.use.comparison import Findings, notes_on
from scripts.use.generated_report import (
    COMPARABLE,
    fid_table,
    generated_csv,
    generated_page,
    hu_table,
    nearest_table,
    obeying_text,
)
from scripts.use.obedience import Obedience
from scripts.use.report import markdown
from scripts.use.sets import FEWEST, GENERATED, HELD_OUT, REFERENCE, SETS, TRAINING, first_geometry, three_numbers
from scripts.use.workflow import VolumeWorkflow

logger = logging.getLogger(__name__)

DEFINITIONS = {
    "sets": "generated; training: real volumes of that split; reference: real volumes of reference_splits (default: "
    "validation and testing, else training); yardstick: as many training volumes as there are generated ones, evenly "
    "spaced in their list, where the reference holds none of them",
    "geometry": "for FID, volumes are turned to RAS, clipped to -1000..1000 HU, resampled to one spacing (trilinear, "
    "without smoothing), and padded with -1000 HU or cropped about their centre to one size; by default the first "
    "generated volume's",
    "fid": "squared Fréchet distance of Gaussians fitted to the features of slices: |difference of means|^2 + "
    "tr(A + B - 2 (A B)^(1/2)), covariances A and B over N - 1; for slices across z (xy), x (yz) and y (zx), of the "
    "central share center_slices_ratio; mean: of the three. It is biased upwards, the more, the fewer the volumes; "
    "the yardstick, real against real in the same numbers, shows what is left of it at best",
    "squeezenet": "SqueezeNet 1.1 up to its last convolutional block, averaged over space: 512 features; slices in "
    "[0, 1] scaled by ImageNet's mean and standard deviation",
    "radimagenet": "ResNet50 of RadImageNet without its top, averaged over space: 2048 features; the slices of a plane "
    "of one volume scaled to their common minimum and maximum, ImageNet's mean of blue, green and red subtracted",
    "hu_wasserstein": "Wasserstein-1 distance of the histograms of all voxels as stored, clipped to -1000..1000 HU, in "
    "bins of 1 HU, each volume counting the same: the integral of |difference of the cumulative shares|, HU",
    "nearest": "root mean square difference, HU, of means over 32 x 32 x 32 equal boxes of each volume's own field of "
    "view, clipped to -1000..1000 HU, to the nearest training volume; so a copy is found at any resolution, not one "
    "that is mirrored or shifted",
    "mean_hu": "mean over all voxels, clipped to -1000..1000 HU",
}
OBEYING = "obeying.png"


class GeneratedEvaluation(VolumeWorkflow):
    """Writes `generated.csv`, `summary.json`, `summary.md` and `report.html`; and `obeying.png`, of label maps.

    Args:
        output_dir: folder of these.
        bundle_version: recorded in the summary.
        spacing: mm, that FID is measured at; None takes the first generated volume's.
        size: voxels, that FID is measured at; None takes the first generated volume's.
        center_slices_ratio: which share of the slices along each axis is taken, about the centre.
        tissues: that are looked for in volumes with label maps, as for `Obedience`.
        label_voxels: how many voxels a label must have more than for its HU to be compared.
        kwargs: of `WholeVolumes`; the network is what `feature_networks` makes, and the items come from `find_sets`.

    Raises:
        UserError: for a knob that is out of range.
    """

    verb = "compared"
    remedy = "raise spacing, or lower size (memory goes with a volume's voxels)"

    def __init__(
        self,
        *,
        output_dir: str,
        bundle_version: str,
        spacing: Sequence[float] | None = None,
        size: Sequence[int] | None = None,
        center_slices_ratio: float = 0.4,
        tissues: Mapping[str, Any] | None = None,
        label_voxels: int = 500,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(center_slices_ratio, (int, float)) or not 0 < center_slices_ratio <= 1:
            raise UserError(f"center_slices_ratio is {center_slices_ratio!r}; use a number above 0 up to 1, e.g. 0.4")
        entries = self.data_loader.dataset.data
        own_spacing, own_size = first_geometry(entries)
        self.spacing = own_spacing if spacing is None else three_numbers("spacing", spacing, float)
        self.size = own_size if size is None else three_numbers("size", size, int)
        self.folder, self.ratio = Path(output_dir), center_slices_ratio
        self.obedience = Obedience(tissues or {}, label_voxels, entries)
        self.facts = {
            "reference_splits": sorted({entry["split"] for entry in entries if REFERENCE in entry["sets"]}),
            "spacing": self.spacing,
            "size": self.size,
            "center_slices_ratio": self.ratio,
            "bundle_version": bundle_version,
            "computed_in": computed_in(self.state.device, self.amp),
        }

    def start(self) -> None:
        """Forget what an earlier run found out."""
        self.found = Findings()
        self.bar = progress_bar(len(self.data_loader), "compared", "volume")

    def finish(self) -> None:
        """Remove the bar."""
        self.bar.close()

    def findings(self) -> Findings:
        """What this rank found out, for `conclude`."""
        return self.found

    def pass_over(self, why: str) -> None:
        """Name a volume that failed, and go on."""
        super().pass_over(why)
        self.bar.update()

    def process(self, volume: dict[str, Any]) -> None:
        """Measure one volume, and draw it."""
        image = volume["intensity"].normalise(volume["voxels"][0, 0])
        compared = [name for name in volume["sets"] if name != TRAINING]
        features: dict[str, dict[str, torch.Tensor]] = {}
        if compared:
            box = in_geometry(image, volume["spacing"], self.spacing, self.size)
            features = {name: plane_features(box, net, self.ratio) for name, net in self.network.items()}  # type: ignore[operator]
            if not all(part.isfinite().all() for planes in features.values() for part in planes.values()):
                raise NotFiniteError("what the network makes of it is not finite (NaN or infinite)")
        histogram = hu_histogram(volume["voxels"].numpy())
        shown = image.numpy()
        planes = comparison_planes(shown, shown, volume["spacing"], volume["intensity"].range, height=160)
        case = {"name": volume["name"], "path": volume["image"], "size": list(image.shape)}
        case |= {key: volume[key] for key in ("sets", "split", "spacing")} | {"planes": planes["original"]}
        case |= {"thumbnail": thumbnail(image), "mean_hu": float(histogram @ np.arange(HU_RANGE[0], HU_RANGE[1] + 1))}
        labels, case["obeying"] = self.obedience.measure(volume)
        self.found.add_labels(labels)
        self._add(case, features, compared, histogram)  # last: of volumes that fail nothing counts
        self.bar.update()

    def _add(
        self,
        case: dict[str, Any],
        features: Mapping[str, Mapping[str, torch.Tensor]],
        compared: Sequence[str],
        histogram: np.ndarray,
    ) -> None:
        self.found.cases.append(case)
        for network, planes in features.items():
            for plane, vectors in planes.items():
                for name in compared:
                    key = (network, name, plane)
                    self.found.gaussians.setdefault(key, Gaussian(vectors.shape[1])).update(vectors)
        for name in case["sets"]:
            self.found.histograms[name] = self.found.histograms.get(name, 0) + histogram

    def conclude(self, findings: list[Findings]) -> None:
        """Write the files, and print the tables."""
        found = Findings.merged(findings)
        if few := [name for name in (GENERATED, TRAINING, REFERENCE) if len(found.of(name)) < FEWEST]:
            logger.error("too few volumes are left to compare (%s): no report is written", ", ".join(few))
            return
        found.find_nearest()
        obeying = [case["obeying"] for case in found.of(GENERATED) if case["obeying"]]
        summary = self._summary(found, obeying)
        write_text(self.folder / "generated.csv", generated_csv(found.of(GENERATED)))
        write_json(self.folder / "summary.json", summary)
        tables = {"2.5D FID": fid_table, "Hounsfield units": hu_table, "Nearest training volume": nearest_table}
        told = {heading: markdown(table(summary)) for heading, table in tables.items()}
        sheet = None
        if obeying:
            told["Obeying the map"] = obeying_text(summary["obeying"])
        if planes := {one["name"]: one["planes"] for one in obeying if "planes" in one}:
            sheet = self.folder / OBEYING
            save_rows(planes, sheet, f"{len(planes)} of {len(obeying)} generated volumes with label maps")
        printed = "\n\n".join(told.values())
        told |= {"What can be compared": COMPARABLE, "Notes": "\n".join(f"- {note}" for note in summary["notes"])}
        told["Definitions"] = "\n".join(f"- `{name}`: {text}" for name, text in summary["definitions"].items())
        sections = "\n".join(f"\n## {heading}\n\n{text}" for heading, text in told.items() if text)
        write_text(self.folder / "summary.md", f"# {len(found.of(GENERATED))} generated volumes\n{sections}\n")
        cases = {name: found.of(name) for name in (GENERATED, REFERENCE, HELD_OUT)}
        write_text(self.folder / "report.html", generated_page(cases, summary, sheet))
        print(f"\n{printed}\n\nreport    {self.folder / 'report.html'}\nnumbers   {self.folder / 'generated.csv'}")
        if sheet:
            print(f"picture   {sheet}")

    def _summary(self, found: Findings, obeying: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Everything about the sets, as `summary.json` holds it."""
        networks = dict(self.network.items())  # type: ignore[operator]
        summary: dict[str, Any] = {
            **self.facts,
            "volumes": {name: len(found.of(name)) for name in SETS},
            "slices": found.slices(),
            "fid": {name: {"label": net.label, **found.fid(name)} for name, net in networks.items()},
            "hu_wasserstein": found.hu_distances(),
            "nearest": found.distances(),
            "field_of_view_mm": {name: found.field_of_view(name) for name in (GENERATED, REFERENCE)},
        }
        notes = notes_on(summary, {net.label: net.features for net in networks.values()})
        definitions = DEFINITIONS
        if obeying:
            summary["obeying"] = obedience.summarise(obeying, found.labels, self.obedience.label_voxels)
            notes += obedience.notes_on(summary["obeying"])
            definitions = DEFINITIONS | obedience.DEFINITIONS
        return summary | {"notes": notes, "definitions": definitions, "failed": self.failed}
