"""configs/evaluate_generated.json with label maps: how far volumes obey them, where that is known beforehand."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from scripts.common.errors import UserError
from scripts.data.datasets import LabelledVolumes
from scripts.data.labels import body
from scripts.measure.metrics import TISSUES
from scripts.measure.obedience import dice
from scripts.phantom import make_phantom
from scripts.use.obedience import Obedience
from scripts.use.sets import find_sets
from tests.helpers import finish, last_line_of, oriented_affine, run, save_nifti, start_ranks

SHAPE, SPACING = (40, 36, 44), (8.0, 8.0, 9.0)
BODY, LUNG, BONE = 200, 28, 33
OFFSET = 7  # HU, between a generated volume and the real one of its map


def drawn(hu: np.ndarray) -> np.ndarray:
    """A label map of a phantom: lung and bone by thresholds, and the rest of the body."""
    labels = np.where(body(hu), BODY, 0).astype(np.uint8)
    labels[(labels == BODY) & (hu < -500)] = LUNG
    labels[(labels == BODY) & (hu >= 200)] = BONE
    return labels


def turned(data: np.ndarray) -> np.ndarray:
    """A volume in RAS as a file in SLP has it, `LPS` being the orientation of the real ones."""
    return np.ascontiguousarray(data[::-1, ::-1].transpose(2, 0, 1))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight real volumes with label maps; and made for the maps of the last four, the same volumes but for `OFFSET`."""
    root = tmp_path_factory.mktemp("pairs")
    for name in ("real", "maps", "generated", "free"):
        (root / name).mkdir()
    entries, made = [], []
    affine = oriented_affine("RAS", SPACING)
    there = affine.copy()  # the same places, in the axes of SLP
    there[:3, :3] = affine[:3, :3] @ np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]])
    there[:3, 3] = affine[:3, 3] + affine[:3, :3] @ [SHAPE[0] - 1, SHAPE[1] - 1, 0]
    for seed in range(8):
        hu = make_phantom(SHAPE, SPACING, seed).clip(-1000, 900)
        image = save_nifti(root / "real" / f"pt_{seed}_ct.nii.gz", hu, affine)
        label = save_nifti(root / "maps" / f"pt_{seed}_label.nii.gz", drawn(hu), affine)
        entries.append({"image": str(image.relative_to(root)), "label": str(label.relative_to(root))})
        if seed >= 4:
            moved = np.where(drawn(hu) > 0, hu + OFFSET, -1000).astype(np.int16)
            save_nifti(root / "generated" / f"pt_{seed}_ct.nii.gz", turned(moved), there)
            save_nifti(root / "generated" / f"pt_{seed}_label.nii.gz", turned(drawn(hu)), there)
            pair = {"image": f"pt_{seed}_ct.nii.gz", "label": f"pt_{seed}_label.nii.gz"}
            made.append({**pair, "source_label": f"../maps/{label.name}"})
    for seed in (60, 61):
        save_nifti(root / "free" / f"free_{seed}.nii.gz", make_phantom(SHAPE, SPACING, seed), affine)
    datalist = {"training": entries[:4], "validation": entries[4:6], "testing": entries[6:]}
    (root / "datalist.json").write_text(json.dumps(datalist))
    (root / "generated" / "datalist.json").write_text(json.dumps({"training": made}))
    return root


def options_of(root: Path, output_dir: Path) -> dict[str, Any]:
    return {
        "generated_dir": str(root / "generated"), "dataset_dir": str(root / "datalist.json"),
        "perceptual_pretrained": False, "output_dir": str(output_dir), "center_slices_ratio": 0.1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def compared(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("obeying") / "out"
    run("evaluate_generated", **options_of(pairs, folder), unconditional_dir=str(pairs / "free"))
    return folder


@pytest.fixture
def copy(pairs: Path, tmp_path: Path) -> Path:
    """The pairs, to be changed."""
    return Path(shutil.copytree(pairs, tmp_path / "pairs"))


def obeying(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())["obeying"]


def test_hu_by_label_are_those_of_the_voxels(compared: Path) -> None:
    found, real = obeying(compared), [make_phantom(SHAPE, SPACING, seed).clip(-1000, 900) for seed in range(4, 8)]
    maps = [drawn(hu) for hu in real]
    free = [make_phantom(SHAPE, SPACING, seed) for seed in (60, 61)]
    assert found["volumes"] == found["counterparts"] == 4 and found["not_compared"] == []
    assert list(found["hu"]) == [str(label) for label in (LUNG, BONE, BODY)]

    def voxels(volumes: list[np.ndarray], within: list[np.ndarray], label: int) -> np.ndarray:
        those = [hu[labels == label] for hu, labels in zip(volumes, within, strict=True)]
        return np.sort(np.concatenate(those).clip(-1000, 1000))

    made = [np.where(labels > 0, hu + OFFSET, -1000) for hu, labels in zip(real, maps, strict=True)]
    others = {"another": (made, maps[1:] + maps[:1]), "unconditional": (free * 2, maps)}
    for label in (LUNG, BONE, BODY):
        theirs, hu = voxels(real, maps, label), found["hu"][str(label)]
        assert hu["voxels"] == len(theirs) and hu["median"]["real"] == theirs[(len(theirs) - 1) // 2]
        assert hu["median"]["own"] == hu["median"]["real"] + OFFSET and hu["median_difference"]["own"] == OFFSET
        assert hu["wasserstein"]["own"] == pytest.approx(OFFSET, rel=1e-3)
        for name, (volumes, within) in others.items():
            ours = voxels(volumes, within, label)
            shares = [np.searchsorted(v, np.arange(-1000, 1000), side="right") / len(v) for v in (ours, theirs)]
            assert hu["median"][name] == ours[(len(ours) - 1) // 2]
            assert hu["wasserstein"][name] == pytest.approx(np.abs(shares[0] - shares[1]).sum())
            assert hu["wasserstein"][name] > 2 * OFFSET
    medians = [hu["median_difference"] for hu in found["hu"].values()]
    count = sum(those["own"] < those["another"] for those in medians)
    assert found["nearer"] == {"labels": 3, "median": count, "wasserstein": 3} and count >= 2


def test_dice_is_that_of_the_real_volume_of_the_map(compared: Path) -> None:
    found, real = obeying(compared), [make_phantom(SHAPE, SPACING, seed).clip(-1000, 900) for seed in range(4, 8)]
    free = [make_phantom(SHAPE, SPACING, seed) for seed in (60, 61)] * 2
    own, another, without = (list[Any]() for _ in range(3))
    for i, hu in enumerate(real):
        inside, made = drawn(hu) > 0, np.where(drawn(hu) > 0, hu + OFFSET, -1000)
        following = real[(i + 1) % 4]
        there = drawn(following) > 0
        own.append(dice((made >= 200) & inside, (hu >= 200) & inside))
        another.append(dice((made >= 200) & there, (following >= 200) & there))
        without.append(dice((free[i] >= 200) & inside, (hu >= 200) & inside))
    bone = found["dice"]["bone"]
    assert list(bone) == ["real"] and bone["real"]["volumes"] == 4
    for name, values in {"own": own, "another": another, "unconditional": without}.items():
        assert bone["real"][name] == pytest.approx(np.mean(values))
    assert bone["real"]["own"] > 0.9 and bone["real"]["own"] - bone["real"]["unconditional"] > 0.2
    assert [volume["name"] for volume in found["by_volume"]] == [f"pt_{seed}_ct" for seed in range(4, 8)]
    assert found["by_volume"][0]["dice"]["own"]["bone"] == pytest.approx(own[0])


def test_the_report_has_tables_and_a_sheet(compared: Path) -> None:
    found, page = obeying(compared), (compared / "report.html").read_text()
    told = (compared / "summary.md").read_text()
    assert "## Obeying the map" in told and "<h2>Obeying the map</h2>" in page
    for text in (told, page):
        count = found["nearer"]["median"]
        nearer = f"own map than within another's for {count} of 3 labels by the median, for 3 by"
        assert nearer in text.replace("&#39;", "'")
        assert f"{found['dice']['bone']['real']['unconditional']:.3f}" in text
        assert f"{found['hu'][str(LUNG)]['wasserstein']['another']:.1f} HU" in text
    assert page.count('src="data:image/png;base64,') == 1 and "<dt>obeying_dice</dt>" in page
    sheet = imread(compared / "obeying.png")
    assert sheet.shape[1] == 3 * 450 and sheet.shape[0] > 4 * 100


def test_two_ranks_find_what_one_does(compared: Path, pairs: Path, tmp_path: Path) -> None:
    options = options_of(pairs, tmp_path / "out") | {"unconditional_dir": str(pairs / "free")}
    finish(start_ranks(2, evaluate, options, log=tmp_path / "log"), tmp_path / "log")
    assert obeying(tmp_path / "out") == obeying(compared)
    assert (tmp_path / "out" / "obeying.png").read_bytes() == (compared / "obeying.png").read_bytes()


def evaluate(options: dict[str, Any]) -> None:
    run("evaluate_generated", **options)


def test_without_real_counterparts_the_labels_are_the_tissues(copy: Path, tmp_path: Path) -> None:
    content = json.loads((copy / "datalist.json").read_text())
    for entry in (entry for entries in content.values() for entry in entries):
        del entry["label"]
        file = copy / entry["image"]
        entry["image"] = f"real/{file.rename(file.with_stem(f'other_{file.stem}')).name}"
    (copy / "datalist.json").write_text(json.dumps(content))
    run("evaluate_generated", **options_of(copy, tmp_path / "out"), tissues={"bone": {"above": 207, "labels": [BONE]}})
    found = obeying(tmp_path / "out")
    assert found["counterparts"] == 0 and found["hu"] == {} and "nearer" not in found
    assert list(found["dice"]) == ["bone"] and found["dice"]["bone"]["labels"]["own"] == 1  # as they were drawn
    assert found["dice"]["bone"]["labels"]["another"] < 0.5 and "unconditional" not in found["dice"]["bone"]["labels"]
    told = (tmp_path / "out" / "summary.md").read_text()
    assert "the real volumes of the reference have no label maps" in told
    assert "of 4 label maps no real volume is known" in told and "| bone | the map's labels | 4 | 1.000 |" in told


def test_volumes_of_other_grids_are_compared_too(copy: Path) -> None:
    """The first and the second generated volume have twice the slices, each of half the height."""
    fine = oriented_affine("RAS", (8.0, 8.0, 4.5))
    fine[2, 3] -= 2.25
    for seed in (4, 5):
        hu = make_phantom(SHAPE, SPACING, seed).clip(-1000, 900)
        for kind, data in (("ct", hu), ("label", drawn(hu))):
            save_nifti(copy / "generated" / f"pt_{seed}_{kind}.nii.gz", np.repeat(data, 2, axis=2), fine)
    entries = find_sets(str(copy / "generated"), str(copy / "datalist.json"), unconditional_dir=str(copy / "free"))
    following = [Path(entry["another"]["label"]).name for entry in entries[:4]]
    assert following == [f"pt_{seed}_label.nii.gz" for seed in (5, 4, 7, 6)]
    histograms, found = measured(entries)
    assert {name: counts.sum() for name, counts in histograms.items()} == {
        "own": 2 * math.prod(SHAPE), "another": 2 * math.prod(SHAPE), "unconditional": math.prod(SHAPE),
    }  # fmt: skip
    bone = {name: by_tissue["bone"] for name, by_tissue in found["dice"].items()}
    assert bone["own"] > 0.85 > 1.5 * bone["another"]
    real, free = make_phantom(SHAPE, SPACING, 4).clip(-1000, 900), make_phantom(SHAPE, SPACING, 60)
    inside = drawn(real) > 0
    coarse = (real[:, :, :-1].astype(float) * 0.75 + real[:, :, 1:] * 0.25, inside[:, :, :-1], free[:, :, :-1])
    assert bone["unconditional"] == pytest.approx(
        dice((coarse[2] >= 200) & coarse[1], (coarse[0] >= 200) & coarse[1]), abs=0.01
    )  # the upper half of each slice stands for it; the last slice is left out here


def measured(entries: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is measured of the first volume."""
    found = Obedience({"bone": {"above": 200}}, 500, entries).measure(LabelledVolumes(entries, body_label=None)[0])
    assert found[1] is not None
    return found[0], found[1]


def test_a_real_volume_elsewhere_is_an_error(copy: Path) -> None:
    away = oriented_affine("RAS", SPACING)
    away[0, 3] += 1000
    hu = make_phantom(SHAPE, SPACING, 4)
    for folder, name, data in (("real", "ct", hu), ("maps", "label", drawn(hu))):
        save_nifti(copy / folder / f"pt_4_{name}.nii.gz", data, away)
    entries = find_sets(str(copy / "generated"), str(copy / "datalist.json"))
    label, image = entries[0]["label"], copy / "real" / "pt_4_ct.nii.gz"
    with pytest.raises(UserError) as caught:
        measured(entries)
    assert str(caught.value) == (
        f"{label}: its middle lies outside {image}, the real volume it should be of; correct it"
    )


def test_knobs_that_are_none_are_errors(pairs: Path, tmp_path: Path) -> None:
    def last(**changes: Any) -> str:
        return last_line_of("evaluate_generated", **options_of(pairs, tmp_path / "out") | changes)

    assert last(label_voxels=-1) == "error: label_voxels is -1; use a whole number from 0, e.g. 500"
    for wrong in (7, {}, {"above": "200"}, {"abov": 200}, {"above": 200, "labels": [256]}):
        assert last(tissues={"bone": wrong}).startswith(f"error: tissues#bone is {wrong!r}; use above or below or both")
    assert last(unconditional_dir=str(tmp_path / "gone")) == (
        f"error: {tmp_path}/gone: no such file or folder; generate volumes, or correct unconditional_dir"
    )


def test_tissues_are_those_of_evaluate() -> None:
    tissues = json.loads(Path("configs/evaluate_generated.json").read_text())["tissues"]
    bands = {name: (row.get("above", -math.inf), row.get("below", math.inf)) for name, row in tissues.items()}
    assert bands == {name: TISSUES[name] for name in ("bone", "lung", "air")}


def test_maps_find_their_real_volumes(tmp_path: Path) -> None:
    """By the map's path, by its file name, by what encode.json calls it; not where several have that name."""
    for name in ("a/x", "b/y", "b/same", "c/same", "gen/1", "gen/2", "gen/3", "gen/4", "gen/5"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_nifti(tmp_path / f"{name}.nii.gz", np.zeros((4, 4, 4), np.int16))
    real = [{"image": f"{n}.nii.gz", "label": f"labels/{n}.nii.gz"} for n in ("a/x", "b/y", "b/same", "c/same")]
    (tmp_path / "real.json").write_text(json.dumps({"training": real}))
    sources = ["labels/a/x.nii.gz", "elsewhere/y.nii.gz", "embeddings/y_label.nii.gz", "elsewhere/same.nii.gz"]
    made = [
        {"image": f"{i}.nii.gz", "label": f"{i}_label.nii.gz", "source_label": str(tmp_path / source)}
        for i, source in enumerate(sources, 1)
    ]
    made.append({"image": "5.nii.gz", "label": "y.nii.gz"})  # of another program, which says no more
    (tmp_path / "gen" / "datalist.json").write_text(json.dumps({"training": made}))
    entries = find_sets(str(tmp_path / "gen"), str(tmp_path), str(tmp_path / "real.json"))[:5]
    found = [entry["counterpart"] and str(Path(entry["counterpart"]).relative_to(tmp_path)) for entry in entries]
    assert found == ["a/x.nii.gz", "b/y.nii.gz", "b/y.nii.gz", None, "b/y.nii.gz"]
    assert [Path(entry["another"]["label"]).name for entry in entries] == [
        "2_label.nii.gz", "3_label.nii.gz", "4_label.nii.gz", "y.nii.gz", "1_label.nii.gz",
    ]  # fmt: skip
