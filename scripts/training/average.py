"""The moving average of a network's weights: what is validated and saved, while the training goes on with the last."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from scripts.common.errors import UserError


class AveragedNetwork:
    """An exponential moving average of a network's parameters (EMA).

    The decay rises over the first steps, min(decay, (1 + n) / (10 + n)) after n of them, so that the average is not
    held back by what the network was at its start.

    Args:
        network: that is trained; not wrapped in DistributedDataParallel.
        decay: from 0 up to below 1; 0 for no average: `network` is then the one that is trained.

    Attributes:
        network: with the averaged weights, on the same device.

    Raises:
        UserError: for another decay.
    """

    def __init__(self, network: nn.Module, decay: float = 0.999) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise UserError(f"ema_decay is {decay!r}; use a number from 0 (no average) up to below 1, e.g. 0.999")
        self.trained, self.decay, self.steps = network, decay, 0
        self.network = copy.deepcopy(network).requires_grad_(False) if decay else network

    def update(self) -> None:
        """After a step: take in the weights that it has left."""
        if not self.decay:
            return
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.network.parameters()), list(self.trained.parameters()), 1 - decay)

    def restart(self) -> None:
        """Begin at the weights that the network has now."""
        self.steps = 0
        if self.decay:
            self.network.load_state_dict(self.trained.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The average, and of how many steps; empty where there is none."""
        return {"steps": self.steps, "network": self.network.state_dict()} if self.decay else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an average; where there was none, begin at the weights that the network has now."""
        self.restart()
        if self.decay and state:
            self.steps = state["steps"]
            self.network.load_state_dict(state["network"])
