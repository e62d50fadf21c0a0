"""The adversarial step of MAISI's autoencoder."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import Inferer, SimpleInferer
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.windows import check_size
from scripts.training.engine import TrainingEngine
from scripts.training.knobs import COUNT, WEIGHT
from scripts.training.schedule import PatchCurriculum, check_share

logger = logging.getLogger(__name__)

LEAD = 0.05  # the share of the training for which the discriminator learns before it counts


class VaeTrainer(TrainingEngine):
    """Trains an autoencoder against a discriminator, one step of each for a batch.

    The discriminator, 0.7 % of a step, is computed in float32 whatever `amp` says: on CPUs PyTorch 2.13's bfloat16
    `conv3d` returns garbage weight gradients where the kernel is larger than its input, as the discriminator's last is
    with patches of 32 voxels.

    Batches have `image`, (B, 1, X, Y, Z) in [0, 1]. The networks are `autoencoder`, a `FastAutoencoderKlMaisi`, and
    `discriminator`, which maps images to a list whose last item are the logits; their optimizers are `optimizer_g` and
    `optimizer_d`.

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
        decoder_finish: over this last share of the training only the decoder learns. Encoder and latents stay as they
            are, and a step costs less.
        patch_sizes: of the batches' images. Reconstruction is a mean over voxels and KL a sum over latent elements, so
            where patches are smaller than the last ones KL counts as many times more; its pull on a latent element,
            beside that of the reconstruction, stays the same.
        term_norm_interval: every so many steps the norm of each weighted term's gradient at the decoder's last layer
            is logged, as `last_layer_norm_<term>`; the KL divergence has none there. 0 for never.
        inferer: runs the autoencoder.
        kwargs: of `TrainingEngine`.

    Raises:
        UserError: for a share, a weight or an interval that is none.
    """

    remedy = (
        "lower autoencoder_train#patch_size (memory goes with its voxels) or autoencoder_train#batch_size, or set "
        "activation_checkpointing to true (saves about a seventh)"
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
        decoder_finish: float = 0.0,
        patch_sizes: PatchCurriculum | None = None,
        term_norm_interval: int = 0,
        inferer: Inferer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generator_loss, self.adversarial_loss, self.adv_weight = generator_loss, adversarial_loss, adv_weight
        check_share("discriminator_start", discriminator_start)
        check_share("decoder_finish", decoder_finish)
        if not WEIGHT.good(scale_equivariance):
            raise UserError(f"scale_equivariance is {scale_equivariance!r}; use a weight from 0, e.g. 0.25")
        if term_norm_interval != 0 and not COUNT.good(term_norm_interval):
            raise UserError(f"term_norm_interval is {term_norm_interval!r}; use a number of steps, or 0 for never")
        self.discriminator_start, self.scale_equivariance = discriminator_start, scale_equivariance
        self.decoder_finish, self.patch_sizes = decoder_finish, patch_sizes
        self.term_norm_interval = term_norm_interval
        if term_norm_interval and self.bare["autoencoder"].compiled:
            logger.info("term_norm_interval is ignored: of a compiled network no layer's gradient can be had alone")
            self.term_norm_interval = 0
        self.inferer = SimpleInferer() if inferer is None else inferer

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of what the autoencoder minimises at the present step."""
        own = {"adv_loss": self.adv_weight, "scale_loss": self.scale_equivariance}
        return self.generator_loss.weights(self.kl_scale) | own  # type: ignore[operator]

    @property
    def kl_scale(self) -> float:
        """The factor on the weight of the KL divergence, at the present epoch."""
        return 1.0 if self.patch_sizes is None else self.patch_sizes.shrinkage(self.state.epoch)

    @property
    def finishing(self) -> bool:
        """Whether only the decoder learns at the present step."""
        return self.decoder_finish > 0 and self.share >= 1 - self.decoder_finish

    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One step of the autoencoder, then one of the discriminator on the same images."""
        images, judge = batch["image"], self.bare["discriminator"]

        # (1) generator: the discriminator is frozen, so nothing of this reaches its gradients
        judge.requires_grad_(False)
        reconstruction, losses = self._reconstruct(images)
        total = losses["loss"]
        if self.scale_equivariance:
            total = total + self.scale_equivariance * losses["scale_loss"]
        if self.share >= self.discriminator_start:
            losses["adv_loss"] = self.adversarial_loss(judge(reconstruction.float())[-1], True, False)
            total = total + self.adv_weight * losses["adv_loss"]
        norms = self._term_norms(losses)
        self.update("optimizer_g", total, self.bare["autoencoder"].encoder_parameters() if self.finishing else ())

        # (2) discriminator: fake and real in one pass (its normalisation is per sample)
        judge.requires_grad_(True)
        if self.share < self.discriminator_start - LEAD:
            return losses | norms
        both = torch.cat([reconstruction.detach().float(), images])
        fake, real = self.networks["discriminator"](both)[-1].chunk(2)
        losses["d_fake_loss"] = self.adversarial_loss(fake, False, True)
        losses["d_real_loss"] = self.adversarial_loss(real, True, True)
        losses["d_loss"] = (losses["d_fake_loss"] + losses["d_real_loss"]) * 0.5
        self.update("optimizer_d", losses["d_loss"])
        return losses | norms

    def _reconstruct(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The reconstruction (B, 1, X, Y, Z), and all losses but the adversarial."""
        noise, generators = self.draw(images)
        wanted = self.scale_equivariance > 0, self.finishing
        with self.autocast():
            reconstruction, mu, sigma, *halved = self.inferer(images, self.networks["autoencoder"], noise, *wanted)
            losses = self.generator_loss(reconstruction, images, mu, sigma, generators, self.kl_scale)
        for image in halved:
            losses["scale_loss"] = _halved_error(image, images)
        return reconstruction, losses

    def _term_norms(self, losses: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `term_norm_interval` says, where it is due."""
        if not self.term_norm_interval or self.state.iteration % self.term_norm_interval:
            return {}
        layer, scaler, norms = self.bare["autoencoder"].last_layer, self.scalers["optimizer_g"], {}
        scale = scaler.scale(torch.ones((), device=layer.device))
        for name, weight in self.weights.items():
            if weight and name in losses and losses[name].requires_grad:
                term = scaler.scale(weight * losses[name])
                # Not through `backward`, so neither gradients nor what waits for them (other ranks) notice.
                (gradient,) = torch.autograd.grad(term, layer, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    norms[f"last_layer_norm_{name}"] = gradient.norm() / scale
        return norms

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


def check_patches(patch_sizes: PatchCurriculum, factor: int, discriminator: nn.Module) -> None:
    """Whether autoencoder and discriminator can take patches of all sizes.

    Args:
        patch_sizes: of the training.
        factor: of the autoencoder, by which sizes must be divisible.
        discriminator: whose strides must leave something of a patch (tried on PyTorch's meta device, at no cost).

    Raises:
        UserError: where they cannot.
    """
    for knob, size in patch_sizes.sizes():
        check_size(knob, size, factor, optional=False)
        try:
            with torch.device("meta"), torch.no_grad():
                state = {name: torch.empty_like(t, device="meta") for name, t in discriminator.state_dict().items()}
                torch.func.functional_call(discriminator, state, (torch.empty(1, 1, *size),))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"{knob} is {list(size)}, too small for the discriminator; use at least 32 along each axis, or lower "
                "discriminator_def#num_layers_d"
            ) from error
