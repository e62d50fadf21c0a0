"""The UNet of latent diffusion, MONAI's `DiffusionModelUNetMaisi`: what it takes, and its weights files."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.monai_bundle import live_parser
from scripts.common.ranks import gather
from scripts.networks.flow import guided
from scripts.networks.weights import load_file

logger = logging.getLogger(__name__)

DEFINITION = "diffusion_unet_def"
_STATE = "unet_state_dict"


def check_definition(key: str = DEFINITION) -> None:
    """Make the definition of a network one that MONAI can build on this machine.

    An entry of `initialize`, right after the command line is read: whatever was built before that is built anew.
    `use_flash_attention` becomes false where there is no GPU, since MONAI then refuses it; the results are the same.

    Args:
        key: of the definition in the config.

    Raises:
        UserError: where `einops`, which attention needs, is not installed.
    """
    if find_spec("einops") is None:
        raise UserError("einops is not installed, which attention needs; pip install -r requirements.txt")
    parser, flash = live_parser(), f"{key}#use_flash_attention"
    if parser is not None and parser.get(flash) is True and not torch.cuda.is_available():
        logger.info("%s is taken as false: there is no GPU", flash)
        parser[flash] = False
        parser.parse(reset=True)


class Inputs(NamedTuple):
    """Which conditions a UNet takes, beside latents and times.

    Attributes:
        spacing: mm x 100, float32 (B, 3).
        modality: numbers, int64 (B,).
        top: the body region where the volume ends above, one-hot x 100, float32 (B, 4).
        bottom: where it ends below, likewise.
    """

    spacing: bool
    modality: bool
    top: bool
    bottom: bool


def inputs(network: nn.Module) -> Inputs:
    """Which conditions a UNet takes, wrapped in DistributedDataParallel or not."""
    bare: Any = getattr(network, "module", network)
    return Inputs(
        spacing=bare.include_spacing_input,
        modality=bare.num_class_embeds is not None,
        top=bare.include_top_region_index_input,
        bottom=bare.include_bottom_region_index_input,
    )


def size_multiple(network: nn.Module) -> int:
    """What latent sizes must be multiples of: they are halved between the levels, and doubled again."""
    bare: Any = getattr(network, "module", network)
    return 2 ** (len(bare.block_out_channels) - 1)


def predict(
    network: nn.Module,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    spacing: torch.Tensor | None = None,
    modality: torch.Tensor | None = None,
    top: torch.Tensor | None = None,
    bottom: torch.Tensor | None = None,
    guidance: float = 0.0,
) -> torch.Tensor:
    """The velocity that a UNet tells; conditions that it does not take are not given to it.

    Args:
        network: wrapped in DistributedDataParallel or not.
        x: noisy latents (B, C, X, Y, Z), float32.
        timesteps: (B,), the times 0..1 times `Flow.num_train_timesteps`.
        spacing: see `Inputs`, as the others.
        modality: 0 is unknown.
        top: of the body region.
        bottom: of the body region.
        guidance: scale of classifier-free guidance, which costs a second pass, without the modality; 0 for none.

    Returns:
        (B, C, X, Y, Z), in the compute type; with guidance, which makes its rounding larger, float32.
    """
    assert guidance >= 0
    takes = inputs(network)
    given = {
        "spacing_tensor": spacing if takes.spacing else None,
        "class_labels": modality if takes.modality else None,
        "top_region_index_tensor": top if takes.top else None,
        "bottom_region_index_tensor": bottom if takes.bottom else None,
    }
    told = network(x=x, timesteps=timesteps, **given)
    if guidance == 0 or given["class_labels"] is None:
        return told
    given["class_labels"] = torch.zeros_like(given["class_labels"])
    return guided(told.float(), network(x=x, timesteps=timesteps, **given).float(), guidance)


def unet_file(
    network: nn.Module,
    *,
    epoch: int,
    loss: float,
    scale_factor: float,
    num_train_timesteps: int = 1000,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of a weights file in NV-Generate-CTMR's layout; for `weights.write_tensors`.

    Args:
        network: not wrapped in DistributedDataParallel.
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
        _STATE: {name: tensor.detach().float().cpu() for name, tensor in network.state_dict().items()},
    }


@dataclass(frozen=True)
class UNetFile:
    """What a weights file says beside the weights; None where it does not.

    Attributes:
        path: of the file.
        sha256: of the file, hexadecimal.
        scale_factor: of the latents.
        epoch: how many were done.
        loss: of the last one.
        num_train_timesteps: of the flow.
        facts: those given to `unet_file`; empty in files of others.
    """

    path: Path
    sha256: str
    scale_factor: float | None = None
    epoch: int | None = None
    loss: float | None = None
    num_train_timesteps: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def read_unet(network: nn.Module, path: str | Path, key: str = "existing_ckpt_filepath") -> UNetFile:
    """Load weights, strictly, from a file of ours or of NV-Generate-CTMR, or a bare state dict.

    Args:
        network: not wrapped in DistributedDataParallel.
        path: of the file.
        key: of the config where the path stands, for what errors say.

    Raises:
        UserError: where the file is missing, damaged, or holds other weights, see `weights.read_weights`; where its
            scale factor is no positive number.
    """
    content, sha256 = load_file(network, path, f"correct {key}", DEFINITION)
    if _STATE not in content:
        return UNetFile(Path(path), sha256)
    numbers = {name: _number(content.get(name)) for name in ("scale_factor", "epoch", "loss", "num_train_timesteps")}
    scale, epoch, steps = numbers["scale_factor"], numbers["epoch"], numbers["num_train_timesteps"]
    if scale is not None and not 0 < scale < math.inf:
        raise UserError(f"{path}: scale_factor is {scale}, which is no positive number; use weights saved earlier")
    return UNetFile(
        path=Path(path),
        sha256=sha256,
        scale_factor=scale,
        epoch=None if epoch is None else int(epoch),
        loss=numbers["loss"],
        num_train_timesteps=None if steps is None else int(steps),
        facts=content.get("facts") or {},
    )


def _number(value: Any) -> float | None:
    """A number, or a tensor of one; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, (int, float)) else None


class UNetWeights:
    """The weights of a UNet for generating: given ones, or else what a training left in `model_dir`.

    Args:
        network: takes them, strictly.
        model_dir: searched where no path is given: the newest of a training's best ones, else its last ones.
        model_filename: what the training called them.
        trained_diffusion_path: the file to use, or None.
        scale_factor: instead of the file's; None where the file has one.

    Attributes:
        network: with the weights in it.
        file: what it says beside them.
        scale_factor: of the latents.

    Raises:
        UserError: where there is no such file, it does not fit the network, or no scale factor is known.
    """

    def __init__(
        self,
        network: nn.Module,
        model_dir: str | Path,
        model_filename: str,
        trained_diffusion_path: str | None = None,
        scale_factor: float | None = None,
    ) -> None:
        self.network = network
        path = Path(trained_diffusion_path) if trained_diffusion_path else _newest(Path(model_dir), model_filename)
        self.file = read_unet(network, path, "trained_diffusion_path")
        if len(set(gather(self.file.sha256))) > 1:
            raise UserError(f"{path}: the ranks read different weights; give trained_diffusion_path")
        factor = self.file.scale_factor if scale_factor is None else _number(scale_factor)
        if factor is None or not 0 < factor < math.inf:
            found = factor if scale_factor is None else repr(scale_factor)
            raise UserError(
                f"{path}: scale_factor is {found}; give --scale_factor, the number that its training multiplied "
                "latents by (latent_stats.json beside them has it)"
            )
        self.scale_factor = factor

    def facts(self) -> dict[str, str | None]:
        """Which weights these are, for what is written with results."""
        return {"weights": str(self.file.path), "weights_sha256": self.file.sha256}


def _newest(folder: Path, name: str) -> Path:
    """The newest of a training's best weights, else its last ones; fine-tuned ones before those they came from."""
    stem, ending = Path(name).stem, Path(name).suffix
    best = [p for s in (f"{stem}_best_epoch*", f"{stem}_finetuned_best_epoch*") for p in folder.glob(s + ending)]
    best.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in (*best[-1:], folder / f"{stem}_finetuned{ending}", folder / name):
        if path.is_file():
            return path
    raise UserError(
        f"{folder}: holds no weights of latent diffusion ({name} and the like); train with "
        "configs/train_diffusion.json first, or give trained_diffusion_path"
    )
