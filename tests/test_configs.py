"""The configs themselves, and whole trainings through them, with the overrides that a user would type."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.bundle import ConfigParser, ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.errors import last_line
from scripts.preflight import check_command_line
from tests.conftest import NETWORK, REAL_CT, SMALL, save_nifti
from tests.test_autoencoder import Attack

TRAIN, DEMO = Path("configs/train.json"), Path("configs/demo.json")
CONFIGS = [TRAIN, *(Path(f"configs/{name}.json") for name in ("inference", "encode", "evaluate"))]
TINY: dict[str, Any] = {
    **SMALL,
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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_no_dead_key_and_no_unused_import(path: Path) -> None:
    config = json.loads(path.read_text())
    texts = [t for key, value in config.items() if key != "imports" for t in strings(value)]
    referred = {name for text in texts for name in re.findall(r"@(\w+)", text)} - {"_meta_"}
    entry = {"_desc_", "imports", "initialize", "run", "finalize"}
    assert set(config) - entry == referred
    unread = {"cache"}  # accepted because the guide's files have it
    groups = {g: set(config[g]) for g in ("data_option", "autoencoder_train") if g in config}
    for group, knobs in groups.items():
        used = {name for text in texts for name in re.findall(rf"@{group}#(\w+)", text)}
        assert knobs - used <= unread
    for line in config["imports"]:
        name = line.split()[-1]
        assert any(re.search(rf"\$.*\b{name}\.", t) for t in texts), name


def test_what_configs_share_is_the_same() -> None:
    configs = [json.loads(path.read_text()) for path in CONFIGS]
    for key in ("spatial_dims", "image_channels", "latent_channels", "autoencoder_def", "dataset_dir", "model_dir"):
        assert all(config[key] == configs[0][key] for config in configs), key
    own = {"_desc_", "output_dir", "splits", "evaluator", "dataloader"}
    for key in set(configs[1]) & set(configs[2]) & set(configs[3]) - own:
        assert configs[1][key] == configs[2][key] == configs[3][key], key


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_guides_files_and_the_demo_are_layers_of_all(path: Path, datalist: Path, tmp_path: Path) -> None:
    layers = [str(path), str(DEMO), *write_guide_files(tmp_path, datalist)[1:]]
    argv = ["monai/bundle/__main__.py", "run", "--config_file", str(layers), "--output_dir", "out"]
    check_command_line(argv)
    check_command_line([*argv[:3], f"['{path}','configs/multi_gpu_train.json']"])
    parser = ConfigParser()
    parser.read_config(layers)
    assert parser["model_dir"] == str(tmp_path / "my models")
    assert parser.get_parsed_content("autoencoder_def").encoder.blocks[0].conv.conv.out_channels == 16


def test_expressions_are_short_calls() -> None:
    for path in Path("configs").glob("*.json"):
        for text in strings(json.loads(path.read_text())):
            if text.startswith("$"):
                assert len(text) <= 90 and "lambda" not in text and " if " not in text.replace("'cuda' if", ""), text


def test_layers_override_only_what_exists() -> None:
    base = ConfigParser(json.loads(TRAIN.read_text()))
    for key in json.loads(DEMO.read_text()):
        assert key == "_desc_" or key.lstrip("+") in base, key


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
    long = {**options, "autoencoder_train#n_epochs": 4, "warmup_epochs": [], "warmup_factors": []}
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


BAD_DATALISTS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{training: 3", "bad.json: is not JSON"),
    "wrong top-level type": ([], "bad.json: holds a list, not an object"),
    "misspelt split": ({"trainin": []}, "bad.json: unknown list 'trainin' (did you mean 'training'?)"),
    "misspelt entry key": (
        {"training": [{"imag": "x"}]},
        "training[0] has the unknown key 'imag' (did you mean 'image'?)",
    ),
    "empty split": ({"validation": []}, "bad.json: the list 'validation' is empty"),
    "absolute path missing": ({"training": [{"image": "/no/v.nii.gz"}]}, "error: /no/v.nii.gz: no such file"),
    "relative path missing": ({"training": [{"image": "no/v.nii.gz"}]}, "no/v.nii.gz: no such file; correct the path"),
    "directory instead of file": ({"training": [{"image": "/"}]}, "error: /: is a directory, not a NIfTI file"),
}
GRADED = np.arange(4096, dtype=np.int16).reshape(16, 16, 16)
BAD_VOLUMES: dict[str, tuple[np.ndarray | bytes, str]] = {
    "not a NIfTI": (b"hello " * 99, "is not a readable NIfTI file"),
    "zero bytes": (b"", "is empty (0 bytes)"),
    "2D": (GRADED[0], "has shape (16, 16), not 3D"),
    "4D": (np.stack([GRADED] * 2, -1), "has shape (16, 16, 16, 2), not 3D"),
    "one slice": (GRADED[:, :, :1], "has shape (16, 16, 1), a single slice"),
    "NaN voxels": (np.where(GRADED > 9, GRADED, np.nan).astype(np.float32), "has voxels that are not finite"),
    "constant": (np.zeros_like(GRADED), "is constant (every voxel 0)"),
    "uint16 overflow": (GRADED.astype(np.uint16) + 61000, "reaches 65095 HU; uint16 overflow or wrong scaling"),
}
BAD_KNOBS: dict[str, tuple[dict[str, Any], str]] = {
    "missing datalist": ({"json_data_list": "no.json"}, "no.json: no such datalist; make one with"),
    "patch not divisible": ({"autoencoder_train#patch_size": [32, 32, 30]}, "is [32, 32, 30], not divisible"),
    "negative learning rate": (
        {"autoencoder_train#lr": -1e-4},
        "autoencoder_train#lr is -0.0001; use a number above 0",
    ),
    "no epochs": ({"autoencoder_train#n_epochs": 0}, "autoencoder_train#n_epochs is 0; use an integer of at least 1"),
    "fixed without spacing": ({"data_option#spacing_type": "fixed"}, "spacing_type 'fixed' needs spacing"),
    "unknown spacing_type": ({"data_option#spacing_type": "foo"}, "spacing_type 'foo' is unknown; use one of original"),
    "unknown recon_loss": ({"autoencoder_train#recon_loss": "l3"}, "recon_loss 'l3' is unknown; use l1 or l2"),
    "finetune without weights": ({"finetune": True}, "finetune is true, but trained_autoencoder_path is None"),
    "missing perceptual weights": (
        {"perceptual_pretrained": True, "perceptual_backbone_path": "s.pth"},
        "s.pth: perceptual weights are missing; fetch them with",
    ),
}
OTHERS = (
    "truncated gzip", "singular affine", "no permission", "weights of another shape", "weights that run code",
    "truncated weights", "model_dir a file",
)  # fmt: skip


def bad_case(name: str, datalist: Path, root: Path) -> tuple[dict[str, Any], str]:
    """Overrides of a run that must end before it begins, and what its last line must say."""
    content = json.loads(datalist.read_text())
    volume, weights = root / "bad.nii.gz", root / "w.pt"
    with_datalist = {"json_data_list": str(root / "bad.json")}
    with_weights = {"finetune": True, "trained_autoencoder_path": str(weights)}

    def write(datalist: Any) -> None:
        (root / "bad.json").write_text(datalist if isinstance(datalist, str) else json.dumps(datalist))

    write(content | {"training": [*content["training"], {"image": str(volume), "class": "ct"}]})
    if name in BAD_KNOBS:
        return BAD_KNOBS[name]
    if name in BAD_DATALISTS:
        change, message = BAD_DATALISTS[name]
        write(content | change if isinstance(change, dict) else change)
        return with_datalist, message
    if name in BAD_VOLUMES:
        data, message = BAD_VOLUMES[name]
        volume.write_bytes(data) if isinstance(data, bytes) else save_nifti(volume, data)
        return with_datalist, f"bad.nii.gz: {message}"
    if name == "truncated gzip":
        save_nifti(volume, np.random.default_rng(0).integers(0, 99, (40, 40, 40)).astype(np.int16))
        volume.write_bytes(volume.read_bytes()[:-5000])
        return with_datalist, "bad.nii.gz: is truncated or damaged"
    if name == "singular affine":
        image = nib.Nifti1Image(GRADED, None)
        image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
        nib.save(image, volume)
        return with_datalist, "bad.nii.gz: its affine is singular"
    if name == "no permission":
        save_nifti(volume, GRADED).chmod(0)
        return with_datalist, "bad.nii.gz: cannot be read (permission denied)"
    if name == "weights of another shape":
        torch.save({"encoder.blocks.0.conv.conv.weight": torch.zeros(2)}, weights)
        return with_weights, "w.pt: encoder.blocks.0.conv.conv.weight is (2,), but the network's is (16, 1, 3, 3, 3)"
    if name == "weights that run code":
        torch.save({"weights": Attack(root / "owned")}, weights)
        return with_weights, "w.pt: is damaged or holds more than tensors, so it is not loaded"
    if name == "truncated weights":
        torch.save({"weights": torch.zeros(5000)}, weights)
        weights.write_bytes(weights.read_bytes()[:9000])
        return with_weights, "w.pt: is damaged or holds more than tensors"
    assert name == "model_dir a file"
    (root / "file").write_text("precious")
    return {"model_dir": str(root / "file")}, "file: cannot be written to (File exists); choose another folder"


BAD = (*BAD_DATALISTS, *BAD_VOLUMES, *BAD_KNOBS, *OTHERS)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_the_first_step(name: str, datalist: Path, tmp_path: Path) -> None:
    if name == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    overrides, message = bad_case(name, datalist, tmp_path)
    places = folders(tmp_path, datalist)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "autoencoder.pt").write_text("precious")
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        start(**{**TINY, **places, **overrides})
    assert message in last_line(caught.value) and last_line(caught.value).startswith("error: ")
    assert not (tmp_path / "owned").exists()
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
