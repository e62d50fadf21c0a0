"""Trainings that are killed, and go on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.weights import save_weights, write_tensors
from tests.test_autoencoder import stock_network
from tests.test_checkpointing import same
from tests.test_configs import TINY, TRAIN, folders, scalars
from tests.test_distributed import LAYERS, processes, torchrun, words

RUN = ["-m", "monai.bundle", "run", "--config_file"]
SHORT = TINY | {
    "autoencoder_def#num_channels": [8, 8, 8],
    "autoencoder_train#n_epochs": 3,
    "autoencoder_train#val_sliding_window_patch_size": [64, 64, 64],
    "val_interval": 3,
    "checkpoint_minutes": 0,
    "num_workers": 1,
}
READY = "a validation"  # the last row of the table before the first step


def command(ranks: int, options: dict[str, Any]) -> list[str]:
    if ranks > 1:
        return torchrun(ranks, *RUN, LAYERS, *words(options))
    return [sys.executable, "-W", "ignore", *RUN, str(TRAIN), *words(options)]


def until(condition: Callable[[], bool], running: subprocess.Popen, seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not condition() and running.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.02)


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("a") as stream:
        return subprocess.Popen(
            arguments, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
        )


def finish(arguments: list[str], log: Path) -> None:
    running = start(arguments, log)
    assert running.wait(300) == 0, log.read_text()[-3000:]


def assert_equal_trainings(one: Path, other: Path) -> None:
    """Bit-identical weights; in TensorBoard every step once, with the same value."""
    for name in ("autoencoder.pt", "discriminator.pt"):
        assert same(*(torch.load(folder / "models" / name, weights_only=True) for folder in (one, other)))
    logs = [scalars(folder / "outputs/tfevent_ct/autoencoder") for folder in (one, other)]
    tags = {tag for tag in logs[0].Tags()["scalars"] if not tag.endswith(("data_wait_share", "patches_per_second"))}
    assert {"train_iter/d_loss", "train_epoch/p_loss", "val_epoch/psnr", "train_iter/grad_norm_g"} <= tags
    for tag in tags:
        values = [[(event.step, event.value) for event in log.Scalars(tag)] for log in logs]
        assert values[0] == values[1], tag
    assert len(logs[1].Images("val_reconstructed_image")) == len(logs[0].Images("val_reconstructed_image"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "kills"), [(1, 2), (2, 1), pytest.param(1, 5, marks=SLOW), pytest.param(2, 5, marks=SLOW)]
)
def test_killed_at_random_and_restarted_equals_the_unbroken_training(
    ranks: int, kills: int, datalist: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    began = time.monotonic()
    finish(command(ranks, SHORT | folders(whole, datalist)), whole / "log")
    lasts = time.monotonic() - began
    rng = random.Random(ranks + kills)
    for attempt in range(kills):
        log = broken / f"log{attempt}"
        running = start(command(ranks, SHORT | folders(broken, datalist)), log)
        until(lambda log=log: READY in log.read_text(), running)
        time.sleep(rng.uniform(0, 0.25 * lasts))
        for pid in (running.pid, *processes(str(broken))):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        running.wait(60)
        if (broken / "models" / "checkpoint.pt").exists():
            torch.load(broken / "models" / "checkpoint.pt", weights_only=True)
    finish(command(ranks, SHORT | folders(broken, datalist)), broken / "log")
    assert_equal_trainings(whole, broken)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=SLOW)])
def test_a_signal_ends_the_step_and_the_same_command_goes_on(
    number: signal.Signals, datalist: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    options = SHORT | {"checkpoint_minutes": 30}
    finish(command(1, options | folders(whole, datalist)), whole / "log")
    running = start(command(1, options | folders(broken, datalist)), broken / "log")
    until(lambda: "epoch 1/3: loss" in (broken / "log").read_text(), running)
    time.sleep(0.3)
    os.killpg(running.pid, number)  # data-loader workers get it too, as from Slurm
    assert running.wait(60) == 75
    log = (broken / "log").read_text()
    assert "Traceback" not in log and "the same command goes on from" in log
    assert processes(str(broken)) == {}
    finish(command(1, options | folders(broken, datalist)), broken / "log")
    assert "resuming from" in (broken / "log").read_text()
    assert_equal_trainings(whole, broken)


SAVER = """
import sys, torch
from scripts.weights import save_weights, write_tensors
network, folder = torch.nn.Linear(700, 700), sys.argv[1]
print("ready", flush=True)
while True:
    save_weights(network, folder + "/autoencoder.pt")
    write_tensors({"state": {"autoencoder": network.state_dict()}, "iteration": 1}, folder + "/checkpoint.pt")
"""


def test_killed_during_a_save_there_is_always_a_whole_file(tmp_path: Path) -> None:
    save_weights(stock_network(), tmp_path / "autoencoder.pt")
    write_tensors({"state": {}}, tmp_path / "checkpoint.pt")
    rng = random.Random(0)
    for _ in range(5):
        running = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.2))
        running.kill()
        running.wait()
        for name in ("autoencoder.pt", "checkpoint.pt"):
            assert torch.load(tmp_path / name, weights_only=True)
