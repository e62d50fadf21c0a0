"""Every failed run ends with one clear last line."""

from __future__ import annotations

import sys
import traceback
from types import TracebackType


class UserError(ValueError):
    """Something the user can mend; its text names the culprit, the value and the remedy."""


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first (MONAI wraps whatever a config raises)."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return chain


def last_line(error: BaseException) -> str:
    """One line for `error`: the user error in its chain of causes, else the innermost cause."""
    chain = _chain(error)
    culprit = next((e for e in chain if isinstance(e, UserError)), None)
    if culprit is not None:
        return f"error: {' '.join(str(culprit).split())}"
    lines = [line.strip() for line in str(chain[-1]).splitlines() if line.strip()]
    kind = type(chain[-1]).__name__
    # An error raised in a data-loader worker carries its own traceback; its last line says what happened.
    text = lines[-1] if lines and "worker process" in lines[0] else " ".join(lines)
    text = text.removeprefix("scripts.errors.UserError: ")
    return f"error: {text}" if text != " ".join(lines) else f"error: {kind}: {text}"


def _excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not any(isinstance(e, UserError) for e in _chain(error)):
        traceback.print_exception(kind, error, trace)
    print(last_line(error), file=sys.stderr, flush=True)


def install() -> None:
    """Make uncaught errors end in one line on standard error; tracebacks are kept for what is not the user's."""
    sys.excepthook = _excepthook
