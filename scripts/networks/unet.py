"""The UNet of latent diffusion, MONAI's `DiffusionModelUNetMaisi`: what it takes, and its weights files."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.monai_bundle import live_parser
from scripts.common.ranks import gather
from scripts.networks.diffusion_files import UNET, newest, number, read
from scripts.networks.flow import guided

logger = logging.getLogger(__name__)


def check_definition(*keys: str) -> None:
    """Make the definitions of networks ones that MONAI can build on this machine.

    An entry of `initialize`, right after the command line is read: whatever was built before that is built anew.
    `use_flash_attention` becomes false where there is no GPU, since MONAI then refuses it; the results are the same.

    Args:
        keys: of the definitions in the config; the UNet's where there are none.

    Raises:
        UserError: where `einops`, which attention needs, is not installed.
    """
    if find_spec("einops") is None:
        raise UserError("einops is not installed, which attention needs; pip install -r requirements.txt")
    parser = live_parser()
    for flash in (f"{key}#use_flash_attention" for key in keys or (UNET.definition,)):
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


class Control(Protocol):
    """What else a UNet is told, level by level; see `controlnet.Control`."""

    def residuals(
        self, x: torch.Tensor, timesteps: torch.Tensor, modality: torch.Tensor | None, unguided: bool = False
    ) -> Mapping[str, Any]:
        """Keyword arguments for the UNet; `unguided` for the pass that guidance leads away from."""
        ...


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
    control: Control | None = None,
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
        control: adds to what the UNet makes of `x`.

    Returns:
        (B, C, X, Y, Z), in the compute type; with guidance, which makes its rounding larger, float32.
    """
    assert guidance >= 0
    takes = inputs(network)
    given = {
        "x": x,
        "timesteps": timesteps,
        "spacing_tensor": spacing if takes.spacing else None,
        "top_region_index_tensor": top if takes.top else None,
        "bottom_region_index_tensor": bottom if takes.bottom else None,
    }
    told = _velocity(network, given, modality, control)
    if guidance == 0 or not (takes.modality or control):
        return told
    unknown = None if modality is None else torch.zeros_like(modality)
    other = _velocity(network, given, unknown, control, unguided=True)
    return guided(told.float(), other.float(), guidance)


def _velocity(
    network: nn.Module,
    given: Mapping[str, Any],
    modality: torch.Tensor | None,
    control: Control | None,
    unguided: bool = False,
) -> torch.Tensor:
    """What one pass tells; see `predict`."""
    added = control.residuals(given["x"], given["timesteps"], modality, unguided) if control else {}
    return network(**given, **added, class_labels=modality if inputs(network).modality else None)


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
        path = trained_diffusion_path or newest(Path(model_dir), model_filename)
        if path is None:
            raise UserError(
                f"{model_dir}: holds no weights of latent diffusion ({model_filename} and the like); train with "
                "configs/train_diffusion.json first, or give trained_diffusion_path"
            )
        self.file = read(network, path, UNET, "trained_diffusion_path")
        if len(set(gather(self.file.sha256))) > 1:
            raise UserError(f"{path}: the ranks read different weights; give trained_diffusion_path")
        factor = self.file.scale_factor if scale_factor is None else number(scale_factor)
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
