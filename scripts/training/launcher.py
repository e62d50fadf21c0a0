"""Trainings by NV-Generate-CTMR's three files, in as many processes as there are GPUs to use."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

from scripts.common import errors
from scripts.common.errors import UserError, reason
from scripts.common.files import read_json
from scripts.common.ranks import RENDEZVOUS, cannot_meet, usable_gpus
from scripts.training.signals import SIGNALS, STATUS

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 40  # seconds from a signal to the kill of a rank that does not end
EPILOG = """\
Further `--key value` pairs override the configuration, e.g. `--seed 3`. With N > 1 it starts torchrun itself; under
torchrun it joins. On several nodes, start it on each with NNODES, MASTER_ADDR and MASTER_PORT set. Relative paths
within the files and in overrides are relative to the bundle's root.
"""


class Kind(NamedTuple):
    """What one of the files given as -c and -t is."""

    option: str  # the long form of its option
    key: str  # that only files of this kind have
    holds: str  # for --help


@dataclass(frozen=True)
class Door:
    """What a training's script is called with, and what it runs; the paths are relative to the bundle's root."""

    description: str  # for --help
    config: str
    multi_gpu: str  # the layer for several processes
    c: Kind
    t: Kind


def at_home(path: str) -> str:
    """A path with ~ replaced, which a shell leaves alone within quotes and after an equals sign."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's refuses the home of a user that is not known)


def parse(door: Door, argv: Sequence[str]) -> tuple[list[Path], int, list[str]]:
    """What a command line says: the files in the order of -e, -c and -t, how many processes, and the overrides.

    Raises:
        UserError: where a file is not there; as `in_order`.
    """
    parser = argparse.ArgumentParser(
        description=door.description, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.allow_abbrev = False
    for short, names, what in (
        ("-e", ("--environment-file", "--env_config_path"), "where things are: model_dir, json_data_list, ..."),
        ("-c", (door.c.option,), door.c.holds),
        ("-t", (door.t.option,), door.t.holds),
    ):
        parser.add_argument(short, *names, dest=short[1], required=True, type=at_home, metavar="FILE", help=what)
    what = "processes on this node, one for a GPU"
    parser.add_argument("-g", "--gpus", "--num_gpus", dest="gpus", type=int, default=1, metavar="N", help=what)
    options, overrides = parser.parse_known_args(argv)
    for file in (options.e, options.c, options.t):
        if not Path(file).is_file():
            raise UserError(f"{file}: no such configuration file; docs/examples has one of each kind")
    return in_order(door, [Path(options.e), Path(options.c), Path(options.t)]), options.gpus, overrides


def in_order(door: Door, files: Sequence[Path]) -> list[Path]:
    """The environment file and those of -c and -t, these two put right, with a line that says so, where swapped.

    Raises:
        UserError: where a file is of another training, or cannot be read.
    """
    contents = {file: content(file) for file in files}
    check_training(door, contents)
    env, c, t = files
    of_c, of_t = contents[c].keys(), contents[t].keys()
    if door.t.key in of_c and door.c.key in of_t and not (door.c.key in of_c or door.t.key in of_t):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"-c {c} holds {door.t.key}, -t {t} holds {door.c.key}: taken the other way round", file=sys.stderr)
        return [env, t, c]
    return [env, c, t]


def check_training(door: Door, contents: Mapping[Path, Mapping[str, Any]]) -> None:
    """Whether the files are of this training: its knobs are the one group of theirs that is called `..._train`.

    Raises:
        UserError: naming the file that has another's, where none has this one's; MONAI would train by the defaults.
    """
    own = next(kind.key for kind in (door.c, door.t) if kind.key.endswith("_train"))
    found = {key: file for file, keys in contents.items() for key in keys if key.endswith("_train")}
    if found and own not in found:
        other, file = next(iter(found.items()))
        raise UserError(f"{file}: holds {other}, not {own}; give the file of this training, or start the other")


def content(file: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing of a YAML file, which MONAI takes too.

    Raises:
        UserError: where it cannot be read as one.
    """
    if file.suffix.lower() != ".json":
        return {}
    try:
        found = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); docs/examples has one of each kind") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: is no JSON object; docs/examples has one of each kind")
    return found


def without_mark(file: Path) -> Path:
    """The file, or a temporary copy in UTF-8 where it begins with a byte-order mark, which MONAI cannot read."""
    content = file.read_bytes()
    if not content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return file
    copy = Path(tempfile.mkdtemp(prefix="maisi_ct_")) / file.name
    copy.write_text(content.decode(json.detect_encoding(content)), encoding="utf-8")
    return copy


def check_gpus(gpus: int) -> None:
    """Whether there is a GPU for each process, or a core where there is no GPU.

    Raises:
        UserError: naming how many there are; as `usable_gpus`.
    """
    shown, cores = usable_gpus(), os.cpu_count() or 1
    if gpus < 1:
        raise UserError(f"--gpus {gpus}: use 1 or more")
    if 0 < shown < gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise UserError(f"--gpus {gpus}: there are {shown} GPUs (CUDA_VISIBLE_DEVICES {visible}); ask for as many")
    if shown == 0 and gpus > cores:
        raise UserError(f"--gpus {gpus}: there is no GPU, and {cores} CPU cores carry {cores} processes; ask for fewer")


def free_port() -> int:
    """MASTER_PORT, or a free port where it is not set; a UserError where it is taken."""
    wanted = os.environ.get("MASTER_PORT", "0")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(wanted)))
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(f"MASTER_PORT {wanted} cannot be used ({error}); unset it to get a free one") from error
        return probe.getsockname()[1]


def launch(gpus: int, command: Sequence[str]) -> None:
    """Run `command` in `gpus` processes of torchrun; a rank's own error becomes the last line."""
    nodes = int(os.environ.get("NNODES", "1"))
    options = [f"--nnodes={nodes}", f"--nproc-per-node={gpus}"]
    if nodes == 1:
        options += ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    else:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"NNODES is {nodes}, but {name} is not set; set it to the first node's, on every node")
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        run_id = os.environ.get("SLURM_JOB_ID", "maisi_ct_autoencoder")
        options += ["--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={run_id}"]
        options += [f"--rdzv-conf=read_timeout={RENDEZVOUS.seconds}"]
    options += ["--signals-to-handle=" + ",".join(s.name for s in SIGNALS), f"--shutdown-timeout={PATIENCE}"]
    threads = max((os.cpu_count() or 1) // gpus, 1) if torch.cuda.device_count() == 0 else 1
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    try:
        torchrun.run(torchrun.parse_args([*options, *command]))
    except SignalException as stop:
        print(f"stopped by {stop.sigval.name}; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(STATUS)
    except RendezvousError as error:
        late = isinstance(error, RendezvousTimeoutError)
        why = f"not all of {nodes} nodes came" if late else reason(error.__cause__ or error)
        raise cannot_meet(why) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == STATUS:
            sys.exit(STATUS)
        hint = "; most often the machine was out of memory" if failure.exitcode == -9 else ""
        told: Any = failure.message  # what the rank wrote down (scripts/common/errors.py), or torchrun's own sentence
        message = told["message"] if isinstance(told, dict) else told
        raise UserError(f"rank {rank}: {message.removeprefix('error: ')}{hint}") from None


def main(door: Door) -> None:
    """Become the training that the command line asks for, or start it in several processes."""
    errors.install()
    given, gpus, overrides = parse(door, sys.argv[1:])
    files = [str(without_mark(file.resolve())) for file in given]
    os.chdir(ROOT)
    joined = "LOCAL_RANK" in os.environ
    if joined and gpus != int(os.environ["LOCAL_WORLD_SIZE"]) and os.environ["LOCAL_RANK"] == "0":
        print(f"--gpus {gpus}: torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, which it is")
    if not joined:
        check_gpus(gpus)
    several = joined or gpus > 1 or os.environ.get("NNODES", "1") != "1"
    layers = [door.config, *files, *([door.multi_gpu] if several else [])]
    command = ["-m", "monai.bundle", "run", "--config_file", repr(layers), *overrides]
    if several and not joined:
        launch(gpus, command)
    else:
        os.execv(sys.executable, [sys.executable, "-W", "ignore", *command])
