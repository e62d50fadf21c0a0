from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.losses import PatchAdversarialLoss

from scripts.common.errors import UserError
from scripts.training.losses import LeastSquaresAdversarialLoss, VaeLoss, kl_loss


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
        scaled = VaeLoss(halves, kind, kl_weight=1e-3, perceptual_weight=0.3)(x, y, mu, sigma, kl_scale=8.0)
        assert scaled["kl_loss"] == losses["kl_loss"]
        assert float(scaled["loss"] - losses["loss"]) == pytest.approx(7e-3 * float(losses["kl_loss"]), rel=1e-4)
    weights = VaeLoss(halves, kl_weight=1e-3, perceptual_weight=0.3).weights(8.0)
    assert weights == {"recons_loss": 1.0, "kl_loss": 8e-3, "p_loss": 0.3}
    without = VaeLoss(pytest.fail, kl_weight=1e-3, perceptual_weight=0.0)(x, y, mu, sigma)  # not even computed
    assert without["loss"] == F.l1_loss(x, y) + 1e-3 * kl_loss(mu, sigma) and "p_loss" not in without
    with pytest.raises(UserError, match="recon_loss 'l3' is unknown; use l1 or l2"):
        VaeLoss(halves, "l3")
