"""The adversarial VAE trainer."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.workflow import Workflow
from monai.inferers import Inferer, SimpleInferer
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from scripts.distributed import mean_over_ranks
from scripts.errors import UserError
from scripts.memory import explained
from scripts.signals import STATUS, StopSignal

logger = logging.getLogger(__name__)

KNOBS = (
    "lower autoencoder_train#patch_size (memory goes with its voxels) or autoencoder_train#batch_size, or set "
    "activation_checkpointing to true (61 % of the saved activations)"
)


def amp_dtype(device: torch.device | str, amp: bool) -> torch.dtype:
    """What autocast computes in: bfloat16 where the device has it, else float16 (CUDA), else float32."""
    device = torch.device(device)
    if not amp:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    usable = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if usable else torch.float32


def adam_eps(amp: bool) -> float:
    """Adam's epsilon as the reference has it: larger where gradients pass through a narrow type."""
    return 1e-6 if amp else 1e-8


def guarded(loss: torch.Tensor) -> torch.Tensor:
    """`loss`, of which every gradient is NaN where it is not finite: so all ranks see it, and none steps."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Warmup:
    """Learning-rate factor of an epoch (from 0): `factors[i]` before `epochs[i]`, then 1.

    Raises:
        UserError: unless there is one factor for each epoch, epochs ascending.
    """

    def __init__(self, epochs: Sequence[int], factors: Sequence[float]) -> None:
        if len(epochs) != len(factors) or sorted(epochs) != list(epochs):
            raise UserError(f"warmup_epochs {epochs} must ascend and have one of warmup_factors {factors} each")
        self.steps = list(zip(epochs, factors, strict=True))

    def __call__(self, epoch: int) -> float:
        return next((factor for until, factor in self.steps if epoch < until), 1.0)


class VaeTrainer(Trainer):
    """Trains an autoencoder against a discriminator, one step of each for a batch.

    The discriminator, 0.7 % of a step, is computed in float32 whatever `amp` says: on CPUs PyTorch 2.13's bfloat16
    `conv3d` returns garbage weight gradients where the kernel is larger than its input, as the discriminator's last is
    with patches of 32 voxels.

    Args:
        device: where to train.
        train_data_loader: batches with `image`, (B, 1, X, Y, Z) in [0, 1].
        autoencoder: maps (image, noise) to (reconstruction, posterior mean, posterior standard deviation).
        discriminator: maps images to a list whose last item are the logits.
        optimizer_g: of the autoencoder.
        optimizer_d: of the discriminator.
        generator_loss: a `VaeLoss`.
        adversarial_loss: called with (logits, target_is_real, for_discriminator).
        adv_weight: of the adversarial term in the autoencoder's loss.
        inferer: runs the autoencoder.
        amp: compute in `amp_dtype`; float16 gets a gradient scaler for the autoencoder.
        max_grad_norm: gradients are scaled down to this norm; None to leave them.
        seed: everything random in a step is a function of (seed, iteration, sample's place in the global batch).
        engine_kwargs: for `monai.engines.Trainer`: `max_epochs`, `train_handlers`, ...
    """

    state: Any

    def __init__(
        self,
        *,
        device: torch.device | str,
        train_data_loader: DataLoader,
        autoencoder: nn.Module,
        discriminator: nn.Module,
        optimizer_g: Optimizer,
        optimizer_d: Optimizer,
        generator_loss: nn.Module,
        adversarial_loss: nn.Module,
        adv_weight: float = 0.1,
        inferer: Inferer | None = None,
        amp: bool = True,
        max_grad_norm: float | None = None,
        seed: int = 0,
        **engine_kwargs: Any,
    ) -> None:
        handlers = engine_kwargs.pop("train_handlers", None)
        super().__init__(
            device=device, data_loader=train_data_loader, amp=amp, handlers=handlers, decollate=False, **engine_kwargs
        )
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.network: Any = getattr(autoencoder, "module", autoencoder)  # without DistributedDataParallel
        self.judge = getattr(discriminator, "module", discriminator)
        self.stop = StopSignal()
        self.optimizer_g, self.optimizer_d = optimizer_g, optimizer_d
        self.generator_loss, self.adversarial_loss = generator_loss, adversarial_loss
        self.adv_weight, self.max_grad_norm, self.seed = adv_weight, max_grad_norm, seed
        self.inferer = SimpleInferer() if inferer is None else inferer
        self.dtype = amp_dtype(self.state.device, amp)
        scaling: dict[str, Any] = {"init_scale": 2.0**8, "growth_factor": 1.5, "enabled": self.dtype == torch.float16}
        self.scaler_g = torch.amp.GradScaler(self.state.device.type, **scaling)
        self.scaler_d = torch.amp.GradScaler(self.state.device.type, enabled=False)  # the discriminator is in float32
        self.state.epoch_pending = False
        self.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)

    def run(self) -> None:  # type: ignore[override]
        """Train until `max_epochs`; a run that has got there says so and changes nothing.

        Raises:
            SystemExit: with status 75, where a signal ended the training early (see `Checkpointing`).
        """
        done = self.state.iteration >= self.state.epoch_length * self.state.max_epochs
        pending = self.state.epoch_pending
        if done and not pending:
            logger.info("all %d epochs are done; raise n_epochs to go on", self.state.max_epochs)
            return
        try:
            with self.stop:
                if pending:  # the checkpoint is from after an epoch's last step, before its validation
                    self.fire_event(Events.EPOCH_COMPLETED)
                if not done and not self.should_terminate:
                    Workflow.run(self)  # not Trainer.run, which makes a scaler of its own
        except RuntimeError as error:
            shape = tuple(self.state.batch["image"].shape) if self.state.batch else "?"
            raise explained(error, self.state.device, f"batches of {shape}", KNOBS) from error
        if self.should_terminate:
            sys.exit(STATUS)

    def _start_epoch(self, engine: Any) -> None:
        self.autoencoder.train()
        self.discriminator.train()
        sampler: Any = getattr(self.data_loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            done = engine.state.iteration - (engine.state.epoch - 1) * engine.state.epoch_length
            sampler.set_epoch(engine.state.epoch, done)

    def _iteration(self, engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images = batch["image"].to(engine.state.device, non_blocking=True)
        noise, generators = self._draw(images)
        autocast = torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32)

        # (1) generator: the discriminator is frozen, so nothing of this reaches its gradients
        self.judge.requires_grad_(False)
        self.optimizer_g.zero_grad(set_to_none=True)
        with autocast:
            reconstruction, mu, sigma = self.inferer(images, self.autoencoder, noise)
            losses = self.generator_loss(reconstruction, images, mu, sigma, generators)
        losses["adv_loss"] = self.adversarial_loss(self.judge(reconstruction.float())[-1], True, False)
        loss_g = losses["loss"] + self.adv_weight * losses["adv_loss"]
        self.scaler_g.scale(guarded(loss_g)).backward()
        losses["grad_norm_g"] = self._update(self.optimizer_g, self.scaler_g)

        # (2) discriminator: fake and real in one pass (its normalisation is per sample)
        self.judge.requires_grad_(True)
        self.optimizer_d.zero_grad(set_to_none=True)
        fake, real = self.discriminator(torch.cat([reconstruction.detach().float(), images]))[-1].chunk(2)
        losses["d_fake_loss"] = self.adversarial_loss(fake, False, True)
        losses["d_real_loss"] = self.adversarial_loss(real, True, True)
        losses["d_loss"] = (losses["d_fake_loss"] + losses["d_real_loss"]) * 0.5
        guarded(losses["d_loss"]).backward()
        losses["grad_norm_d"] = self._update(self.optimizer_d, self.scaler_d)
        self.state.own_losses = {name: value.detach() for name, value in losses.items()}
        means = mean_over_ranks(torch.stack(list(self.state.own_losses.values())))
        return dict(zip(losses, means.unbind(), strict=True))

    def _update(self, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> torch.Tensor:
        """Step, unless a gradient is not finite: decided on the device, so that nothing waits. Returns their norm."""
        scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters])
        if self.max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        fused = bool(optimizer.defaults.get("fused"))
        if fused and not scaler.is_enabled():  # an enabled scaler decides by itself
            optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        if fused or scaler.is_enabled() or norm.isfinite():
            scaler.step(optimizer)
            scaler.update()
        return norm.nan_to_num(0, 0) if scaler.is_enabled() else norm  # its overflows are no fault

    def _draw(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Generator]]:
        """Latent noise, and for each sample what chooses its slices; the same however samples are spread over ranks."""
        shape = (self.network.latent_channels, *(n // self.network.factor for n in images.shape[2:]))
        noise, generators = [], []
        for place in range(len(images)):
            sample = self.state.rank * len(images) + place
            seeds = np.random.SeedSequence([self.seed, self.state.iteration, sample]).generate_state(2)
            generator = torch.Generator(images.device).manual_seed(int(seeds[0]))
            noise.append(torch.randn(shape, generator=generator, device=images.device))
            generators.append(torch.Generator().manual_seed(int(seeds[1])))
        return torch.stack(noise), generators
