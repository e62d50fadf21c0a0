from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.autoencoder import write_tensors
from scripts.errors import UserError
from scripts.handlers import TensorBoardLog, TrainingLog, Validate, save_comparison, three_planes


def run_training(folder: Path, epochs: int = 2) -> EventAccumulator:
    names = ("loss", "recons_loss", "p_loss", "adv_loss", "d_loss")
    engine = Engine(lambda e, b: {n: torch.tensor(float(e.state.iteration * i)) for i, n in enumerate(names, 1)})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.25)
    log = TensorBoardLog(str(folder))
    TrainingLog(log, optimizer, batch_size=3).attach(engine)
    engine.run([0, 0, 0, 0], max_epochs=epochs)
    log.close()
    return EventAccumulator(str(folder)).Reload()


def test_every_step_and_epoch_is_logged_once(tmp_path: Path) -> None:
    events = run_training(tmp_path)
    recons = events.Scalars("train_iter/recons_loss")
    assert [(e.step, e.value) for e in recons] == [(i, 2.0 * i) for i in range(1, 9)]
    assert [(e.step, e.value) for e in events.Scalars("train_epoch/loss")] == [(1, 2.5), (2, 6.5)]
    assert events.Scalars("train_epoch/learning_rate")[0].value == 0.25
    assert all(0 <= e.value <= 1 for e in events.Scalars("train_epoch/data_wait_share"))
    assert events.Scalars("train_epoch/patches_per_second")[0].value > 0


def log_steps(log: TensorBoardLog, *steps: int) -> None:
    for step in steps:
        log.add_step(step, 0.5, {"loss": torch.tensor(float(step))})


def test_resuming_cuts_the_log_back_to_the_checkpoint(tmp_path: Path) -> None:
    first = TensorBoardLog(str(tmp_path))
    log_steps(first, 1, 2, 3)
    saved = first.state_dict()
    assert saved["sums"] == {"loss": 6.0} and saved["steps"] == 3
    log_steps(first, 4, 5)
    first.close()
    killed = TensorBoardLog(str(tmp_path))  # went on from the same checkpoint, and was killed before its own
    killed.load_state_dict(saved)
    log_steps(killed, 4)
    killed.close()
    other = TensorBoardLog(str(tmp_path))  # of another training in the same folder
    other.writing().__enter__().flush()
    last = TensorBoardLog(str(tmp_path))
    last.load_state_dict(saved)
    log_steps(last, 4, 5, 6)
    assert last.epoch_means() == {"loss": 21 / 6}
    last.close()
    other.close()
    mine = [p for p in tmp_path.iterdir() if p.name.endswith(first.training)]
    assert sorted("superseded" in p.name for p in mine) == [False, False, True]
    steps: list[int] = []
    for path in sorted(p for p in mine if "tfevents" in p.name):
        events = EventAccumulator(str(path)).Reload()
        steps += [event.step for event in events.Scalars("train_iter/loss")]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(list(tmp_path.iterdir())) == 4


def test_a_step_that_is_not_finite_is_logged_but_not_averaged(tmp_path: Path) -> None:
    log = TensorBoardLog(str(tmp_path))
    log_steps(log, 1, 3)
    log.add_step(4, 0.5, {"loss": torch.tensor(torch.nan)})
    assert log.epoch_means() == {"loss": 2.0} and log.epoch_means() == {}
    log.close()


def test_a_full_disk_is_named(small_disk: Path) -> None:
    before = b"precious"
    (small_disk / "w.pt").write_bytes(before)
    (small_disk / "filler").write_bytes(b"0" * (900 << 10))
    log = TensorBoardLog(str(small_disk / "log"))
    with pytest.raises(UserError, match=r"log: cannot be written \(No space left on device\); free space or change tf"):
        for start in range(0, 20000, 500):
            log_steps(log, *range(start, start + 500))
            log.state_dict()
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left on device\); free space or change"):
        save_comparison(*[np.random.default_rng(0).random((20, 24, 28))] * 2, (1, 1, 2), small_disk / "a.png", "test")
    with pytest.raises(UserError, match=r"w\.pt: cannot be written .*; free space or choose another model_dir"):
        write_tensors({"weights": torch.zeros(1 << 19)}, small_disk / "w.pt")
    assert (small_disk / "w.pt").read_bytes() == before and not list(small_disk.glob(".part*"))


def test_validation_is_due_first_at_intervals_and_last() -> None:
    ran: list[int] = []

    class Due(Validate):
        def __call__(self, engine) -> None:
            ran.append(engine.state.epoch)

    engine = Engine(lambda e, b: None)
    Due(interval=4).attach(engine)
    engine.run([0], max_epochs=10)
    assert ran == [1, 4, 8, 10]


def test_planes_stand_upright() -> None:
    volume = np.zeros((6, 8, 10))
    volume[:, :, -1] = 1.0  # top of the head
    volume[:, -1, :] = 0.5  # front
    picture = three_planes(volume)
    assert picture.shape == (10, 8 + 6 + 6)
    assert picture[0, :7] == pytest.approx(1) and picture[0, 8:14] == pytest.approx(1)  # top row of sagittal, coronal
    assert picture[0, 14:] == pytest.approx(0.5) and picture[1:, 14:].max() == 0  # front is up in the axial plane


def test_comparison_is_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    original = rng.random((20, 24, 28))
    save_comparison(original, original + 0.01, (1, 1, 2), tmp_path / "a.png", "test")
    picture = imread(tmp_path / "a.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.1
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
