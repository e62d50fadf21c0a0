from __future__ import annotations

import pytest
import torch

from scripts.common.errors import UserError
from scripts.training.schedule import LearningRate, adam_eps, hyperparameters


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


def test_epsilon_is_the_references() -> None:
    assert (adam_eps(True), adam_eps(False)) == (1e-6, 1e-8)


def test_hyperparameters_are_all_but_the_parameters() -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1, momentum=0.9)
    (group,) = hyperparameters(optimizer)
    assert group["lr"] == 0.1 and group["momentum"] == 0.9 and "params" not in group
