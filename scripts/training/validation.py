"""The autoencoder on whole held-out volumes: reconstructed from the posterior mean, window by window, and measured."""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import dataclass, field
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from monai.transforms import CenterSpatialCrop
from torch import nn

from scripts.common.errors import UserError, available_memory
from scripts.common.precision import autocast
from scripts.common.ranks import gather
from scripts.measure.latents import LatentHealth
from scripts.measure.metrics import reconstruction_metrics
from scripts.networks.whole_volumes import WholeVolumes
from scripts.networks.windows import joined, padded

logger = logging.getLogger(__name__)

# A training step costs 14.4 MFLOP a voxel with MAISI's [64, 128, 256], a forward pass 4.3.
FORWARD_SHARE = 0.3
BYTES = 4 * 8  # a voxel: volume, its windows, reconstruction, weights, and SSIM's: eight float32 at the most
CENTRE = 96  # voxels along an axis that the adversarial losses are measured on: enough to watch, little to compute
SMALLEST = 32  # that the discriminator's strides leave something of


@dataclass
class Share:
    """What one rank found out."""

    cases: list[dict[str, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    latents: LatentHealth = field(default_factory=LatentHealth)
    interrupted: bool = False


class VaeValidation(WholeVolumes):
    """Measures an autoencoder on whole volumes; `state.metrics` holds means over the volumes of all ranks.

    `loss` is that of the trainer's `VaeLoss` without the adversarial term; `psnr`, `ssim`, `mae_hu` and `rmse_hu` are
    those of `reconstruction_metrics`, the rest is `LatentHealth`.

    Args:
        generator_loss: a `VaeLoss`.
        discriminator: for `adv_loss` and `d_loss`, measured on the centre of each volume.
        adversarial_loss: called with (logits, target_is_real, for_discriminator).
        max_bad_volumes: how many volumes that cannot be read are passed over.
        kwargs: of `WholeVolumes`; the network has `reconstruct`.

    Attributes:
        shown: original and reconstruction (X, Y, Z), normalised, and the spacing in mm, of this rank's first volume;
            None where there is none, or once it was taken.
        interrupted: whether the last run ended early, without metrics.
    """

    remedy = "lower autoencoder_train#val_sliding_window_patch_size"
    refuse_not_finite = False  # a network that is broken has metrics that say so

    def __init__(
        self,
        *,
        generator_loss: nn.Module,
        discriminator: nn.Module,
        adversarial_loss: nn.Module,
        max_bad_volumes: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.generator_loss, self.max_bad_volumes = generator_loss, max_bad_volumes
        self.discriminator, self.adversarial_loss = discriminator, adversarial_loss
        self.shown: tuple[np.ndarray, np.ndarray, list[float]] | None = None
        self.share = Share()

    @property
    def interrupted(self) -> bool:
        return self.share.interrupted

    def interrupt(self) -> None:
        """End this validation after the present volume, on all ranks, without metrics."""
        self.share.interrupted = True
        self.terminate_epoch()

    def start(self) -> None:
        """Forget the last run."""
        self.share, self.shown = Share(), None

    def pass_over(self, why: str) -> None:
        """Count a volume that cannot be read."""
        self.share.broken.append(why)

    def process(self, volume: dict[str, Any]) -> None:
        """Measure one volume, on the device of the network."""
        device, intensity = self.state.device, volume["intensity"]
        reconstruction, mu, sigma = joined(self.slabs(volume, self.network.reconstruct))  # type: ignore[arg-type]
        self.share.latents.update(mu, sigma)
        original = intensity.normalise(volume["voxels"])
        if self.shown is None:
            self.shown = (original[0, 0].numpy(), reconstruction[0, 0].numpy(), volume["spacing"])
        on_device = [tensor.to(device) for tensor in (reconstruction, original, mu, sigma)]
        with autocast(device, self.dtype):
            losses = self.generator_loss(*on_device)
        losses |= self._adversarial(*on_device[:2])
        losses["kl_per_element"] = losses["kl_loss"].double() / mu.numel()
        clipped = reconstruction.clamp(0, 1) if intensity.clip else reconstruction
        quality = reconstruction_metrics(clipped, original, intensity.range, device)
        self.share.cases.append({name: float(value) for name, value in losses.items()} | quality)

    def _adversarial(self, reconstruction: torch.Tensor, original: torch.Tensor) -> dict[str, torch.Tensor]:
        crop = CenterSpatialCrop([min(n, CENTRE) for n in original.shape[2:]])
        both = torch.cat([torch.as_tensor(crop(t[0]))[None] for t in (reconstruction, original)])
        fake, real = self.discriminator(padded(both, [SMALLEST] * 3))[-1].chunk(2)
        d_loss = 0.5 * (self.adversarial_loss(fake, False, True) + self.adversarial_loss(real, True, True))
        return {"adv_loss": self.adversarial_loss(fake, True, False), "d_loss": d_loss}

    def finish(self) -> None:
        """Put `state.metrics` together, from all ranks; none where any of them was interrupted.

        Raises:
            UserError: where too many volumes could not be read, or all.
        """
        shares = gather(self.share)
        self.share.interrupted = any(share.interrupted for share in shares)
        self.state.metrics = {}
        if self.interrupted:
            return
        cases = [case for share in shares for case in share.cases]
        broken = [why for share in shares for why in share.broken]
        for why in broken if idist.get_rank() == 0 else ():
            logger.warning("passed over in validation: %s", why)
        if len(broken) > self.max_bad_volumes or not cases:
            raise UserError(
                f"{len(broken)} volumes could not be validated (max_bad_volumes is {self.max_bad_volumes}), the last: "
                f"{broken[-1] if broken else 'none'}; see python -m scripts.datalist check"
            )
        self.state.metrics = {name: math.fsum(case[name] for case in cases) / len(cases) for name in cases[0]}
        self.state.metrics |= LatentHealth.merged([share.latents for share in shares]).compute()

    def cost_rows(self, voxels: float) -> dict[str, str]:
        """For the table of the start: what a validation takes of memory, and of time in steps of so many voxels."""
        dataset: Any = self.data_loader.dataset  # type: ignore[union-attr]
        sizes = [dataset.voxels(index) for index in range(len(dataset))]
        memory, left = max(sizes) * BYTES, available_memory()
        if 0 < left < memory:
            print(
                f"warning: validating the largest volume takes about {memory / 1e9:.1f} GB of memory, and "
                f"{left / 1e9:.1f} GB is left; set autoencoder_train#val_patch_size",
                file=sys.stderr,
            )
        computed = sum(sizes) / (1 - self.inferer.overlap) ** 3  # overlapping windows go over voxels again
        return {
            "memory": f"about {memory / 1e9:.1f} GB on the host for the largest volume to validate",
            "a validation": f"costs about {max(computed * FORWARD_SHARE / voxels, 1):.0f} training steps",
        }
