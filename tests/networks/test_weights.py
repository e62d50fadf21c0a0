"""Weights go in and out of files, and nothing else does."""

from __future__ import annotations

import copy
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi

from scripts.common.errors import UserError
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.networks.weights import Weights, load_weights, save_weights
from tests.helpers import STOCK, Attack, stock_network


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
