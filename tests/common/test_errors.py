from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from scripts.common.errors import UserError, available_memory, last_line, memory_advice, reason

CPU = torch.device("cpu")


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


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"^out of memory with 3 apples \(cpu\); eat less$"),
        (
            RuntimeError("DefaultCPUAllocator: not enough"),
            r"^out of memory with 3 apples \(this machine has .* GiB left",
        ),
        (MemoryError(), r"^out of memory with 3 apples \(this machine has .* GiB left\); eat less$"),
    ],
)
def test_running_out_of_memory_becomes_advice(error: Exception, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught, memory_advice(CPU, lambda: "3 apples", "eat less"):
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_pass_the_advice_unchanged() -> None:
    error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError) as caught, memory_advice(CPU, lambda: "3 apples", "eat less"):
        raise error
    assert caught.value is error and error.__cause__ is None and available_memory() > 0


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
