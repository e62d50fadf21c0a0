"""Reconstruction quality of an autoencoder on whole volumes: numbers for each case, and a report to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from scripts.common.files import write_json, write_text
from scripts.measure.latents import LatentHealth
from scripts.measure.metrics import reconstruction_metrics, tissue_errors
from scripts.measure.pictures import comparison_planes, save_comparison
from scripts.networks.lpips import PerceptualLoss
from scripts.networks.windows import joined
from scripts.use.reconstruct import VolumeEvaluator
from scripts.use.report import html_report, markdown_table, metrics_csv, summarise

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


class Evaluation(VolumeEvaluator):
    """Writes `metrics.csv`, `summary.json`, `summary.md`, `latent_stats.json`, `report.html` and a picture a case.

    Args:
        output_dir: where to.
        facts: of the weights, as `Weights.facts` gives them.
        bundle_version: recorded in the summary.
        lpips: measures slices; None leaves LPIPS out.
        kwargs: of `VolumeEvaluator`; the network has `reconstruct`.
    """

    participle = "evaluated"

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
        self.folder, self.facts, self.lpips = Path(output_dir), {**facts, "bundle_version": bundle_version}, lpips

    def start(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.latents = LatentHealth()

    def process(self, volume: dict[str, Any]) -> None:
        voxels, intensity = volume["voxels"], volume["intensity"]
        whole, mu, sigma = joined(self.slabs(volume, self.network.reconstruct))  # type: ignore[arg-type]
        self.latents.update(mu, sigma)
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
        self.cases.append(case | {"planes": comparison_planes(*shown, intensity.range, self._height())})

    def _height(self) -> int:
        """Of the report's pictures in pixels: less where there are many, so that it stays some 20 MB."""
        count = len(self.data_loader.dataset)  # type: ignore[union-attr, arg-type]
        return int(max(128, min(384, 384 * math.sqrt(60 / count))))

    def gather(self) -> tuple[list[dict[str, Any]], LatentHealth]:
        shares: Any = idist.all_gather((self.cases, self.latents))
        cases = sorted((case for share in shares for case in share[0]), key=lambda case: case["name"])
        return cases, LatentHealth.merged([share[1] for share in shares])

    def conclude(self, gathered: tuple[list[dict[str, Any]], LatentHealth]) -> None:
        cases, latents = gathered
        if not cases:
            return
        summary = summarise(cases)
        statistics = {**latents.statistics(), "volumes": len(cases)}
        table = markdown_table(summary)
        write_text(self.folder / "metrics.csv", metrics_csv(cases))
        write_json(
            self.folder / "summary.json",
            {
                **self.facts,
                "volumes": len(cases),
                "failed": self.failed,
                "metrics": summary,
                "definitions": DEFINITIONS,
            },
        )
        definitions = "\n".join(f"- `{name}`: {text}" for name, text in DEFINITIONS.items())
        heading = f"# Reconstruction of {len(cases)} volumes\n\nWeights: `{self.facts['weights']}`"
        write_text(self.folder / "summary.md", f"{heading}\n\n{table}\n\n## Definitions\n\n{definitions}\n")
        write_json(self.folder / "latent_stats.json", {**statistics, **self.facts})
        write_text(
            self.folder / "report.html",
            html_report(cases, summary, statistics, self.facts, DEFINITIONS, self.failed),
        )
        print(f"\n{table}\n\nreport    {self.folder / 'report.html'}\nnumbers   {self.folder / 'metrics.csv'}")
