from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch.utils.data import DataLoader, Dataset

from scripts.common import ranks
from scripts.training.model_folder import ModelFolder
from scripts.training.signals import StopSignal, shield
from tests.helpers import finish, start, start_ranks
from tests.training.toy import toy_training


class Numbers(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return os.getpid() if index else 0


def test_a_signal_is_noted_and_what_was_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignal() as stop:
        assert stop.agreed() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received == stop.agreed() == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert stop.agreed() == signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ranks_that_ask_each_other_wait_as_long_as_for_anything_else() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with StopSignal() as stop:
            assert stop.group._get_backend(torch.device("cpu")).options._timeout == ranks.TIMEOUT  # type: ignore[union-attr]
    finally:
        dist.destroy_process_group()


def stop_with_a_slow_save(folder: Path) -> None:
    ranks.join()
    me, save = idist.get_rank(), ModelFolder.save_checkpoint

    def slow(*arguments: Any) -> None:
        time.sleep(1)
        save(*arguments)
        print("saved", flush=True)

    ModelFolder.save_checkpoint = slow  # type: ignore[method-assign]
    trainer = toy_training(folder, rank=me, ranks=2)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), signal.SIGTERM))
    try:
        trainer.run()
    finally:
        print(f"rank {me} leaves", flush=True)


def test_ranks_that_are_stopped_leave_when_the_checkpoint_is_written(tmp_path: Path) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(2, stop_with_a_slow_save, tmp_path, log=log), log, status=75)
    assert printed.count("saved") == 1
    assert printed.index("saved") < min(printed.index(f"rank {rank} leaves") for rank in (0, 1))


def load(method: str) -> None:
    """Read with two shielded workers that outlive a SIGTERM which is not their parent's, and end with the loader."""
    loader = DataLoader(Numbers(), num_workers=2, worker_init_fn=shield, multiprocessing_context=method)
    batches = iter(loader)
    pids = {int(n) for n in torch.cat([next(batches) for _ in range(4)])} - {0}
    for pid in pids:
        os.system(f"kill -TERM {pid}")  # from a process that is not the parent
    for pid in pids:
        os.kill(pid, 0)  # still there
    del batches
    for pid in pids:
        with pytest.raises(OSError, match="No such process"):
            os.kill(pid, 0)
    print("ended", flush=True)


@pytest.mark.parametrize("method", ["fork", "forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_outlive_signals_and_end_with_their_parent(method: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    running = start(load, method, log=log)
    running.join(90)
    if running.exitcode is None:
        running.kill()
    assert "ended" in finish([running], log)
