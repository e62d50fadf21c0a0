"""configs/encode.json with label maps: beside the latents, on their grid, and in the list of a ControlNet training."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from scripts.common.errors import UserError
from scripts.data.datasets import LabelledVolumes
from scripts.data.labels import with_body
from scripts.use.encode import resized
from tests.helpers import SMALL, last_line_of, oriented_affine, run, save_nifti

SIZE = (10, 12, 17)  # RAS; of which 10 and 17 are no multiples of 4
REFERENCE = os.environ.get("NV_GENERATE_CTMR", "")  # a checkout of NV-Generate-CTMR


@pytest.fixture
def options(weights: Path, tmp_path: Path) -> dict[str, Any]:
    where = {"json_data_list": str(tmp_path / "list.json"), "output_dir": str(tmp_path / "emb")}
    return {**where, "trained_autoencoder_path": str(weights), **SMALL}


def pair(folder: Path, name: str, seed: int = 0) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    """A volume, RAS, with a block of body, and its label map, LPS, with a label in it; and both as RAS arrays."""
    rng = np.random.default_rng(seed)
    hu = rng.integers(-1010, -990, SIZE).astype(np.int16)
    hu[2:9, 2:10, :] = rng.integers(-50, 50, (7, 8, 17))
    labels = np.zeros(SIZE, np.uint8)
    labels[4:7, 4:8, 3:9] = 1 + seed
    affine = oriented_affine("RAS", (2.0, 2.5, 3.0))
    image = save_nifti(folder / f"{name}.nii.gz", hu, affine)
    turned = nib.orientations.apply_orientation(labels, [[0, -1], [1, -1], [2, 1]])
    back = affine @ nib.orientations.inv_ornt_aff([[0, -1], [1, -1], [2, 1]], SIZE)
    label = save_nifti(folder / f"{name} seg.nii.gz", turned, back)
    assert nib.aff2axcodes(back) == ("L", "P", "S")
    return {"image": str(image), "label": str(label)}, hu, labels


def pairs(folder: Path, **splits: int) -> dict[str, list[dict[str, str]]]:
    """A datalist of so many pairs in each split, written to `list.json`; their names are `<split>0`, ..."""
    content = {split: [pair(folder, f"{split}{i}", i)[0] for i in range(count)] for split, count in splits.items()}
    (folder / "list.json").write_text(json.dumps(content))
    return content


def written(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    assert image.get_data_dtype() == np.uint8
    return np.asarray(image.dataobj), image.affine


def test_a_map_lies_on_the_grid_of_its_volume_and_has_four_voxels_for_one_of_the_latent(
    options: dict[str, Any], tmp_path: Path
) -> None:
    content = pairs(tmp_path, training=1)
    _, hu, labels = pair(tmp_path, "training0")
    run("encode", **options)
    latent = nib.load(tmp_path / "emb" / "training0_emb.nii.gz")
    found, affine = written(tmp_path / "emb" / "training0_label.nii.gz")
    assert latent.shape == (3, 3, 5, 4) and found.shape == (12, 12, 20)
    assert np.array_equal(affine, latent.affine) and np.array_equal(
        affine, nib.load(content["training"][0]["image"]).affine
    )
    wanted = with_body(labels, hu)
    assert set(np.unique(wanted)) == {0, 1, 200}
    assert np.array_equal(found[:10, :, :17], wanted) and not found[10:].any() and not found[:, :, 17:].any()
    side = json.loads((tmp_path / "emb" / "training0_emb.nii.gz.json").read_text())
    assert side["dim"] == list(SIZE) and side["spacing"] == [2.0, 2.5, 3.0]


def test_a_map_is_resampled_with_its_volume(tmp_path: Path) -> None:
    """Blocks that a finer and a coarser grid keep: each voxel of the map has the label that its HU tell."""
    hu = np.kron(np.random.default_rng(0).integers(1, 6, (3, 4, 5)), np.ones((8, 4, 4))).astype(np.int16)
    affine = oriented_affine("RAS", (1.0, 2.0, 2.0))
    entry = {
        "image": str(save_nifti(tmp_path / "v.nii.gz", hu * 100, affine)),
        "label": str(save_nifti(tmp_path / "l.nii.gz", hu.astype(np.uint8), affine)),
    }
    volume = LabelledVolumes([entry], body_label=None)[0]
    assert torch.equal(volume["labels"][0, 0], torch.from_numpy(hu.astype(np.uint8)))
    got = resized(volume, 16)
    assert list(got["voxels"].shape[2:]) == [32, 16, 16] == list(got["labels"].shape[2:])
    told, labels = got["voxels"][0, 0] / 100, got["labels"][0, 0]
    within = told == told.round()  # where the voxels around are of one block
    assert within.float().mean() > 0.3 and torch.equal(told[within], labels[within].float())
    centres = nib.affines.apply_affine(got["affine"], np.argwhere(np.ones(labels.shape)))
    nearest = np.rint(nib.affines.apply_affine(np.linalg.inv(affine), centres) + 1e-6).astype(
        int
    )  # ties: the later one
    assert np.array_equal(hu[tuple(nearest.T)], labels.numpy().ravel())


def test_maps_are_added_to_latents_that_are_there(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = pairs(tmp_path, training=2)
    bare = {"training": [{"image": entry["image"]} for entry in content["training"]]}
    (tmp_path / "list.json").write_text(json.dumps(bare))
    run("encode", **options)
    folder = tmp_path / "emb"
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert not [name for name in before if "label" in name or "controlnet" in name]
    (tmp_path / "list.json").write_text(json.dumps(content))
    run("encode", **options)
    assert {
        name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in before if "emb.nii" in name
    } == {name: was for name, was in before.items() if "emb.nii" in name}
    assert (folder / "datalist.json").read_bytes() == before["datalist.json"][0]
    maps = sorted(folder.glob("*_label.nii.gz"))
    assert [path.name for path in maps] == ["training0_label.nii.gz", "training1_label.nii.gz"]
    maps[1].unlink()
    caplog.set_level("INFO")
    run("encode", **options)
    assert "1 volumes encoded, 1 were there already, 0 failed" in caplog.text and maps[1].exists()
    last = last_line_of("encode", body_label=None, **options)
    assert "emb: holds results of other settings (body_label was 200, now it is None); give another output_dir" in last
    source = Path(content["training"][0]["label"])
    corrected = np.asarray(nib.load(source).dataobj).copy()
    corrected[corrected == corrected.max()] = 77
    nib.save(nib.Nifti1Image(corrected, nib.load(source).affine, nib.load(source).header), source)
    assert not (written(maps[0])[0] == 77).any()
    latents = {path: path.stat().st_mtime_ns for path in folder.glob("*_emb.nii.gz")}
    run("encode", **options)  # a map that was corrected is made anew, the latents stay
    assert (written(maps[0])[0] == 77).any()
    assert latents == {path: path.stat().st_mtime_ns for path in latents}


@pytest.mark.parametrize(
    ("splits", "folds"),
    [({"training": 6, "validation": 2, "testing": 1}, [1, 2, 3, 4, 1, 0, 0]), ({"training": 7}, [0, 1, 2, 3, 4, 0])],
)
def test_the_list_of_pairs_has_folds(
    options: dict[str, Any], tmp_path: Path, splits: dict[str, int], folds: Sequence[int]
) -> None:
    content = pairs(tmp_path, **splits)
    content["training"][1].pop("label")  # that one is no pair
    (tmp_path / "list.json").write_text(json.dumps(content))
    run("encode", **options)
    names = [f"{split}{i}" for split in splits for i in range(splits[split]) if f"{split}{i}" != "training1"]
    shared = {"dim": list(SIZE), "spacing": [2.0, 2.5, 3.0], "modality": "ct"}
    items = [{"image": f"{name}_emb.nii.gz", "label": f"{name}_label.nii.gz", **shared} for name in names]
    count = len(folds)
    assert items[count:] == items[-1:] * ("testing" in splits)
    wanted = {"training": [item | {"fold": fold} for item, fold in zip(items, folds, strict=False)]}
    found = json.loads((tmp_path / "emb" / "datalist_controlnet.json").read_text())
    assert found == wanted | ({"testing": items[count:]} if "testing" in splits else {})
    moved = content | {"testing": content.pop("training")}  # another split of these volumes: nothing is encoded
    (tmp_path / "list.json").write_text(json.dumps(moved))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "emb").glob("*.nii.gz")}
    run("encode", **options)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    lists = [
        json.loads((tmp_path / "emb" / name).read_text()) for name in ("datalist.json", "datalist_controlnet.json")
    ]
    for found in lists:
        assert len(found["training"]) == (0 if found is lists[0] else splits.get("validation", 0))
        assert {item["image"][:8] for item in found["testing"]} >= {"training"}
    before = {path: path.read_bytes() for path in (tmp_path / "emb").glob("*.json")}
    alone = {"dataset_dir": str(tmp_path / "alone"), "json_data_list": None}
    Path(alone["dataset_dir"]).mkdir()  # type: ignore[arg-type]
    shutil.copy(moved["testing"][0]["image"], f"{alone['dataset_dir']}/training0.nii.gz")
    run("encode", **options | alone)  # no datalist says which list it is in
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.skipif(not REFERENCE, reason="NV_GENERATE_CTMR does not say where a checkout of NV-Generate-CTMR is")
def test_the_reference_reads_what_is_written(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own loader of a ControlNet training, with fold 0 held back."""
    root = Path(REFERENCE, "scripts")  # a package called `scripts` too, so it is imported by another name
    spec = importlib.util.spec_from_file_location(
        "nv_generate", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    monkeypatch.setitem(sys.modules, "nv_generate", importlib.util.module_from_spec(spec))
    utils = importlib.import_module("nv_generate.utils")
    pairs(tmp_path, training=3, validation=1)
    run("encode", resize_multiple=8, **options)
    folder, mapping = tmp_path / "emb", json.loads(Path("configs/modality_mapping.json").read_text())
    loaders = utils.prepare_maisi_controlnet_json_dataloader(
        str(folder / "datalist_controlnet.json"), str(folder), batch_size=1, fold=0, modality_mapping=mapping
    )
    read = [list(loader) for loader in loaders]
    assert [len(batches) for batches in read] == [3, 1]
    for batch in read[0] + read[1]:
        name = Path(batch["label"].meta["filename_or_obj"][0]).name.removesuffix("_label.nii.gz")
        latent, labels = (nib.load(folder / f"{name}_{kind}.nii.gz").get_fdata() for kind in ("emb", "label"))
        assert np.array_equal(batch["image"][0].permute(1, 2, 3, 0), latent.astype(np.float32))
        assert batch["label"].dtype == torch.int64 and np.array_equal(batch["label"][0, 0], labels)
        assert torch.allclose(batch["spacing"], torch.tensor([[2.0 * 10 / 8, 2.5 * 12 / 16, 3.0 * 17 / 16]]) * 100)
        assert batch["modality"].tolist() == [mapping["ct"]] and batch["fold"].tolist()[0] in range(5)


# What cannot be used


def test_volumes_whose_maps_are_wrong_are_passed_over(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = pairs(tmp_path, training=6)
    paths = [entry["label"] for entry in content["training"]]
    data, affine = (lambda image: (np.asarray(image.dataobj), image.affine))(nib.load(paths[0]))
    save_nifti(Path(paths[0]), data[:, :-1], affine)
    save_nifti(Path(paths[1]), data, affine + np.eye(4, k=3))
    save_nifti(Path(paths[2]), data * np.float32(0.5), affine)
    save_nifti(Path(paths[3]), data + np.int16(255), affine)
    Path(paths[4]).unlink()
    last = last_line_of("encode", **options)
    assert last.startswith(f"error: 5 of 6 volumes could not be encoded: {paths[0]}: is 10 x 11 x 17 voxels, but ")
    image = content["training"][1]["image"]
    for told in (
        f"{paths[1]}: lies up to 0.5 voxels beside {image}; give the label map that was drawn on this volume, or",
        f"{paths[2]}: has the label 0.5, which is no integer; resample label maps by nearest",
        f"{paths[3]}: has the label 256; use labels 0 to 255, 0 for no body",
        f"{paths[4]}: no such file; correct the path",
    ):
        assert f"passed over: {told}" in caplog.text
    assert [path.name for path in sorted((tmp_path / "emb").glob("*.nii.gz"))] == [
        "training5_emb.nii.gz", "training5_label.nii.gz",
    ]  # fmt: skip
    found = json.loads((tmp_path / "emb" / "datalist_controlnet.json").read_text())
    assert [item["image"] for item in found["training"]] == ["training5_emb.nii.gz"]


def test_a_map_is_not_written_over_its_source(options: dict[str, Any], tmp_path: Path) -> None:
    content = pairs(tmp_path, training=1)
    (tmp_path / "emb").mkdir()
    (source := tmp_path / "emb" / "training0_label.nii.gz").write_bytes(
        Path(content["training"][0]["label"]).read_bytes()
    )
    content["training"][0]["label"] = str(source)
    (tmp_path / "list.json").write_text(json.dumps(content))
    for overwrite in (False, True):
        last = last_line_of("encode", overwrite=overwrite, **options)
        assert last == f"error: {source}: would be written over by what is made of it; give another output_dir"


def test_files_of_others_are_refused_again_and_again(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(pairs(tmp_path, training=2)))
    (tmp_path / "emb").mkdir()
    others = [tmp_path / "emb" / name for name in ("training0_label.nii.gz", "training1_emb.nii.gz")]
    for other in others:
        other.write_bytes(b"somebody's")
    while others:
        for _ in range(2):
            last = last_line_of("encode", **options)
            assert last.startswith(f"error: {others[0]}: is there, but is no result of an earlier run; move it")
            assert all(other.read_bytes() == b"somebody's" for other in others)
        others.pop(0).unlink()


@pytest.mark.parametrize("value", [0, 256, "200", True, 1.5])
def test_the_bodys_label_is_a_label(value: Any) -> None:
    with pytest.raises(UserError, match=r"body_label is .*; use a label from 1 to 255, 200 say, or null for none"):
        LabelledVolumes([], body_label=value)


def test_the_body_is_that_of_ct(tmp_path: Path) -> None:
    entry, hu, labels = pair(tmp_path, "v")
    for given, wanted in (
        (entry, with_body(labels, hu)), (entry | {"class": "mri"}, labels), ({"image": entry["image"]}, None),
    ):  # fmt: skip
        volume = LabelledVolumes([given])[0]
        assert np.array_equal(volume["labels"][0, 0], wanted) if wanted is not None else "labels" not in volume
    assert np.array_equal(LabelledVolumes([entry], body_label=9)[0]["labels"][0, 0], with_body(labels, hu, 9))
    assert np.array_equal(LabelledVolumes([entry], body_label=None)[0]["labels"][0, 0], labels)
