"""Train with the guide's three files: python scripts/train_vae_ct.py -e ENV -c NETWORK -t TRAINING -g N

Further `--key value` pairs override the configuration, e.g. `--autoencoder_train#n_epochs 300`. With N > 1 it starts
torchrun itself; under torchrun it joins. On several nodes, start it on each with NNODES, MASTER_ADDR and MASTER_PORT
set. Relative paths, also those in the files, are relative to the bundle's root.
"""

from __future__ import annotations

import argparse
import codecs
import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousTimeoutError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.common import errors  # noqa: E402
from scripts.common.errors import UserError  # noqa: E402
from scripts.common.ranks import RENDEZVOUS, cannot_meet, usable_gpus  # noqa: E402
from scripts.training.signals import SIGNALS, STATUS  # noqa: E402

PATIENCE = 40  # seconds from a signal to the kill of a rank that does not end
BASE, MULTI_GPU = "configs/train.json", "configs/multi_gpu_train.json"


def at_home(path: str) -> str:
    """A path with ~ replaced, which a shell leaves alone within quotes and after an equals sign."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's refuses the home of a user that is not known)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own options, and the overrides for the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.allow_abbrev = False
    for short, name, what in (
        ("-e", "--environment-file", "where things are: model_dir, tfevent_path, json_data_list, ..."),
        ("-c", "--config-file", "the networks: autoencoder_def, ..."),
        ("-t", "--training-config", "the knobs: data_option and autoencoder_train"),
    ):
        parser.add_argument(short, name, required=True, type=at_home, metavar="FILE", help=what)
    parser.add_argument("-g", "--gpus", type=int, default=1, metavar="N", help="processes on this node, one for a GPU")
    options, overrides = parser.parse_known_args(argv)
    for file in (options.environment_file, options.config_file, options.training_config):
        if not Path(file).is_file():
            raise UserError(f"{file}: no such configuration file; docs/examples has one of each kind")
    return options, overrides


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
        why = f"not all of {nodes} nodes came" if late else errors.reason(error.__cause__ or error)
        raise cannot_meet(why) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == STATUS:
            sys.exit(STATUS)
        hint = "; most often the machine was out of memory" if failure.exitcode == -9 else ""
        told: Any = failure.message  # what the rank wrote down (scripts/common/errors.py), or torchrun's own sentence
        message = told["message"] if isinstance(told, dict) else told
        raise UserError(f"rank {rank}: {message.removeprefix('error: ')}{hint}") from None


def main() -> None:
    errors.install()
    options, overrides = parse(sys.argv[1:])
    given = (options.environment_file, options.config_file, options.training_config)
    files = [str(without_mark(Path(file).resolve())) for file in given]
    os.chdir(ROOT)
    joined = "LOCAL_RANK" in os.environ
    if joined and options.gpus != int(os.environ["LOCAL_WORLD_SIZE"]) and os.environ["LOCAL_RANK"] == "0":
        print(f"--gpus {options.gpus}: torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes, which it is")
    if not joined:
        check_gpus(options.gpus)
    several = joined or options.gpus > 1 or os.environ.get("NNODES", "1") != "1"
    layers = [BASE, *files, *([MULTI_GPU] if several else [])]
    command = ["-m", "monai.bundle", "run", "--config_file", repr(layers), *overrides]
    if several and not joined:
        launch(options.gpus, command)
    else:
        os.execv(sys.executable, [sys.executable, "-W", "ignore", *command])


if __name__ == "__main__":
    main()
