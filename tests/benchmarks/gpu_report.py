"""The findings of `tests.benchmarks.gpu` as Markdown: a section for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.benchmarks.gpu_steps import CONFIGURED, SAME_TERMS, STOCK
from tests.benchmarks.table import median, table

DRY = "**A dry run on a CPU with the smallest network: no measurement of a GPU.**"
NONE = "-"
NAME = 90  # characters of a kernel's
Part = Mapping[str, Any]


def markdown(found: Part) -> str:
    """All tables, that with the whole first.

    Args:
        found: what `tests.benchmarks.gpu.measure` gives; a part that failed has an `error`, one that never began is not
            there.
    """
    sections = ["## On a GPU", *([DRY] if found["dry"] else []), _machine(found), summary(found)]
    for size, steps in found.get("steps", {}).items():
        rows = [_variant_row(name, steps, found["peak"]) for name in steps["variants"]]
        head = ("ms a step", "of the stock loop's", "TFLOP/s", "of the peak", "peak memory", "waits a step")
        sections.append(table((f"step at {size}^3", *head), rows))
        kernels = steps["variants"].get(CONFIGURED, {}).get("kernels", {})
        costly = [(f"`{name[:NAME].replace('|', '/')}`", f"{share:.1%}") for name, share in kernels.items()]
        sections.append(table((f"kernels of a step at {size}^3, {CONFIGURED}", "of the time of all"), costly))
    if _there(found, "agreement"):
        sections.append(table(("against the CPU's float32", "mean", "most", "as fast"), _agreement_rows(found)))
    return "\n\n".join(sections) + "\n"


def summary(found: Part) -> str:
    """A row for each thing that was to be known."""
    rows = [row for size, steps in found.get("steps", {}).items() for row in _step_rows(size, steps, found["peak"])]
    if "training" in found:
        rows.append(("a whole training", _error(found["training"]) or _training(found)))
    for name in ("validation", "inference"):
        if name in found:
            rows.append((f"{name} of {found['volume']} voxels", _error(found[name]) or _windows(found[name])))
    if "agreement" in found:
        away = [f"{mean} in {mode}" for mode, mean, *_ in _agreement_rows(found)] if _there(found, "agreement") else []
        rows.append(("mean difference from the CPU", _error(found["agreement"]) or ", ".join(away)))
    return table(("what", "figure"), rows)


def _there(found: Part, name: str) -> bool:
    return name in found and not _error(found[name])


def _error(part: Part) -> str:
    return str(part.get("error", ""))


def _machine(found: Part) -> str:
    facts = [f"{name} {text}" for name, text in found["card"].items()]
    facts.append(f"dense bfloat16 peak {_rate(found['peak'])} (data sheet)")
    facts += [f"product of two matrices in {name} {_rate(rate)}" for name, rate in found.get("rates", {}).items()]
    return f"Machine: {', '.join(facts)}."


def _rate(tflops: Any) -> str:
    return f"{tflops:.0f} TFLOP/s" if isinstance(tflops, (int, float)) else "unknown"


def milliseconds(variant: Part) -> float:
    """Of a step, the median over a variant's turns."""
    return 1e3 * median(variant["seconds"])


def _against_stock(variant: Part, variants: Part) -> float | None:
    """The median ratio of turns that followed each other; None where the stock loop has none."""
    stock = variants.get(STOCK, {}).get("seconds", [])
    ratios = [ours / theirs for ours, theirs in zip(variant["seconds"], stock, strict=False)]
    return median(ratios) if ratios else None


def _performance(name: str, steps: Part) -> float:
    """TFLOP/s of what a step needs; what is computed again does not count."""
    work = steps["tflop"]["same terms" if name in (STOCK, SAME_TERMS) else "ours"]
    return work / milliseconds(steps["variants"][name]) * 1e3


def _variant_row(name: str, steps: Part, peak: float | None) -> tuple[str, ...]:
    variant = steps["variants"][name]
    if _error(variant):
        return name, _error(variant), *[NONE] * 5
    ratio, rate = _against_stock(variant, steps["variants"]), _performance(name, steps)
    return (
        name if variant["finite"] else f"{name} (weights are not finite)",
        f"{milliseconds(variant):.1f}",
        NONE if ratio is None else f"{ratio:.2f}",
        f"{rate:.1f}",
        f"{rate / peak:.0%}" if peak else NONE,
        _memory(variant["peak"]),
        _waits(variant["waits"]),
    )


def _memory(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size else NONE


def _waits(waits: Mapping[str, float]) -> str:
    lines = f" ({', '.join(sorted(waits))})" if waits else ""
    return f"{sum(waits.values()):g}{lines}"


def _step_rows(size: str, steps: Part, peak: float | None) -> list[tuple[str, str]]:
    rows = []
    for name in (CONFIGURED, STOCK):
        if (variant := steps["variants"].get(name)) is None:
            continue
        if text := _error(variant):
            rows.append((f"step at {size}^3, {name}", text))
            continue
        _, time, ratio, rate, share, memory, waits = _variant_row(name, steps, peak)
        text = f"{time} ms, {rate} TFLOP/s ({share} of the peak), {memory}, {waits} waits of the host"
        if name == CONFIGURED:
            text += f", GPU idle {variant['idle']:.0%} of the time, {ratio} of the stock loop's time"
        rows.append((f"step at {size}^3, {name}", text))
    return rows


def _training(found: Part) -> str:
    part = found["training"]
    text = f"{part['patches_per_second']:.2f} patches/s, {part['data_wait_share']:.0%} of the time waiting for data"
    alone = found.get("steps", {}).get(str(part["size"]), {}).get("variants", {}).get(CONFIGURED, {})
    if "seconds" in alone:
        text += f", {part['patches_per_second'] * milliseconds(alone) / 1e3:.0%} of the step alone"
    return text


def _windows(part: Part) -> str:
    return (
        f"{part['windows_per_second']:.1f} windows/s ({part['windows']} windows), GPU idle {part['idle_share']:.0%} of "
        f"that time, {part['seconds']:.1f} s with all before and after"
    )


def _agreement_rows(found: Part) -> list[tuple[str, ...]]:
    part = found["agreement"]
    modes = {name: values for name, values in part.items() if isinstance(values, Mapping)}
    return [
        (mode, f"{of['mean']:.3f} HU", f"{of['most']:.1f} HU", f"{part['cpu_seconds'] / of['seconds']:.0f} x")
        for mode, of in modes.items()
    ]
