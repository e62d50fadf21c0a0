from __future__ import annotations

import pytest
import torch

from scripts.common.errors import UserError
from scripts.training.schedule import Warmup, adam_eps, hyperparameters


def test_warmup_is_the_references_rule() -> None:
    warmup = Warmup([10, 20], [0.01, 0.1])
    assert [warmup(e) for e in (0, 9, 10, 19, 20, 149)] == [0.01, 0.01, 0.1, 0.1, 1.0, 1.0]
    assert Warmup([], [])(0) == 1.0
    with pytest.raises(UserError, match="warmup_epochs"):
        Warmup([20, 10], [0.01, 0.1])


def test_epsilon_is_the_references() -> None:
    assert (adam_eps(True), adam_eps(False)) == (1e-6, 1e-8)


def test_hyperparameters_are_all_but_the_parameters() -> None:
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1, momentum=0.9)
    (group,) = hyperparameters(optimizer)
    assert group["lr"] == 0.1 and group["momentum"] == 0.9 and "params" not in group
