from __future__ import annotations

from pathlib import Path
from threading import Event, current_thread
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from scripts.data import datasets
from scripts.data.datasets import PatchDataset, StoredVolumes, VolumeLoader, Volumes
from scripts.data.nifti import read_nifti
from scripts.data.patches import RandomPatch
from scripts.data.sampler import EpochSampler
from scripts.data.store import Store
from tests.helpers import save_nifti


def make_dataset(phantoms: list[Path], store: Path, seed: int = 7) -> PatchDataset:
    entries = [{"image": str(p), "class": "ct"} for p in phantoms]
    return PatchDataset(entries, RandomPatch((16, 16, 16)), Store(store), seed=seed)


def test_patches_are_a_function_of_seed_epoch_and_index(phantoms: list[Path], tmp_path: Path) -> None:
    dataset = make_dataset(phantoms[:4], tmp_path)
    loaders = [
        DataLoader(dataset, batch_size=2, sampler=EpochSampler(len(dataset), 2, seed=7), num_workers=n) for n in (0, 2)
    ]
    for epoch in (1, 2):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for serial, parallel in zip(*loaders, strict=True):
            assert serial["path"] == parallel["path"]
            assert torch.equal(serial["image"], parallel["image"])
    assert torch.equal(dataset[(3, 1)]["image"], dataset[(3, 1)]["image"])
    assert not torch.equal(dataset[(3, 1)]["image"], dataset[(4, 1)]["image"])
    other = make_dataset(phantoms[:4], tmp_path, seed=8)
    assert not torch.equal(dataset[(3, 1)]["image"], other[(3, 1)]["image"])


def test_patches_have_the_size_of_their_epoch_whoever_makes_them(phantoms: list[Path], tmp_path: Path) -> None:
    dataset = make_dataset(phantoms[:4], tmp_path)
    dataset.patch_sizes = {1: (8, 12, 8), 2: (16, 12, 20)}.__getitem__
    loaders = [
        DataLoader(dataset, batch_size=2, sampler=EpochSampler(4, 2, seed=7), num_workers=n, persistent_workers=n > 0)
        for n in (0, 2)
    ]
    for epoch in (1, 2, 1):
        for loader in loaders:
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for serial, parallel in zip(*loaders, strict=True):
            assert serial["image"].shape == (2, 1, *dataset.patch_sizes(epoch))
            assert torch.equal(serial["image"], parallel["image"])
    assert dataset.transform.patch_size == (16, 16, 16)  # stays
    whole = make_dataset(phantoms[:4], tmp_path)
    dataset.patch_sizes = lambda epoch: (16, 16, 16)
    assert torch.equal(dataset[(3, 1)]["image"], whole[(3, 1)]["image"])
    gone = PatchDataset(
        [{"image": "gone.nii.gz"}], RandomPatch((8, 8, 8)), Store(tmp_path), 0, lambda epoch: (4, 8, 12)
    )
    assert gone[0]["image"].shape == (1, 4, 8, 12) and gone[0]["image"].isnan().all()


def test_whole_volumes_are_alike_from_files_and_from_the_store(phantoms: list[Path], tmp_path: Path) -> None:
    entries = [{"image": str(phantoms[0]), "class": "ct", "name": "phantom 0"}]
    stored = StoredVolumes([{"image": str(phantoms[0])}], Store(tmp_path))
    one, other = Volumes(entries)[0], stored[0]
    assert one.keys() == other.keys() and one["name"] == other["name"] == "phantom 0"
    assert one["voxels"].shape == (1, 1, 40, 36, 44) and one["voxels"].dtype == torch.int16
    assert torch.equal(one["voxels"], other["voxels"]) and np.array_equal(one["affine"], other["affine"])
    assert one["intensity"] == other["intensity"] and one["intensity"].range == 2000
    assert one["spacing"] == other["spacing"] == nib.affines.voxel_sizes(one["affine"]).tolist()
    assert stored.voxels(0) == 40 * 36 * 44


def test_a_centre_is_cropped_and_padded_with_what_normalises_to_zero(phantoms: list[Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mri = save_nifti(tmp_path / "m.nii.gz", (40 + rng.gamma(2.0, 100.0, (40, 36, 44))).astype(np.float32))
    for entry in ({"image": str(phantoms[0])}, {"image": str(mri), "class": "mri"}):
        cropped = StoredVolumes([entry], Store(tmp_path), (20, 20, 60))
        item, whole = cropped[0], StoredVolumes([entry], Store(tmp_path))[0]
        crop, full = (v["intensity"].normalise(v["voxels"])[0, 0] for v in (item, whole))
        assert crop.shape == (20, 20, 60) and cropped.voxels(0) == 20 * 20 * 60
        assert torch.equal(crop[:, :, 8:52], full[10:30, 8:28])
        assert crop[:, :, :8].abs().max() == 0 and crop[:, :, 52:].abs().max() == 0


def test_a_volume_that_breaks_is_its_own_fault(phantoms: list[Path], tmp_path: Path) -> None:
    entries = [{"image": str(tmp_path / "gone.nii.gz"), "class": "ct", "name": "gone"}]
    for dataset in (Volumes(entries), StoredVolumes(entries, Store(tmp_path))):
        item = dataset[0]
        assert "voxels" not in item and item["name"] == "gone" and "gone.nii.gz: " in item["error"]
    patch = PatchDataset(entries, RandomPatch((8, 8, 8)), Store(tmp_path))[0]
    assert patch["image"].isnan().all() and patch["image"].shape == (1, 8, 8, 8) and "gone.nii.gz: " in patch["error"]


def test_a_constant_volume_is_named_alike_from_files_and_from_the_store(tmp_path: Path) -> None:
    data = np.full((12, 13, 14), 3.0, np.float32)
    data[0, 0, 0] = 4.0
    entries = [{"image": str(save_nifti(tmp_path / "c.nii.gz", data)), "class": "mri"}]
    told = {dataset[0]["error"] for dataset in (Volumes(entries), StoredVolumes(entries, Store(tmp_path)))}
    assert told == {f"{tmp_path}/c.nii.gz: is constant (99.5 % of its voxels are 3); remove it"}


class Watched(Volumes):
    """Volumes of which it is known when they are read; names are their places."""

    def __init__(self, count: int) -> None:
        super().__init__([{"image": f"/{i}.nii.gz", "name": str(i)} for i in range(count)])
        self.begun = [Event() for _ in range(count)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.begun[index].set()
        return {"name": self.data[index]["name"], "thread": current_thread()}


def test_a_loader_deals_what_is_missing() -> None:
    dataset = Watched(8)
    loaders = [VolumeLoader(dataset, lambda name, image: name in ("2", "5"), rank, 2) for rank in (0, 1)]
    assert [loader.indices for loader in loaders] == [[0, 3, 6], [1, 4, 7]] and loaders[0].done == 2
    assert [item["name"] for item in loaders[1]] == ["1", "4", "7"] and len(loaders[1]) == 3
    assert list(VolumeLoader(Volumes([]))) == [] and len(VolumeLoader(dataset)) == 8


def test_what_is_missing_is_what_rank_0_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "gather", lambda seen: [([0, 1, 2, 3], [1, 1, 1, 1]), seen])
    loader = VolumeLoader(
        Watched(4), lambda name, image: name == "0", rank=1, num_ranks=2
    )  # rank 0 has done volume 0 since
    assert loader.indices == [1, 3] and loader.done == 0


def test_volumes_are_dealt_by_size_whatever_else_is_done(tmp_path: Path) -> None:
    sizes = [(8, 9, 10), (40, 30, 20), (9, 8, 7), (20, 30, 20), (12, 9, 10), (20, 30, 19)]
    entries: list[dict[str, str]] = []
    for number, size in enumerate(sizes):
        path = save_nifti(tmp_path / f"{number}.nii.gz", np.random.default_rng(0).normal(0, 300, size).astype(np.int16))
        entries.append({"image": str(path), "class": "ct", "name": str(number)})
    (tmp_path / "2.nii.gz").write_bytes(b"no volume")
    entries.append({"image": str(tmp_path / "gone.nii.gz"), "class": "ct", "name": "6"})
    whole, cropped = StoredVolumes(entries, Store(tmp_path)), StoredVolumes(entries, Store(tmp_path), [8, 8, 8])
    for dataset in (Volumes(entries), whole):
        assert dataset.sizes() == [size if number != 2 else () for number, size in enumerate(sizes)] + [()]
        assert [VolumeLoader(dataset, None, rank, 2).indices for rank in (0, 1)] == [[0, 1], [2, 3, 4, 5, 6]]
    assert cropped.sizes() == [(8, 8, 8)] * 7 and VolumeLoader(cropped, None, 0, 2).indices == [0, 2, 4, 6]
    assert VolumeLoader(whole).indices == [*range(7)]  # one rank takes them as they come


def test_the_next_volume_is_read_while_this_one_is_in_use() -> None:
    dataset = Watched(3)
    items = iter(VolumeLoader(dataset))
    for index in range(3):
        item = next(items)
        assert item["name"] == str(index) and item["thread"] is not current_thread()
        assert all(event.wait(30) for event in dataset.begun[: index + 2])
        assert not any(event.is_set() for event in dataset.begun[index + 2 :])  # one ahead, no more


def test_names_are_what_must_stay_the_same(phantoms: list[Path], tmp_path: Path) -> None:
    assert make_dataset(phantoms[:2], tmp_path).names() == [["phantom 0.nii.gz", "ct"], ["phantom 1.nii.gz", "ct"]]


def test_mri_channels_are_selected(tmp_path: Path) -> None:
    data = np.random.default_rng(0).gamma(2.0, 100.0, (9, 10, 11, 2)).astype(np.float32)
    entries = [{"image": str(save_nifti(tmp_path / "m.nii.gz", data)), "class": "mri", "name": "m"}]
    for dataset in (Volumes(entries, 1), StoredVolumes(entries, Store(tmp_path, 1))):
        wanted, _ = read_nifti(entries[0]["image"], "mri", 1)
        assert np.array_equal(dataset[0]["voxels"][0, 0], wanted)
