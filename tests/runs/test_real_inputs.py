"""Files, command lines and machines as people have them, through whole workflows."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from scripts.common.errors import UserError, last_line
from scripts.data.examine import check
from tests.helpers import (
    SMALL,
    SMALLEST,
    call,
    folders,
    last_line_of,
    run,
    save_nifti,
    start,
    until,
    words,
    workflow,
)

SHORT = SMALLEST | {"autoencoder_train#n_epochs": 1}
ODD = ("ct#2 $x @y %z 'q'", "Müller~1", "a\udcfcb", 'new\nline"')  # names of folders and files
WINDOW = {"val_sliding_window_patch_size": [32, 32, 32], "val_overlap": 0}


def broken(folder: Path) -> dict[str, Path]:
    """Files that no training can use, each of another kind."""
    colours = np.zeros((16, 16, 16), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    data = np.random.default_rng(0).integers(-1000, 1000, (32, 32, 32)).astype(np.int16)
    paths = {kind: folder / f"{kind}.nii.gz" for kind in ("rgb", "complex", "flipped", "huge")}
    save_nifti(paths["rgb"], colours)
    save_nifti(paths["complex"], data.astype(np.complex64))
    content = bytearray(save_nifti(paths["flipped"], data).read_bytes())
    content[len(content) // 2] ^= 1
    paths["flipped"].write_bytes(content)
    header = nib.Nifti1Image(data, np.eye(4)).header
    header["dim"][1:4] = 32767
    paths["huge"].write_bytes(header.binaryblock + bytes(4))
    return paths


def with_more(datalist: Path, paths: list[Path]) -> None:
    content = json.loads(datalist.read_text())
    content["training"] += [{"image": str(path), "class": "ct"} for path in paths]
    datalist.write_text(json.dumps(content))


def test_check_names_every_broken_file_and_looks_at_the_others(datalist: Path, tmp_path: Path, capsys: Any) -> None:
    paths = broken(tmp_path)
    with_more(datalist, list(paths.values()))
    with pytest.raises(UserError, match=r"4 of its volumes would fail; first: .*rgb\.nii\.gz: has voxels of colours"):
        check(str(datalist))
    printed = capsys.readouterr().out
    problems = [line for line in printed.splitlines() if line.startswith("problem: ")]
    assert len(problems) == 4 and all(f"{path}: " in line for path, line in zip(paths.values(), problems, strict=True))
    assert "flipped.nii.gz: is truncated or damaged" in printed and printed.count("outside window") == 8


@pytest.mark.parametrize("kind", ["rgb", "flipped", "huge"])
def test_preparing_and_training_end_in_a_sentence_that_names_the_file(
    kind: str, datalist: Path, tmp_path: Path
) -> None:
    path = broken(tmp_path)[kind]
    with_more(datalist, [path])
    prepare = [sys.executable, "-m", "scripts.volumes", "prepare", "--datalist", str(datalist)]
    done = call([*prepare, "--store_dir", str(tmp_path / "store")])
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and line.startswith(f"error: {path}: ") and "Traceback" not in done.stderr
    assert len(list((tmp_path / "store").glob("*.b2nd"))) == 8  # the others are there
    told = last_line_of("train", **SHORT, **folders(tmp_path, datalist))
    assert told.startswith(f"error: {path}: ") and not list((tmp_path / "models").iterdir())


def test_using_names_the_broken_files_and_does_the_others(phantoms: list[Path], weights: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    paths = broken(source)
    shutil.copy(phantoms[0], source / "good.nii.gz")
    shutil.copy(phantoms[1], source / ("n" * 243 + ".nii.gz"))  # its result's name is longer than names can be
    options = {**SMALL, **WINDOW, "trained_autoencoder_path": str(weights), "dataset_dir": str(source)}
    told = last_line_of("inference", **options, output_dir=str(tmp_path / "out"))
    assert told.startswith("error: 5 of 6 volumes could not be reconstructed: ") and str(paths["complex"]) in told
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["good_recon.nii.gz"]


@pytest.fixture
def read_only(phantoms: list[Path], tmp_path: Path) -> Iterator[Path]:
    """Data on a mount that cannot be written to."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)]).returncode != 0:
        pytest.skip("may not mount a file system")
    entries = [{"image": shutil.copy(path, folder)} for path in phantoms[:4]]
    (folder / "datalist_ct.json").write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_data_that_cannot_be_written_to_need_another_store(read_only: Path, tmp_path: Path) -> None:
    places = {name: path for name, path in folders(tmp_path, read_only).items() if name != "json_data_list"}
    options = SHORT | places | {"dataset_dir": str(read_only)}
    told = last_line_of("train", **options | {"store_dir": str(read_only / "store")})
    assert (
        told == f"error: {read_only}/store: cannot be written to (Read-only file system); set store_dir to another one"
    )
    run("train", **options)
    assert json.loads(Path("configs/train.json").read_text())["store_dir"] == "$@bundle_root + '/data/store'"


def test_odd_names_go_through_every_workflow(phantoms: list[Path], tmp_path: Path) -> None:
    data = tmp_path / ODD[0]
    for index, phantom in enumerate(phantoms):
        (data / ODD[index % 4]).mkdir(parents=True, exist_ok=True)
        shutil.copy(phantom, data / ODD[index % 4] / f"{ODD[index // 2]}{index}.nii.gz")
    datalist = tmp_path / f"{ODD[2]}.json"
    door = [sys.executable, "-m", "scripts.datalist"]
    for command in (["build", "--data_dir", str(data), "--output", str(datalist)], ["check", str(datalist)]):
        done = call([*door, *command, *(["--val_fraction=.25", "--test_fraction=.25"] if "build" in command else [])])
        assert done.returncode == 0, done.stderr
    assert "\\udcfcb" in done.stdout  # as what cannot be printed is shown
    places = folders(tmp_path / ODD[1], datalist)
    run("train", **SHORT, **places)
    options = {"model_dir": places["model_dir"], "json_data_list": str(datalist), "dataset_dir": str(data), **WINDOW}
    options |= {key: SHORT[key] for key in SHORT if key.startswith("autoencoder_def")}
    for name in ("evaluate", "inference", "encode"):
        run(name, **options, output_dir=str(tmp_path / ODD[3] / name))
    results = tmp_path / ODD[3]
    counts = [len(list(results.glob(p))) for p in ("inference/*/*_recon.nii.gz", "encode/*/*_emb.nii.gz")]
    assert counts == [8, 8]
    latents = json.loads((results / "encode" / "datalist.json").read_text())
    names = [item["image"].replace(".nii.gz", "_emb.nii.gz") for items in latents.values() for item in items]
    assert len(names) == 8 and all((results / "encode" / name).exists() for name in names)
    assert len(list(results.glob("evaluate/pictures/*/*.png"))) == 2 and (results / "evaluate" / "report.html").exists()


def test_words_reach_inference_unchanged(phantoms: list[Path], weights: Path, tmp_path: Path) -> None:
    """The folders that are named, and `false` that is false: what other weights made stays."""
    for name in ("ct", "ct#2"):
        (tmp_path / name).mkdir()
    shutil.copy(phantoms[0], tmp_path / "ct" / "wrong.nii.gz")
    shutil.copy(phantoms[1], tmp_path / "ct#2" / "right.nii.gz")
    config = ["-W", "ignore", "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    options = words({**SMALL, "trained_autoencoder_path": str(weights), "val_sliding_window_patch_size": [32, 32, 32]})
    command = [sys.executable, *config, *options, "--dataset_dir", str(tmp_path / "ct#2"), "--overwrite", "false"]
    done = call([*command, "--output_dir", "~/recon#2"], HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    made = tmp_path / "recon#2" / "right_recon.nii.gz"
    before = made.read_bytes()
    assert [path.name for path in made.parent.glob("*.nii.gz")] == [made.name] and not (tmp_path / "recon").exists()
    refused = call([*command, "--output_dir", str(made.parent), "--amp", "TRUE"])
    assert refused.returncode == 1 and made.read_bytes() == before
    assert "recon#2: holds results of other settings (amp was False, now it is True)" in refused.stderr


# Two trainings


def train(options: dict[str, Any], method: str = "fork") -> None:
    multiprocessing.set_start_method(method, force=True)  # of data-loader workers
    run("train", **options)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_training_ends_whatever_starts_its_workers(method: str, datalist: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = SHORT | folders(tmp_path, datalist) | {"num_workers": 1}
    process = start(train, options, method, log=log)
    process.join(200)
    assert process.exitcode == 0, (process.exitcode, log.read_text()[-3000:])
    assert (tmp_path / "models" / "autoencoder.pt").exists()


def test_a_model_dir_has_one_training_and_a_killed_one_frees_it(datalist: Path, tmp_path: Path) -> None:
    log, options = tmp_path / "log", SHORT | folders(tmp_path, datalist)
    first = start(train, options | {"autoencoder_train#n_epochs": 500, "num_workers": 1}, log=log)
    until(lambda: (tmp_path / "models" / "checkpoint.pt").exists(), [first])
    weights = tmp_path / "models" / "autoencoder.pt"
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011 (MONAI wraps it)
        workflow("train", **options)
    assert f"models: is in use by process {first.pid} on " in last_line(caught.value)
    assert last_line(caught.value).endswith("; wait for it, stop it, or give another folder")
    os.kill(first.pid, signal.SIGKILL)  # its worker lives on for a while
    first.join(60)
    run("train", **options | {"resume": False, "overwrite": True})
    assert weights.exists() and sorted(p.name for p in weights.parent.iterdir() if p.is_file()) == sorted(
        ["autoencoder.pt", "autoencoder_best_epoch1.pt", "checkpoint.pt", "discriminator.pt"]
    )


def test_other_patients_of_the_same_file_names_are_another_training(phantoms: list[Path], tmp_path: Path) -> None:
    def datalist(order: list[int]) -> dict[str, Any]:
        entries = []
        for index in order:
            path = tmp_path / f"s{index:04d}" / "ct.nii.gz"
            path.parent.mkdir(exist_ok=True)
            shutil.copy(phantoms[index], path)
            entries.append({"image": str(path), "class": "ct"})
        (tmp_path / "list.json").write_text(json.dumps({"training": entries[:2], "validation": entries[2:]}))
        return SHORT | folders(tmp_path, tmp_path / "list.json")

    run("train", **datalist([0, 1, 2]))
    again = {"autoencoder_train#n_epochs": 2}
    told = last_line_of("train", **datalist([0, 2, 1]) | again)
    assert "checkpoint.pt: training_volumes was [['s0000/ct.nii.gz', " in told and "restore it, or start over" in told
    with (tmp_path / "s0001" / "ct.nii.gz").open("ab") as file:
        options = datalist([0, 1, 2])
        file.write(b"\0")  # gzip ends before; another size
    assert "training_volumes was" in last_line_of("train", **options | again)
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copytree(tmp_path, moved / "all", ignore=shutil.ignore_patterns("moved", "store", "outputs"))
    text = (tmp_path / "list.json").read_text().replace(str(tmp_path), str(moved / "all"))
    shutil.copy(phantoms[1], moved / "all" / "s0001" / "ct.nii.gz")
    (tmp_path / "list.json").write_text(text)
    assert workflow("train", **options | again).trainer.state.iteration == 2  # the same, in another place
