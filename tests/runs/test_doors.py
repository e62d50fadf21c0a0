"""The scripts that take NV-Generate-CTMR's three files: which file is which, and what runs."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from scripts import train_controlnet, train_diffusion, train_vae_ct
from scripts.common.errors import UserError
from scripts.training import launcher
from scripts.training.launcher import Door
from tests.helpers import call

EXAMPLES = Path("docs/examples")
DOORS = {"vae_ct": train_vae_ct.DOOR, "diffusion": train_diffusion.DOOR, "controlnet": train_controlnet.DOOR}
NAMES = {
    "vae_ct": ("environment_maisi_vae_train", "config_network", "config_maisi_vae_train"),
    "diffusion": ("environment_maisi_diff_model", "config_maisi_diff_model", "config_network_rflow"),
    "controlnet": ("environment_maisi_controlnet_train", "config_maisi_controlnet_train", "config_network_rflow"),
}
FILES = {training: [EXAMPLES / f"{name}.json" for name in names] for training, names in NAMES.items()}
each = pytest.mark.parametrize("training", list(DOORS))


def given(e: Any, c: Any, t: Any) -> list[str]:
    return ["-e", str(e), "-c", str(c), "-t", str(t)]


def written(folder: Path, **contents: Any) -> list[Path]:
    """A JSON file of each of the contents."""
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [folder / f"{name}.json" for name in contents]


@each
@pytest.mark.parametrize(("joined", "layered"), [({}, False), ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, True)])
def test_what_the_script_becomes(
    training: str, joined: dict[str, str], layered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in joined.items():
        monkeypatch.setenv(name, value)
    became: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, command: became.extend(command))
    monkeypatch.setattr(sys, "argv", [f"train_{training}.py", *given(*FILES[training]), "--seed", "3"])
    monkeypatch.setattr(launcher.errors, "install", lambda: None)
    launcher.main(DOORS[training])
    kind = "train" if training == "vae_ct" else f"train_{training}"
    layers = [f"configs/{kind}.json", *(str(file.resolve()) for file in FILES[training])]
    layers += [f"configs/multi_gpu_{kind}.json"] if layered else []
    assert became[became.index("--config_file") + 1] == repr(layers)
    assert became[-2:] == ["--seed", "3"] and became[1:6] == ["-W", "ignore", "-m", "monai.bundle", "run"]


@each
def test_swapped_files_are_taken_the_other_way_round(training: str, capsys: pytest.CaptureFixture[str]) -> None:
    door, (e, c, t) = DOORS[training], FILES[training]
    assert launcher.parse(door, given(e, c, t))[0] == [e, c, t]
    assert capsys.readouterr().err == ""
    assert launcher.parse(door, given(e, t, c))[0] == [e, c, t]
    said = capsys.readouterr().err
    assert said == f"-c {t} holds {door.t.key}, -t {c} holds {door.c.key}: taken the other way round\n"


def test_files_that_do_not_tell_stay_where_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    e, bare, knobs, whole = written(
        tmp_path, e={}, bare={"seed": 3}, knobs={"diffusion_unet_train": {}},
        whole={"diffusion_unet_train": {}, "diffusion_unet_def": {}},
    )  # fmt: skip
    lines = tmp_path / "lines.yaml"
    lines.write_text("diffusion_unet_def: {}\n")
    for c, t in ((bare, knobs), (knobs, bare), (lines, knobs), (whole, whole), (whole, knobs), (bare, bare)):
        assert launcher.parse(train_diffusion.DOOR, given(e, c, t))[0] == [e, c, t]
    assert capsys.readouterr().err == ""


def test_only_one_rank_says_that_files_are_swapped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    e, c, t = FILES["diffusion"]
    assert launcher.parse(train_diffusion.DOOR, given(e, t, c))[0] == [e, c, t]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("training", "wrong", "holds"),
    [
        (
            "vae_ct",
            FILES["diffusion"],
            "config_maisi_diff_model.json: holds diffusion_unet_train, not autoencoder_train",
        ),
        (
            "diffusion",
            FILES["vae_ct"],
            "config_maisi_vae_train.json: holds autoencoder_train, not diffusion_unet_train",
        ),
        (
            "controlnet",
            FILES["diffusion"],
            "config_maisi_diff_model.json: holds diffusion_unet_train, not controlnet_train",
        ),
    ],
)
def test_files_of_another_training_are_refused(training: str, wrong: list[Path], holds: str) -> None:
    e, c, t = wrong
    for files in ((e, c, t), (e, t, c)):
        with pytest.raises(UserError) as caught:
            launcher.parse(DOORS[training], given(*files))
        assert str(caught.value) == f"{EXAMPLES}/{holds}; give the file of this training, or start the other"


def test_the_options_of_nv_generate_ctmr_are_taken_by_their_long_names() -> None:
    e, c, t = FILES["diffusion"]
    names = ("--env_config_path", "--model_config_path", "--model_def_path", "--num_gpus")
    words = [word for pair in zip(names, (str(e), str(c), str(t), "2"), strict=True) for word in pair]
    assert launcher.parse(train_diffusion.DOOR, [*words, "--seed", "3"]) == ([e, c, t], 2, ["--seed", "3"])
    assert launcher.parse(train_diffusion.DOOR, given(e, c, t)) == ([e, c, t], 1, [])
    e, c, t = FILES["vae_ct"]
    names = ("--environment-file", "--config-file", "--training-config", "--gpus")
    words = [word for pair in zip(names, (str(e), str(c), str(t), "2"), strict=True) for word in pair]
    assert launcher.parse(train_vae_ct.DOOR, words) == ([e, c, t], 2, [])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{,}", "cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("[1, 2]", "is no JSON object"),
        (None, "no such configuration file"),
    ],
)
def test_a_file_that_is_none_is_named(content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "knobs.json"
    if content:
        file.write_text(content)
    with pytest.raises(UserError) as caught:
        launcher.parse(train_vae_ct.DOOR, given(*FILES["vae_ct"][:2], file))
    assert str(caught.value) == f"{file}: {told}; docs/examples has one of each kind"


def test_files_of_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files = written(tmp_path, **{"env": {}, "my net #2": {}, "knobs": {}})
    words = ["-e", "~/env.json", "--config-file=~/my net #2.json", "-t", str(files[2])]
    assert launcher.parse(train_vae_ct.DOOR, words)[0] == files
    with pytest.raises(UserError, match=r"^~nobody-of-that-name/env\.json: no such configuration file"):
        launcher.parse(train_vae_ct.DOOR, given("~nobody-of-that-name/env.json", *files[1:]))


def started(door: Door, *words: str) -> Any:
    """What the script of a door does in a process of its own."""
    code = f"from scripts.training.launcher import Door, Kind, main\nmain({door!r})"
    return call([sys.executable, "-c", code, *words], CUDA_VISIBLE_DEVICES="")


def test_the_files_are_layers_over_the_config_of_the_training(tmp_path: Path) -> None:
    config, layer, e, c, t = written(
        tmp_path,
        config={
            "imports": ["$import os", "$import scripts.common.command_line as command_line"],
            "model_dir": "none", "rank": 0, "is_main": "$@rank == 0", "seed": 0,
            "diffusion_unet_train": {"lr": 0.0, "batch_size": 1},
            "diffusion_unet_def": {"num_channels": [1]},
            "initialize": ["$command_line.read()"],
            "run": ["$print('told', @rank, @model_dir, @diffusion_unet_train, @diffusion_unet_def, @seed)"],
        },
        layer={"rank": "$int(os.environ['RANK']) + 10"},
        env={"model_dir": "theirs"},
        knobs={"diffusion_unet_train": {"lr": 0.5, "batch_size": 2}},
        net={"diffusion_unet_def": {"num_channels": [8, 16]}},
    )  # fmt: skip
    door = replace(train_diffusion.DOOR, config=str(config), multi_gpu=str(layer))
    done = started(door, *given(e, t, c), "-g", "2", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("taken the other way round") == 1
    merged = "theirs {'lr': 0.5, 'batch_size': 2} {'num_channels': [8, 16]} 3"
    assert all(f"told {rank} {merged}" in done.stdout for rank in (10, 11))


@each
def test_help_tells_the_files_and_options(training: str, capsys: pytest.CaptureFixture[str]) -> None:
    door = DOORS[training]
    with pytest.raises(SystemExit) as status:
        launcher.parse(door, ["--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert status.value.code == 0 and f"scripts/train_{training}.py -e ENV" in told
    assert all(text in told for text in (door.c.option, door.c.holds, door.t.option, door.t.holds, "-g N, --gpus N"))


def test_the_network_file_of_diffusion_is_that_of_the_autoencoder_and_more() -> None:
    network = json.loads((EXAMPLES / "config_network_rflow.json").read_text())
    assert json.loads((EXAMPLES / "config_network.json").read_text()).items() <= network.items()
    for name, count in (("diffusion_unet_def", 180.5e6), ("controlnet_def", 72.0e6)):
        network[name]["use_flash_attention"] = False  # which MONAI refuses where there is no GPU
        with torch.device("meta"):
            built = ConfigParser(network).get_parsed_content(name)
        assert sum(parameter.numel() for parameter in built.parameters()) == pytest.approx(count, rel=1e-3)
