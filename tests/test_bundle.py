"""What the model zoo and `python -m monai.bundle` ask of a bundle."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnxruntime
import pytest
import torch
from monai.bundle import ckpt_export, onnx_export, verify_net_in_out

from scripts.networks.autoencoder import Reconstructor
from tests.helpers import NETWORK, SMALL, call, stock_network, words

INFERENCE, METADATA = "configs/inference.json", "configs/metadata.json"


@pytest.fixture
def network(weights: Path) -> Reconstructor:
    stock = stock_network(**NETWORK)
    stock.load_state_dict(torch.load(weights, weights_only=True))
    return Reconstructor(stock).eval()


def test_the_reconstructor_is_monais_network(weights: Path) -> None:
    stock = stock_network(**NETWORK)
    stock.load_state_dict(torch.load(weights, weights_only=True))
    x = torch.rand(1, 1, 16, 24, 20)
    with torch.no_grad():
        mu, sigma = stock.eval().encode(x)
        wanted = stock.decode(mu)
    names = list(stock.state_dict())
    ours = Reconstructor(stock).eval()
    assert list(ours.state_dict()) == names and (ours.factor, ours.latent_channels) == (4, 4)
    with torch.no_grad():
        got = ours.reconstruct(x)
        assert torch.equal(ours(x), got[0])
    for a, b in zip(got, (wanted, mu, sigma), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_network_def_keeps_what_the_metadata_says() -> None:
    verify_net_in_out("network_def", METADATA, INFERENCE, device="cpu", n=2, **SMALL)


def test_torchscript_gives_the_same(weights: Path, network: Reconstructor, tmp_path: Path) -> None:
    path = tmp_path / "model.ts"
    ckpt_export("network_def", str(path), str(weights), METADATA, INFERENCE, **SMALL)
    files = {"metadata.json": "", "inference.json": ""}
    script = torch.jit.load(path, _extra_files=files)
    assert json.loads(files["metadata.json"])["version"] == json.loads(Path(METADATA).read_text())["version"]
    x = torch.rand(1, 1, 24, 16, 20)
    with torch.no_grad():
        assert torch.allclose(script(x), network(x), atol=1e-4)
        assert torch.allclose(script.decode(script.encode(x)[0]), network(x), atol=1e-4)


def test_onnx_gives_the_same(weights: Path, network: Reconstructor, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_export("network_def", str(path), str(weights), METADATA, INFERENCE, input_shape=[1, 1, 24, 16, 20], **SMALL)
    session = onnxruntime.InferenceSession(path)
    x = torch.rand(1, 1, 24, 16, 20)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        assert np.abs(got - network(x).numpy()).max() < 1e-4


@pytest.mark.parametrize("verb", ["verify_net_in_out", pytest.param("ckpt_export", marks=pytest.mark.slow)])
def test_the_verbs_run_on_the_command_line(verb: str, weights: Path, tmp_path: Path) -> None:
    files = ["--meta_file", METADATA, "--config_file", INFERENCE, *words(SMALL)]
    export = ["--filepath", str(tmp_path / "m.ts"), "--ckpt_file", str(weights)]
    command = [sys.executable, "-m", "monai.bundle", verb, "network_def", *files]
    done = call([*command, *(export if verb == "ckpt_export" else [])])
    assert done.returncode == 0, done.stderr
    assert verb != "ckpt_export" or (tmp_path / "m.ts").stat().st_size > 100000


def test_the_metadata_has_what_the_zoo_requires() -> None:
    """The parts of the zoo's schema, which is not at hand here, that MONAI's bundle specification names."""
    text = {"type": "string", "minLength": 1}
    image = {
        "type": "object",
        "required": [
            "type", "format", "num_channels", "spatial_shape", "dtype", "value_range", "is_patch_data", "channel_def",
        ],
    }  # fmt: skip
    named = [
        "version",
        "monai_version",
        "pytorch_version",
        "numpy_version",
        "task",
        "description",
        "authors",
        "copyright",
    ]
    schema: dict[str, Any] = {
        "type": "object",
        "required": [*named, "changelog", "required_packages_version", "network_data_format", "schema"],
        "properties": {
            **dict.fromkeys(named, text),
            "changelog": {"type": "object", "additionalProperties": text},
            "required_packages_version": {"type": "object", "additionalProperties": text},
            "network_data_format": {
                "type": "object",
                "required": ["inputs", "outputs"],
                "properties": {
                    "inputs": {"type": "object", "required": ["image"], "additionalProperties": image},
                    "outputs": {"type": "object", "required": ["pred"], "additionalProperties": image},
                },
            },
        },
    }
    jsonschema.validate(json.loads(Path(METADATA).read_text()), schema)


def test_large_files_lists_the_weights() -> None:
    listed = re.findall(r'path: "(.*)"', Path("large_files.yml").read_text())
    assert listed == ["models/model.pt", "models/squeezenet1_1-b8a52dc0.pth", "models/lpips_squeeze_v0.1.pth"]
