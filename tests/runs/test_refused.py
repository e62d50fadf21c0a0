"""What cannot be trained ends before the first step, in one line that names the culprit, and leaves files alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.common.errors import last_line
from tests.helpers import TINY, Attack, call, folders, printed_last, save_nifti, words, workflow

BAD_DATALISTS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{training: 3", "bad.json: is not JSON"),
    "wrong top-level type": ([], "bad.json: holds a list, not an object"),
    "misspelt split": ({"trainin": []}, "bad.json: unknown list 'trainin' (did you mean 'training'?)"),
    "misspelt entry key": (
        {"training": [{"imag": "x"}]},
        "training[0] has the unknown key 'imag' (did you mean 'image'?)",
    ),
    "empty split": ({"validation": []}, "bad.json: the list 'validation' is empty"),
    "absolute path missing": ({"training": [{"image": "/no/v.nii.gz"}]}, "error: /no/v.nii.gz: no such file"),
    "relative path missing": ({"training": [{"image": "no/v.nii.gz"}]}, "no/v.nii.gz: no such file; correct the path"),
    "directory instead of file": ({"training": [{"image": "/"}]}, "error: /: is a directory, not a NIfTI file"),
}
GRADED = np.arange(4096, dtype=np.int16).reshape(16, 16, 16)
BAD_VOLUMES: dict[str, tuple[np.ndarray | bytes, str]] = {
    "not a NIfTI": (b"hello " * 99, "is not a readable NIfTI file"),
    "zero bytes": (b"", "is empty (0 bytes)"),
    "2D": (GRADED[0], "has shape (16, 16), not 3D"),
    "4D": (np.stack([GRADED] * 2, -1), "has shape (16, 16, 16, 2), not 3D"),
    "one slice": (GRADED[:, :, :1], "has shape (16, 16, 1), a single slice"),
    "NaN voxels": (np.where(GRADED > 9, GRADED, np.nan).astype(np.float32), "has voxels that are not finite"),
    "constant": (np.zeros_like(GRADED), "is constant (every voxel 0)"),
    "uint16 overflow": (GRADED.astype(np.uint16) + 61000, "reaches 65095 HU; uint16 overflow or wrong scaling"),
}
BAD_KNOBS: dict[str, tuple[dict[str, Any], str]] = {
    "missing datalist": ({"json_data_list": "no.json"}, "no.json: no such datalist; make one with"),
    "patch not divisible": ({"autoencoder_train#patch_size": [32, 32, 30]}, "is [32, 32, 30], not divisible"),
    "negative learning rate": (
        {"autoencoder_train#lr": -1e-4},
        "autoencoder_train#lr is -0.0001; use a number above 0",
    ),
    "overlap of one": ({"val_overlap": 1}, "val_overlap is 1; use a number from 0 up to below 1"),
    "no epochs": ({"autoencoder_train#n_epochs": 0}, "autoencoder_train#n_epochs is 0; use an integer of at least 1"),
    "fixed without spacing": ({"data_option#spacing_type": "fixed"}, "spacing_type 'fixed' needs spacing"),
    "unknown spacing_type": ({"data_option#spacing_type": "foo"}, "spacing_type 'foo' is unknown; use one of original"),
    "unknown recon_loss": ({"autoencoder_train#recon_loss": "l3"}, "recon_loss 'l3' is unknown; use l1 or l2"),
    "finetune without weights": ({"finetune": True}, "finetune is true, but trained_autoencoder_path is None"),
    "missing perceptual weights": (
        {"perceptual_pretrained": True, "perceptual_backbone_path": "s.pth"},
        "s.pth: perceptual weights are missing; fetch them with",
    ),
}
OTHERS = (
    "truncated gzip", "singular affine", "no permission", "weights of another shape", "weights that run code",
    "truncated weights", "model_dir a file",
)  # fmt: skip


def bad_case(name: str, datalist: Path, root: Path) -> tuple[dict[str, Any], str]:
    """Overrides of a run that must end before it begins, and what its last line must say."""
    content = json.loads(datalist.read_text())
    volume, weights = root / "bad.nii.gz", root / "w.pt"
    with_datalist = {"json_data_list": str(root / "bad.json")}
    with_weights = {"finetune": True, "trained_autoencoder_path": str(weights)}

    def write(datalist: Any) -> None:
        (root / "bad.json").write_text(datalist if isinstance(datalist, str) else json.dumps(datalist))

    write(content | {"training": [*content["training"], {"image": str(volume), "class": "ct"}]})
    if name in BAD_KNOBS:
        return BAD_KNOBS[name]
    if name in BAD_DATALISTS:
        change, message = BAD_DATALISTS[name]
        write(content | change if isinstance(change, dict) else change)
        return with_datalist, message
    if name in BAD_VOLUMES:
        data, message = BAD_VOLUMES[name]
        volume.write_bytes(data) if isinstance(data, bytes) else save_nifti(volume, data)
        return with_datalist, f"bad.nii.gz: {message}"
    if name == "truncated gzip":
        save_nifti(volume, np.random.default_rng(0).integers(0, 99, (40, 40, 40)).astype(np.int16))
        volume.write_bytes(volume.read_bytes()[:-5000])
        return with_datalist, "bad.nii.gz: is truncated or damaged"
    if name == "singular affine":
        image = nib.Nifti1Image(GRADED, None)
        image.header.set_sform(np.diag([1.0, 1.0, 0.0, 1.0]), code=1)
        nib.save(image, volume)
        return with_datalist, "bad.nii.gz: its affine is singular"
    if name == "no permission":
        save_nifti(volume, GRADED).chmod(0)
        return with_datalist, "bad.nii.gz: cannot be read (permission denied)"
    if name == "weights of another shape":
        torch.save({"encoder.blocks.0.conv.conv.weight": torch.zeros(2)}, weights)
        return with_weights, "w.pt: encoder.blocks.0.conv.conv.weight is (2,), but the network's is (16, 1, 3, 3, 3)"
    if name == "weights that run code":
        torch.save({"weights": Attack(root / "owned")}, weights)
        return with_weights, "w.pt: is damaged or holds more than tensors, so it is not loaded"
    if name == "truncated weights":
        torch.save({"weights": torch.zeros(5000)}, weights)
        weights.write_bytes(weights.read_bytes()[:9000])
        return with_weights, "w.pt: is damaged or holds more than tensors"
    assert name == "model_dir a file"
    (root / "file").write_text("precious")
    return {"model_dir": str(root / "file")}, "file: cannot be written to (File exists); choose another folder"


BAD = (*BAD_DATALISTS, *BAD_VOLUMES, *BAD_KNOBS, *OTHERS)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_before_the_first_step(name: str, datalist: Path, tmp_path: Path) -> None:
    if name == "no permission" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    overrides, message = bad_case(name, datalist, tmp_path)
    places = folders(tmp_path, datalist)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "autoencoder.pt").write_text("precious")
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        workflow("train", **{**TINY, **places, **overrides})
    assert message in last_line(caught.value) and last_line(caught.value).startswith("error: ")
    assert not (tmp_path / "owned").exists()
    assert [(p.name, p.read_text()) for p in (tmp_path / "models").iterdir()] == [("autoencoder.pt", "precious")]


def test_the_command_line_ends_with_one_clear_line(datalist: Path, tmp_path: Path) -> None:
    places = words(folders(tmp_path, datalist))
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        "['configs/train.json','configs/demo.json']",
        *places,
    ]
    done = call([*command, "--autoencoder_train#lr", "-1"])
    assert done.returncode == 1 and printed_last(done) == "error: autoencoder_train#lr is -1; use a number above 0"
    assert not list((tmp_path / "models").glob("*"))
