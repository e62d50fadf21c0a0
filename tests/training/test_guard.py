"""Losses that are not finite and volumes that break: passed over, told, and in the end the end."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn.utils import get_total_norm

from scripts.common.errors import UserError
from scripts.training.checkpointing import attach_checkpointing
from scripts.training.guard import Guard
from scripts.training.vae import VaeTrainer
from tests.helpers import same
from tests.training.small_vae import make_trainer


def guarded_trainer(steps: int, fused: bool = False, **options: Any) -> tuple[VaeTrainer, Guard]:
    guard = Guard(**options)
    return make_trainer(batch_size=1, steps=steps, size=16, layers=1, fused=fused, handlers=[guard]), guard


class Spoilt(nn.Module):
    """A loss that is not finite, though its gradient is, at one iteration."""

    def __init__(self, loss: nn.Module, trainer: VaeTrainer, iteration: int) -> None:
        super().__init__()
        self.loss, self.trainer, self.iteration = loss, trainer, iteration

    def forward(self, *args: Any) -> dict[str, torch.Tensor]:
        losses = self.loss(*args)
        if self.trainer.state.iteration == self.iteration:
            losses["loss"] = losses["loss"] + torch.inf
        return losses


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_not_finite_changes_no_weight(fused: bool, caplog: pytest.LogCaptureFixture) -> None:
    trainer, guard = guarded_trainer(3, fused)
    trainer.generator_loss = Spoilt(trainer.generator_loss, trainer, 2)
    weights: list[dict] = []
    trainer.add_event_handler(
        Events.ITERATION_COMPLETED, lambda e: weights.append(copy.deepcopy(e.bare["autoencoder"].state_dict()))
    )
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    told = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert told == [told[0]] and re.search(r"step 2 is passed over, .*: loss is inf.*\(1\.nii\.gz\)", told[0])
    assert guard.in_a_row == 0 and trainer.optimizers["optimizer_g"].state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_patch_of_nan_changes_neither_network(fused: bool) -> None:
    trainer, _ = guarded_trainer(1, fused)
    before = copy.deepcopy((trainer.bare["autoencoder"].state_dict(), trainer.bare["discriminator"].state_dict()))
    trainer.data_loader.dataset.images[0, 0, 3, 4, 5] = torch.nan
    trainer.run()
    assert same(trainer.bare["autoencoder"].state_dict(), before[0]) and same(
        trainer.bare["discriminator"].state_dict(), before[1]
    )


def test_nan_in_the_weights_ends_the_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer, _ = guarded_trainer(6, max_bad_steps=3)
    trainer.state.max_epochs = 2
    attach_checkpointing(trainer, str(tmp_path), {"autoencoder.pt": "autoencoder"}, checkpoint_minutes=0)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def spoil(engine: VaeTrainer) -> None:
        with torch.no_grad():
            next(engine.bare["autoencoder"].parameters()).fill_(torch.nan)

    with pytest.raises(UserError, match=r"^3 steps in a row were not finite \(max_bad_steps\), the last: .*is nan"):
        trainer.run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["iteration"] == 2
    assert all(t.isfinite().all() for t in content["state"]["autoencoder"].values())


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    trainer, _ = guarded_trainer(1)
    trainer.max_grad_norm = 1e-3
    trainer.run()
    networks = (trainer.bare["autoencoder"], trainer.bare["discriminator"])
    norms = [float(get_total_norm([p.grad for p in network.parameters()])) for network in networks]
    assert norms == [pytest.approx(1e-3, rel=1e-3)] * 2
    assert trainer.state.output["grad_norm_g"] > 1e-3
