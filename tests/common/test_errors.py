from __future__ import annotations

import subprocess
import sys

import pytest
from torch.utils.data import DataLoader, Dataset

from scripts.common.errors import UserError, last_line, reason


def chained(*errors: Exception) -> Exception:
    """The outermost of errors that cause one another, given outermost first."""
    outer: Exception | None = None
    for error in reversed(errors):
        try:
            raise error from outer
        except Exception as caught:
            outer = caught
    assert outer is not None
    return outer


def test_user_error_is_found_under_what_monai_wraps_around_it() -> None:
    error = chained(RuntimeError("Failed to instantiate\n set debug"), UserError("a.nii.gz: is\n  empty"), OSError("x"))
    assert last_line(error) == "error: a.nii.gz: is empty"


def test_other_errors_show_their_innermost_cause() -> None:
    assert last_line(chained(RuntimeError("Failed to evaluate"), KeyError("lr"))) == "error: KeyError: 'lr'"


def test_an_error_that_says_nothing_is_named() -> None:
    assert last_line(AssertionError()) == "error: AssertionError"
    assert reason(AssertionError()) == "AssertionError" and reason(OSError(28, "No space left")) == "No space left"
    assert reason(ValueError("one\n two")) == "one two" and len(reason(ValueError("x" * 999))) == 160


class _Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise UserError("b.nii.gz: is truncated; copy it again")


def test_errors_in_data_loader_workers_keep_their_text() -> None:
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(_Broken(), num_workers=1)))
    assert last_line(caught.value) == "error: b.nii.gz: is truncated; copy it again"


class _Bare(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise AssertionError


def test_an_error_without_a_text_in_a_worker_is_named() -> None:
    with pytest.raises(AssertionError) as caught:
        next(iter(DataLoader(_Bare(), num_workers=1)))
    assert last_line(caught.value) == "error: AssertionError"


@pytest.mark.parametrize(("kind", "lines"), [("UserError", 1), ("KeyError", 2)])
def test_hook_ends_the_program_with_that_line(kind: str, lines: int) -> None:
    code = f"from scripts.common.errors import *; install(); raise {kind}('what')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    printed = done.stderr.strip().splitlines()
    assert done.returncode == 1 and printed[-1].startswith("error: ") and printed[-1].endswith(("what", "'what'"))
    assert (len(printed) == 1) == (lines == 1)  # a traceback is kept for what is not the user's
