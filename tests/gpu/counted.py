"""What a GPU would have to do, counted without one, as a table.

    python -m tests.gpu.counted [vae checkpointed diffusion controlnet validation]

Needs PyTorch built for CPUs, of the version that this was written for, and a C++ compiler; takes a minute.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.table import print_table

VERSION = "2.13."  # of PyTorch; fake tensors and what the device stands in for change between versions
SOURCE = Path(__file__).with_name("fake_cuda.cpp")
Counts = dict[str, dict[str, dict[str, Any]]]


class Unavailable(Exception):
    """Why nothing can be counted here."""


def built(folder: Path) -> Path:
    """The fake device, compiled into a folder.

    Raises:
        Unavailable: with another PyTorch or machine, or without a compiler.
    """
    machine = f"{platform.system()} on {platform.machine()}"
    if machine != "Linux on x86_64":
        raise Unavailable(f"the fake CUDA device is for Linux on x86_64, this is {machine}")
    if not torch.__version__.startswith(VERSION) or torch.version.cuda or torch.version.hip:
        raise Unavailable(f"the fake CUDA device is for PyTorch {VERSION}x built for CPUs, this is {torch.__version__}")
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "c++"))), None)
    if compiler is None:
        raise Unavailable("no C++ compiler ($CXX, g++, c++) to build the fake CUDA device with")
    library, home = folder / "fake_cuda.so", Path(torch.__file__).parent
    linked = [f"-L{home / 'lib'}", f"-Wl,-rpath,{home / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", SOURCE, "-o", library, *linked]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{compiler} does not build the fake CUDA device: {done.stderr.strip().splitlines()[0]}")
    return library


def counts(cases: Sequence[str]) -> Counts:
    """What `tests.gpu.fake` says of its cases.

    Raises:
        Unavailable: as `built`.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LD_PRELOAD": str(built(Path(folder))), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.fake", *cases]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def figures(counted: dict[str, Any]) -> dict[str, float]:
    """Of a step: operators, traffic in GB beside and of what has FLOP, TFLOP, peak in GiB."""
    return {
        "operators": counted["operators"],
        "other GB": (sum(counted["bytes"].values()) - counted["products"]) / 1e9,
        "product GB": counted["products"] / 1e9,
        "TFLOP": sum(counted["flop"].values()) / 1e12,
        "peak GiB": counted["peak"] / 2**30,
    }


def main(cases: Sequence[str]) -> None:
    rows, largest = [], []
    for case, steps in counts(cases or ("vae", "checkpointed", "diffusion", "controlnet", "validation")).items():
        for step, counted in steps.items():
            head, name = figures(counted), f"{case}, {step}"
            rows.append((name, *(f"{value:.4g}" for value in head.values()), str(len(counted["waits"]))))
            most = sorted(counted["bytes"].items(), key=lambda item: -item[1])[:6]
            largest.append((name, ", ".join(f"{operator} {moved / 1e9:.1f}" for operator, moved in most)))
    print_table(("counted", *head, "host waits"), rows)
    print_table(("counted", "GB of the operators that move most"), largest)


if __name__ == "__main__":
    main(sys.argv[1:])
