"""Faults that the counting must find, each in one line, in the step or in a handler of a small training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from torch import nn

from scripts.training.engine import TrainingEngine
from scripts.training.guard import Guard

Fault = Callable[[torch.Tensor], object]  # takes a loss on the device

WAITS: Mapping[str, Fault] = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 0),
    "float": lambda loss: float(loss),
    "tolist": lambda loss: loss.reshape(1).tolist(),
    "cpu": lambda loss: loss.cpu(),
    "to the device": lambda loss: torch.ones(4).to(loss.device),
    "tensor": lambda loss: torch.tensor([1.0, 2.0], device=loss.device),
    "into memory that is not pinned": lambda loss: torch.empty(()).copy_(loss, non_blocking=True),
    "equal": lambda loss: torch.equal(loss, loss),
    "nonzero": lambda loss: loss.reshape(1).nonzero(),
    "mask": lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
    "synchronize": lambda loss: torch.cuda.synchronize(),
    "event": lambda loss: [event := torch.cuda.Event(), event.record(), event.synchronize()],
}
FREE: Mapping[str, Fault] = {
    "nothing": lambda loss: None,
    "to the host": lambda loss: loss.to("cpu", non_blocking=True),
    "into pinned memory": lambda loss: torch.empty((), pin_memory=True).copy_(loss, non_blocking=True),
    "to the device": lambda loss: torch.ones(4).to(loss.device, non_blocking=True),
    "number of the host": lambda loss: loss * torch.ones(()),
    "host": lambda loss: float(torch.ones(3).sum()),
}
MIXED: Mapping[str, Fault] = {
    "add": lambda loss: loss.reshape(1) + torch.ones(1),
    "convolution": lambda loss: F.conv3d(loss.expand(1, 1, 3, 3, 3), torch.ones(1, 1, 3, 3, 3)),
}
WIDE: Mapping[str, Fault] = {
    "convolution": lambda loss: F.conv3d(loss.expand(1, 1, 3, 3, 3), loss.expand(1, 1, 3, 3, 3)),
}


class Small(TrainingEngine):
    """One convolution; batches have `image`, (B, 1, X, Y, Z)."""

    in_step: Fault = FREE["nothing"]

    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        with self.autocast():
            told = self.networks["net"](batch["image"])
        loss = told.float().square().mean()
        type(self).in_step(loss.detach())
        self.update("optimizer", loss)
        return {"loss": loss}


class Looking:
    """A handler with a fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda _: self.fault(engine.state.output["loss"]))


def small_training(in_step: Fault = FREE["nothing"], in_handler: Fault = FREE["nothing"], **options: Any) -> Small:
    net = nn.Conv3d(1, 16, 3, padding=1).to("cuda")
    kind = type("Small", (Small,), {"in_step": staticmethod(in_step)})
    return kind(
        device="cuda", max_epochs=1, train_data_loader=[0], networks={"net": net},
        optimizers={"optimizer": torch.optim.Adam(net.parameters(), fused=True)},
        train_handlers=[Guard(), Looking(in_handler)], **options,
    )  # fmt: skip


def known() -> None:
    """Eight MiB, what is made of them and dropped, and a convolution in bfloat16: numbers that one can tell."""
    first = torch.empty(2**21, device="cuda")
    second = first + first  # reads 8 MiB, writes 8 MiB
    del first
    second.mul_(2).view(2, -1)[0].fill_(0)  # reads and writes 8, writes 4
    image = torch.empty(1, 2, 10, 10, 10, device="cuda", dtype=torch.bfloat16)
    F.conv3d(image, image[:, :, :3, :3, :3])  # (1, 1, 8, 8, 8)
