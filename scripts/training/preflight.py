"""What is done before the first step: weights, data and disk are checked, volumes converted, and a table printed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.data.datalist import shared_volumes
from scripts.data.examine import check_headers
from scripts.data.store import Store
from scripts.networks.weights import read_weights
from scripts.training.engine import TrainingEngine


def check_start(network: nn.Module, finetune: bool, key: str, path: str | None) -> None:
    """Whether the weights to fine-tune from are given, readable and of this architecture.

    Args:
        network: that begins from them.
        finetune: whether it does.
        key: of the configuration, where the path stands.
        path: of the weights.

    Raises:
        UserError: where they are not.
    """
    if finetune and not path:
        raise UserError(
            f"finetune is true, but {key} is {path}; give the weights to start from, or set finetune to false"
        )
    if finetune:
        read_weights(network, str(path))


def convert_data(
    splits: Mapping[str, Sequence[Mapping[str, str]]],
    store: Store,
    num_workers: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Check the headers of all volumes, then convert what is missing, each of `num_ranks` its share."""
    entries = [entry for split in splits.values() for entry in split]
    if rank == 0:
        check_headers(entries)
        for sentence in shared_volumes({name: [dict(e) for e in split] for name, split in splits.items()}):
            print(f"warning: {sentence}; what is measured on it is too good", file=sys.stderr)
    idist.barrier()
    store.convert_missing(entries[rank::num_ranks], max(num_workers, 1), progress=rank == 0)
    idist.barrier()


def check_disk(trainer: TrainingEngine, model_dir: str, weights: Mapping[str, str]) -> float:
    """Whether weights and checkpoint fit on the disk, once more than they are there already.

    Args:
        trainer: whose they are.
        model_dir: folder of both.
        weights: which network each weights file holds.

    Returns:
        what they take there, in GB.

    Raises:
        UserError: naming the folder and both sizes.
    """
    sizes = {name: 4 * sum(p.numel() for p in network.parameters()) for name, network in trainer.bare.items()}
    # Adam holds two more values for each weight, an average one.
    checkpoint = 3 * sum(sizes.values()) + sum(sizes[name] for name, a in trainer.averages.items() if a.decay)
    total = sum(sizes[name] for name in weights.values()) + checkpoint
    there = sum(f.stat().st_size for f in Path(model_dir).glob("*.pt"))
    need, free = max(total - there, 0) + checkpoint, shutil.disk_usage(model_dir).free
    if need > free:
        raise UserError(
            f"{model_dir}: weights and checkpoint need {need / 1e9:.3f} GB, but {free / 1e9:.3f} GB is free; free "
            "space or choose another model_dir"
        )
    return total / 1e9


def print_table(
    trainer: TrainingEngine,
    model_dir: str,
    weights: Mapping[str, str],
    patch_size: Sequence[int],
    validator: Any = None,
    num_ranks: int = 1,
) -> None:
    """What will run: volumes, steps, parameters, precision, devices, disk, and what a validation costs.

    Args:
        trainer: that will run.
        model_dir: folder of weights and checkpoint.
        weights: which network each weights file holds.
        patch_size: voxels of a sample along its axes.
        validator: has `cost_rows`, which takes the voxels of a step and gives further rows; may be left out.
        num_ranks: how many processes share a step.
    """
    loader: Any = trainer.data_loader
    batch = f"batch {loader.batch_size}" + (f" on each of {num_ranks} ranks" if num_ranks > 1 else "")
    device = trainer.state.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = {n: sum(p.numel() for p in net.parameters()) / 1e6 for n, net in trainer.bare.items()}
    validated = "" if validator is None else f", {len(validator.data_loader.dataset)} to validate"
    rows = {
        "volumes": f"{len(loader.dataset)} to train{validated}",
        "epochs": f"{trainer.state.max_epochs} of {trainer.state.epoch_length} steps",
        "patch": f"{' x '.join(map(str, patch_size))}, {batch}",
        "parameters": ", ".join(f"{n} {count:.2f} M" for n, count in parameters.items()),
        "computed in": f"{str(trainer.dtype).removeprefix('torch.')} on {name}",
        "disk": f"{check_disk(trainer, model_dir, weights):.2f} GB for weights and checkpoint in {model_dir}",
    }
    if validator is not None:
        voxels = float(torch.tensor(patch_size).prod()) * loader.batch_size * num_ranks
        rows |= validator.cost_rows(voxels)
    print("\n".join(f"{key:<14}{text}" for key, text in rows.items()), flush=True)
