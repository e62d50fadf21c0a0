"""What all trainings share: running, stopping, skipping what is not finite, precision, seeds, learning rates."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.engines import Trainer
from monai.engines.workflow import Workflow
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from scripts.common.errors import UserError
from scripts.common.memory import memory_advice
from scripts.common.precision import amp_dtype, autocast
from scripts.common.ranks import mean
from scripts.networks.weights import plain_state
from scripts.training.average import AveragedNetwork
from scripts.training.late import LateLosses
from scripts.training.schedule import advance
from scripts.training.signals import STATUS, StopSignal

logger = logging.getLogger(__name__)

INTERVALS = ("epoch", "iteration")


@dataclass
class Progress:
    """What an engine, its handlers and its checkpoints tell each other, beside ignite's iteration and epoch.

    Attributes:
        validations: the metrics of each validation, with its `epoch`.
        epoch_pending: the steps of an epoch are done, but not what follows them (validating, saving).
        interrupted: a signal ended a validation, which is therefore done again on resuming.
        losses: of the last step, on their way from the device; the engine's output are their means, on the device.
    """

    validations: list[dict[str, float]] = field(default_factory=list)
    epoch_pending: bool = False
    interrupted: bool = False
    losses: LateLosses = field(init=False, repr=False)

    def best(self, metric: str) -> dict[str, float] | None:
        """The first validation with the lowest finite `metric`; None before the first validation."""
        ranked = [(v[metric] if math.isfinite(v[metric]) else math.inf, i) for i, v in enumerate(self.validations)]
        return self.validations[min(ranked)[1]] if ranked else None


class TrainingEngine(Trainer):
    """Runs a training. A subclass writes `step`, which computes named losses of a batch and calls `update` for each.

    Args:
        device: where to train.
        train_data_loader: batches are dictionaries; tensors in them come to `step` on `device`. `path` and `error`,
            lists of one text a sample, name the files of a batch and what is wrong with them, where there are any.
        networks: what is trained, by name; wrapped in DistributedDataParallel where there are several ranks.
        optimizers: by name: `optimizer`, or `optimizer_<something>` where there are several.
        schedulers: learning rates, by name; any of `torch.optim.lr_scheduler`.
        scheduler_interval: what they step by: "epoch" or "iteration". `ReduceLROnPlateau` steps by validation.
        best_by: the metric by which one validation is better than another, if it is lower.
        averages: of networks, by their names; what is saved as weights.
        amp: compute in `amp_dtype`, where `step` asks for `autocast`; float16 gets gradient scalers.
        max_grad_norm: gradients are scaled down to this norm; None to leave them.
        seed: all that is random in a step is a function of (seed, iteration, sample's place in the global batch).
        engine_kwargs: for `monai.engines.Trainer`: `max_epochs`, `train_handlers`, ...

    Raises:
        UserError: for an unknown `scheduler_interval`.
    """

    state: Any
    remedy = "lower the batch size"  # what to do when memory runs out
    unscaled: tuple[str, ...] = ()  # optimizers whose losses are computed in float32 whatever `amp` says

    def __init__(
        self,
        *,
        device: torch.device | str,
        train_data_loader: DataLoader,
        networks: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        schedulers: Mapping[str, LRScheduler] | None = None,
        scheduler_interval: str = "epoch",
        best_by: str | None = None,
        averages: Mapping[str, AveragedNetwork] | None = None,
        amp: bool = True,
        max_grad_norm: float | None = None,
        seed: int = 0,
        **engine_kwargs: Any,
    ) -> None:
        if scheduler_interval not in INTERVALS:
            raise UserError(f"scheduler_interval is {scheduler_interval!r}; use one of {', '.join(INTERVALS)}")
        handlers = engine_kwargs.pop("train_handlers", None)
        super().__init__(
            device=device, data_loader=train_data_loader, amp=amp, handlers=handlers, decollate=False, **engine_kwargs
        )
        self.networks, self.optimizers, self.schedulers = dict(networks), dict(optimizers), dict(schedulers or {})
        self.bare: dict[str, Any] = {name: getattr(net, "module", net) for name, net in networks.items()}  # without DDP
        self.averages = dict(averages or {})
        self.scheduler_interval, self.best_by = scheduler_interval, best_by
        self.max_grad_norm, self.seed = max_grad_norm, seed
        self.dtype = amp_dtype(self.state.device, amp)
        self.scalers = {name: self._scaler(name) for name in optimizers}
        self.progress, self.stop = Progress(), StopSignal()
        self.closing = ExitStack()  # what is to be done when `run` ends, however it ends
        self.add_event_handler(Events.EPOCH_STARTED, self._start_epoch)
        # After the given handlers, which log the rates a step was made with; before the checkpoint, attached later.
        self.add_event_handler(Events.ITERATION_COMPLETED, self._step_schedulers, "iteration")
        self.add_event_handler(Events.EPOCH_COMPLETED, self._step_schedulers, "epoch")

    def _scaler(self, name: str) -> torch.amp.GradScaler:
        enabled = self.dtype == torch.float16 and name not in self.unscaled
        return torch.amp.GradScaler(self.state.device.type, init_scale=2.0**8, growth_factor=1.5, enabled=enabled)

    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch and `update` by them; gradients are clear when it is called.

        Returns:
            losses by name, scalars, to be logged; gradient norms are added to them.
        """
        raise NotImplementedError

    def update(self, name: str, loss: torch.Tensor, frozen: Iterable[nn.Parameter] = ()) -> None:
        """Backward, clipping, and a step of the optimizer `name`, unless loss or gradients are not finite.

        That is decided on the device, so that nothing waits, if the optimizer is `fused`. Where a loss is not finite,
        all its gradients become NaN, so that every rank sees it in what is averaged, and none steps. The norm of the
        gradients, before any clipping, is logged as `grad_norm`, or `grad_norm_<something>`. What is `frozen` only
        takes part in the backward pass: neither it nor its optimizer's state changes.
        """
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        poisoned = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        scaler.scale(poisoned).backward()
        for parameter in frozen:
            parameter.grad = None
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
        # A scaler's overflows are no fault, and to be expected.
        self._norms[_logged("grad_norm", name)] = norm.nan_to_num(0, 0) if scaler.is_enabled() else norm

    def autocast(self) -> torch.autocast:
        """For what `step` computes in the type that `amp` asks for."""
        return autocast(self.state.device, self.dtype)

    def seeds(self, samples: int, streams: int = 1, rank: int | None = None) -> np.ndarray:
        """Seeds (samples, streams) of this step; the same however samples are spread over batches and ranks.

        Args:
            samples: of a rank's batch.
            streams: seeds for each sample.
            rank: whose samples; None for this one's.
        """
        first = (self.state.rank if rank is None else rank) * samples
        places = range(first, first + samples)
        sequences = [np.random.SeedSequence([self.seed, self.state.iteration, place]) for place in places]
        return np.stack([sequence.generate_state(streams) for sequence in sequences])

    def run(self) -> None:  # type: ignore[override]
        """Train until `max_epochs`; a run that has got there says so and changes nothing.

        Raises:
            SystemExit: with status 75, where a signal ended the training early (see `Checkpointing`).
        """
        with self.closing:
            self._run()
        if self.should_terminate:
            sys.exit(STATUS)

    def _run(self) -> None:
        done = self.state.iteration >= self.state.epoch_length * self.state.max_epochs
        pending = self.progress.epoch_pending
        if done and not pending:
            logger.info("all %d epochs are done; raise n_epochs to go on", self.state.max_epochs)
            return
        with memory_advice(self.state.device, self._what_is_computed, self.remedy), self.stop:
            if pending:  # the checkpoint is from after an epoch's last step, before its validation
                self.fire_event(Events.EPOCH_COMPLETED)
            if not done and not self.should_terminate:
                Workflow.run(self)  # not Trainer.run, which makes a scaler of its own

    def stateful(self) -> dict[str, Any]:
        """All that resuming needs and that has a state, by name. Schedules have none: see `restore_rates`."""
        scalers = {_logged("scaler", name): s for name, s in self.scalers.items() if name not in self.unscaled}
        averages = {f"{name}_average": average for name, average in self.averages.items() if average.decay}
        return {**self.bare, **averages, **self.optimizers, **scalers}

    def results(self) -> dict[str, nn.Module]:
        """The networks as they are to be used, by name: averaged where there is an average."""
        return self.bare | {name: average.network for name, average in self.averages.items()}

    def contents(self) -> dict[str, dict[str, Any]]:
        """What a weights file of each network holds, by name: a plain state dict, unless a training says more."""
        return {name: plain_state(network) for name, network in self.results().items()}

    @property
    def weights(self) -> Mapping[str, float]:
        """Of the terms of what is minimised at the present step, by their names; for the log."""
        return {}

    @property
    def share(self) -> float:
        """Which share of the training's steps was done when the present one began, from 0 up to below 1."""
        return (self.state.iteration - 1) / (self.state.epoch_length * self.state.max_epochs)

    def restore_rates(self, hyperparameters: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
        """After resuming: what the configuration says of the optimizers, and of their rates at this step.

        Schedules are stepped anew from their beginning to here instead of being restored. So they go on bit by bit,
        whichever they are, and a learning rate or a schedule that was changed in between is obeyed.

        Args:
            hyperparameters: of each group of each optimizer, as they were before their state was loaded.
        """
        for name, groups in hyperparameters.items():
            for group, values in zip(self.optimizers[name].param_groups, groups, strict=True):
                group |= values
        epochs = self.state.iteration // self.state.epoch_length - self.progress.epoch_pending
        steps = self.state.iteration if self.scheduler_interval == "iteration" else epochs
        advance(self.schedulers.values(), steps, [v[self.best_by] for v in self.progress.validations if self.best_by])

    def _start_epoch(self, engine: Any) -> None:
        for network in self.networks.values():
            network.train()
        sampler: Any = getattr(self.data_loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            done = self.state.iteration - (self.state.epoch - 1) * self.state.epoch_length
            sampler.set_epoch(self.state.epoch, done)

    def _iteration(self, engine: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        device = self.state.device
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        self._norms: dict[str, torch.Tensor] = {}
        losses = self.step(moved)
        for average in self.averages.values():
            average.update()
        names, values = zip(*(losses | self._norms).items(), strict=True)
        own = torch.stack([value.detach().float() for value in values])
        means = mean(own.clone())
        self.progress.losses = LateLosses(names, means, own)
        return dict(zip(names, means.unbind(), strict=True))

    def _step_schedulers(self, engine: Any, interval: str) -> None:
        if interval == "epoch" and not self.progress.interrupted:
            latest = self.progress.validations[-1:] if self.best_by else []
            new = [v[self.best_by] for v in latest if v["epoch"] == self.state.epoch]  # type: ignore[index]
            advance(self.schedulers.values(), int(self.scheduler_interval == "epoch"), new)
        elif interval == "iteration" == self.scheduler_interval:
            advance(self.schedulers.values(), 1)

    def _what_is_computed(self) -> str:
        batch = self.state.batch or {}
        shapes = [tuple(value.shape) for value in batch.values() if isinstance(value, torch.Tensor) and value.ndim > 1]
        return f"batches of {shapes[0] if shapes else '?'}"


def _logged(what: str, optimizer: str) -> str:
    """The name of something that belongs to an optimizer: `what`, with that which follows "optimizer" in its name."""
    return what + optimizer.removeprefix("optimizer")
