"""Tiny, seeded volumes: not cubic, with affines that are not the identity."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from scripts.phantom import make_phantom
from scripts.weights import save_weights

REAL_CT = Path(__file__).resolve().parents[2] / "shared" / "ct"
NETWORK = {"num_channels": [16, 16, 16], "num_res_blocks": [1, 1, 1], "norm_num_groups": 8}
SMALL = {f"autoencoder_def#{key}": value for key, value in NETWORK.items()}
SLURM = os.geteuid() == 0 and all(map(shutil.which, ("slurmctld", "slurmd", "munged")))


def save_nifti(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    affine = np.diag([2.0, 2.0, 2.5, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def oriented_affine(axcodes: str, spacing: tuple[float, float, float]) -> np.ndarray:
    """An affine whose voxel axes point along `axcodes`, with an offset."""
    affine = np.zeros((4, 4))
    letters = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    for axis, code in enumerate(axcodes):
        world, sign = letters[code]
        affine[world, axis] = sign * spacing[axis]
    affine[:, 3] = [12.5, -30.0, 101.0, 1.0]
    return affine


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network of `NETWORK`'s size, not trained."""
    torch.manual_seed(0)
    definition = json.loads(Path("configs/train.json").read_text())["autoencoder_def"] | NETWORK
    parser = ConfigParser({"spatial_dims": 3, "image_channels": 1, "latent_channels": 4, "net": definition})
    path = tmp_path_factory.mktemp("weights") / "autoencoder.pt"
    save_weights(parser.get_parsed_content("net"), path)
    return path


def workflow(name: str, initialize: bool = True, **overrides: Any) -> ConfigWorkflow:
    """That of a config by its name, as a user would start it."""
    kind = "train" if name == "train" else "infer"
    started = ConfigWorkflow(f"configs/{name}.json", workflow_type=kind, logging_file=False, **overrides)
    if initialize:
        started.initialize()
    return started


def run(name: str, **overrides: Any) -> ConfigWorkflow:
    started = workflow(name, **overrides)
    started.run()
    started.finalize()
    return started


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight phantoms of 40 x 36 x 44 voxels, LPS, 8 x 8 x 9 mm."""
    folder = tmp_path_factory.mktemp("phantoms")
    affine = oriented_affine("LPS", (8.0, 8.0, 9.0))
    return [
        save_nifti(folder / f"phantom {i}.nii.gz", make_phantom((40, 36, 44), (8, 8, 9), seed=i), affine)
        for i in range(8)
    ]


@pytest.fixture
def datalist(phantoms: list[Path], tmp_path: Path) -> Path:
    """Four volumes to train, two to validate, two to test."""
    entries = [{"image": str(p), "class": "ct"} for p in phantoms]
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": entries[:4], "validation": entries[4:6], "testing": entries[6:]}))
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where we may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("may not mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
