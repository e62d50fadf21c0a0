"""Pictures of volumes: central planes, and an original beside its reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.errors import UserError


def _planes(volume: np.ndarray) -> list[np.ndarray]:
    """The sagittal, coronal and axial plane through the centre of a RAS volume, head up, front up."""
    middle = [n // 2 for n in volume.shape]
    return [np.take(volume, middle[axis], axis)[:, ::-1].T for axis in range(3)]


def three_planes(volume: np.ndarray) -> np.ndarray:
    """The three central planes of (X, Y, Z) in [0, 1] side by side, padded to one height: (H, W) in [0, 1]."""
    planes = _planes(volume)
    height = max(p.shape[0] for p in planes)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, 0))) for p in planes]
    return np.clip(np.concatenate(padded, axis=1), 0, 1)


def save_comparison(
    original: np.ndarray, reconstruction: np.ndarray, spacing: Sequence[float], path: Path, title: str
) -> None:
    """A PNG of original, reconstruction and error (HU), sagittal, coronal and axial.

    Args:
        original: (X, Y, Z) in RAS, in [0, 1] for -1000..1000 HU.
        reconstruction: in the same shape.
        spacing: mm along the axes.
        path: of the PNG.
        title: above the picture.
    """
    volumes = (original, reconstruction, (reconstruction - original) * 2000)
    scales: Sequence[dict[str, Any]] = (
        {"cmap": "gray", "vmin": 0.0, "vmax": 0.7},
        {"cmap": "gray", "vmin": 0.0, "vmax": 0.7},
        {"cmap": "RdBu_r", "vmin": -300, "vmax": 300},
    )
    aspects = (spacing[2] / spacing[1], spacing[2] / spacing[0], spacing[1] / spacing[0])
    figure = Figure(figsize=(9, 9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 3)
    names = ("original", "reconstruction", "error (HU)")
    for column, (volume, scale, name) in enumerate(zip(volumes, scales, names, strict=True)):
        for row, (plane, label) in enumerate(zip(_planes(volume), ("sagittal", "coronal", "axial"), strict=True)):
            picture = axes[row, column].imshow(plane, aspect=aspects[row], **scale)
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                axes[row, column].set_ylabel(label)
        axes[0, column].set_title(name)
    figure.colorbar(picture, ax=axes[:, 2], shrink=0.6)
    figure.suptitle(f"{title}, window -1000..400 HU")
    picture_bytes = BytesIO()
    figure.savefig(picture_bytes, dpi=100, format="png")
    part = path.with_name(f".part-{path.name}")
    try:
        part.write_bytes(picture_bytes.getvalue())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror}); free space or change output_dir") from error
