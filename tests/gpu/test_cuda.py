"""On a GPU: no step waits, none that is not finite does harm, a training goes on to the bit, and a CPU finds the same.

`make gpu` runs them, or `pytest -m gpu`.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events

from scripts.common.errors import last_line
from scripts.training import handlers
from tests.helpers import (
    MULTI_GPU,
    SMALL,
    TINY,
    TINY_CONTROLNET,
    TINY_DIFFUSION,
    TRAIN,
    call,
    controlnet_folders,
    diffusion_folders,
    folders,
    make_labelled,
    make_latents,
    run,
    same,
    torchrun,
    words,
    workflow,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or hidden: pytest -m gpu"),
]

# All that a step may do; and plain attention, since the backward pass of the other is not deterministic.
LIVELY = {"ema_decay": 0.9, "num_workers": 1, "amp": True, "diffusion_unet_def#use_flash_attention": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "train": TINY | {"ema_decay": 0.9, "num_workers": 1, "scale_equivariance": 0.25, "term_norm_interval": 2},
    "train_diffusion": TINY_DIFFUSION | LIVELY,
    "train_controlnet": TINY_CONTROLNET | LIVELY | {
        "controlnet_def#use_flash_attention": False, "controlnet_train#weighted_loss_label": [3, 23],
        "controlnet_train#weighted_loss": 5, "controlnet_train#use_region_contrasive_loss": True,
        "roi_labels": {"23": 1},
    },
}  # fmt: skip
each = pytest.mark.parametrize("kind", OPTIONS)
Begin = Callable[..., Any]


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory, datalist_file: Path) -> Begin:
    """Begins a training in a folder, by the name of its config, with further overrides."""
    data = tmp_path_factory.mktemp("data")
    places: dict[str, tuple[Callable[..., dict[str, Any]], Path]] = {
        "train": (folders, datalist_file),
        "train_diffusion": (diffusion_folders, make_latents(data / "latents")),
        "train_controlnet": (controlnet_folders, make_labelled(data / "labelled")),
    }

    def begun(kind: str, root: Path, **options: Any) -> Any:
        place, datalist = places[kind]
        started: Any = workflow(kind, **OPTIONS[kind] | place(root, datalist) | options)
        assert started.trainer.state.device.type == "cuda"
        return started

    return begun


# A step


def places_that_wait(started: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files of the lines at which the host waits for the GPU, from the third step on, in it or in its handlers."""
    monkeypatch.setattr(handlers, "REPORT_SECONDS", 0.0)  # after each step, not once a second
    trainer = started.trainer
    late = Events.ITERATION_STARTED(event_filter=lambda _, step: step > 2)
    trainer.add_event_handler(late, lambda _: torch.cuda.set_sync_debug_mode("warn"))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: torch.cuda.set_sync_debug_mode("default"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            started.run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchronizing CUDA" in str(w.message)]


@each
def test_a_step_and_its_handlers_wait_for_nothing(
    kind: str, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = begin(kind, tmp_path)
    assert places_that_wait(started, monkeypatch) == [] and started.trainer.state.iteration >= 6


def test_a_handler_that_waits_is_found(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = begin("train", tmp_path)
    started.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: engine.state.output["loss"].item())
    found = places_that_wait(started, monkeypatch)
    assert len(found) == 6 and {place.rpartition(":")[0] for place in found} == {__file__}


def state_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights, and of what the optimizers keep of them."""
    items = {name: network.state_dict() for name, network in trainer.bare.items()}
    for name, optimizer in trainer.optimizers.items():
        items |= {f"{name} {i}": values for i, values in enumerate(optimizer.state.values())}
    return {f"{name} {key}": t.clone() for name, values in items.items() for key, t in values.items()}


@each
def test_a_step_that_is_not_finite_leaves_weights_and_adam_alone(
    kind: str, begin: Begin, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    started, kept = begin(kind, tmp_path), []
    for step in (2, 3, 4):
        started.trainer.add_event_handler(
            Events.ITERATION_STARTED(once=step), lambda engine: kept.append(state_of(engine))
        )
    started.trainer.add_event_handler(
        Events.ITERATION_STARTED(once=3),
        lambda engine: engine.state.batch["image" if kind == "train" else "latent"].fill_(torch.nan),
    )
    started.run()
    before, at, after = kept
    moments = [key for key in at if key.endswith("exp_avg")]
    assert same(at, after) and moments and any(not torch.equal(before[key], at[key]) for key in moments)
    assert caplog.text.count("is passed over, as it is not finite") == caplog.text.count("step 3 is passed over") == 1


# Going on


class StoppedError(Exception):
    pass


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Without `warn_only` the UNet's average pooling is refused, although windows that do not overlap add nothing up.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@each
def test_a_training_that_is_resumed_equals_the_unbroken_one_to_the_bit(
    kind: str, begin: Begin, tmp_path: Path, deterministic: None
) -> None:
    def stop(_: Any) -> None:
        raise StoppedError

    options = {"checkpoint_minutes": 0, "cudnn_benchmark": False}  # by which each run may choose other algorithms
    broken = begin(kind, tmp_path / "broken", **options)
    broken.trainer.add_event_handler(Events.ITERATION_STARTED(once=4), stop)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        broken.run()
    assert "StoppedError" in last_line(caught.value)
    resumed, whole = begin(kind, tmp_path / "broken", **options), begin(kind, tmp_path / "whole", **options)
    assert resumed.trainer.state.iteration == 3
    for started in (resumed, whole):
        started.run()
    assert same(state_of(resumed.trainer), state_of(whole.trainer))
    averages = [started.trainer.averages.values() for started in (resumed, whole)]
    assert all(same(a.network.state_dict(), b.network.state_dict()) for a, b in zip(*averages, strict=True))
    validations = [started.trainer.progress.validations for started in (resumed, whole)]
    assert len(validations[0]) == 2 and validations[0] == validations[1]


# Memory


@pytest.fixture
def hardly_any_memory() -> Iterator[Callable[[], None]]:
    """Leaves this process, when it is called, 4 MiB of the GPU's memory beside what it holds."""

    def limit() -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def last_line_where_memory_is_short(started: Any, limit: Callable[[], None]) -> str:
    limit()
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        started.run()
    return last_line(caught.value)


def test_training_without_enough_memory_gives_advice(
    begin: Begin, tmp_path: Path, hardly_any_memory: Callable[[], None]
) -> None:
    said = last_line_where_memory_is_short(begin("train", tmp_path), hardly_any_memory)
    assert said.startswith("error: out of memory with batches of (1, 1, 32, 32, 32) (cuda has")
    assert "; lower autoencoder_train#patch_size" in said


def test_inference_without_enough_memory_gives_advice(
    phantoms: list[Path],
    weights: Path,
    tmp_path: Path,
    hardly_any_memory: Callable[[], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = SMALL | {"dataset_dir": str(phantoms[0]), "output_dir": str(tmp_path)}
    started = workflow("inference", **options, trained_autoencoder_path=str(weights))
    said = last_line_where_memory_is_short(started, hardly_any_memory)
    assert "out of memory with windows of [40, 36, 44] voxels (cuda has" in said
    assert "; lower val_sliding_window_patch_size" in caplog.text


# Whole runs


@pytest.fixture(scope="module")
def demo(datalist_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An epoch of the demo's network, by the command that a user would type: where it is, and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    options = folders(root, datalist_file) | {"autoencoder_train#n_epochs": 1}
    layers = "['configs/train.json','configs/demo.json']"
    done = call([sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", "--config_file", layers, *words(options)])
    assert done.returncode == 0, done.stderr[-3000:]
    return root, done.stdout + done.stderr


def test_the_demos_network_trains_for_an_epoch(demo: tuple[Path, str]) -> None:
    root, printed = demo
    assert f"on {torch.cuda.get_device_name()}" in printed and "best validation loss" in printed
    found = torch.load(root / "models/checkpoint.pt", weights_only=True)["validations"]
    assert len(found) == 1 and 0 < found[0]["psnr"] < 60 and 0 < found[0]["loss"] < 1
    tensors = torch.load(root / "models/autoencoder.pt", weights_only=True).values()
    assert all(tensor.device.type == "cpu" and bool(tensor.isfinite().all()) for tensor in tensors)


def test_one_process_under_torchrun_trains_through_nccl(datalist_file: Path, tmp_path: Path) -> None:
    alone, ranked = tmp_path / "alone", tmp_path / "ranked"
    options = TINY | {"autoencoder_train#n_epochs": 1}
    files = f"['{TRAIN}','{MULTI_GPU}']"
    command = torchrun(1, "-m", "monai.bundle", "run", "--config_file", files, *words(options))
    done = call([*command, *words(folders(ranked, datalist_file))], NCCL_DEBUG="VERSION")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "NCCL version" in done.stdout + done.stderr
    run("train", **options, **folders(alone, datalist_file))
    read = [torch.load(f / "models/checkpoint.pt", weights_only=True)["validations"][0] for f in (alone, ranked)]
    assert read[0]["loss"] == pytest.approx(read[1]["loss"], rel=1e-2)


def test_inference_finds_what_a_cpu_finds(
    demo: tuple[Path, str], phantoms: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = ["configs/inference.json", "configs/demo.json"]
    ways = {"cpu": ("cpu", False, False), "float32": ("cuda", False, False), "TF32": ("cuda", True, False),
            "bfloat16": ("cuda", True, True)}  # fmt: skip
    found = {}
    for name, (device, tf32, amp) in ways.items():
        options = {"device": device, "tf32": tf32, "amp": amp, "val_sliding_window_patch_size": [32, 32, 32]}
        options |= {"trained_autoencoder_path": str(demo[0] / "models/autoencoder.pt")}
        run(layers, **options, dataset_dir=str(phantoms[6]), output_dir=str(tmp_path / name))
        (path,) = (tmp_path / name).glob("*_recon.nii.gz")
        found[name] = np.asarray(nib.load(path).dataobj).astype(np.float64)
    away = {name: float(np.abs(volume - found["cpu"]).mean()) for name, volume in found.items()}
    with capsys.disabled():
        print(f"\nmean difference of a reconstruction from the CPU's, HU: {away}")
    assert found["cpu"].std() > 10 and away["float32"] < 0.1 and away["TF32"] < 5 and away["bfloat16"] < 20
