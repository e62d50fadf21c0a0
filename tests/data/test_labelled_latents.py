"""Latents with label maps: which there are, by lists and by folds, and what the data set gives of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scripts.common.errors import UserError
from scripts.data.labels import NEIGHBOURS, LabelStore, read_labels, without
from scripts.data.latent_list import load_latents
from scripts.data.latents import LatentDataset, LatentStore
from tests.helpers import make_labelled, save_nifti

SIZES = [(4, 6, 5)] * 3 + [(4, 4, 8)] * 2


@pytest.fixture
def datalist(tmp_path: Path) -> Path:
    """Five pairs, of which the last two are of fold 0."""
    return make_labelled(tmp_path, SIZES)


def load(datalist: Path | list[str], split: str = "training", **arguments: Any) -> list[dict[str, Any]]:
    files = datalist if isinstance(datalist, list) else str(datalist)
    return load_latents(files, split, **{"labels": True, **arguments})


def change(datalist: Path, number: int, **changes: Any) -> None:
    content = json.loads(datalist.read_text())
    entry = content["training"][number]
    content["training"][number] = {k: v for k, v in {**entry, **changes}.items() if v is not ...}
    datalist.write_text(json.dumps(content))


def names(entries: list[dict[str, Any]]) -> list[str]:
    return [Path(entry["image"]).name.removesuffix("_emb.nii.gz") for entry in entries]


# Lists and folds


def test_label_maps_are_beside_their_latents(datalist: Path, tmp_path: Path) -> None:
    entries = load(datalist)
    assert names(entries) == ["v0", "v1", "v2", "v3", "v4"]
    assert [entry["label"] for entry in entries] == [str(tmp_path / f"v{i}_label.nii.gz") for i in range(5)]
    assert all("label" not in entry for entry in load(datalist, labels=False))


def test_a_fold_is_held_back(datalist: Path) -> None:
    assert names(load(datalist, fold=0)) == ["v0", "v1", "v2"]
    assert names(load(datalist, "validation", fold=0)) == ["v3", "v4"]
    assert (
        names(load(datalist, fold=7)) == ["v0", "v1", "v2", "v3", "v4"] and load(datalist, "validation", fold=7) == []
    )
    assert names(load(datalist)) == ["v0", "v1", "v2", "v3", "v4"] and load(datalist, "validation") == []
    assert load(datalist, "testing", fold=0) == []


def test_a_list_of_its_own_is_what_validates(datalist: Path) -> None:
    content = json.loads(datalist.read_text())
    content["validation"] = [content["training"].pop(1)]
    datalist.write_text(json.dumps(content))
    assert names(load(datalist, fold=0)) == ["v0", "v2", "v3", "v4"]
    assert names(load(datalist, "validation", fold=0)) == ["v1"]


def test_not_all_may_be_held_back(datalist: Path, tmp_path: Path) -> None:
    change(datalist, 0, fold=1)
    for number in range(5):
        change(datalist, number, fold=3)
    with pytest.raises(UserError) as caught:
        load(datalist, fold=3)
    told = "all 5 entries are of fold 3, which is held back; choose another fold"
    assert str(caught.value) == f"{datalist}: {told}"
    other = make_labelled(tmp_path / "other", SIZES)  # of several datalists one may be held back as a whole
    assert names(load([str(datalist), str(other)], fold=3)) == ["v0", "v1", "v2", "v3", "v4"]
    assert len(load([str(datalist), str(other)], "validation", fold=3)) == 5
    datalist.write_text("{}")
    with pytest.raises(UserError, match="the list 'training' is empty or missing; add latents to it"):
        load(datalist, fold=3)


def test_what_is_wrong_is_said(datalist: Path, tmp_path: Path) -> None:
    for value in (..., None, ["v1_label.nii.gz"]):
        change(datalist, 1, label=value)
        shown = None if value is ... else value
        with pytest.raises(UserError) as caught:
            load(datalist)
        assert str(caught.value) == (
            f"{tmp_path}/v1_emb.nii.gz: has no label (label is {shown!r}) in the datalist; encode the volume with "
            "configs/encode.json again with a datalist whose entries have label, and train on the "
            "datalist_controlnet.json that it writes"
        )
    change(datalist, 1, label="v4_label.nii.gz")
    with pytest.raises(UserError) as caught:
        load(datalist)
    assert str(caught.value) == (
        f"{tmp_path}/v4_label.nii.gz: is 16 x 16 x 32 voxels, but its latent is 4 x 6 x 5, which takes exactly 4 times "
        "as many, 16 x 24 x 20; encode.json writes the label map that fits"
    )
    change(datalist, 1, label="v9_label.nii.gz")
    with pytest.raises(UserError, match=r"^/\S+/v9_label\.nii\.gz: no such file; correct the path$"):
        load(datalist)


def test_a_map_may_be_stored_in_another_orientation(datalist: Path, tmp_path: Path) -> None:
    path = tmp_path / "v0_label.nii.gz"
    wanted, _ = read_labels(path)
    save_nifti(
        path, np.moveaxis(wanted[:, ::-1], 0, 2), np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    )
    assert nib.aff2axcodes(nib.load(path).affine) == ("P", "S", "R")
    dataset = LatentDataset(load(datalist), LatentStore(tmp_path / "s"), LabelStore(tmp_path / "s"))
    assert np.array_equal(dataset[0]["label"][0], wanted)


# The data set

TABLE: dict[int, int | str] = {23: NEIGHBOURS, 26: 1}


def test_an_item_has_its_map_and_one_without_the_region(datalist: Path, tmp_path: Path) -> None:
    entries, stores = load(datalist), (LatentStore(tmp_path / "s"), LabelStore(tmp_path / "s"))
    item = LatentDataset(entries, *stores, TABLE)[(3, 0)]
    labels, _ = read_labels(tmp_path / "v0_label.nii.gz")
    assert item["latent"].shape == (4, 4, 6, 5) and item["error"] == ""
    assert item["label"].shape == (1, 16, 24, 20) and item["label"].dtype == torch.uint8
    assert np.array_equal(item["label"][0], labels) and (labels == 23).any()
    assert np.array_equal(item["label_without"][0], without(labels, TABLE)[0]) and 23 not in item["label_without"]
    assert item["removed"] == "23"
    other = LatentDataset(entries, *stores, {26: 1})[0]
    assert torch.equal(other["label_without"], other["label"]) and other["removed"] == ""
    plain = LatentDataset(entries, *stores)[0]
    assert torch.equal(plain["label"], item["label"]) and not plain.keys() & {"label_without", "removed"}
    assert LatentDataset(entries, stores[0])[0].keys() == plain.keys() - {"label"}
    batch = next(iter(DataLoader(LatentDataset(entries[:3], *stores, TABLE), 3)))
    assert batch["label_without"].shape == (3, 1, 16, 24, 20) and batch["removed"] == ["23"] * 3


def test_a_map_that_cannot_be_read_any_more_is_named(datalist: Path, tmp_path: Path) -> None:
    dataset = LatentDataset(load(datalist), LatentStore(tmp_path / "s"), LabelStore(tmp_path / "s"), TABLE)
    path = tmp_path / "v3_label.nii.gz"
    labels, affine = read_labels(path)
    for changed, told in (
        (labels[:-1], "has changed to shape (15, 16, 32) in the meantime; start again"),
        (np.where(labels == 23, 0.5, labels), "has the label 0.5, which is no integer; resample label maps by nearest"),
    ):
        save_nifti(path, changed, affine)
        item = dataset[3]
        assert item["error"] == f"{path}: {told}"
        assert item["latent"].shape == (4, 4, 4, 8) and item["latent"].isnan().all()
        assert item["label"].shape == item["label_without"].shape == (1, 16, 16, 32) and item["removed"] == ""
        assert not item["label"].any()


def test_what_must_not_change_has_maps_only_where_they_are_asked_for(datalist: Path, tmp_path: Path) -> None:
    with_maps = LatentDataset(load(datalist), LatentStore(tmp_path / "s"), LabelStore(tmp_path / "s"))
    bare = LatentDataset(load(datalist, labels=False), LatentStore(tmp_path / "s"))
    sizes = [[f"v{i}_emb.nii.gz", (tmp_path / f"v{i}_emb.nii.gz").stat().st_size] for i in range(5)]
    assert with_maps.identities() == bare.identities() == sizes
    assert with_maps.label_identities() == [
        [f"v{i}_label.nii.gz", (tmp_path / f"v{i}_label.nii.gz").stat().st_size] for i in range(5)
    ]
