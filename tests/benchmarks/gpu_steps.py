"""Variants of one training step, which take turns on a GPU."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from scripts.networks import operators
from tests.benchmarks import card
from tests.benchmarks.apart import Apart, FailedError
from tests.benchmarks.step import (
    LIKE_STOCK,
    TRAIN,
    OurLoop,
    StockLoop,
    host_images,
    networks,
    quiet_perceptual,
    seconds_a_step,
)
from tests.benchmarks.table import median

WARM_UP, LOOKED_AT = 3, 2  # steps before the first turn, and for counting what the host waits for
ROUNDS = 8  # turns of each variant at most
TINY: dict[str, Any] = {  # for a dry run
    "autoencoder_def#num_channels": [4, 4, 4],
    "autoencoder_def#num_res_blocks": [1, 1, 1],
    "autoencoder_def#norm_num_groups": 4,
    "discriminator_def#channels": 2,
    "autoencoder_train#perceptual_weight": 0,
}
CONFIGURED, STOCK, COMPILED = "as configured", "stock loop, bfloat16", "compile"
SAME_TERMS = "scale_equivariance 0, as the stock loop"


@dataclass(frozen=True)
class Variant:
    """A way to make a step.

    Attributes:
        name: of its row.
        overrides: of configs/train.json.
        dtype: what `amp` computes in, where it is not the device's own choice.
        tf32: whether convolutions in float32 may round their inputs to it.
        benchmark: whether cuDNN tries its algorithms; None for what is configured.
        attributes: of `scripts.networks.operators`, by name: what takes their place.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    tf32: bool = True
    benchmark: bool | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cudnn_benchmark(self) -> bool:
        return configured_benchmark() if self.benchmark is None else self.benchmark

    @property
    def home(self) -> tuple[bool, bool]:
        """Which variants share its process: cuDNN chooses once in a process, and compiling may take too long."""
        return self.cudnn_benchmark, self.name == COMPILED


def configured_benchmark() -> bool:
    return bool(json.loads(TRAIN.read_text()).get("cudnn_benchmark", False))


def narrow_group_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """GroupNorm whose input, output and kept statistics are in x's type; only within the kernel are sums float32."""
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)  # type: ignore[operator]
    return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)  # type: ignore[arg-type]


def variants() -> list[Variant]:
    """All, the most telling first: a run that is short of time leaves out the last ones."""
    other = not configured_benchmark()
    full = {"autoencoder_train#amp": False}
    return [
        Variant(CONFIGURED),
        Variant(STOCK),
        Variant(f"cudnn_benchmark {'on' if other else 'off'}", benchmark=other),
        Variant("bfloat16 GroupNorm", attributes={"group_norm": narrow_group_norm}),
        Variant("activation_checkpointing", {"activation_checkpointing": True}),
        Variant("float32 with TF32", full),
        Variant("float32 without TF32", full, tf32=False),
        Variant("float16 and its scaler", dtype=torch.float16),
        Variant(SAME_TERMS, LIKE_STOCK),
        Variant("GroupNorm in one piece", attributes={"LARGE": 2**62}),
        Variant(COMPILED, {"compile": True}),
    ]


# In a process apart

_loops: dict[str, tuple[Variant, Any, torch.Tensor]] = {}


@contextmanager
def _switched(variant: Variant) -> Iterator[None]:
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = variant.cudnn_benchmark, variant.tf32
    with ExitStack() as stack:
        for name, value in variant.attributes.items():
            stack.enter_context(patch.object(operators, name, value))
        yield


def _loop(variant: Variant, device: str, small: bool) -> Any:
    overrides = {**(TINY if small else {}), **variant.overrides}
    if variant.name == STOCK:
        return StockLoop(device, True, (*networks(True, device, **overrides), quiet_perceptual(device)))
    loop = OurLoop(device, **overrides)
    if variant.dtype:
        loop.trainer.dtype = variant.dtype
        loop.trainer.scalers = {name: loop.trainer._scaler(name) for name in loop.trainer.optimizers}
    return loop


def build(variant: Variant, size: int, device: str, small: bool) -> dict[str, Any]:
    """Get a variant going, with patches of size^3.

    Returns:
        `seconds` of a step; `peak`, bytes of the GPU's memory with weights and what optimizers keep; `waits` of the
        host in one step, by line; whether the weights are `finite`; how many seconds `warm_up` took; and of what is
        configured what `card.watched` says of a few steps.
    """
    torch.compiler.reset()  # else a second size is compiled for any
    started, before, images = time.perf_counter(), card.allocated(device), host_images(size, device)
    with _switched(variant):
        loop = _loop(variant, device, small)
        seconds_a_step(loop, images, device, WARM_UP)
        own, warm_up = card.allocated(device) - before, time.perf_counter() - started
        waits = card.waits(lambda: [loop.step(images) for _ in range(LOOKED_AT)], device)
        seconds: list[float] = []
        above = card.peak(lambda: seconds.append(seconds_a_step(loop, images, device)), device)
        with card.watched(device) if variant.name == CONFIGURED else nullcontext({}) as kernels:
            seconds_a_step(loop, images, device)
    network = loop.autoencoder if variant.name == STOCK else loop.trainer.bare["autoencoder"]
    finite = all(bool(parameter.isfinite().all()) for parameter in network.parameters())
    _loops[variant.name] = variant, loop, images
    each = {line: count / LOOKED_AT for line, count in waits.items()}
    found = {"seconds": seconds, "peak": own + above, "waits": each, "finite": finite, "warm_up": warm_up}
    return found | kernels


def turn(name: str, device: str) -> float:
    """Seconds of a step, as the mean over a few, after one that finds the memory as another variant left it."""
    variant, loop, images = _loops[name]
    with _switched(variant):
        loop.step(images)
        return seconds_a_step(loop, images, device)


def clear() -> None:
    """Forget all that was built."""
    _loops.clear()


# In the process that asks


class Stand:
    """Where variants take turns.

    Args:
        device: "cpu" or "cuda".
        small: the smallest network that can be, for a dry run.
        chosen: the variants.
        log: for what the processes print.
        say: takes lines that tell how far it is.
    """

    def __init__(
        self, device: str, small: bool, chosen: Sequence[Variant], log: Path, say: Callable[[str], None]
    ) -> None:
        self.device, self.small, self.chosen, self.log, self.say = device, small, chosen, log, say
        # All at once, since each takes its time to import PyTorch.
        self.homes = {home: Apart(device, log) for home in sorted({variant.home for variant in chosen})}

    def measure(self, size: int, until: float, rounds: int = ROUNDS) -> dict[str, Any]:
        """What `build` says of each variant, with the `seconds` of all its turns; or `error`, why there is nothing.

        Args:
            size: of the patches.
            until: when to stop, by `time.monotonic`; the last quarter of the time is for turns only.
            rounds: how often each variant has its turn, if there is time.
        """
        found: dict[str, Any] = {}
        latest, longest = until - (until - time.monotonic()) / 4, 1.0
        for variant in self.chosen:
            found[variant.name] = self._built(variant, size, latest, longest)
            longest = max(longest, found[variant.name].get("warm_up", 0))
            self.say(f"{size}^3 {variant.name}: {told(found[variant.name])}")
        for _ in range(rounds):
            for variant in self.chosen:
                if "seconds" in found[variant.name] and time.monotonic() < until:
                    self._turn(variant, found[variant.name], until)
        for home in self.homes.values():
            with suppress(FailedError):
                home.call(clear)
        return found

    def _built(self, variant: Variant, size: int, latest: float, longest: float) -> dict[str, Any]:
        left = latest - time.monotonic()
        if left < longest:  # a process that is ended takes the variants with it that it has
            return {"error": "left out: no time was left (--minutes)"}
        if not self.homes[variant.home].process.is_alive():
            self.homes[variant.home] = Apart(self.device, self.log)
        try:
            return self.homes[variant.home].call(build, variant, size, self.device, self.small, seconds=left)
        except FailedError as error:
            return {"error": str(error)}

    def _turn(self, variant: Variant, found: dict[str, Any], until: float) -> None:
        # A process that is gone, and one begun since, know nothing of it; what was measured before stays.
        with suppress(FailedError):
            seconds = max(until - time.monotonic(), 0) + 10
            found["seconds"].append(self.homes[variant.home].call(turn, variant.name, self.device, seconds=seconds))

    def __enter__(self) -> Stand:
        return self

    def __exit__(self, *_: object) -> None:
        for home in self.homes.values():
            home.end()


def told(found: Mapping[str, Any]) -> str:
    """What `build` said, in a few words."""
    if "error" in found:
        return str(found["error"])
    return f"{1e3 * median(found['seconds']):.1f} ms a step ({found['warm_up']:.0f} s to get going)"
