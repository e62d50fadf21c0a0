"""The configs themselves: no dead key, layers that fit, copies that agree, versions that are the pinned ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from scripts.common.command_line import check_command_line
from scripts.training.schedule import advance
from tests.helpers import (
    MULTI_GPU,
    MULTI_GPU_CONTROLNET,
    MULTI_GPU_DIFFUSION,
    SMALL,
    TRAIN,
    TRAIN_CONTROLNET,
    TRAIN_DIFFUSION,
    guide_files,
)

DEMO, DEMO_DIFFUSION, EXAMPLES = Path("configs/demo.json"), Path("configs/demo_diffusion.json"), Path("docs/examples")
CONFIGS = [TRAIN, *(Path(f"configs/{name}.json") for name in ("inference", "encode", "evaluate"))]
GENERATE, EVALUATE_GENERATED = Path("configs/generate.json"), Path("configs/evaluate_generated.json")
DIFFUSION = [TRAIN_DIFFUSION, GENERATE]
NETWORK_FILE = "config_network_rflow"
DIFFUSION_EXAMPLES = ["environment_maisi_diff_model", "config_maisi_diff_model", NETWORK_FILE]
CONTROLNET_EXAMPLES = ["environment_maisi_controlnet_train", "config_maisi_controlnet_train", NETWORK_FILE]
# Of the three files of NV-Generate-CTMR, and of what MONAI asks of each bundle, not all is needed.
UNREAD = {TRAIN_DIFFUSION: {"dataset_dir", "data_base_dir", "output_prefix"}, GENERATE: {"dataset_dir"}}


def strings(node: Any) -> list[str]:
    if isinstance(node, dict):
        return [s for key, value in node.items() if key != "_desc_" for s in strings(value)]
    if isinstance(node, list):
        return [s for value in node for s in strings(value)]
    return [node] if isinstance(node, str) else []


@pytest.mark.parametrize("path", [*CONFIGS, *DIFFUSION, TRAIN_CONTROLNET, EVALUATE_GENERATED], ids=lambda p: p.stem)
def test_no_dead_key_and_no_unused_import(path: Path) -> None:
    config = json.loads(path.read_text())
    texts = [t for key, value in config.items() if key != "imports" for t in strings(value)]
    referred = {name for text in texts for name in re.findall(r"@(\w+)", text)} - {"_meta_"}
    entry = {"_desc_", "imports", "initialize", "run", "finalize"}
    assert set(config) - entry - UNREAD.get(path, set()) == referred
    unread = {"cache", "val_batch_size", "cache_rate"}  # accepted because the guide's files have them
    unread |= set(config.get("diffusion_unet_inference", ()))  # each config reads its part, and passes it on whole
    unread |= {name for name in config.get("controlnet_train", ()) if "loss" in name}  # RegionLosses.of takes the group
    names = ("data_option", "autoencoder_train", "diffusion_unet_train", "diffusion_unet_inference", "controlnet_train")
    groups = {g: set(config[g]) for g in names if g in config}
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
    own = {"_desc_", "output_dir", "splits", "evaluator", "dataloader", "dataset"}
    assert configs[1]["dataset"]["data"] == configs[2]["dataset"]["data"] == configs[3]["dataset"]["data"]
    for key in set(configs[1]) & set(configs[2]) & set(configs[3]) - own:
        assert configs[1][key] == configs[2][key] == configs[3][key], key


def test_what_the_configs_of_diffusion_share_is_the_same() -> None:
    base, training, generation = (json.loads(path.read_text()) for path in (TRAIN, *DIFFUSION))
    for key in ("spatial_dims", "image_channels", "latent_channels", "autoencoder_def", "model_dir", "store_dir"):
        assert training[key] == base[key] and generation.get(key, base[key]) == base[key], key
    own = {"_desc_", "imports", "device", "rank", "num_ranks", "dataset_dir", "output_dir", "initialize", "run"}
    own |= {"generator", "autoencoder", "modality_mapping"}  # of the same classes, from other places
    for key in set(training) & set(generation) - own:
        assert training[key] == generation[key], key


def test_what_the_config_of_the_controlnet_shares_is_the_same() -> None:
    training, diffusion, generation = (json.loads(p.read_text()) for p in (TRAIN_CONTROLNET, *DIFFUSION))
    own = {"_desc_", "imports", "dataset_dir", "data_base_dir", "json_data_list", "network_def", "unet_net", "average"}
    own |= {"weights_files", "generator", "optimizer", "scheduler", "log", "train", "validate", "initialize", "run"}
    for key in set(training) & set(diffusion) - own:
        assert training[key] == diffusion[key], key
    for key in ("exp_name", "roi_labels", "trained_diffusion_path", "scale_factor"):
        assert training[key] == generation[key], key
    network = {key: value for key, value in generation["controlnet_def"].items() if key != "_disabled_"}
    assert training["controlnet_def"] == network


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


@pytest.mark.parametrize("path", DIFFUSION, ids=lambda p: p.stem)
def test_their_files_and_the_demo_are_layers_of_diffusion(path: Path) -> None:
    demos, files = [str(DEMO), str(DEMO_DIFFUSION)], [str(EXAMPLES / f"{name}.json") for name in DIFFUSION_EXAMPLES]
    parsers = []
    for layers in (demos, files, [str(MULTI_GPU_DIFFUSION)] if path == TRAIN_DIFFUSION else []):
        check_command_line(["monai/bundle/__main__.py", "run", "--config_file", str([str(path), *layers])])
        parsers.append(ConfigParser())
        parsers[-1].read_config([str(path), *layers])
    demo, theirs, _ = parsers
    small = json.loads(DEMO_DIFFUSION.read_text())["+diffusion_unet_def"]
    assert small.items() <= demo["diffusion_unet_def"].items() and demo["diffusion_unet_def"]["include_fc"]
    assert theirs["model_dir"] == "./models" and theirs["autoencoder_def"]["norm_float16"] is True


def test_their_files_are_layers_of_the_controlnet() -> None:
    files = [str(EXAMPLES / f"{name}.json") for name in CONTROLNET_EXAMPLES]
    for layers in (files, [str(MULTI_GPU_CONTROLNET)]):
        check_command_line(["monai/bundle/__main__.py", "run", "--config_file", str([str(TRAIN_CONTROLNET), *layers])])
    parser = ConfigParser()
    parser.read_config([str(TRAIN_CONTROLNET), *files])
    assert parser["model_dir"] == "./models" and parser["controlnet_def"]["use_flash_attention"] is True


def test_expressions_are_short_calls() -> None:
    for path in Path("configs").glob("*.json"):
        for text in strings(json.loads(path.read_text())):
            if text.startswith("$"):
                assert len(text) <= 90 and "lambda" not in text and " if " not in text.replace("'cuda' if", ""), text


BASES = {
    DEMO: [TRAIN],
    DEMO_DIFFUSION: [*DIFFUSION, EVALUATE_GENERATED],
    Path("configs/demo_controlnet.json"): [TRAIN_CONTROLNET, GENERATE],
}


@pytest.mark.parametrize(("layer", "bases"), BASES.items(), ids=lambda value: getattr(value, "stem", ""))
def test_layers_override_only_what_exists(layer: Path, bases: list[Path]) -> None:
    parsers = [ConfigParser(json.loads(path.read_text())) for path in bases]
    for key in json.loads(layer.read_text()):
        assert key == "_desc_" or any(key.lstrip("+") in parser for parser in parsers), key


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


@pytest.mark.parametrize(
    ("layer", "base"),
    [(MULTI_GPU, TRAIN), (MULTI_GPU_DIFFUSION, TRAIN_DIFFUSION), (MULTI_GPU_CONTROLNET, TRAIN_CONTROLNET)],
)
def test_the_layer_is_short_and_overrides_what_is_there(layer: Path, base: Path) -> None:
    assert len(layer.read_text().splitlines()) <= 40
    assert set(json.loads(layer.read_text())) - {"_desc_", "finalize"} <= set(json.loads(base.read_text()))


def test_the_example_files_hold_the_defaults() -> None:
    base = json.loads(TRAIN.read_text())
    training = json.loads((EXAMPLES / "config_maisi_vae_train.json").read_text())
    assert training == {group: base[group] for group in ("data_option", "autoencoder_train")}
    network = json.loads((EXAMPLES / "config_network.json").read_text())
    ignored = {"_desc_", "norm_float16", "num_splits", "save_mem"}
    ours = {key: value for key, value in base["autoencoder_def"].items() if key not in ignored}
    assert {k: v for k, v in network.pop("autoencoder_def").items() if k not in ignored} == ours
    assert network.items() <= base.items()


@pytest.mark.parametrize(
    ("config", "names", "groups"),
    [
        (TRAIN_DIFFUSION, DIFFUSION_EXAMPLES, ["diffusion_unet_train", "diffusion_unet_inference"]),
        (TRAIN_CONTROLNET, CONTROLNET_EXAMPLES, ["controlnet_train"]),
    ],
    ids=["diffusion", "controlnet"],
)
def test_the_example_files_of_diffusion_hold_the_defaults(config: Path, names: list[str], groups: list[str]) -> None:
    base = json.loads(config.read_text())
    environment, training, network = (json.loads((EXAMPLES / f"{name}.json").read_text()) for name in names)
    assert training == {group: base[group] for group in groups}
    base.setdefault("controlnet_def", network["controlnet_def"])  # of which latent diffusion makes nothing
    ignored = {"_desc_", "norm_float16", "num_splits", "save_mem", "use_flash_attention"}
    for name in ("autoencoder_def", "diffusion_unet_def", "controlnet_def"):
        ours, theirs = ({k: v for k, v in d[name].items() if k not in ignored} for d in (base, network))
        assert ours == theirs
        network.pop(name)
    assert network.items() <= base.items()
    parser = ConfigParser(base)
    for key, value in environment.items():
        found = parser.get_parsed_content(key)
        assert (found and Path(found)) == (value and Path(value)), key


def test_the_reference_recipe_restores_the_references_schedule_and_switches_off_what_is_ours() -> None:
    parser = ConfigParser()
    parser.read_config([str(TRAIN), "configs/reference_recipe.json"])
    parser.update(SMALL)
    for which in "gd":
        optimizer, scheduler = (parser.get_parsed_content(f"{name}_{which}") for name in ("optimizer", "scheduler"))
        rates = []
        for _ in range(150):
            rates.append(optimizer.param_groups[0]["lr"] / 1e-4)
            advance([scheduler], 1)
        assert rates == pytest.approx([0.01] * 10 + [0.1] * 10 + [1.0] * 130, rel=1e-12)
    layer = json.loads(Path("configs/reference_recipe.json").read_text())
    knobs = {key: value for key, value in layer.items() if key != "_desc_"}
    off = ("lr_decay", "ema_decay", "discriminator_start", "scale_equivariance", "decoder_finish")
    assert knobs == dict.fromkeys(off, 0) | {"patch_curriculum": None}
    check_command_line(["x", "run", "--config_file", f"['{TRAIN}','configs/reference_recipe.json']"])
