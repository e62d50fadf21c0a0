"""A ControlNet takes label maps as theirs does, starts as the UNet's encoder, and its weights go both ways."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.networks.blocks import Swish

from scripts.common.errors import UserError
from scripts.networks import diffusion_files
from scripts.networks.controlnet import Control, ControlNetWeights, coded, copy_encoder, fused
from scripts.networks.diffusion_files import CONTROLNET
from scripts.networks.unet import predict
from scripts.networks.weights import write_tensors
from tests.helpers import CONTROLNET as DEFINITION
from tests.helpers import same, small_controlnet, small_unet

CT = {"spacing": torch.tensor([[150.0, 150.0, 200.0]]), "modality": torch.tensor([1])}
STOCK = DEFINITION | {
    "spatial_dims": 3, "in_channels": 4, "num_class_embeds": 128, "resblock_updown": True, "include_fc": True,
    "use_flash_attention": False,
}  # fmt: skip


def drawn(*shape: int, seed: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def latent(*shape: int) -> torch.Tensor:
    return torch.randn((1, 4, *shape), generator=torch.Generator().manual_seed(0))


def test_a_label_is_the_bits_of_its_number() -> None:
    labels = drawn(2, 1, 4, 6, 8)
    bits = coded(labels)
    assert bits.shape == (2, 8, 4, 6, 8) and bits.dtype == torch.float32
    # NV-Generate-CTMR's binarize_labels: bit b is whether label & 2^b is not 0, b from 0 to 7 along the channels
    for bit in range(8):
        assert torch.equal(bits[:, bit], ((labels[:, 0].long() & 2**bit) != 0).float())
    assert torch.equal((bits * 2 ** torch.arange(8).view(8, 1, 1, 1)).sum(1), labels[:, 0].float())


def test_a_fresh_one_changes_nothing_and_sees_what_the_unet_sees() -> None:
    unet, fresh = small_unet(), ControlNetMaisi(**STOCK).eval()
    copy_encoder(fresh, unet)
    x, t, maps = latent(8, 4, 8), torch.tensor([400.0]), coded(drawn(1, 1, 32, 16, 32))
    with torch.no_grad():
        assert torch.equal(predict(unet, x, t, **CT, control=Control(fresh, maps)), predict(unet, x, t, **CT))
    own, theirs = fresh.state_dict(), unet.state_dict()
    encoder = [name for name in own if not name.startswith("controlnet_")]
    assert {"conv_in.conv.weight", "class_embedding.weight", "middle_block.resnet_1.conv1.conv.weight"} <= set(encoder)
    for name in encoder:
        told = theirs[name][:, : own[name].shape[1]] if name.endswith("time_emb_proj.weight") else theirs[name]
        assert torch.equal(own[name], told), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_channels": [8, 24]}, "down_blocks.1.attentions.0.norm.weight has shape (24,), in the UNet (16,)"),
        ({"num_res_blocks": 2}, "down_blocks.0.resnets.1.norm1.weight has shape (8,), in the UNet there is none"),
        ({"num_class_embeds": 8}, "class_embedding.weight has shape (8, 32), in the UNet (128, 32)"),
    ],
)
def test_another_encoder_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        copy_encoder(small_controlnet(**changes), small_unet())
    assert str(caught.value).startswith("controlnet_def: ") and told in str(caught.value)
    assert "give it the same num_channels, num_res_blocks" in str(caught.value)


def test_guidance_is_away_from_the_map_without_the_region_and_from_modality_0() -> None:
    unet, network, x, t = small_unet(), small_controlnet(), torch.ones(1, 4, 8, 4, 8), torch.tensor([300.0])
    labels, other = drawn(1, 1, 32, 16, 32), drawn(1, 1, 32, 16, 32, seed=1)

    def told(modality: int, maps: torch.Tensor) -> torch.Tensor:
        down, middle = network(x, t, coded(maps), class_labels=torch.tensor([modality]))
        return unet(
            x, t, class_labels=torch.tensor([modality]), spacing_tensor=CT["spacing"],
            down_block_additional_residuals=tuple(down), mid_block_additional_residual=middle,
        )  # fmt: skip

    with torch.no_grad():
        for unguided, away in ((other, other), (None, labels)):
            control = Control(network, coded(labels), None if unguided is None else coded(unguided))
            found = predict(unet, x, t, **CT, guidance=3.0, control=control)
            torch.testing.assert_close(
                found, told(0, away) + 3 * (told(1, labels) - told(0, away)), atol=1e-4, rtol=1e-4
            )
            assert torch.equal(predict(unet, x, t, **CT, control=control), told(1, labels))


@pytest.mark.parametrize("length", [32, 64, 136])
def test_maps_that_are_embedded_once_tell_the_same(length: int) -> None:
    network, x, t = small_controlnet(), latent(length // 4, 4, 8), torch.tensor([300.0])
    labels, other = drawn(1, 1, length, 16, 32), drawn(1, 1, length, 16, 32, seed=1)
    with torch.no_grad():
        plain = Control(network, coded(labels), coded(other))
        once = Control.embedded(network, labels, other)
        assert once.conditions.shape == (1, 8, *x.shape[2:])
        for unguided in (False, True):
            residuals = (c.residuals(x, t, CT["modality"], unguided).values() for c in (plain, once))
            wanted, found = ((*down, middle) for down, middle in residuals)
            for a, b in zip(wanted, found, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # slabs round in another order
                assert length > 64 or torch.equal(a, b)
    assert network.controlnet_cond_embedding.conv_in is not None  # the network itself stays as it was


def test_weights_go_both_ways(tmp_path: Path) -> None:
    network = small_controlnet()
    facts = {"unet_sha256": "ab" * 32, "labels": [0, 1, 200]}
    content = diffusion_files.content(network, CONTROLNET, epoch=3, loss=0.5, scale_factor=1.25, facts=facts)
    write_tensors(content, tmp_path / "ours.pt")
    stock = ControlNetMaisi(**STOCK)
    stock.load_state_dict(torch.load(tmp_path / "ours.pt", weights_only=True)["controlnet_state_dict"], strict=True)
    assert same(dict(stock.state_dict()), dict(network.state_dict()))
    ours = ControlNetWeights(small_controlnet(1), tmp_path, "none.pt", str(tmp_path / "ours.pt"))
    assert same(dict(ours.network.state_dict()), dict(network.state_dict())) and ours.file.facts == facts
    sha256 = hashlib.sha256((tmp_path / "ours.pt").read_bytes()).hexdigest()
    assert (ours.file.path, ours.file.sha256) == (tmp_path / "ours.pt", sha256)
    theirs = {"epoch": 7, "loss": 0.25, "controlnet_state_dict": stock.state_dict()}
    torch.save(theirs, tmp_path / "theirs.pt")
    read = ControlNetWeights(small_controlnet(1), tmp_path, "none.pt", str(tmp_path / "theirs.pt"))
    assert same(dict(read.network.state_dict()), dict(network.state_dict()))
    assert (read.file.epoch, read.file.loss, read.file.facts) == (7, 0.25, {})


def test_which_weights_are_taken(tmp_path: Path) -> None:
    content = diffusion_files.content(small_controlnet(), CONTROLNET, epoch=1, loss=1.0, scale_factor=1.0)
    for name in ("controlnet.pt", "controlnet_best_epoch2.pt"):
        write_tensors(content, tmp_path / name)
        assert ControlNetWeights(small_controlnet(1), tmp_path, "controlnet.pt").file.path == tmp_path / name
    with pytest.raises(
        UserError, match=r"none: holds no weights of a ControlNet \(controlnet\.pt and the like\); train"
    ):
        ControlNetWeights(small_controlnet(), tmp_path / "none", "controlnet.pt")
    with pytest.raises(UserError, match="^no.pt: no such weights file; correct trained_controlnet_path"):
        ControlNetWeights(small_controlnet(), tmp_path, "controlnet.pt", "no.pt")
    with pytest.raises(UserError, match=r"or the network definition of these weights \(controlnet_def\)"):
        ControlNetWeights(small_controlnet(num_channels=[8, 24]), tmp_path, "controlnet.pt")


def test_another_unet_than_that_of_the_training_is_told(tmp_path: Path) -> None:
    unet: Any = SimpleNamespace(file=SimpleNamespace(path="unet.pt", sha256="cd" * 32))
    for trained, told in (("ab", True), ("cd", False), (None, False)):
        facts = {} if trained is None else {"unet_sha256": trained * 32}
        content = diffusion_files.content(
            small_controlnet(), CONTROLNET, epoch=1, loss=1.0, scale_factor=1.0, facts=facts
        )
        write_tensors(content, path := tmp_path / f"{trained}.pt")
        said = ControlNetWeights(small_controlnet(), tmp_path, "", str(path)).other_unet(unet)
        assert bool(said) == told
        if told:
            assert said == (
                f"{path} was trained for the UNet with SHA-256 abababababab, but unet.pt is cdcdcdcdcdcd; give the "
                "other one as trained_diffusion_path"
            )


def test_the_full_network_fits_the_full_unet() -> None:
    changes = {
        "num_channels": [64, 128, 256, 512], "attention_levels": [False, False, True, True], "norm_num_groups": 32,
        "num_head_channels": [0, 0, 32, 32], "num_res_blocks": 2,
    }  # fmt: skip
    with torch.device("meta"):
        network = ControlNetMaisi(**STOCK | changes | {"conditioning_embedding_num_channels": [8, 32, 64]})
        shape = {key: STOCK[key] for key in ("spatial_dims", "in_channels", "num_class_embeds", "resblock_updown")}
        unet = DiffusionModelUNetMaisi(
            **shape, **changes, out_channels=4, include_fc=True, include_spacing_input=True, use_flash_attention=False
        )
        copy_encoder(network, unet)
    assert sum(parameter.numel() for parameter in network.parameters()) == 72_037_072


def test_activations_of_the_embedding_are_silu_in_one_kernel() -> None:
    stock = ControlNetMaisi(**STOCK).eval()
    one = fused(copy.deepcopy(stock))
    assert not any(isinstance(module, Swish) for module in one.modules())
    assert list(one.state_dict()) == list(stock.state_dict())
    maps = coded(drawn(1, 1, 32, 16, 32))
    embedded = [network.controlnet_cond_embedding(maps) for network in (one, stock)]
    assert embedded[1].abs().max() == 0  # as its last convolution begins with zeros
    for network in (one, stock):
        torch.nn.init.ones_(network.controlnet_cond_embedding.conv_out.conv.weight)
    found, wanted = (network.controlnet_cond_embedding(maps) for network in (one, stock))
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted)
