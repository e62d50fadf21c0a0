"""The progress bar."""

from __future__ import annotations

import sys

import ignite.distributed as idist
from tqdm import tqdm


def progress_bar(total: int, description: str, unit: str, initial: int = 0) -> tqdm:
    """Rank 0's bar, which goes away when it is done, and fills no log file: there, a line every half minute."""
    looks = {"leave": False, "mininterval": 0.5 if sys.stderr.isatty() else 30.0, "disable": idist.get_rank() > 0}
    return tqdm(total=total, desc=description, unit=unit, initial=initial, **looks)
