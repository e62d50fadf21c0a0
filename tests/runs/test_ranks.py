"""Several ranks: they train as one process does, share the validation, and fail together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import (
    MULTI_GPU,
    TINY,
    TRAIN,
    break_volume,
    finish,
    folders,
    kept_phantoms,
    run,
    scalars,
    start_ranks,
)

EXACT = TINY | {"autoencoder_train#n_epochs": 1, "autoencoder_train#amp": False}


def train(options: dict[str, Any]) -> None:
    run([str(TRAIN), str(MULTI_GPU)], **options)


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / f"{name}.pt", weights_only=True)


def validation(folder: Path) -> dict[str, float]:
    return torch.load(folder / "models" / "checkpoint.pt", weights_only=True)["validations"][-1]


@pytest.fixture
def odd_datalist(tmp_path: Path) -> Path:
    """Six volumes to train on and three to validate."""
    content = kept_phantoms(tmp_path)
    content["training"] = (content["training"] * 2)[:6]
    content["validation"].append(content["training"][0])
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    return path


def test_two_ranks_take_the_steps_of_one_process_with_twice_the_batch(odd_datalist: Path, tmp_path: Path) -> None:
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    run("train", **EXACT | {"autoencoder_train#batch_size": 2}, **folders(one, odd_datalist))
    printed = finish(start_ranks(2, train, EXACT | folders(two, odd_datalist), log=log), log)
    for name in ("autoencoder", "discriminator"):
        expected, found = weights(one, name), weights(two, name)
        assert expected.keys() == found.keys()
        assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-5
    assert {p.name for p in (two / "models").iterdir()} == {p.name for p in (one / "models").iterdir()}
    logs = [scalars(folder / "outputs/tfevent_ct/autoencoder") for folder in (one, two)]
    assert len(list((two / "outputs/tfevent_ct/autoencoder").iterdir())) == 1
    assert set(logs[0].Tags()["scalars"]) == set(logs[1].Tags()["scalars"])
    for loss in ("train_iter/recons_loss", "train_iter/d_loss", "train_epoch/p_loss"):
        values = [{event.step: event.value for event in log.Scalars(loss)} for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert printed.count("epoch 1/1: loss") == 1 and printed.count("best validation loss") == 1


def test_a_rank_without_a_volume_waits_for_the_others(datalist: Path, tmp_path: Path) -> None:
    content = json.loads(datalist.read_text())
    content["validation"] = content["validation"][:1]
    short, log = tmp_path / "short.json", tmp_path / "log"
    short.write_text(json.dumps(content))
    finish(start_ranks(2, train, TINY | {"autoencoder_train#n_epochs": 1} | folders(tmp_path, short), log=log), log)
    assert validation(tmp_path)["psnr"] > 0


def test_two_ranks_pass_over_a_broken_volume_alike_and_end_when_told_to(datalist: Path, tmp_path: Path) -> None:
    source, log = break_volume(datalist, tmp_path, nan=False), tmp_path / "log"
    options = TINY | {"autoencoder_train#n_epochs": 1} | folders(tmp_path, datalist)
    printed = finish(start_ranks(2, train, options, log=log), log)
    assert printed.count("passed over") == 1 and source in printed
    strict = options | {"model_dir": str(tmp_path / "other"), "max_bad_volumes": 0}
    printed = finish(start_ranks(2, train, strict, log=log), log, status=1)
    assert "1 volumes broke during training (max_bad_volumes is 0)" in printed


@pytest.mark.slow
def test_two_ranks_end_alike_when_every_step_is_nan(datalist: Path, tmp_path: Path) -> None:
    break_volume(datalist, tmp_path, nan=True)
    log = tmp_path / "log"
    options = TINY | {"autoencoder_train#n_epochs": 1, "max_bad_steps": 1} | folders(tmp_path, datalist)
    printed = finish(start_ranks(2, train, options, log=log), log, status=1)
    assert "error: 1 steps in a row were not finite (max_bad_steps), the last: " in printed
    assert not (tmp_path / "models" / "autoencoder.pt").exists()
