"""Weights files of latent diffusion, in NV-Generate-CTMR's layout: of the UNet, and of the ControlNet."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.weights import load_file, plain_state


class Kind(NamedTuple):
    """What a file holds.

    Attributes:
        state: the key of the weights in it.
        definition: the config's key of the network, which errors name.
    """

    state: str
    definition: str


UNET = Kind("unet_state_dict", "diffusion_unet_def")
CONTROLNET = Kind("controlnet_state_dict", "controlnet_def")


def content(
    network: nn.Module,
    kind: Kind,
    *,
    epoch: int,
    loss: float,
    scale_factor: float,
    num_train_timesteps: int = 1000,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a weights file; for `weights.write_tensors`.

    Args:
        network: not wrapped in DistributedDataParallel.
        kind: which network it is.
        epoch: how many are done.
        loss: of the last one.
        scale_factor: latents times this are what the network knows; a tensor in the file.
        num_train_timesteps: of the flow.
        facts: plain values about the training, under a key of their own that NV-Generate-CTMR does not read.
    """
    return {
        "epoch": epoch,
        "loss": loss,
        "num_train_timesteps": num_train_timesteps,
        "scale_factor": torch.tensor(float(scale_factor)),
        "facts": facts or {},
        kind.state: plain_state(network),
    }


@dataclass(frozen=True)
class DiffusionFile:
    """What a weights file says beside the weights; None where it does not.

    Attributes:
        path: of the file.
        sha256: of the file, hexadecimal.
        scale_factor: of the latents.
        epoch: how many were done.
        loss: of the last one.
        num_train_timesteps: of the flow.
        facts: those given to `content`; empty in files of others.
    """

    path: Path
    sha256: str
    scale_factor: float | None = None
    epoch: int | None = None
    loss: float | None = None
    num_train_timesteps: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def read(network: nn.Module, path: str | Path, kind: Kind, key: str = "existing_ckpt_filepath") -> DiffusionFile:
    """Load weights, strictly, from a file of ours or of NV-Generate-CTMR, or a bare state dict.

    Args:
        network: not wrapped in DistributedDataParallel.
        path: of the file.
        kind: which network it is.
        key: of the config where the path stands, for what errors say.

    Raises:
        UserError: where the file is missing, damaged, or holds other weights, see `weights.read_weights`; where its
            scale factor is no positive number.
    """
    found, sha256 = load_file(network, path, f"correct {key}", kind.definition)
    if kind.state not in found:
        return DiffusionFile(Path(path), sha256)
    numbers = {name: number(found.get(name)) for name in ("scale_factor", "epoch", "loss", "num_train_timesteps")}
    scale, epoch, steps = numbers["scale_factor"], numbers["epoch"], numbers["num_train_timesteps"]
    if scale is not None and not 0 < scale < math.inf:
        raise UserError(f"{path}: scale_factor is {scale}, which is no positive number; use weights saved earlier")
    return DiffusionFile(
        path=Path(path),
        sha256=sha256,
        scale_factor=scale,
        epoch=None if epoch is None else int(epoch),
        loss=numbers["loss"],
        num_train_timesteps=None if steps is None else int(steps),
        facts=found.get("facts") or {},
    )


def number(value: Any) -> float | None:
    """A number, or a tensor of one; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, (int, float)) else None


def newest(folder: Path, name: str) -> Path | None:
    """The newest of a training's best weights, else its last ones; fine-tuned ones before those they came from.

    Args:
        folder: searched.
        name: what the training called its weights.
    """
    stem, ending = Path(name).stem, Path(name).suffix
    best = [p for s in (f"{stem}_best_epoch*", f"{stem}_finetuned_best_epoch*") for p in folder.glob(s + ending)]
    best.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    candidates = (*best[-1:], folder / f"{stem}_finetuned{ending}", folder / name)
    return next((path for path in candidates if path.is_file()), None)
