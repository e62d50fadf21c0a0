"""NIfTI files as they come: what can be told from the header, and a whole volume in canonical orientation."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from scripts.common.errors import UserError
from scripts.common.files import whole
from scripts.data.nifti_file import check_complete, opened, voxels

logger = logging.getLogger(__name__)

CT_LIMIT = 30000.0  # HU; no tissue, and hardly a metal; what wraps round in uint16 comes out beyond it
WRAPPED = 0.005  # the share of voxels beyond it that metal does not reach, and wrapped air does
UNITS = {"meter": 1000.0, "micron": 0.001}  # mm; all else is mm


@dataclass(frozen=True)
class Header:
    """What the header of a NIfTI file says: `shape` (voxels) and `spacing` (mm) in the file's own axis order.

    `notes` are sentences about what had to be interpreted.
    """

    path: Path
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axcodes: str
    dtype: str
    notes: tuple[str, ...] = ()

    def in_ras(self) -> tuple[list[int], list[float]]:
        """Shape and spacing along the axes of the closest canonical orientation."""
        axes = [next(i for i, code in enumerate(self.axcodes) if code in ends) for ends in ("RL", "AP", "SI")]
        return [self.shape[axis] for axis in axes], [self.spacing[axis] for axis in axes]


@dataclass(frozen=True)
class _Geometry:
    """Three spatial sizes, the 4 x 4 affine (mm) of the file's own axes, and what had to be interpreted."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    notes: tuple[str, ...]


def stem(name: str) -> str:
    """A file name or path without the ending of a NIfTI file."""
    for ending in (".nii.gz", ".nii"):
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def read_header(path: str | Path, modality: str = "ct") -> Header:
    """Check what can be checked without reading voxels: existence, format, 3D, type, affine, completeness.

    A truncated `.nii.gz` is found by its last four bytes, which hold the uncompressed size (RFC 1952); only
    where they disagree with the header is the file decompressed to decide.

    Raises:
        UserError: naming the file, what is wrong and what to do.
    """
    path = Path(path)
    with opened(path) as (image, stream):
        geometry = _geometry(image, path, modality)
        check_complete(path, image, stream)
        spacing = tuple(float(s) for s in nib.affines.voxel_sizes(geometry.affine))
        axcodes = "".join(nib.aff2axcodes(geometry.affine))
        return Header(path, geometry.shape, spacing, axcodes, str(image.get_data_dtype()), geometry.notes)


def _geometry(image: nib.Nifti1Image, path: Path, modality: str) -> _Geometry:
    shape = tuple(int(n) for n in image.shape)
    while len(shape) > 3 and shape[-1] == 1:  # axes of one entry are none
        shape = shape[:-1]
    if len(shape) == 4 and modality == "mri":
        shape = shape[:3]
    if len(shape) != 3:
        raise UserError(f"{path}: has shape {image.shape}, not 3D; split it into 3D volumes or remove it")
    if min(shape) < 2:
        raise UserError(f"{path}: has shape {shape}, a single slice, not a volume; remove it")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        what = "colours (RGB)" if dtype.fields else f"the type {dtype}"
        raise UserError(f"{path}: has voxels of {what}, which are no intensities; convert it to numbers or remove it")
    affine, note = _affine(image, path)
    unit = image.header["xyzt_units"].item() % 8
    factor = {1: UNITS["meter"], 3: UNITS["micron"]}.get(unit, 1.0)
    notes = [note] if note else []
    if factor != 1:
        affine = np.diag([factor] * 3 + [1.0]) @ affine
        notes.append(f"its lengths are in {'metres' if factor > 1 else 'micrometres'}, and are taken as mm")
    return _Geometry(shape, affine, tuple(notes))


def _affine(image: nib.Nifti1Image, path: Path) -> tuple[np.ndarray, str]:
    """The affine that the file means, in its own unit, and what is to be said of it."""
    header = image.header
    if _regular(image.affine):
        if not (header["qform_code"] or header["sform_code"]):
            return image.affine, "it has neither qform nor sform, so its orientation is a guess (LAS)"
        return image.affine, ""
    if header["sform_code"] and header["qform_code"] and _regular(qform := header.get_qform()):
        return qform, "its sform is singular, so its qform is taken"
    matrix = image.affine[:3, :3].tolist()
    raise UserError(f"{path}: its affine is singular ({matrix}); repair the header's qform/sform")


def _regular(affine: np.ndarray) -> bool:
    """Whether the axes are three directions, however long."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() <= 0:
        return False
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) > 1e-3) and None not in nib.aff2axcodes(affine)


def read_nifti(path: str | Path, modality: str = "ct", select_channel: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Read a whole volume in the closest canonical orientation.

    Args:
        path: a 3D NIfTI file; 4D is allowed for `modality` "mri", of which `select_channel` is taken.
        modality: "ct" or "mri".
        select_channel: index into the fourth axis.

    Returns:
        (X, Y, Z) array, int16 where every value is an integer in range, else float32 (HU for CT), and the
        4 x 4 affine (mm) of that array in RAS+.

    Raises:
        UserError: naming the file, what is wrong and what to do.
    """
    path = Path(path)
    with opened(path) as (image, stream):
        geometry = _geometry(image, path, modality)
        check_complete(path, image, stream)
        data = voxels(path, image, stream)
    for note in geometry.notes:
        logger.info("%s: %s", path, note)
    data = data.reshape(*geometry.shape, -1)
    channel = select_channel if modality == "mri" else 0
    if channel >= data.shape[3]:
        raise UserError(f"{path}: has {data.shape[3]} channels, but select_channel is {channel}; lower it")
    data = _narrow(data[..., channel], path)
    # (X, Y, Z) in the file's axes becomes RAS by flips and transposes alone, so no voxel changes its value.
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, geometry.affine))
    return np.asanyarray(canonical.dataobj), canonical.affine


def plausible(data: np.ndarray, path: str | Path, modality: str) -> np.ndarray:
    """A volume's intensities, where they can be such; a few beyond `CT_LIMIT` are clipped to it, with a warning.

    Raises:
        UserError: for a constant volume, and for CT with impossible Hounsfield units.
    """
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise UserError(f"{path}: is constant (every voxel {low:g}); remove it")
    if modality != "ct" or high <= CT_LIMIT:
        return data
    beyond = int((data > CT_LIMIT).sum())
    if beyond > WRAPPED * data.size:
        raise UserError(
            f"{path}: reaches {high:.0f} HU; uint16 overflow or wrong scaling; convert it again from its source"
        )
    logger.warning("%s: reaches %.0f HU; %d voxels are clipped to %.0f", path, high, beyond, CT_LIMIT)
    return _narrow(np.minimum(data, data.dtype.type(CT_LIMIT)), Path(path))


def _narrow(data: np.ndarray, path: Path) -> np.ndarray:
    if data.dtype == np.int16:
        return data
    low, high = data.min(), data.max()
    with np.errstate(over="ignore"):  # a wild scl_slope exceeds float32
        finite = np.isfinite(np.asarray([low, high]).astype(np.float32)).all()
    if not finite:
        raise UserError(f"{path}: has voxels that are not finite (NaN or infinite); repair or remove the file")
    limits = np.iinfo(np.int16)
    if limits.min <= low and high <= limits.max:
        integers = data.astype(np.int16)
        if data.dtype.kind in "iub" or np.array_equal(integers, data):
            return integers
    return data.astype(np.float32)


def write_like(source: str | Path, data: np.ndarray, target: str | Path, akin: bool = True) -> None:
    """Write a volume that came from `read_nifti` in the geometry of its file: shape, axes, affine and header.

    Args:
        source: the file that was read; of its header all but the data type and the scaling is kept.
        data: (X, Y, Z) in the closest canonical orientation; its type is the file's.
        target: a path that ends in `.nii.gz`.
        akin: whether its voxels mean what the file's do; else what the header says of these is left out.
    """
    with opened(Path(source)) as (image, _):
        affine, _ = _affine(image, Path(source))
    to_source = ornt_transform(axcodes2ornt("RAS"), io_orientation(affine))
    stored = apply_orientation(data, to_source)
    if stored.size == np.prod(image.shape):  # with its axes of one entry, where it has some
        stored = stored.reshape(image.shape)
    header = image.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    if not akin:
        header["cal_min"] = header["cal_max"] = header["intent_code"] = 0
        header["intent_name"] = header["descrip"] = header["aux_file"] = b""
        header.extensions.clear()
    save_nifti(type(image)(stored, image.affine, header), target)


def save_nifti(image: nib.Nifti1Image, target: str | Path) -> None:
    """Write a NIfTI file, whole.

    Raises:
        UserError: where it cannot be written.
    """
    with whole(target) as part:
        nib.save(image, part)
