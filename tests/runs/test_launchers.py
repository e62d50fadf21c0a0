"""The launchers: several processes, chosen GPUs, and Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

from scripts.common.errors import UserError
from scripts.training import launcher
from tests.helpers import SLURM, TINY, call, folders, last_line_of, printed_last, processes, run, torchrun, words

EXAMPLES = Path("docs/examples")
GUIDE = [
    "-e", str(EXAMPLES / "environment_maisi_vae_train.json"),
    "-c", str(EXAMPLES / "config_network.json"),
    "-t", str(EXAMPLES / "config_maisi_vae_train.json"),
]  # fmt: skip
TRAININGS = sorted(path.stem.removeprefix("train_") for path in Path("scripts").glob("train_*.py"))
LAUNCHER = [sys.executable, "scripts/train_vae_ct.py", *GUIDE]
SHORT = TINY | {"autoencoder_def#num_channels": [8, 8, 8], "autoencoder_train#n_epochs": 1}


def validation(folder: Path) -> dict[str, float]:
    return torch.load(folder / "models" / "checkpoint.pt", weights_only=True)["validations"][-1]


@pytest.mark.slow
def test_validation_is_shared_out_exactly_by_the_guides_call(datalist: Path, tmp_path: Path) -> None:
    content = json.loads(datalist.read_text())
    content["validation"].append(content["training"][0])
    odd = tmp_path / "odd.json"
    odd.write_text(json.dumps(content))
    one, two = tmp_path / "one", tmp_path / "two"
    still = SHORT | {"autoencoder_train#amp": False, "autoencoder_train#lr": 1e-30}
    run("train", **still, **folders(one, odd))
    done = call([*LAUNCHER, "-g", "2", *words(still | folders(two, odd))])
    assert done.returncode == 0, done.stderr[-2000:]
    assert validation(one) == pytest.approx(validation(two), rel=1e-6, abs=1e-6)


@pytest.mark.slow
def test_under_torchrun_the_script_joins(datalist: Path, tmp_path: Path) -> None:
    options = words(SHORT | folders(tmp_path, datalist))
    done = call([*torchrun(2, "scripts/train_vae_ct.py", *GUIDE, "-g", "2"), *options])
    assert done.returncode == 0, done.stderr[-2000:]
    assert validation(tmp_path)["psnr"] > 0


def test_a_killed_rank_ends_the_run(datalist: Path, tmp_path: Path) -> None:
    options = SHORT | {"autoencoder_train#n_epochs": 1000, "val_interval": 1000} | folders(tmp_path, datalist)
    log = tmp_path / "log"
    with log.open("w") as stream:
        running = subprocess.Popen([*LAUNCHER, "-g", "2", *words(options)], stdout=stream, stderr=stream)
    limit = time.monotonic() + 200
    while "epoch 2/1000" not in log.read_text() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    assert running.poll() is None, log.read_text()[-2000:]
    ranks = {env["RANK"]: pid for pid, env in sorted(processes(str(tmp_path)).items(), reverse=True) if "RANK" in env}
    os.kill(ranks["1"], signal.SIGKILL)
    assert running.wait(60) == 1
    assert "SIGKILL" in log.read_text().splitlines()[-1] and "rank 1" in log.read_text().splitlines()[-1]
    limit = time.monotonic() + 10
    while processes(str(tmp_path)) and time.monotonic() < limit:  # data-loader workers look for their parent every 5 s
        time.sleep(0.2)
    assert processes(str(tmp_path)) == {}


def test_what_cannot_be_launched_is_named(datalist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--gpus 999: there .*; ask for "):
        launcher.check_gpus(999)
    with pytest.raises(UserError, match="--gpus 0: use 1 or more"):
        launcher.check_gpus(0)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=f"MASTER_PORT {port} cannot be used"):
            launcher.free_port()
    layers = ["configs/train.json", "configs/multi_gpu_train.json"]
    last = last_line_of(layers, **TINY, **folders(tmp_path, datalist))
    assert last.startswith("error: configs/multi_gpu_*.json need torchrun")


def test_files_may_lie_in_a_folder_with_blanks_and_hashes_and_begin_with_a_mark(datalist: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run #1, it's mine"
    folder.mkdir()
    files = [shutil.copy(file, folder / f"{flag} #file.json") for flag, file in zip("ect", GUIDE[1::2], strict=True)]
    for file, encoding in zip(files, ("utf-8-sig", "utf-8", "utf-16"), strict=True):  # as Windows' editors write
        file.write_text(file.read_text(), encoding=encoding)
    given = [word for flag, file in zip("ect", files, strict=True) for word in (f"-{flag}", f"~/{file.name}")]
    done = call(
        [*LAUNCHER[:2], *given, *words(SHORT | folders(folder, datalist) | {"autoencoder_train#lr": -1})],
        HOME=str(folder),
        TMPDIR=str(tmp_path),
    )
    assert printed_last(done) == "error: autoencoder_train#lr is -1; use a number above 0"


def test_gpus_that_cannot_be_used_are_told_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^there are 2 GPUs, but PyTorch .* cannot use them"):
        launcher.check_gpus(1)


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> str:
    """That this is one of two nodes, which are to meet at an address that is none."""
    address = {"NNODES": "2", "MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29532"}
    for name, value in {**address, "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)
    return "^MASTER_ADDR is no.such.host.invalid, MASTER_PORT 29532: the processes did not meet there, .* "


def test_nodes_that_do_not_meet_give_up_and_name_the_place(two_nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "RENDEZVOUS", timedelta(seconds=1))
    with pytest.raises(UserError, match=two_nodes + r"\(The client socket has timed out .*[^.]\); on every node, set "):
        launcher.launch(1, ["-m", "this"])


def test_a_node_that_is_alone_says_so(two_nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wait(options: Any) -> None:
        raise RendezvousTimeoutError

    monkeypatch.setattr(launcher.torchrun, "run", wait)
    with pytest.raises(UserError, match=two_nodes + r"\(not all of 2 nodes came\); on every node"):
        launcher.launch(1, ["-m", "this"])


def test_an_error_of_a_rank_is_the_launchers_last_line(datalist: Path, tmp_path: Path) -> None:
    wrong = words(TINY | folders(tmp_path, datalist) | {"autoencoder_train#lr": -1})
    done = call([*LAUNCHER, "-g", "2", *wrong], CUDA_VISIBLE_DEVICES="")
    last = "error: rank 0: autoencoder_train#lr is -1; use a number above 0"
    assert done.returncode == 1 and printed_last(done) == last


@pytest.mark.slow
def test_the_script_for_chosen_gpus(datalist: Path, tmp_path: Path) -> None:
    script = "scripts/train_vae_ct_gpu.sh"
    venv = str(Path(sys.executable).parent.parent)
    done = call([script], GPU_IDS="0,77", VENV=venv)
    assert done.returncode == 1
    last = printed_last(done)
    assert re.search(r"error: GPU_IDS is 0,77(: there is no GPU 77|, but this machine shows no GPU)", last)
    assert printed_last(call([script], CPU_PROCESSES="many")).startswith("error: CPU_PROCESSES is many")
    assert printed_last(call([script], VENV="/nowhere")).startswith("error: VENV is /nowhere")
    done = call([script, *words(SHORT | folders(tmp_path, datalist))], CPU_PROCESSES="1", VENV=venv)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "models" / "autoencoder.pt").exists()


def launched(folder: Path, counting: str = "echo 4", training: str = "vae_ct", **environment: str) -> str:
    """What a script for chosen GPUs starts on a machine with four GPUs: which it shows, and the command.

    Where it starts nothing: its last line. `counting` is what it is answered when it counts the GPUs.
    """
    programs = folder / "venv" / "bin"
    programs.mkdir(parents=True, exist_ok=True)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    (programs / "python").write_text(
        f'#!/bin/sh\n[ "$1" != -W ] || {{ {counting}; exit; }}\necho "$CUDA_VISIBLE_DEVICES: $*"\n'
    )
    (programs / "python").chmod(0o755)
    environment = {"CUDA_VISIBLE_DEVICES": "", "VENV": str(programs.parent)} | environment
    done = call([f"scripts/train_{training}_gpu.sh", "--seed", "3"], **environment)
    return done.stdout.strip() if done.returncode == 0 else printed_last(done)


def shown(started: str) -> str:
    """Which GPUs were shown to how many processes, or the last line."""
    return re.sub(r": .* -g (\d+) .*", r" x \1", started)


@pytest.mark.parametrize(
    ("ids", "started"),
    [
        ("0", "0 x 1"),
        ("0, 1", "0,1 x 2"),
        (" 3 ,0 ", "3,0 x 2"),
        (" all ", "0,1,2,3 x 4"),
        ("08", "error: GPU_IDS is 08: there is no GPU 08; this machine shows 0 to 3"),
        ("0 1", "error: GPU_IDS is 0 1: there is no GPU 0 1; this machine shows 0 to 3"),
        ("-1", "error: GPU_IDS is -1: there is no GPU -1; this machine shows 0 to 3"),
        ("99999999999999999999", "there is no GPU 99999999999999999999; this machine shows 0 to 3"),
        ("0,,1", "error: GPU_IDS is 0,,1: a number is missing beside a comma; use e.g. 0,2 or all"),
        ("0,1,", "error: GPU_IDS is 0,1,: a number is missing beside a comma; use e.g. 0,2 or all"),
        (" , ", "error: GPU_IDS is  , : a number is missing beside a comma; use e.g. 0,2 or all"),
        ("0,1,0", "error: GPU_IDS is 0,1,0: GPU 0 is named twice"),
    ],
)
def test_gpus_are_chosen_by_number(ids: str, started: str, tmp_path: Path) -> None:
    assert shown(launched(tmp_path, GPU_IDS=ids)).endswith(started)


def test_gpus_are_chosen_among_those_shown(tmp_path: Path) -> None:
    assert shown(launched(tmp_path, GPU_IDS="1,3", CUDA_VISIBLE_DEVICES="4, 5, 6, 7")) == "5,7 x 2"
    assert shown(launched(tmp_path, CPU_PROCESSES=" 2 ")) == " x 2"
    for wrong in ("08", "0", "2 2", "1.5", "99999"):
        last = launched(tmp_path, CPU_PROCESSES=wrong)
        assert last == f"error: CPU_PROCESSES is {wrong}; use a number of processes, 2 say"


def test_gpus_that_cannot_be_used_end_the_script_for_chosen_gpus(tmp_path: Path) -> None:
    last = launched(tmp_path, counting="echo 'error: there are 4 GPUs, but' >&2; exit 1")
    assert last == "error: there are 4 GPUs, but"
    with_old_driver = {"device_count": 2, "is_available": False}
    code = "\n".join(
        ["import sys, torch", *(f"torch.cuda.{name} = lambda: {value}" for name, value in with_old_driver.items())]
    )
    asked = re.findall(r"python -W ignore -c '(.*)'", Path("scripts/train_gpu.sh").read_text())
    done = call([sys.executable, "-c", f"{code}\n{asked[0]}"])
    assert done.returncode == 1 and printed_last(done).startswith("error: there are 2 GPUs, but PyTorch ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("training", "files"),
    [
        ("vae_ct", "-e environment_maisi_vae_train -c config_network -t config_maisi_vae_train"),
        ("diffusion", "-e environment_maisi_diff_model -c config_maisi_diff_model -t config_network_rflow"),
        (
            "controlnet",
            "-e environment_maisi_controlnet_train -c config_maisi_controlnet_train -t config_network_rflow",
        ),
    ],
)
def test_each_training_is_started_with_its_files(training: str, files: str, tmp_path: Path) -> None:
    files = re.sub(r"(\w{2,})", rf"{EXAMPLES}/\1.json", files)
    command = f"scripts/train_{training}.py -g 2 {files} --seed 3"
    assert launched(tmp_path, training=training, GPU_IDS="0,2") == f"0,2: {command}"
    mine = launched(tmp_path, training=training, NETWORK_FILE="my net.json", TRAINING_FILE="knobs.json")
    network, knobs = ("-c", "-t") if training == "vae_ct" else ("-t", "-c")
    assert f"{network} my net.json" in mine and f"{knobs} knobs.json" in mine
    assert all(Path(file).is_file() for file in files.split() if file.startswith(str(EXAMPLES)))


@pytest.mark.parametrize("name", ["", "nothing", "../data", "gpu"])
def test_a_training_that_is_not_there_is_named(name: str) -> None:
    done = call(["scripts/train_gpu.sh", *([name] if name else [])])
    assert done.returncode == 1
    assert done.stderr == f"error: there is no training '{name}'; use one of {' '.join(TRAININGS)}\n"


def test_jobs_ask_for_the_same_under_names_of_their_own() -> None:
    jobs = {name: Path(f"scripts/train_{name}.sh").read_text() for name in TRAININGS}
    asked = {name: re.findall(r"^#SBATCH (--[\w-]+)=?(.*)$", job, re.MULTILINE) for name, job in jobs.items()}
    names = [dict(options)["--job-name"] for options in asked.values()]
    assert len(set(names)) == len(names)
    for options, name in zip(asked.values(), names, strict=True):
        assert dict(options)["--output"] == f"logs/{name}_%j.out"
        assert [o for o in options if o[0] not in ("--job-name", "--output")] == [
            o for o in asked["vae_ct"] if o[0] not in ("--job-name", "--output")
        ]


@pytest.mark.parametrize("script", [*sorted(Path("scripts").glob("*.sh")), Path("tests/slurm/run.sh")], ids=str)
def test_shell_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


SRUN = """#!/bin/sh
trap 'echo "told to stop"; exit 75' USR1
echo "$NNODES of $MASTER_ADDR:$MASTER_PORT, GPUs $GPU_IDS: $*"
while [ -e waits ]; do sleep 0.05; done
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """What Slurm puts into a job's environment, and an srun and scontrol that say what they are to do."""
    (tmp_path / "scripts").symlink_to(Path("scripts").resolve())
    for name, script in {"srun": SRUN, "scontrol": '#!/bin/sh\n[ "$1" = show ] && echo node7 || echo "$*"\n'}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    job = {"JOB_ID": "12", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[7-8]", "SUBMIT_DIR": str(tmp_path)}
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", **{f"SLURM_{key}": value for key, value in job.items()}}


@pytest.mark.parametrize("training", TRAININGS)
def test_a_job_runs_its_launcher_on_each_node_and_is_requeued_when_told_to_stop(
    training: str, slurm: dict[str, str], tmp_path: Path
) -> None:
    spooled = shutil.copy(f"scripts/train_{training}.sh", tmp_path / "slurm_script")  # as sbatch does
    done = call(["bash", str(spooled), "--seed", "3"], **slurm)
    assert done.returncode == 0, done.stderr
    started = f"scripts/train_{training}_gpu.sh --seed 3"
    assert done.stdout.splitlines()[1].startswith("2 of node7:20012, GPUs all: ")
    assert done.stdout.splitlines()[1].endswith(f"--kill-on-bad-exit=1 {started}")

    (tmp_path / "waits").touch()
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(["bash", str(spooled)], stdout=log, stderr=log, env=os.environ | slurm)
    limit = time.monotonic() + 30
    while "GPUs all" not in (tmp_path / "log").read_text() and time.monotonic() < limit:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert "told to stop" in lines and lines[-1] == "requeue 12"


@pytest.mark.skipif(not SLURM, reason="needs root, slurm-wlm and munge: apt-get install slurm-wlm munge")
def test_under_slurm() -> None:
    done: Any = call(["tests/slurm/run.sh"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requeued, and completed" in done.stdout
