"""The bytes of a NIfTI file: unpacked, recognised by what they are, and whole."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from scripts.common.errors import UserError, reason

REPLACE = "remove it or replace the file"
COPY = "copy it again"
_BLOCK = 1 << 24


class _Lenient:
    """Headers of tools that round: quaternions a little longer than 1, and no offset of the voxels."""

    def get_qform_quaternion(self) -> np.ndarray:
        header: Any = self
        vector = np.array([header["quatern_b"], header["quatern_c"], header["quatern_d"]], np.float64)
        # Half a turn, where w is 0: what is missing to 1 is rounding, which `quat2mat` divides out.
        if 1 < vector @ vector < 1.001:
            return np.concatenate([[0], vector])
        return super().get_qform_quaternion()  # type: ignore[misc]

    def get_data_offset(self) -> int:
        header: Any = super()
        return header.get_data_offset() or header.single_vox_offset


class _Header1(_Lenient, nib.Nifti1Header):
    pass


class _Header2(_Lenient, nib.Nifti2Header):
    pass


class _Image1(nib.Nifti1Image):
    header_class = _Header1


class _Image2(nib.Nifti2Image):
    header_class = _Header2


@contextmanager
def opened(path: Path) -> Iterator[tuple[nib.Nifti1Image, Any]]:
    """A NIfTI image whose voxels are still to be read, and the stream that they come from.

    What the file is, gzip or not, NIfTI-1 or NIfTI-2, its first bytes say, not its name.

    Raises:
        UserError: naming the file, where it is not there, or none.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; correct the path")
    if path.is_dir():
        raise UserError(f"{path}: is a directory, not a NIfTI file; {REPLACE}")
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path}: is no regular file; {REPLACE}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty (0 bytes); {REPLACE}")
    try:
        file = path.open("rb")
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read (permission denied); chmod it or run as its owner") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); {REPLACE}") from error
    with file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if packed else file
        yield _image(path, stream), stream


def _image(path: Path, stream: Any) -> nib.Nifti1Image:
    try:
        start = stream.read(348)
        kinds = {_Image1: start[344:] == b"n+1\0", _Image2: start[4:8] == b"n+2\0"}
        if kind := next((kind for kind, fits in kinds.items() if fits), None):
            stream.seek(0)
            return kind.from_stream(stream)
        other = nib.load(path)
    except Exception as error:  # whatever a damaged header leads to
        raise UserError(f"{path}: is not a readable NIfTI file ({reason(error)}); {REPLACE}") from error
    raise UserError(f"{path}: is {type(other).__name__}, not NIfTI; convert it to .nii.gz")


def check_complete(path: Path, image: nib.Nifti1Image, stream: Any) -> None:
    """Whether the file is as long as its header says; its voxels are read only where that is not clear without.

    Raises:
        UserError: naming the file, and how much of it is there.
    """
    expected = (
        image.header.get_data_offset() + int(np.prod(image.shape, dtype=np.int64)) * image.get_data_dtype().itemsize
    )
    if not isinstance(stream, gzip.GzipFile):
        if path.stat().st_size < expected:
            raise truncated(path, path.stat().st_size, expected)
        return
    # gzip ends in the uncompressed size, modulo 2^32 (RFC 1952): right for a whole file of one member. A file that was
    # cut ends in other bytes, and one of several members in the size of its last, so both are read to decide.
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 4, 0))
        stored = int.from_bytes(file.read(4), "little")
    if stored == expected % 2**32:
        return
    size = 0
    try:
        with gzip.open(path) as unpacked:
            for block in _to_the_end(unpacked):
                size += block
    except (EOFError, OSError, zlib.error) as error:
        raise truncated(path, size, expected) from error
    if size < expected:
        raise truncated(path, size, expected)


def truncated(path: Path, size: int, expected: int) -> UserError:
    """The error for a file of which only `size` of `expected` bytes are there."""
    return UserError(f"{path}: is truncated or damaged ({size} of {expected} bytes readable); {COPY}")


def voxels(path: Path, image: nib.Nifti1Image, stream: Any) -> np.ndarray:
    """All voxels, scaled as the header says, from a file that is intact.

    The stream is read beyond the last voxel: gzip's checksum comes after all that it packs.

    Raises:
        UserError: naming the file, where that fails.
    """
    try:
        data = np.asanyarray(image.dataobj)
        if isinstance(stream, gzip.GzipFile):
            sum(_to_the_end(stream))
    except MemoryError:
        raise
    except Exception as error:  # whatever damaged bytes lead to
        raise UserError(f"{path}: is truncated or damaged ({reason(error)}); {COPY}") from error
    return data


def _to_the_end(stream: gzip.GzipFile) -> Iterator[int]:
    """The lengths of the blocks that follow, checksums compared; what was added after the last part is ignored."""
    try:
        while block := stream.read1(_BLOCK):
            yield len(block)
    except gzip.BadGzipFile as error:
        if not str(error).startswith("Not a gzipped file"):  # raised once the parts before it have been compared
            raise
