"""Whole-volume validation: reconstruct from the posterior mean, window by window, and measure."""

from __future__ import annotations

import logging
import math
from typing import Any

import ignite.distributed as idist
import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.engines import Evaluator
from monai.inferers import Inferer
from monai.transforms import CenterSpatialCrop
from torch import nn
from torch.utils.data import DataLoader

from scripts.errors import UserError
from scripts.memory import explained
from scripts.metrics import LatentHealth, reconstruction_metrics
from scripts.trainer import amp_dtype

logger = logging.getLogger(__name__)

KNOBS = "lower autoencoder_train#val_sliding_window_patch_size"


class VaeEvaluator(Evaluator):
    """Measures an autoencoder on whole volumes; `state.metrics` holds means over the volumes of all ranks.

    `loss` is that of the trainer's `VaeLoss` without the adversarial term; `psnr`, `ssim`, `mae_hu` and `rmse_hu` are
    those of `reconstruction_metrics`, the rest is `LatentHealth`.

    Args:
        device: where the windows are computed.
        val_data_loader: batches with `image`, (B, 1, X, Y, Z), `range`, and `clip`: measure what lies in [0, 1].
        autoencoder: a `FastAutoencoderKlMaisi`.
        generator_loss: a `VaeLoss`.
        discriminator: for `adv_loss` and `d_loss`, measured on the centre of each volume.
        adversarial_loss: called with (logits, target_is_real, for_discriminator).
        inferer: gives (reconstruction, posterior mean, posterior standard deviation) of a volume.
        amp: compute in `amp_dtype`.
        max_bad_volumes: how many volumes that cannot be read are passed over.
        engine_kwargs: for `monai.engines.Evaluator`: `val_handlers`, ...
    """

    state: Any

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: DataLoader,
        autoencoder: Any,
        generator_loss: nn.Module,
        discriminator: nn.Module,
        adversarial_loss: nn.Module,
        inferer: Inferer,
        amp: bool = True,
        max_bad_volumes: int = 5,
        **engine_kwargs: Any,
    ) -> None:
        handlers = engine_kwargs.pop("val_handlers", None)
        super().__init__(device=device, val_data_loader=val_data_loader, amp=amp, decollate=False, **engine_kwargs)
        self.autoencoder, self.generator_loss, self.inferer = autoencoder, generator_loss, inferer
        self.discriminator, self.adversarial_loss = discriminator, adversarial_loss
        self.dtype, self.max_bad_volumes = amp_dtype(self.state.device, amp), max_bad_volumes
        self.add_event_handler(Events.EPOCH_STARTED, self._start)
        self.add_event_handler(Events.EPOCH_COMPLETED, self._finish)
        if handlers is not None:  # after `_finish`, so that they find the metrics
            self._register_handlers(handlers)

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Validate; a rank without a volume (more ranks than volumes) only takes part in the averaging."""
        if len(self.data_loader) == 0:  # type: ignore[arg-type]
            self._start(self)
            self._finish(self)
            return
        try:
            super().run(global_epoch)
        except RuntimeError as error:
            raise explained(
                error, self.state.device, f"windows of {getattr(self.inferer, 'roi_size', None)}", KNOBS
            ) from error

    def _start(self, engine: Any) -> None:
        self.cases: list[dict[str, float]] = []
        self.broken: list[str] = []
        self.interrupted = False
        self.latents = LatentHealth()

    def _reconstruct(self, window: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.autocast(window.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return tuple(t.float() for t in self.autoencoder.reconstruct(window))

    def _iteration(self, engine: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        images = batch["image"]
        self.broken += [error for error in batch["error"] if error]
        if any(batch["error"]) or self.interrupted:
            return {"image": images, "reconstruction": images}
        device = engine.state.device
        with torch.no_grad(), self.mode(self.autoencoder):
            reconstructions, mu, sigma = self.inferer(images, self._reconstruct)
            self.latents.update(mu, sigma)
            for i in range(len(images)):
                one = [t[i : i + 1].to(device) for t in (reconstructions, images, mu, sigma)]
                with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                    losses = self.generator_loss(*one)
                losses |= self._judge(one[0], one[1])
                shown = reconstructions[i].clamp(0, 1) if batch["clip"][i] else reconstructions[i]
                quality = reconstruction_metrics(shown, images[i], float(batch["range"][i]), device)
                per_element = {"kl_per_element": float(losses["kl_loss"]) / mu[i].numel()}
                self.cases.append({name: float(value) for name, value in losses.items()} | per_element | quality)
        return {"image": images, "reconstruction": reconstructions}

    def _judge(self, reconstruction: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """The adversarial losses of the centre, at most 96 voxels wide: enough to watch, little to compute."""
        crop = CenterSpatialCrop([min(n, 96) for n in image.shape[2:]])
        both = torch.cat([torch.as_tensor(crop(t[0]))[None] for t in (reconstruction, image)])
        thin = [max(32 - n, 0) for n in both.shape[:1:-1]]
        both = F.pad(both, [p for t in thin for p in (0, t)])
        fake, real = self.discriminator(both)[-1].chunk(2)
        d_loss = 0.5 * (self.adversarial_loss(fake, False, True) + self.adversarial_loss(real, True, True))
        return {"adv_loss": self.adversarial_loss(fake, True, False), "d_loss": d_loss}

    def _finish(self, engine: Any) -> None:
        engine.state.batch = engine.state.output = None  # a whole volume each, not to be held until the next time
        shares: Any = idist.all_gather((self.cases, self.latents, self.broken, self.interrupted))
        self.interrupted = any(share[3] for share in shares)
        cases = [case for share in shares for case in share[0]]
        broken = [error for share in shares for error in share[2]]
        engine.state.metrics = {}
        if self.interrupted:
            return
        for error in broken if idist.get_rank() == 0 else ():
            logger.warning("passed over in validation: %s", error)
        if len(broken) > self.max_bad_volumes or not cases:
            raise UserError(
                f"{len(broken)} volumes could not be validated (max_bad_volumes is {self.max_bad_volumes}), the last: "
                f"{broken[-1]}; see python -m scripts.datalist check"
            )
        engine.state.metrics = {name: math.fsum(case[name] for case in cases) / len(cases) for name in cases[0]}
        engine.state.metrics |= LatentHealth.merged([share[1] for share in shares]).compute()

    def interrupt(self) -> None:
        """End this validation after the present volume, on all ranks, without metrics."""
        self.interrupted = True
        self.terminate_epoch()
