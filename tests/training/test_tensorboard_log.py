from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.common.errors import UserError
from scripts.measure.pictures import save_comparison
from scripts.networks.weights import write_tensors
from scripts.training.tensorboard_log import TensorBoardLog
from tests.helpers import told


def log_steps(log: TensorBoardLog, *steps: int) -> None:
    for step in steps:
        log.add_step(step, 0.5, told(loss=float(step)))


def test_resuming_cuts_the_log_back_to_the_checkpoint(tmp_path: Path) -> None:
    first = TensorBoardLog(str(tmp_path))
    log_steps(first, 1, 2, 3)
    saved = first.state_dict()
    assert saved["sums"] == {"loss": 6.0} and saved["counts"] == {"loss": 3}
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
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]  # files of one second are in no order
    assert len(list(tmp_path.iterdir())) == 4


def test_a_step_that_is_not_finite_is_logged_but_not_averaged(tmp_path: Path) -> None:
    log = TensorBoardLog(str(tmp_path))
    log_steps(log, 1, 3)
    log.add_step(4, 0.5, told(loss=torch.nan))
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
    with pytest.raises(UserError, match=r"a\.png: cannot be written \(No space left on device\); free space or choose"):
        save_comparison(*[np.random.default_rng(0).random((20, 24, 28))] * 2, (1, 1, 2), small_disk / "a.png", "test")
    with pytest.raises(UserError, match=r"w\.pt: cannot be written .*; free space or choose another model_dir"):
        write_tensors({"weights": torch.zeros(1 << 19)}, small_disk / "w.pt")
    assert (small_disk / "w.pt").read_bytes() == before and not list(small_disk.glob(".part*"))


def test_means_are_over_the_steps_that_have_a_loss(tmp_path: Path) -> None:
    log = TensorBoardLog(str(tmp_path))
    log.add_step(1, 0.5, told(loss=1.0))
    log.add_step(2, 0.5, told(loss=3.0, adv_loss=5.0))
    resumed = TensorBoardLog(str(tmp_path))
    resumed.load_state_dict(log.state_dict())
    assert log.epoch_means() == resumed.epoch_means() == {"loss": 2.0, "adv_loss": 5.0}
    old = {"training": resumed.training, "sums": {"loss": 6.0}, "steps": 3, "sizes": {}}  # of version 0.5
    resumed.load_state_dict(old)
    assert resumed.epoch_means() == {"loss": 2.0}
