from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.networks.nets import PatchDiscriminator

from scripts.errors import UserError
from scripts.preflight import check_command_line, check_knobs, check_patch, prepare_folders

TRAIN = Path("configs/train.json")


def groups() -> tuple[dict, dict]:
    config = json.loads(TRAIN.read_text())
    return config["data_option"], config["autoencoder_train"]


def test_the_shipped_knobs_pass() -> None:
    check_knobs(*groups(), factor=4)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("lr", -1e-4, "autoencoder_train#lr is -0.0001; use a number above 0"),
        ("lr", "fast", "lr is 'fast'"),
        ("n_epochs", 0, "autoencoder_train#n_epochs is 0; use an integer of at least 1"),
        ("batch_size", 1.5, "batch_size is 1.5"),
        (
            "patch_size",
            [96, 96, 90],
            r"patch_size is \[96, 96, 90\], not divisible by the network's factor 4; use e.g. \[",
        ),
        ("patch_size", [96, 96], "use three positive integers"),
        ("patch_size", None, "patch_size is None"),
        ("val_sliding_window_patch_size", [96, 96, 62], "val_sliding_window_patch_size .* not divisible"),
        ("kl_weight", float("nan"), "kl_weight is nan"),
        ("val_batch_size", 2, "val_batch_size is 2, but whole volumes differ in size"),
        ("patchsize", [96, 96, 96], "autoencoder_train: unknown knob 'patchsize'; did you mean 'patch_size'"),
    ],
)
def test_bad_knobs_are_named(knob: str, value: object, message: str) -> None:
    data_option, autoencoder_train = groups()
    with pytest.raises(UserError, match=message):
        check_knobs(data_option, autoencoder_train | {knob: value}, factor=4)


def test_a_missing_knob_is_named() -> None:
    data_option, autoencoder_train = groups()
    del autoencoder_train["kl_weight"]
    with pytest.raises(UserError, match="autoencoder_train: 'kl_weight' is missing"):
        check_knobs(data_option, autoencoder_train, factor=4)


def test_patch_too_small_for_the_discriminator() -> None:
    discriminator = PatchDiscriminator(spatial_dims=3, channels=4, in_channels=1, norm="INSTANCE")
    check_patch([32, 32, 32], discriminator)
    with pytest.raises(UserError, match=r"patch_size is \[32, 16, 32\], too small for the discriminator"):
        check_patch([32, 16, 32], discriminator)


def run(*words: str) -> list[str]:
    return ["monai/bundle/__main__.py", "run", "--config_file", str(TRAIN), *words]


@pytest.mark.parametrize(
    "words",
    [
        ["--autoencoder_train#n_epochs", "2", "--seed=3", "--resume", "False"],
        ["--train::trainer::max_epochs", "2"],
        ["--run_id", "run", "--logging_file", "configs/logging.conf"],
    ],
)
def test_known_overrides_pass(words: list[str]) -> None:
    check_command_line(run(*words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modle_dir", "x"], "--modle_dir: no such key in configs/train.json; did you mean --model_dir"),
        (
            ["--autoencoder_train#n_epoch=2"],
            "--autoencoder_train#n_epoch: .* did you mean --autoencoder_train#n_epochs",
        ),
        (["--quux", "1"], "--quux: no such key .*; the config file lists the keys"),
    ],
)
def test_misspelt_overrides_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_command_line(run(*words))


def test_misspelt_keys_of_layers_are_refused_and_foreign_ones_pass(tmp_path: Path) -> None:
    layer = tmp_path / "environment.json"
    argv = ["x", "run", "--config_file", f"['{TRAIN}','{layer}']", "--diffusion_unet_def#channels", "3"]
    layer.write_text(
        json.dumps({"model_dir": "m", "diffusion_unet_def": {"channels": 1}, "include_body_region": False})
    )
    check_command_line(argv)
    layer.write_text(json.dumps({"tfevent_pth": "m"}))
    with pytest.raises(UserError, match=r"environment\.json: unknown key 'tfevent_pth'; did you mean 'tfevent_path'"):
        check_command_line(argv)


def test_other_programs_are_left_alone() -> None:
    check_command_line(["pytest", "--modle_dir", "x"])


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/models: cannot be written to \(Not a directory\)"):
        prepare_folders(str(tmp_path / "new"), str(tmp_path / "file" / "models"))
    with pytest.raises(UserError, match=r"/file: cannot be written to \(File exists\)"):
        prepare_folders(str(tmp_path / "file"))
