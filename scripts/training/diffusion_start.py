"""What is settled before latent diffusion begins: which latents the network can take, their scale, and whose files."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.common.files import read_json
from scripts.data.latent_list import Entry, check_sizes, described, ranges, read_mapping
from scripts.data.latents import LatentStore, scale_factor
from scripts.networks import diffusion_files
from scripts.networks.autoencoder import Reconstructor
from scripts.networks.diffusion_files import UNET
from scripts.networks.unet import inputs, size_multiple
from scripts.networks.weights import Weights
from scripts.training.engine import TrainingEngine

logger = logging.getLogger(__name__)

STATISTICS = "latent_stats.json"  # what configs/encode.json writes beside latents
TOLERANCE = 0.05  # by which a scale factor may differ from that of the latents before it is said


def check_latents(entries: Sequence[Entry], network: nn.Module) -> None:
    """Whether a UNet can take latents, by their sizes and modalities; a warning where several autoencoders made them.

    Raises:
        UserError: naming the first latent that it cannot take.
    """
    check_sizes(entries, size_multiple(network))
    if inputs(network).modality:
        known = int(getattr(network, "num_class_embeds"))  # noqa: B009 (a Module's attributes are tensors to mypy)
        for entry in entries:
            if not 0 <= entry["modality_number"] < known:
                raise UserError(
                    f"{entry['image']}: modality {entry['modality']} has number {entry['modality_number']}, but the "
                    f"network knows 0 to {known - 1} (diffusion_unet_def#num_class_embeds); correct the mapping"
                )
    autoencoders = {entry["weights_sha256"]: entry["image"] for entry in entries if entry.get("weights_sha256")}
    if len(autoencoders) > 1:
        (one, first), (other, second), *_ = autoencoders.items()
        print(
            f"warning: {first} and {second} come from different autoencoders (SHA-256 {one[:12]} and {other[:12]}); "
            "encode all volumes with the same one",
            file=sys.stderr,
        )


def modality_mapping(network: nn.Module, path: str) -> dict[str, int] | None:
    """The number of each modality, from a JSON file; None where the UNet takes none, and the file is not looked at."""
    return read_mapping(path) if inputs(network).modality else None


def decoder(
    sample_interval: int,
    network: Reconstructor,
    model_dir: str,
    trained_autoencoder_path: str | None,
    device: torch.device | str,
) -> nn.Module | None:
    """The trained autoencoder, by which sampled volumes are shown; None where none are.

    Args:
        sample_interval: in epochs; 0 for no samples.
        network: takes the weights.
        model_dir: searched for them; see `Weights`.
        trained_autoencoder_path: their file, or None.
        device: where the network is to be.

    Raises:
        UserError: where there are no weights, or `sample_interval` is no whole number.
    """
    if isinstance(sample_interval, bool) or not isinstance(sample_interval, int) or sample_interval < 0:
        raise UserError(f"sample_interval is {sample_interval!r}; use a whole number of epochs, 0 for no samples")
    if not sample_interval:
        return None
    try:
        return Weights(network, model_dir, trained_autoencoder_path).network.to(device)
    except UserError as error:
        raise UserError(f"{error}; or set sample_interval to 0, for a training without pictures") from error


def autoencoder_of(entries: Sequence[Entry]) -> str | None:
    """The SHA-256 of the weights that made latents; None where it is not known."""
    return next((entry["weights_sha256"] for entry in entries if entry.get("weights_sha256")), None)


class Scale(NamedTuple):
    """What latents are multiplied by, and where that number comes from."""

    value: float
    origin: str


def scale_for(
    entries: Sequence[Entry], store: LatentStore, network: nn.Module, existing_ckpt_filepath: str | None = None
) -> Scale:
    """The scale factor of a training: that of the weights it starts from, else 1 / std over its latents.

    Weights know latents of one scale, so theirs is kept, unless another autoencoder made these latents.

    Args:
        entries: the training latents, which are converted.
        store: of these.
        network: that starts from the weights; they are loaded into it.
        existing_ckpt_filepath: the weights, or None.

    Raises:
        UserError: where the weights cannot be loaded, or the scale can neither be measured nor read.
    """
    start = diffusion_files.read(network, existing_ckpt_filepath, UNET) if existing_ckpt_filepath else None
    if start is None or (kept := start.scale_factor) is None:
        return _measured(entries, store)
    before, now = start.facts.get("autoencoder_sha256"), autoencoder_of(entries)
    if before and now and before != now:
        measured = _measured(entries, store)
        logger.warning(
            "%s was trained on latents of another autoencoder (SHA-256 %s, these are of %s): scale factor %.4f "
            "instead of its %.4f",
            existing_ckpt_filepath, before[:12], now[:12], measured.value, kept,
        )  # fmt: skip
        return measured
    if len(entries) > 1 and abs((own := _measured(entries, store).value) / kept - 1) > TOLERANCE:
        logger.warning(
            "the scale factor of %s, %.4f, is kept; that of these latents would be %.4f: was another autoencoder used?",
            existing_ckpt_filepath, kept, own,
        )  # fmt: skip
    return Scale(kept, f"of {existing_ckpt_filepath}")


def _measured(entries: Sequence[Entry], store: LatentStore) -> Scale:
    """Of the latents themselves; a single one says too little, so that of the set it was encoded with is taken."""
    statistics = Path(entries[0]["image"]).parent / STATISTICS
    if len(entries) < 2 and statistics.is_file():
        try:
            return Scale(float(read_json(statistics)["scale_factor"]), f"of {statistics}")
        except (ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{statistics}: is damaged; encode again") from error
    return Scale(*scale_factor(entries, store))


def weights_files(
    model_dir: str,
    model_filename: str,
    existing_ckpt_filepath: str | None = None,
    network: str = "unet",
    key: str = "model_filename",
) -> dict[str, str]:
    """Which network each weights file holds; none of them is the one that the training starts from.

    Args:
        model_dir: their folder.
        model_filename: of the newest ones.
        existing_ckpt_filepath: what the training starts from, or None.
        network: the name of the one that is trained.
        key: of the config, where `model_filename` comes from.

    Raises:
        UserError: where `model_filename` is no name of a file.
    """
    name = Path(model_filename)
    if not name.name or name.name != str(name):
        raise UserError(f"{key} is {model_filename!r}; use the name of a file, its folder being model_dir")
    written = [Path(model_dir) / name, *Path(model_dir).glob(_best_of(name).format("*"))]
    if existing_ckpt_filepath and Path(existing_ckpt_filepath).resolve() in [file.resolve() for file in written]:
        name = name.with_stem(f"{name.stem}_finetuned")
        logger.warning("%s is what the training starts from, and is kept; it writes %s", existing_ckpt_filepath, name)
    return {str(name): network, _best_of(name): network}


def _best_of(name: Path) -> str:
    """The name of the best weights beside the newest ones, with {} for the epoch."""
    return str(name.with_stem(f"{name.stem}_best_epoch{{}}"))


def checkpoint_name(weights: Mapping[str, str]) -> str:
    """The name of the checkpoint beside weights files, by the first of them."""
    newest = Path(next(iter(weights)))
    return str(newest.with_stem(f"{newest.stem}_checkpoint"))


def facts(entries: Sequence[Entry], scale: Scale) -> dict[str, Any]:
    """What is kept with the weights: the autoencoder, and the sizes, spacings and modalities trained on."""
    return {"autoencoder_sha256": autoencoder_of(entries), "scale_factor_origin": scale.origin, **ranges(entries)}


def rows(
    entries: Sequence[Entry], scale: Scale, trainer: TrainingEngine, frozen: nn.Module | None = None
) -> dict[str, str]:
    """What the table of the start says beside the rows of all trainings; `frozen` is a network that only takes part."""
    weights = sum(p.numel() for network in trainer.bare.values() for p in network.parameters())
    # Four bytes each: weights, gradients, Adam's two moments, and the average.
    memory = 4 * weights * (4 + sum(average.decay > 0 for average in trainer.averages.values()))
    parts = "gradients, Adam and average"
    if frozen is not None:
        memory += 4 * sum(p.numel() for p in frozen.parameters())
        parts = "gradients, Adam, average and the frozen UNet"
    return {
        **described(entries),
        "scale factor": f"{scale.value:.4f} ({scale.origin})",
        "weights": f"{memory / 1e9:.2f} GB on the device, with {parts}; activations come on top",
    }
