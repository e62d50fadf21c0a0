"""Every failed run ends with one clear last line."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType


class UserError(ValueError):
    """Something the user can mend; its text names the culprit, the value and the remedy."""


def reason(error: BaseException, limit: int = 160) -> str:
    """What an error says, in one line of at most `limit` characters; its type where it says nothing."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())[:limit] or type(error).__name__


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first (MONAI wraps whatever a config raises)."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        if type(current).__name__ not in ("_RemoteTraceback", "RemoteTraceback"):  # a worker's stack, told as its cause
            chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return chain


def last_line(error: BaseException) -> str:
    """One line for `error`: the user error in its chain of causes, else the innermost cause."""
    chain = _chain(error)
    culprit = next((e for e in chain if isinstance(e, UserError)), chain[-1])
    text = str(culprit)
    if "DataLoader worker process" in text:  # it carries the worker's traceback, which ends in "Error: what it says"
        ending = text.strip().splitlines()[-1]
        text = ending.partition("Error: ")[2] or ending
    kind, text = type(culprit).__name__, " ".join(text.split())
    if isinstance(culprit, UserError) or text == kind:
        return f"error: {text}"
    return f"error: {kind}: {text}" if text else f"error: {kind}"


def _under_torchrun(error: BaseException) -> None:
    """Tell torchrun the error, and leave the last word to the rank that failed first: torchrun ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if any("gloo/" in str(e) or "NCCL" in str(e) for e in _chain(error)):  # the connection to a rank that is gone
        time.sleep(20)
    elif os.environ["RANK"] != "0":  # an error that all ranks meet is told once
        time.sleep(3)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"py_callstack": last_line(error), "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": last_line(error), "extraInfo": message}}))


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if "RANK" in os.environ:
        _under_torchrun(error)
    sys.stdout.flush()  # where both go to one file, the error is to come last
    if not any(isinstance(e, UserError) for e in _chain(error)):
        traceback.print_exception(kind, error, trace)
    print(last_line(error), file=sys.stderr, flush=True)


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    # At once, so that it does not come after the last line: the main thread meets the same error soon.
    sys.stderr.write(f"in a thread: {args.exc_type.__name__}: {args.exc_value}\n")


def install() -> None:
    """Make uncaught errors end in one line on standard error; tracebacks are kept for what is not the user's.

    What is printed may hold file names that are no text: their bytes appear as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = _excepthook
    threading.excepthook = _thread_excepthook
