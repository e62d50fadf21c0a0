from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scripts.common.errors import UserError
from scripts.data.latent_list import check_sizes, described, load_latents, ranges, read_mapping
from scripts.data.latents import LatentDataset, LatentStore, rounded, scale_factor
from scripts.data.sampler import EpochSampler
from scripts.measure.latents import LatentHealth
from tests.helpers import save_nifti

MAPPING = {"unknown": 0, "ct": 1, "ct_wo_contrast": 2, "ct_contrast": 3, "mri": 8}
SHAPE = (8, 16, 24, 4)


def ours(folder: Path, name: str, seed: int = 0, shape: tuple[int, ...] = SHAPE, **facts: Any) -> np.ndarray:
    """A latent (X, Y, Z, C) and its side file as `configs/encode.json` writes them; the posterior's sigma is 0.1."""
    data = np.random.default_rng(seed).normal(0.2, 0.5, shape).astype(np.float32)
    health = LatentHealth()
    mu = torch.from_numpy(data).permute(3, 0, 1, 2)[None]
    health.update(mu, torch.full_like(mu, 0.1))
    side = {
        "dim": [4 * n for n in shape[:3]], "spacing": [1.0, 1.5, 2.0], "modality": "ct", "name": name,
        "split": "training", "weights_sha256": "ab", "latent_sums": health.sums(),
    } | facts  # fmt: skip
    path = folder / f"{name}_emb.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_nifti(path, data)
    write(f"{path}.json", side)
    return data


def theirs(folder: Path, name: str, seed: int = 0, **facts: Any) -> np.ndarray:
    """The same as NV-Generate-CTMR's tutorial writes them, where `dim` is the size of the latent."""
    data = ours(folder, name, seed)
    side = {"dim": list(SHAPE[:3]), "spacing": [0.7, 0.7, 5.0], "modality": "ct_contrast"} | facts
    write(folder / f"{name}_emb.nii.gz.json", {key: value for key, value in side.items() if value is not None})
    return data


def write(path: Path | str, content: object) -> str:
    Path(path).write_text(json.dumps(content))
    return str(path)


def listed(folder: Path, names: Sequence[str], split: str = "training", **more: Any) -> str:
    return write(folder / "datalist.json", {split: [{"image": f"{name}.nii.gz", **more} for name in names]})


def load(datalist: str, split: str = "training", **arguments: Any) -> list[dict[str, Any]]:
    return load_latents(datalist, split, **{"modality_mapping": MAPPING, **arguments})


# What there is


def test_ours_are_read(tmp_path: Path) -> None:
    ours(tmp_path, "a")
    (entry,) = load(listed(tmp_path, ["a"], modality="ct"))
    assert entry.pop("noise") == pytest.approx(0.01)
    assert entry == {
        "image": str(tmp_path / "a_emb.nii.gz"), "shape": [4, 8, 16, 24], "spacing": [1.0, 1.5, 2.0],
        "modality": "ct", "modality_number": 1, "dim": [32, 64, 96], "weights_sha256": "ab",
    }  # fmt: skip


def test_theirs_are_read_from_folders_below_another(tmp_path: Path) -> None:
    theirs(tmp_path / "embeddings" / "KiTS", "b c")
    (entry,) = load(listed(tmp_path, ["KiTS/b c"], fold=0), embedding_base_dir=str(tmp_path / "embeddings"))
    assert entry == {
        "image": str(tmp_path / "embeddings/KiTS/b c_emb.nii.gz"), "shape": [4, 8, 16, 24],
        "spacing": [0.7, 0.7, 5.0], "modality": "ct_contrast", "modality_number": 3, "dim": [8, 16, 24],
    }  # fmt: skip


def test_what_the_side_file_lacks_stands_in_the_datalist_or_has_a_default(tmp_path: Path) -> None:
    theirs(tmp_path, "a", modality=None)
    assert load(listed(tmp_path, ["a"], modality="mri"), default_modality="ct")[0]["modality_number"] == 8
    without = listed(tmp_path, ["a"])
    assert load(without, default_modality="ct")[0]["modality_number"] == 1
    assert load(without, modality_mapping=None)[0]["modality_number"] == 0


def test_several_datalists_are_joined_and_validation_may_be_empty(tmp_path: Path) -> None:
    lists = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        ours(folder, "a")
        lists.append(listed(folder, ["a_emb"]))  # a datalist may name the latents themselves
    folders = [str(tmp_path / "two"), str(tmp_path / "one")]
    assert [Path(e["image"]).parts[-2] for e in load_latents(lists, "training", folders)] == ["two", "one"]
    assert load_latents(lists, "validation") == []
    with pytest.raises(UserError, match="embedding_base_dir has 1 entries, but json_data_list 2; give one folder"):
        load_latents(lists, "training", folders[:1])


@pytest.mark.parametrize(
    ("side", "arguments", "told"),
    [
        ({"spacing": None}, {}, r"a_emb\.nii\.gz\.json: spacing is None, not three lengths in mm; write it, or encode"),
        ({"spacing": [1, 1, 0]}, {}, r"a_emb\.nii\.gz\.json: spacing is \[1, 1, 0\], not three lengths"),
        ({"spacing": [1, 1, float("nan")]}, {}, r"a_emb\.nii\.gz\.json: spacing is \[1, 1, nan\], not three lengths"),
        (
            {"modality": None},
            {},
            r"json: has no modality; write it there or into the datalist, or set default_modality",
        ),
        ({"modality": "CT_contrst"}, {}, r"json: modality 'CT_contrst' is not in .* \(the closest is 'ct_contrast'\)"),
        ({}, {"latent_channels": 8}, r"a_emb\.nii\.gz: has 4 channels, but latent_channels is 8; correct that, or enc"),
        ({}, {"include_body_region": True}, r"json: top_region_index is None, not four numbers; write it, or set incl"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, side: dict[str, Any], arguments: dict[str, Any], told: str) -> None:
    theirs(tmp_path, "a", **side)
    with pytest.raises(UserError, match=told):
        load(listed(tmp_path, ["a"]), **arguments)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    for name in "ab":
        ours(tmp_path, name)
        (tmp_path / f"{name}_emb.nii.gz.json").unlink()
    datalist = listed(tmp_path, ["a", "b"])
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz\.json: no such side file; encode the .* \(1 more\)$"):
        load(datalist)
    (tmp_path / "a_emb.nii.gz.json").write_text("{")
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz\.json: is damaged \(.*\); encode the volume with .* again"):
        load(datalist)
    (tmp_path / "a_emb.nii.gz.json").write_text("[]")
    with pytest.raises(UserError, match=r"is damaged \(a list, not an object\)"):
        load(datalist)
    (tmp_path / "a_emb.nii.gz").unlink()
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz: no such latent; encode .*, or correct embedding_base_dir"):
        load(datalist)
    ours(tmp_path, "a")
    save_nifti(tmp_path / "a_emb.nii.gz", np.zeros((8, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz: has shape \(8, 8, 8\), not the \(X, Y, Z, 4\) of a latent"):
        load(listed(tmp_path, ["a"]))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], r"datalist\.json: holds a list, not an object with lists of latents; give the datalist\.json that"),
        ({"trainig": []}, r"unknown list 'trainig' \(did you mean 'training'\?\); rename it"),
        ({"training": {}}, r"'training' is a dict, not a list of latents"),
        ({"training": [{"label": "x"}]}, r"training\[0\] has no image path \(image is None\); give one"),
        ({"name": "KiTS"}, r"the list 'training' is empty or missing; add latents to it"),
    ],
)
def test_a_wrong_datalist_is_named(tmp_path: Path, content: object, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(write(tmp_path / "datalist.json", content))
    with pytest.raises(UserError, match=r"none\.json: no such datalist; give the datalist\.json that configs/encode"):
        load(str(tmp_path / "none.json"))


def test_the_modality_mapping_is_checked(tmp_path: Path) -> None:
    assert read_mapping(write(tmp_path / "m.json", MAPPING)) == MAPPING
    for content, told in (([], "holds no object like"), ({"ct": "1"}, "has the number '1' for 'ct'; use a whole numb")):
        with pytest.raises(UserError, match=rf"m\.json: {told}"):
            read_mapping(write(tmp_path / "m.json", content))
    with pytest.raises(UserError, match=r"n\.json: is no readable JSON file \(.*\); correct modality_mapping_path"):
        read_mapping(str(tmp_path / "n.json"))


def test_sizes_that_the_network_cannot_take_are_refused(tmp_path: Path) -> None:
    ours(tmp_path, "a")
    ours(tmp_path, "b", shape=(8, 12, 8, 4))
    entries = load(listed(tmp_path, ["a", "b"]))
    check_sizes(entries, 4)
    told = r"b_emb\.nii\.gz: is 8 x 12 x 8; 1 of 2 latents have sizes .* no multiples of 8; .* --resize_multiple 32 \("
    with pytest.raises(UserError, match=told):
        check_sizes(entries, 8)


def test_the_table_and_the_ranges_say_what_is_trained_on(tmp_path: Path) -> None:
    ours(tmp_path, "a")
    ours(tmp_path, "b", shape=(8, 8, 8, 4), spacing=[0.5, 3.0, 2.0])
    theirs(tmp_path, "c")
    entries = load(listed(tmp_path, ["a", "b", "c"]))
    assert ranges(entries) == {
        "sizes": [[8, 8, 8], [8, 16, 24]],
        "spacing": [[0.5, 1.0], [0.7, 3.0], [2.0, 5.0]],
        "field_of_view": [[16.0, 32.0], [pytest.approx(44.8), 96.0], [64.0, 480.0]],
        "modalities": {"ct": 1, "ct_contrast": 3},
    }
    assert described(entries) == {
        "latents": "2 of 8 x 16 x 24, 1 of 8 x 8 x 8",
        "spacing": "0.5..1 x 0.7..3 x 2..5 mm",
        "modalities": "2 ct (1), 1 ct_contrast (3)",
    }
    assert described(entries, most=1)["latents"] == "2 of 8 x 16 x 24, 1 of 1 other sizes"


# The store


def test_a_latent_comes_back_channels_first(tmp_path: Path) -> None:
    mine, other = ours(tmp_path, "a"), theirs(tmp_path, "b", seed=1)
    entries, store = load(listed(tmp_path, ["a", "b"])), LatentStore(tmp_path / "store")
    assert store.convert_missing(entries, num_workers=2, progress=False) == 2
    first, second = store.open(entries[0]), store.open(entries[1])
    assert first.dtype == np.float16 and np.array_equal(first[...], mine.transpose(3, 0, 1, 2).astype(np.float16))
    assert second.dtype == np.float32 and np.array_equal(second[...], other.transpose(3, 0, 1, 2))
    assert np.array_equal(second[1:3, 2:5, 4:8, 5:9], other.transpose(3, 0, 1, 2)[1:3, 2:5, 4:8, 5:9])
    assert store.convert_missing(entries, progress=False) == 0


def test_float16_is_taken_where_it_costs_a_hundredth_of_the_noise() -> None:
    data = np.random.default_rng(0).normal(0, 1, (4, 8, 8, 8)).astype(np.float32)
    error = float(np.mean((data.astype(np.float16).astype(np.float64) - data) ** 2))
    # Within 2^e..2^(e+1) the step is 2^(e-10), and what is rounded away is uniform within it: step^2 / 12.
    step = 2.0 ** (np.floor(np.log2(np.abs(data))) - 10)
    assert error == pytest.approx(np.mean(step**2) / 12, rel=0.1)
    assert rounded(data, 101 * error).dtype == np.float16 and rounded(data, 99 * error).dtype == np.float32
    assert rounded(np.full((4, 2, 2, 2), 0.5, np.float32), 0.0).dtype == np.float16
    assert rounded(np.full((4, 2, 2, 2), 1e6, np.float32), 1.0).dtype == np.float32


def test_what_is_not_finite_or_has_changed_is_not_converted(tmp_path: Path) -> None:
    data = ours(tmp_path, "a")
    ours(tmp_path, "b")
    entries, store = load(listed(tmp_path, ["a", "b"])), LatentStore(tmp_path / "store")
    data[3, 4, 5, 1] = np.nan
    save_nifti(tmp_path / "a_emb.nii.gz", data)
    save_nifti(tmp_path / "b_emb.nii.gz", data[:4])
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz: has values that are not finite .*; enc.* again \(1 more\)$"):
        store.convert_missing(entries, progress=False)
    with pytest.raises(UserError, match=r"b_emb\.nii\.gz: has changed to shape \(4, 4, 16, 24\) in the meantime"):
        store.convert(entries[1])
    assert list((tmp_path / "store").iterdir()) == []


def test_a_latent_that_was_encoded_again_is_converted_again(tmp_path: Path) -> None:
    ours(tmp_path, "a")
    entries, store = load(listed(tmp_path, ["a"])), LatentStore(tmp_path / "store")
    first = store.convert(entries[0])
    data = ours(tmp_path, "a", seed=1, shape=(8, 8, 8, 4))
    dataset = LatentDataset(entries, store)
    assert dataset[0]["error"].endswith("has changed to shape (4, 8, 8, 8) in the meantime; start again")
    again = load(listed(tmp_path, ["a"]))
    assert store.convert(again[0]) != first
    assert torch.equal(LatentDataset(again, store)[0]["latent"], torch.tensor(data).permute(3, 0, 1, 2).half().float())


# The data set


def test_an_item_has_the_conditions_in_the_units_of_the_network(tmp_path: Path) -> None:
    data = theirs(tmp_path, "a", top_region_index=[0, 1, 0, 0], bottom_region_index=[0, 0, 1, 0])
    dataset = LatentDataset(load(listed(tmp_path, ["a"]), include_body_region=True), LatentStore(tmp_path / "store"))
    item = dataset[(3, 0)]
    assert torch.equal(item["latent"], torch.tensor(data).permute(3, 0, 1, 2))
    assert torch.equal(item["spacing"], torch.FloatTensor([0.7, 0.7, 5.0]) * 1e2)
    assert item["modality"].dtype == torch.int64 and int(item["modality"]) == 3
    assert item["top_region_index"].tolist() == [0, 100, 0, 0] and item["bottom_region_index"].tolist() == [
        0,
        0,
        100,
        0,
    ]
    assert (item["path"], item["error"]) == (str(tmp_path / "a_emb.nii.gz"), "")
    assert dataset.names() == [["a_emb.nii.gz", "ct_contrast"]]
    assert dataset.identities() == [["a_emb.nii.gz", (tmp_path / "a_emb.nii.gz").stat().st_size]]


def test_a_latent_that_cannot_be_read_any_more_is_named(tmp_path: Path) -> None:
    ours(tmp_path, "a")
    dataset = LatentDataset(load(listed(tmp_path, ["a"])), store := LatentStore(tmp_path / "store"))
    stored = store.convert(dataset.data[0])
    stored.write_bytes(stored.read_bytes()[:100])
    item = dataset[0]
    assert item["error"].startswith(f"{tmp_path / 'a_emb.nii.gz'}: cannot be read any more (")
    assert item["latent"].shape == (4, 8, 16, 24) and item["latent"].isnan().all()


def test_batches_hold_latents_of_one_size(tmp_path: Path) -> None:
    names = [f"{i}" for i in range(6)]
    for i, name in enumerate(names):
        ours(tmp_path, name, seed=i, shape=SHAPE if i % 2 else (8, 8, 16, 4))
    dataset = LatentDataset(load(listed(tmp_path, names)), LatentStore(tmp_path / "store"))
    sampler = EpochSampler(len(dataset), 3, seed=1, sizes=dataset.sizes())
    batches = list(DataLoader(dataset, 3, sampler=sampler))
    assert sorted(tuple(b["latent"].shape) for b in batches) == [(3, 4, 8, 8, 16), (3, 4, 8, 16, 24)]
    assert batches[0]["spacing"].shape == (3, 3) and batches[0]["modality"].tolist() == [1, 1, 1]


# The scale factor


def test_the_scale_factor_is_that_of_all_training_latents(tmp_path: Path) -> None:
    data = [ours(tmp_path, "a"), theirs(tmp_path, "b", seed=1)]
    entries, store = load(listed(tmp_path, ["a", "b"])), LatentStore(tmp_path / "store")
    factor, origin = scale_factor(entries, store)
    assert factor == pytest.approx(1 / np.std(np.stack(data), dtype=np.float64), rel=1e-9)
    assert origin == "1 / std over all 2 training latents"
    health = LatentHealth()
    mu = torch.from_numpy(np.stack(data)).permute(0, 4, 1, 2, 3)
    health.update(mu, mu)
    assert factor == pytest.approx(health.compute()["scale_factor"], rel=1e-12)


def test_a_scale_factor_that_means_nothing_is_refused(tmp_path: Path) -> None:
    for name in "ab":
        ours(tmp_path, name)
        save_nifti(tmp_path / f"{name}_emb.nii.gz", np.full(SHAPE, 0.3, np.float32))
    entries, store = load(listed(tmp_path, ["a", "b"])), LatentStore(tmp_path / "store")
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz: this and .* have the same value everywhere \(0\.3\); encode"):
        scale_factor(entries, store)
    with pytest.raises(UserError, match=r"a_emb\.nii\.gz: 1 training latents are too few to measure a scale factor"):
        scale_factor(entries[:1], store)
