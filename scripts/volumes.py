"""A volume on disk that can be read box by box.

Each NIfTI volume is converted once into a chunked, compressed array (Blosc2), in the closest canonical
orientation (RAS), int16 where that loses nothing and float32 otherwise. Convert ahead of time with

    python -m scripts.volumes prepare --datalist data/datalist_ct.json
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import shutil
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import blosc2
import fire
import nibabel as nib
import numpy as np
import torch
from monai.transforms import ResizeWithPadOrCrop
from torch.utils.data import Dataset
from tqdm import tqdm

from scripts import errors
from scripts.datalist import load
from scripts.errors import UserError
from scripts.intensity import Intensity
from scripts.nifti import check_values, read_nifti

blosc2.set_nthreads(1)  # parallelism comes from data-loader workers; a thread pool would not survive their fork

FORMAT = 1  # raise when conversion changes, so that older conversions are not found any more
# Whole-read cost against random-box cost, measured on 512 x 512 x 140 CT: docs/performance.md.
CHUNK, BLOCK = 64, 32


def stored_path(source: str | Path, store_dir: str | Path, modality: str = "ct", select_channel: int = 0) -> Path:
    """Where the conversion of `source` lies; another name once path, size, mtime or preprocessing change."""
    source = Path(source).absolute()
    try:
        status = source.stat()
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}; correct the path in the datalist") from error
    identity = [FORMAT, str(source), status.st_size, status.st_mtime_ns, modality, select_channel]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Path(store_dir) / f"{source.name.split('.nii')[0]}-{digest}.b2nd"


def convert(source: str | Path, store_dir: str | Path, modality: str = "ct", select_channel: int = 0) -> Path:
    """Convert one volume unless that is done already; safe against other processes and against being killed.

    Returns:
        the path of the converted volume, written under another name first and then renamed.
    """
    target = stored_path(source, store_dir, modality, select_channel)
    if target.exists():
        return target
    data, affine = read_nifti(source, modality, select_channel)
    check_values(data, source, modality)
    try:
        window = Intensity.of(data, modality).window
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part-{uuid.uuid4().hex}.b2nd")
    try:
        array = blosc2.asarray(
            np.ascontiguousarray(data),
            urlpath=str(part),
            mode="w",
            chunks=tuple(min(CHUNK, n) for n in data.shape),
            blocks=tuple(min(BLOCK, n) for n in data.shape),
            cparams=blosc2.CParams(
                codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE], typesize=data.dtype.itemsize
            ),
        )
        array.schunk.vlmeta["volume"] = {"affine": affine.tolist(), "window": list(window), "source": str(source)}
        del array
        part.replace(target)
    except (OSError, RuntimeError) as error:  # Blosc2 raises RuntimeError where the disk is full
        raise UserError(f"{store_dir}: cannot write the converted {source} ({error}); free space there") from error
    finally:
        part.unlink(missing_ok=True)
    return target


BROKEN = (OSError, RuntimeError, ValueError)  # what reading a damaged volume raises


def explain(entry: Mapping[str, str], problem: Exception) -> str:
    """Why a volume cannot be read, in one line that names it."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if entry["image"] in text else f"{entry['image']}: cannot be read any more ({text})"


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

    @classmethod
    def of(cls, entry: Mapping[str, str], store_dir: str | Path, select_channel: int = 0) -> Volume:
        """The volume of a datalist entry, converted now if it was not before."""
        modality = entry.get("class", "ct")
        return cls(convert(entry["image"], store_dir, modality, select_channel), modality)

    def read(self, box: Sequence[slice]) -> np.ndarray:
        """The voxels in `box` (three slices with start and stop), int16 or float32, unscaled."""
        return self._array[tuple(box)]


class VolumeDataset(Dataset):
    """Whole volumes, normalised, without augmentation, for validation.

    Args:
        data: datalist entries.
        store_dir: folder of the converted volumes; what is missing there is converted on first use.
        select_channel: of 4D MRI volumes.
        patch_size: centre crop in voxels, padded with 0 where the volume is smaller; None for the whole volume.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, str]],
        store_dir: str | Path,
        select_channel: int = 0,
        patch_size: Sequence[int] | None = None,
    ) -> None:
        self.data, self.store_dir, self.select_channel = data, store_dir, select_channel
        self.patch_size = patch_size
        self.crop = None if patch_size is None else ResizeWithPadOrCrop(patch_size)

    def __len__(self) -> int:
        return len(self.data)

    def voxels(self, index: int) -> int:
        """How many voxels item `index` has."""
        if self.patch_size is not None:
            return math.prod(self.patch_size)
        return math.prod(Volume.of(self.data[index], self.store_dir, self.select_channel).shape)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A whole volume.

        Returns:
            `image`, (1, X, Y, Z) float32 in RAS, CT in [0, 1]; `path`; `spacing` (3,) in mm; `range`, what 1.0 is in
            HU (in stored intensity for MRI); `clip`, whether [0, 1] holds all of it; `error`, empty, or why the volume
            cannot be read, `image` being NaN then.
        """
        entry = self.data[index]
        try:
            volume = Volume.of(entry, self.store_dir, self.select_channel)
            image = volume.intensity.normalise(volume.read([slice(0, n) for n in volume.shape]))[None]
        except BROKEN as problem:
            image = torch.full((1, *(self.patch_size or (4, 4, 4))), torch.nan)
            nothing = {"spacing": np.ones(3), "range": 1.0, "clip": True}
            return {"image": image, "path": entry["image"], "error": explain(entry, problem), **nothing}
        if self.crop is not None:
            image = torch.as_tensor(self.crop(image))
        facts = {"spacing": volume.spacing, "range": volume.intensity.range, "clip": volume.intensity.clip}
        return {"image": image, "path": entry["image"], "error": "", **facts}


def prepare(
    entries: Sequence[Mapping[str, str]],
    store_dir: str | Path,
    select_channel: int = 0,
    num_workers: int = 4,
    progress: bool = True,
) -> int:
    """Convert what is missing of `entries`, in `num_workers` processes.

    Returns:
        how many volumes were converted.

    Raises:
        UserError: naming the first volume that cannot be converted, or the disk that is too small.
    """
    wanted = {e["image"]: e.get("class", "ct") for e in entries}
    missing = [(p, m) for p, m in wanted.items() if not stored_path(p, store_dir, m, select_channel).exists()]
    if not missing:
        return 0
    _check_disk([p for p, _ in missing], Path(store_dir), progress)
    bar = tqdm(total=len(missing), desc="converting", unit="volume", disable=not progress)
    with bar, ProcessPoolExecutor(max(1, min(num_workers, len(missing))), multiprocessing.get_context("fork")) as pool:
        jobs = {pool.submit(convert, path, store_dir, modality, select_channel): path for path, modality in missing}
        for job in as_completed(jobs):
            try:
                job.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"{jobs[job]}: a conversion process was killed, most likely for lack of memory; "
                    f"lower num_workers (now {num_workers})"
                ) from error
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            bar.update()
    return len(missing)


def _check_disk(sources: Sequence[str], store_dir: Path, progress: bool) -> None:
    # A conversion takes 0.75 to 1.1 times its .nii.gz; an uncompressed .nii shrinks to about a half.
    need = sum(Path(p).stat().st_size * (1.1 if p.endswith(".gz") else 0.6) for p in sources)
    folder = store_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if progress:
        print(
            f"{len(sources)} volumes to convert into {store_dir}: about {need / 1e9:.2f} GB, free {free / 1e9:.1f} GB"
        )
    if need > free:
        raise UserError(
            f"{store_dir}: converting needs about {need / 1e9:.2f} GB, but {free / 1e9:.2f} GB is free; "
            "set store_dir to a larger disk"
        )


def _main(
    datalist: str,
    store_dir: str = "data/store",
    select_channel: int = 0,
    num_workers: int = 4,
    base_dir: str | None = None,
) -> str:
    """Convert every volume of a datalist ahead of training; run it again to go on where it stopped."""
    entries = [entry for split in load(datalist, base_dir).values() for entry in split]
    converted = prepare(entries, store_dir, select_channel, num_workers)
    return f"{converted} volumes converted, {len(entries) - converted} were there already, in {store_dir}"


if __name__ == "__main__":
    errors.install()
    fire.Fire({"prepare": _main})
