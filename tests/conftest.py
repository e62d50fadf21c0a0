"""Tiny, seeded volumes: not cubic, with affines that are not the identity."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# One thread each: OpenMP threads of several processes on few cores spin, and cost ten times what they compute.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
if "gpu" not in sys.argv:  # as `pytest -m gpu` has it; several ranks share this machine, and would not share its GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
from monai.bundle import ConfigParser

from scripts.networks.lpips import SqueezeNetFeatures
from scripts.networks.weights import save_weights
from scripts.phantom import make_phantom
from tests.helpers import NETWORK, oriented_affine, save_nifti


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network of `NETWORK`'s size, not trained."""
    torch.manual_seed(0)
    definition = json.loads(Path("configs/train.json").read_text())["autoencoder_def"] | NETWORK
    parser = ConfigParser({"spatial_dims": 3, "image_channels": 1, "latent_channels": 4, "net": definition})
    path = tmp_path_factory.mktemp("weights") / "autoencoder.pt"
    save_weights(parser.get_parsed_content("net"), path)
    return path


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight phantoms of 40 x 36 x 44 voxels, LPS, 8 x 8 x 9 mm."""
    folder = tmp_path_factory.mktemp("phantoms")
    affine = oriented_affine("LPS", (8.0, 8.0, 9.0))
    return [
        save_nifti(folder / f"phantom {i}.nii.gz", make_phantom((40, 36, 44), (8, 8, 9), seed=i), affine)
        for i in range(8)
    ]


@pytest.fixture(scope="session")
def datalist_file(phantoms: list[Path]) -> Path:
    """Four volumes to train, two to validate, two to test; for tests that only read it."""
    entries = [{"image": str(p), "class": "ct"} for p in phantoms]
    path = phantoms[0].parent / "datalist.json"
    path.write_text(json.dumps({"training": entries[:4], "validation": entries[4:6], "testing": entries[6:]}))
    return path


@pytest.fixture
def datalist(datalist_file: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copy(datalist_file, tmp_path / "datalist.json"))


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


@pytest.fixture
def weight_files(tmp_path: Path) -> dict[str, Path]:
    """Files in the layouts of torchvision's SqueezeNet 1.1, with its classifier, and of LPIPS 0.1; random."""
    torch.manual_seed(0)
    backbone = {k: v * 3 for k, v in SqueezeNetFeatures().state_dict().items()}
    backbone |= {"classifier.1.weight": torch.zeros(1000, 512, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    linear = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 384, 384, 512, 512))
    }
    paths = {"backbone_path": tmp_path / "squeezenet.pth", "linear_path": tmp_path / "lpips.pth"}
    torch.save(backbone, paths["backbone_path"])
    torch.save(linear, paths["linear_path"])
    return paths
