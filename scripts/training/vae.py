"""The adversarial step of MAISI's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer, SimpleInferer
from torch import nn

from scripts.common.errors import UserError
from scripts.training.engine import TrainingEngine
from scripts.training.knobs import WEIGHT
from scripts.training.schedule import check_share

LEAD = 0.05  # the share of the training for which the discriminator learns before it counts


class VaeTrainer(TrainingEngine):
    """Trains an autoencoder against a discriminator, one step of each for a batch.

    The discriminator, 0.7 % of a step, is computed in float32 whatever `amp` says: on CPUs PyTorch 2.13's bfloat16
    `conv3d` returns garbage weight gradients where the kernel is larger than its input, as the discriminator's last is
    with patches of 32 voxels.

    Batches have `image`, (B, 1, X, Y, Z) in [0, 1]. The networks are `autoencoder`, which maps (image, noise) to
    (reconstruction, posterior mean, posterior standard deviation), and `discriminator`, which maps images to a list
    whose last item are the logits; their optimizers are `optimizer_g` and `optimizer_d`.

    Args:
        generator_loss: a `VaeLoss`.
        adversarial_loss: called with (logits, target_is_real, for_discriminator).
        adv_weight: of the adversarial term in the autoencoder's loss.
        discriminator_start: the share of the training from which the discriminator counts. Before, there is nothing
            sharp to judge, and it would only disturb; it begins to learn a little earlier (`LEAD`), so that it knows
            something then.
        scale_equivariance: weight of the mean absolute difference between what latents of half the size are decoded
            to, and the image of half the size: that latents mean the same at any scale (arXiv 2502.14831). An eighth of
            a pass of the decoder; 0 for none.
        inferer: runs the autoencoder.
        kwargs: of `TrainingEngine`.
    """

    remedy = (
        "lower autoencoder_train#patch_size (memory goes with its voxels) or autoencoder_train#batch_size, or set "
        "activation_checkpointing to true (63 % of the saved activations)"
    )
    unscaled = ("optimizer_d",)

    def __init__(
        self,
        *,
        generator_loss: nn.Module,
        adversarial_loss: nn.Module,
        adv_weight: float = 0.1,
        discriminator_start: float = 0.0,
        scale_equivariance: float = 0.0,
        inferer: Inferer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generator_loss, self.adversarial_loss, self.adv_weight = generator_loss, adversarial_loss, adv_weight
        check_share("discriminator_start", discriminator_start)
        if not WEIGHT.good(scale_equivariance):
            raise UserError(f"scale_equivariance is {scale_equivariance!r}; use a weight from 0, e.g. 0.25")
        self.discriminator_start, self.scale_equivariance = discriminator_start, scale_equivariance
        self.inferer = SimpleInferer() if inferer is None else inferer

    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One step of the autoencoder, then one of the discriminator on the same images."""
        images, judge = batch["image"], self.bare["discriminator"]
        noise, generators = self.draw(images)

        # (1) generator: the discriminator is frozen, so nothing of this reaches its gradients
        judge.requires_grad_(False)
        with self.autocast():
            half = (True,) if self.scale_equivariance else ()
            reconstruction, mu, sigma, *halved = self.inferer(images, self.networks["autoencoder"], noise, *half)
            losses = self.generator_loss(reconstruction, images, mu, sigma, generators)
        total = losses["loss"]
        for image in halved:
            losses["scale_loss"] = _halved_error(image, images)
            total = total + self.scale_equivariance * losses["scale_loss"]
        if self.share >= self.discriminator_start:
            losses["adv_loss"] = self.adversarial_loss(judge(reconstruction.float())[-1], True, False)
            total = total + self.adv_weight * losses["adv_loss"]
        self.update("optimizer_g", total)

        # (2) discriminator: fake and real in one pass (its normalisation is per sample)
        judge.requires_grad_(True)
        if self.share < self.discriminator_start - LEAD:
            return losses
        both = torch.cat([reconstruction.detach().float(), images])
        fake, real = self.networks["discriminator"](both)[-1].chunk(2)
        losses["d_fake_loss"] = self.adversarial_loss(fake, False, True)
        losses["d_real_loss"] = self.adversarial_loss(real, True, True)
        losses["d_loss"] = (losses["d_fake_loss"] + losses["d_real_loss"]) * 0.5
        self.update("optimizer_d", losses["d_loss"])
        return losses

    def draw(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Generator]]:
        """Latent noise, (B, C, X/4, Y/4, Z/4), and for each sample what chooses its slices (on the CPU)."""
        network = self.bare["autoencoder"]
        shape = (network.latent_channels, *(n // network.factor for n in images.shape[2:]))
        noise, generators = [], []
        for seed, slices in self.seeds(len(images), streams=2):
            generator = torch.Generator(images.device).manual_seed(int(seed))
            noise.append(torch.randn(shape, generator=generator, device=images.device))
            generators.append(torch.Generator().manual_seed(int(slices)))
        return torch.stack(noise), generators


def _halved_error(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference from the averaged images; where a size is odd, its last latent has no partner."""
    x, y, z = decoded.shape[2:]
    return (decoded.float() - F.avg_pool3d(images, 2)[:, :, :x, :y, :z]).abs().mean()


def check_patch(patch_size: Sequence[int], discriminator: nn.Module) -> None:
    """Whether the discriminator's strides leave anything of a patch (tried on PyTorch's meta device, at no cost).

    Raises:
        UserError: where they do not.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            state = {name: torch.empty_like(t, device="meta") for name, t in discriminator.state_dict().items()}
            torch.func.functional_call(discriminator, state, (torch.empty(1, 1, *patch_size),))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"autoencoder_train#patch_size is {list(patch_size)}, too small for the discriminator; use at least 32 "
            "along each axis, or lower discriminator_def#num_layers_d"
        ) from error
