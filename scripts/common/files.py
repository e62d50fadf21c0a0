"""Files that are there whole or not at all, folders that can be written to, and folders that have one owner."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from uuid import uuid4

from scripts.common.errors import UserError, reason

logger = logging.getLogger(__name__)

PART = ".part-"  # how the names of files begin that are not whole yet
LITTER = 24 * 3600.0  # seconds after which such a file is one that a killed run has left
LOCK = ".lock"

_owned: dict[str, Any] = {}  # folders of this process, and the open files that say so


@contextmanager
def whole(path: str | Path, remedy: str = "free space or choose another folder") -> Iterator[Path]:
    """A path to write to, which becomes `path` once that is done; its folder is made.

    That path is this call's alone, so that two writers of one file leave that of one of them, not a mixture.

    Raises:
        UserError: naming the file and `remedy`, where it cannot be written; what was there stays.
    """
    path = Path(path)
    ending = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    part = path.with_name(f"{PART}{uuid4().hex}{ending}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        raise UserError(f"{path}: cannot be written ({reason(error)}); {remedy}") from error
    finally:
        with suppress(OSError):  # where its folder is none, there is nothing to remove, and an error of its own to tell
            part.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole; UTF-8, with escapes for those bytes of file names that are no text."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, whole; what is not finite is refused, since JSON has no name for it.

    The escapes of `write_text` are those of JSON: file names that are no text are read back as they were.
    """
    write_text(path, json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds, in UTF-8 or another encoding of Unicode, with a byte-order mark or without.

    Raises:
        ValueError: where it is no JSON.
        OSError: where it cannot be read.
    """
    return json.loads(Path(path).read_bytes())


def make_folders(*folders: str) -> None:
    """Make the output folders, and remove what killed runs left unfinished in them a day ago or earlier.

    Raises:
        UserError: where one cannot be made or written to.
    """
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({reason(error)}); choose another folder") from error
        sweep(folder, LITTER)


def sweep(folder: Path, age: float = 0.0) -> None:
    """Remove unfinished files, at least `age` seconds old, directly in `folder`."""
    for part in folder.glob(f"{PART}*"):
        with suppress(OSError):  # another process may remove it too
            if time.time() - part.stat().st_mtime >= age:
                part.unlink()


def own(folder: str | Path) -> None:
    """Make this process the one owner of a folder, until it ends, however it ends.

    Raises:
        UserError: naming the owner, where it is another process.
    """
    folder = Path(folder)
    if (key := os.path.realpath(folder)) in _owned:
        return
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        # A record lock: the system drops it with the process, also a killed one; children do not inherit it (those of
        # flock would keep it), and NFS passes it on to other hosts.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{folder}: is in use by {owner}; wait for it, stop it, or give another folder") from error
    except OSError as error:  # a file system without locks
        logger.warning("%s: cannot be locked (%s), so nothing keeps others from writing there", folder, reason(error))
        file.close()
        return
    if not _is(file, folder / LOCK):  # its owner has removed it meanwhile
        file.close()
        own(folder)
        return
    _owned[key] = file
    job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{job}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    sweep(folder)


def _is(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def disown(folder: str | Path) -> None:
    """Give up what `own` took; nothing where that was not taken."""
    if file := _owned.pop(os.path.realpath(folder), None):
        with suppress(OSError):
            (Path(folder) / LOCK).unlink()
        file.close()
