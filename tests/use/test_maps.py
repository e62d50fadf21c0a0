"""Label maps to make volumes for: which are found, on which grids, and what is told of each."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts.common.errors import UserError
from scripts.data.labels import without
from scripts.use.inputs import find_labels
from scripts.use.maps import LabelMaps, on_grid, settings
from scripts.use.wanted import Wanted
from tests.helpers import oriented_affine, save_nifti, small_controlnet, small_unet

LPS = oriented_affine("LPS", (3.0, 3.0, 5.0))
SHAPE = (40, 36, 52)  # neither 36 nor 52 is a multiple of 8


def drawn(shape: tuple[int, ...] = SHAPE, values: tuple[int, ...] = (0, 1, 26, 200), seed: int = 0) -> np.ndarray:
    """Blocks of labels, 4 voxels along each axis, that show where a voxel came from."""
    blocks = np.random.default_rng(seed).choice(np.array(values, np.uint8), [-(-n // 4) for n in shape])
    return blocks.repeat(4, 0).repeat(4, 1).repeat(4, 2)[tuple(slice(n) for n in shape)]


def weights_of(facts: dict[str, Any] | None = None, said: str = "", **changes: Any) -> Any:
    file = SimpleNamespace(path=Path("controlnet.pt"), sha256="cd" * 32, facts=facts or {})
    return SimpleNamespace(network=small_controlnet(**changes), file=file, other_unet=lambda unet: said)


def wanted(facts: dict[str, Any] | None = None) -> Any:
    """As of a UNet with two levels, on latents 4 times smaller."""
    found: Any = object.__new__(Wanted)
    found.takes, found.facts = SimpleNamespace(modality=True), facts or {}
    found.factor, found.multiple, found.modality = 4, 8, 1
    return found


def maps_of(mask_dir: Path, output_dir: Path, facts: dict[str, Any] | None = None, **options: Any) -> LabelMaps:
    unet: Any = SimpleNamespace(network=small_unet())
    given: dict[str, Any] = {"wanted": wanted(), "controlnet": weights_of(facts)} | options
    return LabelMaps(mask_dir=str(mask_dir), output_dir=str(output_dir), unet=unet, **given)


def one(folder: Path, labels: np.ndarray, affine: np.ndarray = LPS, **options: Any) -> dict[str, Any]:
    return maps_of(save_nifti(folder / "x_label.nii.gz", labels, affine), folder / "out", **options)[0]


# Which maps


def test_names_are_those_of_the_maps_without_what_says_that_they_are_maps(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b_seg.nii.gz", "a_label.nii.gz", "sub/c_label.nii", "a_ct.nii.gz", "d.nii.gz"):
        save_nifti(tmp_path / name, drawn())
    found = find_labels(str(tmp_path))  # what is no map by its name is left out where others are
    assert [entry["name"] for entry in found] == ["a", "b", "sub/c"]
    assert [entry["image"] for entry in found] == [
        str(tmp_path / name) for name in ("a_label.nii.gz", "b_seg.nii.gz", "sub/c_label.nii")
    ]
    assert [e["name"] for e in find_labels(str(tmp_path / "d.nii.gz"))] == ["d"]
    for path in (tmp_path / "a_label.nii.gz", tmp_path / "b_seg.nii.gz", tmp_path / "sub/c_label.nii"):
        path.unlink()
    assert [entry["name"] for entry in find_labels(str(tmp_path))] == ["a_ct", "d"]


def test_datalists_of_volumes_and_of_latents_name_maps(tmp_path: Path) -> None:
    entries = [{"image": "i0.nii.gz", "label": "b_label.nii.gz"}, {"image": "a_label.nii.gz"},
               {"image": "c_emb.nii.gz", "label": "c_label.nii.gz", "dim": [8, 8, 8], "fold": 0}]  # fmt: skip
    lists = {"training": entries, "testing": [{"image": "z.nii.gz", "label": str(tmp_path / "d_label.nii.gz")}]}
    file = tmp_path / "datalist.json"
    file.write_text(json.dumps(lists))

    def names(*splits: str) -> list[str]:
        return [entry["name"] for entry in find_labels(str(file), splits)]

    assert names("training", "validation", "testing") == ["a", "b", "c", "d"]
    assert names("testing") == ["d"] and names("validation") == ["c"] and names("training") == ["a", "b"]
    file.write_text(json.dumps(lists | {"validation": entries[:1]}))  # a list goes before folds
    assert names("validation") == ["b"] and names("training") == ["a", "b", "c"]


def test_each_map_has_the_seed_of_its_place(tmp_path: Path) -> None:
    for name in "cab":
        save_nifti(tmp_path / f"{name}_label.nii.gz", drawn(seed=ord(name)))
    maps = maps_of(tmp_path, tmp_path / "out", random_seed=5)
    assert [(item["name"], item["seed"]) for item in maps.data] == [("a", 5), ("b", 6), ("c", 7)]
    assert maps[1]["seed"] == 6 and len(maps) == 3


# On which grid


def test_a_map_that_fits_is_told_as_it_is(tmp_path: Path) -> None:
    labels = drawn((40, 32, 48))
    item = one(tmp_path, labels)
    assert item["dim"] == [40, 32, 48] and item["spacing"] == pytest.approx([3, 3, 5])
    assert np.array_equal(item["labels"], labels[::-1, ::-1]) and item["own_grid"]  # RAS
    assert torch.equal(item["maps"]["labels"], torch.from_numpy(item["labels"].copy())[None, None])
    assert item["maps"]["unguided"] is None
    assert np.array_equal(nib.affines.apply_affine(item["affine"], [0, 0, 0]), LPS @ [39, 31, 0, 1] @ np.eye(4, 3))


def test_others_are_resampled_over_the_same_field_of_view(tmp_path: Path) -> None:
    item = one(tmp_path, labels := drawn(), resample_back=False)
    assert item["dim"] == [40, 32, 48] and not item["own_grid"]  # 36 / 8 and 52 / 8 round to even numbers
    assert np.multiply(item["dim"], item["spacing"]) == pytest.approx(np.multiply(SHAPE, [3, 3, 5]))
    ras = nib.as_closest_canonical(nib.Nifti1Image(labels, LPS))
    # the ends of the field of view, since voxels are areas
    for old, new in (([-0.5] * 3, [-0.5] * 3), (np.array(SHAPE) - 0.5, np.array(item["dim"]) - 0.5)):
        ends = [nib.affines.apply_affine(affine, end) for affine, end in ((ras.affine, old), (item["affine"], new))]
        assert ends[0] == pytest.approx(ends[1])
    # the nearest voxel's centre, as found by hand
    there = [np.floor((np.arange(n) + 0.5) * old / n).astype(int) for n, old in zip(item["dim"], SHAPE, strict=True)]
    assert np.array_equal(item["labels"], np.asarray(ras.dataobj)[np.ix_(*there)])
    assert np.array_equal(item["maps"]["labels"][0, 0].numpy(), item["labels"])
    back = one(tmp_path, labels)
    assert back["own_grid"] and np.array_equal(back["labels"], np.asarray(ras.dataobj))
    assert back["spacing"] == item["spacing"] and torch.equal(back["maps"]["labels"], item["maps"]["labels"])


def test_axes_are_those_of_ras_whatever_the_file_has(tmp_path: Path) -> None:
    item = one(tmp_path, drawn((16, 40, 24)), oriented_affine("SPR", (5.0, 2.0, 1.0)))
    assert item["dim"] == [24, 40, 16] and item["spacing"] == pytest.approx([1, 2, 5])


def test_volumes_get_the_grid_of_their_map_and_air_where_it_is_0() -> None:
    labels = np.ones((10, 8, 6), np.uint8)
    labels[2:4, 3] = 0
    voxels = torch.arange(8 * 8 * 8, dtype=torch.int16).view(8, 8, 8)
    found = on_grid(voxels.clone(), {"labels": labels}, -1000.0)
    smooth = F.interpolate(voxels[None, None].float(), (10, 8, 6), mode="trilinear")[0, 0].round()
    assert found.dtype == torch.int16 and (found[torch.from_numpy(labels == 0)] == -1000).all()
    assert torch.equal(found[torch.from_numpy(labels == 1)].float(), smooth[torch.from_numpy(labels == 1)])
    labels = np.arange(512).reshape(8, 8, 8) % 2
    same = on_grid(voxels.clone(), {"labels": labels}, 0.0)
    assert torch.equal(same, voxels * torch.from_numpy(labels))


def test_the_largest_volume_is_known_before(tmp_path: Path) -> None:
    for name, shape in (("a", (40, 36, 52)), ("b", (16, 44, 60)), ("c", (4, 90, 90))):
        save_nifti(tmp_path / f"{name}_label.nii.gz", drawn(shape))
    (tmp_path / "d_label.nii.gz").write_bytes(b"no NIfTI")
    what, dim = maps_of(tmp_path, tmp_path / "out").largest()
    assert dim == [40, 32, 48] and what == f"{tmp_path}/a_label.nii.gz: the volume for it has 40 x 32 x 48 voxels"
    (tmp_path / "a_label.nii.gz").unlink()
    assert maps_of(tmp_path, tmp_path / "out").largest()[1] == [16, 48, 64]
    (tmp_path / "b_label.nii.gz").unlink()
    assert maps_of(tmp_path, tmp_path / "out").largest()[1] == [0, 0, 0]


# What is told of it


def test_guidance_is_away_from_the_map_without_the_region(tmp_path: Path) -> None:
    table = {"26": 1, "23": "neighbours"}
    item = one(tmp_path, drawn(), guidance=2.0, roi_labels=table)
    told, away = (item["maps"][name][0, 0].numpy() for name in ("labels", "unguided"))
    assert (told == 26).any() and not (away == 26).any()
    assert np.array_equal(away, without(told, {26: 1, 23: "neighbours"})[0])
    assert one(tmp_path, drawn(), roi_labels=table)["maps"]["unguided"] is None  # no guidance
    other = one(tmp_path, drawn(values=(0, 1, 200)), guidance=2.0, roi_labels=table)
    assert other["maps"]["unguided"] is None  # no region
    told = "has none of the labels of roi_labels (26, 23): guidance is towards the modality alone"
    assert told in other["notes"] and told not in item["notes"]


TRAINED = {"labels": [0, 1, 26, 200]}
LACKS = (
    "lacks 200, the body: generated voxels of label 0 become air; give the maps that encode.json writes, with "
    "body_label 200"
)


def test_what_may_not_be_meant_is_said(tmp_path: Path) -> None:
    assert one(tmp_path, drawn(), facts=TRAINED)["notes"] == [] == one(tmp_path, drawn())["notes"]
    no_body = drawn(values=(0, 1, 7, 9))
    other = "has labels that the ControlNet was not trained on: 7, 9"
    assert one(tmp_path, no_body, facts=TRAINED)["notes"] == [LACKS, other]
    assert one(tmp_path, no_body)["notes"] == [LACKS]  # by others, of whom no labels are known
    assert one(tmp_path, no_body, facts={"labels": [1, 7, 9]})["notes"] == []  # trained without a body
    facts = {"sizes": [[64, 64, 64]], "spacing": [[3, 3], [3, 4], [5, 5]]}
    assert one(tmp_path, drawn(), wanted=wanted(facts))["notes"] == [
        "dim [40, 32, 48] is far from the sizes trained on: 256 x 256 x 256"
    ]


def test_a_controlnet_of_another_unet_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one(tmp_path, drawn(), controlnet=weights_of(said="was trained for another"))
    assert capsys.readouterr().err == "warning: was trained for another\n"
    one(tmp_path, drawn())
    assert capsys.readouterr().err == ""


def test_settings_are_those_that_results_depend_on() -> None:
    of_all, of_maps = {"dim": [8, 8, 8], "spacing": [1, 1, 1], "amp": True}, {"random_seed": 0}
    assert settings(None, of_all, of_maps) == of_all and list(settings(None, of_all, of_maps)) == list(of_all)
    assert settings(weights_of(), of_all, of_maps) == {"amp": True, "controlnet_sha256": "cd" * 32, "random_seed": 0}


# What cannot be


def bad_map(folder: Path, name: str) -> np.ndarray:
    labels = drawn((16, 24, 32)).astype(np.float32)
    if name == "no integers":
        labels[3, 4, 5] = 1.5
    elif name == "above 255":
        labels[3, 4, 5] = 256
    elif name == "below 0":
        labels[3, 4, 5] = -1
    elif name == "4D":
        labels = np.stack([labels, labels], axis=-1)
    else:
        labels = labels[:, :7]
    return labels


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no integers", "has the label 1.5, which is no integer; resample label maps by nearest"),
        ("above 255", "has the label 256; use labels 0 to 255"),
        ("below 0", "has the label -1; use labels 0 to 255"),
        ("4D", "has shape (16, 24, 32, 2), not 3D; split it into 3D volumes or remove it"),
        ("too small", "is 16 x 7 x 32 voxels, but the networks take 8 or more along each axis; resample it to more "
                      "voxels, or pad it with 0"),
    ],
)  # fmt: skip
def test_a_map_that_is_none_is_told_in_one_line(name: str, told: str, tmp_path: Path) -> None:
    item = one(tmp_path, bad_map(tmp_path, name), np.diag([2.0, 2.0, 2.0, 1.0]))
    assert "labels" not in item
    assert item["error"].startswith(f"{tmp_path}/x_label.nii.gz: ") and told in item["error"]


def test_what_is_no_place_of_maps_is_refused(tmp_path: Path) -> None:
    def refusal(mask_dir: str, *arguments: Any) -> str:
        with pytest.raises(UserError) as caught:
            find_labels(mask_dir, *arguments)
        return str(caught.value)

    folder, file = str(tmp_path), tmp_path / "list.json"
    assert refusal("nowhere") == "nowhere: no such file or folder; correct mask_dir"
    assert refusal(folder) == f"{folder}: no label map (.nii.gz or .nii) is there; correct mask_dir or splits"
    assert refusal(folder, "test").startswith("splits is ['test']; use some of training, validation, testing")
    file.write_text("{")
    assert refusal(str(file)).startswith(f"{file}: is not JSON") and refusal(str(file)).endswith("; correct mask_dir")
    file.write_text('{"training": [{"class": "ct"}]}')
    assert refusal(str(file)) == f"{file}: training[0] has no label path (label is None); give one"
    file.write_text('{"training": [{"label": "a_label.nii.gz"}]}')
    assert refusal(str(file), ["testing"]) == (
        f"{file}: testing: no label map (.nii.gz or .nii) is there; correct mask_dir or splits"
    )
    for name in ("a_label.nii.gz", "a_seg.nii.gz"):
        save_nifti(tmp_path / name, drawn())
    assert refusal(folder) == (
        f"{folder}/a_seg.nii.gz: its results would overwrite those of {folder}/a_label.nii.gz; rename one of them"
    )


def test_what_would_end_badly_is_refused(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a_label.nii.gz", drawn())
    for options, told in (
        ({"output_dir": tmp_path}, f"{path}: would be overwritten; give an output_dir of its own"),
        ({"random_seed": -1}, "diffusion_unet_inference#random_seed is -1; use a whole number from 0"),
        (
            {"roi_labels": {"26": 300}, "guidance": 1.0},
            "roi_labels has '26': 300; use a label from 1 to 255",
        ),
        (
            {"roi_labels": {"x": 1}, "guidance": 1.0},
            "roi_labels has 'x': 1; use a label from 1 to 255",
        ),
        (
            {"roi_labels": [26], "guidance": 1.0},
            "roi_labels is [26]; use a table of what takes the place of each label, as",
        ),
        (
            {"controlnet": weights_of(num_res_blocks=2)},
            "controlnet_def: down_blocks.0.resnets.1.norm1.weight has",
        ),
    ):
        with pytest.raises(UserError) as caught:
            maps_of(tmp_path, **{"output_dir": tmp_path / "out", **options})  # type: ignore[arg-type]
        assert str(caught.value).startswith(told)
