from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.common.command_line import check_command_line
from scripts.common.errors import UserError
from tests.helpers import TRAIN


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


@pytest.mark.parametrize(
    "files", ["['configs/train.json', 'configs/demo.json']", "configs/train.json,configs/demo.json"]
)
def test_lists_of_files_are_read_as_monai_reads_them(files: str) -> None:
    with pytest.raises(UserError, match="--modle_dir: no such key in configs/train.json, configs/demo.json; did you"):
        check_command_line(["x", "run", f"--config_file={files}", "--modle_dir", "x"])
