"""A training in forty lines; what the engine gives to it is tested in test_engine.py and in runs/test_killed.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader

from scripts.data.sampler import EpochSampler
from scripts.training.checkpointing import attach_checkpointing
from scripts.training.engine import TrainingEngine
from scripts.training.guard import Guard
from scripts.training.handlers import TrainingLog
from scripts.training.tensorboard_log import TensorBoardLog


class ToyTraining(TrainingEngine):
    def step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        x = batch["x"]
        noise = [torch.randn(4, generator=torch.Generator().manual_seed(int(s))) for (s,) in self.seeds(len(x))]
        error = self.networks["line"](x + 0.1 * torch.stack(noise)) - x.sum(1, keepdim=True)
        self.update("optimizer", error.square().mean())
        return {"square": error.square().mean(), "absolute": error.abs().mean()}


def toy_training(folder: Path, epochs: int = 3, rank: int = 0, ranks: int = 1, lr: float = 0.1, **options: Any) -> Any:
    torch.manual_seed(0)
    line: Any = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(line.parameters(), lr)
    schedule = options.pop("schedule", lambda optimizer: PolynomialLR(optimizer, total_iters=18, power=2))
    interval = options.pop("scheduler_interval", "iteration")
    data = [{"x": torch.randn(4), "path": f"point {i}", "error": ""} for i in range(12)]
    sampler = EpochSampler(len(data), batch_size=2 // ranks, seed=1, rank=rank, num_replicas=ranks)
    log = TensorBoardLog(str(folder / "events"), enabled=rank == 0)
    shown = [TrainingLog(log, optimizer, ["square", "absolute"])] if rank == 0 else []
    trainer = ToyTraining(
        device="cpu", max_epochs=epochs, train_data_loader=DataLoader(_Keyed(data), 2 // ranks, sampler=sampler),
        networks={"line": DistributedDataParallel(line) if ranks > 1 else line}, optimizers={"optimizer": optimizer},
        schedulers={"scheduler": schedule(optimizer)}, scheduler_interval=interval,
        train_handlers=[*shown, *options.pop("handlers", []), Guard()], best_by=options.pop("best_by", None),
    )  # fmt: skip
    (folder / "models").mkdir(parents=True, exist_ok=True)
    where = (str(folder / "models"), {"line.pt": "line"}, {"log": log})
    attach_checkpointing(trainer, *where, is_main=rank == 0, **options)
    return trainer


class _Keyed(list):
    """Samples by the keys of `EpochSampler`, (epoch, index)."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key[1])
