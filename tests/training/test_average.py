from __future__ import annotations

import pytest
import torch

from scripts.common.errors import UserError
from scripts.training.average import AveragedNetwork


def test_an_average_is_that_of_the_formula() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(network.weight)
    average = AveragedNetwork(network, 0.25)
    wanted = 0.0
    for step, value in enumerate([1.0, 2.0, 4.0, 8.0], 1):
        with torch.no_grad():
            network.weight.fill_(value)
        average.update()
        decay = min(0.25, (1 + step) / (10 + step))  # 2 / 11, 3 / 12, then 0.25
        wanted = decay * wanted + (1 - decay) * value
        assert average.network.weight.item() == pytest.approx(wanted)
    assert network.weight.item() == 8.0 and not average.network.weight.requires_grad
    restored = AveragedNetwork(torch.nn.Linear(1, 1, bias=False), 0.25)
    restored.load_state_dict(average.state_dict())
    assert restored.steps == 4 and torch.equal(restored.network.weight, average.network.weight)
    average.restart()
    assert average.steps == 0 and average.network.weight.item() == 8.0


def test_without_a_decay_the_network_is_its_own_average() -> None:
    network = torch.nn.Linear(2, 2)
    average = AveragedNetwork(network, 0)
    average.update()
    assert average.network is network and average.state_dict() == {}
    average.load_state_dict({"steps": 3, "network": {}})  # of a run that had one
    for decay in (1, -0.1, True, "a"):
        with pytest.raises(UserError, match=r"ema_decay is .*; use a number from 0 \(no average\) up to below 1"):
            AveragedNetwork(network, decay)  # type: ignore[arg-type]


def test_an_average_begins_at_the_weights_where_there_was_none() -> None:
    network = torch.nn.Linear(2, 2)
    average = AveragedNetwork(network, 0.9)
    torch.nn.init.ones_(network.weight)
    average.load_state_dict({})
    assert torch.equal(average.network.weight, network.weight) and average.steps == 0
