"""The UNet: its conditions, its weights in both layouts, and NV-Generate-CTMR's definition of it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.bundle import ConfigWorkflow

from scripts.common.errors import UserError
from scripts.networks import diffusion_files
from scripts.networks.diffusion_files import UNET
from scripts.networks.unet import Inputs, UNetWeights, check_definition, inputs, predict, size_multiple
from scripts.networks.weights import write_tensors
from tests.helpers import Attack, same

TINY = {
    "spatial_dims": 3, "in_channels": 4, "out_channels": 4, "num_channels": [8, 16], "attention_levels": [False, True],
    "num_head_channels": [0, 8], "num_res_blocks": 1, "norm_num_groups": 8, "num_class_embeds": 128,
    "include_spacing_input": True, "resblock_updown": True, "include_fc": True,
}  # fmt: skip
FULL = TINY | {  # NV-Generate-CTMR's, for rectified flow
    "num_channels": [64, 128, 256, 512], "attention_levels": [False, False, True, True],
    "num_head_channels": [0, 0, 32, 32], "num_res_blocks": 2, "norm_num_groups": 32,
}  # fmt: skip
REGIONS = {"include_top_region_index_input": True, "include_bottom_region_index_input": True}


def tiny(seed: int = 0, **changes: Any) -> DiffusionModelUNetMaisi:
    """With no convolution or bias that is 0, as several are in a fresh network."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DiffusionModelUNetMaisi(**TINY | changes)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def test_the_full_network_has_180_million_parameters() -> None:
    with torch.device("meta"):
        network = DiffusionModelUNetMaisi(**FULL)
    assert sum(parameter.numel() for parameter in network.parameters()) == 180_500_868
    assert size_multiple(network) == 8 and size_multiple(tiny()) == 2


def test_networks_get_the_conditions_that_they_take() -> None:
    x, t = torch.randn(2, 4, 4, 6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
    spacing, modality = torch.tensor([[150.0, 150.0, 300.0], [80.0, 80.0, 100.0]]), torch.tensor([1, 3])
    top, bottom = 100 * torch.eye(4)[:2], 100 * torch.eye(4)[2:]
    given = {"spacing": spacing, "modality": modality, "top": top, "bottom": bottom}
    networks = {
        Inputs(True, True, False, False): tiny(),
        Inputs(False, False, False, False): tiny(include_spacing_input=False, num_class_embeds=None),
        Inputs(True, False, True, True): tiny(num_class_embeds=None, **REGIONS),
    }
    names = dict(zip(Inputs._fields, ("spacing_tensor", "class_labels", "top_region_index_tensor",
                                      "bottom_region_index_tensor"), strict=True))  # fmt: skip
    with torch.no_grad():
        for takes, network in networks.items():
            assert inputs(network) == takes
            wanted = {names[name]: given[name] for name, taken in takes._asdict().items() if taken}
            told = predict(network, x, t, **given)
            assert torch.equal(told, network(x, t, **wanted))
            for name, taken in takes._asdict().items():
                other = predict(network, x, t, **given | {name: given[name].flip(0)})
                assert torch.equal(told, other) != taken


def test_wrapped_networks_are_asked_likewise() -> None:
    wrapped = torch.nn.Module()
    wrapped.module = tiny()
    assert inputs(wrapped) == Inputs(True, True, False, False) and size_multiple(wrapped) == 2


def test_guidance_is_away_from_modality_0() -> None:
    network, x, t = tiny(), torch.ones(1, 4, 4, 4, 4), torch.tensor([300.0])
    spacing, modality = torch.full((1, 3), 150.0), torch.tensor([9])
    with torch.no_grad():
        told, unknown = (network(x, t, class_labels=m, spacing_tensor=spacing) for m in (modality, torch.tensor([0])))
        for scale, wanted in ((0, told), (1, told), (3, 3 * told - 2 * unknown)):
            found = predict(network, x, t, spacing=spacing, modality=modality, guidance=scale)
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        without = tiny(num_class_embeds=None)  # guidance is of the modality: there is none to leave out
        assert torch.equal(
            predict(without, x, t, spacing=spacing, guidance=3), predict(without, x, t, spacing=spacing, guidance=0)
        )


def test_weights_go_both_ways(tmp_path: Path) -> None:
    network, facts = tiny(), {"autoencoder_sha256": "ab" * 32, "sizes": [[24, 16, 40]], "spacing": None}
    write_tensors(
        diffusion_files.content(network.bfloat16(), UNET, epoch=3, loss=0.5, scale_factor=1.25, facts=facts),
        tmp_path / "ours.pt",
    )
    # NV-Generate-CTMR: to the device, then latents / scale_factor
    content = torch.load(tmp_path / "ours.pt", map_location="cpu", weights_only=True)
    assert {key: content[key] for key in ("epoch", "loss", "num_train_timesteps")} == {
        "epoch": 3, "loss": 0.5, "num_train_timesteps": 1000,
    }  # fmt: skip
    assert torch.equal(torch.ones(2) / content["scale_factor"].to("cpu"), torch.full((2,), 0.8))
    assert all(tensor.dtype == torch.float32 for tensor in content["unet_state_dict"].values())
    stock = DiffusionModelUNetMaisi(**TINY)
    stock.load_state_dict(content["unet_state_dict"], strict=True)

    other = tiny(seed=1)
    read = diffusion_files.read(other, tmp_path / "ours.pt", UNET)
    assert same(dict(other.state_dict()), content["unet_state_dict"])
    assert (read.epoch, read.loss, read.num_train_timesteps, read.scale_factor) == (3, 0.5, 1000, 1.25)
    assert read.facts == facts and read.path == tmp_path / "ours.pt"
    assert read.sha256 == hashlib.sha256((tmp_path / "ours.pt").read_bytes()).hexdigest()


def test_their_files_and_bare_ones_are_read(tmp_path: Path) -> None:
    network, path = tiny(), tmp_path / "theirs.pt"
    theirs = {"epoch": 12, "loss": 0.25, "num_train_timesteps": 1000, "unet_state_dict": network.state_dict()}
    for scale in (torch.tensor(1.5), torch.tensor([1.5], dtype=torch.float64), 1.5):
        torch.save(theirs | {"scale_factor": scale}, path)
        other = tiny(seed=1)
        read = diffusion_files.read(other, path, UNET)
        assert same(dict(other.state_dict()), dict(network.state_dict()))
        assert (read.epoch, read.scale_factor, read.num_train_timesteps, read.facts) == (12, 1.5, 1000, {})
    for bare in (network.state_dict(), {f"module.{name}": t for name, t in network.state_dict().items()}):
        torch.save(bare, path)
        other = tiny(seed=1)
        read = diffusion_files.read(other, path, UNET)
        assert same(dict(other.state_dict()), dict(network.state_dict()))
        assert (read.epoch, read.loss, read.scale_factor, read.num_train_timesteps) == (None, None, None, None)


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(UserError) as caught:
        diffusion_files.read(tiny(**changes), path, UNET)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    path, network = tmp_path / "unet.pt", tiny()
    assert refusal(path) == "no such weights file; correct existing_ckpt_filepath"
    write_tensors(diffusion_files.content(network, UNET, epoch=1, loss=1.0, scale_factor=1.0), path)
    assert refusal(path, num_channels=[8, 24]) == (
        "under 'unet_state_dict': down_blocks.1.attentions.0.norm.weight is (16,), but the network's is (24,); use "
        "weights of this architecture, or the network definition of these weights (diffusion_unet_def)"
    )
    end = "which the network lacks (weights of another architecture); correct the path or diffusion_unet_def"
    assert refusal(path, num_class_embeds=None) == f"under 'unet_state_dict': has class_embedding.weight, {end}"
    for scale in (float("nan"), float("inf"), 0.0, -1.0):
        write_tensors(diffusion_files.content(network, UNET, epoch=1, loss=1.0, scale_factor=scale), path)
        assert refusal(path) == f"scale_factor is {scale}, which is no positive number; use weights saved earlier"
    torch.save({"unet_state_dict": Attack(tmp_path / "owned")}, path)
    assert refusal(path).startswith("is damaged or holds more than tensors, so it is not loaded")
    assert not (tmp_path / "owned").exists()


def test_flash_attention_is_taken_as_false_without_a_gpu(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target = "monai.apps.generation.maisi.networks.diffusion_model_unet_maisi.DiffusionModelUNetMaisi"
    config = {
        "imports": ["$import scripts.networks.unet as unet"],
        "diffusion_unet_def": TINY | {"_target_": target, "use_flash_attention": True},
        "initialize": ["$unet.check_definition()", "@diffusion_unet_def"],
        "run": ["@diffusion_unet_def"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    started = ConfigWorkflow(str(tmp_path / "config.json"), workflow_type="infer", logging_file=False)
    caplog.set_level("INFO")
    started.initialize()
    (network,) = started.run()
    assert isinstance(network, DiffusionModelUNetMaisi)
    assert not any(getattr(block, "use_flash_attention", False) for block in network.modules())
    said = [record.message for record in caplog.records if record.name == "scripts.networks.unet"]
    assert said == ["diffusion_unet_def#use_flash_attention is taken as false: there is no GPU"]


def test_attention_needs_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.networks.unet.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^einops is not installed, which attention needs; pip install -r requirements"):
        check_definition()


def found(folder: Path, **options: Any) -> UNetWeights:
    return UNetWeights(tiny(seed=1), folder, "unet.pt", **options)


def test_the_newest_best_weights_are_generated_with_else_the_last_ones(tmp_path: Path) -> None:
    network = tiny()
    names = (
        "unet.pt", "unet_finetuned.pt", "unet_best_epoch9.pt", "unet_best_epoch12.pt", "unet_finetuned_best_epoch3.pt",
    )  # fmt: skip
    for i, name in enumerate(names):
        write_tensors(diffusion_files.content(network, UNET, epoch=1, loss=1.0, scale_factor=i + 1.0), tmp_path / name)
        os.utime(tmp_path / name, (i, i))
        weights = found(tmp_path)
        assert weights.file.path == tmp_path / name and weights.scale_factor == i + 1
        assert same(dict(weights.network.state_dict()), dict(network.state_dict()))
    assert found(tmp_path, trained_diffusion_path=str(tmp_path / names[0])).scale_factor == 1
    sha256 = hashlib.sha256((tmp_path / names[-1]).read_bytes()).hexdigest()
    assert found(tmp_path).facts() == {"weights": str(tmp_path / names[-1]), "weights_sha256": sha256}
    with pytest.raises(UserError, match=r"none: holds no weights of latent diffusion \(unet\.pt and the like\); train"):
        found(tmp_path / "none")
    with pytest.raises(UserError, match="^no.pt: no such weights file; correct trained_diffusion_path"):
        found(tmp_path, trained_diffusion_path="no.pt")


def test_the_scale_factor_is_the_given_one_else_the_files(tmp_path: Path) -> None:
    path = tmp_path / "unet.pt"
    torch.save(tiny().state_dict(), path)
    assert found(tmp_path, scale_factor=1).scale_factor == 1
    end = "; give --scale_factor, the number that its training multiplied latents by (latent_stats.json beside them has"
    for given, told in ((None, "None"), (0, "0"), (-2.5, "-2.5"), ("a", "'a'"), (float("nan"), "nan")):
        with pytest.raises(UserError) as caught:
            found(tmp_path, scale_factor=given)
        assert str(caught.value) == f"{path}: scale_factor is {told}{end} it)"
    write_tensors(diffusion_files.content(tiny(), UNET, epoch=1, loss=1.0, scale_factor=0.5), path)
    assert found(tmp_path).scale_factor == 0.5 and found(tmp_path, scale_factor=2.0).scale_factor == 2
