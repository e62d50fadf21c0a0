"""Reconstruction quality of an autoencoder on whole volumes: numbers for each case, and a report to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.common.files import write_json, write_text
from scripts.common.precision import computed_in
from scripts.measure.latents import LatentHealth
from scripts.measure.metrics import reconstruction_metrics, tissue_errors
from scripts.measure.pictures import comparison_planes, save_comparison
from scripts.networks.lpips import PerceptualLoss
from scripts.networks.windows import joined
from scripts.use.report import html_report, markdown, metrics_csv, summarise, table_of
from scripts.use.workflow import VolumeWorkflow

DEFINITIONS = {
    "range": "-1000 to 1000 HU are 0 to 1; both volumes are clipped to that (MRI: percentiles 0 and 99.5, not clipped)",
    "psnr": "10 log10(1 / mean squared error), dB, range 1 (2000 HU), over all voxels of the volume",
    "ssim": "3D, Gaussian window of 11 voxels, sigma 1.5, K1 0.01, K2 0.03, range 1, windows inside the volume",
    "mae_hu": "mean absolute error over all voxels, HU",
    "rmse_hu": "root mean square error over all voxels, HU",
    "lpips": "SqueezeNet 1.1, v0.1, images in [0, 1] broadcast to three channels, mean over the three axes of the mean "
    "over evenly spaced slices, 20 % of each axis",
    "tissues": "mae_hu by the original's HU: air below -900, lung -900 to -500, soft tissue -500 to 200, bone from 200",
    "reconstruction": "from the posterior mean, by sliding windows blended with Gaussian weights; sizes are padded "
    "with air (0) at their ends to multiples of 4, and cropped back before anything is measured",
    "summary": "mean and standard deviation (population, ddof 0) over volumes, for a tissue over those that have it",
}


@dataclass
class Findings:
    """What one rank found out.

    Attributes:
        cases: of each volume `name`, `path`, `size`, `spacing`, `metrics` and `planes` (pictures for the page).
        latents: of all its volumes.
    """

    cases: list[dict[str, Any]] = field(default_factory=list)
    latents: LatentHealth = field(default_factory=LatentHealth)


class Evaluation(VolumeWorkflow):
    """Writes `metrics.csv`, `summary.json`, `summary.md`, `latent_stats.json`, `report.html` and a picture a case.

    Args:
        output_dir: folder of these.
        facts: of the weights, as `Weights.facts` gives them.
        bundle_version: recorded in the summary.
        lpips: measures slices; None leaves LPIPS out.
        kwargs: of `WholeVolumes`; the network has `reconstruct`.
    """

    verb = "evaluated"

    def __init__(
        self,
        *,
        output_dir: str,
        facts: Mapping[str, Any],
        bundle_version: str,
        lpips: PerceptualLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.folder, self.lpips = Path(output_dir), lpips
        how = computed_in(self.state.device, self.amp)
        self.facts = {**facts, "bundle_version": bundle_version, "computed_in": how}

    def start(self) -> None:
        """Forget what an earlier run found out."""
        self.found = Findings()

    def findings(self) -> Findings:
        """What this rank found out, for `conclude`."""
        return self.found

    def process(self, volume: dict[str, Any]) -> None:
        """Measure the reconstruction of one volume, and draw it."""
        voxels, intensity = volume["voxels"], volume["intensity"]
        whole, mu, sigma = joined(self.slabs(volume, self.network.reconstruct))  # type: ignore[arg-type]
        reconstruction = whole[0, 0].clamp_(0, 1) if intensity.clip else whole[0, 0]
        original = intensity.normalise(voxels[0, 0])
        metrics: dict[str, Any] = dict(
            reconstruction_metrics(reconstruction, original, intensity.range, self.state.device)
        )
        metrics["lpips"] = None if self.lpips is None else self.lpips.lpips(reconstruction, original)
        if volume["class"] == "ct":
            metrics |= tissue_errors(reconstruction, original, intensity.window)
        shown = (original.numpy(), reconstruction.numpy(), volume["spacing"])
        picture = self.folder / "pictures" / f"{volume['name']}.png"
        save_comparison(*shown, picture, volume["name"], intensity.range)
        case = {"name": volume["name"], "path": volume["image"], "size": list(original.shape)}
        case |= {"spacing": volume["spacing"], "metrics": metrics}
        self.found.cases.append(case | {"planes": comparison_planes(*shown, intensity.range, self._height())})
        self.found.latents.update(mu, sigma)  # last, as the case: of volumes that fail nothing counts

    def _height(self) -> int:
        """How high the report's pictures are, in pixels: less where there are many, so that it stays some 20 MB."""
        return int(max(128, min(384, 384 * math.sqrt(60 / len(self.data_loader.dataset)))))

    def conclude(self, findings: list[Findings]) -> None:
        """Write the files about all volumes, and print the table."""
        cases = sorted((case for found in findings for case in found.cases), key=lambda case: case["name"])
        if not cases:
            return
        latents = LatentHealth.merged([found.latents for found in findings]).statistics()
        summary, statistics = summarise(cases), {**latents, "volumes": len(cases)}
        write_text(self.folder / "metrics.csv", metrics_csv(cases))
        facts = {**self.facts, "volumes": len(cases), "failed": self.failed}
        write_json(self.folder / "summary.json", {**facts, "metrics": summary, "definitions": DEFINITIONS})
        table = markdown(table_of(summary))
        definitions = "\n".join(f"- `{name}`: {text}" for name, text in DEFINITIONS.items())
        heading = f"# Reconstruction of {len(cases)} volumes\n\nWeights: `{self.facts['weights']}`"
        write_text(self.folder / "summary.md", f"{heading}\n\n{table}\n\n## Definitions\n\n{definitions}\n")
        write_json(self.folder / "latent_stats.json", {**statistics, **self.facts})
        page = html_report(cases, summary, statistics, self.facts, DEFINITIONS, self.failed)
        write_text(self.folder / "report.html", page)
        print(f"\n{table}\n\nreport    {self.folder / 'report.html'}\nnumbers   {self.folder / 'metrics.csv'}")
