"""configs/generate.json: volumes that are functions of their seeds, and what comes with them."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.bundle import ConfigParser
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scripts.common.command_line import check_command_line
from scripts.common.errors import UserError
from scripts.data.datalist import load
from scripts.networks import diffusion_files
from scripts.networks.controlnet import Control
from scripts.networks.diffusion_files import DiffusionFile
from scripts.networks.flow import Flow
from scripts.networks.generation import Generator
from scripts.networks.pointwise import Pointwise
from scripts.networks.unet import predict
from scripts.networks.weights import save_weights, write_tensors
from scripts.use.generate import Seeds
from scripts.use.sets import find_sets
from scripts.use.wanted import Wanted, least_memory
from tests.helpers import finish, kill, last_line_of, run, start, start_ranks, until, workflow

GENERATE, EXAMPLES = Path("configs/generate.json"), Path("docs/examples")
UNET = {
    "num_channels": [8, 16], "attention_levels": [False, True], "num_head_channels": [0, 8], "num_res_blocks": 1,
}  # fmt: skip
AUTOENCODER = {"num_channels": [8, 8, 16], "num_res_blocks": [1, 1, 1], "norm_num_groups": 4}
GROUP = "diffusion_unet_inference"
TINY: dict[str, Any] = {
    **{f"diffusion_unet_def#{key}": value for key, value in UNET.items()},
    **{f"autoencoder_def#{key}": value for key, value in AUTOENCODER.items()},
    "diffusion_unet_def#norm_num_groups": 8,
    "val_sliding_window_patch_size": [32, 32, 32],
    f"{GROUP}#dim": [64, 32, 32],
    f"{GROUP}#spacing": [2.0, 2.0, 4.0],
    f"{GROUP}#num_inference_steps": 2,
}
NAMES = [f"unet_3d_seed{seed:05d}_ct.nii.gz" for seed in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of both networks, random; no convolution of the UNet is 0, as several are in a fresh one."""
    folder = tmp_path_factory.mktemp("models")
    parser = ConfigParser()
    parser.read_config(str(GENERATE))
    parser.update(TINY)
    torch.manual_seed(0)
    unet, autoencoder = (parser.get_parsed_content(f"{name}_def") for name in ("diffusion_unet", "autoencoder"))
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.constant_(autoencoder.decoder.blocks[-1].conv.conv.bias, 0.4)  # HU of a body
    save_weights(autoencoder, folder / "autoencoder.pt")
    content = diffusion_files.content(unet, diffusion_files.UNET, epoch=1, loss=0.5, scale_factor=0.8)
    write_tensors(content, folder / "diff_unet_3d_rflow-ct.pt")
    return folder


@pytest.fixture
def options(models: Path, tmp_path: Path) -> dict[str, Any]:
    return TINY | {"model_dir": str(models), "output_dir": str(tmp_path / "out")}


@pytest.fixture(scope="module")
def three(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three volumes, generated in one go."""
    folder = tmp_path_factory.mktemp("three")
    started = run("generate", **TINY, num_volumes=3, model_dir=str(models), output_dir=str(folder))
    assert started.check_properties() == []
    return folder


def generate(options: dict[str, Any]) -> None:
    run("generate", **options)


def same_bytes(folder: Path, other: Path, names: list[str]) -> bool:
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


# What is written


def decoded(options: dict[str, Any], seed: int) -> np.ndarray:
    """What the generator makes of a seed: (X, Y, Z) float32."""
    parser = workflow("generate", **options).parser
    generator, wanted, seeds = (parser.get_parsed_content(name) for name in ("generator", "wanted", "dataset"))
    with torch.inference_mode():
        return generator.volume(generator.latent(seed, seeds.dim, wanted.conditions(seeds.spacing))).numpy()


def test_volumes_are_what_the_generator_makes_in_hu(three: Path, options: dict[str, Any]) -> None:
    for seed, name in enumerate(NAMES):
        image = nib.load(three / name)
        assert image.shape == (64, 32, 32) and image.get_data_dtype() == np.int16
        assert np.array_equal(image.affine, np.diag([2, 2, 4, 1])) and nib.aff2axcodes(image.affine) == tuple("RAS")
        assert image.header.get_xyzt_units()[0] == "mm"
        found = np.asarray(image.dataobj)
        assert np.array_equal(found, (decoded(options, seed).clip(0, 1) * 2000 - 1000).round())
        assert found.dtype == np.int16 and found.min() == -1000 and found.max() == 1000 and found.std() > 10
        with gzip.open(three / name) as file:
            assert file.read(4) and file.mtime == 0  # type: ignore[attr-defined]


def test_what_comes_with_the_volumes(three: Path, models: Path, phantoms: list[Path], tmp_path: Path) -> None:
    assert sorted(p.name for p in three.iterdir()) == sorted(
        [*NAMES, "contact_sheet.png", "datalist.json", "made_with_ct.json", "made_with_ct.jsonl"]
    )
    record = content_of(three / "made_with_ct.json")
    assert record["weights"] == str(models / "diff_unet_3d_rflow-ct.pt") and len(record["weights_sha256"]) == 64
    assert record["settings"]["autoencoder_sha256"] not in (None, record["weights_sha256"])
    for key, value in {"dim": [64, 32, 32], "spacing": [2, 2, 4], "modality": 1, "scale_factor": 0.8}.items():
        assert record["settings"][key] == pytest.approx(value)
    assert content_of(three / "datalist.json") == {"training": [{"image": name, "class": "ct"} for name in NAMES]}
    assert [entry["image"] for entry in load(three / "datalist.json")["training"]] == [str(three / n) for n in NAMES]
    entries = find_sets(str(three), str(phantoms[0].parent))
    assert [Path(e["image"]).name for e in entries if e["sets"] == ["generated"]] == NAMES
    identity = {"network_def": {"_target_": "torch.nn.Identity"}}
    run("inference", dataset_dir=str(three / "datalist.json"), output_dir=str(tmp_path), **identity)
    for name in NAMES:
        again = nib.load(tmp_path / name.replace(".nii", "_recon.nii"))
        assert np.array_equal(np.asarray(again.dataobj), np.asarray(nib.load(three / name).dataobj))


def test_mri_has_a_range_and_a_name_of_its_own(options: dict[str, Any], tmp_path: Path) -> None:
    mri = options | {f"{GROUP}#modality": "mri_t1"}
    run("generate", **mri)
    image = nib.load(tmp_path / "out" / "unet_3d_seed00000_mri.nii.gz")
    found = np.asarray(image.dataobj)
    assert np.array_equal(found, (decoded(mri, 0).clip(0) * 1000).round())
    assert found.dtype == np.int16 and found.min() == 0 and found.max() > 1000
    record = content_of(tmp_path / "out" / "made_with_mri.json")
    assert record["settings"]["modality"] == 9
    assert load(tmp_path / "out" / "datalist.json")["training"][0]["class"] == "mri"


# Each volume is a function of its seed


def test_a_volume_does_not_depend_on_how_many_there_are(three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    run("generate", **options)
    assert same_bytes(tmp_path / "out", three, NAMES[:1])
    run("generate", **options | {f"{GROUP}#random_seed": 2})  # into the same folder: the seed is in the name
    assert same_bytes(tmp_path / "out", three, [NAMES[0], NAMES[2]])
    volumes = [np.asarray(nib.load(three / name).dataobj) for name in NAMES]
    assert min(np.abs(a - b).mean() for a, b in zip(volumes, volumes[1:], strict=False)) > 10


def test_two_ranks_make_the_same_volumes(three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(2, generate, options | {"num_volumes": 3}, log=log), log)
    assert "3 volumes generated, 0 failed" in printed
    assert same_bytes(tmp_path / "out", three, [*NAMES, "datalist.json", "contact_sheet.png"])
    (tmp_path / "out" / NAMES[1]).unlink()  # one of the ranks has no volume then
    printed = finish(start_ranks(2, generate, options | {"num_volumes": 3}, log=log), log)
    assert "1 volumes generated, 2 were there already, 0 failed" in printed
    assert same_bytes(tmp_path / "out", three, [*NAMES, "datalist.json"])


def test_no_layer_rounds_by_the_number_of_threads(options: dict[str, Any]) -> None:
    parser = workflow("generate", **options).parser  # ranks have one thread each, a process by itself has all
    for name in ("network", "autoencoder"):
        layers = [m for m in parser.get_parsed_content(name).modules() if isinstance(m, torch.nn.Conv3d)]
        small = [layer for layer in layers if layer.kernel_size == (1, 1, 1)]
        assert len(small) > 2 and all(isinstance(layer, Pointwise) for layer in small)


def test_what_was_interrupted_goes_on(three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    process = start(generate, options | {"num_volumes": 3}, log=log)
    until((out / NAMES[0]).is_file, [process])
    kill([process], signal.SIGKILL)
    process.join()
    run("generate", **options, num_volumes=3)
    assert same_bytes(out, three, [*NAMES, "datalist.json"])


def test_what_is_there_is_skipped(
    three: Path, options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(three, tmp_path / "out")
    before = (tmp_path / "out" / NAMES[0]).stat().st_mtime_ns
    (tmp_path / "out" / NAMES[1]).write_bytes(b"half")
    caplog.set_level("INFO")
    run("generate", **options, num_volumes=3)
    assert "1 volumes generated, 2 were there already, 0 failed" in caplog.text
    assert (tmp_path / "out" / NAMES[0]).stat().st_mtime_ns == before
    assert same_bytes(tmp_path / "out", three, NAMES)


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({f"{GROUP}#num_inference_steps": 3}, "num_inference_steps was 2, now it is 3"),
    "integrator": ({"integrator": "midpoint"}, "integrator was euler, now it is midpoint"),
    "guidance": ({f"{GROUP}#cfg_guidance_scale": 2.5}, "cfg_guidance_scale was 0, now it is 2.5"),
    "spacing": ({f"{GROUP}#spacing": [2, 2, 3]}, "spacing was [2.0, 2.0, 4.0], now it is [2, 2, 3]"),
    "modality": ({f"{GROUP}#modality": "ct_contrast"}, "modality was 1, now it is 3"),
    "scale factor": ({"scale_factor": 0.5}, "scale_factor was 0.8"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_and_make_other_volumes(
    name: str, three: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    changes, told = CHANGES[name]
    shutil.copytree(three, tmp_path / "out")
    last = last_line_of("generate", **options | changes)
    assert f"holds results of other settings ({told}" in last and "give another output_dir, or --overwrite" in last
    assert same_bytes(tmp_path / "out", three, [*NAMES, "datalist.json"])
    run("generate", **options | changes, overwrite=True)
    volumes = [np.asarray(nib.load(folder / NAMES[0]).dataobj).astype(int) for folder in (three, tmp_path / "out")]
    assert np.abs(volumes[0] - volumes[1]).max() > 1
    assert content_of(tmp_path / "out" / "datalist.json")["training"] == [{"image": NAMES[0], "class": "ct"}]


def test_other_weights_are_refused(three: Path, options: dict[str, Any], models: Path, tmp_path: Path) -> None:
    shutil.copytree(three, tmp_path / "out")
    for name, knob, told in (
        ("diff_unet_3d_rflow-ct.pt", "trained_diffusion_path", f"weights ({models}/diff_unet_3d_rflow-ct.pt)"),
        ("autoencoder.pt", "trained_autoencoder_path", "settings (autoencoder_sha256 was "),
    ):
        content = torch.load(models / name, weights_only=True)
        tensors = content.get("unet_state_dict", content)
        tensors[next(iter(tensors))] += 1
        torch.save(content, tmp_path / name)
        last = last_line_of("generate", **options | {knob: str(tmp_path / name)})
        assert f"holds results of other {told}" in last


def test_volumes_that_are_not_finite_are_named(
    options: dict[str, Any], three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(self: Generator, seed: int, *rest: Any) -> torch.Tensor:
        return latent(self, seed, *rest) * (torch.nan if seed == 1 else 1)

    def spoilt_slabs(self: Generator, *rest: Any) -> Any:
        return ((x, slab * torch.nan) for x, slab in slabs(self, *rest))

    latent, slabs = Generator.latent, Generator.slabs
    monkeypatch.setattr(Generator, "latent", spoilt)
    last = last_line_of("generate", **options, num_volumes=3)
    assert last.startswith("error: 1 of 3 volumes could not be generated: seed 1: the latent is not finite (NaN or inf")
    assert same_bytes(tmp_path / "out", three, [NAMES[0], NAMES[2]])
    assert [item["image"] for item in content_of(tmp_path / "out" / "datalist.json")["training"]] == NAMES[::2]
    monkeypatch.setattr(Generator, "latent", latent)
    monkeypatch.setattr(Generator, "slabs", spoilt_slabs)
    last = last_line_of("generate", **options, num_volumes=3)
    assert last.startswith("error: 1 of 3 volumes could not be generated: seed 1: the decoded volume is not finite")


# Settings


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dim": (
        {f"{GROUP}#dim": [100, 32, 30]},
        f"{GROUP}#dim is [100, 32, 30]; use three multiples of 8 voxels, e.g. [",
    ),
    "two sizes": ({f"{GROUP}#dim": [32, 32]}, f"{GROUP}#dim is [32, 32]; use three multiples of 8 voxels"),
    "size 0": ({f"{GROUP}#dim": [32, 0, 32]}, "use three multiples of 8 voxels, e.g. [32, 8, 32]"),
    "spacing 0": ({f"{GROUP}#spacing": [1, 0, 2]}, f"{GROUP}#spacing is [1, 0, 2]; use three lengths in mm above 0"),
    "two spacings": ({f"{GROUP}#spacing": [1, 2]}, f"{GROUP}#spacing is [1, 2]; use 3 numbers"),
    "modality's name": (
        {f"{GROUP}#modality": "pet"},
        f"{GROUP}#modality is 'pet', which the modality mapping lacks; use one of unknown (0), ct (1), ct_wo_con",
    ),
    "modality's number": (
        {f"{GROUP}#modality": 4},
        f"{GROUP}#modality is 4, which the modality mapping lacks; use",
    ),
    "modality unknown to the network": (
        {f"{GROUP}#modality": "mri", "diffusion_unet_def#num_class_embeds": 8, "trained_diffusion_path": "8.pt"},
        f"{GROUP}#modality is 'mri', number 8, but the network knows 0 to 7",
    ),
    "seed": ({f"{GROUP}#random_seed": -1}, f"{GROUP}#random_seed is -1; use a whole number from 0"),
    "no volume": ({"num_volumes": 0}, "num_volumes is 0; use a whole number from 1"),
    "no step": ({f"{GROUP}#num_inference_steps": 0}, f"{GROUP}#num_inference_steps is 0; use a whole number from 1"),
    "integrator": ({"integrator": "heun"}, "integrator is 'heun'; use one of euler, midpoint"),
    "guidance": ({f"{GROUP}#cfg_guidance_scale": -1}, f"{GROUP}#cfg_guidance_scale is -1; use 0 for no guidance"),
    "no UNet": ({"model_dir": "docs"}, "docs: holds no weights of latent diffusion (diff_unet_3d_rflow-ct.pt and the"),
    "no such UNet": (
        {"trained_diffusion_path": "no.pt"},
        "no.pt: no such weights file; correct trained_diffusion_path",
    ),
    "no autoencoder": ({"trained_autoencoder_path": "no.pt"}, "no.pt: no such weights file; correct trained_autoencod"),
    "another UNet": (
        {"diffusion_unet_def#num_channels": [8, 24]},
        "the network's is (24,); use weights of this architecture, or the network definition of these weights (diff",
    ),
    "no scale factor": ({"trained_diffusion_path": "bare.pt"}, "bare.pt: scale_factor is None; give --scale_factor"),
    "scale factor": ({"scale_factor": -2}, "scale_factor is -2; give --scale_factor"),
    "timesteps": (
        {"noise_scheduler#num_train_timesteps": 500},
        "noise_scheduler#num_train_timesteps is 500, but {models}/diff_unet_3d_rflow-ct.pt was trained with 1000; use",
    ),
    "DDPM": (
        {"noise_scheduler": {"_target_": "monai.networks.schedulers.ddpm.DDPMScheduler"}},
        "noise_scheduler is DDPMScheduler, which is not supported; use RFlowScheduler",
    ),
    "window": ({"val_sliding_window_patch_size": [32, 32, 30]}, "val_sliding_window_patch_size is [32, 32, 30], not"),
    "memory": ({f"{GROUP}#dim": [4096, 4096, 4096]}, f"{GROUP}#dim is [4096, 4096, 4096], which takes at least "),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_in_one_line(
    name: str, models: Path, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, told = BAD[name]
    content = torch.load(models / "diff_unet_3d_rflow-ct.pt", weights_only=True)
    if name == "no scale factor":
        torch.save(content["unet_state_dict"], tmp_path / "bare.pt")
        changes = changes | {"trained_diffusion_path": str(tmp_path / "bare.pt")}
    elif name == "modality unknown to the network":
        state = content["unet_state_dict"]
        state["class_embedding.weight"] = state["class_embedding.weight"][:8].clone()
        torch.save(content, tmp_path / "8.pt")
        changes = changes | {"trained_diffusion_path": str(tmp_path / "8.pt")}
    last = last_line_of("generate", **options | changes)
    assert last.startswith("error: ") and told.format(models=models) in last
    assert not (tmp_path / "out").exists()


def test_modality_0_is_unknown_and_taken_for_ct(options: dict[str, Any]) -> None:
    wanted = workflow("generate", **options | {f"{GROUP}#modality": 0}).parser.get_parsed_content("wanted")
    assert wanted.modality == 0 and wanted.kind == "ct"


FACTS = {
    "autoencoder_sha256": "ab" * 32, "sizes": [[64, 64, 32], [128, 128, 64]], "spacing": [[0.7, 0.9]] * 2 + [[2, 3]],
    "field_of_view": [[180, 430]] * 2 + [[300, 640]], "modalities": {"ct": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def full() -> DiffusionModelUNetMaisi:
    """The UNet as the config has it, without weights."""
    parser = ConfigParser()
    parser.read_config(str(GENERATE))
    with torch.device("meta"):
        return parser.get_parsed_content("diffusion_unet_def")


def warnings_of(network: DiffusionModelUNetMaisi, capsys: pytest.CaptureFixture[str], **changes: Any) -> list[str]:
    """What is said of these settings with a network that was trained as `FACTS` have it."""
    inference = {"dim": [512, 512, 256], "spacing": [0.8, 0.8, 2.5], "modality": 1} | changes
    weights: Any = SimpleNamespace(network=network, file=DiffusionFile(Path("unet.pt"), "0", facts=FACTS))
    autoencoder: Any = SimpleNamespace(path="autoencoder.pt", sha256=changes.get("sha256", "ab" * 32))
    wanted = Wanted(inference, weights, autoencoder, Flow(), 4, {"ct": 1, "mri": 8})
    Seeds(1, wanted, inference["dim"], inference["spacing"])
    return [line.removeprefix("warning: ") for line in capsys.readouterr().err.splitlines()]


def test_what_lies_far_from_the_training_is_warned_of(
    full: DiffusionModelUNetMaisi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warnings_of(full, capsys) == [] == warnings_of(full, capsys, dim=[480, 448, 320])
    assert warnings_of(full, capsys, dim=[352, 352, 192]) == [
        "dim [352, 352, 192] is far from the sizes trained on: 256 x 256 x 128, 512 x 512 x 256"
    ]
    assert warnings_of(full, capsys, spacing=[0.8, 1.0, 2.5]) == [
        "spacing 1 mm along y is far from what was trained on, 0.7 to 0.9 mm"
    ]
    assert warnings_of(full, capsys, spacing=[0.8, 0.8, 3.2], dim=[512, 512, 320]) == [
        "field of view 1024 mm along z is far from what was trained on, 300 to 640 mm"
    ]
    assert warnings_of(full, capsys, modality="mri") == ["modality 8 is none of those trained on: ct (1)"]
    assert warnings_of(full, capsys, sha256="cd" * 32) == [
        "unet.pt was trained on latents of the autoencoder with SHA-256 abababababab, but that of autoencoder.pt is "
        "cdcdcdcdcdcd; give the other one as trained_autoencoder_path"
    ]
    with pytest.raises(UserError, match=r"multiples of 32 voxels, e\.g\. \[96, 512, 256\]$"):
        warnings_of(full, capsys, dim=[100, 512, 250])


def test_the_three_files_of_nv_generate_ctmr_are_layers(models: Path, three: Path, tmp_path: Path) -> None:
    files = {
        name: content_of(EXAMPLES / f"{name}.json")
        for name in ("environment_maisi_diff_model", "config_maisi_diff_model", "config_network_rflow")
    }
    environment, training, network = files.values()
    shutil.copy(models / "diff_unet_3d_rflow-ct.pt", tmp_path / "theirs.pt")
    environment |= {
        "model_dir": str(tmp_path), "model_filename": "theirs.pt", "output_dir": str(tmp_path / "out"),
        "output_prefix": "ours", "trained_autoencoder_path": str(models / "autoencoder.pt"),
    }  # fmt: skip
    training[GROUP] |= {"dim": [64, 32, 32], "spacing": [2.0, 2.0, 4.0], "num_inference_steps": 2}
    network["diffusion_unet_def"] |= UNET | {"norm_num_groups": 8}
    network["autoencoder_def"] |= AUTOENCODER
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    layers = [str(GENERATE), *(str(tmp_path / f"{name}.json") for name in files)]
    check_command_line(["monai/bundle/__main__.py", "run", "--config_file", str(layers), "--num_volumes", "1"])
    run(layers, val_sliding_window_patch_size=[32, 32, 32])
    theirs, ours = (tmp_path / "out" / "ours_seed00000_ct.nii.gz"), three / NAMES[0]
    assert theirs.read_bytes() == ours.read_bytes()


# Memory


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are there at a time; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.bytes:
                self.bytes[key] = tensor.untyped_storage().nbytes()
                self.now += self.bytes[key]
                weakref.finalize(tensor.untyped_storage(), self.drop, key)
        self.peak = max(self.peak, self.now)
        return results

    def drop(self, key: int) -> None:
        self.now -= self.bytes.pop(key)


def built(kind: Any, changes: dict[str, Any], flash: bool) -> Any:
    """A network as the config has it, with changes."""
    key = "diffusion_unet_def" if kind is DiffusionModelUNetMaisi else "controlnet_def"
    definition = content_of(GENERATE)[key] | changes | {"use_flash_attention": False}
    definition |= {"spatial_dims": 3, "in_channels": 4, "norm_num_groups": 8}
    definition |= {"out_channels": 4} if kind is DiffusionModelUNetMaisi else {}
    definition = {key: value for key, value in definition.items() if key[0] != "_" and "region" not in key}
    network = kind(**definition)
    for module in network.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = flash
    return network


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize(("changes", "size"), [(UNET, [32, 48, 32]), ({}, [64, 64, 32]), ({}, [96, 96, 64])])
def test_the_least_memory_is_just_below_what_is_taken(changes: dict[str, Any], size: list[int], flash: bool) -> None:
    with FakeTensorMode(), torch.no_grad():
        network = built(DiffusionModelUNetMaisi, changes, flash)
        given = {"class_labels": torch.tensor([1]), "spacing_tensor": torch.ones(1, 3)}
        x, t = torch.randn(1, 4, *size), torch.ones(1)
        with Live() as live:
            network(x, t, **given)
    assert 1 < live.peak / least_memory(network, size, 4) < 1.25


@pytest.mark.parametrize(("changes", "size"), [(UNET, [32, 48, 32]), ({}, [64, 64, 32]), ({}, [96, 96, 64])])
def test_with_a_controlnet_too(changes: dict[str, Any], size: list[int]) -> None:
    with FakeTensorMode(), torch.no_grad():
        network, controlnet = (built(kind, changes, True) for kind in (DiffusionModelUNetMaisi, ControlNetMaisi))
        given = {"spacing": torch.ones(1, 3), "modality": torch.tensor([1])}
        control = Control.embedded(controlnet, torch.zeros(1, 1, *(4 * n for n in size), dtype=torch.uint8))
        x, t = torch.randn(1, 4, *size), torch.ones(1)
        with Live() as live:
            predict(network, x, t, **given, control=control)
    assert 1 < live.peak / least_memory(network, size, 4, controlled=True) < 1.3
