from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from scripts.common.errors import UserError
from scripts.common.memory import available_memory, memory_advice

CPU = torch.device("cpu")
MIB = 2**20
UNLIMITED = {1: str(2**63 - 4096), 2: "max"}  # as the kernel writes it in each version


def told(error: BaseException, device: torch.device = CPU) -> str:
    with pytest.raises(UserError) as caught, memory_advice(device, lambda: "3 apples", "eat less"):
        raise error
    assert caught.value.__cause__ is error
    return str(caught.value)


GPU = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory", 2),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nout of memory"),
]
HOST = [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("Caught OSError in worker process 0.\nOSError: [Errno 12] Cannot allocate memory"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError(errno.ENOMEM, "Kein Speicher"),
]


@pytest.mark.parametrize("error", GPU, ids=str)
def test_running_out_of_a_gpus_memory_becomes_advice(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(error) == "out of memory with 3 apples (cpu); eat less"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 6.5 * 2**30)
    numbers = "cuda:0 has 8.0 GiB, of which 1.0 are free; this run took up to 6.5"
    assert told(error, torch.device("cuda:0")) == f"out of memory with 3 apples ({numbers}); eat less"


@pytest.mark.parametrize("error", HOST, ids=repr)
def test_running_out_of_main_memory_becomes_advice(error: Exception) -> None:
    assert told(error).startswith("out of memory with 3 apples (this machine has ")
    assert told(error).endswith(" GiB left); eat less")


def test_a_gpu_that_tells_no_numbers_does_not_spoil_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: out of memory", 2)

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert told(GPU[1], torch.device("cuda:0")) == "out of memory with 3 apples (cuda:0); eat less"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), OSError(errno.ENOSPC, "No space left"), UserError("out of memory")],
    ids=str,
)
def test_other_errors_pass_the_advice_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, memory_advice(CPU, lambda: "3 apples", "eat less"):
        raise error
    assert caught.value is error and error.__cause__ is None


def machine(folder: Path, cgroup: str, available: int | None = 1000) -> dict[str, Path]:
    """A /proc of a machine with so many MiB available, of a process in `cgroup`; no control groups yet."""
    proc, cgroups = folder / "proc", folder / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    known = "" if available is None else f"MemAvailable: {available * 1024} kB\n"
    (proc / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\n{known}HugePages_Total: 0\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return {"proc": proc, "cgroups": cgroups}


def limit(folder: Path, version: int, most: int | None, used: int, cache: int) -> None:
    """Make `folder` a control group with such numbers in MiB; None for no limit."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("limit_in_bytes", "usage_in_bytes", "total_inactive_file"), 2: ("max", "current", "inactive_file")}
    most_name, used_name, cache_name = names[version]
    (folder / f"memory.{most_name}").write_text(UNLIMITED[version] if most is None else f"{most * MIB}\n")
    (folder / f"memory.{used_name}").write_text(f"{used * MIB}\n")
    (folder / "memory.stat").write_text(f"anon 1\nactive_file 12345\n{cache_name} {cache * MIB}\nslab 3\n")


LINES = {1: "9:cpu,cpuacct:/other\n4:memory:/a/b\n", 2: "0::/a/b\n"}
ROOTS = {1: "memory", 2: "."}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("own", "above", "top", "expected"),
    [
        ((500, 300, 50), None, None, 250),  # what its own group leaves, and cache that can be given up
        ((None, 300, 50), (400, 350, 0), None, 50),  # a group above it is fuller
        ((None, 300, 50), None, (600, 400, 30), 230),  # the outermost, as in a container that sees itself as the root
        ((None, 300, 50), (None, 300, 50), None, 1000),  # no limit: what the machine has
        ((5000, 300, 0), None, None, 1000),  # a limit above it
        ((100, 130, 10), None, None, 0),
    ],
)
def test_available_memory_is_what_every_limit_leaves(
    version: int, own: tuple, above: tuple | None, top: tuple | None, expected: int, tmp_path: Path
) -> None:
    where = machine(tmp_path, LINES[version])
    root = where["cgroups"] / ROOTS[version]
    for folder, numbers in ((root / "a" / "b", own), (root / "a", above), (root, top)):
        if numbers is not None:
            limit(folder, version, *numbers)
    assert available_memory(**where) == expected * MIB


def test_available_memory_in_a_container_that_hides_its_group(tmp_path: Path) -> None:
    where = machine(tmp_path, "4:memory:/docker/0123\n1:name=systemd:/docker/0123\n0::/\n")
    limit(where["cgroups"] / "memory", 1, 700, 100, 0)
    assert available_memory(**where) == 600 * MIB


def test_available_memory_where_little_is_known(tmp_path: Path) -> None:
    where = machine(tmp_path / "a", "0::/a\n", available=None)
    assert available_memory(**where) is None
    limit(where["cgroups"] / "a", 2, 30, 10, 0)
    (where["cgroups"] / "a" / "memory.stat").unlink()
    assert available_memory(**where) == 20 * MIB
    assert available_memory(tmp_path / "nowhere", tmp_path / "nowhere") is None
    assert (available_memory() or 0) > 0
