"""What is done before the first step: weights, data and disk are checked, volumes converted, and a table printed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.precision import computed_in, cudnn_version, cudnn_warning
from scripts.data.datalist import shared_volumes
from scripts.data.examine import check_headers
from scripts.data.store import ArrayStore
from scripts.networks.weights import read_weights
from scripts.training.engine import TrainingEngine
from scripts.training.model_folder import CHECKPOINT


def check_start(network: nn.Module, finetune: bool, key: str, path: str | None, definition: str) -> None:
    """Whether the weights to fine-tune from are given, readable and of this architecture.

    Args:
        network: that begins from them.
        finetune: whether it does.
        key: of the configuration, where the path stands.
        path: of the weights.
        definition: the config's key of the network.

    Raises:
        UserError: where they are not.
    """
    if finetune and not path:
        raise UserError(
            f"finetune is true, but {key} is {path}; give the weights to start from, or set finetune to false"
        )
    if finetune:
        read_weights(network, str(path), f"correct {key}, or start from scratch", definition)


def convert_data(
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    store: ArrayStore,
    num_workers: int,
    rank: int = 0,
    num_ranks: int = 1,
    check: Callable[[Sequence[Mapping[str, Any]]], object] = check_headers,
) -> None:
    """Check all volumes or latents by what their headers say, then convert what is missing.

    Args:
        splits: datalist entries, by the names of their lists.
        store: where conversions go.
        num_workers: processes of this rank.
        rank: of this process.
        num_ranks: among which the conversions are shared.
        check: called with all entries, on rank 0, before anything is converted.
    """
    entries = [entry for split in splits.values() for entry in split]
    if rank == 0:
        check(entries)
        for sentence in shared_volumes({name: [dict(e) for e in split] for name, split in splits.items()}):
            print(f"warning: {sentence}; what is measured on it is too good", file=sys.stderr)
    idist.barrier()
    store.convert_missing(entries[rank::num_ranks], max(num_workers, 1), progress=rank == 0)
    idist.barrier()


def check_disk(
    trainer: TrainingEngine, model_dir: str, weights: Mapping[str, str], checkpoint: str = CHECKPOINT
) -> float:
    """Whether weights and checkpoint fit on the disk, once more than they are there already.

    Args:
        trainer: whose they are.
        model_dir: folder of both.
        weights: which network each weights file holds.
        checkpoint: its name.

    Returns:
        what they take there, in GB.

    Raises:
        UserError: naming the folder and both sizes.
    """
    sizes = {name: 4 * sum(p.numel() for p in network.parameters()) for name, network in trainer.bare.items()}
    # Adam holds two more values for each weight, an average one.
    whole = 3 * sum(sizes.values()) + sum(sizes[name] for name, a in trainer.averages.items() if a.decay)
    total = sum(sizes[name] for name in weights.values()) + whole
    names = [checkpoint, *(name.format("*") for name in weights)]
    there = sum(file.stat().st_size for name in names for file in Path(model_dir).glob(name))
    need, free = max(total - there, 0) + whole, shutil.disk_usage(model_dir).free
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
    sample: str,
    voxels: float,
    validator: Any = None,
    num_ranks: int = 1,
    rows: Mapping[str, str] | None = None,
    checkpoint: str = CHECKPOINT,
) -> None:
    """What will run: samples, steps, parameters, precision, device, cuDNN, disk, and what a validation costs.

    Args:
        trainer: that will run.
        model_dir: folder of weights and checkpoint.
        weights: which network each weights file holds.
        sample: what one is, for the row about batches.
        voxels: of a sample.
        validator: has `cost_rows`, which takes the voxels of a step and gives further rows; may be left out.
        num_ranks: how many processes share a step.
        rows: further ones, after that of the samples.
        checkpoint: the name of its file.
    """
    loader: Any = trainer.data_loader
    batch = f"batch {loader.batch_size}" + (f" on each of {num_ranks} ranks" if num_ranks > 1 else "")
    device = trainer.state.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    parameters = {n: sum(p.numel() for p in net.parameters()) / 1e6 for n, net in trainer.bare.items()}
    disk = check_disk(trainer, model_dir, weights, checkpoint)
    validated = "" if validator is None else f", {len(validator.data_loader.dataset)} to validate"
    table = {
        "volumes": f"{len(loader.dataset)} to train{validated}",
        **(rows or {}),
        "epochs": f"{trainer.state.max_epochs} of {trainer.state.epoch_length} steps",
        "sample": f"{sample}, {batch}",
        "parameters": ", ".join(f"{n} {count:.2f} M" for n, count in parameters.items()),
        "computed in": f"{computed_in(device, trainer.amp)} on {name}",
        **(_cudnn(trainer.dtype) if device.type == "cuda" else {}),
        "disk": f"{disk:.2f} GB for weights and checkpoint in {model_dir}",
    }
    if validator is not None:
        table |= validator.cost_rows(voxels * loader.batch_size * num_ranks)
    print("\n".join(f"{key:<14}{text}" for key, text in table.items()), flush=True)


def _cudnn(dtype: torch.dtype) -> dict[str, str]:
    """The row about cuDNN, and a warning of a version that is slow in `dtype`."""
    if warning := cudnn_warning(dtype):
        print(f"warning: {warning}", file=sys.stderr)
    return {"cuDNN": f"{cudnn_version()}, cudnn_benchmark {'on' if torch.backends.cudnn.benchmark else 'off'}"}
