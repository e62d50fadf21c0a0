from __future__ import annotations

import json

import pytest

from scripts.common.errors import UserError
from scripts.training.knobs import check_knobs
from tests.helpers import TRAIN


def groups() -> tuple[dict, dict]:
    config = json.loads(TRAIN.read_text())
    return config["data_option"], config["autoencoder_train"]


def test_the_shipped_knobs_pass() -> None:
    check_knobs(*groups(), factor=4)


@pytest.mark.parametrize(
    ("knob", "value", "message"),
    [
        ("lr", -1e-4, "autoencoder_train#lr is -0.0001; use a number above 0"),
        ("lr", "fast", "lr is 'fast'"),
        ("n_epochs", 0, "autoencoder_train#n_epochs is 0; use an integer of at least 1"),
        ("batch_size", 1.5, "batch_size is 1.5"),
        (
            "patch_size",
            [96, 96, 90],
            r"patch_size is \[96, 96, 90\], not divisible by the network's factor 4; use e.g. \[",
        ),
        ("patch_size", [96, 96], "use three positive integers"),
        ("patch_size", None, "patch_size is None"),
        ("val_sliding_window_patch_size", [96, 96, 62], "val_sliding_window_patch_size .* not divisible"),
        ("kl_weight", float("nan"), "kl_weight is nan"),
        ("val_batch_size", 2, "val_batch_size is 2, but whole volumes differ in size"),
        ("patchsize", [96, 96, 96], "autoencoder_train: unknown knob 'patchsize'; did you mean 'patch_size'"),
    ],
)
def test_bad_knobs_are_named(knob: str, value: object, message: str) -> None:
    data_option, autoencoder_train = groups()
    with pytest.raises(UserError, match=message):
        check_knobs(data_option, autoencoder_train | {knob: value}, factor=4)


def test_a_missing_knob_is_named() -> None:
    data_option, autoencoder_train = groups()
    del autoencoder_train["kl_weight"]
    with pytest.raises(UserError, match="autoencoder_train: 'kl_weight' is missing"):
        check_knobs(data_option, autoencoder_train, factor=4)
