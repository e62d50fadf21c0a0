"""Everything that can be checked before the first training step, and the table of what will run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import ignite.distributed as idist
import torch
from monai.bundle import ConfigParser
from monai.bundle.utils import ID_SEP_KEY, merge_kv
from torch import nn

from scripts import datalist as datalists
from scripts.errors import UserError
from scripts.memory import available
from scripts.trainer import amp_dtype
from scripts.volumes import prepare
from scripts.weights import check_weights, read_weights

DATA_OPTION = ("random_aug", "spacing_type", "spacing", "select_channel")
AUTOENCODER_TRAIN = (
    "batch_size", "patch_size", "val_batch_size", "val_patch_size", "val_sliding_window_patch_size", "lr",
    "perceptual_weight", "kl_weight", "adv_weight", "recon_loss", "val_interval", "cache", "amp", "n_epochs",
)  # fmt: skip
_RUN_ARGUMENTS = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")
_WORKFLOW = ("initialize", "run", "finalize")  # lists that MONAI runs
_POSITIVE_INTEGERS = ("batch_size", "val_batch_size", "val_interval", "n_epochs")
_SIZES = ("patch_size", "val_patch_size", "val_sliding_window_patch_size")
# A training step costs 14.4 MFLOP a voxel with MAISI's [64, 128, 256], a forward pass 4.3.
_FORWARD_SHARE = 0.3
_VALIDATION_BYTES = 4 * 8  # image, padded image, reconstruction, weights, and SSIM's: eight float32 a voxel


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Refuse a misspelt `--key` or a misspelt key in a later config file, which MONAI would accept silently.

    Keys of later files that resemble no key of the first are let pass: the network file of NV-Generate-CTMR
    brings definitions that nothing here refers to.

    Args:
        argv: the command line, `sys.argv` where it is None; nothing is checked unless it runs `monai.bundle`.
    """
    argv = sys.argv if argv is None else argv
    options = _options(argv)
    if "config_file" not in options:
        return
    files = [f.strip(" '\"") for f in options["config_file"].strip("[]() ").split(",")]
    configs = [ConfigParser.load_config_file(f) for f in files if Path(f).is_file()]
    if not configs:
        return
    parser = ConfigParser(dict(configs[0]))
    for file, config in zip(files[1:], configs[1:], strict=False):
        for key in config:
            name = key.lstrip("+")
            if name not in _WORKFLOW and name not in parser and (close := _close(name, parser, 0.85)):
                raise UserError(f"{file}: unknown key {name!r}; did you mean {close!r}?")
        for key, value in config.items():
            merge_kv(parser, key, value)
    for key in options:
        if key not in _RUN_ARGUMENTS and key not in parser:
            close = _close(key, parser, 0.75)
            hint = f"did you mean --{close}?" if close else "the config file lists the keys"
            raise UserError(f"--{key}: no such key in {', '.join(files)}; {hint}")


def _options(argv: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for index, word in enumerate(argv):
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else ""
            options[key] = value if equals else following
    return options


def _close(key: str, parser: ConfigParser, likeness: float) -> str | None:
    """The known key that `key` resembles, at its own depth."""
    separator = "#" if "#" in key else ID_SEP_KEY
    *parents, last = key.split(separator)
    group = parser.get(ID_SEP_KEY.join(parents), None) if parents else parser.get()
    names = [k for k in group if not k.startswith("_")] if isinstance(group, dict) else []
    matches = get_close_matches(last, names, n=1, cutoff=likeness)
    return separator.join([*parents, matches[0]]) if matches else None


def check_knobs(data_option: Mapping[str, Any], autoencoder_train: Mapping[str, Any], factor: int) -> None:
    """Names, types and ranges of the two groups of the training file.

    Args:
        data_option: the group of that name.
        autoencoder_train: the group of that name.
        factor: what patch sizes must be multiples of.

    Raises:
        UserError: naming the knob, its value and what it should be.
    """
    for group, knobs, known in (
        ("data_option", data_option, DATA_OPTION),
        ("autoencoder_train", autoencoder_train, AUTOENCODER_TRAIN),
    ):
        for name in knobs:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"the knobs are {', '.join(known)}"
                raise UserError(f"{group}: unknown knob {name!r}; {hint}")
        missing = [name for name in known if name not in knobs]
        if missing:
            raise UserError(f"{group}: {missing[0]!r} is missing (a layer replaces a group whole); add it")
    for name in _POSITIVE_INTEGERS:
        value = autoencoder_train[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"autoencoder_train#{name} is {value!r}; use an integer of at least 1")
    for name in ("lr", "kl_weight", "perceptual_weight", "adv_weight"):
        value = autoencoder_train[name]
        if not isinstance(value, (int, float)) or not 0 <= value < float("inf") or (name == "lr" and value == 0):
            raise UserError(
                f"autoencoder_train#{name} is {value!r}; use a number {'above' if name == 'lr' else 'from'} 0"
            )
    for name in _SIZES:
        _check_size(f"autoencoder_train#{name}", autoencoder_train[name], factor, optional=name != "patch_size")
    if autoencoder_train["val_batch_size"] > 1 and autoencoder_train["val_patch_size"] is None:
        raise UserError(
            f"autoencoder_train#val_batch_size is {autoencoder_train['val_batch_size']}, but whole volumes differ in "
            "size; use 1, or set val_patch_size"
        )


def _check_size(name: str, size: Any, factor: int, optional: bool) -> None:
    if size is None and optional:
        return
    if not isinstance(size, (list, tuple)) or len(size) != 3 or not all(isinstance(n, int) and n > 0 for n in size):
        raise UserError(f"{name} is {size!r}; use three positive integers")
    if any(n % factor for n in size):
        below = [max(n // factor, 1) * factor for n in size]
        raise UserError(f"{name} is {list(size)}, not divisible by the network's factor {factor}; use e.g. {below}")


def check_windows(window: Any, overlap: Any, factor: int) -> None:
    """The window and the overlap of whole-volume workflows; as `check_knobs` does those of training."""
    _check_size("val_sliding_window_patch_size", window, factor, optional=True)
    if not isinstance(overlap, (int, float)) or not 0 <= overlap < 1:
        raise UserError(f"val_overlap is {overlap!r}; use a number from 0 up to below 1, e.g. 0.25")


def check_patch(patch_size: Sequence[int], discriminator: nn.Module) -> None:
    """Whether the discriminator's strides leave anything of a patch (tried on PyTorch's meta device, at no cost)."""
    try:
        with torch.device("meta"), torch.no_grad():
            state = {name: torch.empty_like(t, device="meta") for name, t in discriminator.state_dict().items()}
            torch.func.functional_call(discriminator, state, (torch.empty(1, 1, *patch_size),))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"autoencoder_train#patch_size is {list(patch_size)}, too small for the discriminator; use at least 32 "
            "along each axis, or lower discriminator_def#num_layers_d"
        ) from error


def load_split(json_data_list: str | Sequence[str], split: str, base_dir: str | None = None) -> list[dict[str, str]]:
    """The entries of one split of a datalist, which must not be empty; relative paths are those under `base_dir`."""
    path = json_data_list if isinstance(json_data_list, str) else json_data_list[0]
    return datalists.require(datalists.load(path, base_dir), split, path)


def check_start(autoencoder: nn.Module, finetune: bool, trained_autoencoder_path: str | None) -> None:
    """Whether the weights to fine-tune from are given, readable and of this architecture."""
    if finetune and not trained_autoencoder_path:
        raise UserError(
            f"finetune is true, but trained_autoencoder_path is {trained_autoencoder_path}; give the weights to "
            "start from, or set finetune to false"
        )
    if finetune:
        check_weights(autoencoder, read_weights(str(trained_autoencoder_path)), str(trained_autoencoder_path))


def check_built(*parts: object) -> None:
    """Building the parts is the check: their constructors refuse what is wrong, before any volume is converted."""
    assert all(part is not None for part in parts)


def prepare_folders(*folders: str) -> None:
    """Make the output folders; a UserError where that cannot be."""
    for folder in map(Path, folders):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error


def prepare_data(
    splits: Mapping[str, Sequence[Mapping[str, str]]],
    store_dir: str,
    select_channel: int,
    num_workers: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Check the headers of all volumes, then convert what is missing, each of `num_ranks` its share."""
    entries = [entry for split in splits.values() for entry in split]
    if rank == 0:
        datalists.check_headers(entries)
        for sentence in datalists.shared_volumes({name: [dict(e) for e in split] for name, split in splits.items()}):
            print(f"warning: {sentence}; what is measured on it is too good", file=sys.stderr)
    idist.barrier()
    prepare(entries[rank::num_ranks], store_dir, select_channel, max(num_workers, 1), progress=rank == 0)
    idist.barrier()


def check_disk(trainer: Any, model_dir: str) -> float:
    """Whether weights and checkpoint fit on the disk, once more than they are there already.

    Returns:
        what they take there, in GB.

    Raises:
        UserError: naming the folder and both sizes.
    """
    sizes = [4 * sum(p.numel() for p in net.parameters()) for net in (trainer.network, trainer.judge)]
    checkpoint = 3 * sum(sizes)  # Adam holds two more values for each weight
    total = 2 * sizes[0] + sizes[1] + checkpoint
    there = sum(f.stat().st_size for f in Path(model_dir).glob("*.pt"))
    need, free = max(total - there, 0) + checkpoint, shutil.disk_usage(model_dir).free
    if need > free:
        raise UserError(
            f"{model_dir}: weights and checkpoint need {need / 1e9:.3f} GB, but {free / 1e9:.3f} GB is free; free "
            "space or choose another model_dir"
        )
    return total / 1e9


def print_table(
    trainer: Any, evaluator: Any, amp: bool, patch_size: Sequence[int], model_dir: str, num_ranks: int = 1
) -> None:
    """What will run: volumes, steps, parameters, precision, devices, disk, memory, and the cost of a validation."""
    voxels = float(torch.tensor(patch_size).prod()) * trainer.data_loader.batch_size * num_ranks
    volumes = evaluator.data_loader.dataset
    voxels_of = [volumes.voxels(i) for i in range(len(volumes))]
    validation = sum(voxels_of) / (1 - evaluator.inferer.overlap) ** 3
    memory = max(voxels_of) * _VALIDATION_BYTES
    if 0 < available() < memory:
        print(
            f"warning: validating the largest volume takes about {memory / 1e9:.1f} GB of memory, and "
            f"{available() / 1e9:.1f} GB is left; set autoencoder_train#val_patch_size",
            file=sys.stderr,
        )
    parameters = [
        sum(p.numel() for p in net.parameters()) / 1e6 for net in (trainer.autoencoder, trainer.discriminator)
    ]
    device = trainer.state.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    batch = f"batch {trainer.data_loader.batch_size}" + (f" on each of {num_ranks} ranks" if num_ranks > 1 else "")
    rows = {
        "volumes": f"{len(trainer.data_loader.dataset)} to train, {len(evaluator.data_loader.dataset)} to validate",
        "epochs": f"{trainer.state.max_epochs} of {trainer.state.epoch_length} steps",
        "patch": f"{' x '.join(map(str, patch_size))}, {batch}",
        "parameters": f"autoencoder {parameters[0]:.2f} M, discriminator {parameters[1]:.2f} M",
        "computed in": f"{str(amp_dtype(device, amp)).removeprefix('torch.')} on {name}",
        "disk": f"{check_disk(trainer, model_dir):.2f} GB for weights and checkpoint in {model_dir}",
        "memory": f"about {memory / 1e9:.1f} GB on the host for the largest volume to validate",
        "a validation": f"costs about {max(validation * _FORWARD_SHARE / voxels, 1):.0f} training steps",
    }
    print("\n".join(f"{key:<14}{text}" for key, text in rows.items()), flush=True)
