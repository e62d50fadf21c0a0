from __future__ import annotations

import pytest

from scripts.common.errors import UserError
from scripts.data.faults import FolderError, attempt, first_of


def failing(problem: BaseException) -> str:
    def read() -> None:
        raise problem

    return attempt({"image": "/a.nii.gz"}, read)[1]


def test_whatever_a_file_raises_is_told_in_one_line_that_names_it() -> None:
    assert (
        failing(OSError(2, "No such file or directory"))
        == "/a.nii.gz: cannot be read any more (No such file or directory)"
    )
    assert failing(UserError("/a.nii.gz: is\n empty")) == "/a.nii.gz: is empty"
    assert failing(TypeError()) == "/a.nii.gz: cannot be read any more (TypeError)"
    assert failing(MemoryError()) == "/a.nii.gz: cannot be read any more (MemoryError)"
    assert attempt({"image": "/a.nii.gz"}, lambda: 3) == (3, "")


def test_what_all_volumes_meet_is_no_fault_of_one() -> None:
    with pytest.raises(FolderError, match="disk"):
        failing(FolderError("the disk is full"))
    with pytest.raises(KeyboardInterrupt):
        failing(KeyboardInterrupt())


def test_several_faults_are_told_by_their_number() -> None:
    assert first_of(["a"]) == "a" and first_of(["a", "b"], of_volumes=False) == "a (1 more)"
    assert first_of(["a", "b", "c"]) == "a (2 more; python -m scripts.datalist check lists them all)"
