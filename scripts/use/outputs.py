"""Results in a folder: named after their volumes, written whole, found again, and all made with the same settings."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ignite.distributed as idist

from scripts.common.errors import UserError, reason
from scripts.common.files import read_json, write_json, write_text

RECORD = "made_with{}.json"
ENDINGS = ("_recon", "_emb", "_emb_sigma")


class HasFacts(Protocol):
    """Weights that say which they are, under `weights` and `weights_sha256`."""

    def facts(self) -> dict[str, str | None]:
        """For what is written with results."""


class Output:
    """A folder of results, the record of the weights and settings that they were made with, and the list of them.

    The record is `made_with<ending>.json`. The list, `made_with<ending>.jsonl`, has a line for each result that is
    whole, with its size in bytes and that of the volume's file: what is not in it was not made with these weights and
    settings, or not to its end. So results of two networks do not mix, nor those of two volumes of one name, an
    overwriting that was interrupted goes on, and all that holds in a copy.

    Args:
        folder: where the results go.
        ending: what follows a volume's name, before `.nii.gz`: one of `ENDINGS`; `_ct` or `_mri` if it is generated.
        weights: the results come from them; their `facts` are recorded.
        settings: the results depend on them.
        bundle_version: recorded with the weights.
        computed_in: recorded with the weights; another one goes on, too.
        overwrite: make results anew that are there already.
        sidecars: whether a result is whole only with its JSON file.
        beside: what follows a volume's name in the other files without which its result is not whole.
        corrected: whether what results are made of may be corrected, as label maps are: it is known by its content
            then, and made anew where that is another; otherwise a file of another size is refused.

    Raises:
        UserError: where the folder holds results of other weights or settings, which `overwrite` replaces.
    """

    def __init__(
        self,
        folder: str,
        ending: str,
        weights: HasFacts,
        settings: Mapping[str, Any],
        bundle_version: str = "",
        computed_in: str = "",
        overwrite: bool = False,
        sidecars: bool = False,
        beside: Sequence[str] | None = None,
        corrected: bool = False,
    ) -> None:
        self.folder, self.ending = Path(folder), ending
        self.facts = {**weights.facts(), "bundle_version": bundle_version, "computed_in": computed_in}
        self.record = self.folder / RECORD.format(ending)
        self.list = self.record.with_suffix(".jsonl")
        self.ours = self.record.is_file()
        self.overwrite, self.sidecars, self.beside, self.corrected = overwrite, sidecars, beside or (), corrected
        if self.ours and not overwrite:
            self._compare(settings)
        idist.barrier()  # every rank has looked before rank 0 writes, and none goes on before it has written
        if idist.get_rank() == 0:
            self._begin(settings)
        idist.barrier()
        self._listed = _listed(self.list)

    def _begin(self, settings: Mapping[str, Any]) -> None:
        """Begin list and record, where they are not to be gone on with."""
        if self.overwrite or not self.ours:
            write_text(self.list, "")  # before the record: old results are none of the new weights
            write_json(self.record, self.facts | {"settings": settings})
        elif not self.list.exists():  # by version 0.4, which wrote none
            tail = f"{self.ending}.nii.gz"
            there = [path.relative_to(self.folder) for path in self.folder.rglob(f"*{tail}") if path.is_file()]
            write_text(self.list, "".join(self._line(path.as_posix().removesuffix(tail)) for path in sorted(there)))

    def _compare(self, settings: Mapping[str, Any]) -> None:
        """Refuse a folder whose results come from other weights or settings than these."""
        remedy = "give another output_dir, or --overwrite True to replace them"
        try:
            earlier = read_json(self.record)
            weights, sha256, was = earlier["weights"], earlier["weights_sha256"], dict(earlier["settings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.record}: is damaged, so it is not known what results are there; {remedy}"
            ) from error
        if sha256 != self.facts["weights_sha256"]:
            raise UserError(f"{self.folder}: holds results of other weights ({weights}); {remedy}")
        for name, value in settings.items():
            if was.get(name) != value:
                change = f"{name} was {was.get(name)}, now it is {value}"
                raise UserError(f"{self.folder}: holds results of other settings ({change}); {remedy}")

    def forget(self) -> None:
        """Remove the record and the list that this run began, lest the next one take for its own what this one found.

        Nothing is removed where an earlier run began them, or there are results.
        """
        if not self.ours and not self.overwrite and not _listed(self.list):
            for path in (self.record, self.list):
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file that the result of the volume `name` is written to."""
        return self.folder / f"{name}{self.ending}.nii.gz"

    def sidecar(self, name: str) -> Path:
        """The JSON file beside the result of the volume `name`."""
        return self.folder / f"{name}{self.ending}.nii.gz.json"

    def names(self) -> list[str]:
        """The volumes whose results are there, of all ranks and of earlier runs, in the order of their files."""
        self._listed = _listed(self.list)
        return sorted(filter(self.done, self._listed), key=self.path)

    def finished(self, name: str, source: str | None = None) -> None:
        """List the result of the volume `name` of the file `source`, all files of which are in their places.

        Raises:
            UserError: where the list cannot be written.
        """
        line = self._line(name, source)
        try:
            with self.list.open("a+b", buffering=0) as file:  # one write to the end of the file, whoever else writes
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.lockf(file, fcntl.LOCK_EX)  # until it is closed: what another rank is writing looks torn
                end = file.seek(0, os.SEEK_END)
                torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"  # whoever wrote that was killed
                text = ("\n" if torn else "") + line
                if file.write(text.encode("ascii")) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(
                f"{self.list}: cannot be written ({reason(error)}); free space or choose another folder"
            ) from error
        self._listed[name] = json.loads(line)

    def _line(self, name: str, source: str | None = None) -> str:
        """What the list says of a result: JSON in ASCII, whatever is in the name."""
        item: dict[str, Any] = {"name": name, "bytes": self.path(name).stat().st_size}
        if (size := _size(source)) is not None:
            item["source_bytes"] = size
            if self.corrected and source is not None:
                item["source_crc32"] = _crc32(source)
        return json.dumps(item) + "\n"

    def done(self, name: str, source: str | None = None) -> bool:
        """Whether the result of the volume `name` is there, and was made with the present weights and settings.

        Args:
            name: of the volume.
            source: its file.

        Raises:
            UserError: where a file of that name is there, but no earlier run of this has made it, or one of another
                volume.
        """
        files = [path := self.path(name), *(self.folder / f"{name}{ending}" for ending in self.beside)]
        sizes = [_size(str(file)) for file in files]
        there = [file for file, found in zip(files, sizes, strict=True) if found is not None]
        if there and name not in self._listed and not self.ours and not self.overwrite:
            self.forget()
            raise UserError(
                f"{there[0]}: is there, but is no result of an earlier run; move it, give another output_dir, or "
                "--overwrite True to replace it"
            )
        if there != files:  # one is not there, or cannot be: writing it will say why
            return False
        item = self._listed.get(name, {})
        same = source is None or _made_of(item, source)
        if not same and not self.corrected:
            raise UserError(
                f"{path}: was made of another file of that name ({item['source_bytes']} bytes; {source} has "
                f"{_size(source)}); give another output_dir, or --overwrite True to replace it"
            )
        return same and sizes[0] == item.get("bytes") and (not self.sidecars or self.sidecar(name).is_file())


def _made_of(item: Mapping[str, Any], source: str) -> bool:
    """Whether a result was made of this file, as far as the list says, and the file is there."""
    now = _size(source)
    if now is None or item.get("source_bytes") is None:
        return True
    return item["source_bytes"] == now and item.get("source_crc32") in (None, _crc32(source))


def _crc32(path: str) -> int:
    return zlib.crc32(Path(path).read_bytes())


def _size(path: str | None) -> int | None:
    """The bytes of a file; None where there is none."""
    try:
        return None if path is None else Path(path).stat().st_size
    except OSError:
        return None


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """What a list says of each result, by the name of its volume; lines that were cut off are none."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            item = json.loads(line)
            found[item["name"]] = dict(item)
        except (ValueError, KeyError, TypeError):
            continue
    return found
