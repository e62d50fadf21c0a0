"""What the knobs of a configuration's groups may be: a table for each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from scripts.common.errors import UserError
from scripts.networks.windows import check_size


class Rule(NamedTuple):
    """Which values of a knob are good, what to use instead of others, and whether a group may leave it out."""

    good: Callable[[Any], bool]
    use: str
    optional: bool = False


def _number(low: float, inclusive: bool = True) -> Callable[[Any], bool]:
    def good(value: Any) -> bool:
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return number and (value >= low if inclusive else value > low)

    return good


ANY = Rule(lambda value: True, "")  # checked where it is used
COUNT = Rule(
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1, "an integer of at least 1"
)
WEIGHT = Rule(_number(0), "a number from 0")
RATE = Rule(_number(0, inclusive=False), "a number above 0")

DATA_OPTION = dict.fromkeys(("random_aug", "spacing_type", "spacing", "select_channel"), ANY)
AUTOENCODER_TRAIN = {
    "batch_size": COUNT,
    "patch_size": ANY,
    "val_batch_size": COUNT,
    "val_patch_size": ANY,
    "val_sliding_window_patch_size": ANY,
    "lr": RATE,
    "perceptual_weight": WEIGHT,
    "kl_weight": WEIGHT,
    "adv_weight": WEIGHT,
    "recon_loss": ANY,
    "val_interval": COUNT,
    "cache": ANY,
    "amp": ANY,
    "n_epochs": COUNT,
}

DIFFUSION_UNET_TRAIN = {"batch_size": COUNT, "cache_rate": ANY, "lr": RATE, "n_epochs": COUNT}
DIFFUSION_UNET_INFERENCE = {
    "dim": ANY,
    "spacing": ANY,
    "top_region_index": ANY,
    "bottom_region_index": ANY,
    "random_seed": ANY,
    "num_inference_steps": COUNT,
    "modality": ANY,
    "cfg_guidance_scale": WEIGHT,
}
LABELS = Rule(
    lambda value: isinstance(value, (list, tuple)) and all(type(n) is int and 0 <= n <= 255 for n in value),
    "a list of labels, 0 to 255",
)
CONTROLNET_TRAIN = {
    "batch_size": COUNT,
    "cache_rate": ANY,
    "fold": Rule(lambda value: type(value) is int and value >= 0, "a whole number from 0"),
    "lr": RATE,
    "n_epochs": COUNT,
    "weighted_loss_label": LABELS,
    "weighted_loss": WEIGHT,
    # Files of NV-Generate-CTMR from before the contrast have none of these.
    "use_region_contrasive_loss": Rule(lambda value: isinstance(value, bool), "true or false", optional=True),
    "region_contrasive_loss_delta": WEIGHT._replace(optional=True),
    "region_contrasive_loss_weight": WEIGHT._replace(optional=True),
}


def check_group(group: str, knobs: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Names, types and ranges of one group.

    Raises:
        UserError: naming the knob, its value and what it should be.
    """
    for name in knobs:
        if name not in rules:
            close = get_close_matches(name, rules, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the knobs are {', '.join(rules)}"
            raise UserError(f"{group}: unknown knob {name!r}; {hint}")
    for name, rule in rules.items():
        if name not in knobs and rule.optional:
            continue
        if name not in knobs:
            raise UserError(f"{group}: {name!r} is missing (a layer replaces a group whole); add it")
        if not rule.good(knobs[name]):
            raise UserError(f"{group}#{name} is {knobs[name]!r}; use {rule.use}")


def check_knobs(data_option: Mapping[str, Any], autoencoder_train: Mapping[str, Any], factor: int) -> None:
    """The two groups of the autoencoder's training file.

    Args:
        data_option: the group of that name.
        autoencoder_train: the group of that name.
        factor: what patch sizes must be multiples of.

    Raises:
        UserError: naming the knob, its value and what it should be.
    """
    check_group("data_option", data_option, DATA_OPTION)
    check_group("autoencoder_train", autoencoder_train, AUTOENCODER_TRAIN)
    for name in ("patch_size", "val_patch_size", "val_sliding_window_patch_size"):
        check_size(f"autoencoder_train#{name}", autoencoder_train[name], factor, optional=name != "patch_size")
    if autoencoder_train["val_batch_size"] > 1 and autoencoder_train["val_patch_size"] is None:
        raise UserError(
            f"autoencoder_train#val_batch_size is {autoencoder_train['val_batch_size']}, but whole volumes differ in "
            "size; use 1, or set val_patch_size"
        )


def check_diffusion(diffusion_unet_train: Mapping[str, Any], diffusion_unet_inference: Mapping[str, Any]) -> None:
    """The two groups of the training file of latent diffusion.

    Args:
        diffusion_unet_train: the group of that name.
        diffusion_unet_inference: the group of that name.

    Raises:
        UserError: naming the knob, its value and what it should be.
    """
    check_group("diffusion_unet_train", diffusion_unet_train, DIFFUSION_UNET_TRAIN)
    check_group("diffusion_unet_inference", diffusion_unet_inference, DIFFUSION_UNET_INFERENCE)


def check_controlnet(controlnet_train: Mapping[str, Any], diffusion_unet_inference: Mapping[str, Any]) -> None:
    """The group of the training file of a ControlNet, and that by which it generates.

    Args:
        controlnet_train: the group of that name.
        diffusion_unet_inference: the group of that name.

    Raises:
        UserError: naming the knob, its value and what it should be.
    """
    check_group("controlnet_train", controlnet_train, CONTROLNET_TRAIN)
    check_group("diffusion_unet_inference", diffusion_unet_inference, DIFFUSION_UNET_INFERENCE)
