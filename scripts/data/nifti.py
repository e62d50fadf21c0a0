"""NIfTI files as they come: what can be told from the header, and a whole volume in canonical orientation."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from scripts.common.errors import UserError, reason
from scripts.common.files import whole

CT_LIMIT = 30000.0  # no tissue or metal; what wraps round in uint16 comes out beyond it


@dataclass(frozen=True)
class Header:
    """What the header of a NIfTI file says: `shape` (voxels) and `spacing` (mm) in the file's own axis order."""

    path: Path
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    axcodes: str
    dtype: str


def stem(name: str) -> str:
    """A file name or path without the ending of a NIfTI file."""
    return name.removesuffix(".gz").removesuffix(".nii")


def _open_nifti(path: Path) -> nib.Nifti1Image:
    remedy = "remove it or replace the file"
    if not path.exists():
        raise UserError(f"{path}: no such file; correct the path")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, not a NIfTI file; {remedy}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); {remedy}")
    try:
        image = nib.load(path)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read (permission denied); chmod it or run as its owner") from error
    except Exception as error:
        raise UserError(f"{path}: is not a readable NIfTI file ({reason(error)}); {remedy}") from error
    if not isinstance(image, nib.Nifti1Image):
        raise UserError(f"{path}: is {type(image).__name__}, not NIfTI; convert it to .nii.gz")
    return image


def _spatial_shape(image: nib.Nifti1Image, path: Path, modality: str) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in image.shape)
    if len(shape) == 4 and (shape[3] == 1 or modality == "mri"):
        shape = shape[:3]
    if len(shape) != 3:
        raise UserError(f"{path}: has shape {shape}, not 3D; split it into 3D volumes or remove it")
    if min(shape) < 2:
        raise UserError(f"{path}: has shape {shape}, a single slice, not a volume; remove it")
    return shape


def read_header(path: str | Path, modality: str = "ct") -> Header:
    """Check what can be checked without decompressing: existence, format, 3D, affine, completeness.

    A truncated `.nii.gz` is found by its last four bytes, which hold the uncompressed size (RFC 1952); only
    where they disagree with the header is the file decompressed to decide.

    Raises:
        UserError: naming the file, what is wrong and what to do.
    """
    path = Path(path)
    image, shape, affine = _checked(path, modality)
    spacing = tuple(float(s) for s in nib.affines.voxel_sizes(affine))
    axcodes = "".join(nib.aff2axcodes(affine))
    return Header(path, shape, spacing, axcodes, str(image.get_data_dtype()))


def _checked(path: Path, modality: str) -> tuple[nib.Nifti1Image, tuple[int, int, int], np.ndarray]:
    """The image, its three spatial sizes and its affine, after all that can be checked without reading voxels."""
    image = _open_nifti(path)
    shape, affine = _spatial_shape(image, path, modality), _affine(image, path)
    _check_complete(path, image)
    return image, shape, affine


def _affine(image: nib.Nifti1Image, path: Path) -> np.ndarray:
    affine = image.affine
    finite = np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9
    if not finite or None in nib.aff2axcodes(affine):
        raise UserError(f"{path}: its affine is singular ({affine[:3, :3].tolist()}); repair the header's qform/sform")
    return affine


def _check_complete(path: Path, image: nib.Nifti1Image) -> None:
    offset = int(getattr(image.dataobj, "offset", 0))
    expected = offset + int(np.prod(image.shape, dtype=np.int64)) * image.get_data_dtype().itemsize
    if path.suffix != ".gz":
        if path.suffix == ".nii" and path.stat().st_size < expected:
            raise _truncated(path, path.stat().st_size, expected)
        return
    # gzip ends in the uncompressed size, modulo 2^32 (RFC 1952): right for a whole file of one member. A file that was
    # cut ends in other bytes, and one of several members in the size of its last, so both are read to decide.
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        stored = int.from_bytes(file.read(4), "little")
    if stored == expected % 2**32:
        return
    size = 0
    try:
        with gzip.open(path) as stream:
            while block := stream.read(1 << 24):
                size += len(block)
    except (EOFError, OSError, zlib.error) as error:
        raise _truncated(path, size, expected) from error
    if size < expected:
        raise _truncated(path, size, expected)


def _truncated(path: Path, size: int, expected: int) -> UserError:
    return UserError(f"{path}: is truncated or damaged ({size} of {expected} bytes readable); copy it again")


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
    image, _, affine = _checked(path, modality)
    try:
        data = np.asanyarray(image.dataobj)
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{path}: is truncated or damaged ({reason(error)}); copy it again") from error
    if data.ndim == 4:
        channel = select_channel if modality == "mri" else 0
        if channel >= data.shape[3]:
            raise UserError(f"{path}: has {data.shape[3]} channels, but select_channel is {channel}; lower it")
        data = data[..., channel]
    data = _narrow(data, path)
    # (X, Y, Z) in the file's axes becomes RAS by flips and transposes alone, so no voxel changes its value.
    canonical = nib.as_closest_canonical(nib.Nifti1Image(data, affine))
    return np.asanyarray(canonical.dataobj), canonical.affine


def check_values(data: np.ndarray, path: str | Path, modality: str) -> None:
    """Whether the intensities can be those of a volume.

    Raises:
        UserError: for a constant volume, and for CT with impossible Hounsfield units.
    """
    low, high = float(data.min()), float(data.max())
    if low == high:
        raise UserError(f"{path}: is constant (every voxel {low:g}); remove it")
    if modality == "ct" and high > CT_LIMIT:
        raise UserError(
            f"{path}: reaches {high:.0f} HU; uint16 overflow or wrong scaling; convert it again from its source"
        )


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


def write_like(source: str | Path, data: np.ndarray, target: str | Path) -> None:
    """Write a volume that came from `read_nifti` in the geometry of its file: shape, axes, affine and header.

    Args:
        source: the file that was read; of its header all but the data type and the scaling is kept.
        data: (X, Y, Z) in the closest canonical orientation; its type is the file's.
        target: a path that ends in `.nii.gz`.
    """
    image = _open_nifti(Path(source))
    to_source = ornt_transform(axcodes2ornt("RAS"), io_orientation(image.affine))
    stored = apply_orientation(data, to_source)
    if image.ndim == 4 and image.shape[3] == 1:
        stored = stored[..., None]
    header = image.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_slope_inter(1, 0)
    save_nifti(type(image)(stored, image.affine, header), target)


def save_nifti(image: nib.Nifti1Image, target: str | Path) -> None:
    """Write a NIfTI file, whole.

    Raises:
        UserError: where it cannot be written.
    """
    with whole(target) as part:
        nib.save(image, part)
