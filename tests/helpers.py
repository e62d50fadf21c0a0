"""What several tests share: small networks and volumes, workflows as a user starts them, processes to watch."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.common import errors
from scripts.data.datalist import load
from scripts.data.store import Store
from scripts.networks import diffusion_files
from scripts.networks.weights import write_tensors
from scripts.training.late import LateLosses

BESIDE = Path(__file__).resolve().parents[2] / "shared"  # data that tests use where it lies beside the project
REAL_CT, MODELS = BESIDE / "ct", BESIDE / "models"
SLURM = os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "munged")))

# A network for whole workflows, as overrides of a config; and one whose levels differ, for tests of its parts.
NETWORK = {"num_channels": [16, 16, 16], "num_res_blocks": [1, 1, 1], "norm_num_groups": 8}
SMALL = {f"autoencoder_def#{key}": value for key, value in NETWORK.items()}
STOCK = {
    "spatial_dims": 3, "in_channels": 1, "out_channels": 1, "latent_channels": 4, "num_channels": [16, 32, 32],
    "num_res_blocks": [1, 2, 1], "norm_num_groups": 8, "norm_eps": 1e-6, "attention_levels": [False, False, False],
    "num_splits": 1, "dim_split": 1,
}  # fmt: skip
TRAIN, MULTI_GPU = Path("configs/train.json"), Path("configs/multi_gpu_train.json")
TINY: dict[str, Any] = {
    **SMALL,
    "discriminator_def#channels": 8,
    "perceptual_pretrained": False,
    "num_workers": 0,
    "warmup_epochs": [],
    "warmup_factors": [],
    "lr_decay": 0,
    "ema_decay": 0,
    "discriminator_start": 0,
    "scale_equivariance": 0,
    "autoencoder_train#patch_size": [32, 32, 32],
    "autoencoder_train#val_sliding_window_patch_size": [32, 32, 32],
    "autoencoder_train#n_epochs": 2,
    "autoencoder_train#val_interval": 1,
}
SMALLEST: dict[str, Any] = TINY | {
    "autoencoder_def#num_channels": [4, 4, 4],
    "autoencoder_def#norm_num_groups": 4,
    "discriminator_def#channels": 2,
    "autoencoder_train#val_patch_size": [32, 32, 32],
}

# The same for latent diffusion: of two levels, so that latents of 8 x 4 x 4 will do.
TRAIN_DIFFUSION, MULTI_GPU_DIFFUSION = (Path(f"configs/{name}train_diffusion.json") for name in ("", "multi_gpu_"))
UNET = {
    "num_channels": [8, 16], "attention_levels": [False, True], "num_head_channels": [0, 8], "num_res_blocks": 1,
    "norm_num_groups": 8, "use_flash_attention": True,
}  # fmt: skip
TRAIN_CONTROLNET, MULTI_GPU_CONTROLNET = (Path(f"configs/{name}train_controlnet.json") for name in ("", "multi_gpu_"))
CONTROLNET = UNET | {"conditioning_embedding_in_channels": 8, "conditioning_embedding_num_channels": [4, 8, 8]}
TINY_DIFFUSION: dict[str, Any] = {
    **SMALL,
    **{f"diffusion_unet_def#{key}": value for key, value in UNET.items()},
    "num_workers": 0,
    "amp": False,
    "val_interval": 1,
    "val_draws": 2,
    "sample_interval": 0,
    "sample_count": 1,
    "diffusion_unet_inference#num_inference_steps": 2,
    "diffusion_unet_train#n_epochs": 2,
}
TINY_CONTROLNET: dict[str, Any] = {
    **{key: value for key, value in TINY_DIFFUSION.items() if not key.startswith("diffusion_unet_train")},
    **{f"controlnet_def#{key}": value for key, value in CONTROLNET.items()},
    "controlnet_train#n_epochs": 2,
}
LATENTS = {"training": [(8, 4, 4)] * 4 + [(8, 4, 6)] * 2, "validation": [(8, 4, 4), (8, 4, 6)]}

# What Fire, which takes words for Python, would change.
TRICKY = [
    "ct#2", "20261125", "2e3", "1", "true", "None", "[a, b]", "(1, 2)", "{a: b}", "'x'", "~user/x", "@key", "$HOME",
    "%file", "a b", " ", "ü/é", "\udcfc", "1_000", "0x10", "-", "a,b", "x=y", "lambda: 0", "...",
]  # fmt: skip


# Volumes


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    affine = np.diag([2.0, 2.0, 2.5, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def kept_phantoms(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The phantoms of version 0.3, 40 x 36 x 44 voxels of 8 x 8 x 9 mm, for tests whose bounds were found on them.

    Returns:
        a datalist: four to train, two to validate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept, affine = np.load("tests/runs/version_0_3/phantoms.npz"), oriented_affine("LPS", (8.0, 8.0, 9.0))
    entries = [
        {"image": str(save_nifti(folder / f"{name}.nii.gz", kept[name], affine)), "class": "ct"} for name in kept
    ]
    return {"training": entries[:4], "validation": entries[4:]}


def oriented_affine(axcodes: str, spacing: tuple[float, float, float]) -> np.ndarray:
    """An affine whose voxel axes point along `axcodes`, with an offset."""
    affine = np.zeros((4, 4))
    letters = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    for axis, code in enumerate(axcodes):
        world, sign = letters[code]
        affine[world, axis] = sign * spacing[axis]
    affine[:, 3] = [12.5, -30.0, 101.0, 1.0]
    return affine


def break_volume(datalist: Path, root: Path, nan: bool) -> str:
    """Convert all volumes into `root/store`, then spoil the second training volume's conversion; returns its path."""
    store, entries = Store(root / "store"), load(datalist)
    store.convert_missing(entries["training"] + entries["validation"], progress=False)
    stored = store.path(entries["training"][1])
    if nan:
        old = blosc2.open(str(stored))
        facts, shape = old.schunk.vlmeta["volume"], old.shape
        del old
        stored.unlink()
        data = np.full(shape, np.nan, np.float32)
        array = blosc2.asarray(data, urlpath=str(stored), mode="w", chunks=(32, 32, 32), blocks=(16, 16, 16))
        array.schunk.vlmeta["volume"] = facts
    else:
        stored.write_bytes(stored.read_bytes()[: stored.stat().st_size // 2])
    return entries["training"][1]["image"]


def make_latents(
    folder: Path, sizes: Mapping[str, Sequence[tuple[int, ...]]] | None = None, std: float = 1.0, **facts: Any
) -> Path:
    """Gaussian latents as configs/encode.json writes them, by split; the path of their datalist."""
    rng, lists, count = np.random.default_rng(0), {}, 0
    folder.mkdir(parents=True, exist_ok=True)
    for split, shapes in (sizes or LATENTS).items():
        lists[split] = []
        for shape in shapes:
            path = save_nifti(folder / f"v{count}_emb.nii.gz", rng.normal(0, std, (*shape, 4)).astype(np.float32))
            side = {"spacing": [1.5, 1.5, 2.0 + count], "modality": ("ct", "ct_contrast", "mri_t1")[count % 3]}
            side |= {"dim": [4 * n for n in shape], "weights_sha256": "ab" * 32}
            Path(f"{path}.json").write_text(json.dumps(side | facts))
            lists[split].append({"image": f"v{count}.nii.gz"})
            count += 1
    (folder / "datalist.json").write_text(json.dumps(lists))
    return folder / "datalist.json"


def told_of(path: str) -> tuple[torch.Tensor, list[float], int]:
    """Of a latent of `make_latents`, from its files: (C, X, Y, Z), spacing in mm and the number of the modality."""
    side = json.loads(Path(f"{path}.json").read_text())
    data = np.moveaxis(np.asarray(nib.load(path).dataobj, dtype=np.float32), -1, 0)
    numbers = json.loads(Path("configs/modality_mapping.json").read_text())
    return torch.from_numpy(data.copy()), side["spacing"], numbers[side["modality"]]


class Items(list):
    """What a `LatentDataset` gives, at hand, as a dataset."""

    data: list[dict] = property(lambda self: self)  # type: ignore[assignment]

    def sizes(self) -> list[tuple[int, ...]]:
        return [tuple(item["latent"].shape[1:]) for item in self]


def make_labelled(folder: Path, sizes: Sequence[tuple[int, ...]] | None = None, std: float = 1.0) -> Path:
    """Latents with label maps, as configs/encode.json writes them, the last two of fold 0; the path of the datalist."""
    shapes = sizes or [(8, 8, 8)] * 5 + [(8, 8, 16)] * 3
    make_latents(folder, {"training": shapes}, std)
    rng, entries = np.random.default_rng(1), []
    for number, shape in enumerate(shapes):
        labels = rng.choice(np.array([0, 1, 3, 23, 200], np.uint8), shape, p=[0.3, 0.2, 0.2, 0.1, 0.2])
        save_nifti(folder / f"v{number}_label.nii.gz", labels.repeat(4, 0).repeat(4, 1).repeat(4, 2))
        side = json.loads((folder / f"v{number}_emb.nii.gz.json").read_text())
        entry = {"image": f"v{number}_emb.nii.gz", "label": f"v{number}_label.nii.gz"}
        entry |= {key: side[key] for key in ("dim", "spacing", "modality")}
        entries.append(entry | {"fold": 0 if number >= len(shapes) - 2 else 1})
    (folder / "datalist_controlnet.json").write_text(json.dumps({"training": entries}))
    return folder / "datalist_controlnet.json"


# Networks and their weights


def stock_network(**changes: Any) -> AutoencoderKlMaisi:
    torch.manual_seed(0)
    network = AutoencoderKlMaisi(**{**STOCK, **changes})
    for name, parameter in network.named_parameters():  # norms that are not the identity, biases that are not 0
        if "norm" in name or "bias" in name or parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float("weight" in name), 0.3)
    return network


def small_unet(seed: int = 0, **changes: Any) -> DiffusionModelUNetMaisi:
    """With no convolution or bias that is 0, as several are in a fresh network."""
    shape = {"spatial_dims": 3, "in_channels": 4, "out_channels": 4, "num_class_embeds": 128, "resblock_updown": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given = {**shape, **UNET, "use_flash_attention": False, "include_spacing_input": True, "include_fc": True}
        network = DiffusionModelUNetMaisi(**given | changes)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def small_controlnet(seed: int = 0, **changes: Any) -> ControlNetMaisi:
    """With no convolution or bias that is 0, as a ControlNet's outputs are when it is fresh."""
    shape = {"spatial_dims": 3, "in_channels": 4, "num_class_embeds": 128, "resblock_updown": True, "include_fc": True}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ControlNetMaisi(**{**shape, **CONTROLNET, "use_flash_attention": False} | changes)
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


# Workflows in this process


def workflow(name: str | Path | list[str], initialize: bool = True, **overrides: Any) -> ConfigWorkflow:
    """That of a config, by its name or its files, as a user would start it."""
    files = f"configs/{name}.json" if isinstance(name, str) and not name.endswith(".json") else name
    kind = "train" if "train" in str(files) else "infer"
    started = ConfigWorkflow(files, workflow_type=kind, logging_file=False, **overrides)
    if initialize:
        started.initialize()
    return started


def run(name: str | Path | list[str], **overrides: Any) -> ConfigWorkflow:
    started = workflow(name, **overrides)
    started.run()
    started.finalize()
    return started


def last_line_of(name: str | Path | list[str], **overrides: Any) -> str:
    """What a workflow that must fail ends with."""
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        run(name, **overrides)
    return errors.last_line(caught.value)


def folders(root: Path, datalist: Path) -> dict[str, str]:
    names = {"model_dir": "models", "output_dir": "outputs", "tfevent_path": "outputs/tfevent_ct", "store_dir": "store"}
    return {key: str(root / name) for key, name in names.items()} | {"json_data_list": str(datalist)}


def diffusion_folders(root: Path, datalist: Path) -> dict[str, str]:
    return folders(root, datalist) | {"embedding_base_dir": str(datalist.parent)}


def controlnet_folders(root: Path, datalist: Path) -> dict[str, Any]:
    """As `diffusion_folders`, with the weights of a small UNet in the folder of the models."""
    (root / "models").mkdir(parents=True, exist_ok=True)
    unet = diffusion_files.content(small_unet(), diffusion_files.UNET, epoch=1, loss=1.0, scale_factor=1.25)
    write_tensors(unet, root / "models" / "diff_unet_3d_rflow-ct.pt")
    return folders(root, datalist) | {"data_base_dir": str(datalist.parent)}


def scalars(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


# Workflows in other processes


def words(overrides: dict[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", str(value))]


def torchrun(ranks: int, *command: str) -> list[str]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}", *command]


def call(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def printed_last(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


def processes(word: str) -> dict[int, dict[str, str]]:
    """Running processes with `word` in their command line: their environments."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and word in (folder / "cmdline").read_bytes().decode(errors="replace"):
                pairs = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(folder.name)] = dict(p.split("=", 1) for p in pairs if "=" in p)
        except OSError:
            continue
    return found


def guide_files(root: Path, datalist: Path, **environment: Any) -> list[str]:
    """configs/train.json, and the guide's environment, network and training files over it, made small."""
    network = {
        "spatial_dims": 3, "image_channels": 1, "latent_channels": 4, "include_body_region": False,
        "autoencoder_def": {
            **json.loads(TRAIN.read_text())["autoencoder_def"], **NETWORK, "norm_float16": True, "num_splits": 4,
        },
        "diffusion_unet_def": {"_target_": "not.there", "in_channels": "@latent_channels"},
    }  # fmt: skip
    network["autoencoder_def"].pop("save_mem")
    training = {key: json.loads(TRAIN.read_text())[key] for key in ("data_option", "autoencoder_train")}
    training["autoencoder_train"] |= {
        "patch_size": [32, 32, 32], "val_sliding_window_patch_size": [32, 32, 32], "n_epochs": 1, "val_interval": 1,
    }  # fmt: skip
    environment = {
        "model_dir": str(root / "my models"),
        "tfevent_path": str(root / "events"),
        "trained_autoencoder_path": None,
        "finetune": False,
        "json_data_list": str(datalist),
    } | environment
    files = {"env.json": environment, "network.json": network, "training.json": training}
    for name, content in files.items():
        (root / name).write_text(json.dumps(content))
    return [str(TRAIN), *(str(root / name) for name in files)]


def told(**losses: float) -> LateLosses:
    """The losses of a step, of one rank."""
    values = torch.tensor(list(losses.values()))
    return LateLosses(losses, values, values)


# Processes that begin where this one's imports ended: a server that has imported everything forks them.

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pytest", "monai.bundle", "tests.helpers", "tests.training.toy"])


def start(function: Callable[..., Any], *arguments: Any, log: Path, **environment: str) -> Any:
    """Start `function` in a session of its own, with what it prints in `log`; it ends as a program would."""
    process = _SERVER.Process(target=_child, args=(function, arguments, log, environment))
    process.start()
    return process


def _child(function: Callable[..., Any], arguments: tuple, log: Path, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # for data-loader workers, as in a program of its own
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ |= environment
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, force=True)
    try:
        function(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        sys.exit(1)


def start_ranks(count: int, function: Callable[..., Any], *arguments: Any, log: Path) -> list[Any]:
    """The same as `count` ranks of one group, without torchrun."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    if count == 1:
        return [start(function, *arguments, log=log)]
    ranks = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [start(function, *arguments, log=log, **environment) for environment in ranks]


def train_here(name: str, options: dict[str, Any], at: int = 0) -> None:
    """The training of a config, with its layer where there are ranks; it kills itself when iteration `at` begins."""
    layers = [f"configs/{name}.json", *([f"configs/multi_gpu_{name}.json"] if "RANK" in os.environ else [])]
    started: Any = workflow(layers, **options)
    if at:
        started.trainer.add_event_handler(
            Events.ITERATION_STARTED(once=at), lambda _: os.kill(os.getpid(), signal.SIGKILL)
        )
    started.run()
    started.finalize()


def finish(processes: list[Any], log: Path, status: int = 0) -> str:
    """Wait until all have ended with `status`; what they printed."""
    for process in processes:
        process.join(300)
    printed = log.read_text()
    assert [process.exitcode for process in processes] == [status] * len(processes), printed[-3000:]
    return printed


def finish_killed(processes: list[Any]) -> None:
    """Wait until all have killed themselves, and end their data-loader workers."""
    for process in processes:
        process.join(60)
    kill(processes)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * len(processes)


def assert_equal_logs(one: Path, other: Path, *wanted: str) -> None:
    """In both event folders every step once, with the same value, and as many pictures; `wanted` are tags to be there.

    What tells of speed may differ.
    """
    logs = [scalars(folder) for folder in (one, other)]
    tags = {tag for tag in logs[0].Tags()["scalars"] if not tag.endswith(("data_wait_share", "_per_second"))}
    assert set(wanted) <= tags
    for tag in tags:
        values = [[(event.step, event.value) for event in log.Scalars(tag)] for log in logs]
        assert values[0] == values[1] and len({step for step, _ in values[0]}) == len(values[0]), tag
    pictures = [{tag: [(e.step, e.encoded_image_string) for e in log.Images(tag)] for tag in log.Tags()["images"]}
                for log in logs]  # fmt: skip
    assert pictures[0] == pictures[1]


def kill(processes: list[Any], number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to all, and to the data-loader workers that they have started."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def until(condition: Callable[[], bool], processes: list[Any], seconds: float = 120) -> None:
    """Wait until `condition` holds or one of the processes has ended."""
    limit = time.monotonic() + seconds
    while not condition() and all(process.exitcode is None for process in processes):
        assert time.monotonic() < limit
        time.sleep(0.02)
