"""The one place where a volume's failure is caught: whatever its file raises is the fault of that volume alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from scripts.common.errors import UserError, reason

T = TypeVar("T")


class FolderError(UserError):
    """The fault of a folder that is written to, and so of no volume."""


def attempt(entry: Mapping[str, str], read: Callable[[], T]) -> tuple[T | None, str]:
    """What `read` makes of the volume of `entry`, or None and why it cannot, in one line that names a file of it.

    Raises:
        FolderError: which `read` raises, since the other volumes meet it too.
    """
    try:
        return read(), ""
    except FolderError:
        raise
    except Exception as problem:
        files = [path for key in ("image", "label") if isinstance(path := entry.get(key), str)]
        if isinstance(problem, UserError) and any(path in str(problem) for path in files):
            return None, " ".join(str(problem).split())
        return None, f"{entry['image']}: cannot be read any more ({reason(problem)})"


def first_of(faults: list[str], of_volumes: bool = True) -> str:
    """One line for several faults: the first, how many more there are, and for those of volumes how to see them all."""
    rest = len(faults) - 1
    if rest and of_volumes:
        return f"{faults[0]} ({rest} more; python -m scripts.datalist check lists them all)"
    return f"{faults[0]} ({rest} more)" if rest else faults[0]
