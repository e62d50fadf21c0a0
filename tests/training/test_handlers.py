from __future__ import annotations

from pathlib import Path

import torch
from ignite.engine import Engine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.training.handlers import TrainingLog, Validate
from scripts.training.tensorboard_log import TensorBoardLog
from tests.helpers import scalars


def run_training(folder: Path, epochs: int = 2) -> EventAccumulator:
    names = ("loss", "recons_loss", "p_loss", "adv_loss", "d_loss")
    engine = Engine(lambda e, b: {n: torch.tensor(float(e.state.iteration * i)) for i, n in enumerate(names, 1)})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    log = TensorBoardLog(str(folder))
    TrainingLog(log, optimizer, names, batch_size=3, samples="patches").attach(engine)
    engine.run([0, 0, 0, 0], max_epochs=epochs)
    log.close()
    return scalars(folder)


def test_every_step_and_epoch_is_logged_once(tmp_path: Path) -> None:
    events = run_training(tmp_path)
    recons = events.Scalars("train_iter/recons_loss")
    assert [(e.step, e.value) for e in recons] == [(i, 2.0 * i) for i in range(1, 9)]
    assert [(e.step, e.value) for e in events.Scalars("train_epoch/loss")] == [(1, 2.5), (2, 6.5)]
    assert events.Scalars("train_epoch/learning_rate")[0].value == 0.25
    assert all(0 <= e.value <= 1 for e in events.Scalars("train_epoch/data_wait_share"))
    assert events.Scalars("train_epoch/patches_per_second")[0].value > 0


def test_validation_is_due_first_at_intervals_and_last() -> None:
    ran: list[int] = []

    class Due(Validate):
        def __call__(self, engine) -> None:
            ran.append(engine.state.epoch)

    engine = Engine(lambda e, b: None)
    Due(interval=4).attach(engine)
    engine.run([0], max_epochs=10)
    assert ran == [1, 4, 8, 10]
