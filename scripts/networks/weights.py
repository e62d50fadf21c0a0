"""Weights in and out of files, and which file to use."""

from __future__ import annotations

import hashlib
import logging
import os
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts.common.errors import UserError, reason
from scripts.common.files import whole
from scripts.common.ranks import gather
from scripts.networks.state_dicts import find

logger = logging.getLogger(__name__)

AUTOENCODER, BEST, RELEASED = "autoencoder.pt", "autoencoder_best_epoch{}.pt", "model.pt"
_REMEDY, _DEFINITION = "correct trained_autoencoder_path, or set finetune to false in a training", "autoencoder_def"


def save_weights(network: nn.Module, path: str | Path) -> None:
    """Write a plain float32 state dict, which MONAI's own network loads with `strict=True`; never half a file."""
    write_tensors(plain_state(network), path)


def plain_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's state dict, float32 on the CPU."""
    return {name: tensor.detach().float().cpu() for name, tensor in network.state_dict().items()}


def write_tensors(content: dict[str, Any], path: str | Path) -> None:
    """`torch.save`, to the disk: there is always the whole old file or the whole new one."""
    with whole(path, "free space or choose another model_dir") as part, part.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def read_tensors(file: str | Path | BytesIO, refusal: str, remedy: str = "") -> Any:
    """What `torch.save` wrote, on the CPU: tensors in plain containers. Nothing that could run code is loaded.

    Args:
        file: its path or its content.
        refusal: what the error says, before its reason.
        remedy: what it says after that.

    Raises:
        UserError: where the file is damaged or holds anything else.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever unpickling a damaged file leads to
        raise UserError(f"{refusal} ({reason(error)}){remedy}") from error


def read_weights(
    network: nn.Module, path: str | Path, remedy: str = _REMEDY, definition: str = _DEFINITION
) -> dict[str, torch.Tensor]:
    """A network's state dict out of a weights file: plain, nested or prefixed, as trainers save it.

    Args:
        network: whose weights are wanted; stays as it is.
        path: of the file.
        remedy: what the error says where there is no such file.
        definition: the config's key of the network, which errors name.

    Returns:
        what `network.load_state_dict` takes, in the network's data types, on the CPU.

    Raises:
        UserError: where the file is missing, damaged or holds anything but tensors; where it holds no such weights,
            naming the first parameter that is missing, unknown or of another shape; where they are not finite.
    """
    return _state(network, _everything(_bytes(path, remedy), path), path, definition)


def _bytes(path: str | Path, remedy: str) -> bytes:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file; {remedy}")
    return Path(path).read_bytes()


def _everything(content: bytes, path: str | Path) -> Any:
    return read_tensors(BytesIO(content), f"{path}: is damaged or holds more than tensors, so it is not loaded")


def _state(network: nn.Module, everything: Any, path: str | Path, definition: str) -> dict[str, torch.Tensor]:
    place = find(everything, network.state_dict(), path, definition)
    if not place.plain:
        logger.info("%s: the weights are %s", path, place)
    return dict(place.tensors)


def load_file(
    network: nn.Module, path: str | Path, remedy: str = _REMEDY, definition: str = _DEFINITION
) -> tuple[Any, str]:
    """Load weights, strictly; the file is read once, since a training may replace it. See `read_weights`.

    Returns:
        all that the file holds, on the CPU, and its SHA-256, hexadecimal.

    Raises:
        UserError: as of `read_weights`.
    """
    content = _bytes(path, remedy)
    everything = _everything(content, path)
    network.load_state_dict(_state(network, everything, path, definition))
    logger.info("weights loaded from %s", path)
    return everything, hashlib.sha256(content).hexdigest()


def load_weights(network: nn.Module, path: str | Path) -> str:
    """Load an autoencoder's weights, strictly.

    Returns:
        the file's SHA-256, hexadecimal.

    Raises:
        UserError: as of `read_weights`.
    """
    return load_file(network, path)[1]


class Weights:
    """The weights that a workflow uses: given ones, or else what a training left in `model_dir`.

    Args:
        network: takes them, strictly. One without parameters needs none.
        model_dir: searched where no path is given: the newest of `autoencoder_best_epoch*.pt`, else
            `autoencoder.pt`, else `model.pt` (the released weights).
        trained_autoencoder_path: the file to use, or None.

    Attributes:
        network: with the weights in it.
        path: of the file; None where the network has no parameters.
        sha256: of the file, hexadecimal.

    Raises:
        UserError: where there is no such file, or it does not fit the network.
    """

    def __init__(self, network: nn.Module, model_dir: str | Path, trained_autoencoder_path: str | None = None) -> None:
        self.network, self.path, self.sha256 = network, None, None
        if not network.state_dict():
            logger.info("the network has no parameters: no weights are loaded")
            return
        self.path = Path(trained_autoencoder_path) if trained_autoencoder_path else _newest(Path(model_dir))
        self.sha256 = load_weights(network, self.path)
        if len(set(gather(self.sha256))) > 1:
            raise UserError(f"{self.path}: the ranks read different weights; give trained_autoencoder_path")

    def facts(self) -> dict[str, str | None]:
        """Which weights these are, for what is written with results."""
        return {"weights": None if self.path is None else str(self.path), "weights_sha256": self.sha256}


def _newest(folder: Path) -> Path:
    """The newest of a training's best weights, else its last ones, else the released ones."""
    best = sorted(folder.glob(BEST.format("*")), key=lambda path: (path.stat().st_mtime_ns, path.name))
    candidates = [*best[-1:], folder / AUTOENCODER, folder / RELEASED]
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(
        f"{folder}: holds no weights ({BEST.format('*')}, {AUTOENCODER} or {RELEASED}); train first, give "
        "trained_autoencoder_path, or fetch the released ones with python -m monai.bundle download_large_files "
        "--bundle_path ."
    )
