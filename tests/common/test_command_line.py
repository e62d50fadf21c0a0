from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from fire.parser import DefaultParseValue
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from monai.bundle import ConfigWorkflow

from scripts.common.command_line import check_command_line
from scripts.common.errors import UserError, last_line
from tests.helpers import TRAIN, TRICKY


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


THEIR_KEYS = {  # of NV-Generate-CTMR's files at da438fe, which are layers of our configs
    "train": (
        "model_dir", "tfevent_path", "finetune", "trained_autoencoder_path", "data_option", "autoencoder_train",
        "spatial_dims", "image_channels", "latent_channels", "autoencoder_def", "diffusion_unet_def", "controlnet_def",
        "mask_generation_autoencoder_def", "mask_generation_diffusion_def", "noise_scheduler", "include_body_region",
        "mask_generation_latent_shape", "modality",
    ),
    "train_diffusion": (
        "data_base_dir", "embedding_base_dir", "json_data_list", "model_dir", "model_filename", "output_dir",
        "output_prefix", "existing_ckpt_filepath", "trained_autoencoder_path", "modality_mapping_path",
        "diffusion_unet_train", "diffusion_unet_inference", "autoencoder_def", "controlnet_def", "noise_scheduler",
    ),
    "train_controlnet": (
        "model_dir", "output_dir", "tfevent_path", "trained_autoencoder_path", "trained_diffusion_path",
        "trained_controlnet_path", "existing_ckpt_filepath", "exp_name", "data_base_dir", "json_data_list",
        "modality_mapping_path", "controlnet_train", "controlnet_infer", "autoencoder_def", "diffusion_unet_def",
        "controlnet_def", "mask_generation_autoencoder_def", "mask_generation_diffusion_def", "noise_scheduler",
    ),
}  # fmt: skip


@pytest.mark.parametrize("config", THEIR_KEYS)
def test_keys_of_the_references_files_pass(config: str, tmp_path: Path) -> None:
    layer = tmp_path / "theirs.json"
    layer.write_text(json.dumps(dict.fromkeys(THEIR_KEYS[config])))
    check_command_line(["x", "run", "--config_file", f"['configs/{config}.json','{layer}']"])


def test_config_files_of_an_args_file_are_read_too(tmp_path: Path) -> None:
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps({"config_file": str(TRAIN)}))
    options, defaults = check_command_line(["x", "run", "--args_file", str(arguments), "--resume", "false"])
    assert options == {"resume": "false"} and defaults["seed"] == 0
    with pytest.raises(UserError, match="--modle_dir: no such key"):
        check_command_line(["x", "run", "--args_file", str(arguments), "--modle_dir", "m"])


def test_other_programs_are_left_alone() -> None:
    check_command_line(["pytest", "--modle_dir", "x"])


@pytest.mark.parametrize(
    "files", ["['configs/train.json', 'configs/demo.json']", "configs/train.json,configs/demo.json"]
)
def test_lists_of_files_are_read_as_monai_reads_them(files: str) -> None:
    with pytest.raises(UserError, match="--modle_dir: no such key in configs/train.json, configs/demo.json; did you"):
        check_command_line(["x", "run", f"--config_file={files}", "--modle_dir", "x"])


CONFIG = {
    "imports": ["$import scripts.common.command_line as command_line"],
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/outputs'",
    "model_dir": "~/maisi#1",
    "start_path": None,
    "json_data_list": None,
    "overwrite": False,
    "count": 1,
    "multiple": None,
    "group": {"aug": True, "kind": "l1", "interval": 3},
    "interval": "@group#interval",
    "thing": {"_target_": "builtins.dict", "folder": "@output_dir", "aug": "@group#aug", "fixed": True},
    "initialize": ["$command_line.read()"],
}


class Run:
    """MONAI's command line over `CONFIG`, in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.monkeypatch = folder / "config.json", monkeypatch
        self.file.write_text(json.dumps(CONFIG))
        monkeypatch.setenv("HOME", "/home/me")

    def __call__(self, *words: str, layer: dict[str, Any] | None = None) -> ConfigWorkflow:
        files = [str(self.file)]
        if layer is not None:
            files.append(str(self.file.with_name("layer.json")))
            Path(files[1]).write_text(json.dumps(layer))
        argv = ["monai/bundle/__main__.py", "run", "--config_file", repr(files), *words]
        self.monkeypatch.setattr(sys, "argv", argv)
        pairs = [word.lstrip("-").split("=", 1) for word in words]
        overrides = {pair[0].replace("-", "_"): DefaultParseValue(pair[1]) if pair[1:] else True for pair in pairs}
        workflow = ConfigWorkflow(files, logging_file=False, meta_file=None, **overrides)
        workflow.initialize()
        return workflow

    def value(self, key: str, *words: str, **options: Any) -> Any:
        return self(*words, **options).parser.get_parsed_content(key)


@pytest.fixture
def overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(tmp_path, monkeypatch)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(word=st.one_of(st.sampled_from(TRICKY), st.text(st.characters(exclude_characters="\0"), min_size=1)))
def test_no_path_is_changed(overridden: Run, word: str) -> None:
    assume(word[0] not in "~[(%")  # the home folder, several paths, and what MONAI reads from another file
    workflow = overridden(f"--output_dir={word}", f"--start_path={word}", f"--group#kind={word}")
    parsed = workflow.parser.get_parsed_content
    null = None if word.lower() in ("null", "none") else word
    assert (parsed("output_dir"), parsed("group")["kind"], parsed("start_path")) == (word, word, null)
    assert parsed("thing") == {"folder": word, "aug": True, "fixed": True}


@pytest.mark.parametrize("word", ["false", "False", "NO", "0"])
def test_false_is_false_wherever_it_stands(overridden: Run, word: str) -> None:
    parsed = overridden(f"--group#aug={word}", "--overwrite", f"--thing#fixed={word}").parser.get_parsed_content
    assert parsed("group")["aug"] is False and parsed("overwrite") is True
    assert parsed("thing") == {"folder": "./outputs", "aug": False, "fixed": False}
    with pytest.raises(RuntimeError) as caught:
        overridden("--overwrite=maybe")
    assert last_line(caught.value) == (
        "error: --overwrite is 'maybe', which is neither true nor false; use one of true, yes, 1, false, no, 0"
    )


def test_home_folders_and_what_layers_say(overridden: Run) -> None:
    parsed = overridden(
        "--output-dir=~/recon", layer={"bundle_root": "~/b", "start_path": "c#d"}
    ).parser.get_parsed_content
    assert parsed("output_dir") == "/home/me/recon" and parsed("model_dir") == "/home/me/maisi#1"
    assert parsed("bundle_root") == "/home/me/b" and parsed("start_path") == "c#d"
    assert overridden.value("output_dir", layer={"bundle_root": "~/b"}) == "/home/me/b/outputs"
    assert overridden.value("json_data_list", "--json_data_list=['a#1.json','~/b.json']") == [
        "a#1.json",
        "/home/me/b.json",
    ]


def test_references_keep_their_meaning(overridden: Run) -> None:
    assert overridden.value("output_dir", "--output_dir=@model_dir") == "/home/me/maisi#1"
    assert overridden.value("output_dir", "--output_dir=$@bundle_root + '/x'") == "./x"
    assert overridden.value("overwrite", "--overwrite=@group#aug") is True
    assert overridden.value("interval", "--group#interval=7") == 7 == overridden.value("interval", "--interval=7")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--count=abc"], "--count is 'abc', which is not a number; use one"),
        (["--output_dir"], "--output_dir has no value; give one, after = where it begins with dashes"),
        (["--interval=x"], "--interval is 'x', which is not a number; use one"),
    ],
)
def test_words_of_another_kind_are_refused(overridden: Run, words: list[str], message: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        overridden(*words)
    assert last_line(caught.value) == f"error: {message}"


def test_an_args_file_says_what_the_command_line_does_not(overridden: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = overridden.file.with_name("arguments.json")
    content = {"config_file": str(overridden.file), "start_path": "~/a#b", "overwrite": True}
    arguments.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["x", "run", "--args_file", str(arguments), "--output_dir", "~/c#d"])
    workflow = ConfigWorkflow(**content, output_dir="~/c", logging_file=False, meta_file=None)
    workflow.initialize()
    parsed = workflow.parser.get_parsed_content
    assert (parsed("start_path"), parsed("output_dir")) == ("/home/me/a#b", "/home/me/c#d")
    assert parsed("overwrite") is True and parsed("model_dir") == "/home/me/maisi#1"


def test_overrides_from_python_are_left_as_they_are(overridden: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["notebook"])
    workflow = ConfigWorkflow(str(overridden.file), logging_file=False, meta_file=None, output_dir="~/x#1", count="2")
    workflow.initialize()
    parsed = workflow.parser.get_parsed_content
    assert parsed("output_dir") == "/home/me/x#1" and parsed("count") == "2" and parsed("overwrite") is False
