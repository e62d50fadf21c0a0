"""RadImageNet's ResNet50 is Keras's, written out; and the networks that an FID takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scripts.common.errors import UserError
from scripts.networks import resnet
from scripts.networks.lpips import PooledSqueezeNet, SqueezeNetFeatures
from scripts.networks.resnet import RadImageNetResNet50, feature_networks
from tests.helpers import Attack

BLOCKS = (3, 4, 6, 3)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnet, "_STAGES", tuple(zip((2, 4, 6, 8), BLOCKS, strict=True)))


@pytest.fixture
def file(narrow: None, tmp_path: Path) -> Path:
    """Random weights in the layout of RadImageNet-ResNet50_notop.pth, with the names written out."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def convolution(conv: str, norm: str, outputs: int, inputs: int, size: int) -> None:
        state[f"{conv}.weight"] = torch.randn(outputs, inputs, size, size) / (inputs * size * size) ** 0.5
        state[f"{conv}.bias"] = torch.randn(outputs)
        state.update({f"{norm}.{name}": torch.rand(outputs) + 0.5 for name in ("weight", "bias", "running_var")})
        state[f"{norm}.running_mean"] = torch.randn(outputs)
        state[f"{norm}.num_batches_tracked"] = torch.tensor(0)

    convolution("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, (width, blocks) in enumerate(zip((2, 4, 6, 8), BLOCKS, strict=True), 1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            convolution(f"{at}.conv1", f"{at}.bn1", width, inputs, 1)
            convolution(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            convolution(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    assert len(state) == 371  # as the published file has
    path = tmp_path / "radimagenet.pth"
    torch.save(state, path)
    return path


def by_hand(slices: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """Keras's ResNet50 (a block's first convolution has its stride), averaged over space."""

    def layer(x: torch.Tensor, conv: str, norm: str, stride: int = 1, padding: int = 0) -> torch.Tensor:
        x = F.conv2d(x, w[f"{conv}.weight"], w[f"{conv}.bias"], stride, padding)
        mean, var, weight, bias = (
            w[f"{norm}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1.001e-5).sqrt() * weight + bias

    x = (slices - slices.min()) / (slices.max() - slices.min())
    x = x.repeat(1, 3, 1, 1) - torch.tensor([0.406, 0.456, 0.485])[:, None, None]
    x = F.max_pool2d(layer(x, "conv1", "bn1", 2, 3).relu(), 3, 2, 1)
    for stage, blocks in enumerate(BLOCKS, 1):
        for block in range(blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = layer(x, f"{at}.conv1", f"{at}.bn1", stride).relu()
            y = layer(layer(y, f"{at}.conv2", f"{at}.bn2", 1, 1).relu(), f"{at}.conv3", f"{at}.bn3")
            x = (y + (layer(x, f"{at}.downsample.0", f"{at}.downsample.1", stride) if block == 0 else x)).relu()
    return x.mean((2, 3))


def test_the_resnet_equals_keras_written_out(file: Path) -> None:
    slices = torch.rand(5, 1, 40, 33) * 0.5 + 0.2
    features = RadImageNetResNet50(file)(slices, chunk=2)
    wanted = by_hand(slices, torch.load(file, weights_only=True))
    assert features.shape == (5, 32) and wanted.std(0).max() > 0.01
    assert torch.allclose(features, wanted, rtol=1e-4, atol=1e-5)


def test_the_published_resnet_has_2048_features() -> None:
    assert RadImageNetResNet50.features == 2048 and PooledSqueezeNet.features == 512


def test_squeezenet_is_pooled_with_imagenets_statistics(weight_files: dict[str, Path]) -> None:
    slices = torch.rand(5, 1, 40, 33)
    features = PooledSqueezeNet(True, weight_files["backbone_path"])(slices, chunk=2)
    backbone = SqueezeNetFeatures()
    backbone.load_state_dict(torch.load(weight_files["backbone_path"], weights_only=True), strict=False)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    wanted = backbone.features((slices - mean) / std).mean((2, 3))
    assert features.shape == (5, 512) and torch.allclose(features, wanted, rtol=1e-3, atol=1e-4)
    assert PooledSqueezeNet(False)(slices[..., :5]).shape == (5, 512)  # thinner than its strides


def test_networks_are_those_whose_files_are_given(file: Path, weight_files: dict[str, Path]) -> None:
    backbone = str(weight_files["backbone_path"])
    assert list(feature_networks(backbone)) == ["squeezenet"]
    networks = feature_networks(backbone, radimagenet_path=str(file))
    assert [network.label for network in networks.values()] == ["SqueezeNet 1.1 (ImageNet)", "ResNet50 (RadImageNet)"]
    assert not any(parameter.requires_grad for parameter in networks.parameters())


def test_files_that_are_missing_or_others_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.pth: perceptual weights are missing; fetch them with"):
        feature_networks(str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match=r"gone\.pth: no such weights file; correct radimagenet_path, or leave it out$"):
        RadImageNetResNet50(tmp_path / "gone.pth")
    state = torch.load(file, weights_only=True)
    del state["layer2.0.downsample.0.bias"]
    torch.save(state, file)
    with pytest.raises(
        UserError, match=r"radimagenet\.pth: layer2\.0\.downsample\.0\.bias is missing, expected \(16,\)"
    ):
        RadImageNetResNet50(file)
    torch.save(Attack(tmp_path / "attacked"), file)
    with pytest.raises(UserError, match="is damaged or holds more than tensors"):
        RadImageNetResNet50(file)
    assert not (tmp_path / "attacked").exists()
