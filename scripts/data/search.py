"""The one search for volumes in folders: for datalists, and for whatever takes a folder."""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path, PurePath

logger = logging.getLogger(__name__)

ENDINGS = (".nii", ".nii.gz")


@dataclass
class Found:
    """Files, sorted by their paths, and how many others were left out, by the reason."""

    files: list[Path] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        others = ", ".join(f"{count} {why}" for why, count in sorted(self.left_out.items()))
        return f"{len(self.files)} files" + (f"; left out: {others}" if others else "")


def find(root: str | Path, pattern: str | None = None, skip: str | Path | None = None) -> Found:
    """NIfTI files in a folder and in its subfolders, also through links, each of them once.

    Hidden files and folders (of macOS archives: `._scan.nii.gz`) are left out, and links that lead to what is found
    without them or back up; what cannot be read is named in the log.

    Args:
        root: the folder.
        pattern: which files, as a glob on the end of their paths, `**` being any number of folders; None for all
            `.nii` and `.nii.gz` files, in upper or lower case.
        skip: a folder beneath `root` that is not searched.
    """
    found, top = Found(), os.path.realpath(root)
    files: dict[str, Path] = {}  # by their real paths
    walked: set[str] = set()
    # Real folders come before links to folders, so that a file keeps the path that has no link in it.
    pending = deque([Path(root)])
    while pending:
        folder = pending.popleft()
        real = os.path.realpath(folder)
        if real in walked or top.startswith(os.path.join(real, "")):  # noqa: PTH118
            found.left_out["links to folders that are searched already"] += 1
            continue
        walked.add(real)
        folders: list[Path] = []
        for item in _items(folder, found):
            path = folder / item.name
            if why := _left_out(item, path.relative_to(root), pattern):
                found.left_out[why] += 1
            elif not item.is_dir():
                target = os.path.realpath(path) if item.is_symlink() else os.path.join(real, item.name)  # noqa: PTH118
                _note(found, files, target, path)
            elif skip is None or path != Path(skip):
                (pending if item.is_symlink() else folders).append(path)
        pending.extendleft(reversed(folders))
    found.files = sorted(files.values())
    return found


def _left_out(item: os.DirEntry[str], path: PurePath, pattern: str | None) -> str:
    """Why what stands in a folder is not for us; empty for files that are, and for folders."""
    if item.name.startswith("."):
        return "hidden folders" if item.is_dir() else "hidden files"
    if item.is_dir():
        return ""
    if not item.is_file():
        return "broken links" if item.is_symlink() else "that are no files"
    if not _matches(path, pattern):
        return f"that do not match {pattern}" if pattern else "of other kinds"
    return ""


def _note(found: Found, files: dict[str, Path], real: str, path: Path) -> None:
    """Take a file, unless it was found before by a path without links."""
    if real in files:
        found.left_out["links to files that are listed already"] += 1
    if real not in files or (files[real].is_symlink() and not path.is_symlink()):
        files[real] = path


def _items(folder: Path, found: Found) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as items:
            return sorted(items, key=lambda item: item.name)
    except OSError as error:
        found.left_out["folders that cannot be read"] += 1
        logger.warning("%s: cannot be read (%s), and is left out", folder, error.strerror)
        return []


def _matches(path: PurePath, pattern: str | None) -> bool:
    if pattern is None:
        return path.name.lower().endswith(ENDINGS)
    for count in range(len(path.parts)):  # of folders that "**" may be
        if path.match(pattern.replace("**", "/".join("*" * count) or ".")):
            return True
        if "**" not in pattern:
            break
    return False
