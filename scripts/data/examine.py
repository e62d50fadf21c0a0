"""What is found out about volumes before they are used: headers, and whole volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from scripts.common.errors import UserError
from scripts.data.datalist import entries_of, load, shared_volumes
from scripts.data.faults import attempt, first_of
from scripts.data.intensity import CT_WINDOW
from scripts.data.labels import BODY, Grid, check_grid, read_labels
from scripts.data.nifti import CT_LIMIT, Header, read_header
from scripts.data.store import read_volume

SPACINGS = (0.05, 20.0)  # mm; no scanner for patients makes voxels beyond these


def check_headers(entries: Sequence[Mapping[str, str]], num_workers: int = 16, progress: bool = True) -> list[Header]:
    """The headers of all entries, read in parallel.

    Raises:
        UserError: naming the first broken volume, and how many more there are.
    """

    def one(entry: Mapping[str, str]) -> tuple[Header | None, str]:
        return attempt(entry, lambda: read_header(entry["image"], entry.get("class", "ct")))

    with ThreadPoolExecutor(num_workers) as pool:
        bar = tqdm(entries, desc="headers", unit="volume", leave=False, disable=not progress)
        results = list(pool.map(one, bar))
    if broken := [fault for _, fault in results if fault]:
        raise UserError(first_of(broken))
    return [header for header, _ in results if header is not None]


@dataclass
class Findings:
    """What `check` found out about one volume; `problems` stop training, `warnings` do not.

    Attributes:
        labels: how many voxels each label of its label map has; None where it has no map.
    """

    text: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    labels: dict[int, int] | None = None


def examine(entry: Mapping[str, str]) -> Findings:
    """Read one volume whole and describe it: size, spacing (mm), orientation, dtype, percentiles, window share."""
    found, fault = attempt(entry, lambda: _described(entry))
    return Findings(entry["image"], problems=[fault]) if found is None else found


def _described(entry: Mapping[str, str]) -> Findings:
    path, modality = entry["image"], entry.get("class", "ct")
    header = read_header(path, modality)
    data, affine, _ = read_volume(entry)
    low, median, high = np.percentile(data, (1, 50, 99))
    outside = float(((data < CT_WINDOW[0]) | (data > CT_WINDOW[1])).mean())
    size = " x ".join(map(str, header.shape))
    spacing = " x ".join(f"{s:.3g}" for s in header.spacing)
    found = Findings(
        f"{path}  {modality}  {size}  {spacing} mm  {header.axcodes}  {header.dtype}  "
        f"p1 {low:.0f}  p50 {median:.0f}  p99 {high:.0f}  outside window {outside:.1%}"
    )
    found.warnings += [f"{path}: {note}" for note in header.notes]
    if modality == "ct":
        if data.min() > -200:
            found.warnings.append(f"{path}: minimum {data.min():.0f} HU, no air; is it rescaled to HU?")
        if outside > 0.5:
            found.warnings.append(f"{path}: {outside:.0%} of the voxels lie outside -1000..1000 HU")
        if data.max() == CT_LIMIT:
            found.warnings.append(f"{path}: a few voxels reach beyond {CT_LIMIT:.0f} HU, and are clipped to it")
    if min(header.shape) < 16:
        found.warnings.append(f"{path}: only {min(header.shape)} slices along one axis; patches will be padded")
    if not all(SPACINGS[0] <= s <= SPACINGS[1] for s in header.spacing):
        found.warnings.append(f"{path}: voxels of {spacing} mm; is its unit of length right?")
    if "label" in entry:
        found.labels = _counted(entry, (data.shape, affine))
        found.text += f"  {len(found.labels)} labels" + ("" if BODY in found.labels else f", no {BODY}")
    return found


def _counted(entry: Mapping[str, str], grid: Grid) -> dict[int, int]:
    """How many voxels each label but 0 has in the label map of a volume, whose grid it must have."""
    labels, affine = read_labels(entry["label"])
    check_grid(entry["label"], (labels.shape, affine), entry["image"], grid)
    counts = np.bincount(labels.ravel(), minlength=BODY + 1)
    return {int(label): int(counts[label]) for label in np.flatnonzero(counts) if label}


def _about_labels(known: Sequence[tuple[Mapping[str, str], Findings]]) -> tuple[list[str], list[str]]:
    """The lines of a table of all labels, and warnings; neither where no volume has a label map.

    Args:
        known: the entries of the volumes that can be read, and what was found out about them.
    """
    maps = [found.labels for _, found in known if found.labels is not None]
    if not maps:
        return [], []
    lines = [
        f"\n{len(maps)} of {len(known)} volumes have label maps",
        "  label  volumes  voxels, median of these volumes",
    ]
    for label in sorted(set().union(*maps)):
        voxels = [labels[label] for labels in maps if label in labels]
        lines.append(f"  {label:>5}  {len(voxels):>7}  {np.median(voxels):>14.0f}")
    warnings = []
    if bare := [entry["image"] for entry, found in known if found.labels is None]:
        warnings.append(
            f"{bare[0]}: has no label map, as {len(bare)} of {len(known)} volumes; no ControlNet can be trained on them"
        )
    of_ct = [(entry, found.labels) for entry, found in known if entry.get("class", "ct") == "ct"]
    if lacking := [entry["label"] for entry, labels in of_ct if labels is not None and BODY not in labels]:
        warnings.append(
            f"{lacking[0]}: has no label {BODY} (body), as {len(lacking)} of {len(maps)} label maps; encode.json gives "
            "it to the rest of the body, found by HU (body_label)"
        )
    return lines, warnings


def check(file: str, num_workers: int = 4, strict: bool = False, base_dir: str | None = None) -> None:
    """Open every volume of the datalist FILE, report, and exit with status 1 where training would fail.

    Args:
        file: the datalist.
        num_workers: volumes read at a time.
        strict: let warnings fail as well.
        base_dir: what relative paths are relative to (see `build --relative_to`).
    """
    datalist = load(file, base_dir)
    entries_of(datalist, "training", file)
    entries_of(datalist, "validation", file)
    problems: list[str] = []
    warnings = shared_volumes(datalist)
    known: list[tuple[Mapping[str, str], Findings]] = []
    for split, entries in datalist.items():
        if not entries:
            continue
        with ThreadPoolExecutor(num_workers) as pool:
            findings = list(tqdm(pool.map(examine, entries), total=len(entries), desc=split, unit="volume"))
        print(f"\n{split}: {len(entries)} volumes")
        for entry, found in zip(entries, findings, strict=True):
            print(f"  {found.text}")
            problems += found.problems
            warnings += found.warnings
            known += [] if found.problems else [(entry, found)]
    table, of_labels = _about_labels(known)
    for line in table:
        print(line)
    warnings += of_labels
    for warning in warnings:
        print(f"warning: {warning}")
    for problem in problems:
        print(f"problem: {problem}")
    failed = problems + (warnings if strict else [])
    print(f"{len(problems)} problems, {len(warnings)} warnings")
    if failed:
        raise UserError(f"{file}: {len(failed)} of its volumes would fail; first: {failed[0]}")
