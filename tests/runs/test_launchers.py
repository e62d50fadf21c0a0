"""The launchers: train_vae_ct.py, its script for chosen GPUs, and the one for Slurm."""

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
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import train_vae_ct
from scripts.common.errors import UserError
from tests.helpers import SLURM, TINY, call, folders, last_line_of, printed_last, processes, run, torchrun, words

EXAMPLES = Path("docs/examples")
GUIDE = [
    "-e", str(EXAMPLES / "environment_maisi_vae_train.json"),
    "-c", str(EXAMPLES / "config_network.json"),
    "-t", str(EXAMPLES / "config_maisi_vae_train.json"),
]  # fmt: skip
LAUNCHER = [sys.executable, "scripts/train_vae_ct.py", *GUIDE]
SHORT = TINY | {"autoencoder_def#num_channels": [8, 8, 8], "autoencoder_train#n_epochs": 1}


def validation(folder: Path) -> dict[str, float]:
    return torch.load(folder / "models" / "checkpoint.pt", weights_only=True)["validations"][-1]


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


@pytest.mark.parametrize(("joined", "layered"), [({}, False), ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, True)])
def test_what_the_script_becomes(
    joined: dict[str, str], layered: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in joined.items():
        monkeypatch.setenv(name, value)
    became: list[str] = []
    monkeypatch.setattr(os, "execv", lambda program, command: became.extend(command))
    monkeypatch.setattr(sys, "argv", ["train_vae_ct.py", *GUIDE, "--seed", "3"])
    monkeypatch.setattr(train_vae_ct.errors, "install", lambda: None)
    train_vae_ct.main()
    layers = became[became.index("--config_file") + 1]
    files = [train_vae_ct.BASE, *(str(Path(f).resolve()) for f in GUIDE[1::2])]
    assert layers == repr([*files, *([train_vae_ct.MULTI_GPU] if layered else [])])
    assert became[-2:] == ["--seed", "3"] and became[1:6] == ["-W", "ignore", "-m", "monai.bundle", "run"]


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
        train_vae_ct.check_gpus(999)
    with pytest.raises(UserError, match="--gpus 0: use 1 or more"):
        train_vae_ct.check_gpus(0)
    with pytest.raises(UserError, match=r"nothing\.json: no such configuration file"):
        train_vae_ct.parse([*GUIDE[:-1], "nothing.json"])
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=f"MASTER_PORT {port} cannot be used"):
            train_vae_ct.free_port()
    layers = ["configs/train.json", "configs/multi_gpu_train.json"]
    last = last_line_of(layers, **TINY, **folders(tmp_path, datalist))
    assert last.startswith("error: configs/multi_gpu_train.json needs torchrun")


def test_an_error_of_a_rank_is_the_launchers_last_line(datalist: Path, tmp_path: Path) -> None:
    wrong = words(TINY | folders(tmp_path, datalist) | {"autoencoder_train#lr": -1})
    done = call([*LAUNCHER, "-g", "2", *wrong], CUDA_VISIBLE_DEVICES="")
    last = "error: rank 0: autoencoder_train#lr is -1; use a number above 0"
    assert done.returncode == 1 and printed_last(done) == last


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


@pytest.mark.parametrize("script", ["scripts/train_vae_ct_gpu.sh", "scripts/train_vae_ct.sh", "tests/slurm/run.sh"])
def test_shell_scripts_are_clean(script: str) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.skipif(not SLURM, reason="needs root, slurm-wlm and munge: apt-get install slurm-wlm munge")
def test_under_slurm() -> None:
    done: Any = call(["tests/slurm/run.sh"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requeued, and completed" in done.stdout
