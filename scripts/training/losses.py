"""The losses of MAISI's VAE: KL divergence, perceptual and patch-adversarial."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from scripts.common.errors import UserError


def kl_loss(mu: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """KL divergence of N(mu, sigma^2) from N(0, 1): summed over latent elements, averaged over the batch.

    The sum is the reference's; with it `kl_weight` 1e-7 keeps its meaning (Kingma & Welling 2014, app. B).

    Args:
        mu: (B, C, X, Y, Z) posterior mean.
        sigma: posterior standard deviation, in the same shape, positive.
    """
    variance = sigma.float().square()
    return 0.5 * (mu.float().square() + variance - torch.log(variance + 1e-10) - 1).sum() / mu.shape[0]


class LeastSquaresAdversarialLoss(nn.Module):
    """`monai.losses.PatchAdversarialLoss(criterion="least_squares")` without its copy of the target from the host."""

    def forward(self, logits: torch.Tensor, target_is_real: bool, for_discriminator: bool = False) -> torch.Tensor:
        """Mean squared distance of the leaky logits, of any shape, from 1 (real) or 0 (fake)."""
        return (F.leaky_relu(logits.float(), 0.05) - float(target_is_real)).square().mean()


class VaeLoss(nn.Module):
    """What the autoencoder minimises beside the adversarial term: recons + kl_weight * kl + perceptual_weight * p.

    Args:
        perceptual: compares reconstruction and target, e.g. `PerceptualLoss`.
        recon_loss: "l1" or "l2", averaged over voxels.
        kl_weight: of `kl_loss`.
        perceptual_weight: of `perceptual`.

    Raises:
        UserError: for an unknown `recon_loss`.
    """

    def __init__(
        self, perceptual: nn.Module, recon_loss: str = "l1", kl_weight: float = 1e-7, perceptual_weight: float = 0.3
    ) -> None:
        super().__init__()
        known = {"l1": F.l1_loss, "l2": F.mse_loss}
        if recon_loss not in known:
            raise UserError(f"recon_loss {recon_loss!r} is unknown; use l1 or l2")
        self.perceptual, self.recon_loss = perceptual, known[recon_loss]
        self.kl_weight, self.perceptual_weight = kl_weight, perceptual_weight

    def weights(self, kl_scale: float = 1.0) -> dict[str, float]:
        """Of the terms in the sum, by their names; `kl_scale` is a factor on that of the KL divergence."""
        return {
            "recons_loss": 1.0,
            "kl_loss": self.kl_weight * kl_scale,
            "p_loss": self.perceptual_weight,
        }

    def forward(
        self,
        reconstruction: torch.Tensor,
        target: torch.Tensor,
        mu: torch.Tensor,
        sigma: torch.Tensor,
        generators: Sequence[torch.Generator] | None = None,
        kl_scale: float = 1.0,
    ) -> dict[str, torch.Tensor]:
        """`loss`, the weighted sum, and its terms `recons_loss`, `kl_loss`, `p_loss`, unweighted.

        The last one, which costs most, is left out where its weight is 0.

        Args:
            reconstruction: (B, 1, X, Y, Z).
            target: in the same shape, in [0, 1].
            mu: (B, C, X/4, Y/4, Z/4) posterior mean.
            sigma: posterior standard deviation.
            generators: choose the slices of the perceptual term, one for each sample.
            kl_scale: of `weights`.
        """
        arguments = (generators,) if generators else ()  # MONAI's PerceptualLoss takes none
        losses = {
            "recons_loss": self.recon_loss(reconstruction.float(), target),
            "kl_loss": kl_loss(mu, sigma),
        }
        weights = self.weights(kl_scale)
        weighted = weights["kl_loss"] * losses["kl_loss"]
        if self.perceptual_weight:
            losses["p_loss"] = self.perceptual(reconstruction.float(), target, *arguments)
            weighted = weighted + weights["p_loss"] * losses["p_loss"]
        return {"loss": losses["recons_loss"] + weighted, **losses}
