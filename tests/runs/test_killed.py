"""Trainings that are killed or asked to stop, and go on as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Events

from scripts.common import ranks
from scripts.networks.weights import save_weights, write_tensors
from tests.helpers import (
    SMALLEST,
    assert_equal_logs,
    finish,
    finish_killed,
    folders,
    kill,
    last_line_of,
    same,
    scalars,
    start,
    start_ranks,
    stock_network,
    train_here,
    until,
)
from tests.training.toy import toy_training

SLOW = pytest.mark.slow


# The toy: all from the engine


def train_toy(folder: Path, at: int = 0, number: int = 0, rank: int = 0) -> None:
    """Train the toy; `rank` sends itself a signal when the iteration `at` begins."""
    if "RANK" in os.environ:
        ranks.join()
    me = idist.get_rank()
    trainer = toy_training(folder, rank=me, ranks=idist.get_world_size(), checkpoint_minutes=0)
    if number and me == rank:
        trainer.add_event_handler(Events.ITERATION_STARTED(once=at), lambda _: os.kill(os.getpid(), number))
    trainer.run()


@pytest.mark.parametrize("count", [1, 2])
def test_the_toy_killed_at_random_steps_equals_the_unbroken_one(count: int, tmp_path: Path) -> None:
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    finish(start_ranks(count, train_toy, whole, log=log), log)
    rng, done = random.Random(count), 0
    for _ in range(2):
        at = rng.randint(done + 2, 17)
        victim = rng.randrange(count)
        running = start_ranks(count, train_toy, broken, at, signal.SIGKILL, victim, log=log)
        running[victim].join(60)
        kill(running)
        done = torch.load(broken / "models" / "checkpoint.pt", weights_only=True)["iteration"]
        assert running[victim].exitcode == -signal.SIGKILL and at - 2 <= done < at
    finish(start_ranks(count, train_toy, broken, log=log), log)
    assert same(*(torch.load(f / "models" / "line.pt", weights_only=True) for f in (whole, broken)))
    logs = [scalars(folder / "events") for folder in (whole, broken)]
    values = [[(e.step, e.value) for e in log.Scalars("train_iter/square")] for log in logs]
    assert values[0] == values[1] and len(values[0]) == 18


@pytest.mark.parametrize("count", [1, 2])
def test_the_toy_asked_to_stop_ends_with_75_on_all_ranks(count: int, tmp_path: Path) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(count, train_toy, tmp_path, 7, signal.SIGTERM, count - 1, log=log), log, status=75)
    assert "Traceback" not in printed and printed.count("stopped by SIGTERM after step") == 1
    finish(start_ranks(count, train_toy, tmp_path, log=log), log)
    assert "resuming from" in log.read_text()


# The autoencoder's training, through its config

SHORT = SMALLEST | {
    "autoencoder_train#n_epochs": 3,
    "val_interval": 3,
    "checkpoint_minutes": 0,
    "num_workers": 1,
    "lr_decay": 0.7,
    "ema_decay": 0.9,
    "scale_equivariance": 0.25,
    # Of twelve steps, or of six where there are two ranks, which is which:
    "patch_curriculum": [[0.3, [32, 32, 32]]],  # then larger ones: from the fifth, or third, on
    "autoencoder_train#patch_size": [36, 32, 32],
    "discriminator_start": 0.5,  # learns from the sixth on, and counts from the seventh; or both from the fourth
    "decoder_finish": 0.25,  # from the tenth, or sixth, on
    "term_norm_interval": 2,
}
SWITCHES = {1: (5, 6, 7, 10, 11), 2: (3, 4, 6)}
READY = "a validation"  # the last row of the table before the first step


def begin(count: int, folder: Path, datalist: Path, log: Path, at: int = 0, **options: Any) -> list[Any]:
    return start_ranks(count, train_here, "train", SHORT | folders(folder, datalist) | options, at, log=log)


@pytest.fixture(scope="module", params=[1, 2])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, datalist_file: Path) -> Any:
    """How many ranks, and the folder of their unbroken training."""
    folder = tmp_path_factory.mktemp(f"whole{request.param}")
    finish(begin(request.param, folder, datalist_file, folder / "log"), folder / "log")
    return request.param, folder


def assert_equal_trainings(one: Path, other: Path) -> None:
    """Bit-identical weights; in TensorBoard every step once, with the same value."""
    for name in ("autoencoder.pt", "discriminator.pt"):
        assert same(*(torch.load(folder / "models" / name, weights_only=True) for folder in (one, other)))
    wanted = ("train_iter/d_loss", "train_epoch/p_loss", "val_epoch/psnr", "train_iter/grad_norm_g")
    assert_equal_logs(*(folder / "outputs/tfevent_ct/autoencoder" for folder in (one, other)), *wanted)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=SLOW)])
def test_killed_at_random_and_restarted_equals_the_unbroken_training(
    kills: int, whole: Any, datalist_file: Path, tmp_path: Path
) -> None:
    count, unbroken = whole
    rng = random.Random(count + kills)
    for attempt in range(kills):
        log = tmp_path / f"log{attempt}"
        running = begin(count, tmp_path, datalist_file, log)
        until(lambda log=log: log.exists() and READY in log.read_text(), running)
        time.sleep(rng.uniform(0.2, 2.0))
        kill(running)
        for process in running:
            process.join(60)
        if (tmp_path / "models" / "checkpoint.pt").exists():
            torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)
    finish(begin(count, tmp_path, datalist_file, tmp_path / "log"), tmp_path / "log")
    assert_equal_trainings(unbroken, tmp_path)


def test_killed_at_each_switch_of_the_schedule_equals_the_unbroken_training(
    whole: Any, datalist_file: Path, tmp_path: Path
) -> None:
    count, unbroken = whole
    for at in SWITCHES[count]:
        finish_killed(begin(count, tmp_path, datalist_file, tmp_path / "log", at))
        assert torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["iteration"] == at - 1
    finish(begin(count, tmp_path, datalist_file, tmp_path / "log"), tmp_path / "log")
    assert_equal_trainings(unbroken, tmp_path)


def test_the_schedule_is_what_the_knobs_say_and_norms_change_nothing(
    whole: Any, datalist_file: Path, tmp_path: Path
) -> None:
    count, unbroken = whole
    adam = torch.load(unbroken / "models" / "checkpoint.pt", weights_only=True)["state"]["optimizer_g"]["state"]
    steps = {int(state["step"]) for state in adam.values()}
    assert steps == {1: {9, 12}, 2: {5, 6}}[count]  # of the encoder, and of the decoder
    events = scalars(unbroken / "outputs/tfevent_ct/autoencoder")
    norms = {tag.removeprefix("train_iter/last_layer_norm_") for tag in events.Tags()["scalars"] if "iter/last" in tag}
    assert norms == {"recons_loss", "p_loss", "adv_loss", "scale_loss"}
    seen = [event.step for event in events.Scalars("train_iter/last_layer_norm_p_loss")]
    assert seen == list(range(2, 12 // count + 1, 2))
    log = tmp_path / "log"
    finish(begin(count, tmp_path, datalist_file, log, term_norm_interval=0), log)
    for name in ("autoencoder.pt", "discriminator.pt"):
        assert same(*(torch.load(folder / "models" / name, weights_only=True) for folder in (unbroken, tmp_path)))


def test_another_curriculum_is_another_training(whole: Any, datalist_file: Path) -> None:
    _, unbroken = whole
    told = last_line_of("train", **SHORT | folders(unbroken, datalist_file) | {"patch_curriculum": []})
    assert "patch_curriculum was [[0.3, [32, 32, 32]]], now it is []; restore it, or start over" in told


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=SLOW)])
def test_a_signal_ends_the_step_and_the_same_command_goes_on(
    number: signal.Signals, whole: Any, datalist_file: Path, tmp_path: Path
) -> None:
    count, unbroken = whole
    log = tmp_path / "log"
    running = begin(count, tmp_path, datalist_file, log, checkpoint_minutes=30)
    until(lambda: log.exists() and "epoch 1/3: loss" in log.read_text(), running)
    time.sleep(0.1)
    kill(running, number)  # data-loader workers get it too, as from Slurm
    printed = finish(running, log, status=75)
    assert "Traceback" not in printed and "the same command goes on from" in printed
    finish(begin(count, tmp_path, datalist_file, log, checkpoint_minutes=30), log)
    assert "resuming from" in log.read_text()
    assert_equal_trainings(unbroken, tmp_path)


def save_for_ever(folder: Path) -> None:
    network = torch.nn.Linear(700, 700)
    print("ready", flush=True)
    while True:
        save_weights(network, folder / "autoencoder.pt")
        write_tensors({"state": {"autoencoder": network.state_dict()}, "iteration": 1}, folder / "checkpoint.pt")


def test_killed_during_a_save_there_is_always_a_whole_file(tmp_path: Path) -> None:
    save_weights(stock_network(), tmp_path / "autoencoder.pt")
    write_tensors({"state": {}}, tmp_path / "checkpoint.pt")
    rng = random.Random(0)
    for attempt in range(5):
        log = tmp_path / f"log{attempt}"
        running = start(save_for_ever, tmp_path, log=log)
        until(lambda log=log: log.exists() and "ready" in log.read_text(), [running])
        time.sleep(rng.uniform(0, 0.2))
        kill([running])
        running.join(60)
        for name in ("autoencoder.pt", "checkpoint.pt"):
            assert torch.load(tmp_path / name, weights_only=True)
