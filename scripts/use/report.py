"""What an evaluation found, as a table, as a CSV file, and as a page to look at."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from scripts.measure.metrics import TISSUES

Cases = Sequence[Mapping[str, Any]]
Summary = Mapping[str, Mapping[str, float | int]]


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    name: str
    label: str
    style: str
    unit: str = ""

    def text(self, value: float | None) -> str:
        """The value with its unit, or a dash where there is none."""
        return "–" if value is None else f"{value:{self.style}}{self.unit and ' ' + self.unit}"


METRICS = (
    Metric("psnr", "PSNR", ".2f", "dB"),
    Metric("ssim", "SSIM", ".4f"),
    Metric("lpips", "LPIPS", ".4f"),
    Metric("mae_hu", "MAE", ".1f", "HU"),
    Metric("rmse_hu", "RMSE", ".1f", "HU"),
    *(Metric(f"mae_hu_{tissue}", f"MAE {tissue.replace('_', ' ')}", ".1f", "HU") for tissue in TISSUES),
)
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


def markdown_table(summary: Summary) -> str:
    """Mean and standard deviation beside MAISI's published figures."""
    shown = [metric for metric in METRICS if metric.name in summary or metric.name == "lpips"]
    lines = [("metric", "volumes", "mean", "std", *PUBLISHED), ("---",) * (4 + len(PUBLISHED))]
    for metric in shown:
        found: Mapping[str, Any] = summary.get(metric.name, {"count": 0, "mean": None, "std": None})
        published = [f"{figures[metric.name]:g}" if metric.name in figures else "–" for figures in PUBLISHED.values()]
        ours = (str(found["count"]), metric.text(found["mean"]), metric.text(found["std"]))
        lines.append((metric.label, *ours, *published))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
        facts: `weights`, `weights_sha256`, `bundle_version`.
        definitions: of the metrics.
        failed: why volumes are missing.
    """
    headline = [metric for metric in METRICS[:5] if metric.name in summary]
    tiles = [_tile(m.label, m.text(summary[m.name]["mean"]), _spread(m, summary)) for m in headline]
    noise = f"{latents['posterior_noise_share']:.1%} of the variance is posterior noise"
    tiles.append(_tile("latent scale factor", f"{latents['scale_factor']:.3f}", noise))
    tissues = [m for m in METRICS[5:] if m.name in summary]
    charts = [_strip(metric, cases) for metric in headline[:2]] + [_bars(tissues, summary)] * bool(tissues)
    broken = "".join(f"<li>{escape(error)}</li>" for error in failed)
    template = Template((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        count=len(cases),
        weights=escape(str(facts["weights"])),
        sha256=escape(str(facts["weights_sha256"])[:16]),
        version=escape(str(facts["bundle_version"])),
        tiles="".join(tiles),
        charts="".join(f"<figure>{chart}</figure>" for chart in charts),
        table=_table(summary),
        cases="".join(_card(case) for case in sorted(cases, key=lambda c: c["metrics"]["psnr"])),
        failed=f"<section class=failed><h2>Could not be evaluated</h2><ul>{broken}</ul></section>" if failed else "",
        definitions="".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in definitions.items()),
    )


def _spread(metric: Metric, summary: Summary) -> str:
    found = summary[metric.name]
    return f"± {found['std']:{metric.style}} over {found['count']} volume{'s' * (found['count'] != 1)}"


def _tile(label: str, value: str, note: str) -> str:
    return f"<div class=tile><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>"


def _table(summary: Summary) -> str:
    rows = [line.strip("| ").split(" | ") for line in markdown_table(summary).splitlines()]
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[2:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _card(case: Mapping[str, Any]) -> str:
    name, planes, metrics = escape(case["name"]), case["planes"], case["metrics"]
    size, spacing = (" × ".join(f"{n:.3g}" for n in case[key]) for key in ("size", "spacing"))
    chips = "".join(
        f"<li><span>{escape(m.label)}</span> {escape(m.text(metrics[m.name]))}</li>"
        for m in METRICS
        if metrics.get(m.name) is not None
    )
    order = " ".join(f'data-{m.name}="{metrics[m.name]}"' for m in METRICS[:4] if metrics.get(m.name) is not None)
    return (
        f'<article class=case data-name="{name}" {order}><h3>{name}<small>{size} voxels, {spacing} mm</small></h3>'
        f'<div class=compare><img src="{planes["original"]}" alt="original of {name}">'
        f'<img class=over src="{planes["reconstruction"]}" alt="reconstruction of {name}">'
        f'<i class=tag>original</i><i class="tag right">reconstruction</i>'
        f'<input type=range min=0 max=100 value=50 aria-label="original or reconstruction of {name}"></div>'
        f'<img class=error src="{planes["error"]}" alt="error of {name}"><ul class=chips>{chips}</ul></article>'
    )


def _strip(metric: Metric, cases: Cases) -> str:
    """A dot a case along one axis, and the published figures as lines."""
    values = sorted((case["metrics"][metric.name], case["name"]) for case in cases)
    marks = [(figures[metric.name], name) for name, figures in PUBLISHED.items() if metric.name in figures]
    everything = [v for v, _ in values + marks]
    low, high = min(everything), max(everything)
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def x(value: float) -> float:
        return 20 + 440 * (value - low) / (high - low)

    dots = []
    for index, (value, name) in enumerate(values):
        y = 74 + 26 * math.sin(2.4 * index)  # so that dots of like values do not hide each other
        dots.append(
            f'<circle cx="{x(value):.1f}" cy="{y:.1f}" r=5><title>{escape(name)}: {metric.text(value)}</title></circle>'
        )
    lines = [
        f'<g class=mark><line x1="{x(v):.1f}" x2="{x(v):.1f}" y1=40 y2=108 />'
        f"<title>{escape(name)}: {metric.text(v)}</title></g>"
        for v, name in marks
    ]
    ticks = [
        f'<text x="{x(t):.1f}" y=132 text-anchor=middle>{t:{metric.style}}</text>'
        for t in (low + margin, (low + high) / 2, high - margin)
    ]
    note = "lines: published for MAISI" if marks else ""
    return (
        f'<svg viewBox="0 0 480 140" role=img><text class=title x=20 y=22>{metric.label} by volume</text>'
        f"<text x=460 y=22 text-anchor=end>{note}</text><line class=axis x1=20 x2=460 y1=114 y2=114 />"
        f"{''.join(lines)}{''.join(dots)}{''.join(ticks)}</svg>"
    )


def _bars(metrics: Sequence[Metric], summary: Summary) -> str:
    """Mean absolute error by tissue."""
    top = max(summary[m.name]["mean"] for m in metrics) or 1.0
    rows = []
    for index, metric in enumerate(metrics):
        mean, y = summary[metric.name]["mean"], 36 + 25 * index
        width = 270 * mean / top
        rows.append(
            f'<text x=20 y="{y + 14}">{escape(metric.label.removeprefix("MAE "))}</text>'
            f'<rect x=110 y="{y}" height=18 width="{width:.1f}" rx=3 />'
            f'<text x="{118 + width:.1f}" y="{y + 14}">{metric.text(mean)}</text>'
        )
    title = "<text class=title x=20 y=22>Mean absolute error by tissue</text>"
    return f'<svg viewBox="0 0 480 140" role=img>{title}{"".join(rows)}</svg>'
