from __future__ import annotations

import csv
import io

import pytest

from scripts.use.report import html_report, metrics_csv, summarise

CASES = [
    {
        "name": f"<b>{n}</b>",
        "path": f"/{n}.nii.gz",
        "size": [4, 5, 6],
        "spacing": [1.0, 1.0, 2.5],
        "metrics": {
            "psnr": 20.0 + 4 * n,
            "ssim": 0.5,
            "mae_hu": 10.0,
            "rmse_hu": 20.0,
            "mae_hu_bone": 7.0 if n else None,
        },
        "planes": {"original": "data:a", "reconstruction": "data:b", "error": "data:c"},
    }
    for n in (0, 1)
]
FACTS = {"weights": "w.pt", "weights_sha256": "0" * 64, "bundle_version": "0", "computed_in": "bfloat16"}


def test_summaries_are_of_the_cases_that_have_a_metric() -> None:
    summary = summarise(CASES)
    assert summary["psnr"] == pytest.approx({"mean": 22.0, "std": 2.0, "count": 2})
    assert summary["mae_hu_bone"] == {"mean": 7.0, "std": 0.0, "count": 1} and "lpips" not in summary


def test_csv_has_a_line_a_case() -> None:
    rows = list(csv.DictReader(io.StringIO(metrics_csv(CASES))))
    assert [row["psnr"] for row in rows] == ["20.0", "24.0"] and rows[0]["mae_hu_bone"] == "" == rows[0]["lpips"]
    assert rows[1]["size"] == "4x5x6" and rows[1]["spacing_mm"] == "1x1x2.5"


def test_the_page_escapes_names_and_shows_what_failed() -> None:
    latents = {"posterior_noise_share": 0.25, "scale_factor": 1.5}
    page = html_report(CASES, summarise(CASES), latents, FACTS, {"psnr": "a < b"}, ["x.nii.gz: <broken>"])
    assert "<b>0</b>" not in page and "&lt;b&gt;0&lt;/b&gt;" in page and "a &lt; b" in page
    assert "x.nii.gz: &lt;broken&gt;" in page and "Could not be evaluated" in page
    assert page.index("&lt;b&gt;0&lt;/b&gt;<small>") < page.index("&lt;b&gt;1&lt;/b&gt;<small>")  # lowest PSNR first
    assert page.count("data:a") == 2 and "25.0% of the variance is posterior noise" in page
