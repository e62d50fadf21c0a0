"""configs/encode.json: latents as NV-Generate-CTMR's diffusion training reads them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Resize

from scripts.data.datasets import Volumes
from scripts.use.encode import resized
from tests.helpers import SMALL, finish, last_line_of, oriented_affine, run, save_nifti, start_ranks


@pytest.fixture
def options(weights: Path, tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path / "emb"), "trained_autoencoder_path": str(weights), **SMALL}


def encode(options: dict[str, Any]) -> None:
    run("encode", **options)


def facts_of(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name(f"{path.name}.json").read_text())


def test_decoding_a_latent_file_gives_the_reconstruction(
    options: dict[str, Any], weights: Path, tmp_path: Path
) -> None:
    source = tmp_path / "v.nii.gz"
    data = np.random.default_rng(0).normal(0, 400, (30, 41, 24)).astype(np.int16)
    save_nifti(source, data, oriented_affine("PIR", (3.0, 1.0, 2.0)))
    started = run("encode", dataset_dir=str(source), save_sigma=True, **options)
    last = last_line_of("encode", dataset_dir=str(source), save_sigma=True, resize_multiple=16, **options)
    assert "emb: holds results of other settings (resize_multiple was None, now it is 16)" in last
    assert started.check_properties() == []
    run("inference", **options | {"dataset_dir": str(source), "output_dir": str(tmp_path / "recon")})
    path = tmp_path / "emb" / "v_emb.nii.gz"
    latent, canonical = nib.load(path), nib.as_closest_canonical(nib.load(source))
    assert canonical.shape == (24, 30, 41) and latent.shape == (6, 8, 11, 4)
    assert latent.get_data_dtype() == np.float32 and np.allclose(latent.affine, canonical.affine)
    facts = facts_of(path)
    assert facts["dim"] == [24, 30, 41] and np.allclose(facts["spacing"], [2.0, 3.0, 1.0]) and facts["modality"] == "ct"
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert facts["bundle_version"] == json.loads(Path("configs/metadata.json").read_text())["version"]
    z = torch.from_numpy(latent.get_fdata(dtype=np.float32)).permute(3, 0, 1, 2)[None]
    assert facts["scale_factor"] == pytest.approx(1 / float(z.std(correction=0)), rel=1e-5)
    with torch.no_grad():
        decoded = started.parser.get_parsed_content("network").decode(z)[0, 0, :24, :30, :41]
    got = np.asarray(nib.as_closest_canonical(nib.load(tmp_path / "recon" / "v_recon.nii.gz")).dataobj)
    assert np.abs(got - (decoded.clamp(0, 1).numpy() * 2000 - 1000)).max() <= 1
    sigma = nib.load(tmp_path / "emb" / "v_emb_sigma.nii.gz")
    assert sigma.shape == latent.shape and sigma.get_fdata().min() > 0


def test_a_set_is_read_as_the_reference_reads_it(options: dict[str, Any], datalist: Path, tmp_path: Path) -> None:
    """The reference's transforms, over the files that its `load_filenames` finds."""
    run("encode", dataset_dir=str(datalist), **options)
    folder = tmp_path / "emb"
    content = json.loads((folder / "datalist.json").read_text())
    assert [len(content[split]) for split in ("training", "validation", "testing")] == [4, 2, 2]
    run("encode", dataset_dir=str(datalist), splits=["testing"], **options)  # leaves the others in the lists
    assert json.loads((folder / "datalist.json").read_text()) == content
    names = [item["image"].replace(".nii.gz", "_emb.nii.gz") for item in content["training"]]
    load = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])
    values = []
    for name in names:
        path = folder / name
        image = load({"image": str(path)})["image"]
        assert image.shape == (4, 10, 9, 11)
        facts = facts_of(path)
        assert torch.FloatTensor(facts["spacing"]).tolist() == [8, 8, 9] and facts["dim"] == [40, 36, 44]
    every = sorted(folder.glob("*_emb.nii.gz"))
    values = np.concatenate([nib.load(p).get_fdata().ravel() for p in every])
    statistics = json.loads((folder / "latent_stats.json").read_text())
    assert len(every) == statistics["volumes"] == 8 and statistics["count"] == values.size
    assert statistics["scale_factor"] == pytest.approx(1 / values.std(), rel=1e-5)
    assert {facts_of(p)["scale_factor"] for p in every} == {statistics["scale_factor"]}


def test_a_run_goes_on_and_two_ranks_share(options: dict[str, Any], datalist: Path, tmp_path: Path) -> None:
    once = tmp_path / "once"
    run("encode", **options | {"dataset_dir": str(datalist), "output_dir": str(once)})
    folder = tmp_path / "emb"
    run("encode", dataset_dir=str(datalist), splits=["testing"], **options)
    log = tmp_path / "log"
    finish(start_ranks(2, encode, options | {"dataset_dir": str(datalist)}, log=log), log)
    assert "6 volumes encoded, 2 were there already, 0 failed" in log.read_text()
    for path in sorted(once.glob("*_emb.nii.gz")):
        ours = nib.load(folder / path.name).get_fdata()
        assert np.allclose(ours, nib.load(path).get_fdata(), atol=1e-5), path.name
    mine, theirs = (json.loads((f / "latent_stats.json").read_text()) for f in (folder, once))
    assert mine["scale_factor"] == pytest.approx(theirs["scale_factor"], rel=1e-6) and mine["volumes"] == 8


def test_a_copy_is_whole_and_latents_of_odd_names_are_in_the_lists(
    options: dict[str, Any], phantoms: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    names = ["no\udcff", "$x$ 100% <b>", "li\nne"]
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / f"{name}.nii.gz").write_bytes(phantoms[0].read_bytes())
    run("encode", dataset_dir=str(tmp_path / "in"), **options)
    for i, path in enumerate(sorted((tmp_path / "emb").iterdir())):  # as an object store gives them back
        os.utime(path, (1e9 - i, 1e9 - i))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "emb").glob("*_emb.nii.gz")}
    run("encode", dataset_dir=str(tmp_path / "in"), **options)
    assert "0 volumes encoded, 3 were there already, 0 failed" in caplog.text
    assert written == {path: path.stat().st_mtime_ns for path in written} and len(written) == 3
    content = json.loads((tmp_path / "emb" / "datalist.json").read_text())
    assert sorted(item["image"] for item in content["training"]) == sorted(f"{name}.nii.gz" for name in names)
    assert json.loads((tmp_path / "emb" / "latent_stats.json").read_text())["volumes"] == 3


def test_relative_datalists_keep_their_paths(options: dict[str, Any], phantoms: list[Path], tmp_path: Path) -> None:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "sub" / "case.nii.gz").write_bytes(phantoms[0].read_bytes())
    (tmp_path / "data" / "list.json").write_text(json.dumps({"training": [{"image": "sub/case.nii.gz"}]}))
    run("encode", dataset_dir=str(tmp_path / "data" / "list.json"), **options)
    assert (tmp_path / "emb" / "sub" / "case_emb.nii.gz").is_file()


def test_resizing_is_monais(phantoms: list[Path]) -> None:
    volume = Volumes([{"image": str(phantoms[0]), "class": "ct", "name": "v"}])[0]
    got = resized(volume, 16)
    assert list(got["voxels"].shape) == [1, 1, 32, 32, 48]  # of 40 x 36 x 44
    wanted = Resize((32, 32, 48), mode="trilinear")(volume["voxels"][0].float().clamp(-1000, 1000))
    assert torch.allclose(got["voxels"][0], torch.as_tensor(wanted), atol=1e-2)
    assert got["spacing"] == pytest.approx([8 * 40 / 32, 8 * 36 / 32, 9 * 44 / 48])
    corners = [[-0.5] * 3, [39.5, 35.5, 43.5]]
    theirs = [nib.affines.apply_affine(volume["affine"], c) for c in corners]
    ours = [nib.affines.apply_affine(got["affine"], c) for c in ([-0.5] * 3, [31.5, 31.5, 47.5])]
    assert np.allclose(ours, theirs)
