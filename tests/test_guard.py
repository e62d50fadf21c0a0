"""Losses that are not finite and volumes that break: passed over, told, and in the end the end."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn
from torch.nn.utils import get_total_norm

from scripts.checkpointing import attach_checkpointing
from scripts.datalist import load
from scripts.errors import UserError
from scripts.guard import Guard
from scripts.trainer import VaeTrainer
from scripts.volumes import prepare, stored_path
from tests.test_checkpointing import same
from tests.test_configs import TINY, folders, train
from tests.test_distributed import LAYERS, run, torchrun, words
from tests.test_trainer import make_trainer


def guarded_trainer(steps: int, fused: bool = False, **options: Any) -> tuple[VaeTrainer, Guard]:
    trainer = make_trainer(batch_size=1, steps=steps)
    if fused:
        for name in ("optimizer_g", "optimizer_d"):
            parameters = getattr(trainer, name).param_groups[0]["params"]
            setattr(trainer, name, torch.optim.Adam(parameters, 1e-4, eps=1e-3, fused=True))
    guard = Guard(**options)
    guard.attach(trainer)
    return trainer, guard


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
        Events.ITERATION_COMPLETED, lambda e: weights.append(copy.deepcopy(e.autoencoder.state_dict()))
    )
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert same(weights[0], weights[1]) and not same(weights[1], weights[2])
    told = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert told == [told[0]] and re.search(r"step 2 is passed over, .*: loss is inf.*\(1\.nii\.gz\)", told[0])
    assert guard.in_a_row == 0 and trainer.optimizer_g.state_dict()["state"][0]["step"] == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_patch_of_nan_changes_neither_network(fused: bool) -> None:
    trainer, _ = guarded_trainer(1, fused)
    before = copy.deepcopy((trainer.autoencoder.state_dict(), trainer.discriminator.state_dict()))
    trainer.data_loader.dataset.images[0, 0, 3, 4, 5] = torch.nan
    trainer.run()
    assert same(trainer.autoencoder.state_dict(), before[0]) and same(trainer.discriminator.state_dict(), before[1])


def test_nan_in_the_weights_ends_the_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    trainer, _ = guarded_trainer(6, max_bad_steps=3)
    trainer.state.max_epochs = 2
    state = {n: getattr(trainer, n) for n in ("autoencoder", "discriminator", "optimizer_g", "optimizer_d")}
    attach_checkpointing(trainer, state, str(tmp_path), checkpoint_minutes=0)

    @trainer.on(Events.ITERATION_STARTED(once=3))
    def spoil(engine: VaeTrainer) -> None:
        with torch.no_grad():
            next(engine.autoencoder.parameters()).fill_(torch.nan)

    with pytest.raises(UserError, match=r"^3 steps in a row were not finite \(max_bad_steps\), the last: .*is nan"):
        trainer.run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["iteration"] == 2
    assert all(t.isfinite().all() for t in content["state"]["autoencoder"].values())


def test_gradients_are_clipped_to_the_norm_asked_for() -> None:
    trainer, _ = guarded_trainer(1)
    trainer.max_grad_norm = 1e-3
    trainer.run()
    networks = (trainer.autoencoder, trainer.discriminator)
    norms = [float(get_total_norm([p.grad for p in network.parameters()])) for network in networks]
    assert norms == [pytest.approx(1e-3, rel=1e-3)] * 2
    assert trainer.state.output["grad_norm_g"] > 1e-3


def broken_store(datalist: Path, root: Path, nan: bool) -> str:
    """Convert all volumes, then spoil the second training volume's conversion; returns that volume's path."""
    entries = load(datalist)
    prepare(entries["training"] + entries["validation"], root / "store", progress=False)
    source = entries["training"][1]["image"]
    stored = stored_path(source, root / "store")
    if nan:
        old = blosc2.open(str(stored))
        facts = old.schunk.vlmeta["volume"]
        data = np.full(old.shape, np.nan, np.float32)
        del old
        stored.unlink()
        array = blosc2.asarray(data, urlpath=str(stored), mode="w", chunks=(32, 32, 32), blocks=(16, 16, 16))
        array.schunk.vlmeta["volume"] = facts
    else:
        stored.write_bytes(stored.read_bytes()[: stored.stat().st_size // 2])
    return source


@pytest.mark.parametrize("nan", [True, False])
def test_a_volume_that_breaks_is_named_and_passed_over(
    nan: bool, datalist: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = broken_store(datalist, tmp_path, nan)
    with caplog.at_level(logging.WARNING):
        workflow = train(**TINY | {"autoencoder_train#n_epochs": 1}, **folders(tmp_path, datalist))
    told = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(told) == 1 and source in told[0]
    assert ("not finite" in told[0]) == nan and ("cannot be read" in told[0]) != nan
    weights = torch.load(tmp_path / "models" / "autoencoder.pt", weights_only=True)
    assert all(t.isfinite().all() for t in weights.values())
    assert np.isfinite(workflow.trainer.state.validations[-1]["loss"])


def test_two_ranks_pass_over_a_broken_volume_alike_and_end_when_told_to(datalist: Path, tmp_path: Path) -> None:
    source = broken_store(datalist, tmp_path, nan=False)
    command = ["-m", "monai.bundle", "run", "--config_file", LAYERS]
    options = TINY | {"autoencoder_train#n_epochs": 1} | folders(tmp_path, datalist)
    done = run(torchrun(2, *command, *words(options)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("passed over") == 1 and source in done.stdout
    done = run(torchrun(2, *command, *words(options | {"model_dir": str(tmp_path / "other"), "max_bad_volumes": 0})))
    assert done.returncode == 1
    assert "1 volumes broke during training (max_bad_volumes is 0)" in done.stderr


@pytest.mark.slow
def test_two_ranks_end_alike_when_every_step_is_nan(datalist: Path, tmp_path: Path) -> None:
    broken_store(datalist, tmp_path, nan=True)
    command = ["-m", "monai.bundle", "run", "--config_file", LAYERS]
    options = TINY | {"autoencoder_train#n_epochs": 1, "max_bad_steps": 1} | folders(tmp_path, datalist)
    done = run(torchrun(2, *command, *words(options)))
    assert done.returncode == 1
    assert "error: 1 steps in a row were not finite (max_bad_steps), the last: " in done.stderr
    assert not (tmp_path / "models" / "autoencoder.pt").exists()
