"""Files that are there whole or not at all, and folders that can be written to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from scripts.common.errors import UserError, reason


@contextmanager
def whole(path: str | Path, remedy: str = "free space or choose another folder") -> Iterator[Path]:
    """A path to write to, which becomes `path` once that is done; its folder is made.

    Raises:
        UserError: naming the file and `remedy`, where it cannot be written; what was there stays.
    """
    path = Path(path)
    part = path.with_name(f".part-{path.name}")
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
    """Write a text file, whole."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", errors="surrogateescape")  # as file names may have it


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file, whole; what is not finite is refused, since JSON has no name for it."""
    write_text(path, json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n")


def make_folders(*folders: str) -> None:
    """Make the output folders; a UserError where that cannot be."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({reason(error)}); choose another folder") from error
