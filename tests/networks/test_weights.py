"""Weights go in and out of files, and nothing else does."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from scripts.common.errors import UserError
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.networks.weights import Weights, load_weights, read_weights, save_weights, write_tensors
from tests.helpers import STOCK, Attack, same, stock_network


def test_weights_go_both_ways(tmp_path: Path) -> None:
    stock = stock_network()
    fast = FastAutoencoderKlMaisi(copy.deepcopy(stock))
    save_weights(fast.bfloat16(), tmp_path / "ours.pt")
    state = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert all(t.dtype == torch.float32 for t in state.values())
    AutoencoderKlMaisi(**STOCK).load_state_dict(state, strict=True)
    for layout in (stock.state_dict(), {"unet_state_dict": stock.state_dict(), "epoch": 3}):
        torch.save(layout, tmp_path / "theirs.pt")
        other = FastAutoencoderKlMaisi(AutoencoderKlMaisi(**STOCK))
        load_weights(other, tmp_path / "theirs.pt")
        assert all(torch.equal(t, other.state_dict()[n]) for n, t in stock.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.pt", "theirs.pt"]


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    path = tmp_path / "weights.pt"
    with pytest.raises(UserError, match=r"weights\.pt: no such weights file"):
        load_weights(network, path)
    torch.save(stock_network(num_channels=[32, 32, 32]).state_dict(), path)
    with pytest.raises(UserError, match=r"weights\.pt: encoder\.blocks\.0\.conv\.conv\.weight is \(32, 1, 3, 3, 3\)"):
        load_weights(network, path)
    torch.save({k: v for k, v in network.state_dict().items() if "quant_conv_mu" not in k}, path)
    with pytest.raises(UserError, match="lacks quant_conv_mu.conv.bias"):
        load_weights(network, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="is damaged"):
        load_weights(network, path)
    with path.open("wb") as file:
        pickle.dump(Attack(tmp_path / "owned"), file)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(network, path)
    torch.save({"weights": Attack(tmp_path / "owned")}, path)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_weights(network, path)
    assert not (tmp_path / "owned").exists()


State = dict[str, torch.Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def wrapped(state: State) -> State:
    """Names as FSDP, activation checkpointing and torch.compile leave them."""
    inner = {name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module."): t for name, t in state.items()}
    return {name.replace("encoder.", "encoder._fsdp_wrapped_module._orig_mod."): t for name, t in inner.items()}


def beside(state: State) -> State:
    """Another network's, with some of the same names, and an average's counter."""
    changed = {name: torch.zeros(3) for name in list(state)[:9]}
    return prefixed("discriminator.", changed) | {"n_averaged": torch.tensor(7), "discriminator.conv": torch.ones(1)}


LAYOUTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (lambda s: s, ""),
    "DistributedDataParallel": (lambda s: prefixed("module.", s), ""),
    "compiled, then distributed": (lambda s: prefixed("module._orig_mod.", s), ""),
    "sharded, with checkpointed blocks": (wrapped, ""),
    "beside an epoch": (lambda s: s | {"epoch": 3}, ""),
    "beside an average": (lambda s: s | {"ema": {name: t + 1 for name, t in s.items()}}, ""),
    "twice": (lambda s: {"model": s, "state_dict": s, "epoch": 3}, "under 'model'"),
    "MAISI": (lambda s: {"unet_state_dict": s, "epoch": 3, "scale_factor": torch.ones(1)}, "under 'unet_state_dict'"),
    "averaged": (lambda s: prefixed("module.", s) | {"n_averaged": torch.tensor(7)}, "'module.*'"),
    "a parent": (lambda s: prefixed("first_stage.net.", s) | beside(s), "'first_stage.net.*'"),
    "Lightning": (
        lambda s: {"state_dict": prefixed("generator._orig_mod.", s) | beside(s), "epoch": 3, "callbacks": {}},
        "under 'state_dict' as 'generator.*'",
    ),
    "a checkpoint of ours": (
        lambda s: {"state": {"autoencoder": s, "optimizer_g": {"state": {0: {"exp_avg": torch.ones(2)}}}}},
        "under 'state', 'autoencoder'",
    ),
    "four deep": (lambda s: {"a": {"b": {"c": {"d": prefixed("e.", s)}}}}, "under 'a', 'b', 'c', 'd' as 'e.*'"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_however_a_trainer_saved_them(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save, place = LAYOUTS[layout]
    stock, other = stock_network().state_dict(), FastAutoencoderKlMaisi(AutoencoderKlMaisi(**STOCK))
    torch.save(save(stock), tmp_path / "w.pt")
    caplog.set_level("INFO")
    load_weights(other, tmp_path / "w.pt")
    assert same(dict(other.state_dict()), stock)
    told = [f"{tmp_path}/w.pt: the weights are {place}"] if place else []
    assert [record.message for record in caplog.records] == [*told, f"weights loaded from {tmp_path}/w.pt"]


def test_names_that_the_network_has_are_no_wrappers(tmp_path: Path) -> None:
    network = torch.nn.Module()
    network.module = torch.nn.Linear(2, 2)
    write_tensors(prefixed("model.", network.state_dict()), tmp_path / "w.pt")
    assert same(read_weights(network, tmp_path / "w.pt"), network.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_data_types_become_the_networks(dtype: torch.dtype, tmp_path: Path) -> None:
    line, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    write_tensors({name: tensor.to(dtype) for name, tensor in line.state_dict().items()}, tmp_path / "w.pt")
    found = read_weights(other, tmp_path / "w.pt")
    load_weights(other, tmp_path / "w.pt")
    assert found["weight"].dtype == other.weight.dtype == torch.float32
    assert torch.equal(other.weight, line.weight.to(dtype).float()) and same(found, dict(other.state_dict()))


def refusal(content: Any, path: Path) -> str:
    """Why a file with `content` is no weights of a line through the origin, which has one parameter."""
    write_tensors(content, path)
    with pytest.raises(UserError) as caught:
        read_weights(torch.nn.Linear(3, 2, bias=False), path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_refusals_say_what_was_found_and_where(tmp_path: Path) -> None:
    path, weight = tmp_path / "w.pt", torch.ones(2, 3)
    end = "(weights of another architecture); correct the path or autoencoder_def"
    several = "holds several weights of this network ({}); save the ones to use by themselves, as network.state_dict()"
    not_finite = "weight is not finite (NaN or infinite); use weights saved earlier"
    for content, wanted in (
        ({"weight": weight, "extra": weight}, f"has extra, which the network lacks {end}"),
        ({"net": {"d.weight": weight, "d.bias": weight}}, "under 'net' as 'd.*': has bias, which the network lacks"),
        ({"conv.bias": weight}, f"holds 1 tensors named like 'conv.bias' {end}"),
        ({"state": {"a.x": weight, "b": weight}}, f"holds 2 tensors named like 'a.x', under 'state' {end}"),
        ({"epoch": 3, "state": []}, "holds no plain state dict of tensors; save network.state_dict()"),
        (weight, "holds no plain state dict of tensors; save network.state_dict()"),
        ({"ema": {"weight": weight}, "net": {"weight": 2 * weight}}, several.format("under 'ema'; under 'net'")),
        ({"g.weight": weight, "avg.g.weight": 2 * weight}, several.format("'avg.g.*'; 'g.*'")),
        ({"weight": weight / 0}, not_finite),
        ({"weight": 1e300 * weight.double()}, not_finite),
        ({"n": {"weight": weight * torch.nan}}, f"under 'n': {not_finite}"),
        ({"weight": weight.to(torch.int8)}, "weight is torch.int8, but the network's is torch.float32; save weights"),
    ):  # fmt: skip
        assert refusal(content, path).startswith(wanted), content
    shaped = refusal({"model": {"net.weight": torch.ones(2, 4), "d.bias": weight}}, path)
    assert shaped.startswith("under 'model' as 'net.*': weight is (2, 4), but the network's is (2, 3); use weights of")


def test_a_network_without_parameters_needs_no_weights(tmp_path: Path) -> None:
    weights = Weights(torch.nn.Identity(), tmp_path)
    assert weights.facts() == {"weights": None, "weights_sha256": None}
    with pytest.raises(UserError, match=r"holds no weights \(autoencoder_best_epoch\*\.pt, autoencoder\.pt or model"):
        Weights(torch.nn.Linear(2, 2), tmp_path)


def test_weights_are_the_given_ones_or_the_newest_best(tmp_path: Path) -> None:
    network, folder = torch.nn.Linear(2, 2), tmp_path / "models"
    for i, name in enumerate(
        ("model.pt", "autoencoder.pt", "autoencoder_best_epoch9.pt", "autoencoder_best_epoch12.pt")
    ):
        torch.nn.init.constant_(network.weight, i)
        save_weights(network, folder / name)
        found = Weights(torch.nn.Linear(2, 2), folder)
        assert found.path == folder / name and torch.equal(found.network.weight, network.weight)
        assert found.sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
        assert found.facts() == {"weights": str(found.path), "weights_sha256": found.sha256}
    given = Weights(torch.nn.Linear(2, 2), folder, str(folder / "model.pt"))
    assert given.path == folder / "model.pt" and not given.network.weight.any()


def test_ranks_that_read_different_weights_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_weights(torch.nn.Linear(2, 2), tmp_path / "autoencoder.pt")
    monkeypatch.setattr("scripts.networks.weights.gather", lambda value: [value, "another"])
    with pytest.raises(UserError, match=r"autoencoder\.pt: the ranks read different weights; give trained_auto"):
        Weights(torch.nn.Linear(2, 2), tmp_path)
