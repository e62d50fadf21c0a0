"""What a step told is copied without waiting, and read when the next step is on its way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.training.late import LateLosses
from scripts.training.tensorboard_log import TensorBoardLog
from tests.training.toy import toy_training


class OnCuda(torch.Tensor):
    """On the CPU, says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]

    def to(self, device: Any, non_blocking: bool = False) -> torch.Tensor:  # type: ignore[override]
        assert non_blocking, "the host waits for the device"
        return self.as_subclass(torch.Tensor)


class Event:
    """Of CUDA, which comes when it is said to."""

    made: list[Event] = []

    def __init__(self, **options: Any) -> None:
        self.done, self.recorded, self.waited = False, False, 0
        self.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        assert self.recorded
        self.waited += 1


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "made", [])
    return Event.made


def on_cuda(*values: float) -> LateLosses:
    tensor = torch.tensor(values).as_subclass(OnCuda)
    return LateLosses([f"loss_{i}" for i in range(len(values))], tensor, 2 * tensor)


def test_means_and_own_losses_by_name() -> None:
    losses = LateLosses(["a", "b"], torch.tensor([1.0, 2.0]), torch.tensor([3.0, math.nan]))
    assert losses.there and losses.means() == {"a": 1.0, "b": 2.0}
    own = losses.own()
    assert own["a"] == 3.0 and math.isnan(own["b"]) and list(own) == ["a", "b"]


def test_nothing_waits_until_they_are_read(events: list[Event]) -> None:
    losses = on_cuda(1.0, 2.0)
    (event,) = events
    assert event.recorded and not losses.there and event.waited == 0
    assert losses.means() == {"loss_0": 1.0, "loss_1": 2.0} and losses.own() == {"loss_0": 2.0, "loss_1": 4.0}
    assert event.waited == 2
    event.done = True
    assert losses.there


def test_the_log_takes_what_has_come_and_waits_only_where_asked(events: list[Event], tmp_path: Path) -> None:
    log = TensorBoardLog(str(tmp_path))
    for step in (1, 2, 3):
        log.add_step(step, 0.5, on_cuda(float(step)))
    assert log.flush(wait=False) == {}
    events[0].done = events[2].done = True  # the third cannot be, really; steps are written in their order
    assert log.flush(wait=False) == {"loss_0": 1.0} and [step for step, _ in log.written] == [1]
    assert events[1].waited == events[2].waited == 0
    assert log.flush() == {"loss_0": 3.0} and [step for step, _ in log.written] == [2, 3]
    assert log.epoch_means() == {"loss_0": 2.0}
    log.close()


def test_each_step_is_looked_at_when_the_next_has_been_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_training(tmp_path, epochs=1)
    monkeypatch.setattr("scripts.training.handlers.REPORT_SECONDS", 0.0)  # each step is shown, too
    made: list[LateLosses] = []
    seen: list[tuple[int, int]] = []  # the step at hand, and the one that is read
    make, read = LateLosses.__init__, LateLosses._read

    def noted(self: LateLosses, *arguments: Any) -> None:
        make(self, *arguments)
        made.append(self)

    def watched(self: LateLosses, row: int) -> dict[str, float]:
        seen.append((len(made), made.index(self) + 1))
        return read(self, row)

    monkeypatch.setattr(LateLosses, "__init__", noted)
    monkeypatch.setattr(LateLosses, "_read", watched)
    monkeypatch.setattr(LateLosses, "there", property(lambda self: self is not made[-1]))  # as it is on a GPU
    trainer.run()
    assert len(made) == 6 and {step for _, step in seen} == {1, 2, 3, 4, 5, 6}
    assert [step for now, step in seen if now == step < 6] == []  # only the last one, at the end of the epoch
