"""configs/generate.json with mask_dir: a volume for each label map, on its grid, and what comes with it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scripts.data.datalist import load
from scripts.networks import diffusion_files
from scripts.networks.weights import write_tensors
from tests.helpers import (
    CONTROLNET,
    SMALL,
    UNET,
    finish,
    kill,
    last_line_of,
    oriented_affine,
    run,
    save_nifti,
    small_controlnet,
    small_unet,
    start,
    start_ranks,
    until,
    workflow,
)

GROUP = "diffusion_unet_inference"
TINY: dict[str, Any] = {
    **SMALL,
    **{f"diffusion_unet_def#{key}": value for key, value in UNET.items()},
    **{f"controlnet_def#{key}": value for key, value in CONTROLNET.items()},
    "amp": False,
    "val_sliding_window_patch_size": [32, 32, 32],
    f"{GROUP}#num_inference_steps": 2,
}
LPS = oriented_affine("LPS", (3.0, 3.0, 5.0))
SHAPES = {"a_label": (40, 36, 30), "b_seg": (32, 24, 40), "c_label": (24, 32, 32)}  # only the first is to be resampled
NAMES = ["a", "b", "c"]
FILES = [f"{name}_{kind}.nii.gz" for name in NAMES for kind in ("ct", "label")]
FACTS = {"labels": [0, 1, 26, 200]}


def write_maps(folder: Path, **shapes: tuple[int, ...]) -> Path:
    """Label maps of blocks, LPS, with what viewers of label maps look for in the header."""
    folder.mkdir()
    for seed, (name, shape) in enumerate((shapes or SHAPES).items()):
        blocks = np.random.default_rng(seed).choice(np.array([0, 1, 26, 200], np.uint8), [-(-n // 8) for n in shape])
        labels = blocks.repeat(8, 0).repeat(8, 1).repeat(8, 2)[tuple(slice(n) for n in shape)]
        image = nib.Nifti1Image(labels, LPS)
        image.header.set_intent("label", name="organs")
        image.header["cal_max"], image.header["descrip"] = 255, b"a map"
        nib.save(image, folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_maps(tmp_path_factory.mktemp("maps") / "maps")


@pytest.fixture(scope="module")
def models(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the three networks, random."""
    folder = tmp_path_factory.mktemp("models")
    state = torch.load(weights, weights_only=True)
    state[[name for name in state if name.startswith("decoder") and name.endswith("bias")][-1]] += 0.4  # HU of a body
    torch.save(state, folder / "autoencoder.pt")
    unet = diffusion_files.content(small_unet(), diffusion_files.UNET, epoch=1, loss=0.5, scale_factor=0.8)
    write_tensors(unet, folder / "diff_unet_3d_rflow-ct.pt")
    network = small_controlnet()
    for parameter in network.controlnet_cond_embedding.parameters():
        parameter.data *= 4  # labels matter to it
    content = diffusion_files.content(
        network, diffusion_files.CONTROLNET, epoch=1, loss=0.5, scale_factor=0.8, facts=FACTS
    )
    write_tensors(content, folder / "controlnet_3d_rflow-ct.pt")
    return folder


@pytest.fixture
def options(models: Path, maps: Path, tmp_path: Path) -> dict[str, Any]:
    return TINY | {"model_dir": str(models), "mask_dir": str(maps), "output_dir": str(tmp_path / "out")}


@pytest.fixture(scope="module")
def three(models: Path, maps: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The volumes for all three maps, generated in one go."""
    folder = tmp_path_factory.mktemp("three")
    run("generate", **TINY, model_dir=str(models), mask_dir=str(maps), output_dir=str(folder))
    return folder


def generate(options: dict[str, Any]) -> None:
    run("generate", **options)


def same_bytes(folder: Path, other: Path, names: list[str] = FILES) -> bool:
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


def ras(path: Path) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(nib.load(path)).dataobj)


def decoded(options: dict[str, Any], index: int) -> np.ndarray:
    """What the generator makes for a map: (X, Y, Z) float32 in [0, 1], as it is generated."""
    parser = workflow("generate", **options).parser
    generator, wanted, dataset = (parser.get_parsed_content(name) for name in ("generator", "wanted", "dataset"))
    item, network = dataset[index], generator.controlnet
    assert not network.training or network.eval()
    with torch.inference_mode():
        latent = generator.latent(item["seed"], item["dim"], wanted.conditions(item["spacing"]), **item["maps"])
        return generator.volume(latent).numpy()


# What is written


def test_volumes_lie_on_their_maps_voxel_by_voxel(three: Path, maps: Path) -> None:
    for name, source in zip(NAMES, SHAPES, strict=True):
        files = (maps / f"{source}.nii.gz", three / f"{name}_label.nii.gz", three / f"{name}_ct.nii.gz")
        original, label, volume = map(nib.load, files)
        assert volume.shape == label.shape == original.shape == SHAPES[source]
        for image in (label, volume):
            assert np.array_equal(image.affine, original.affine) and nib.aff2axcodes(image.affine) == tuple("LPS")
        assert label.get_data_dtype() == np.uint8 and volume.get_data_dtype() == np.int16
        assert np.array_equal(np.asarray(label.dataobj), np.asarray(original.dataobj))
        assert label.header.get_intent()[0] == "label" and label.header["cal_max"] == 255
        assert volume.header.get_intent()[0] == "none" and volume.header["cal_max"] == 0  # no label map
        assert volume.header["descrip"] == b""


def test_volumes_are_what_the_generator_makes_in_hu(three: Path, options: dict[str, Any]) -> None:
    for index, name in enumerate(NAMES):
        found, labels = ras(three / f"{name}_ct.nii.gz"), ras(three / f"{name}_label.nii.gz")
        made = (decoded(options, index).clip(0, 1) * 2000 - 1000).round()
        assert (made.shape == labels.shape) == (name != "a")  # 36 and 30 are no multiples of 8
        smooth = F.interpolate(torch.from_numpy(made)[None, None], labels.shape, mode="trilinear")[0, 0].round().numpy()
        assert np.array_equal(found[labels > 0], (made if name != "a" else smooth)[labels > 0])
        assert (labels == 0).any() and (found[labels == 0] == -1000).all() and found[labels > 0].std() > 10


def test_what_comes_with_the_volumes(three: Path, maps: Path, models: Path) -> None:
    others = ["contact_sheet.png", "datalist.json", "made_with_ct.json", "made_with_ct.jsonl"]
    assert sorted(p.name for p in three.iterdir()) == sorted([*FILES, *others])
    assert content_of(three / "datalist.json") == {
        "training": [
            {"image": f"{name}_ct.nii.gz", "label": f"{name}_label.nii.gz", "class": "ct",
             "source_label": str(maps / f"{source}.nii.gz")}
            for name, source in zip(NAMES, SHAPES, strict=True)
        ]
    }  # fmt: skip
    entries = load(three / "datalist.json")["training"]
    assert [entry["label"] for entry in entries] == [str(three / f"{name}_label.nii.gz") for name in NAMES]
    settings = content_of(three / "made_with_ct.json")["settings"]
    assert len(settings["controlnet_sha256"]) == 64 and settings["random_seed"] == 0 and settings["resample_back"]
    assert settings["roi_labels"]["24"] == 4 and not {"dim", "spacing"} & settings.keys()


def test_volumes_may_stay_on_the_grid_that_they_were_made_on(
    three: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    run("generate", **options, resample_back=False)
    label, volume = (nib.load(tmp_path / "out" / f"a_{kind}.nii.gz") for kind in ("label", "ct"))
    assert volume.shape == label.shape == (40, 32, 32) and nib.aff2axcodes(volume.affine) == tuple("RAS")
    assert nib.affines.voxel_sizes(volume.affine) == pytest.approx([3, 3 * 36 / 32, 5 * 30 / 32])
    assert np.array_equal(label.affine, volume.affine) and volume.header.get_xyzt_units()[0] == "mm"
    found, labels = np.asarray(volume.dataobj), np.asarray(label.dataobj)
    made = (decoded(options, 0).clip(0, 1) * 2000 - 1000).round()
    assert np.array_equal(found, np.where(labels == 0, -1000, made))
    item = workflow("generate", **options).parser.get_parsed_content("dataset")[0]
    assert np.array_equal(labels, item["maps"]["labels"][0, 0].numpy())
    assert same_bytes(tmp_path / "out", three, FILES[2:])  # whose maps fit: there is nothing to resample


def test_mri_is_0_where_there_is_no_body(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {f"{GROUP}#modality": "mri_t1", "mask_dir": options["mask_dir"] + "/c_label.nii.gz"}
    run("generate", **options)
    found, labels = (ras(tmp_path / "out" / f"c_{kind}.nii.gz") for kind in ("mri", "label"))
    assert np.array_equal(found, np.where(labels == 0, 0, (decoded(options, 0).clip(0) * 1000).round()))
    assert found.max() > 100 and content_of(tmp_path / "out" / "datalist.json")["training"][0]["class"] == "mri"


def test_guidance_leads_away_from_the_map_without_the_region(
    three: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    run("generate", **options | {f"{GROUP}#cfg_guidance_scale": 3})
    found, labels = (ras(tmp_path / "out" / f"c_{kind}.nii.gz") for kind in ("ct", "label"))
    made = (decoded(options | {f"{GROUP}#cfg_guidance_scale": 3}, 2).clip(0, 1) * 2000 - 1000).round()
    assert np.array_equal(found[labels > 0], made[labels > 0])
    plain = ras(three / "c_ct.nii.gz")
    assert np.abs(found - plain)[labels > 0].mean() > 3
    run("generate", **options | {f"{GROUP}#cfg_guidance_scale": 3, "roi_labels": {}, "overwrite": True})
    other = ras(tmp_path / "out" / "c_ct.nii.gz")
    assert np.abs(found - other)[labels > 0].mean() > 1  # there guidance is of the modality alone


# Each volume is a function of its map and its seed


def test_two_ranks_make_the_same_volumes_and_skip_what_is_whole(
    three: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    printed = finish(start_ranks(2, generate, options, log=log), log)
    assert "3 volumes generated, 0 failed" in printed
    assert same_bytes(tmp_path / "out", three, [*FILES, "datalist.json", "contact_sheet.png"])
    (tmp_path / "out" / "b_label.nii.gz").unlink()  # without which the volume is not whole
    (tmp_path / "out" / "c_ct.nii.gz").write_bytes(b"half")
    before = (tmp_path / "out" / "a_ct.nii.gz").stat().st_mtime_ns
    printed = finish(start_ranks(2, generate, options, log=log), log)
    assert "2 volumes generated, 1 were there already, 0 failed" in printed
    assert (tmp_path / "out" / "a_ct.nii.gz").stat().st_mtime_ns == before
    assert same_bytes(tmp_path / "out", three, [*FILES, "datalist.json"])


def test_what_was_interrupted_goes_on(three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    process = start(generate, options, log=log)
    until(lambda: (out / FILES[0]).is_file(), [process])
    kill([process], signal.SIGKILL)
    process.join()
    run("generate", **options)
    assert same_bytes(out, three, [*FILES, "datalist.json"])


def test_a_datalist_chooses_maps_and_earlier_ones_stay_listed(
    three: Path, options: dict[str, Any], maps: Path, tmp_path: Path
) -> None:
    lists = {"training": ["a_label", "b_seg"], "testing": ["c_label"]}
    content = {
        split: [{"image": "x_emb.nii.gz", "label": str(maps / f"{name}.nii.gz"), "dim": 0} for name in names]
        for split, names in lists.items()
    }
    (tmp_path / "maps.json").write_text(json.dumps(content))
    chosen = options | {"mask_dir": str(tmp_path / "maps.json")}
    run("generate", **chosen, splits=["training"])
    assert same_bytes(tmp_path / "out", three, FILES[:4]) and not (tmp_path / "out" / "c_ct.nii.gz").exists()
    run("generate", **chosen, splits="testing")
    sources = [entry["source_label"] for entry in content_of(tmp_path / "out" / "datalist.json")["training"]]
    assert sources == [str(maps / f"{name}.nii.gz") for name in SHAPES]
    assert not same_bytes(tmp_path / "out", three, FILES[4:5])  # the first of its list: seed 0, not 2


def test_maps_that_cannot_be_used_are_named_and_passed_over(
    three: Path, options: dict[str, Any], maps: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(maps, tmp_path / "maps"))
    image = np.asarray(nib.load(folder / "b_seg.nii.gz").dataobj)
    save_nifti(folder / "b_seg.nii.gz", image + np.float32(0.5), LPS)
    save_nifti(folder / "d_label.nii.gz", image[:7], LPS)
    last = last_line_of("generate", **options | {"mask_dir": str(folder)})
    told = f"{folder}/b_seg.nii.gz: has the label 1.5, which is no integer; resample label maps by nearest"
    assert last == f"error: 2 of 4 volumes could not be generated: {told}"
    assert (
        f"{folder}/d_label.nii.gz: is 7 x 24 x 40 voxels, but the networks take 8 or more along each axis"
        in caplog.text
    )
    assert same_bytes(tmp_path / "out", three, [*FILES[:2], *FILES[4:]])
    assert [e["image"] for e in content_of(tmp_path / "out" / "datalist.json")["training"]] == [FILES[0], FILES[4]]


def test_what_may_not_be_meant_is_logged_with_the_map(
    options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save_nifti(tmp_path / "x_label.nii.gz", np.full((32, 32, 32), 7, np.uint8), LPS)
    run("generate", **options | {"mask_dir": str(path)})
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"{path}: has labels that the ControlNet was not trained on: 7" in said
    assert any(text.startswith(f"{path}: lacks 200, the body: generated voxels of label 0 become air") for text in said)


# Results of other settings, and what cannot be


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({f"{GROUP}#random_seed": 1}, "random_seed was 0, now it is 1"),
    "grid": ({"resample_back": False}, "resample_back was True, now it is False"),
    "ControlNet": ({"trained_controlnet_path": "other.pt"}, "controlnet_sha256 was "),
    "no map": ({"mask_dir": None}, "dim was None, now it is [256, 256, 128]"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_results_of_other_settings_do_not_mix(name: str, three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    changes, told = CHANGES[name]
    if name == "ControlNet":
        other = diffusion_files.content(
            small_controlnet(1), diffusion_files.CONTROLNET, epoch=1, loss=1, scale_factor=1
        )
        write_tensors(other, tmp_path / "other.pt")
        changes = {"trained_controlnet_path": str(tmp_path / "other.pt")}
    shutil.copytree(three, tmp_path / "out")
    last = last_line_of("generate", **options | changes)
    assert f"holds results of other settings ({told}" in last and "give another output_dir, or --overwrite" in last


def test_results_without_maps_do_not_mix_with_these(three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    run("generate", **options | {"mask_dir": None, f"{GROUP}#dim": [32, 32, 32], "trained_controlnet_path": "no.pt"})
    settings = content_of(tmp_path / "out" / "made_with_ct.json")["settings"]
    assert not {"controlnet_sha256", "random_seed", "roi_labels", "resample_back"} & settings.keys()
    assert content_of(tmp_path / "out" / "datalist.json") == {
        "training": [{"image": "unet_3d_seed00000_ct.nii.gz", "class": "ct"}]
    }
    told = "holds results of other settings (controlnet_sha256 was None, now it is"
    assert told in last_line_of("generate", **options)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no map": ({"mask_dir": "nowhere"}, "nowhere: no such file or folder; correct mask_dir"),
    "no ControlNet": ({"exp_name": "other"}, "holds no weights of a ControlNet (other.pt and the like); train with"),
    "no such ControlNet": (
        {"trained_controlnet_path": "no.pt"}, "no.pt: no such weights file; correct trained_controlnet_path",
    ),
    "another ControlNet": (
        {"controlnet_def#num_channels": [8, 24]}, "the network definition of these weights (controlnet_def)",
    ),
    "table": (
        {"roi_labels": {"26": "neighbour"}, f"{GROUP}#cfg_guidance_scale": 1},
        "roi_labels has '26': 'neighbour'; use a label from 1 to 255, and another one or 'neighbours'",
    ),
    "seed": ({f"{GROUP}#random_seed": 1.5}, f"{GROUP}#random_seed is 1.5; use a whole number from 0"),
    "splits": ({"splits": "test"}, "splits is ['test']; use some of training, validation, testing"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_in_one_line(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    changes, told = BAD[name]
    last = last_line_of("generate", **options | changes)
    assert last.startswith("error: ") and told in last and not (tmp_path / "out").exists()


def test_memory_is_looked_at_before(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.use.wanted.available_memory", lambda: 10**5)
    last = last_line_of("generate", **options)
    told = f"{options['mask_dir']}/a_label.nii.gz: the volume for it has 40 x 32 x 32 voxels, which takes at least "
    assert last.startswith(f"error: {told}") and last.endswith("0.0 GB is left for it; use a smaller one")
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_not_written_over(options: dict[str, Any], maps: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(maps, tmp_path / "out"))
    last = last_line_of("generate", **options | {"mask_dir": str(folder)})
    assert last == f"error: {folder}/a_label.nii.gz: would be overwritten; give an output_dir of its own"
    last = last_line_of("generate", **options)
    assert last.startswith(f"error: {folder}/a_label.nii.gz: is there, but is no result of an earlier run; move it")
    assert same_bytes(folder, maps, [f"{name}.nii.gz" for name in SHAPES])


def test_the_network_file_of_nv_generate_ctmr_is_a_layer(three: Path, options: dict[str, Any], tmp_path: Path) -> None:
    network = content_of(Path("configs/generate.json"))["controlnet_def"]
    del network["_disabled_"]  # as theirs has it
    (tmp_path / "network.json").write_text(json.dumps({"controlnet_def": network | CONTROLNET}))
    layers = ["configs/generate.json", str(tmp_path / "network.json")]
    others = {key: value for key, value in options.items() if not key.startswith("controlnet_def")}
    run(layers, **others)
    assert same_bytes(tmp_path / "out", three)
    plain = {"mask_dir": None, "output_dir": str(tmp_path / "plain"), f"{GROUP}#dim": [32, 32, 32]}
    run(layers, **others | plain)
    assert (tmp_path / "plain" / "unet_3d_seed00000_ct.nii.gz").is_file()
