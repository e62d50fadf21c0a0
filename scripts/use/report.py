"""What an evaluation found, as a table, as a CSV file, and as a page to look at."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from scripts.measure.metrics import TISSUES

Cases = Sequence[Mapping[str, Any]]
Summary = Mapping[str, Mapping[str, float | int]]

NONE = "–"


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    name: str
    label: str
    style: str
    unit: str = ""

    def text(self, value: float | None) -> str:
        """The value with its unit, or a dash where there is none."""
        return NONE if value is None else f"{value:{self.style}}{self.unit and ' ' + self.unit}"

    def spread(self, found: Mapping[str, float | int]) -> str:
        """Standard deviation and number of volumes, in words."""
        return f"± {found['std']:{self.style}} over {found['count']} volume{'s' * (found['count'] != 1)}"


METRICS = (
    Metric("psnr", "PSNR", ".2f", "dB"),
    Metric("ssim", "SSIM", ".4f"),
    Metric("lpips", "LPIPS", ".4f"),
    Metric("mae_hu", "MAE", ".1f", "HU"),
    Metric("rmse_hu", "RMSE", ".1f", "HU"),
    *(Metric(f"mae_hu_{tissue}", f"MAE {tissue.replace('_', ' ')}", ".1f", "HU") for tissue in TISSUES),
)
_HEADLINE, _BY_TISSUE, _ORDERS = METRICS[:5], METRICS[5:], METRICS[:4]
# Guo et al. 2025 (MAISI), the released autoencoder on data it was not trained on.
PUBLISHED = {
    "MAISI, MSD07 pancreas CT": {"lpips": 0.038, "ssim": 0.978, "psnr": 37.27},
    "MAISI, MSD08 hepatic vessel CT": {"lpips": 0.046, "ssim": 0.970, "psnr": 36.56},
}


def summarise(cases: Cases) -> dict[str, dict[str, float | int]]:
    """`mean`, `std` (population) and `count` of each metric over the cases that have it."""
    summary: dict[str, dict[str, float | int]] = {}
    for metric in METRICS:
        values = [v for case in cases if (v := case["metrics"].get(metric.name)) is not None]
        if values:
            mean = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
            summary[metric.name] = {"mean": mean, "std": deviation, "count": len(values)}
    return summary


def metrics_csv(cases: Cases) -> str:
    """One line a case: name, path, size in voxels, spacing in mm, and the metrics; empty where there is none."""
    columns = [metric.name for metric in METRICS] + [f"voxels_{tissue}" for tissue in TISSUES]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "path", "size", "spacing_mm", *columns])
    for case in cases:
        size, spacing = ("x".join(f"{n:.6g}" for n in case[key]) for key in ("size", "spacing"))
        writer.writerow([case["name"], case["path"], size, spacing, *(case["metrics"].get(c) for c in columns)])
    return text.getvalue()


def table_of(summary: Summary) -> list[list[str]]:
    """Mean and standard deviation beside MAISI's published figures: a row of headings, then one for each metric."""
    rows = [["metric", "volumes", "mean", "std", *PUBLISHED]]
    for metric in METRICS:
        if metric.name not in summary and metric.name != "lpips":  # which is published, so its lack is shown
            continue
        found: Mapping[str, Any] = summary.get(metric.name, {"count": 0, "mean": None, "std": None})
        published = [f"{figures[metric.name]:g}" if metric.name in figures else NONE for figures in PUBLISHED.values()]
        values = [metric.text(found["mean"]), metric.text(found["std"])]
        rows.append([metric.label, str(found["count"]), *values, *published])
    return rows


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A table, of which the first row are the headings."""
    head, *body = table
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def html_report(
    cases: Cases,
    summary: Summary,
    latents: Mapping[str, Any],
    facts: Mapping[str, Any],
    definitions: Mapping[str, str],
    failed: Sequence[str],
) -> str:
    """A page with everything inside: figures, charts, and for each case its picture under a slider.

    Args:
        cases: with `name`, `size`, `spacing`, `metrics`, and `planes` as `data:` URIs.
        summary: as `summarise` gives it.
        latents: as `LatentHealth.statistics` gives them.
        facts: `weights`, `weights_sha256`, `bundle_version`, `computed_in`.
        definitions: of the metrics.
        failed: why volumes are missing.
    """
    headline = [metric for metric in _HEADLINE if metric.name in summary]
    return rendered(
        "report.html.jinja",
        cases=[_card(case) for case in sorted(cases, key=lambda case: case["metrics"]["psnr"])],
        headline=[(metric, summary[metric.name]) for metric in headline],
        latents=latents,
        strips=[_metric_strip(metric, cases) for metric in headline[:2]],
        tissues=_tissue_bars(summary),
        table=table_of(summary),
        facts=facts,
        definitions=definitions,
        failed=failed,
    )


def rendered(template: str, **content: Any) -> str:
    """A page out of a template beside this file; texts are escaped, and nothing may be missing."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**content)


def by_axis(numbers: Iterable[float]) -> str:
    """Three sizes or spacings as a page shows them."""
    return " × ".join(f"{n:.3g}" for n in numbers)


def _card(case: Mapping[str, Any]) -> dict[str, Any]:
    """One case as the page shows it, and by what it can be ordered there."""
    metrics = {metric: value for metric in METRICS if (value := case["metrics"].get(metric.name)) is not None}
    return {
        "name": case["name"],
        "size": by_axis(case["size"]),
        "spacing": by_axis(case["spacing"]),
        "planes": case["planes"],
        "chips": [(metric.label, metric.text(value)) for metric, value in metrics.items()],
        "order": {metric.name: metrics[metric] for metric in _ORDERS if metric in metrics},
    }


class Mark(NamedTuple):
    """Something at a place of a chart of 480 x 140."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Strip:
    """A dot a case along one axis, those of other cases in another colour, and published figures as lines."""

    title: str
    note: str
    dots: list[Mark]
    others: list[Mark]
    lines: list[Mark]
    ticks: list[Mark]


Values = Iterable[tuple[float, str]]  # with the names that belong to them


def strip(metric: Metric, note: str, dots: Values, others: Values = (), lines: Values = ()) -> Strip:
    """The values of a metric, of one or two groups of cases and of what is published, on one axis."""
    dots, others, lines = sorted(dots), sorted(others), list(lines)
    every = [value for value, _ in (*dots, *others, *lines)]
    least, most = min(every), max(every)
    margin = 0.06 * (most - least) or 1.0  # where all are the same, they stand in the middle
    low, high = least - margin, most + margin

    def mark(value: float, text: str, y: float = 0.0) -> Mark:
        return Mark(20 + 440 * (value - low) / (high - low), y, text)

    def scattered(values: list[tuple[float, str]]) -> list[Mark]:  # so that dots of like values do not hide each other
        return [mark(v, f"{name}: {metric.text(v)}", 74 + 26 * math.sin(2.4 * i)) for i, (v, name) in enumerate(values)]

    return Strip(
        title=f"{metric.label} by volume",
        note=note,
        dots=scattered(dots),
        others=scattered(others),
        lines=[mark(v, f"{name}: {metric.text(v)}") for v, name in lines],
        ticks=[mark(v, f"{v:{metric.style}}") for v in (least, (low + high) / 2, most)],
    )


def _metric_strip(metric: Metric, cases: Cases) -> Strip:
    published = [(figures[metric.name], name) for name, figures in PUBLISHED.items() if metric.name in figures]
    note = "lines: published for MAISI" if published else ""
    return strip(metric, note, [(case["metrics"][metric.name], case["name"]) for case in cases], lines=published)


def _tissue_bars(summary: Summary) -> list[dict[str, Any]]:
    """Mean absolute error by tissue, and its share of the largest."""
    means = {metric: summary[metric.name]["mean"] for metric in _BY_TISSUE if metric.name in summary}
    top = max(means.values(), default=0) or 1.0
    return [
        {"label": metric.label.removeprefix("MAE "), "text": metric.text(mean), "share": mean / top}
        for metric, mean in means.items()
    ]
