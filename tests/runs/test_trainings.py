"""Whole trainings through configs/train.json, with the overrides that a user would type."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from scripts.common.errors import last_line
from tests.helpers import (
    NETWORK,
    REAL_CT,
    TINY,
    break_volume,
    folders,
    guide_files,
    run,
    same,
    save_nifti,
    scalars,
    workflow,
)

LOSSES = ("recons_loss", "kl_loss", "p_loss", "adv_loss", "d_loss")


def test_a_training_leaves_what_the_guide_promises(datalist: Path, tmp_path: Path, capsys: Any) -> None:
    workflow = run("train", **TINY, **folders(tmp_path, datalist))
    assert workflow.check_properties() == []
    models = tmp_path / "models"
    names = {p.name for p in models.iterdir()}
    assert {"autoencoder.pt", "discriminator.pt", "checkpoint.pt"} <= names
    assert len([n for n in names if re.fullmatch(r"autoencoder_best_epoch[12]\.pt", n)]) == 1 and len(names) == 4
    events = scalars(tmp_path / "outputs/tfevent_ct/autoencoder")
    tags = events.Tags()
    for loss in LOSSES:
        assert [e.step for e in events.Scalars(f"train_iter/{loss}")] == list(range(1, 9))
        assert [e.step for e in events.Scalars(f"train_epoch/{loss}")] == [1, 2]
    for name in ("loss", "recons_loss", "kl_loss", "p_loss", "psnr", "ssim", "mae_hu", "scale_factor"):
        assert [e.step for e in events.Scalars(f"val_epoch/{name}")] == [1, 2]
    assert {"val_original_image", "val_reconstructed_image"} <= set(tags["images"])
    assert (tmp_path / "outputs" / "validation.png").stat().st_size > 10000
    printed = capsys.readouterr().out
    assert "4 to train, 2 to validate" in printed and "psnr on held-out volumes" in printed
    with_stock = AutoencoderKlMaisi(
        **{"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, **NETWORK},
        attention_levels=[False] * 3, num_splits=1,
    )  # fmt: skip
    with_stock.load_state_dict(torch.load(models / "autoencoder.pt", weights_only=True), strict=True)

    before = {p.name: p.read_bytes() for p in models.iterdir()}
    run("train", **TINY, **folders(tmp_path, datalist))  # again: finished, so nothing changes
    assert {p.name: p.read_bytes() for p in models.iterdir()} == before


def test_the_guides_files_are_layers_and_finetuning_starts_from_weights(datalist: Path, tmp_path: Path) -> None:
    options = {"perceptual_pretrained": False, "num_workers": 0, "store_dir": str(tmp_path / "store")}
    options |= {"output_dir": str(tmp_path / "out"), "discriminator_def#channels": 8}
    long = {**options, "autoencoder_train#n_epochs": 4, "warmup_epochs": [], "warmup_factors": []}
    long["autoencoder_train#lr"] = 1e-3
    run(guide_files(tmp_path, datalist), **long)
    weights = tmp_path / "my models" / "autoencoder.pt"
    assert weights.exists()
    first = scalars(tmp_path / "events" / "autoencoder").Scalars("train_iter/recons_loss")
    environment = {
        "finetune": True,
        "trained_autoencoder_path": str(weights),
        "model_dir": str(tmp_path / "tuned"),
        "tfevent_path": str(tmp_path / "tuned_events"),
    }
    run(guide_files(tmp_path, datalist, **environment), **options)
    tuned = scalars(tmp_path / "tuned_events" / "autoencoder").Scalars("train_iter/recons_loss")
    assert tuned[0].value < 0.7 * first[0].value


def test_mri_trains_beside_ct(datalist: Path, tmp_path: Path) -> None:
    content = json.loads(datalist.read_text())
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        data = rng.gamma(2.0, 150.0, (36, 36, 36, 2)).astype(np.float32)
        path = save_nifti(tmp_path / f"mri_{split}.nii.gz", data)
        content[split].append({"image": str(path), "class": "mri"})
    mixed = tmp_path / "mixed.json"
    mixed.write_text(json.dumps(content))
    trainer = run("train", **TINY | {"autoencoder_train#n_epochs": 1}, **folders(tmp_path, mixed)).trainer
    assert trainer.state.iteration == 5 and np.isfinite(trainer.progress.validations[-1]["loss"])


@pytest.mark.parametrize("nan", [True, False])
def test_a_volume_that_breaks_is_named_and_passed_over(
    nan: bool, datalist: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = break_volume(datalist, tmp_path, nan)
    with caplog.at_level(logging.WARNING):
        workflow = run("train", **TINY | {"autoencoder_train#n_epochs": 1}, **folders(tmp_path, datalist))
    told = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert len(told) == 1 and source in told[0]
    assert ("not finite" in told[0]) == nan and ("cannot be read" in told[0]) != nan
    weights = torch.load(tmp_path / "models" / "autoencoder.pt", weights_only=True)
    assert all(t.isfinite().all() for t in weights.values())
    assert np.isfinite(workflow.trainer.progress.validations[-1]["loss"])


@pytest.mark.skipif(not REAL_CT.is_dir(), reason="no real CT volumes beside the project")
def test_real_ct_trains(tmp_path: Path) -> None:
    names = ["chest_abdomen_3mm", "phantom_head_512x512x54", "thorax_1p5mm"]
    entries = [{"image": str(REAL_CT / f"{n}.nii.gz"), "class": "ct"} for n in names]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    options = TINY | {"autoencoder_train#n_epochs": 1, "autoencoder_train#val_patch_size": [64, 64, 64]}
    last = run("train", **options, **folders(tmp_path, path)).trainer.progress.validations[-1]
    assert np.isfinite(last["loss"]) and 0 < last["mae_hu"] < 2000


def test_the_average_is_what_is_validated_and_saved(datalist: Path, tmp_path: Path) -> None:
    recipe = {"ema_decay": 0.9, "lr_decay": 0.5, "discriminator_start": 0.5, "scale_equivariance": 0.25}
    trainer = run("train", **TINY | recipe, **folders(tmp_path, datalist)).trainer
    average, last = trainer.results()["autoencoder"], trainer.bare["autoencoder"]
    saved = torch.load(tmp_path / "models" / "autoencoder.pt", weights_only=True)
    assert same(saved, average.state_dict()) and not same(saved, last.state_dict())
    kept = torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["state"]
    assert same(kept["autoencoder"], last.state_dict()) and same(kept["autoencoder_average"]["network"], saved)
    assert kept["autoencoder_average"]["steps"] == 8
    events = scalars(tmp_path / "outputs/tfevent_ct/autoencoder")
    assert [e.step for e in events.Scalars("train_iter/adv_loss")] == [5, 6, 7, 8]
    assert [e.step for e in events.Scalars("train_iter/d_loss")] == [5, 6, 7, 8]  # and from 0.45 of eight steps on
    assert [round(e.value, 8) for e in events.Scalars("train_epoch/learning_rate")] == [1e-4, 1e-4]
    assert len(events.Scalars("train_iter/scale_loss")) == 8
    shares = [events.Scalars(f"train_epoch/share_{name}")[-1].value for name in ("recons_loss", "p_loss", "adv_loss")]
    assert 0.5 < sum(shares) < 1
    with pytest.raises(RuntimeError) as caught:
        workflow("train", **TINY | {"ema_decay": 1}, **folders(tmp_path / "other", datalist))
    assert (
        last_line(caught.value) == "error: ema_decay is 1; use a number from 0 (no average) up to below 1, e.g. 0.999"
    )
