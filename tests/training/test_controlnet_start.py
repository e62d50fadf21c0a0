"""What is settled before a ControlNet is trained: where it begins, its table of labels, and what it says of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.controlnet_maisi import ControlNetMaisi

from scripts.common.errors import UserError
from scripts.data.labels import LabelStore
from scripts.data.latent_list import load_latents
from scripts.data.latents import LatentStore
from scripts.networks import diffusion_files
from scripts.networks.controlnet import Control, coded
from scripts.networks.diffusion_files import CONTROLNET, UNET
from scripts.networks.unet import UNetWeights, predict
from scripts.networks.weights import write_tensors
from scripts.training import controlnet_start
from scripts.training.average import AveragedNetwork
from scripts.training.controlnet_start import (
    begun,
    convert_labels,
    facts,
    labels_of,
    rows,
    table_of,
    warn_of_labels,
    warn_of_scale,
)
from scripts.training.region_losses import RegionLosses
from tests.helpers import (
    CONTROLNET as SHAPE,
)
from tests.helpers import (
    TINY_CONTROLNET,
    controlnet_folders,
    last_line_of,
    make_labelled,
    same,
    save_nifti,
    small_controlnet,
    small_unet,
)

CONTRAST = RegionLosses(labels=(23, 99), weight=5.0, contrast_weight=0.01)
MAPPING = {"ct": 1, "ct_contrast": 3, "mri_t1": 9}


def unet_file(folder: Path, scale: float = 1.25, **told: Any) -> UNetWeights:
    content = diffusion_files.content(small_unet(), UNET, epoch=3, loss=0.5, scale_factor=scale, facts=told)
    write_tensors(content, folder / "unet.pt")
    return UNetWeights(small_unet(seed=5), folder, "unet.pt")


def entries(folder: Path) -> list[dict[str, Any]]:
    datalist = make_labelled(folder, [(8, 4, 4)] * 3 + [(8, 4, 6)] * 2)
    return load_latents(str(datalist), "training", modality_mapping=MAPPING, labels=True, fold=0)


# Where it begins


def test_it_begins_as_the_unets_encoder_and_changes_nothing_yet(tmp_path: Path) -> None:
    fresh = ControlNetMaisi(
        spatial_dims=3, in_channels=4, num_class_embeds=128, resblock_updown=True, include_fc=True,
        **SHAPE | {"use_flash_attention": False},
    )  # fmt: skip
    weights = unet_file(tmp_path)
    network = begun(fresh, weights, None).eval()
    assert torch.equal(network.conv_in.conv.weight, small_unet().conv_in.conv.weight)
    assert torch.equal(network.class_embedding.weight, small_unet().class_embedding.weight)
    x, labels = torch.randn(1, 4, 8, 4, 4), torch.randint(0, 255, (1, 1, 32, 16, 16), dtype=torch.uint8)
    given = {"spacing": torch.full((1, 3), 150.0), "modality": torch.tensor([1])}
    with torch.no_grad():
        told, alone = (
            predict(weights.network, x, torch.tensor([500.0]), **given, control=control)
            for control in (Control(network, coded(labels)), None)
        )
    assert torch.equal(told, alone)


@pytest.mark.parametrize("theirs", [False, True])
def test_it_goes_on_from_weights_of_ours_and_of_nv_generate_ctmr(theirs: bool, tmp_path: Path) -> None:
    start = small_controlnet(seed=1)
    if theirs:
        torch.save(
            {"epoch": 3, "loss": torch.tensor(0.5), "controlnet_state_dict": start.state_dict()}, tmp_path / "start.pt"
        )
    else:
        content = diffusion_files.content(start, CONTROLNET, epoch=3, loss=0.5, scale_factor=1.0)
        write_tensors(content, tmp_path / "start.pt")
    network = begun(small_controlnet(), unet_file(tmp_path), str(tmp_path / "start.pt"))
    assert same(network.state_dict(), start.state_dict())


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights, other = unet_file(tmp_path), small_controlnet(num_channels=[8, 24])
    with pytest.raises(UserError, match=r"^controlnet_def: \S+ has shape .*, in the UNet .*; give it the same num_cha"):
        begun(other, weights, None)
    torch.save({"controlnet_state_dict": other.state_dict()}, tmp_path / "other.pt")
    for file in ("other.pt", "unet.pt"):
        with pytest.raises(UserError, match=rf"^{tmp_path}/{file}: .*\(controlnet_def\)"):
            begun(small_controlnet(), weights, str(tmp_path / file))
    with pytest.raises(UserError, match="none.pt: no such weights file; correct existing_ckpt_filepath$"):
        begun(small_controlnet(), weights, str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="^controlnet_def#num_class_embeds is null, but the UNet takes the modality; "):
        begun(small_controlnet(num_class_embeds=None), weights, None)


# The table of labels


def test_the_table_is_that_of_the_config_with_numbers() -> None:
    assert table_of({"23": "neighbours", "24": 4}, CONTRAST) == {23: "neighbours", 24: 4}
    assert table_of({"23": "neighbours"}, RegionLosses()) is None  # no contrast


@pytest.mark.parametrize(
    ("key", "place"),
    [("0", 1), ("256", 1), ("-1", 1), ("liver", 1), ("23", 256), ("23", -1), ("23", True), ("23", 1.5), ("23", "body")],
)
def test_what_is_no_label_is_refused(key: str, place: Any) -> None:
    for losses in (CONTRAST, RegionLosses()):
        with pytest.raises(UserError) as caught:
            table_of({"24": 4, key: place}, losses)
        told = f"roi_labels has {key!r}: {place!r}; use a label from 1 to 255, and another one or 'neighbours'"
        assert str(caught.value) == told


def test_a_contrast_needs_a_table() -> None:
    with pytest.raises(UserError, match="^controlnet_train#use_region_contrasive_loss is true, but roi_labels is "):
        table_of({}, CONTRAST)
    assert table_of({}, RegionLosses()) is None


# Which labels there are


def test_labels_are_counted_by_map_whoever_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, store = entries(tmp_path), LabelStore(str(tmp_path / "store"))
    path = Path(found[0]["label"])
    image = nib.load(path)
    save_nifti(path, np.minimum(np.asarray(image.dataobj), 3).astype(np.uint8), image.affine)
    convert_labels({"training": found}, store, 1)
    assert labels_of(found, store) == {0: 3, 1: 3, 3: 3, 23: 2, 200: 2}
    shares: list[Counter] = []
    monkeypatch.setattr(controlnet_start, "gather", lambda own: shares.append(own) or shares)
    labels_of(found, store, 0, 2)
    assert labels_of(found, store, 1, 2) == {0: 3, 1: 3, 3: 3, 23: 2, 200: 2}
    assert shares[0] != shares[1]


def test_labels_that_never_occur_and_missing_bodies_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_labels({0: 5, 23: 2, 200: 5}, 5, CONTRAST, {23: "neighbours", 26: 1, 27: 62})
    assert capsys.readouterr().err.splitlines() == [
        "warning: controlnet_train#weighted_loss_label has 99, which no training map has; correct it",
        "warning: roi_labels has 26, 27, which no training map has; correct it",
    ]
    warn_of_labels({0: 5, 23: 5, 200: 2}, 5, RegionLosses(labels=(99,)), None)  # which nothing is made of
    assert capsys.readouterr().err == (
        "warning: 3 of 5 training maps lack 200, the body; generated voxels of label 0 become air; encode again with "
        "body_label 200\n"
    )


# The UNet's scale, and what is told and kept


def test_latents_of_another_autoencoder_or_scale_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, store = entries(tmp_path), LatentStore(str(tmp_path / "store"))
    store.convert_missing(found, progress=False)
    capsys.readouterr()
    warn_of_scale(found, unet_file(tmp_path, 1.0, autoencoder_sha256="ab" * 32), store)
    assert capsys.readouterr().err == ""
    warn_of_scale(found, unet_file(tmp_path, 1.25), store)
    said = capsys.readouterr().err
    assert said.startswith(
        f"warning: the scale factor of {tmp_path}/unet.pt is 1.2500, that of these latents would be 1.0"
    )
    warn_of_scale(found, unet_file(tmp_path, 1.0, autoencoder_sha256="cd" * 32), store)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/unet.pt was trained on latents of the autoencoder with SHA-256 cdcdcdcdcdcd, these are "
        "of abababababab; encode with the other one, or train the diffusion model anew\n"
    )


def test_the_unet_and_the_labels_are_kept_with_the_weights(tmp_path: Path) -> None:
    found, weights = entries(tmp_path), unet_file(tmp_path)
    told = facts(found, weights, {0: 3, 23: 2, 200: 3})
    assert (told["unet_sha256"], told["labels"]) == (weights.file.sha256, [0, 23, 200])
    assert told["scale_factor_origin"] == f"of {tmp_path}/unet.pt" and told["sizes"] == [[8, 4, 4]]


def test_the_table_of_the_start_names_the_unet_and_the_common_labels(tmp_path: Path) -> None:
    found, weights = entries(tmp_path), unet_file(tmp_path)
    bare = {"controlnet": torch.nn.Linear(9999, 100_000, device="meta")}
    trainer: Any = SimpleNamespace(bare=bare, averages={"controlnet": AveragedNetwork(bare["controlnet"], 0.5)})
    told = rows(found, weights, trainer, {0: 3, 1: 3, 23: 2, 200: 1})
    assert told["UNet"] == f"{tmp_path}/unet.pt (SHA-256 {weights.file.sha256[:12]}), frozen"
    assert told["labels"] == "1 (3), 23 (2), 200 (1) (of 3 maps)"
    assert told["scale factor"] == f"1.2500 (of {tmp_path}/unet.pt)" and told["weights"].startswith("20.00 GB")
    assert rows(found, weights, trainer, {0: 3, 1: 3, 23: 2, 200: 1}, most=2)["labels"] == (
        "1 (3), 23 (2), 1 others (of 3 maps)"
    )
    assert rows(found, weights, trainer, {0: 3})["labels"] == "none (of 3 maps)"


# What cannot be trained


def spoilt(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    """Changes the first label map."""

    def spoil(folder: Path) -> None:
        image = nib.load(path := folder / "v0_label.nii.gz")
        save_nifti(path, change(np.asarray(image.dataobj)), image.affine)

    return spoil


def listed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Changes all entries of the datalist."""

    def spoil(folder: Path) -> None:
        content = json.loads((path := folder / "datalist_controlnet.json").read_text())
        for entry in content["training"]:
            change(entry)
        path.write_text(json.dumps(content))

    return spoil


def bare_unet(folder: Path) -> None:
    torch.save(small_unet().state_dict(), folder.parent / "models" / "diff_unet_3d_rflow-ct.pt")


def no_unet(folder: Path) -> None:
    (folder.parent / "models" / "diff_unet_3d_rflow-ct.pt").unlink()


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "a map that is no four times the latent": (
        spoilt(lambda labels: labels[:-4]), {},
        "v0_label.nii.gz: is 28 x 16 x 16 voxels, but its latent is 8 x 4 x 4, which takes exactly 4 times as many, ",
    ),
    "a map of no integers": (
        spoilt(lambda labels: labels + np.float32(0.5)), {},
        "v0_label.nii.gz: has the label 3.5, which is no integer; resample label maps by nearest",
    ),
    "a label above 255": (
        spoilt(lambda labels: labels.astype(np.int16) + 100), {},
        "v0_label.nii.gz: has the label 300; use labels 0 to 255",
    ),
    "a missing map": (lambda folder: (folder / "v0_label.nii.gz").unlink(), {}, "v0_label.nii.gz: no such file"),
    "a datalist without maps": (listed(lambda entry: entry.pop("label")), {}, "v0_emb.nii.gz: has no label (label is "),
    "all in the held-out fold": (
        listed(lambda entry: entry.update(fold=0)), {},
        "datalist_controlnet.json: all 5 entries are of fold 0, which is held back; choose another fold",
    ),
    "no diffusion weights": (no_unet, {}, "holds no weights of latent diffusion (diff_unet_3d_rflow-ct.pt and the "),
    "no scale factor": (bare_unet, {}, "diff_unet_3d_rflow-ct.pt: scale_factor is None; give --scale_factor, the "),
    "a place that is no label": (lambda _: None, {"roi_labels": {"23": "body"}}, "roi_labels has '23': 'body'; use"),
    "a fold that is none": (lambda _: None, {"controlnet_train#fold": -1}, "controlnet_train#fold is -1; use a whole"),
    "a ControlNet of another size": (
        lambda _: None, {"controlnet_def#num_channels": [8, 24]}, "error: controlnet_def: ",
    ),
    "a name with a folder": (lambda _: None, {"exp_name": "a/b"}, "exp_name is 'a/b.pt'; use the name of a file"),
    "no autoencoder for pictures": (lambda _: None, {"sample_interval": 1}, "or set sample_interval to 0, for a tr"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_ends_before_the_first_step(name: str, tmp_path: Path) -> None:
    spoil, options, message = REFUSED[name]
    datalist = make_labelled(tmp_path / "l", [(8, 4, 4)] * 5)
    given = controlnet_folders(tmp_path, datalist)
    spoil(datalist.parent)
    told = last_line_of("train_controlnet", **{**TINY_CONTROLNET, **given, **options})
    assert told.startswith("error: ") and message in told and "\n" not in told
    assert not list((tmp_path / "models").glob("controlnet*"))
