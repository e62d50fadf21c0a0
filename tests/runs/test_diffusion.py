"""Whole trainings through configs/train_diffusion.json, with the overrides that a user would type."""

from __future__ import annotations

import json
import logging
import math
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

from scripts.common.errors import last_line
from tests.helpers import (
    NETWORK,
    TINY_DIFFUSION,
    TRAIN_DIFFUSION,
    UNET,
    assert_equal_logs,
    call,
    diffusion_folders,
    finish,
    finish_killed,
    make_latents,
    run,
    same,
    scalars,
    small_unet,
    start_ranks,
    train_here,
    words,
    workflow,
)

NAME = "diff_unet_3d_rflow-ct"
AT_ONCE = 2 / math.sqrt(math.pi)  # E|x - n| of two independent standard normal numbers
SHORT = TINY_DIFFUSION | {
    "diffusion_unet_train#n_epochs": 3,
    "diffusion_unet_train#lr": 1e-2,
    "checkpoint_minutes": 0,
    "num_workers": 1,
    "ema_decay": 0.9,
    "sample_interval": 2,
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datalist of six latents of two sizes to train on, and two to validate."""
    return make_latents(tmp_path_factory.mktemp("latents"))


def events(folder: Path) -> Path:
    return folder / "outputs/tfevent_ct/diffusion"


def content(folder: Path, name: str = f"{NAME}.pt") -> dict[str, Any]:
    return torch.load(folder / "models" / name, weights_only=True)


def steps(folder: Path, tag: str) -> list[int]:
    return [event.step for event in scalars(events(folder)).Scalars(tag)]


def test_a_training_leaves_what_the_guide_promises(latents: Path, tmp_path: Path, capsys: Any) -> None:
    options = TINY_DIFFUSION | diffusion_folders(tmp_path, latents)
    started: Any = run("train_diffusion", **options)
    assert started.check_properties() == []
    validations = started.trainer.progress.validations
    names = {path.name for path in (tmp_path / "models").iterdir()}
    best = min(validations, key=lambda v: v["loss"])["epoch"]
    assert names == {f"{NAME}.pt", f"{NAME}_best_epoch{best}.pt", f"{NAME}_checkpoint.pt"}
    for tag in ("loss", "loss_quarter_1", "grad_norm", "learning_rate"):
        assert set(steps(tmp_path, f"train_iter/{tag}")) <= set(range(1, 7)), tag
    assert steps(tmp_path, "train_iter/loss") == list(range(1, 7))
    logged = scalars(events(tmp_path)).Scalars("val_epoch/loss")
    assert [(e.step, e.value) for e in logged] == [(v["epoch"], pytest.approx(v["loss"])) for v in validations]
    rates = [event.value for event in scalars(events(tmp_path)).Scalars("train_iter/learning_rate")]
    assert rates == pytest.approx([1e-4 * (1 - k / 6) ** 2 for k in range(6)], rel=1e-5)
    printed = capsys.readouterr().out
    for said in (
        "6 to train, 2 to validate", "4 of 8 x 4 x 4, 2 of 8 x 4 x 6", "2 ct (1), 2 ct_contrast (3), 2 mri_t1 (9)",
        "(1 / std over all 6 training latents)", "loss on held-out volumes",
    ):  # fmt: skip
        assert said in printed
    assert not list((tmp_path / "outputs").glob("*.png"))

    before = {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()}
    run("train_diffusion", **options)  # again: finished, so nothing changes
    assert {path.name: path.read_bytes() for path in (tmp_path / "models").iterdir()} == before


def test_the_loss_begins_where_a_network_that_tells_nothing_is(latents: Path, tmp_path: Path) -> None:
    still = {"diffusion_unet_train#lr": 1e-30, "diffusion_unet_train#n_epochs": 1, "val_draws": 8}
    started: Any = run("train_diffusion", **TINY_DIFFUSION | still | diffusion_folders(tmp_path, latents))
    assert started.trainer.progress.validations[0]["loss"] == pytest.approx(AT_ONCE, abs=0.02)
    first = scalars(events(tmp_path)).Scalars("train_iter/loss")[0].value
    assert first == pytest.approx(AT_ONCE, abs=0.06)


def test_weights_are_in_the_layout_of_nv_generate_ctmr(latents: Path, tmp_path: Path) -> None:
    trainer = run("train_diffusion", **SHORT | {"sample_interval": 0} | diffusion_folders(tmp_path, latents)).trainer
    found, kept = content(tmp_path), content(tmp_path, f"{NAME}_checkpoint.pt")
    assert set(found) == {"epoch", "loss", "num_train_timesteps", "scale_factor", "facts", "unet_state_dict"}
    assert (found["epoch"], found["num_train_timesteps"]) == (3, 1000)
    assert found["loss"] == trainer.progress.validations[-1]["loss"]
    assert found["scale_factor"].shape == () and float(found["scale_factor"]) == pytest.approx(1, abs=0.05)
    assert found["facts"] == {
        "autoencoder_sha256": "ab" * 32, "scale_factor_origin": "1 / std over all 6 training latents",
        "sizes": [[8, 4, 4], [8, 4, 6]], "spacing": [[1.5, 1.5], [1.5, 1.5], [2.0, 7.0]],
        "field_of_view": [[48.0, 48.0], [24.0, 24.0], [32.0, 168.0]],
        "modalities": {"ct": 1, "ct_contrast": 3, "mri_t1": 9},
    }  # fmt: skip
    stock = DiffusionModelUNetMaisi(
        spatial_dims=3, in_channels=4, out_channels=4, resblock_updown=True, include_spacing_input=True,
        num_class_embeds=128, include_fc=True, **UNET | {"use_flash_attention": False},
    )  # fmt: skip
    stock.load_state_dict(found["unet_state_dict"], strict=True)
    assert same(found["unet_state_dict"], kept["state"]["unet_average"]["network"])
    assert not same(found["unet_state_dict"], kept["state"]["unet"])
    assert kept["state"]["unet_average"]["steps"] == 9


# Killed and gone on, and several ranks


def begin(count: int, folder: Path, latents: Path, weights: Path, log: Path, at: int = 0) -> list[Any]:
    """Start a training in so many ranks, which make the same steps however many they are."""
    options = SHORT | {"diffusion_unet_train#batch_size": 2 // count, "trained_autoencoder_path": str(weights)}
    return start_ranks(count, train_here, "train_diffusion", options | diffusion_folders(folder, latents), at, log=log)


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
    for name, which in (("unet", lambda state: state), ("unet_average", lambda state: state["network"])):
        assert same(which(one[name]), which(other[name])), name
    assert same(*(content(folder)["unet_state_dict"] for folder in (wholes[count], tmp_path)))
    wanted = ("train_iter/loss", "train_iter/loss_quarter_1", "train_epoch/loss", "val_epoch/loss")
    assert_equal_logs(events(wholes[count]), events(tmp_path), *wanted)
    assert steps(tmp_path, "train_iter/loss") == list(range(1, 10))


def test_two_ranks_take_the_steps_of_one_process_with_twice_the_batch(wholes: dict[int, Path]) -> None:
    one, two = (content(wholes[count]) for count in (1, 2))
    states = one["unet_state_dict"], two["unet_state_dict"]
    assert states[0].keys() == states[1].keys()
    first, second = (torch.cat([tensor.flatten() for tensor in state.values()]) for state in states)
    # Adam makes whole steps of gradients that are nothing but rounding, as those of a bias before a norm are.
    assert (first - second).abs().median() < 1e-5 and (first - second).norm() < 1e-2 * first.norm()
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4) and one["scale_factor"] == two["scale_factor"]
    logs = [scalars(events(wholes[count])) for count in (1, 2)]
    assert set(logs[0].Tags()["scalars"]) == set(logs[1].Tags()["scalars"])
    for tag in logs[0].Tags()["scalars"]:
        if "/loss" in tag:
            values = [{event.step: event.value for event in log.Scalars(tag)} for log in logs]
            assert values[0] == pytest.approx(values[1], rel=1e-3), tag
    printed = (wholes[2] / "log").read_text()
    assert printed.count("epoch 1/3: loss") == 1 and printed.count("1 volumes sampled") == 2


def test_sampling_changes_nothing_but_the_pictures(wholes: dict[int, Path], latents: Path, tmp_path: Path) -> None:
    options = SHORT | {"sample_interval": 0, "num_workers": 0}
    run("train_diffusion", **options, **diffusion_folders(tmp_path, latents))  # without any autoencoder
    assert same(content(tmp_path)["unet_state_dict"], content(wholes[1])["unet_state_dict"])
    assert scalars(events(tmp_path)).Tags()["images"] == []
    sampled = scalars(events(wholes[1]))
    assert sampled.Tags()["images"] == ["sample_seed_0"]
    assert [event.step for event in sampled.Images("sample_seed_0")] == [2, 3]
    assert (wholes[1] / "outputs" / "samples.png").stat().st_size > 5000
    assert not (tmp_path / "outputs" / "samples.png").exists()


def test_a_training_without_validation_says_so_and_goes_on_from_the_end_of_an_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latents = make_latents(tmp_path / "latents", {"training": [(8, 4, 4)] * 2})
    options = TINY_DIFFUSION | diffusion_folders(tmp_path, latents)
    started: Any = workflow("train_diffusion", **options)
    assert "none, and no best epoch: the datalist has no list 'validation'" in capsys.readouterr().out
    started.trainer.add_event_handler(
        Events.ITERATION_STARTED(once=1), lambda _: signal.raise_signal(signal.SIGTERM)
    )  # the only step of the first epoch
    with pytest.raises(SystemExit) as status:
        started.trainer.run()
    assert status.value.code == 75
    assert content(tmp_path, f"{NAME}_checkpoint.pt")["epoch_pending"] and not (tmp_path / f"models/{NAME}.pt").exists()
    run("train_diffusion", **options)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {f"{NAME}.pt", f"{NAME}_checkpoint.pt"}
    assert content(tmp_path)["epoch"] == 2 and steps(tmp_path, "train_iter/loss") == [1, 2]


def test_a_latent_that_breaks_is_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    latents = make_latents(tmp_path / "latents", {"training": [(8, 4, 4)] * 4, "validation": [(8, 4, 4)] * 2})
    started: Any = workflow("train_diffusion", **TINY_DIFFUSION | diffusion_folders(tmp_path, latents))
    for name in ("train", "validate"):
        dataset = started.parser.get_parsed_content(f"{name}#dataset")
        stored = dataset.store.path(dataset.data[1])
        stored.write_bytes(stored.read_bytes()[:100])
    with caplog.at_level(logging.WARNING):
        started.run()
    told = [r.getMessage() for r in caplog.records if "passed over" in r.getMessage()]
    assert sum("step" in text and "v1_emb.nii.gz" in text for text in told) == 2  # once in each epoch
    assert sum("in validation" in text and "v5_emb.nii.gz" in text for text in told) == 2
    assert all(tensor.isfinite().all() for tensor in content(tmp_path)["unet_state_dict"].values())


# Fine-tuning


def test_finetuning_keeps_what_it_starts_from_and_its_scale(
    latents: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    start = models / f"{NAME}.pt"
    theirs = {"epoch": 7, "loss": 0.3, "num_train_timesteps": 1000, "scale_factor": torch.tensor(1.25)}
    torch.save(theirs | {"unet_state_dict": small_unet().state_dict()}, start)
    kept, options = start.read_bytes(), TINY_DIFFUSION | diffusion_folders(tmp_path, latents)
    options |= {"existing_ckpt_filepath": str(start), "diffusion_unet_train#lr": 1e-30}
    with caplog.at_level(logging.WARNING):
        run("train_diffusion", **options | {"diffusion_unet_train#n_epochs": 1})
    said = caplog.text
    assert f"is kept; it writes {NAME}_finetuned.pt" in said
    assert "1.2500, is kept; that of these latents would be" in said
    tuned = content(tmp_path, f"{NAME}_finetuned.pt")
    assert float(tuned["scale_factor"]) == 1.25 and tuned["facts"]["scale_factor_origin"] == f"of {start}"
    torch.testing.assert_close(tuned["unet_state_dict"], dict(small_unet().state_dict()))
    trainer: Any = run("train_diffusion", **options).trainer  # the same command with one more epoch: it goes on
    assert trainer.state.iteration == 6 and content(tmp_path, f"{NAME}_finetuned.pt")["epoch"] == 2
    assert steps(tmp_path, "train_iter/loss") == list(range(1, 7))
    assert start.read_bytes() == kept


# NV-Generate-CTMR's files


def layers(root: Path, latents: Path, **environment: Any) -> list[str]:
    """Its environment, training and network files, as docs/examples has them, made small."""
    examples = Path("docs/examples")
    env, training, network = (
        json.loads((examples / f"{name}.json").read_text())
        for name in ("environment_maisi_diff_model", "config_maisi_diff_model", "config_network_rflow")
    )
    env |= {key: value for key, value in diffusion_folders(root, latents).items() if key in env} | environment
    training["diffusion_unet_train"]["n_epochs"] = 1
    training["diffusion_unet_inference"]["num_inference_steps"] = 2
    network["diffusion_unet_def"] |= UNET
    network["autoencoder_def"] |= NETWORK
    for name, written in {"env": env, "training": training, "network": network}.items():
        (root / f"{name}.json").write_text(json.dumps(written))
    return [str(root / f"{name}.json") for name in ("env", "training", "network")]


OURS = {"num_workers": 0, "val_draws": 1, "sample_count": 1}  # beside what is in their files


def test_the_three_files_are_layers(latents: Path, tmp_path: Path) -> None:
    files = [str(TRAIN_DIFFUSION), *layers(tmp_path, latents, model_filename="mine.pt")]
    run(files, **OURS, sample_interval=0, store_dir=str(tmp_path / "store"))
    assert content(tmp_path, "mine.pt")["epoch"] == 1
    assert (tmp_path / "models" / "mine_checkpoint.pt").exists()


@pytest.mark.slow
def test_the_script_starts_two_ranks_that_train_and_sample(latents: Path, weights: Path, tmp_path: Path) -> None:
    e, c, t = layers(tmp_path, latents, trained_autoencoder_path=str(weights))
    command = [sys.executable, "scripts/train_diffusion.py", "-e", e, "-c", c, "-t", t, "-g", "2"]
    options = OURS | {"diffusion_unet_train#batch_size": 1, "store_dir": str(tmp_path / "store")}
    done = call([*command, *words(options)])
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path)["epoch"] == 1 and (tmp_path / "outputs" / "samples.png").exists()
    assert done.stdout.count("batch 1 on each of 2 ranks") == 1


# What cannot be trained


def beside(folder: Path) -> Callable[..., None]:
    """What changes the side file of the first latent; None takes a value away."""

    def change(**facts: Any) -> None:
        path = folder / "v0_emb.nii.gz.json"
        found = json.loads(path.read_text()) | facts
        path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))

    return change


OTHER = {"num_channels": [8, 24], "num_head_channels": [0, 8]}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "latents of another channel count": ({"latent_channels": 8}, "has 4 channels, but latent_channels is 8; correct"),
    "batches that no size fills": (
        {"diffusion_unet_train#batch_size": 5},
        "batch_size 5 x 1 ranks is more than the 4 training volumes of the commonest size, 8 x 4 x 4; lower it, or",
    ),
    "sizes that are no multiples": (
        {
            "diffusion_unet_def#num_channels": [8, 16, 16, 16],
            "diffusion_unet_def#attention_levels": [False] * 4,
            "diffusion_unet_def#num_head_channels": [0, 0, 0, 8],
        },
        "8 of 8 latents have sizes that are no multiples of 8; encode again with configs/encode.json --resize_multiple",
    ),
    "a DDPM scheduler": (
        {"noise_scheduler": {"_target_": "monai.networks.schedulers.ddpm.DDPMScheduler", "num_train_timesteps": 1000}},
        "noise_scheduler is DDPMScheduler, which is not supported; use RFlowScheduler",
    ),
    "a number beyond the network's": (
        {"diffusion_unet_def#num_class_embeds": 3},
        "modality ct_contrast has number 3, but the network knows 0 to 2 (diffusion_unet_def#num_class_embeds)",
    ),
    "no autoencoder": ({"sample_interval": 1}, "or set sample_interval to 0, for a training without pictures"),
    "a name with a folder": ({"model_filename": "a/b.pt"}, "model_filename is 'a/b.pt'; use the name of a file"),
    "no draws": ({"val_draws": 0}, "val_draws is 0; use a whole number from 1, e.g. 8"),
    "no epochs": ({"diffusion_unet_train#n_epochs": 0}, "diffusion_unet_train#n_epochs is 0; use an integer of at"),
}
SPOILT: dict[str, tuple[dict[str, Any] | None, str]] = {
    "no side file": (None, "v0_emb.nii.gz.json: no such side file; encode the volume"),
    "no spacing": ({"spacing": None}, "v0_emb.nii.gz.json: spacing is None, not three lengths in mm"),
    "an unknown modality": ({"modality": "pet"}, "v0_emb.nii.gz.json: modality 'pet' is not in the modality mapping"),
}


def refusal(latents: Path, root: Path, **options: Any) -> str:
    """How a training ends that must not begin; it writes nothing."""
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        workflow("train_diffusion", **{**TINY_DIFFUSION, **diffusion_folders(root, latents), **options})
    told = last_line(caught.value)
    assert told.startswith("error: ") and "\n" not in told and not list((root / "models").glob("*.pt"))
    return told


@pytest.mark.parametrize("name", REFUSED)
def test_bad_knobs_end_before_the_first_step(name: str, latents: Path, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    assert message in refusal(latents, tmp_path, **options)


@pytest.mark.parametrize("name", SPOILT)
def test_bad_latents_end_before_the_first_step(name: str, tmp_path: Path) -> None:
    latents = make_latents(tmp_path / "latents")
    facts, message = SPOILT[name]
    if facts is None:
        (latents.parent / "v0_emb.nii.gz.json").unlink()
    else:
        beside(latents.parent)(**facts)
    assert message in refusal(latents, tmp_path)


def test_one_latent_without_statistics_ends_before_the_first_step(tmp_path: Path) -> None:
    latents = make_latents(tmp_path / "latents", {"training": [(8, 4, 4)]})
    one = {"diffusion_unet_train#batch_size": 1}
    assert "1 training latents are too few to measure a scale factor; encode more" in refusal(latents, tmp_path, **one)
    (latents.parent / "latent_stats.json").write_text(json.dumps({"scale_factor": 1.5}))
    started: Any = workflow("train_diffusion", **TINY_DIFFUSION | one | diffusion_folders(tmp_path, latents))
    assert started.trainer.scale_factor == 1.5


def test_weights_of_another_architecture_end_before_the_first_step(latents: Path, tmp_path: Path) -> None:
    torch.save({"unet_state_dict": small_unet(**OTHER).state_dict()}, tmp_path / "other.pt")
    told = refusal(latents, tmp_path, existing_ckpt_filepath=str(tmp_path / "other.pt"))
    assert f"error: {tmp_path}/other.pt: under 'unet_state_dict': " in told and "(diffusion_unet_def)" in told


def test_a_refused_training_ends_with_status_1_and_one_clear_line(latents: Path, tmp_path: Path) -> None:
    options, log = TINY_DIFFUSION | diffusion_folders(tmp_path, latents) | {"latent_channels": 8}, tmp_path / "log"
    printed = finish(start_ranks(1, train_here, "train_diffusion", options, log=log), log, status=1)
    assert printed.splitlines()[-1].startswith(f"error: {latents.parent}/v0_emb.nii.gz: has 4 channels, but latent_ch")
    assert not list((tmp_path / "models").glob("*"))


@pytest.mark.slow
def test_one_step_of_the_full_network(tmp_path: Path) -> None:
    latents = make_latents(tmp_path / "latents", {"training": [(32, 32, 32)] * 2})
    options = {"num_workers": 0, "sample_interval": 0, "ema_decay": 0}
    options |= {"diffusion_unet_train#n_epochs": 1, "diffusion_unet_train#batch_size": 1}
    started: Any = workflow("train_diffusion", **options, **diffusion_folders(tmp_path, latents))
    trainer = started.trainer
    assert sum(p.numel() for p in trainer.bare["unet"].parameters()) == 180_500_868
    before = trainer.bare["unet"].out[2].conv.weight.detach().clone()
    trainer.state.epoch_length = 1
    trainer.run()
    assert trainer.state.iteration == 1 and float(trainer.state.output["loss"]) == pytest.approx(AT_ONCE, abs=0.02)
    assert not torch.equal(before, trainer.bare["unet"].out[2].conv.weight)
