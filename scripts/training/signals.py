"""Ending a training between two steps, on all ranks alike, when the system or the user asks for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from scripts.common.ranks import TIMEOUT

STATUS = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run the same command again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
IMPATIENCE = 2.0  # seconds after which a second Ctrl-C ends the run at once; torchrun repeats the first by itself


def shield(worker_id: int) -> None:
    """For data-loader workers: outlive signals to the whole job (Slurm's), so that the main process ends its step.

    SIGTERM of the parent, by which PyTorch ends a worker, still does.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent: Any = multiprocessing.parent_process()  # os.getppid() would be the server, where a fork server is used

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid and parent.is_alive():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGUSR1 while it is entered, instead of dying of them; ranks leave it together."""

    def __init__(self) -> None:
        self.received, self.flag = 0, torch.tensor(0)
        self.work: Any = None

    def __enter__(self) -> StopSignal:
        self.earlier = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Its own group, on the CPU: asking costs no time on the GPU, and disturbs no gradient on its way.
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if dist.is_initialized() else None
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.group is not None:
                if self.work is not None:
                    self.work.wait()
                # All leave together: Slurm may kill the rank that still saves when another has ended with `STATUS`.
                dist.barrier(group=self.group)
        finally:
            self.work = None
            for number, handler in self.earlier.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > IMPATIENCE:
            raise KeyboardInterrupt

    def agreed(self) -> int:
        """To be called once a step on every rank: the number of a signal that any of them got, or 0.

        With several ranks the answer is one step old, so that no rank waits for it.
        """
        if self.group is None:
            return self.received
        answer = 0
        if self.work is not None:
            self.work.wait()
            answer = int(self.flag)
        self.flag = torch.tensor(self.received)
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return answer
