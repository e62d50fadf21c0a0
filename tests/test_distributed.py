"""Several ranks: they train as one process does, share the validation, and fail together."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SLURM
from tests.test_configs import TINY, TRAIN, folders, scalars, train

MULTI_GPU = Path("configs/multi_gpu_train.json")
LAYERS = f"['{TRAIN}','{MULTI_GPU}']"
EXAMPLES = Path("docs/examples")
GUIDE = [
    "-e", str(EXAMPLES / "environment_maisi_vae_train.json"),
    "-c", str(EXAMPLES / "config_network.json"),
    "-t", str(EXAMPLES / "config_maisi_vae_train.json"),
]  # fmt: skip
EXACT = TINY | {"autoencoder_train#n_epochs": 1, "autoencoder_train#amp": False}


def words(overrides: dict[str, Any]) -> list[str]:
    return [word for key, value in overrides.items() for word in (f"--{key}", str(value))]


def torchrun(ranks: int, *command: str) -> list[str]:
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={ranks}", *command]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.strip().splitlines()[-1]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / f"{name}.pt", weights_only=True)


def validation(folder: Path) -> dict[str, float]:
    return torch.load(folder / "models" / "checkpoint.pt", weights_only=True)["validations"][-1]


@pytest.fixture
def odd_datalist(datalist: Path, tmp_path: Path) -> Path:
    """Six volumes to train on and three to validate."""
    content = json.loads(datalist.read_text())
    content["training"] = (content["training"] * 2)[:6]
    content["validation"].append(content["training"][0])
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    return path


def test_the_layer_is_short_and_overrides_what_is_there() -> None:
    assert len(MULTI_GPU.read_text().splitlines()) <= 40
    assert set(json.loads(MULTI_GPU.read_text())) - {"_desc_", "finalize"} <= set(json.loads(TRAIN.read_text()))


def test_the_example_files_hold_the_defaults() -> None:
    base = json.loads(TRAIN.read_text())
    training = json.loads((EXAMPLES / "config_maisi_vae_train.json").read_text())
    assert training == {group: base[group] for group in ("data_option", "autoencoder_train")}
    network = json.loads((EXAMPLES / "config_network.json").read_text())
    ignored = {"_desc_", "norm_float16", "num_splits", "save_mem"}
    ours = {key: value for key, value in base["autoencoder_def"].items() if key not in ignored}
    assert {k: v for k, v in network.pop("autoencoder_def").items() if k not in ignored} == ours
    assert network.items() <= base.items()


def test_two_ranks_take_the_steps_of_one_process_with_twice_the_batch(odd_datalist: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    train(**EXACT | {"autoencoder_train#batch_size": 2}, **folders(one, odd_datalist))
    command = ["-m", "monai.bundle", "run", "--config_file", LAYERS]
    done = run(torchrun(2, *command, *words(EXACT | folders(two, odd_datalist))))
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("autoencoder", "discriminator"):
        expected, found = weights(one, name), weights(two, name)
        assert expected.keys() == found.keys()
        assert max(float((expected[key] - found[key]).abs().max()) for key in expected) < 1e-5
    assert {p.name for p in (two / "models").iterdir()} == {p.name for p in (one / "models").iterdir()}
    logs = [scalars(folder / "outputs/tfevent_ct/autoencoder") for folder in (one, two)]
    assert len(list((two / "outputs/tfevent_ct/autoencoder").iterdir())) == 1
    assert set(logs[0].Tags()["scalars"]) == set(logs[1].Tags()["scalars"])
    for loss in ("train_iter/recons_loss", "train_iter/d_loss", "train_epoch/p_loss"):
        values = [{event.step: event.value for event in log.Scalars(loss)} for log in logs]
        assert values[0] == pytest.approx(values[1], rel=1e-4)
    assert done.stdout.count("epoch 1/1: loss") == 1 and done.stdout.count("best validation loss") == 1


def test_validation_is_shared_out_exactly_and_by_the_guides_call(odd_datalist: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    still = EXACT | {"autoencoder_train#lr": 1e-30}
    train(**still, **folders(one, odd_datalist))
    launcher = [sys.executable, "scripts/train_vae_ct.py", *GUIDE, "-g", "2"]
    done = run([*launcher, *words(still | folders(two, odd_datalist))])
    assert done.returncode == 0, done.stderr[-2000:]
    expected, found = validation(one), validation(two)
    assert expected == pytest.approx(found, rel=1e-6, abs=1e-6)


def test_a_rank_without_a_volume_waits_for_the_others(datalist: Path, tmp_path: Path) -> None:
    content = json.loads(datalist.read_text())
    content["validation"] = content["validation"][:1]
    short = tmp_path / "short.json"
    short.write_text(json.dumps(content))
    command = torchrun(2, "scripts/train_vae_ct.py", *GUIDE, "-g", "2")
    done = run([*command, *words(TINY | {"autoencoder_train#n_epochs": 1} | folders(tmp_path, short))])
    assert done.returncode == 0, done.stderr[-2000:]
    assert validation(tmp_path)["psnr"] > 0


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


def test_a_killed_rank_ends_the_run(datalist: Path, tmp_path: Path) -> None:
    options = TINY | {"autoencoder_train#n_epochs": 1000, "val_interval": 1000} | folders(tmp_path, datalist)
    command = [sys.executable, "scripts/train_vae_ct.py", *GUIDE, "-g", "2", *words(options)]
    log = tmp_path / "log"
    with log.open("w") as stream:
        running = subprocess.Popen(command, stdout=stream, stderr=stream)
    limit = time.monotonic() + 200
    while "epoch 2/1000" not in log.read_text() and running.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    assert running.poll() is None, log.read_text()[-2000:]
    ranks = {env["RANK"]: pid for pid, env in sorted(processes(str(tmp_path)).items(), reverse=True) if "RANK" in env}
    os.kill(ranks["1"], signal.SIGKILL)
    assert running.wait(60) == 1
    assert "SIGKILL" in log.read_text().splitlines()[-1] and "rank 1" in log.read_text().splitlines()[-1]
    time.sleep(6)  # data-loader workers look for their parent every 5 s
    assert processes(str(tmp_path)) == {}


def test_launchers_end_in_one_clear_line(datalist: Path, tmp_path: Path) -> None:
    import socket

    launcher = [sys.executable, "scripts/train_vae_ct.py", *GUIDE]
    bare = {"CUDA_VISIBLE_DEVICES": ""}
    assert re.fullmatch(r"error: --gpus 999: there .*; ask for .*", last_line(run([*launcher, "-g", "999"])))
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run([*launcher, "-g", "2"], MASTER_PORT=port, **bare)
    assert done.returncode == 1 and last_line(done).startswith(f"error: MASTER_PORT {port} cannot be used")
    done = run([*launcher[:-1], "nothing.json"])
    assert done.returncode == 1 and last_line(done).startswith("error: nothing.json: no such configuration file")
    wrong = words(TINY | folders(tmp_path, datalist) | {"autoencoder_train#lr": -1})
    done = run([*launcher, "-g", "2", *wrong], **bare)
    assert done.returncode == 1 and last_line(done) == "error: rank 0: autoencoder_train#lr is -1; use a number above 0"
    done = run([sys.executable, "-m", "monai.bundle", "run", "--config_file", LAYERS])
    assert done.returncode == 1 and last_line(done).startswith("error: configs/multi_gpu_train.json needs torchrun")


def test_the_script_for_chosen_gpus(datalist: Path, tmp_path: Path) -> None:
    script = "scripts/train_vae_ct_gpu.sh"
    venv = str(Path(sys.executable).parent.parent)
    done = run([script], GPU_IDS="0,77", VENV=venv)
    assert done.returncode == 1
    assert re.search(r"error: GPU_IDS is 0,77(: there is no GPU 77|, but this machine shows no GPU)", last_line(done))
    assert last_line(run([script], CPU_PROCESSES="many")).startswith("error: CPU_PROCESSES is many")
    assert last_line(run([script], VENV="/nowhere")).startswith("error: VENV is /nowhere")
    options = TINY | {"autoencoder_train#n_epochs": 1} | folders(tmp_path, datalist)
    done = run([script, *words(options)], CPU_PROCESSES="1", VENV=venv)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "models" / "autoencoder.pt").exists()


@pytest.mark.parametrize("script", ["scripts/train_vae_ct_gpu.sh", "scripts/train_vae_ct.sh", "tests/slurm/run.sh"])
def test_shell_scripts_are_clean(script: str) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.skipif(not SLURM, reason="needs root, slurm-wlm and munge: apt-get install slurm-wlm munge")
def test_under_slurm() -> None:
    done = run(["tests/slurm/run.sh"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "requeued, and completed" in done.stdout
