"""Whole-volume validation of an autoencoder: reconstruct from the posterior mean, window by window, and measure."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Events
from monai.transforms import CenterSpatialCrop
from torch import nn

from scripts.common import ranks
from scripts.common.errors import UserError
from scripts.common.memory import available_memory
from scripts.common.precision import autocast
from scripts.measure.latents import LatentHealth
from scripts.measure.metrics import reconstruction_metrics
from scripts.networks.whole_volumes import WholeVolumes
from scripts.networks.windows import joined, padded

logger = logging.getLogger(__name__)
T = TypeVar("T")

# A training step costs 14.4 MFLOP a voxel with MAISI's [64, 128, 256], a forward pass 4.3.
_FORWARD_SHARE = 0.3
_BYTES = 4 * 8  # image, padded image, reconstruction, weights, and SSIM's: eight float32 a voxel
_BYTES_AHEAD = 4  # of a volume that is only read: int16, or float32


@dataclass
class Share:
    """What one rank found out.

    Attributes:
        cases: losses and metrics of each volume.
        latents: of all its volumes.
        broken: why other volumes could not be read, by their places among all.
    """

    cases: list[dict[str, float]] = field(default_factory=list)
    latents: LatentHealth = field(default_factory=LatentHealth)
    broken: dict[int, str] = field(default_factory=dict)


class VaeValidation(WholeVolumes):
    """Measures an autoencoder on whole volumes; `state.metrics` holds means over the volumes of all ranks.

    `loss` is that of the trainer's `VaeLoss` without the adversarial term; `psnr`, `ssim`, `mae_hu` and `rmse_hu` are
    those of `reconstruction_metrics`, the rest is `LatentHealth`. CT is measured within its window, [0, 1].

    Args:
        generator_loss: a `VaeLoss`.
        discriminator: for `adv_loss` and `d_loss`, measured on the centre of each volume.
        adversarial_loss: called with (logits, target_is_real, for_discriminator).
        amp: compute in `amp_dtype`.
        max_bad_volumes: how many volumes that cannot be read are passed over.
        kwargs: of `WholeVolumes`; the network has `reconstruct`.

    Attributes:
        interrupted: whether the last validation was, on any rank; it has no metrics then.
        shown: original and reconstruction of this rank's first volume, (X, Y, Z), normalised, and its spacing in mm;
            for handlers. Whole volumes, so it is not kept beyond a validation.
    """

    remedy = "lower autoencoder_train#val_sliding_window_patch_size"
    refuse_not_finite = False  # a validation that shows NaN ends no training: the weights may recover

    interrupted = False
    shown: tuple[np.ndarray, np.ndarray, list[float]] | None = None

    def __init__(
        self,
        *,
        generator_loss: nn.Module,
        discriminator: nn.Module,
        adversarial_loss: nn.Module,
        amp: bool = True,
        max_bad_volumes: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(amp=amp, **kwargs)
        self.generator_loss, self.max_bad_volumes = generator_loss, max_bad_volumes
        self.discriminator, self.adversarial_loss = discriminator, adversarial_loss
        self.add_event_handler(Events.COMPLETED, self._forget_shown)

    def start(self) -> None:
        """Forget the last validation."""
        self.share, self.interrupted, self.shown = Share(), False, None

    def process(self, volume: dict[str, Any]) -> None:
        """Measure the reconstruction of one volume, and its latents."""
        original, intensity = volume["intensity"].normalise(volume["voxels"]), volume["intensity"]
        whole = joined(self.slabs(volume, self.network.reconstruct))  # type: ignore[arg-type]
        reconstruction, mu, sigma = whole
        self.share.latents.update(mu, sigma)
        if self.shown is None:
            self.shown = original[0, 0].numpy(), reconstruction[0, 0].numpy(), volume["spacing"]
        device = self.state.device
        ours, theirs, *latents = (tensor.to(device) for tensor in (reconstruction, original, mu, sigma))
        with autocast(device, self.dtype):
            losses = self.generator_loss(ours, theirs, *latents)
        losses |= self._adversarial_losses(ours, theirs)
        case = {name: float(value) for name, value in losses.items()}
        case["kl_per_element"] = case["kl_loss"] / mu.numel()
        measured = reconstruction.clamp(0, 1) if intensity.clip else reconstruction
        self.share.cases.append(case | reconstruction_metrics(measured, original, intensity.range, device))

    def _adversarial_losses(self, reconstruction: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those of the centre, at most 96 voxels wide: enough to watch, little to compute."""
        crop = CenterSpatialCrop([min(n, 96) for n in image.shape[2:]])
        both = torch.cat([torch.as_tensor(crop(volume[0]))[None] for volume in (reconstruction, image)])
        both = padded(both, [32, 32, 32])  # of less the discriminator's strides leave nothing
        fake, real = self.discriminator(both)[-1].chunk(2)
        d_loss = 0.5 * (self.adversarial_loss(fake, False, True) + self.adversarial_loss(real, True, True))
        return {"adv_loss": self.adversarial_loss(fake, True, False), "d_loss": d_loss}

    def pass_over(self, why: str) -> None:
        """Take note that a volume cannot be read; how many may be is known at the end."""
        self.share.broken[self.index] = why

    def finish(self) -> None:
        """Set `state.metrics`, on all ranks.

        Raises:
            UserError: where no volume could be measured, or more than `max_bad_volumes` could not.
        """
        self.state.metrics = {}
        self.interrupted = any(ranks.gather(self.interrupted))
        shares = ranks.gather(self.share)
        if self.interrupted:
            return
        cases = together(
            [(share.cases, share.broken) for share in shares],
            self.max_bad_volumes,
            "volumes",
            "see python -m scripts.datalist check",
        )
        self.state.metrics = {name: math.fsum(case[name] for case in cases) / len(cases) for name in cases[0]}
        self.state.metrics |= LatentHealth.merged([share.latents for share in shares]).compute()

    def interrupt(self) -> None:
        """End this validation after the present volume, on all ranks, without metrics."""
        self.interrupted = True
        self.terminate_epoch()

    def cost_rows(self, samples_voxels: float) -> dict[str, str]:
        """What a validation takes, for the table of what will run; a warning where this node has less memory.

        Args:
            samples_voxels: of one training step, over all ranks.
        """
        volumes: Any = self.data_loader.dataset  # type: ignore[union-attr]
        voxels = [volumes.voxels(i) for i in range(len(volumes))]
        here, falling = ranks.on_this_node(), sorted(voxels, reverse=True)
        largest, ahead = falling[:here], falling[here : 2 * here]  # each rank holds one, and reads another ahead
        memory, left = sum(largest) * _BYTES + sum(ahead) * _BYTES_AHEAD, available_memory()
        which = "largest volume" if len(largest) == 1 else f"{len(largest)} largest volumes at once"
        if left is not None and left < memory:
            print(
                f"warning: validating the {which} takes about {memory / 1e9:.1f} GB of memory, and "
                f"{left / 1e9:.1f} GB is left; set autoencoder_train#val_patch_size",
                file=sys.stderr,
            )
        computed = sum(voxels) / (1 - self.inferer.overlap) ** 3  # windows that overlap compute a voxel repeatedly
        steps = max(computed * _FORWARD_SHARE / samples_voxels, 1)
        return {
            "memory": f"about {memory / 1e9:.1f} GB on the host to validate the {which}",
            "a validation": f"costs about {steps:.0f} training steps",
        }

    def _forget_shown(self, engine: Any) -> None:
        self.shown = None


def together(shares: Sequence[tuple[list[T], dict[int, str]]], most_broken: int, what: str, remedy: str) -> list[T]:
    """What all ranks measured; rank 0 names what could not be.

    Args:
        shares: of each rank, what it measured, and why it could not measure other items, by their places among all.
        most_broken: how many items may not be measured.
        what: they are, for the error, as the `remedy`.
        remedy: what to do about them.

    Raises:
        UserError: where nothing could be measured, or more than `most_broken` could not.
    """
    found = [one for share, _ in shares for one in share]
    broken = [why for _, why in sorted(pair for _, share in shares for pair in share.items())]
    for why in broken if idist.get_rank() == 0 else ():
        logger.warning("passed over in validation: %s", why)
    if len(broken) > most_broken or not found:
        raise UserError(
            f"{len(broken)} {what} could not be validated (max_bad_volumes is {most_broken}), the last: {broken[-1]}; "
            f"{remedy}"
        )
    return found
