"""What is settled before a ControlNet is trained: where it begins, and which labels there are."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
from torch import nn

from scripts.common.errors import UserError
from scripts.common.ranks import gather
from scripts.data.labels import BODY, LabelStore, replacements
from scripts.data.latent_list import Entry
from scripts.data.latents import LatentStore, scale_factor
from scripts.networks import diffusion_files
from scripts.networks.controlnet import copy_encoder, fused
from scripts.networks.diffusion_files import CONTROLNET
from scripts.networks.unet import UNetWeights, inputs
from scripts.training import diffusion_start
from scripts.training.diffusion_start import TOLERANCE, Scale
from scripts.training.engine import TrainingEngine
from scripts.training.preflight import convert_data
from scripts.training.region_losses import RegionLosses


def begun(network: nn.Module, weights: UNetWeights, existing_ckpt_filepath: str | None) -> nn.Module:
    """A ControlNet where its training begins: the UNet's encoder, or the weights of an earlier training.

    Args:
        network: takes them.
        weights: of the UNet, loaded.
        existing_ckpt_filepath: of a ControlNet, or None.

    Raises:
        UserError: where they do not fit.
    """
    bare: Any = network
    if (bare.num_class_embeds is None) and inputs(weights.network).modality:
        raise UserError(
            "controlnet_def#num_class_embeds is null, but the UNet takes the modality; give it the UNet's number"
        )
    if existing_ckpt_filepath:
        diffusion_files.read(network, existing_ckpt_filepath, CONTROLNET)
    else:
        copy_encoder(network, weights.network)
    return fused(network)


def table_of(roi_labels: Mapping[Any, Any], losses: RegionLosses) -> dict[int, int | str] | None:
    """Which labels the contrast takes away, and what takes their place; None without a contrast.

    Raises:
        UserError: as `replacements`; and where the table is empty, but needed.
    """
    table = replacements(roi_labels)
    if losses.contrast_weight and not table:
        raise UserError("controlnet_train#use_region_contrasive_loss is true, but roi_labels is empty; fill that table")
    return table if losses.contrast_weight else None


def convert_labels(
    splits: Mapping[str, Sequence[Entry]], store: LabelStore, num_workers: int, rank: int = 0, num_ranks: int = 1
) -> None:
    """Convert the label maps that are missing in the store; see `preflight.convert_data`."""
    maps = {name: [{"image": entry["label"]} for entry in entries] for name, entries in splits.items()}
    convert_data(maps, store, num_workers, rank, num_ranks, check=lambda _: None)


def labels_of(entries: Sequence[Entry], store: LabelStore, rank: int = 0, num_ranks: int = 1) -> dict[int, int]:
    """In how many maps each label occurs, by label; the ranks share the reading."""
    own = Counter(label for entry in entries[rank::num_ranks] for label in store.counts({"image": entry["label"]}))
    return dict(sorted(sum(gather(own), Counter()).items()))


def warn_of_labels(
    occurring: Mapping[int, int], count: int, losses: RegionLosses, table: Mapping[int, Any] | None
) -> None:
    """Say what is told of labels that never occur, and whether the body has a label.

    Args:
        occurring: in how many maps each label occurs.
        count: of all maps.
        losses: whose labels may be wrong.
        table: see `table_of`.
    """
    if idist.get_rank() != 0:
        return
    for knob, labels in {"controlnet_train#weighted_loss_label": losses.weighted, "roi_labels": table or ()}.items():
        if never := [str(label) for label in labels if label not in occurring]:
            print(f"warning: {knob} has {', '.join(never)}, which no training map has; correct it", file=sys.stderr)
    if (bodies := occurring.get(BODY, 0)) < count:
        print(
            f"warning: {count - bodies} of {count} training maps lack {BODY}, the body; generated voxels of label 0 "
            "become air; encode again with body_label 200",
            file=sys.stderr,
        )


def facts(entries: Sequence[Entry], weights: UNetWeights, occurring: Mapping[int, int]) -> dict[str, Any]:
    """What is kept with the weights: those of `diffusion_start.facts`, the UNet, and the labels trained on."""
    scale = Scale(weights.scale_factor, f"of {weights.file.path}")
    told = {"unet_sha256": weights.file.sha256, "labels": sorted(occurring)}
    return {**diffusion_start.facts(entries, scale), **told}


def warn_of_scale(entries: Sequence[Entry], weights: UNetWeights, store: LatentStore) -> None:
    """Say where the UNet was trained on latents of another autoencoder than these, or of another scale."""
    if idist.get_rank() != 0:
        return
    before, now = weights.file.facts.get("autoencoder_sha256"), diffusion_start.autoencoder_of(entries)
    if before and now and before != now:
        print(
            f"warning: {weights.file.path} was trained on latents of the autoencoder with SHA-256 {before[:12]}, these "
            f"are of {now[:12]}; encode with the other one, or train the diffusion model anew",
            file=sys.stderr,
        )
    elif len(entries) > 1 and abs((own := scale_factor(entries, store)[0]) / weights.scale_factor - 1) > TOLERANCE:
        print(
            f"warning: the scale factor of {weights.file.path} is {weights.scale_factor:.4f}, that of these latents "
            f"would be {own:.4f}: was another autoencoder used?",
            file=sys.stderr,
        )


def rows(
    entries: Sequence[Entry],
    weights: UNetWeights,
    trainer: TrainingEngine,
    occurring: Mapping[int, int],
    most: int = 12,
) -> dict[str, str]:
    """What the table of the start says beside the rows of all trainings; the `most` common labels are named."""
    counts = Counter({label: count for label, count in occurring.items() if label}).most_common()
    labels = ", ".join(f"{label} ({count})" for label, count in counts[:most])
    labels += f", {len(counts) - most} others" if len(counts) > most else ""
    scale = Scale(weights.scale_factor, f"of {weights.file.path}")
    return {
        "UNet": f"{weights.file.path} (SHA-256 {weights.file.sha256[:12]}), frozen",
        **diffusion_start.rows(entries, scale, trainer, weights.network),
        "labels": f"{labels or 'none'} (of {len(entries)} maps)",
    }
