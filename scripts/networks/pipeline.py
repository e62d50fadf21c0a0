"""A device computes one window while the host takes in those before and brings the next."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Stored = TypeVar("Stored")

# Items that are loaded before they are computed, and computed before they are stored. More than one, since some take
# longer: the first of a row of windows is stored in memory that the system has yet to hand out, page by page.
AHEAD = 4


def pipelined(
    items: Sequence[Item],
    load: Callable[[Item], Loaded],
    compute: Callable[[Loaded], Computed],
    store: Callable[[Item, Computed], Stored | None],
    device: torch.device,
) -> Generator[Stored, None, None]:
    """What `store(item, compute(load(item)))` gives for each item, in order, where it is not None.

    `compute` runs in the caller's thread, and so in its autocast and its inference mode. Meanwhile another thread,
    which ends with this generator, loads up to `AHEAD` next items and stores up to as many before, so that neither
    waits for the other where one takes longer now and then. An error in any of these is raised here.

    Args:
        items: one or more.
        load: gives what `compute` takes.
        compute: may return before `device` is done.
        store: waits until it is.
        device: where is computed. On a GPU the thread works in the caller's stream.
    """
    following = iter(items)
    stores: deque[Future[Stored | None]] = deque()
    with _thread(device) as thread:
        loads = deque(thread.submit(load, item) for item in islice(following, AHEAD))
        for item in items:
            if len(stores) == AHEAD and (stored := stores.popleft().result()) is not None:
                yield stored
                del stored  # lest it be held until the next one
            computed = compute(loads.popleft().result())
            loads.extend(thread.submit(load, later) for later in islice(following, 1))
            stores.append(thread.submit(store, item, computed))
            del computed  # likewise
        for last in stores:
            if (stored := last.result()) is not None:
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
