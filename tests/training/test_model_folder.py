from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.common.errors import UserError
from scripts.training.model_folder import ModelFolder

FILES = {"net.pt": "net", "net_best{}.pt": "net"}


def content(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"net": {"weight": torch.tensor(float(value))}}


def value(path: Path) -> float:
    return float(torch.load(path, weights_only=True)["weight"])


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, FILES)
    for epoch, best in ((1, True), (2, False), (3, True), (4, False)):
        folder.save(content(epoch), {"iteration": epoch}, epoch, best)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "net.pt", "net_best3.pt"]
    assert value(tmp_path / "net.pt") == 4 and value(tmp_path / "net_best3.pt") == 3
    assert torch.load(folder.checkpoint, weights_only=True) == {"iteration": 4}


def test_an_earlier_training_is_kept_once_a_new_one_writes(tmp_path: Path) -> None:
    ModelFolder(tmp_path, FILES).save(content(1), {}, 9, best=True)
    with pytest.raises(
        UserError, match="holds a trained model, and resume is false; give another model_dir, or --over"
    ):
        ModelFolder(tmp_path, FILES).begin(overwrite=False)
    for number in (1, 2):
        folder = ModelFolder(tmp_path, FILES)
        folder.begin(overwrite=True)
        assert not (tmp_path / f"previous_{number}").exists()
        folder.save_checkpoint({})
        assert value(tmp_path / f"previous_{number}" / "net.pt") == number
        folder.save(content(number + 1), {}, 1, best=False)
    assert (tmp_path / "previous_1" / "net_best9.pt").exists() and not (tmp_path / "net_best9.pt").exists()


def test_weights_that_a_training_starts_from_are_never_removed(tmp_path: Path) -> None:
    ModelFolder(tmp_path, FILES).save(content(1), {}, 9, best=True)
    folder = ModelFolder(tmp_path, FILES, protected=(str((tmp_path / "net_best9.pt").resolve()),))
    folder.begin(overwrite=True)
    folder.save(content(2), {}, 1, best=True)
    assert value(tmp_path / "net_best9.pt") == 1 and value(tmp_path / "net_best1.pt") == 2
