"""A process that calls functions for another one, so that neither its errors nor its switches are the other's."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from scripts.common.errors import last_line


class FailedError(RuntimeError):
    """A call that gave no result; its text says why, in one line."""


class Apart:
    """Calls functions one after the other in a process of its own, whose globals stay from one to the next.

    A GPU's errors may leave a process without it, and PyTorch keeps one allocator, one set of switches and one choice
    of cuDNN's algorithms in a process.

    Args:
        device: "cpu" or "cuda", where the functions compute.
        log: what they print goes there.
    """

    def __init__(self, device: str, log: Path) -> None:
        # A process that was forked has no GPU if what it was forked from had one; what is spawned imports all anew.
        context: Any = multiprocessing.get_context("spawn" if device == "cuda" else "forkserver")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(log)))
        self.process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any, seconds: float = 600) -> Any:
        """The result of a function of a module, called with `arguments`.

        Raises:
            FailedError: where it raised an error or lost its process; or took longer than `seconds`, which ends it.
        """
        try:
            self.pipe.send((function, arguments))
            if not self.pipe.poll(max(seconds, 0)):
                self.end()
                raise FailedError(f"took longer than the {max(seconds, 0):.0f} s left")
            result = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(10)
            raise FailedError(f"its process is gone (exit status {self.process.exitcode})") from error
        if isinstance(result, FailedError):
            raise result
        return result

    def end(self) -> None:
        """End the process, and those that it has started."""
        if self.process.is_alive():
            self.process.kill()  # it may not lead a group yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.pipe.close()

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def _serve(pipe: Connection, log: str) -> None:
    os.setsid()  # so that its children can be ended with it
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = pipe.recv()
            pipe.send(_result(function, arguments))
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()


def _result(function: Callable[..., Any], arguments: tuple) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return FailedError(last_line(error).removeprefix("error: ")[:200])
