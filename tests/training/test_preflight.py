from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts.common.errors import UserError
from scripts.data.datalist import load
from scripts.data.store import Store
from scripts.networks.weights import save_weights
from scripts.training.preflight import check_disk, check_start, convert_data, print_table
from tests.training.toy import toy_training

KEY = "trained_line_path"


def test_weights_to_start_from_are_checked_only_where_they_are_used(tmp_path: Path) -> None:
    line = torch.nn.Linear(4, 1)
    check_start(line, False, KEY, None, "line_def")
    check_start(line, False, KEY, "/nowhere.pt", "line_def")
    with pytest.raises(UserError, match=f"finetune is true, but {KEY} is None; give the weights to start from"):
        check_start(line, True, KEY, None, "line_def")
    save_weights(line, tmp_path / "line.pt")
    check_start(line, True, KEY, str(tmp_path / "line.pt"), "line_def")
    save_weights(torch.nn.Linear(5, 1), tmp_path / "line.pt")
    with pytest.raises(UserError, match=r"line\.pt: weight is \(1, 5\), but the network's is \(1, 4\)"):
        check_start(line, True, KEY, str(tmp_path / "line.pt"), "line_def")


def test_the_disk_must_hold_weights_and_a_second_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, files = toy_training(tmp_path), {"line.pt": "line", "best{}.pt": "line"}
    total = 4 * 5 * (2 + 3)  # five weights of four bytes: two files of them, and three values each in the checkpoint
    assert check_disk(trainer, str(tmp_path / "models"), files) == total / 1e9

    class Usage:
        free = total + 4 * 5 * 3 - 1

    monkeypatch.setattr("scripts.training.preflight.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(
        UserError, match=r"models: weights and checkpoint need 0\.000 GB, but 0\.000 GB is free; free sp"
    ):
        check_disk(trainer, str(tmp_path / "models"), files)
    (tmp_path / "models" / "line.pt").write_bytes(b"x")  # what is there already is replaced
    assert check_disk(trainer, str(tmp_path / "models"), files) == total / 1e9


def test_the_table_says_what_will_run(tmp_path: Path, capsys: Any) -> None:
    class Validator:
        class data_loader:  # noqa: N801
            dataset = (1, 2, 3)

        def cost_rows(self, voxels: float) -> dict[str, str]:
            return {"a validation": f"is asked for {voxels:.0f} voxels"}

    trainer = toy_training(tmp_path, epochs=7)
    print_table(trainer, str(tmp_path / "models"), {"line.pt": "line"}, "4 x 5 x 6", 120, Validator(), num_ranks=3)
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["volumes"] == "12 to train, 3 to validate" and rows["epochs"] == "7 of 6 steps"
    assert rows["sample"] == "4 x 5 x 6, batch 2 on each of 3 ranks" and rows["parameters"] == "line 0.00 M"
    assert rows["a"] == "validation  is asked for 720 voxels"


def test_on_a_gpu_the_table_says_how_convolutions_are_computed(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_training(tmp_path)
    trainer.state.device = torch.device("cuda")
    trainer.dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU 1")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    print_table(trainer, str(tmp_path / "models"), {"line.pt": "line"}, "a point", 4)
    printed = capsys.readouterr()
    assert "\ncomputed in   bfloat16 on GPU 1\ncuDNN         9.10.2, cudnn_benchmark off\n" in printed.out
    assert printed.err.startswith("warning: PyTorch computes 3D convolutions in bfloat16 without cuDNN 9.10.2, sev")


def test_ranks_share_the_conversion_and_shared_volumes_are_told(datalist: Path, tmp_path: Path, capsys: Any) -> None:
    splits, store = load(datalist), Store(tmp_path / "store")
    chosen = {"training": splits["training"], "validation": [splits["training"][0]]}
    convert_data(chosen, store, num_workers=1, rank=1, num_ranks=2)
    assert len(list((tmp_path / "store").iterdir())) == 2  # entries 1 and 3 of five
    convert_data(chosen, store, num_workers=1, rank=0, num_ranks=1)
    assert len(list((tmp_path / "store").iterdir())) == 4
    told = capsys.readouterr().err
    assert "is in training and in validation; what is measured on it is too good" in told
    broken = {"training": [{"image": "/nowhere.nii.gz", "class": "ct"}]}
    with pytest.raises(UserError, match=r"/nowhere\.nii\.gz: no such file"):
        convert_data(json.loads(json.dumps(broken)), store, num_workers=1)
