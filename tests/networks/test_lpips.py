"""LPIPS in pure torch is LPIPS written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from scripts.common.errors import UserError
from scripts.networks.lpips import PerceptualLoss
from tests.helpers import MODELS, Attack


def lpips_by_hand(x: torch.Tensor, y: torch.Tensor, files: dict[str, Path]) -> torch.Tensor:
    """LPIPS 0.1.4, net="squeeze", of (N, 1, H, W) pairs, written out; one channel broadcasts to three."""
    w, lin = (torch.load(files[name], map_location="cpu") for name in ("backbone_path", "linear_path"))

    def fire(t: torch.Tensor, i: int) -> torch.Tensor:
        def conv(t: torch.Tensor, name: str, padding: int = 0) -> torch.Tensor:
            key = f"features.{i}.{name}"
            return F.relu(F.conv2d(t, w[f"{key}.weight"], w[f"{key}.bias"], padding=padding))

        t = conv(t, "squeeze")
        return torch.cat([conv(t, "expand1x1"), conv(t, "expand3x3", 1)], 1)

    def taps(t: torch.Tensor) -> list[torch.Tensor]:
        shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
        t = F.relu(F.conv2d((t - shift) / scale, w["features.0.weight"], w["features.0.bias"], stride=2))
        out = [t]
        t = fire(fire(F.max_pool2d(t, 3, 2, ceil_mode=True), 3), 4)
        out.append(t)
        t = fire(fire(F.max_pool2d(t, 3, 2, ceil_mode=True), 6), 7)
        out.append(t)
        t = F.max_pool2d(t, 3, 2, ceil_mode=True)
        for i in (9, 10, 11, 12):
            t = fire(t, i)
            out.append(t)
        return out

    total = torch.zeros(len(x))
    for i, (a, b) in enumerate(zip(taps(x), taps(y), strict=True)):
        a, b = (t / (t.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for t in (a, b))
        total += F.conv2d((a - b) ** 2, lin[f"lin{i}.model.1.weight"]).mean((2, 3)).flatten()
    return total


def test_perceptual_equals_lpips_written_out(weight_files: dict[str, Path]) -> None:
    loss = PerceptualLoss(**weight_files)
    x, y = torch.rand(5, 1, 40, 33), torch.rand(5, 1, 40, 33)
    expected = lpips_by_hand(x, y, weight_files)
    assert expected.min() > 0.01
    assert torch.allclose(loss.distance(x, y), expected, rtol=1e-4)
    assert loss.distance(x, x).abs().max() == 0


def test_perceptual_compares_a_fifth_of_the_slices_of_all_axes(weight_files: dict[str, Path]) -> None:
    loss = PerceptualLoss(**weight_files)
    x, y = torch.rand(2, 1, 20, 25, 30), torch.rand(2, 1, 20, 25, 30)
    seeds = (3, 4)
    got = loss(x, y, [torch.Generator().manual_seed(s) for s in seeds])
    expected = torch.zeros(())
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    for axis in (2, 3, 4):
        picked = []
        for b in range(2):
            chosen = torch.randperm(x.shape[axis], generator=generators[b])[: int(0.2 * x.shape[axis])]
            picked += [(x[b].select(axis - 1, int(i)), y[b].select(axis - 1, int(i))) for i in chosen]
        expected += lpips_by_hand(*(torch.stack(t) for t in zip(*picked, strict=True)), weight_files).mean()
    assert got == pytest.approx(float(expected), rel=1e-4)
    assert loss(x, y, [torch.Generator().manual_seed(s) for s in seeds]) == got
    assert loss(x, y) == loss(x, y) != got  # evenly spaced slices, without a generator


def test_perceptual_gradient_reaches_the_reconstruction_only(weight_files: dict[str, Path]) -> None:
    loss = PerceptualLoss(**weight_files).train()
    x, y = torch.rand(1, 1, 20, 20, 20, requires_grad=True), torch.rand(1, 1, 20, 20, 20, requires_grad=True)
    loss(x, y).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0 and y.grad is None
    assert not any(p.requires_grad for p in loss.parameters()) and not loss.training


def test_thin_volumes_are_padded(weight_files: dict[str, Path]) -> None:
    assert torch.isfinite(PerceptualLoss(**weight_files)(torch.rand(1, 1, 4, 40, 12), torch.rand(1, 1, 4, 40, 12)))


def test_untrained_features_are_seeded_and_leave_the_global_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = PerceptualLoss(pretrained=False)
    assert torch.equal(torch.rand(1), expected)
    second = PerceptualLoss(pretrained=False)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_missing_and_wrong_perceptual_weights_are_named(weight_files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing\.pth: perceptual weights are missing; fetch them with python -m monai"
    ):
        PerceptualLoss(backbone_path=tmp_path / "nothing.pth")
    swapped = {"backbone_path": weight_files["linear_path"], "linear_path": weight_files["backbone_path"]}
    with pytest.raises(UserError, match=r"lpips\.pth: features\.0\.weight is missing"):
        PerceptualLoss(**swapped)
    for content in (torch.zeros(3), [1], {"features.0.weight": 1}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match=r"other\.pth: features\.0\.weight is missing, expected \(64, 3, 3, 3\)"):
            PerceptualLoss(backbone_path=tmp_path / "other.pth", linear_path=weight_files["linear_path"])
    torch.save({"features.0.weight": Attack(tmp_path / "owned")}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: is damaged or holds more than tensors \(.+\); fetch it again"):
        PerceptualLoss(backbone_path=tmp_path / "other.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.skipif(not MODELS.is_dir(), reason="no published LPIPS weights beside the project")
def test_the_published_weights_load_and_measure() -> None:
    files = {"backbone_path": MODELS / "squeezenet1_1-b8a52dc0.pth", "linear_path": MODELS / "lpips_squeeze_v0.1.pth"}
    loss = PerceptualLoss(**files)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, 64, 64, generator=generator)
    y = (x + 0.1 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    assert torch.allclose(loss.distance(x, y), lpips_by_hand(x, y, files), rtol=1e-4)
    assert 0 < float(loss.distance(x, y).mean()) < float(loss.distance(x, 1 - x).mean())
