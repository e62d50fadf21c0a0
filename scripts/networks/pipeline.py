"""A device computes one window while the host takes in the one before and brings the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Stored = TypeVar("Stored")


def pipelined(
    items: Sequence[Item],
    load: Callable[[Item], Loaded],
    compute: Callable[[Loaded], Computed],
    store: Callable[[Item, Computed], Stored | None],
    device: torch.device,
) -> Generator[Stored, None, None]:
    """What `store(item, compute(load(item)))` gives for each item, in order, where it is not None.

    `compute` runs in the caller's thread, and so in its autocast and its inference mode. Meanwhile another thread,
    which ends with this generator, stores the item before and loads the next one; so two items are held as they were
    loaded, and two as they were computed. An error in any of these is raised here.

    Args:
        items: one or more.
        load: gives what `compute` takes.
        compute: may return before `device` is done.
        store: waits until it is.
        device: where is computed. On a GPU the thread works in the caller's stream.
    """

    def turn(before: tuple[Item, Computed] | None, following: Item | None) -> tuple[Any, Stored | None]:
        loaded = None if following is None else load(following)
        return loaded, None if before is None else store(*before)

    before = None
    with _thread(device) as thread:
        job = thread.submit(turn, None, items[0])
        for item, following in zip(items, [*items[1:], None], strict=True):
            loaded, stored = job.result()
            job = thread.submit(turn, before, following)
            before = item, compute(loaded)
            del loaded  # lest three be held
            if stored is not None:
                yield stored
            del stored  # likewise
        for last in (job, thread.submit(turn, before, None)):
            if (stored := last.result()[1]) is not None:
                yield stored


def _thread(device: torch.device) -> ThreadPoolExecutor:
    if device.type != "cuda":
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(1, initializer=torch.cuda.set_stream, initargs=(torch.cuda.current_stream(device),))


def sent(part: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A part of a tensor, on `device`; nobody waits until it is there."""
    if device.type == "cuda" and not part.is_cuda:
        part = part.contiguous().pin_memory()  # from other memory a GPU copies only when all before is done
    return part.to(device, non_blocking=True)


class Arriving:
    """What a network gives, one tensor or several, on its way to the host.

    From a GPU all travel in one copy, which begins when they are computed, and nobody waits for it but `tensors`.
    """

    def __init__(self, outputs: torch.Tensor | Sequence[torch.Tensor]) -> None:
        several = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        self._outputs = [output.float() for output in several]
        self._there: torch.cuda.Event | None = None
        if (device := self._outputs[0].device).type == "cuda":
            self._shapes = [output.shape for output in self._outputs]
            packed = torch.cat([output.flatten() for output in self._outputs])
            self._outputs = [packed.to("cpu", non_blocking=True)]  # into pinned memory
            self._there = torch.cuda.Event(blocking=True)
            self._there.record(torch.cuda.current_stream(device))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors, float32 on the CPU, once they are there."""
        if self._there is None:
            return [output.cpu() for output in self._outputs]
        self._there.synchronize()
        parts = self._outputs[0].split([math.prod(shape) for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
