"""Computing beside a thread that loads and stores: what may happen at once, and that it all ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch

from scripts.networks.pipeline import AHEAD, Arriving, pipelined, sent

CPU = torch.device("cpu")
WAIT = 60  # seconds, after which something has not happened


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Those that a test leaves behind are its failure."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_item_is_loaded_computed_and_stored_in_order(count: int) -> None:
    places: dict[str, set[threading.Thread]] = {"load": set(), "compute": set(), "store": set()}

    def noted(step: str, value: Any) -> Any:
        places[step].add(threading.current_thread())
        return value

    found = pipelined(
        range(count),
        lambda item: noted("load", [item]),
        lambda loaded: noted("compute", [*loaded, "computed"]),
        lambda item, computed: noted("store", (item, computed) if item % 3 != 1 else None),
        CPU,
    )
    assert list(found) == [(item, [item, "computed"]) for item in range(count) if item % 3 != 1]
    assert places["compute"] == {threading.current_thread()} and len(places["store"]) == 1
    assert places["load"] == places["store"] != places["compute"]


def test_one_item_is_computed_while_its_neighbours_are_stored_and_loaded() -> None:
    """Each waits for others to have begun, which would take for ever one after the other."""
    begun = {step: [threading.Event() for _ in range(9)] for step in ("load", "compute", "store")}
    alone: list[tuple[str, int]] = []

    def step(name: str, item: int, *neighbours: tuple[str, int]) -> int:
        begun[name][item].set()
        for other, place in neighbours:
            if 0 <= place < 9 and not begun[other][place].wait(WAIT):
                alone.append((name, item))
        return item

    stored = pipelined(
        range(9),
        lambda item: step("load", item, ("compute", item + 1 - AHEAD)),
        lambda item: step("compute", item, ("load", item + 1), ("store", item - 1)),
        lambda item, _: step("store", item, ("compute", item + 1)),
        CPU,
    )
    assert list(stored) == [*range(9)] and alone == []


def test_so_many_items_are_held_as_loaded_and_as_computed_and_results_come_as_much_later() -> None:
    counts = {"load": 0, "compute": 0, "store": 0}
    held: list[tuple[int, int]] = []

    def step(name: str, item: int) -> int:
        counts[name] += 1
        held.append((counts["load"] - counts["compute"], counts["compute"] - counts["store"]))
        return item

    for item in pipelined(
        range(19), lambda i: step("load", i), lambda i: step("compute", i), lambda i, _: step("store", i), CPU
    ):
        assert counts["compute"] == min(item + AHEAD, 19)  # the device has work while the caller has the result
    assert max(loaded for loaded, _ in held) <= AHEAD and max(computed for _, computed in held) <= AHEAD


def test_one_that_takes_longer_holds_up_nobody() -> None:
    """The first is not stored until so many are computed, nor is a later one computed until as many are loaded."""
    first, last = threading.Event(), threading.Event()

    def compute(item: int) -> int:
        if item == AHEAD - 1:
            first.set()
        return last.wait(WAIT) and item if item == AHEAD else item

    def load(item: int) -> int:
        if item == 2 * AHEAD - 1:
            last.set()
        return item

    assert list(pipelined(range(19), load, compute, lambda i, _: first.wait(WAIT) and i, CPU)) == [*range(19)]


@pytest.mark.parametrize("where", ["load", "compute", "store"])
@pytest.mark.parametrize("when", [0, 3, 5])
def test_errors_are_raised_as_they_are(where: str, when: int) -> None:
    error, yielded = torch.OutOfMemoryError("CUDA out of memory"), []

    def step(name: str, item: int) -> int:
        if (name, item) == (where, when):
            raise error
        return item

    with pytest.raises(torch.OutOfMemoryError) as raised:
        for item in pipelined(
            range(6), lambda i: step("load", i), lambda i: step("compute", i), lambda i, _: step("store", i), CPU
        ):
            yielded.append(item)
    assert raised.value is error and yielded == [*range(len(yielded))] and len(yielded) <= when


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_who_stops_early_leaves_nothing_running(taken: int) -> None:
    stored: list[int] = []
    found = pipelined(range(100), int, int, lambda item, _: stored.append(item) or item, CPU)  # type: ignore[func-returns-value]
    with closing(found):
        assert [next(found) for _ in range(taken)] == [*range(taken)]
    assert len(stored) <= taken + AHEAD
    for item in pipelined(range(100), int, int, lambda item, _: item, CPU):  # closed by its loop
        if item == taken:
            break


def test_outputs_arrive_as_float32() -> None:
    outputs = (torch.rand(1, 2, 3).half(), torch.rand(4, 5).double(), torch.rand(1))
    for one, other in zip(Arriving(outputs).tensors(), outputs, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())
    assert torch.equal(Arriving(outputs[0]).tensors()[0], outputs[0].float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_gpu_is_sent_to_and_fetched_from_without_waiting() -> None:
    device, part = torch.device("cuda"), torch.randint(-1000, 1000, (1, 1, 40, 50, 60), dtype=torch.int16)[..., 3:40]
    arriving = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for factor in range(3):
            there = sent(part, device) * factor
            arriving.append(Arriving((there.half(), there[..., :5], there.float())))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for factor, outputs in enumerate(arriving):
        wanted = part * factor
        for one, other in zip(outputs.tensors(), (wanted.half(), wanted[..., :5], wanted), strict=True):
            assert one.device.type == "cpu" and torch.equal(one, other.float())
