from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.training.engine import Progress
from scripts.training.handlers import TrainingLog, Validate
from scripts.training.tensorboard_log import TensorBoardLog
from tests.helpers import scalars, told


def logged_engine(losses: Callable[[int], dict[str, float]]) -> Any:
    """An engine whose steps tell `losses` of their iteration."""

    def step(engine: Any, batch: Any) -> None:
        engine.progress.losses = told(**losses(engine.state.iteration))

    engine: Any = Engine(step)
    engine.progress = Progress()
    return engine


def run_training(folder: Path, epochs: int = 2) -> EventAccumulator:
    names = ("loss", "recons_loss", "p_loss", "adv_loss", "d_loss")
    engine = logged_engine(lambda step: {name: float(step * i) for i, name in enumerate(names, 1)})
    engine.weights = {"recons_loss": 1, "p_loss": 0.5, "adv_loss": 0, "kl_loss": 1e-7}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    log = TensorBoardLog(str(folder))
    TrainingLog(log, optimizer, names, batch_size=3, samples="patches").attach(engine)
    engine.run([0, 0, 0, 0], max_epochs=epochs)
    log.close()
    return scalars(folder)


def test_every_step_and_epoch_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    events = run_training(tmp_path)
    # 1 x 2 of 1 x 2 + 0.5 x 3; adv_loss has no weight, kl_loss is not there
    shares = [events.Scalars(f"train_epoch/share_{name}")[1].value for name in ("recons_loss", "p_loss")]
    assert (
        shares == pytest.approx([2 / 3.5, 1.5 / 3.5]) and "train_epoch/share_adv_loss" not in events.Tags()["scalars"]
    )
    assert "epoch 2/2: of what is minimised, recons_loss 57%, p_loss 43%" in caplog.text
    recons = events.Scalars("train_iter/recons_loss")
    assert [(e.step, e.value) for e in recons] == [(i, 2.0 * i) for i in range(1, 9)]
    assert [(e.step, e.value) for e in events.Scalars("train_epoch/loss")] == [(1, 2.5), (2, 6.5)]
    assert events.Scalars("train_epoch/learning_rate")[0].value == 0.25
    assert all(0 <= e.value <= 1 for e in events.Scalars("train_epoch/data_wait_share"))
    assert events.Scalars("train_epoch/patches_per_second")[0].value > 0


@pytest.mark.parametrize("report_seconds", [0.0, 1e9])
def test_a_loss_that_jumps_is_warned_of_once_an_epoch(
    report_seconds: float, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.training.handlers.REPORT_SECONDS", report_seconds)
    # The first jump comes before there is a median; NaN is for the guard; "other" is not shown, so not watched.
    jumps = {(5, "loss"): 99.0, (31, "p_loss"): 10.5, (33, "loss"): 50.0, (35, "loss"): math.nan, (70, "loss"): 30.0}
    jumps |= {(25, "other"): 1e6, (71, "p_loss"): 9.5}
    names = ("loss", "p_loss", "other")
    engine = logged_engine(lambda step: {name: jumps.get((step, name), 1.0) for name in names})
    engine.weights = {}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    TrainingLog(TensorBoardLog(str(tmp_path)), optimizer, names[:2]).attach(engine)
    engine.run([0] * 40, max_epochs=2)
    told = [r.getMessage() for r in caplog.records if "median" in r.getMessage()]
    assert told == [
        "step 31: p_loss is 10.5, more than 10 times its median over the last 30 steps, 1",
        "step 70: loss is 30, more than 10 times its median over the last 68 steps, 1",
    ]


def test_validation_is_due_first_at_intervals_and_last() -> None:
    ran: list[int] = []

    class Due(Validate):
        def __call__(self, engine) -> None:
            ran.append(engine.state.epoch)

    engine = Engine(lambda e, b: None)
    Due(interval=4).attach(engine)
    engine.run([0], max_epochs=10)
    assert ran == [1, 4, 8, 10]


@pytest.mark.parametrize(
    ("losses", "told"), [([3, 1, 2, 2, 2, 2], "epoch 20 (loss 1.0000) for 40 epochs"), ([4, 3, 2, 1, 2, 2], "")]
)
def test_a_training_that_is_stuck_says_so(losses: list[float], told: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    validations: list[Any] = [{"epoch": 10 * i, "loss": float(loss)} for i, loss in enumerate(losses, 1)]
    engine = SimpleNamespace(
        progress=Progress(validations=validations), best_by="loss", state=SimpleNamespace(epoch=60)
    )
    Validate(interval=10)._say_if_stuck(engine)
    assert told in caplog.text and bool(caplog.text) == bool(told)
