"""What a comparison of generated with real volumes found, as tables, as a CSV file, and as a page to look at."""

from __future__ import annotations

import csv
import io
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.measure.features import PLANES
from scripts.use.obedience import ANOTHER, OWN, REAL, UNCONDITIONAL
from scripts.use.report import NONE, Cases, Metric, by_axis, markdown, rendered, strip
from scripts.use.sets import GENERATED, HELD_OUT, REFERENCE, TRAINING, YARDSTICK

Table = list[list[str]]

_DISTANCE = Metric("rmse_hu", "Distance", ".1f", "HU")  # to the nearest training volume
_HU = Metric("hu_wasserstein", "Wasserstein distance of HU", ".1f", "HU")
_FID = Metric("fid", "2.5D FID", ".4g")
_DICE = Metric("dice", "Dice", ".3f")
_SHOWN = 24  # pictures of the contact sheet, of each kind
_PAIRS = 3
_SPOKEN = {
    GENERATED: "generated",
    TRAINING: "real, training",
    REFERENCE: "real, reference",
    YARDSTICK: "real, training (yardstick)",
    HELD_OUT: "real, held out",
}
_MAPS = {OWN: "own map", ANOTHER: "another's map", UNCONDITIONAL: "unconditional"}
_AGAINST = {"real": "the real volume of the map", "labels": "the map's labels"}
# NV-Generate-CTMR, docs/evaluation.md.
PUBLISHED = {"xy": 2.685, "yz": 4.723, "zx": 7.963, "mean": 5.124}
COMPARABLE = (
    "MAISI's published 2.5D FID (rflow-ct: XY 2.685, YZ 4.723, ZX 7.963, mean 5.124; NV-Generate-CTMR, "
    "docs/evaluation.md) is of the features of RadImageNet's ResNet50, from volumes of 512 x 512 x 512 voxels of 1 mm, "
    "against autoPET 2023. An FID of SqueezeNet's features has another scale and cannot be compared with it: it "
    "compares only runs with the same reference volumes, as many generated volumes, and the same spacing, size and "
    "share of slices. With radimagenet_path the features are those of the published figure; the FID then compares with "
    "it only against autoPET 2023, with spacing [1, 1, 1] and size [512, 512, 512], and as far as the numbers of "
    "volumes and the share of slices agree, which that page does not state (its example: 100 volumes, 0.4). What "
    "always compares is generated with yardstick: real volumes in the same number, measured in the same way."
)


def generated_csv(cases: Cases) -> str:
    """One line a generated volume: what it is, its nearest training volume, and the distance to that in HU."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "path", "size", "spacing_mm", "mean_hu", "nearest_training_volume", "rmse_hu"])
    for case in cases:
        size, spacing = ("x".join(f"{n:.6g}" for n in case[key]) for key in ("size", "spacing"))
        found = [case["mean_hu"], case["nearest"]["path"], case["rmse_hu"]]
        writer.writerow([case["name"], case["path"], size, spacing, *found])
    return text.getvalue()


def fid_table(summary: Mapping[str, Any]) -> Table:
    """FID by plane of the generated volumes, of the yardstick, and as published for MAISI; headings first."""
    rows = [["features", "volumes", "number", "slices of a plane", *(plane.upper() for plane in PLANES), "mean"]]
    for distances in summary["fid"].values():
        for name in (GENERATED, YARDSTICK):
            if name in distances:
                numbers = [str(summary[key][name]) for key in ("volumes", "slices")]
                values = [_FID.text(distances[name][key]) for key in PUBLISHED]
                rows.append([distances["label"], _SPOKEN[name], *numbers, *values])
    published = [f"{value:g}" for value in PUBLISHED.values()]
    rows.append(["ResNet50 (RadImageNet)", "published: MAISI rflow-ct, autoPET 2023", NONE, NONE, *published])
    return rows


def hu_table(summary: Mapping[str, Any]) -> Table:
    """Wasserstein distances between the sets' histograms; headings first."""
    rows = [["volumes", "compared with", _HU.label]]
    for pair, value in summary["hu_wasserstein"].items():
        rows.append([*(_SPOKEN[name] for name in pair.split("_to_")), _HU.text(value)])
    return rows


def nearest_table(summary: Mapping[str, Any]) -> Table:
    """Median and least distance to the nearest training volume; headings first."""
    rows = [["volumes", "number", "median distance", "least distance"]]
    for name, found in summary["nearest"].items():
        rows.append([_SPOKEN[name], str(found["volumes"]), *(_DISTANCE.text(found[key]) for key in ("median", "min"))])
    return rows


def label_table(obeying: Mapping[str, Any]) -> Table:
    """HU of each label within own, another's and no map beside the real ones'; headings first."""
    there = [name for name in _MAPS if any(name in found["wasserstein"] for found in obeying["hu"].values())]
    head = ["label", "voxels", *(f"median, {name}" for name in ("real", _MAPS[OWN]))]
    head += [f"{what}, {_MAPS[name]}" for what in ("medians apart", "Wasserstein") for name in there]
    rows = [head]
    for label, found in obeying["hu"].items():
        medians = [f"{found['median'][name]} HU" for name in (REAL, OWN)]
        distances = [found[key].get(name) for key in ("median_difference", "wasserstein") for name in there]
        rows.append([str(label), str(found["voxels"]), *medians, *map(_HU.text, distances)])
    return rows


def dice_table(obeying: Mapping[str, Any]) -> Table:
    """Dice of the tissues within own, another's and no map; headings first."""
    every = [(tissue, *one) for tissue, found in obeying["dice"].items() for one in found.items()]
    there = [name for name in _MAPS if any(name in found for _, _, found in every)]
    rows = [["tissue", "compared with", "volumes", *(f"Dice, {_MAPS[name]}" for name in there)]]
    for tissue, target, found in every:
        rows.append([tissue, _AGAINST[target], str(found["volumes"]), *(_DICE.text(found.get(name)) for name in there)])
    return rows


def nearer(obeying: Mapping[str, Any]) -> str:
    """How many labels are nearer to the real ones within their own map, in a sentence; empty where nothing is known."""
    if (count := obeying.get("nearer")) is None:
        return ""
    return (
        f"HU are nearer to the real ones' within a volume's own map than within another's for {count['median']} of "
        f"{count['labels']} labels by the median, for {count['wasserstein']} by the Wasserstein distance."
    )


def _tables(obeying: Mapping[str, Any]) -> list[Table]:
    return [rows for rows in (label_table(obeying), dice_table(obeying)) if len(rows) > 1]


def obeying_text(obeying: Mapping[str, Any]) -> str:
    """What is known of volumes with label maps, as Markdown."""
    texts = [nearer(obeying), *(markdown(rows) for rows in _tables(obeying))]
    return "\n\n".join(text for text in texts if text)


def generated_page(cases: Mapping[str, Cases], summary: Mapping[str, Any], sheet: Path | None = None) -> str:
    """A page with everything inside: figures, tables, the closest pairs, and a contact sheet.

    Args:
        cases: of the sets `GENERATED`, `REFERENCE` and `HELD_OUT`, with `name`, `size`, `spacing`, and `planes`, a
            `data:` URI; those of the first and last with `nearest`, a case, and `rmse_hu`.
        summary: what `summary.json` holds.
        sheet: the PNG of volumes with label maps, where there is one.
    """
    dots, others = ([(case["rmse_hu"], case["name"]) for case in cases[name]] for name in (GENERATED, HELD_OUT))
    closest = sorted(cases[GENERATED], key=lambda case: case["rmse_hu"])[:_PAIRS]
    return rendered(
        "generated.html.jinja",
        summary=summary,
        geometry=f"{by_axis(summary['size'])} voxels of {by_axis(summary['spacing'])} mm",
        tiles=_tiles(summary),
        comparable=COMPARABLE,
        tables=[fid_table(summary), hu_table(summary), nearest_table(summary)],
        obeying=_obeying(summary["obeying"], sheet) if "obeying" in summary else None,
        chart=strip(_DISTANCE, "orange: real, held out" if others else "", dots, others),
        pairs=[
            (_DISTANCE.text(case["rmse_hu"]), _picture(case, GENERATED), _picture(case["nearest"], TRAINING))
            for case in closest
        ],
        sheets=[
            (_SPOKEN[name], len(cases[name]), [_picture(case, name) for case in _spread(cases[name])])
            for name in (GENERATED, REFERENCE)
        ],
    )


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What stands large at the top: label, value, and the same of real volumes."""

    def real(text: str | None) -> str:
        return "no held-out volumes to compare with" if text is None else f"real volumes: {text}"

    tiles = []
    for distances in summary["fid"].values():
        other = distances.get(YARDSTICK, {}).get("mean")
        label = f"{_FID.label}, {distances['label']}"
        tiles.append(
            (label, _FID.text(distances[GENERATED]["mean"]), real(None if other is None else _FID.text(other)))
        )
    hu = {pair: _HU.text(value) for pair, value in summary["hu_wasserstein"].items()}
    tiles.append((_HU.label, hu[f"{GENERATED}_to_{TRAINING}"], real(hu.get(f"{REFERENCE}_to_{TRAINING}"))))
    held_out = summary["nearest"].get(HELD_OUT)
    for key, what in (("median", "Nearest training volume, median"), ("min", "Nearest training volume, least")):
        value = _DISTANCE.text(summary["nearest"][GENERATED][key])
        tiles.append((what, value, real(held_out and _DISTANCE.text(held_out[key]))))
    for tissue, found in summary.get("obeying", {"dice": {}})["dice"].items():
        values = next(iter(found.values()))
        others = [f"{_MAPS[name]}: {_DICE.text(values[name])}" for name in (ANOTHER, UNCONDITIONAL) if name in values]
        tiles.append((f"{_DICE.label} of {tissue}, {_MAPS[OWN]}", _DICE.text(values[OWN]), ", ".join(others)))
    return tiles


def _obeying(obeying: Mapping[str, Any], sheet: Path | None) -> dict[str, Any]:
    """What the page shows of volumes with label maps."""
    picture = sheet and f"data:image/png;base64,{b64encode(sheet.read_bytes()).decode()}"
    return {"nearer": nearer(obeying), "tables": _tables(obeying), "sheet": picture}


def _spread(cases: Cases) -> Cases:
    """At most `_SHOWN` cases, evenly spaced."""
    count = min(len(cases), _SHOWN)
    return [cases[i * len(cases) // count] for i in range(count)]


def _picture(case: Mapping[str, Any], name: str) -> dict[str, str]:
    facts = f"{by_axis(case['size'])} voxels, {by_axis(case['spacing'])} mm"
    return {"name": case["name"], "kind": _SPOKEN[name], "facts": facts, "planes": case["planes"]}
