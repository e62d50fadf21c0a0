from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts.common.errors import UserError
from scripts.training.schedule import LearningRate, PatchCurriculum, adam_eps, hyperparameters


def test_warmup_is_the_references_rule() -> None:
    warmup = LearningRate([10, 20], [0.01, 0.1])
    assert [warmup(e) for e in (0, 9, 10, 19, 20, 149)] == [0.01, 0.01, 0.1, 0.1, 1.0, 1.0]
    assert LearningRate([], [])(0) == 1.0
    with pytest.raises(UserError, match="warmup_epochs"):
        LearningRate([20, 10], [0.01, 0.1])


def test_the_rate_falls_in_a_line_over_the_last_share() -> None:
    rate = LearningRate([2], [0.1], decay=0.5, max_epochs=8)
    assert [rate(epoch) for epoch in range(9)] == [0.1, 0.1, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert LearningRate([], [], decay=1, max_epochs=4)(1) == 0.75 and LearningRate([], [], 0, 4)(4) == 1.0
    for decay in (-0.1, 1.1, True, "0.5", float("nan")):
        with pytest.raises(UserError, match=r"lr_decay is .*; use a share of the training, from 0 to 1"):
            LearningRate([], [], decay)  # type: ignore[arg-type]


def test_a_patch_size_is_a_function_of_the_epoch_and_of_how_many_there_are() -> None:
    small, middle, large = [32, 32, 32], [64, 64, 32], [96, 96, 64]
    sizes = PatchCurriculum([[0.3, small], [0.7, middle]], large, max_epochs=10)
    assert [sizes(epoch) for epoch in range(1, 11)] == [small] * 3 + [middle] * 4 + [large] * 3
    assert PatchCurriculum([[0.29, small]], large, 100)(29) == small  # 0.29 * 100 is below 29 in floating point
    assert PatchCurriculum([[0.29, small]], large, 100)(30) == large
    assert (sizes.shrinkage(1), sizes.shrinkage(4), sizes.shrinkage(8)) == (18.0, 4.5, 1.0)
    assert [size for _, size in sizes.sizes()] == [small, middle, large]
    for none in (None, []):
        assert PatchCurriculum(none, large, 10)(1) == large and PatchCurriculum(none, large, 10).shrinkage(1) == 1


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (0.5, r"patch_curriculum is 0.5; use pairs of a share and a size, e.g. \[\[0.5, \[64, 64, 64\]\]\]"),
        ([0.5, [64, 64, 64]], "use pairs of a share and a size"),
        ([[0.5, [64, 64, 64], 3]], "use pairs of a share and a size"),
        ([[1.5, [64, 64, 64]]], "patch_curriculum is 1.5; use a share of the training, from 0 to 1"),
        ([[float("nan"), [64, 64, 64]]], "patch_curriculum is nan; use a share"),
        ([["half", [64, 64, 64]]], "patch_curriculum is 'half'; use a share"),
        ([[0.5, [32] * 3], [0.3, [64] * 3]], r"patch_curriculum has the shares \[0.5, 0.3\], which must ascend"),
        ([[0.5, [32] * 3], [0.5, [64] * 3]], "which must ascend; put them in order"),
    ],
)
def test_a_curriculum_that_is_none_is_refused(stages: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PatchCurriculum(stages, [96, 96, 96], 10)


def test_epsilon_is_the_references() -> None:
    assert (adam_eps(True), adam_eps(False)) == (1e-6, 1e-8)


def test_hyperparameters_are_all_but_the_parameters() -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1, momentum=0.9)
    (group,) = hyperparameters(optimizer)
    assert group["lr"] == 0.1 and group["momentum"] == 0.9 and "params" not in group
