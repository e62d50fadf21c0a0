"""One chunked store on disk: each volume is converted once, and then read box by box.

A conversion is a compressed Blosc2 array. That of a volume is in the closest canonical orientation (RAS), int16 where
that loses nothing and float32 otherwise, with affine and intensity window beside it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
from tqdm import tqdm

from scripts.common.errors import UserError, reason
from scripts.common.files import make_folders
from scripts.data.faults import FolderError, attempt, first_of
from scripts.data.intensity import Intensity
from scripts.data.nifti import plausible, read_nifti

blosc2.set_nthreads(1)  # parallelism comes from data-loader workers; a thread pool would not survive their fork

FORMAT = 1  # raise when conversion changes, so that older conversions are not found any more
# Chunks of 64^3 in blocks of 32^3: a random 96^3 box touches few blocks, and a whole volume still reads at full speed
# (measured on 512 x 512 x 140 CT: docs/performance.md).
CHUNK, BLOCK = 64, 32


def read_volume(entry: Mapping[str, str], select_channel: int = 0) -> tuple[np.ndarray, np.ndarray, Intensity]:
    """A whole volume from its file: (X, Y, Z) int16 or float32, its 4 x 4 affine in RAS+, and its intensity.

    Raises:
        UserError: naming the file, what is wrong and what to do.
    """
    path, modality = entry["image"], entry.get("class", "ct")
    data, affine = read_nifti(path, modality, select_channel)
    data = plausible(data, path, modality)
    try:
        return data, affine, Intensity.for_volume(data, modality)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _printable(name: str) -> str:
    """A file name or path with "?" for the bytes that are no text."""
    return name.encode(errors="replace").decode()


class Volume:
    """A converted volume; opening costs 0.1 ms, reading decompresses only the blocks that a box touches.

    Attributes:
        shape: voxels along the RAS axes.
        affine: 4 x 4, voxel index to mm in RAS+.
        spacing: mm along the RAS axes.
        intensity: how its intensities map to [0, 1].
        modality: "ct" or "mri".
    """

    def __init__(self, path: str | Path, modality: str = "ct") -> None:
        self._array = blosc2.open(str(path), mode="r")
        meta = self._array.schunk.vlmeta["volume"]
        self.shape: tuple[int, ...] = self._array.shape
        self.affine = np.array(meta["affine"])
        self.spacing = nib.affines.voxel_sizes(self.affine)
        self.modality = modality
        self.intensity = Intensity(tuple(meta["window"]), clip=modality == "ct")

    def read(self, box: Sequence[slice]) -> np.ndarray:
        """The voxels in `box` (three slices with start and stop), int16 or float32, unscaled."""
        return self._array[tuple(box)]


class ArrayStore(ABC):
    """A folder of converted arrays, shared by all workers and ranks; a subclass says what a file becomes.

    Args:
        folder: where they lie; made when something is first converted.
    """

    unit = "volume"  # what a file holds
    of_volumes = True  # whether the check of volumes lists the faults of its files

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @abstractmethod
    def preprocessing(self, entry: Mapping[str, Any]) -> list[Any]:
        """What else than its file a conversion depends on."""

    @abstractmethod
    def read(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """The array of an entry from its file, and the facts that are kept with it.

        Raises:
            UserError: naming the file, what is wrong and what to do.
        """

    def grid(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of chunks and blocks of an array."""
        return tuple(min(CHUNK, n) for n in shape), tuple(min(BLOCK, n) for n in shape)

    def path(self, entry: Mapping[str, Any]) -> Path:
        """Where the conversion of an entry lies; another name once path, size, mtime or preprocessing change."""
        source = Path(entry["image"]).absolute()
        try:
            status = source.stat()
        except OSError as error:
            raise UserError(f"{source}: {reason(error)}; correct the path") from error
        identity = [FORMAT, str(source), status.st_size, status.st_mtime_ns, *self.preprocessing(entry)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        name = _printable(source.name.split(".nii")[0])
        name = name.encode()[:200].decode(errors="ignore")  # of the 255 bytes that a name may have
        return self.folder / f"{name}-{digest}.b2nd"

    def convert(self, entry: Mapping[str, Any]) -> Path:
        """Convert one file unless that is done already; safe against other processes and against being killed.

        Returns:
            the path of the conversion, written under another name first and then renamed.

        Raises:
            UserError: naming the file that cannot be converted, or the folder that cannot be written.
        """
        target = self.path(entry)
        if target.exists():
            return target
        data, facts = self.read(entry)
        self._write(target, data, {**facts, "source": _printable(entry["image"])})
        return target

    def _write(self, target: Path, data: np.ndarray, facts: Mapping[str, object]) -> None:
        part = target.with_name(f".part-{uuid.uuid4().hex}.b2nd")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            chunks, blocks = self.grid(data.shape)
            array = blosc2.asarray(
                np.ascontiguousarray(data),
                urlpath=str(part),
                mode="w",
                chunks=chunks,
                blocks=blocks,
                cparams=blosc2.CParams(
                    codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE], typesize=data.dtype.itemsize
                ),
            )
            array.schunk.vlmeta["volume"] = dict(facts)
            del array
            part.replace(target)
        except (OSError, RuntimeError) as error:  # Blosc2 raises RuntimeError where the disk is full
            raise FolderError(
                f"{self.folder}: cannot write the converted {facts['source']} ({reason(error)}); free space there, or "
                "set store_dir to another folder"
            ) from error
        finally:
            with suppress(OSError):
                part.unlink()

    def convert_missing(self, entries: Sequence[Mapping[str, Any]], num_workers: int = 4, progress: bool = True) -> int:
        """Convert what is missing of `entries`, in `num_workers` processes.

        Returns:
            how many files were converted.

        Raises:
            UserError: naming a file that cannot be converted, and how many more there are, once all others are; or
                the disk that is too small.
        """
        wanted = {entry["image"]: entry for entry in entries}
        missing = [entry for entry in wanted.values() if not self.path(entry).exists()]
        if not missing:
            return 0
        self._check_folder([entry["image"] for entry in missing], progress)
        faults = []
        bar = tqdm(total=len(missing), desc="converting", unit=self.unit, disable=not progress)
        workers = max(1, min(num_workers, len(missing)))
        with bar, ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            jobs = {pool.submit(self._attempt, entry): entry["image"] for entry in missing}
            for job in as_completed(jobs):
                try:
                    faults.append(job.result())
                except BrokenProcessPool as error:
                    raise UserError(
                        f"{jobs[job]}: a conversion process was killed, most likely for lack of memory; "
                        f"lower num_workers (now {num_workers})"
                    ) from error
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
                bar.update()
        if broken := sorted(filter(None, faults)):
            raise UserError(first_of(broken, self.of_volumes))
        return len(missing)

    def _attempt(self, entry: Mapping[str, Any]) -> str:
        """Why an entry cannot be converted; empty where it was."""
        return attempt(entry, lambda: self.convert(entry))[1]

    def _check_folder(self, sources: Sequence[str], progress: bool) -> None:
        """Whether conversions can be written, and find room; those that killed processes left are removed."""
        # A conversion takes 0.75 to 1.1 times its .nii.gz; an uncompressed .nii shrinks to about a half.
        need = sum(Path(p).stat().st_size * (1.1 if p.endswith(".gz") else 0.6) for p in sources)
        try:
            make_folders(str(self.folder))
        except UserError as error:
            why = reason(error.__cause__ or error)
            raise FolderError(f"{self.folder}: cannot be written to ({why}); set store_dir to another one") from error
        free = shutil.disk_usage(self.folder).free
        if progress:
            print(
                f"{len(sources)} {self.unit}s to convert into {self.folder}: about {need / 1e9:.2f} GB, "
                f"free {free / 1e9:.1f} GB"
            )
        if need > free:
            raise FolderError(
                f"{self.folder}: converting needs about {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB is free; "
                "set store_dir to a larger disk"
            )


class Store(ArrayStore):
    """The store of volumes.

    Args:
        folder: where they lie; made when something is first converted.
        select_channel: of 4D MRI volumes.
    """

    def __init__(self, folder: str | Path, select_channel: int = 0) -> None:
        super().__init__(folder)
        self.select_channel = select_channel

    def preprocessing(self, entry: Mapping[str, Any]) -> list[Any]:
        """Modality and channel."""
        return [entry.get("class", "ct"), self.select_channel]

    def read(self, entry: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, Any]]:
        """As `read_volume`, whose affine and intensity window are the facts."""
        data, affine, intensity = read_volume(entry, self.select_channel)
        return data, {"affine": affine.tolist(), "window": list(intensity.window)}

    def open(self, entry: Mapping[str, Any]) -> Volume:
        """The volume of an entry, converted now if it was not before."""
        return Volume(self.convert(entry), entry.get("class", "ct"))
