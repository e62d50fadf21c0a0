"""The configs themselves: no dead key, layers that fit, copies that agree, versions that are the pinned ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from scripts.common.command_line import check_command_line
from tests.helpers import MULTI_GPU, TRAIN, guide_files

DEMO, EXAMPLES = Path("configs/demo.json"), Path("docs/examples")
CONFIGS = [TRAIN, *(Path(f"configs/{name}.json") for name in ("inference", "encode", "evaluate"))]


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
    unread = {"cache", "val_batch_size"}  # accepted because the guide's files have them
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
    layers = [str(path), str(DEMO), *guide_files(tmp_path, datalist)[1:]]
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


def test_the_layer_is_short_and_overrides_what_is_there() -> None:
    assert len(MULTI_GPU.read_text().splitlines()) <= 40
    assert set(json.loads(MULTI_GPU.read_text())) - {"_desc_", "finalize"} <= set(json.loads(TRAIN.read_text()))


def test_the_example_files_hold_the_defaults() -> None:
    base = json.loads(TRAIN.read_text())
    training = json.loads((EXAMPLES / "config_maisi_vae_train.json").read_text())
    assert training == {group: base[group] for group in ("data_option", "autoencoder_train")}
    network = json.loads((EXAMPLES / "config_network.json").read_text())
    ignored = {"_desc_", "norm_float16", "num_splits", "save_mem"}
    ours = {key: value for key, value in base["autoencoder_def"].items() if key not in ignored}
    assert {k: v for k, v in network.pop("autoencoder_def").items() if k not in ignored} == ours
    assert network.items() <= base.items()


def test_the_reference_recipe_restores_the_references_schedule_and_switches_off_what_is_ours() -> None:
    parser = ConfigParser()
    parser.read_config([str(TRAIN), "configs/reference_recipe.json"])
    rate = parser.get_parsed_content("learning_rate")
    assert [rate(epoch) for epoch in range(150)] == [0.01] * 10 + [0.1] * 10 + [1.0] * 130
    layer = json.loads(Path("configs/reference_recipe.json").read_text())
    knobs = {key: value for key, value in layer.items() if key != "_desc_"}
    assert knobs == dict.fromkeys(("lr_decay", "ema_decay", "discriminator_start", "scale_equivariance"), 0)
    check_command_line(["x", "run", "--config_file", f"['{TRAIN}','configs/reference_recipe.json']"])
