"""What is to be generated: grid and modality, beside what the UNet was trained on and what memory allows."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import ignite.distributed as idist
import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.memory import available_memory
from scripts.common.ranks import on_this_node
from scripts.data.intensity import CT_WINDOW, Intensity
from scripts.data.latents import UNIT
from scripts.networks.flow import MRI, Flow
from scripts.networks.generation import Generator
from scripts.networks.unet import UNetWeights, inputs, size_multiple
from scripts.networks.weights import Weights

MRI_WINDOW = (0.0, 1000.0)  # what 0..1 becomes, as in NV-Generate-CTMR
MARGIN = 0.1  # how far spacings may lie outside those trained on before it is said
SIZE_MARGIN = 0.25  # how far sizes, and fields of view, may
GROUP = "diffusion_unet_inference"


class Wanted:
    """What is told of all that is generated, as `diffusion_unet_inference` has it, and which grids it may have.

    Args:
        inference: that group.
        weights: of the UNet, which knows what it was trained on.
        autoencoder: whose latents these should be.
        noise_flow: whose times the UNet is told.
        factor: voxels along an axis for one latent voxel.
        modality_mapping: the numbers of modalities by their names.

    Attributes:
        multiple: what sizes must be multiples of, in voxels.
        modality: its number.

    Raises:
        UserError: naming the knob that no volume can be made with. An autoencoder that is not that of the training is
            warned of.
    """

    def __init__(
        self,
        inference: Mapping[str, Any],
        weights: UNetWeights,
        autoencoder: Weights,
        noise_flow: Flow,
        factor: int,
        modality_mapping: Mapping[str, int],
    ) -> None:
        self.takes, self.facts, self.factor = inputs(weights.network), weights.file.facts, factor
        self.multiple = factor * size_multiple(weights.network)
        self.modality = _modality(inference["modality"], modality_mapping, weights.network)
        self.regions = {
            name: _numbers(f"{name}_region_index", inference[f"{name}_region_index"], 4)
            for name in ("top", "bottom")
            if getattr(self.takes, name)
        }
        trained = weights.file.num_train_timesteps
        if trained not in (None, noise_flow.num_train_timesteps):
            raise UserError(
                f"noise_scheduler#num_train_timesteps is {noise_flow.num_train_timesteps}, but {weights.file.path} was "
                f"trained with {trained}; use that"
            )
        warn(_other_autoencoder(weights, autoencoder))

    def unfamiliar(self, dim: Sequence[int], spacing: Sequence[float]) -> Iterable[str]:
        """Sentences about what lies far from what was trained on, as far as the weights file knows.

        Args:
            dim: X, Y, Z of a volume, in voxels.
            spacing: mm along these axes.
        """
        facts = self.facts
        known = [[n * self.factor for n in size] for size in facts.get("sizes") or []]
        if known and not any(_near(dim, size) for size in known):
            shown = ", ".join(" x ".join(map(str, size)) for size in known[:4])
            more = f" and {len(known) - 4} more" if len(known) > 4 else ""
            yield f"dim {list(dim)} is far from the sizes trained on: {shown}{more}"
        extents = [n * length for n, length in zip(dim, spacing, strict=True)]
        for name, margin, values in (
            ("spacing", MARGIN, spacing),
            ("field_of_view", SIZE_MARGIN, extents),
        ):
            for axis, value, (low, high) in zip("xyz", values, facts.get(name) or [], strict=False):
                if not low * (1 - margin) <= value <= high * (1 + margin):
                    what = f"{name.replace('_', ' ')} {value:.4g} mm along {axis}"
                    yield f"{what} is far from what was trained on, {low:.4g} to {high:.4g} mm"
        modalities = facts.get("modalities") or {}
        if self.takes.modality and modalities and self.modality not in modalities.values():
            trained = ", ".join(f"{name} ({number})" for name, number in modalities.items())
            yield f"modality {self.modality} is none of those trained on: {trained}"

    @property
    def kind(self) -> str:
        """ "ct" or "mri"."""
        return "mri" if self.modality >= MRI else "ct"

    @property
    def intensity(self) -> Intensity:
        """What [0, 1] becomes: HU for CT."""
        return Intensity(MRI_WINDOW, clip=False) if self.kind == "mri" else Intensity(CT_WINDOW, clip=True)

    def conditions(self, spacing: Sequence[float]) -> dict[str, torch.Tensor]:
        """What `unet.predict` takes, of one volume with voxels of `spacing` (mm)."""
        given = {"spacing": torch.tensor([list(spacing)]) * UNIT, "modality": torch.tensor([self.modality])}
        return given | {name: torch.tensor([region]) * UNIT for name, region in self.regions.items()}


def warn(sentences: Iterable[str]) -> None:
    """Say, once for all ranks, what may not be meant."""
    if idist.get_rank() == 0:
        for sentence in sentences:
            print(f"warning: {sentence}", file=sys.stderr)


def checked_seed(random_seed: Any) -> int:
    """The knob `random_seed`; a UserError where it is none."""
    if type(random_seed) is not int or random_seed < 0:
        raise UserError(f"{GROUP}#random_seed is {random_seed!r}; use a whole number from 0")
    return random_seed


def asked_grid(dim: Any, spacing: Any, multiple: int) -> tuple[list[int], list[float]]:
    """Size (voxels) and spacing (mm) as `diffusion_unet_inference` has them.

    Raises:
        UserError: for sizes that are no multiples of `multiple`, and for spacings that are none.
    """
    size, lengths = _dim(dim, multiple), _numbers("spacing", spacing, 3)
    if min(lengths) <= 0:
        raise UserError(f"{GROUP}#spacing is {spacing}; use three lengths in mm above 0")
    return size, lengths


def _dim(dim: Any, multiple: int) -> list[int]:
    sizes = list(dim) if isinstance(dim, (list, tuple)) else []
    if len(sizes) != 3 or not all(type(n) is int and n > 0 and n % multiple == 0 for n in sizes):
        good = [max(round(n / multiple), 1) * multiple for n in sizes if type(n) in (int, float) and math.isfinite(n)]
        nearest = f", e.g. {good}" if len(good) == 3 else ""
        raise UserError(f"{GROUP}#dim is {dim!r}; use three multiples of {multiple} voxels{nearest}")
    return sizes


def _numbers(name: str, value: Any, count: int) -> list[float]:
    good = isinstance(value, (list, tuple)) and len(value) == count
    if not good or not all(type(n) in (int, float) and math.isfinite(n) for n in value):
        raise UserError(f"{GROUP}#{name} is {value!r}; use {count} numbers")
    return [float(n) for n in value]


def _modality(modality: Any, mapping: Mapping[str, int], network: nn.Module) -> int:
    """The number of a modality that is given by its number or its name."""
    number = mapping.get(modality) if isinstance(modality, str) else modality
    if type(number) is not int or number not in {0, *mapping.values()}:
        known = ", ".join(f"{name} ({n})" for name, n in mapping.items())
        raise UserError(f"{GROUP}#modality is {modality!r}, which the modality mapping lacks; use one of {known}")
    count = getattr(network, "num_class_embeds", None)
    if count is not None and number >= count:
        raise UserError(f"{GROUP}#modality is {modality!r}, number {number}, but the network knows 0 to {count - 1}")
    return number


def _near(size: Sequence[int], other: Sequence[int]) -> bool:
    return all(abs(a / b - 1) <= SIZE_MARGIN for a, b in zip(size, other, strict=True))


def _other_autoencoder(weights: UNetWeights, autoencoder: Weights) -> Iterable[str]:
    """A sentence where the UNet knows latents of another autoencoder."""
    trained = weights.file.facts.get("autoencoder_sha256")
    if trained and autoencoder.sha256 and trained != autoencoder.sha256:
        yield (
            f"{weights.file.path} was trained on latents of the autoencoder with SHA-256 {trained[:12]}, but that of "
            f"{autoencoder.path} is {autoencoder.sha256[:12]}; give the other one as trained_autoencoder_path"
        )


def least_memory(unet: nn.Module, latent_size: Sequence[int], itemsize: int, controlled: bool = False) -> int:
    """Bytes that a UNet takes at the least for one latent, beside its weights.

    The larger of two moments: the last level, with 13 times its channels at full resolution, and 3 times more where a
    ControlNet adds to it; and, without flash attention, the first attention, with two matrices of scores for each head.
    Found by counting live tensors, in float32 and bfloat16, of UNets of 8, 32 and 64 channels and latents of 64 x 64 x
    32 to 128 x 128 x 192: these held 1 to 1.25 times as much (1.3 with a ControlNet), leaving copies of weights aside.
    The resident memory of a process on a CPU grew by 1 to 1.3 times what was counted.

    Args:
        unet: MONAI's `DiffusionModelUNetMaisi`.
        latent_size: X, Y, Z in latent voxels.
        itemsize: bytes of a number in the compute type.
        controlled: whether a ControlNet takes part.
    """
    bare: Any = unet
    voxels, channels = math.prod(latent_size), bare.block_out_channels
    need = (16 if controlled else 13) * channels[0] * voxels
    if not any(getattr(module, "use_flash_attention", False) for module in bare.modules()):
        level = [*bare.attention_levels[:-1], True].index(True)  # the last one has attention in any case
        heads = channels[level] // (bare.num_head_channels[level] or channels[level])
        need = max(need, 2 * heads * (voxels // 8**level) ** 2)
    return itemsize * need


class Sized(Protocol):
    """What is to be generated, volume by volume."""

    def largest(self) -> tuple[str, Sequence[int]]:
        """X, Y, Z of the largest volume, in voxels, and what messages say of it."""
        ...


def check_memory(generator: Generator, dataset: Sized) -> None:
    """Whether memory is left for all volumes; found out before, since Linux kills without a word.

    Raises:
        UserError: where it is not.
    """
    device, (what, dim) = generator.device, dataset.largest()
    size = [n // generator.inferer.factor for n in dim]
    need = least_memory(generator.unet, size, generator.dtype.itemsize, generator.controlnet is not None)
    left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    if left is not None and device.type == "cpu":
        left //= on_this_node()
    if left is not None and need > left:
        raise UserError(
            f"{what}, which takes at least {need / 1e9:.1f} GB of memory on {device}, and "
            f"{left / 1e9:.1f} GB is left for it; use a smaller one"
        )
