"""The configs themselves, and whole trainings through them, with the overrides that a user would type."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigParser, ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.errors import last_line
from tests.conftest import REAL_CT, save_nifti

TRAIN, DEMO = Path("configs/train.json"), Path("configs/demo.json")
NETWORK = {"num_channels": [16, 16, 16], "num_res_blocks": [1, 1, 1], "norm_num_groups": 8}
TINY: dict[str, Any] = {
    **{f"autoencoder_def#{key}": value for key, value in NETWORK.items()},
    "discriminator_def#channels": 8,
    "perceptual_pretrained": False,
    "num_workers": 0,
    "warmup_epochs": [],
    "warmup_factors": [],
    "autoencoder_train#patch_size": [32, 32, 32],
    "autoencoder_train#val_sliding_window_patch_size": [32, 32, 32],
    "autoencoder_train#n_epochs": 2,
    "autoencoder_train#val_interval": 1,
}
LOSSES = ("recons_loss", "kl_loss", "p_loss", "adv_loss", "d_loss")


def folders(root: Path, datalist: Path) -> dict[str, str]:
    names = {"model_dir": "models", "output_dir": "outputs", "tfevent_path": "outputs/tfevent_ct", "store_dir": "store"}
    return {key: str(root / name) for key, name in names.items()} | {"json_data_list": str(datalist)}


def start(config_file: Any = str(TRAIN), **overrides: Any) -> ConfigWorkflow:
    workflow = ConfigWorkflow(config_file=config_file, workflow_type="train", logging_file=False, **overrides)
    workflow.initialize()
    return workflow


def train(config_file: Any = str(TRAIN), **overrides: Any) -> ConfigWorkflow:
    workflow = start(config_file, **overrides)
    workflow.run()
    workflow.finalize()
    return workflow


def scalars(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [s for key, value in node.items() if key != "_desc_" for s in strings(value)]
    if isinstance(node, list):
        return [s for value in node for s in strings(value)]
    return [node] if isinstance(node, str) else []


def test_no_dead_key_and_no_unused_import() -> None:
    config = json.loads(TRAIN.read_text())
    texts = [t for key, value in config.items() if key != "imports" for t in strings(value)]
    referred = {name for text in texts for name in re.findall(r"@(\w+)", text)}
    entry = {"_desc_", "imports", "initialize", "run"}
    assert set(config) - entry == referred & set(config)
    unread = {"cache"}  # accepted because the guide's files have it
    groups = {g: set(config[g]) for g in ("data_option", "autoencoder_train")}
    for group, knobs in groups.items():
        used = {name for text in texts for name in re.findall(rf"@{group}#(\w+)", text)}
        assert knobs - used <= unread
    for line in config["imports"]:
        name = line.split()[-1]
        assert any(re.search(rf"\$.*\b{name}\.", t) for t in texts), name


def test_expressions_are_short_calls() -> None:
    for path in Path("configs").glob("*.json"):
        for text in strings(json.loads(path.read_text())):
            if text.startswith("$"):
                assert len(text) <= 90 and "lambda" not in text and " if " not in text.replace("'cuda' if", ""), text


def test_layers_override_only_what_exists() -> None:
    base = ConfigParser(json.loads(TRAIN.read_text()))
    for key in json.loads(DEMO.read_text()):
        assert key == "_desc_" or key in base, key


def test_metadata_matches_the_requirements() -> None:
    metadata = json.loads(Path("configs/metadata.json").read_text())
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", Path("requirements.txt").read_text(), re.M)[::-1])
    versions = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    assert versions == pinned
    assert metadata["version"] in metadata["changelog"]


def test_a_training_leaves_what_the_readme_promises(datalist: Path, tmp_path: Path, capsys) -> None:
    workflow = train(**TINY, **folders(tmp_path, datalist))
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
    train(**TINY, **folders(tmp_path, datalist))  # again: finished, so nothing changes
    assert {p.name: p.read_bytes() for p in models.iterdir()} == before


def write_guide_files(root: Path, datalist: Path, **environment: Any) -> list[str]:
    """The guide's environment, network and training files, made small."""
    network = {
        "spatial_dims": 3, "image_channels": 1, "latent_channels": 4, "include_body_region": False,
        "autoencoder_def": {
            **json.loads(TRAIN.read_text())["autoencoder_def"], **NETWORK, "norm_float16": True, "num_splits": 4,
        },
        "diffusion_unet_def": {"_target_": "not.there", "in_channels": "@latent_channels"},
    }  # fmt: skip
    network["autoencoder_def"].pop("save_mem")
    training = {key: json.loads(TRAIN.read_text())[key] for key in ("data_option", "autoencoder_train")}
    training["autoencoder_train"] |= {
        "patch_size": [32, 32, 32], "val_sliding_window_patch_size": [32, 32, 32], "n_epochs": 1, "val_interval": 1,
    }  # fmt: skip
    environment = {
        "model_dir": str(root / "my models"),
        "tfevent_path": str(root / "events"),
        "trained_autoencoder_path": None,
        "finetune": False,
        "json_data_list": str(datalist),
    } | environment
    files = {"env.json": environment, "network.json": network, "training.json": training}
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    return [str(TRAIN), *(str(root / name) for name in files)]


def test_the_guides_files_are_layers_and_finetuning_starts_from_weights(datalist: Path, tmp_path: Path) -> None:
    options = {"perceptual_pretrained": False, "num_workers": 0, "store_dir": str(tmp_path / "store")}
    options |= {"output_dir": str(tmp_path / "out"), "discriminator_def#channels": 8}
    long = {**options, "autoencoder_train#n_epochs": 6, "warmup_epochs": [], "warmup_factors": []}
    long["autoencoder_train#lr"] = 1e-3
    train(write_guide_files(tmp_path, datalist), **long)
    weights = tmp_path / "my models" / "autoencoder.pt"
    assert weights.exists()
    first = scalars(tmp_path / "events" / "autoencoder").Scalars("train_iter/recons_loss")
    environment = {
        "finetune": True,
        "trained_autoencoder_path": str(weights),
        "model_dir": str(tmp_path / "tuned"),
        "tfevent_path": str(tmp_path / "tuned_events"),
    }
    train(write_guide_files(tmp_path, datalist, **environment), **options)
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
    workflow = train(**TINY | {"autoencoder_train#n_epochs": 1}, **folders(tmp_path, mixed))
    trainer = workflow.trainer
    assert trainer.state.iteration == 5 and np.isfinite(trainer.state.validations[-1]["loss"])


def bad_case(name: str, datalist: Path, root: Path) -> tuple[dict[str, Any], str]:
    """Overrides of a run that must end before it begins, and what its last line must say."""
    content = json.loads(datalist.read_text())
    volume = root / "bad.nii.gz"

    def with_datalist(change: dict[str, Any]) -> dict[str, Any]:
        path = root / "bad.json"
        path.write_text(json.dumps(content | change))
        return {"json_data_list": str(path)}

    def with_volume() -> dict[str, Any]:
        return with_datalist({"training": [*content["training"], {"image": str(volume), "class": "ct"}]})

    if name == "missing datalist":
        return {"json_data_list": str(root / "no.json")}, "no.json: no such datalist; make one with"
    if name == "misspelt split":
        return with_datalist({"trainin": []}), "bad.json: unknown list 'trainin' (did you mean 'training'?)"
    if name == "empty split":
        return with_datalist({"validation": []}), "bad.json: the list 'validation' is empty"
    if name == "missing volume":
        return with_volume(), "bad.nii.gz: no such file; correct the path in the datalist"
    if name == "4D volume":
        save_nifti(volume, np.zeros((8, 8, 8, 2), np.int16))
        return with_volume(), "bad.nii.gz: has shape (8, 8, 8, 2), not 3D"
    if name == "truncated volume":
        save_nifti(volume, np.random.default_rng(0).integers(0, 99, (40, 40, 40)).astype(np.int16))
        volume.write_bytes(volume.read_bytes()[:-5000])
        return with_volume(), "bad.nii.gz: is truncated or damaged"
    if name == "patch not divisible":
        return {"autoencoder_train#patch_size": [32, 32, 30]}, "patch_size is [32, 32, 30], not divisible"
    if name == "fixed without spacing":
        return {"data_option#spacing_type": "fixed"}, "spacing_type 'fixed' needs spacing"
    if name == "unknown spacing_type":
        return {"data_option#spacing_type": "foo"}, "spacing_type 'foo' is unknown; use one of original"
    if name == "unknown recon_loss":
        return {"autoencoder_train#recon_loss": "l3"}, "recon_loss 'l3' is unknown; use l1 or l2"
    if name == "finetune without weights":
        return {"finetune": True}, "finetune is true, but trained_autoencoder_path is None"
    if name == "weights of another shape":
        torch.save({"encoder.blocks.0.conv.conv.weight": torch.zeros(2)}, root / "w.pt")
        change = {"finetune": True, "trained_autoencoder_path": str(root / "w.pt")}
        return change, "w.pt: encoder.blocks.0.conv.conv.weight is (2,), but the network's is (16, 1, 3, 3, 3)"
    assert name == "missing perceptual weights"
    change = {"perceptual_pretrained": True, "perceptual_backbone_path": str(root / "s.pth")}
    return change, "s.pth: perceptual weights are missing; fetch them with"


BAD = (
    "missing datalist", "misspelt split", "empty split", "missing volume", "4D volume", "truncated volume",
    "patch not divisible", "fixed without spacing", "unknown spacing_type", "unknown recon_loss",
    "finetune without weights", "weights of another shape", "missing perceptual weights",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_the_first_step(name: str, datalist: Path, tmp_path: Path) -> None:
    overrides, message = bad_case(name, datalist, tmp_path)
    places = folders(tmp_path, datalist)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "autoencoder.pt").write_text("precious")
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        start(**{**TINY, **places, **overrides})
    assert message in last_line(caught.value) and last_line(caught.value).startswith("error: ")
    assert [(p.name, p.read_text()) for p in (tmp_path / "models").iterdir()] == [("autoencoder.pt", "precious")]


def test_the_command_line_ends_with_one_clear_line(datalist: Path, tmp_path: Path) -> None:
    places = [word for key, value in folders(tmp_path, datalist).items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", f"['{TRAIN}','{DEMO}']", *places]
    done = subprocess.run([*command, "--autoencoder_train#lr", "-1"], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last == "error: autoencoder_train#lr is -1; use a number above 0"
    assert not list((tmp_path / "models").glob("*"))


@pytest.mark.skipif(not REAL_CT.is_dir(), reason="no real CT volumes beside the project")
def test_real_ct_trains(tmp_path: Path) -> None:
    names = ["chest_abdomen_3mm", "phantom_head_512x512x54", "thorax_1p5mm"]
    entries = [{"image": str(REAL_CT / f"{n}.nii.gz"), "class": "ct"} for n in names]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    workflow = train(**TINY | {"autoencoder_train#n_epochs": 1}, **folders(tmp_path, path))
    assert np.isfinite(workflow.trainer.state.validations[-1]["loss"])
    assert 0 < workflow.trainer.state.validations[-1]["mae_hu"] < 2000
