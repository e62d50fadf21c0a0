"""Medians, and tables as Markdown, so that they can be pasted into docs/performance.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{table(head, rows)}\n", flush=True)
