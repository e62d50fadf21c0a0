"""Uses of a trained network: volumes that fail stop no others, and are an error at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scripts.common import ranks
from scripts.common.errors import UserError
from scripts.common.files import write_text
from scripts.data.datasets import VolumeLoader
from scripts.data.intensity import CT_WINDOW, Intensity
from scripts.networks.windows import VolumeInferer
from scripts.use.workflow import Share, VolumeWorkflow


class Items(list):
    """Volumes at hand, as a dataset."""

    data: list[dict[str, Any]] = property(lambda self: self)  # type: ignore[assignment]


def item(name: str, error: str = "") -> dict[str, Any]:
    facts = {"image": f"{name}.nii.gz", "name": name}
    voxels = torch.zeros(1, 1, 6, 5, 4, dtype=torch.int16)
    return facts | ({"error": error} if error else {"voxels": voxels, "intensity": Intensity(CT_WINDOW, clip=True)})


class Named(VolumeWorkflow):
    """Fails where `errors` has something for a volume's name; finds out the names of the others."""

    verb = "named"
    errors: dict[str, BaseException] = {}

    def start(self) -> None:
        self.names: list[str] = []
        self.concluded: list[list[str]] = []

    def process(self, volume: dict[str, Any]) -> None:
        list(self.slabs(volume, self.network))
        if volume["name"] in self.errors:
            raise self.errors[volume["name"]]
        self.names.append(volume["name"])

    def findings(self) -> list[str]:
        return self.names

    def conclude(self, findings: list[list[str]]) -> None:
        self.concluded = findings


def workflow(items: list[dict[str, Any]], errors: dict[str, BaseException] | None = None, **loader: Any) -> Named:
    found = Named(
        device="cpu",
        val_data_loader=VolumeLoader(Items(items), **loader),  # type: ignore[arg-type]
        network=nn.Identity(),
        inferer=VolumeInferer([4, 4, 4], factor=1),
    )
    found.errors = errors or {}
    return found


def test_volumes_are_counted_with_those_that_were_there(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    named = workflow([item("a"), item("b"), item("c")], skip=lambda name, image: name == "b")
    for _ in range(2):  # again from the beginning
        named.run()
        assert named.concluded == [["a", "c"]] and named.failed == []
    assert "a.nii.gz named in 0.0 s" in caplog.text
    assert caplog.text.count("2 volumes named, 1 were there already, 0 failed") == 2


def test_volumes_that_fail_stop_no_others_and_are_an_error_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    errors = {"c": RuntimeError("out of luck"), "d": torch.OutOfMemoryError("CUDA out of memory")}
    named = workflow([item("a"), item("b", "b.nii.gz: gone"), *map(item, "cde")], errors)
    with pytest.raises(UserError, match="^3 of 5 volumes could not be named: b.nii.gz: gone$"):
        named.run()
    assert named.concluded == [["a", "e"]]
    gone, luck, memory = named.failed
    assert gone == "b.nii.gz: gone" and luck == "c.nii.gz: out of luck"
    assert memory.startswith("d.nii.gz: out of memory with windows of [4, 4, 4] voxels (")
    assert memory.endswith("; lower val_sliding_window_patch_size (memory goes with its voxels)")
    passed = [record.message for record in caplog.records if "passed over: " in record.message]
    assert passed == [f"passed over: {why}" for why in named.failed]
    assert "c.nii.gz could not be named" in caplog.text and "Traceback" in caplog.text
    assert "d.nii.gz could not be named" not in caplog.text  # advice instead of a traceback


def test_what_is_not_finite_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    named = workflow([item("a"), item("b")])
    monkeypatch.setattr(named, "network", lambda x: x / 0)
    with pytest.raises(UserError, match="^2 of 2 .*: a.nii.gz: what the network makes of it is not finite"):
        named.run()


def test_results_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "result").mkdir()
    named = workflow([item("a"), item("b")])
    named.process = lambda volume: write_text(tmp_path / "result", "")  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"result: cannot be written \(Is a directory\); free space or choose"):
        named.run()
    assert named.failed == []


def test_a_result_whose_name_is_too_long_fails_by_itself(tmp_path: Path) -> None:
    named = workflow([item("a"), item("b" * 300), item("c")])
    named.process = lambda volume: write_text(tmp_path / volume["name"], "")  # type: ignore[method-assign]
    with pytest.raises(
        UserError, match=r"^1 of 3 volumes could not be named: b+\.nii\.gz: .*/b+: cannot be written \(File"
    ):
        named.run()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "c"] and named.done == 2


def test_the_findings_of_all_ranks_come_together(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Share(done=3, failed={5: "x.nii.gz: gone", 0: "y.nii.gz: gone"}, findings=["w"])
    named = workflow([item("a"), item("b", "b.nii.gz: gone")])
    monkeypatch.setattr(ranks, "gather", lambda value: [value, other])
    with pytest.raises(UserError, match="^3 of 7 volumes could not be named: y.nii.gz: gone$"):
        named.run()
    assert named.concluded == [["a"], ["w"]]
    assert named.failed == [f"{name}.nii.gz: gone" for name in "ybx"]  # in the order of all volumes, whose ever
