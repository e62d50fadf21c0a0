"""Convert volumes ahead of training.

python -m scripts.volumes prepare --datalist data/datalist_ct.json
"""

from __future__ import annotations

from scripts.common.words import door
from scripts.data.datalist import load
from scripts.data.store import Store


def prepare(
    datalist: str,
    store_dir: str = "data/store",
    select_channel: int = 0,
    num_workers: int = 4,
    base_dir: str | None = None,
) -> str:
    """Convert every volume of a datalist ahead of training; run it again to go on where it stopped."""
    entries = [entry for split in load(datalist, base_dir).values() for entry in split]
    converted = Store(store_dir, select_channel).convert_missing(entries, num_workers)
    return f"{converted} volumes converted, {len(entries) - converted} were there already, in {store_dir}"


if __name__ == "__main__":
    door({"prepare": prepare})
