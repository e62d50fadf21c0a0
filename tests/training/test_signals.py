from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from scripts.training.signals import StopSignal, shield
from tests.helpers import finish, start


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
