"""Weights and a checkpoint that version 0.3.0 wrote (in version_0_3/, float32, two epochs of four steps)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import TINY, folders, kept_phantoms, run, same, workflow

WRITTEN = Path("tests/runs/version_0_3")
OPTIONS = TINY | {
    "autoencoder_def#num_channels": [4, 4, 4],
    "autoencoder_def#norm_num_groups": 2,
    "discriminator_def#channels": 2,
    "warmup_epochs": [1],
    "warmup_factors": [0.5],
    "autoencoder_train#lr": 1e-3,
    "autoencoder_train#amp": False,
}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    datalist = tmp_path / "datalist.json"
    datalist.write_text(json.dumps(kept_phantoms(tmp_path)))
    places = folders(tmp_path, datalist)
    Path(places["model_dir"]).mkdir()
    shutil.copy(WRITTEN / "checkpoint.pt", places["model_dir"])
    return OPTIONS | places


def read(name: str) -> dict[str, Any]:
    return torch.load(WRITTEN / name, weights_only=True)


def test_a_checkpoint_of_0_3_is_restored_bit_by_bit(options: dict[str, Any]) -> None:
    trainer = workflow("train", **options).trainer
    written = read("checkpoint.pt")
    assert (trainer.state.iteration, trainer.state.epoch) == (4, 1) and trainer.bare.keys() == trainer.networks.keys()
    assert trainer.progress.validations == written["validations"]
    for name in ("autoencoder", "discriminator"):
        assert same(trainer.bare[name].state_dict(), written["state"][name])
    for name in ("optimizer_g", "optimizer_d"):
        state, group = trainer.optimizers[name].state_dict()["state"], trainer.optimizers[name].param_groups[0]
        for index, moments in written["state"][name]["state"].items():
            assert all(torch.equal(state[index][key], value) for key, value in moments.items())
        assert group["lr"] == written["state"][name]["param_groups"][0]["lr"] == 1e-3  # the warm-up is over


def test_it_goes_on_to_the_weights_that_0_3_ended_with(options: dict[str, Any], tmp_path: Path) -> None:
    """Bit by bit on the processor they were written on; to rounding, which Adam magnifies, on any other."""
    run("train", **options)
    for name in ("autoencoder.pt", "discriminator.pt"):
        ours, theirs = torch.load(tmp_path / "models" / name, weights_only=True), read(f"end_{name}")
        assert ours.keys() == theirs.keys()
        errors = torch.cat([(ours[key] - theirs[key]).abs().flatten() for key in theirs])
        assert errors.quantile(0.99) < 1e-5 and errors.max() < 1e-3


def test_weights_of_0_3_load(options: dict[str, Any]) -> None:
    weights = {"finetune": True, "trained_autoencoder_path": str(WRITTEN / "end_autoencoder.pt"), "resume": False}
    trainer = workflow("train", **options, **weights).trainer
    assert same(trainer.bare["autoencoder"].state_dict(), read("end_autoencoder.pt"))
