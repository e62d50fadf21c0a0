from __future__ import annotations

import logging
import os
import re
import socket
import sys
from datetime import timedelta
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist

from scripts.common import ranks
from scripts.common.errors import UserError
from tests.helpers import call, finish, start, start_ranks

VERSION = """NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


def test_one_process_gathers_itself() -> None:
    for value in (3, 2.5, "text", None, {"a": [1]}, torch.arange(3)):
        (found,) = ranks.gather(value)
        assert type(found) is type(value) and str(found) == str(value)
    assert torch.equal(ranks.mean(torch.arange(3.0)), torch.arange(3.0))
    assert ranks.join_if_launched() == ranks.single_device() == torch.device("cpu")
    with pytest.raises(UserError, match=r"configs/multi_gpu_\*\.json need torchrun"):
        ranks.join()


def test_tests_see_no_gpu_but_those_that_want_one() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and torch.cuda.device_count() == 0
    code = "import os, tests.conftest; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    assert call([sys.executable, "-c", code, "-m", "gpu"], CUDA_VISIBLE_DEVICES="3").stdout == "3\n"


def talk() -> None:
    os.environ["SLURM_JOB_ID"] = "7"
    assert ranks.join().type in ("cpu", "cuda")
    me = idist.get_rank()
    assert os.environ["SLURM_JOB_ID"] == "7" and idist.get_world_size() == 2
    assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == ranks.TIMEOUT
    assert ranks.gather("x" * (2000 + me)) == ["x" * 2000, "x" * 2001] and ranks.gather(me) == [0, 1]
    assert ranks.mean(torch.tensor([1.0 + me])).item() == 1.5
    ranks.log_on_rank_0(me)
    logging.getLogger("test").info("told by a rank")
    idist.finalize()


def test_two_ranks_gather_average_and_one_of_them_logs(tmp_path: Path) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(2, talk, log=log), log)
    assert printed.count("told by a rank") == 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with two GPUs and the driver 535 that shows none of them to PyTorch; its /proc/driver/nvidia."""
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (tmp_path / "gpus" / name).mkdir(parents=True)
    (tmp_path / "version").write_text(VERSION)
    monkeypatch.setattr(ranks, "DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return tmp_path


def fail() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old.")


def test_gpus_that_cannot_be_used_are_no_reason_to_take_the_cpu(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for ask in (ranks.single_device, ranks.join_if_launched, ranks.usable_gpus):
        with pytest.raises(UserError) as caught:
            ask()
        assert str(caught.value) == (
            f"there are 2 GPUs, but PyTorch {torch.__version__} for CUDA 13.0 cannot use them with the driver "
            "535.129.03: The NVIDIA driver on your system is too old; update the driver (CUDA 13 needs 580 or newer), "
            'install a PyTorch for an older CUDA (see README.md), or set CUDA_VISIBLE_DEVICES="" to compute on the CPU'
        )
    monkeypatch.setenv("LOCAL_RANK", "0")
    (machine / "version").unlink()
    with pytest.raises(UserError, match="cannot use them with the driver of unknown version: The NVIDIA driver "):
        ranks.join()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ranks.usable_gpus() == 2 and ranks.single_device() == torch.device("cuda")


@pytest.mark.parametrize(("cuda", "built"), [(None, "the CPU"), ("13.0", "CUDA 13.0")])
def test_a_pytorch_that_sees_no_gpu_of_the_machine_says_so(
    cuda: str | None, built: str, machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert ranks.single_device() == torch.device("cpu")
    assert (
        f"this machine has 2 NVIDIA GPUs, but PyTorch {torch.__version__}, built for {built}, sees none" in caplog.text
    )
    caplog.clear()
    monkeypatch.setenv("RANK", "1")  # told once
    assert ranks.usable_gpus() == 0 and caplog.text == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # meant
    assert ranks.usable_gpus() == 0 and caplog.text == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(ranks, "DRIVER", machine / "nothing")  # no driver, no GPU
    assert ranks.usable_gpus() == 0 and caplog.text == ""


def meet_in_vain(address: str, port: str, rank: str) -> None:
    ranks.RENDEZVOUS = timedelta(seconds=1)
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    try:
        ranks.join()
    except UserError as error:
        print(f"told: {error}", flush=True)


@pytest.mark.parametrize(
    ("address", "rank", "why"),
    [
        ("no.such.host.invalid", "1", "timed out .* trying to connect to"),  # the name does not resolve
        ("127.0.0.1", "1", "timed out .* trying to connect to"),  # nobody answers
        ("127.0.0.1", "0", "waiting for clients"),  # nobody comes
    ],
)
def test_ranks_that_do_not_meet_give_up_and_name_the_place(address: str, rank: str, why: str, tmp_path: Path) -> None:
    assert timedelta(minutes=1) <= ranks.RENDEZVOUS <= timedelta(minutes=10) < ranks.TIMEOUT
    log = tmp_path / "log"
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    printed = finish([start(meet_in_vain, address, port, rank, log=log)], log)
    place = (
        rf"told: MASTER_ADDR is {address}, MASTER_PORT {port}: the processes did not meet there, .* \(.*{why}.*\); on"
    )
    assert re.search(place, printed), printed


def test_a_place_to_meet_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        UserError, match=r"^MASTER_ADDR is not set, MASTER_PORT 99999: .* MASTER_ADDR expected, but not"
    ):
        ranks.join()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UserError, match=r"MASTER_PORT 99999: .*\(port must have value from 0 to 65535 but was 99999"):
        ranks.join()
