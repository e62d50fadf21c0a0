"""Whole trainings through configs/train_controlnet.json, with the overrides that a user would type."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.bundle import ConfigParser

from scripts.networks import diffusion_files
from scripts.networks.diffusion_files import UNET as UNET_FILE
from scripts.networks.weights import write_tensors
from tests.helpers import (
    CONTROLNET,
    NETWORK,
    TINY_CONTROLNET,
    TRAIN_CONTROLNET,
    UNET,
    assert_equal_logs,
    call,
    controlnet_folders,
    finish,
    finish_killed,
    last_line_of,
    make_labelled,
    run,
    same,
    scalars,
    small_unet,
    start_ranks,
    train_here,
    words,
    workflow,
)

NAME, DIFFUSION = "controlnet_3d_rflow-ct", "diff_unet_3d_rflow-ct.pt"
KNOBS = {
    "n_epochs": 3, "lr": 1e-2, "weighted_loss_label": [3, 23], "weighted_loss": 5, "use_region_contrasive_loss": True,
    # All but nothing, so that the batches of ranks make one loss: the contrast is a quotient of sums over a batch.
    "region_contrasive_loss_weight": 1e-12,
}  # fmt: skip
SHORT = TINY_CONTROLNET | {
    **{f"controlnet_train#{name}": value for name, value in KNOBS.items()},
    "roi_labels": {"23": "neighbours"},
    "checkpoint_minutes": 0,
    "num_workers": 1,
    "ema_decay": 0.9,
    "sample_interval": 2,
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datalist of six latents of two sizes to train on, with their label maps, and two that are held back."""
    sizes = [(8, 4, 4)] * 4 + [(8, 4, 6)] * 2 + [(8, 4, 4), (8, 4, 6)]
    return make_labelled(tmp_path_factory.mktemp("latents"), sizes)


def events(folder: Path, name: str = NAME) -> Path:
    return folder / "outputs/tfevent_ct" / name


def content(folder: Path, name: str = f"{NAME}.pt") -> dict[str, Any]:
    return torch.load(folder / "models" / name, weights_only=True)


def steps(folder: Path, tag: str) -> list[int]:
    return [event.step for event in scalars(events(folder)).Scalars(tag)]


def stock(**shape: Any) -> ControlNetMaisi:
    given = {"spatial_dims": 3, "in_channels": 4, "num_class_embeds": 128, "resblock_updown": True, "include_fc": True}
    return ControlNetMaisi(**{**given, **CONTROLNET, "use_flash_attention": False} | shape)


# Killed and gone on, and several ranks


def begin(count: int, folder: Path, latents: Path, weights: Path, log: Path, at: int = 0) -> list[Any]:
    """Start a training in so many ranks, which make the same steps however many they are."""
    options = SHORT | {"controlnet_train#batch_size": 2 // count, "trained_autoencoder_path": str(weights)}
    given = controlnet_folders(folder, latents)
    return start_ranks(count, train_here, "train_controlnet", options | given, at, log=log)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory, latents: Path, weights: Path) -> dict[int, Path]:
    """The folders of unbroken trainings of nine steps, by their number of ranks."""
    folders = {}
    for count in (1, 2):
        folders[count] = tmp_path_factory.mktemp(f"whole{count}")
        finish(begin(count, folders[count], latents, weights, folders[count] / "log"), folders[count] / "log")
    return folders


@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("count", [1, 2])
def test_killed_at_random_steps_equals_the_unbroken_training(
    count: int, kills: int, wholes: dict[int, Path], latents: Path, weights: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    for at in sorted(random.Random(count).sample(range(2, 10), kills)):
        finish_killed(begin(count, tmp_path, latents, weights, log, at))
        assert content(tmp_path, f"{NAME}_checkpoint.pt")["iteration"] == at - 1
    finish(begin(count, tmp_path, latents, weights, log), log)
    one, other = (content(folder, f"{NAME}_checkpoint.pt")["state"] for folder in (wholes[count], tmp_path))
    for name, which in (("controlnet", lambda state: state), ("controlnet_average", lambda state: state["network"])):
        assert same(which(one[name]), which(other[name])), name
    assert same(*(content(folder)["controlnet_state_dict"] for folder in (wholes[count], tmp_path)))
    wanted = ("loss", "loss_quarter_1", "region_contrast", "region_background", "grad_norm")
    tags = [*(f"train_iter/{name}" for name in wanted), "train_epoch/loss", "val_epoch/loss"]
    assert_equal_logs(events(wholes[count]), events(tmp_path), *tags)
    assert steps(tmp_path, "train_iter/loss") == list(range(1, 10))


def test_two_ranks_take_the_steps_of_one_process_with_twice_the_batch(wholes: dict[int, Path]) -> None:
    one, two = (content(wholes[count]) for count in (1, 2))
    states = one["controlnet_state_dict"], two["controlnet_state_dict"]
    assert states[0].keys() == states[1].keys()
    first, second = (torch.cat([tensor.flatten() for tensor in state.values()]) for state in states)
    # Adam makes whole steps of gradients that are nothing but rounding, as those of a bias before a norm are.
    assert (first - second).abs().median() < 1e-5 and (first - second).norm() < 1e-2 * first.norm()
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["scale_factor"] == two["scale_factor"]
    assert one["facts"]["labels"] == two["facts"]["labels"]
    logs = [scalars(events(wholes[count])) for count in (1, 2)]
    assert set(logs[0].Tags()["scalars"]) == set(logs[1].Tags()["scalars"])
    for tag in logs[0].Tags()["scalars"]:
        if "/loss" in tag:
            values = [{event.step: event.value for event in log.Scalars(tag)} for log in logs]
            assert values[0] == pytest.approx(values[1], rel=1e-3), tag
    printed = (wholes[2] / "log").read_text()
    assert printed.count("epoch 1/3: loss") == 1 and printed.count("1 volumes sampled") == 2


def test_the_file_of_the_unet_stays_and_the_controlnet_learns(wholes: dict[int, Path], tmp_path: Path) -> None:
    controlnet_folders(tmp_path, tmp_path)
    untouched = (tmp_path / "models" / DIFFUSION).read_bytes()
    for folder in wholes.values():
        assert (folder / "models" / DIFFUSION).read_bytes() == untouched
        validations = content(folder, f"{NAME}_checkpoint.pt")["validations"]
        assert validations[-1]["loss"] < validations[0]["loss"]


# What a training leaves


def test_a_training_leaves_what_the_guide_promises(wholes: dict[int, Path], latents: Path) -> None:
    folder = wholes[1]
    validations = content(folder, f"{NAME}_checkpoint.pt")["validations"]
    best = min(validations, key=lambda v: v["loss"])["epoch"]
    names = {path.name for path in (folder / "models").iterdir()}
    assert names == {f"{NAME}.pt", f"{NAME}_best_epoch{best}.pt", f"{NAME}_checkpoint.pt", DIFFUSION}
    found, kept = content(folder), content(folder, f"{NAME}_checkpoint.pt")
    assert set(found) == {"epoch", "loss", "num_train_timesteps", "scale_factor", "facts", "controlnet_state_dict"}
    assert (found["epoch"], found["loss"], float(found["scale_factor"])) == (3, validations[-1]["loss"], 1.25)
    assert found["facts"]["labels"] == [0, 1, 3, 23, 200] and found["facts"]["autoencoder_sha256"] == "ab" * 32
    stock().load_state_dict(found["controlnet_state_dict"], strict=True)
    assert same(found["controlnet_state_dict"], kept["state"]["controlnet_average"]["network"])
    assert not same(found["controlnet_state_dict"], kept["state"]["controlnet"])
    rates = [event.value for event in scalars(events(folder)).Scalars("train_iter/learning_rate")]
    assert rates == pytest.approx([1e-2 * (1 - k / 9) ** 2 for k in range(9)], rel=1e-5)
    logged = scalars(events(folder)).Scalars("val_epoch/loss")
    assert [(e.step, e.value) for e in logged] == [(v["epoch"], pytest.approx(v["loss"])) for v in validations]
    assert [e.step for e in scalars(events(folder)).Images("sample_v6_label")] == [2, 3]
    assert (folder / "outputs" / "samples.png").stat().st_size > 5000
    printed = (folder / "log").read_text()
    for said in (
        "6 to train, 2 to validate", f"UNet          {folder}/models/{DIFFUSION} (SHA-256", "frozen",
        "1 (6), 3 (6), 23 (6), 200 (6) (of 6 maps)", f"1.2500 (of {folder}/models/{DIFFUSION})",
        "controlnet 0.06 M", "loss on held-out volumes",
    ):  # fmt: skip
        assert said in printed


def test_a_training_without_anything_held_back_says_so_and_a_finished_one_changes_nothing(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = TINY_CONTROLNET | {"controlnet_train#n_epochs": 1, "controlnet_train#fold": 7}
    options |= controlnet_folders(tmp_path, latents)
    started: Any = run("train_controlnet", **options)
    assert started.check_properties() == []
    printed = capsys.readouterr().out
    assert "8 to train, 0 to validate" in printed
    assert "none, and no best epoch: the datalist has no list 'validation', and no entry of contr" in printed
    before = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    assert before.keys() == {f"{NAME}.pt", f"{NAME}_checkpoint.pt", DIFFUSION}
    run("train_controlnet", **options)
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()} == before


# NV-Generate-CTMR's files


def layers(root: Path, latents: Path, training: dict[str, Any] | None = None, **environment: Any) -> list[str]:
    """Its environment, training and network files, as docs/examples has them, made small."""
    names = ("environment_maisi_controlnet_train", "config_maisi_controlnet_train", "config_network_rflow")
    env, knobs, network = (json.loads(Path(f"docs/examples/{name}.json").read_text()) for name in names)
    env |= {key: value for key, value in controlnet_folders(root, latents).items() if key in env} | environment
    knobs = knobs if training is None else training
    knobs["controlnet_train"]["n_epochs"] = 1
    network["diffusion_unet_def"] |= UNET
    network["controlnet_def"] |= CONTROLNET
    network["autoencoder_def"] |= NETWORK
    for name, written in {"env": env, "knobs": knobs, "network": network}.items():
        (root / f"{name}.json").write_text(json.dumps(written))
    return [str(root / f"{name}.json") for name in ("env", "knobs", "network")]


OURS = {"num_workers": 0, "val_draws": 1, "sample_interval": 0}  # beside what is in their files
THEIRS: dict[str, Any] = {  # as it was before the contrast
    "controlnet_train": {
        "batch_size": 1, "cache_rate": 0.0, "fold": 0, "lr": 1e-5, "n_epochs": 1, "weighted_loss_label": [23],
        "weighted_loss": 100,
    },
    "controlnet_infer": {
        "num_inference_steps": 30, "autoencoder_sliding_window_infer_size": [80, 80, 80],
        "autoencoder_sliding_window_infer_overlap": 0.4, "modality": 1,
    },
}  # fmt: skip
CONTRAST = {
    "use_region_contrasive_loss": True,
    "region_contrasive_loss_delta": 2,
    "region_contrasive_loss_weight": 0.01,
}


@pytest.mark.parametrize("contrast", [{}, CONTRAST], ids=["before the contrast", "with it"])
def test_their_files_are_layers_with_several_lists_of_folds_and_no_side_files(
    contrast: dict[str, Any], latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = make_labelled(tmp_path / "second", [(8, 4, 4)] * 5)
    for side in second.parent.glob("*_emb.nii.gz.json"):  # spacing and modality are in the datalist
        side.unlink()
    lists = {"json_data_list": [str(latents), str(second)], "data_base_dir": [str(latents.parent), str(second.parent)]}
    diffusion, start = str(tmp_path / "theirs.pt"), str(tmp_path / "start.pt")
    theirs = {"exp_name": "controlnet_kits", "trained_diffusion_path": diffusion, "existing_ckpt_filepath": start}
    knobs = THEIRS | {"controlnet_train": THEIRS["controlnet_train"] | contrast}
    files = layers(tmp_path, latents, knobs, **theirs, **lists, trained_controlnet_path="./none.pt")
    (tmp_path / "models" / DIFFUSION).rename(diffusion)
    torch.save({"epoch": 4, "loss": torch.tensor(0.1), "controlnet_state_dict": stock().state_dict()}, start)
    started: Any = run([str(TRAIN_CONTROLNET), *files], **OURS, store_dir=str(tmp_path / "store"))
    assert len(started.trainer.data_loader.dataset) == 6 + 3 and content(tmp_path, "controlnet_kits.pt")["epoch"] == 1
    losses = started.trainer.losses
    assert (losses.labels, losses.weight, losses.contrast_weight) == ((23,), 100, 0.01 if contrast else 0)
    tags = scalars(events(tmp_path, "controlnet_kits")).Tags()["scalars"]
    assert ("train_iter/region_contrast" in tags) == bool(contrast)
    said = "warning: roi_labels has 24, 26, 27, 116, 117, which no training map has; correct it"
    assert (said in capsys.readouterr().err) == bool(contrast)


@pytest.mark.slow
def test_the_script_starts_two_ranks(latents: Path, tmp_path: Path) -> None:
    e, c, t = layers(tmp_path, latents, {"controlnet_train": THEIRS["controlnet_train"] | CONTRAST})
    command = [sys.executable, "scripts/train_controlnet.py", "-e", e, "-c", c, "-t", t, "-g", "2"]
    done = call([*command, *words(OURS | {"store_dir": str(tmp_path / "store")})])
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path)["epoch"] == 1
    assert done.stdout.count("batch 1 on each of 2 ranks") == 1
    assert done.stderr.count("warning: roi_labels has 24, 26, 27, 116, 117, which no training map has") == 1  # rank 0


# What cannot be trained


def test_a_refused_training_ends_with_status_1_and_one_clear_line(latents: Path, tmp_path: Path) -> None:
    options, log = TINY_CONTROLNET | controlnet_folders(tmp_path, latents), tmp_path / "log"
    (tmp_path / "models" / DIFFUSION).unlink()
    printed = finish(start_ranks(1, train_here, "train_controlnet", options, log=log), log, status=1)
    last = f"error: {tmp_path}/models: holds no weights of latent diffusion ({DIFFUSION} and the like); train with"
    assert printed.splitlines()[-1].startswith(last)


def test_a_training_does_not_go_on_with_another_unet(latents: Path, tmp_path: Path) -> None:
    options = TINY_CONTROLNET | {"controlnet_train#n_epochs": 1} | controlnet_folders(tmp_path, latents)
    run("train_controlnet", **options)
    other = diffusion_files.content(small_unet(5), UNET_FILE, epoch=1, loss=1.0, scale_factor=1.25)
    write_tensors(other, tmp_path / "models" / DIFFUSION)
    last = last_line_of("train_controlnet", **options | {"controlnet_train#n_epochs": 2})
    assert f"{NAME}_checkpoint.pt: unet_sha256 was " in last and "; restore it, or start over in another mod" in last


@pytest.mark.slow
def test_one_step_of_the_full_network(tmp_path: Path) -> None:
    latents = make_labelled(tmp_path / "latents", [(32, 32, 32)] * 2)
    given = controlnet_folders(tmp_path, latents)
    parser = ConfigParser(json.loads(TRAIN_CONTROLNET.read_text()))
    unet = parser.get_parsed_content("diffusion_unet_def")
    for parameter in unet.parameters():
        if not parameter.any():  # the output of a fresh UNet is 0 whatever is added to its levels
            torch.nn.init.normal_(parameter, std=0.02)
    write_tensors(
        diffusion_files.content(unet, UNET_FILE, epoch=1, loss=1.0, scale_factor=1.0), tmp_path / "models" / DIFFUSION
    )
    options = {"num_workers": 0, "sample_interval": 0, "ema_decay": 0, "controlnet_train#fold": 9}
    started: Any = workflow("train_controlnet", **options | {"controlnet_train#n_epochs": 1}, **given)
    trainer = started.trainer
    before = trainer.bare["controlnet"].controlnet_mid_block.conv.weight.detach().clone()
    trainer.state.epoch_length = 1
    trainer.run()
    assert trainer.state.iteration == 1
    assert not torch.equal(before, trainer.bare["controlnet"].controlnet_mid_block.conv.weight)
    full = stock(
        num_channels=[64, 128, 256, 512], attention_levels=[False, False, True, True], num_head_channels=[0, 0, 32, 32],
        num_res_blocks=2, norm_num_groups=32, conditioning_embedding_num_channels=[8, 32, 64],
    )  # fmt: skip
    full.load_state_dict(content(tmp_path)["controlnet_state_dict"], strict=True)
