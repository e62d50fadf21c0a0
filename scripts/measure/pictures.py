"""Pictures of volumes: central planes, and an original beside its reconstruction."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image

from scripts.common.files import whole


def _planes(volume: np.ndarray) -> list[np.ndarray]:
    """The sagittal, coronal and axial plane through the centre of a RAS volume, head up, front up."""
    middle = [n // 2 for n in volume.shape]
    return [np.take(volume, middle[axis], axis)[:, ::-1].T for axis in range(3)]


def _compared(original: np.ndarray, reconstruction: np.ndarray, intensity_range: float) -> dict[str, list[np.ndarray]]:
    """The three central planes of `original`, `reconstruction` and their `error` (in HU)."""
    theirs, ours = _planes(original), _planes(reconstruction)
    errors = [(a - b) * intensity_range for a, b in zip(ours, theirs, strict=True)]
    return {"original": theirs, "reconstruction": ours, "error": errors}


def three_planes(
    volume: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    resampling: Image.Resampling = Image.Resampling.BILINEAR,
) -> np.ndarray:
    """The three central planes of (X, Y, Z) in [0, 1] side by side, padded to one height: (H, W) in [0, 1].

    Args:
        volume: in RAS.
        spacing: along the axes; planes are resized to square pixels as small as the least of the three.
        resampling: by which they are.
    """
    sizes = [max(round(n * length / min(spacing)), 1) for n, length in zip(volume.shape, spacing, strict=True)]
    across, height = (sizes[1], sizes[0], sizes[0]), (sizes[2], sizes[2], sizes[1])
    planes = [_resized(*plane, resampling) for plane in zip(_planes(volume), height, across, strict=True)]
    padded = [np.pad(plane, ((0, max(height) - len(plane)), (0, 0))) for plane in planes]
    return np.clip(np.concatenate(padded, axis=1), 0, 1)


def label_planes(labels: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """The three central planes of a label map (X, Y, Z), 0 to 255, in colours: (H, W, 3) in [0, 1], as `three_planes`.

    0 is black, 200, the rest of the body, dark grey; labels that follow each other have colours far apart.
    """
    indices = three_planes(np.asarray(labels, np.float32) / 255, spacing, Image.Resampling.NEAREST)
    hues = np.arange(256) * 0.618034 % 1  # the golden ratio
    colours = hsv_to_rgb(np.stack([hues, np.full(256, 0.65), np.full(256, 0.95)], axis=-1))
    colours[0], colours[200] = 0, 0.25
    return colours[np.rint(indices * 255).astype(int)]


def in_grey(planes: np.ndarray) -> np.ndarray:
    """Planes (H, W) in [0, 1] as a picture (H, W, 3) in [0, 1], 0 to 0.7 being black to white."""
    return np.repeat(np.clip(planes / 0.7, 0, 1)[..., None], 3, axis=-1)


def _resized(plane: np.ndarray, height: int, width: int, resampling: Image.Resampling) -> np.ndarray:
    if plane.shape == (height, width):
        return plane
    picture = Image.fromarray(np.ascontiguousarray(plane, np.float32))
    return np.asarray(picture.resize((width, height), resampling))


def save_sheet(pictures: Mapping[str, np.ndarray], path: Path, title: str, intensity_range: float = 2000.0) -> None:
    """A PNG of many volumes' planes, each with its name, at most four beside each other.

    Args:
        pictures: (H, W) in [0, 1], as of `three_planes`, by the names to print; 0 to 0.7 is black to white. Or in
            colours, (H, W, 3).
        path: of the PNG.
        title: above them.
        intensity_range: what 1.0 is in HU.
    """
    columns = min(math.ceil(math.sqrt(len(pictures))), 4)
    rows = math.ceil(len(pictures) / columns)
    height, width = next(iter(pictures.values())).shape[:2]
    figure = Figure(figsize=(4.5 * columns, (4.5 * height / width + 0.3) * rows + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis("off")
    for axis, (name, picture) in zip(axes, pictures.items(), strict=False):
        axis.imshow(picture, cmap="gray", vmin=0.0, vmax=0.7)
        axis.set_title(_printable(name), fontsize=8, parse_math=False)
    text = f"{title}\nsagittal, coronal, axial; {_window(intensity_range)}"
    figure.suptitle(text, fontsize=10, parse_math=False)
    with whole(path) as part:
        figure.savefig(part, dpi=100, format="png")


def obeying_planes(
    labels: np.ndarray, volume: np.ndarray, real: np.ndarray | None, spacing: Sequence[float]
) -> dict[str, np.ndarray]:
    """A label map, what was made for it, and what lies between that and the real volume, for `save_rows`.

    Args:
        labels: (X, Y, Z) uint8 in RAS.
        volume: in the same shape, in [0, 1].
        real: likewise, or None.
        spacing: mm along the axes.

    Returns:
        `label map`; `generated`, -1000 to 400 HU black to white; and `|difference to the real one|` inside the map, 0
        to 300 HU black to yellow; (H, W, 3) uint8.
    """
    planes = {"label map": label_planes(labels, spacing), "generated": in_grey(three_planes(volume, spacing))}
    if real is not None:
        difference = three_planes(np.where(labels > 0, abs(volume - real), 0), spacing) / 0.15
        planes["|difference to the real one|"] = colormaps["inferno"](difference)[..., :3]
    return {name: (255 * picture).astype(np.uint8) for name, picture in planes.items()}


def save_rows(rows: Mapping[str, Mapping[str, np.ndarray]], path: Path, title: str) -> None:
    """A PNG with a row of pictures for each volume.

    Args:
        rows: by the volumes' names, pictures (H, W, 3), uint8 or in [0, 1], by the names of their columns.
        path: of the PNG.
        title: above them.
    """
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    height, width = next(iter(next(iter(rows.values())).values())).shape[:2]
    size = (4.5 * len(columns), (4.5 * height / width + 0.3) * len(rows) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        line[0].set_title(_printable(name), fontsize=8, loc="left", parse_math=False)
        for column, picture in row.items():
            line[columns.index(column)].imshow(picture)
    for axis, column in zip(axes[0], columns, strict=True):
        axis.set_title(column, fontsize=8)
    figure.suptitle(f"{title}\nsagittal, coronal, axial", fontsize=10, parse_math=False)
    with whole(path) as part:
        figure.savefig(part, dpi=100, format="png")


def _window(intensity_range: float) -> str:
    """What is black and what is white."""
    return "window -1000..400 HU" if intensity_range == 2000 else "window 0..70 % of the range"


def _printable(text: str) -> str:
    """Text in one line, in which what cannot be printed is escaped, as \\udcff and \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def comparison_planes(
    original: np.ndarray, reconstruction: np.ndarray, spacing: Sequence[float], intensity_range: float, height: int
) -> dict[str, str]:
    """Axial, coronal and sagittal plane side by side at one scale, as `data:` URIs of JPEG pictures.

    Args:
        original: (X, Y, Z) in RAS, normalised.
        reconstruction: in the same shape.
        spacing: mm along the axes.
        intensity_range: what 1.0 is in HU.
        height: of the pictures in pixels.

    Returns:
        `original` and `reconstruction` (0 to 0.7, for CT -1000 to 400 HU, black to white), `error` (blue below, red
        above, full at 15 % of the range, 300 HU for CT).
    """
    extent = np.array(original.shape) * spacing  # mm
    scale = height / max(extent[1], extent[2])  # what stands upright is y in the axial plane, z in the others
    width, depth, top = (max(int(round(length * scale)), 1) for length in extent)
    sizes = [(width, depth), (width, top), (depth, top)]

    def gray(plane: np.ndarray) -> np.ndarray:
        return (np.clip(plane / 0.7, 0, 1) * 255).astype(np.uint8)

    def diverging(plane: np.ndarray) -> np.ndarray:
        return colormaps["berlin"](0.5 + plane / (0.3 * intensity_range), bytes=True)[..., :3]

    colours = {"original": gray, "reconstruction": gray, "error": diverging}
    compared = _compared(original, reconstruction, intensity_range)
    return {
        name: _strip([Image.fromarray(colours[name](plane)) for plane in reversed(planes)], sizes, height)
        for name, planes in compared.items()
    }


def _strip(planes: Sequence[Image.Image], sizes: Sequence[tuple[int, int]], height: int) -> str:
    """Pictures side by side, each resized to its (width, height), as a `data:` URI."""
    gap = max(height // 48, 2)
    canvas = Image.new(planes[0].mode, (sum(width for width, _ in sizes) + 2 * gap, height))
    left = 0
    for plane, size in zip(planes, sizes, strict=True):
        canvas.paste(plane.resize(size, Image.Resampling.LANCZOS), (left, (height - size[1]) // 2))
        left += size[0] + gap
    encoded = BytesIO()
    canvas.save(encoded, "JPEG", quality=88)
    return f"data:image/jpeg;base64,{b64encode(encoded.getvalue()).decode()}"


def save_comparison(
    original: np.ndarray,
    reconstruction: np.ndarray,
    spacing: Sequence[float],
    path: Path,
    title: str,
    intensity_range: float = 2000.0,
) -> None:
    """A PNG of original, reconstruction and error (HU), sagittal, coronal and axial.

    Args:
        original: (X, Y, Z) in RAS, in [0, 1] for -1000..1000 HU.
        reconstruction: in the same shape.
        spacing: mm along the axes.
        path: of the PNG.
        title: above the picture, in one line; what cannot be printed in it is escaped.
        intensity_range: what 1.0 is in HU.
    """
    gray = {"cmap": "gray", "vmin": 0.0, "vmax": 0.7}
    diverging = {"cmap": "RdBu_r", "vmin": -0.15 * intensity_range, "vmax": 0.15 * intensity_range}
    scales: dict[str, dict[str, Any]] = {"original": gray, "reconstruction": gray, "error": diverging}
    aspects = (spacing[2] / spacing[1], spacing[2] / spacing[0], spacing[1] / spacing[0])
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3)
    for column, (name, planes) in enumerate(_compared(original, reconstruction, intensity_range).items()):
        for row, (plane, label) in enumerate(zip(planes, ("sagittal", "coronal", "axial"), strict=True)):
            picture = axes[row, column].imshow(plane, aspect=aspects[row], **scales[name])
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                axes[row, column].set_ylabel(label)
        axes[0, column].set_title(f"{name} (HU)" if name == "error" else name)
    figure.colorbar(picture, ax=axes[:, 2], shrink=0.6)
    figure.suptitle(f"{_printable(title)}, {_window(intensity_range)}", parse_math=False)
    with whole(path) as part:
        figure.savefig(part, dpi=100, format="png")
