"""The training step, a whole training, a validation and an inference on a GPU, in one table and a file.

    python -m tests.benchmarks.gpu [--minutes 8] [--output outputs/gpu.md] [--without NAME ...]

The file is a section for docs/performance.md; the findings lie beside it as JSON, written part by part, so that what
was found survives an end, and a log. With --device cpu --small it is a dry run, which measures nothing but shows that
it works.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.common import errors
from scripts.common.ranks import usable_gpus
from tests.benchmarks import card, gpu_whole
from tests.benchmarks.apart import Apart, FailedError
from tests.benchmarks.gpu_report import markdown, summary
from tests.benchmarks.gpu_steps import ROUNDS, TINY, Stand, variants
from tests.benchmarks.step import LIKE_STOCK, gemm_rate, step_tflop

NO_GPU = "no GPU can be used here: nothing was measured"
TRAINED, WINDOW = (256, 256, 128), (96, 80, 96)  # voxels: of a volume to train on, of what CPU and GPU both compute
DRY = (40, 36, 44)  # of the volumes to train on, in a dry run
LEAST = 20.0  # seconds that a part gets, however late it is


class Run:
    """Part after part, each with a share of the time; what one leaves goes to those after it.

    Args:
        device: "cpu" or "cuda".
        small: whether with the smallest network, for a dry run.
        seconds: for all.
        output: file of the tables.
    """

    def __init__(self, device: str, small: bool, seconds: float, output: Path) -> None:
        self.device, self.small, self.seconds, self.output = device, small, seconds, output
        self.started = self.until = time.monotonic()
        self.found: dict[str, Any] = {"dry": small or device == "cpu", "card": {"device": device}, "peak": None}
        output.parent.mkdir(parents=True, exist_ok=True)
        self.log = output.with_suffix(".log")
        self.log.unlink(missing_ok=True)
        self.process = Apart(device, self.log)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.end()

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:3.0f} s] {text}", flush=True)

    def give(self, share: float) -> None:
        """Move the end of what comes next, by a share of the whole time."""
        self.until = max(self.until + share * self.seconds, time.monotonic() + LEAST)

    def call(self, share: float, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function(*arguments)` gives; or `error`, why it gives nothing."""
        self.give(share)
        self.say(function.__name__)
        if not self.process.process.is_alive():
            self.process = Apart(self.device, self.log)
        try:
            return self.process.call(function, *arguments, seconds=self.until - time.monotonic())
        except FailedError as error:
            self.say(f"{function.__name__}: {error}")
            return {"error": str(error)}

    def steps(self, share: float, size: int, stand: Stand, rounds: int) -> None:
        """Let all variants of a step take turns, with patches of size^3."""
        self.give(share)
        network = TINY if self.small else {}
        work = {"ours": step_tflop(size, **network), "same terms": step_tflop(size, **network | LIKE_STOCK)}
        steps = {"tflop": work, "variants": stand.measure(size, self.until, rounds)}
        self.keep("steps", self.found.get("steps", {}) | {str(size): steps})

    def keep(self, name: str, value: Any) -> None:
        """Take in what was found, and write it."""
        self.found[name] = value
        self.output.with_suffix(".json").write_text(json.dumps(self.found, indent=1))
        self.output.write_text(markdown(self.found))


def rates(device: str, small: bool) -> dict[str, Any]:
    """What the device is, the peak in its data sheet, and TFLOP/s of a large matrix product."""
    facts, size = card.described(device), 256 if small else 8192
    types = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    measured = {name: gemm_rate(device, dtype, size) for name, dtype in types.items()}
    return {"card": facts, "peak": card.dense_peak(facts["device"]), "rates": measured}


def measure(run: Run, stand: Stand, folder: Path, sizes: Sequence[int], volume: Sequence[int], rounds: int) -> None:
    """All parts, the most telling first."""
    trained, window = (DRY, (32, 32, 32)) if run.small else (TRAINED, WINDOW)
    where = run.device, run.small
    first, *others = sizes
    run.found |= {"volume": " x ".join(map(str, volume))} | run.call(0.04, rates, *where)
    run.steps(0.27, first, stand, rounds)
    run.keep("training", run.call(0.12, gpu_whole.training, folder, trained, *where))
    run.keep("validation", run.call(0.14, gpu_whole.validation, folder, volume, *where))
    run.keep("inference", run.call(0.09, gpu_whole.inference, folder, volume, *where))
    run.keep("agreement", run.call(0.04, gpu_whole.agreement, folder, window, *where))
    for size in others:
        run.steps(0.3 * size / sum(others), size, stand, rounds)


def main(
    device: str, minutes: float, output: Path, small: bool, sizes: list[int], volume: list[int], without: list[str],
    rounds: int,
) -> None:  # fmt: skip
    if device == "cuda" and not usable_gpus():
        print(NO_GPU)
        return
    chosen = [variant for variant in variants() if variant.name not in without]
    with (
        tempfile.TemporaryDirectory() as folder,
        Run(device, small, 60 * minutes, output) as run,
        Stand(device, small, chosen, run.log, run.say) as stand,
    ):
        measure(run, stand, Path(folder), sizes, volume, rounds)
    figures = output.with_suffix(".json")
    print(f"\n{markdown(run.found)}\nThis is in {output}, the figures in {figures}, the log in {run.log}.\n")
    print(summary(run.found))


if __name__ == "__main__":
    errors.install()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--minutes", type=float, default=8, help="for all of it; what no time is left for is left out")
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu.md"))
    parser.add_argument("--small", action="store_true", help="with the smallest network, for a dry run")
    parser.add_argument("--sizes", type=int, nargs="+", default=[96, 64, 128], help="of patches, the first one first")
    parser.add_argument("--volume", type=int, nargs=3, default=[512, 512, 300])
    parser.add_argument("--without", nargs="*", default=[], help="variants of the step to leave out, by name")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each variant, if there is time")
    main(**vars(parser.parse_args()))
