from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss

from scripts.common.errors import UserError
from scripts.networks.lpips import PerceptualLoss, SqueezeNetFeatures
from scripts.training.losses import LeastSquaresAdversarialLoss, VaeLoss, kl_loss

CHANNELS = (64, 128, 256, 384, 384, 512, 512)


def test_kl_is_zero_for_a_standard_normal_and_sums_elements() -> None:
    mu, sigma = torch.zeros(2, 4, 3, 3, 3), torch.ones(2, 4, 3, 3, 3)
    assert kl_loss(mu, sigma) == pytest.approx(0, abs=1e-6)
    assert kl_loss(mu + 2, sigma) == pytest.approx(0.5 * 4 * 4 * 27)
    analytic = torch.distributions.kl_divergence(torch.distributions.Normal(0.3, 0.2), torch.distributions.Normal(0, 1))
    assert kl_loss(mu + 0.3, sigma * 0.2) == pytest.approx(float(analytic) * 4 * 27, rel=1e-5)


@pytest.mark.parametrize("real", [True, False])
def test_adversarial_loss_equals_monai(real: bool) -> None:
    logits = torch.randn(2, 1, 5, 6, 7)
    expected = PatchAdversarialLoss(criterion="least_squares")(logits, target_is_real=real, for_discriminator=True)
    assert LeastSquaresAdversarialLoss()(logits, real, True) == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture
def weight_files(tmp_path: Path) -> dict[str, Path]:
    """Files in the layouts of torchvision's SqueezeNet 1.1 (with its classifier) and of LPIPS 0.1, random."""
    torch.manual_seed(0)
    backbone = {k: v * 3 for k, v in SqueezeNetFeatures().state_dict().items()}
    backbone |= {"classifier.1.weight": torch.zeros(1000, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    linear = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)}
    paths = {"backbone_path": tmp_path / "squeezenet.pth", "linear_path": tmp_path / "lpips.pth"}
    torch.save(backbone, paths["backbone_path"])
    torch.save(linear, paths["linear_path"])
    return paths


def lpips_by_hand(x: torch.Tensor, y: torch.Tensor, files: dict[str, Path]) -> torch.Tensor:
    """LPIPS 0.1.4, net="squeeze", of (N, 1, H, W) pairs, written out; one channel broadcasts to three."""
    w, lin = torch.load(files["backbone_path"]), torch.load(files["linear_path"])

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


def test_vae_loss_is_the_weighted_sum_of_its_terms() -> None:
    def halves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs().mean() * 0.5

    x, y, mu, sigma = (
        torch.rand(1, 1, 8, 8, 8),
        torch.rand(1, 1, 8, 8, 8),
        torch.randn(1, 4, 2, 2, 2),
        torch.rand(1, 4, 2, 2, 2),
    )
    for kind, reference in (("l1", F.l1_loss), ("l2", F.mse_loss)):
        losses = VaeLoss(halves, kind, kl_weight=1e-3, perceptual_weight=0.3)(x, y, mu, sigma)
        assert losses["recons_loss"] == reference(x, y)
        expected = losses["recons_loss"] + 1e-3 * kl_loss(mu, sigma) + 0.3 * halves(x, y)
        assert losses["loss"] == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(UserError, match="recon_loss 'l3' is unknown; use l1 or l2"):
        VaeLoss(halves, "l3")
