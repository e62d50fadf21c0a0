"""Folders of results: which are done, and which may be mixed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.common.errors import UserError
from scripts.use.outputs import Output
from tests.helpers import finish, start


def output(folder: Path, sha256: str = "1", window: int = 64, **options: Any) -> Output:
    facts = {"weights": f"{sha256}.pt", "weights_sha256": sha256}
    weights: Any = SimpleNamespace(facts=lambda: facts)
    return Output(
        str(folder), "_recon", weights, {"window": window}, bundle_version="7", **{"computed_in": "bfloat16"} | options
    )


class Named:
    """Weights that are known by their name alone."""

    def __init__(self, name: str) -> None:
        self.name = name

    def facts(self) -> dict[str, str | None]:
        return {"weights": self.name, "weights_sha256": self.name}


def make(made: Output, name: str, content: bytes = b"voxels") -> None:
    """A result as workflows write it: its files, then its line in the list."""
    made.path(name).parent.mkdir(parents=True, exist_ok=True)
    made.path(name).write_bytes(content)
    made.finished(name)


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "made_with_recon.jsonl").read_text().splitlines() if line]


def test_results_are_named_after_volumes_and_the_record_says_how_they_were_made(tmp_path: Path) -> None:
    made = output(tmp_path)
    assert made.path("a/v") == tmp_path / "a" / "v_recon.nii.gz"
    assert made.sidecar("a/v") == tmp_path / "a" / "v_recon.nii.gz.json"
    wanted = {"weights": "1.pt", "weights_sha256": "1", "bundle_version": "7", "computed_in": "bfloat16"}
    record = tmp_path / "made_with_recon.json"
    assert json.loads(record.read_text()) == wanted | {"settings": {"window": 64}}
    output(tmp_path, computed_in="float32")  # goes on, as another GPU may
    old = wanted | {"settings": {"window": 64}}
    old.pop("computed_in")  # of version 0.5
    record.write_text(json.dumps(old))
    output(tmp_path)
    assert json.loads(record.read_text()) == old


def test_results_of_two_kinds_share_a_folder(tmp_path: Path) -> None:
    made = {kind: Output(str(tmp_path), f"_{kind}", Named(f"{kind}.pt"), {}) for kind in ("ct", "mri")}
    for kind, other in (("ct", "mri"), ("mri", "ct")):
        make(made[kind], "v")
        assert made[kind].path("v") == tmp_path / f"v_{kind}.nii.gz" and made[kind].done("v")
        assert json.loads((tmp_path / f"made_with_{kind}.json").read_text())["weights"] == f"{kind}.pt"
        assert made[other].names() == (["v"] if other == "ct" else [])


def test_a_result_is_done_once_it_is_listed(tmp_path: Path) -> None:
    made = output(tmp_path)
    assert not made.done("v") and listed(tmp_path) == []
    made.path("v").write_bytes(b"voxels")
    assert not output(tmp_path).done("v")  # killed before it said so
    made.finished("v")
    assert listed(tmp_path) == [{"name": "v", "bytes": 6}]
    assert made.done("v") and output(tmp_path).done("v") and output(tmp_path).names() == ["v"]
    whole = output(tmp_path, sidecars=True)
    assert not whole.done("v") and whole.names() == []
    whole.sidecar("v").touch()
    assert whole.done("v") and whole.names() == ["v"]
    made.path("v").write_bytes(b"other voxels")  # copied half, or by another program
    assert not made.done("v")
    make(made, "v", b"other voxels")  # its last line counts
    assert output(tmp_path).done("v")
    made.path("v").unlink()
    assert not made.done("v") and made.names() == []


def test_what_is_done_is_done_in_a_copy_with_other_times(tmp_path: Path) -> None:
    made = output(tmp_path / "here")
    for name in ("b", "sub/a"):
        make(made, name)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for i, path in enumerate(sorted((tmp_path / "there").rglob("*.gz"))):
        os.utime(path, (1e9 + i, 1e9 + i))
    copied = output(tmp_path / "there")
    assert copied.done("b") and copied.done("sub/a") and not copied.done("a") and copied.names() == ["b", "sub/a"]


def test_an_overwriting_begins_anew_and_goes_on_without_it(tmp_path: Path) -> None:
    for name in "vwx":
        make(output(tmp_path), name)
    anew = output(tmp_path, sha256="2", overwrite=True)
    assert not any(map(anew.done, "vwx")) and listed(tmp_path) == []
    make(anew, "w")
    goes_on = output(tmp_path, sha256="2")
    assert [name for name in "vwx" if goes_on.done(name)] == ["w"] == goes_on.names()


def test_an_overwriting_that_ends_before_its_record_leaves_nothing_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(output(tmp_path), "v")
    with monkeypatch.context() as patched:
        patched.setattr("scripts.use.outputs.write_json", lambda *_: None)
        output(tmp_path, sha256="2", overwrite=True)
    assert not output(tmp_path).done("v")  # of the old weights, whose record is still there


@pytest.mark.parametrize("torn", [b'{"name": "w", "by', b"\0\0\0", b'{"name": "w"}\n', b"[1, 2]", b'"w"', b"\xff\n7"])
def test_a_damaged_line_is_passed_over_and_ended_by_the_next(torn: bytes, tmp_path: Path) -> None:
    made = output(tmp_path)
    make(made, "v")
    with made.list.open("ab") as file:
        file.write(torn)
    goes_on = output(tmp_path)
    assert goes_on.done("v") and not goes_on.done("w")
    make(goes_on, "w", b"more")
    make(goes_on, "x")
    assert output(tmp_path).names() == ["v", "w", "x"]
    lines = made.list.read_bytes().splitlines()
    assert lines[-2:] == [b'{"name": "w", "bytes": 4}', b'{"name": "x", "bytes": 6}'] and b"" not in lines


NAMES = ("a b", "$x$ 100% <b>", "li\nne\r", "quo\"te's", "肺/部", "no\udcff \udc80", "s\\u0041", "u\u2028")


def test_names_may_hold_any_character(tmp_path: Path) -> None:
    made = output(tmp_path)
    for name in NAMES:
        make(made, name, name.encode(errors="surrogateescape"))
    assert [item["name"] for item in listed(tmp_path)] == list(NAMES)
    assert made.list.read_bytes().isascii() and made.list.read_bytes().count(b"\n") == len(NAMES)
    again = output(tmp_path)
    assert all(map(again.done, NAMES)) and sorted(again.names()) == sorted(NAMES)
    made.list.unlink()  # as version 0.4 left it
    assert sorted(output(tmp_path).names()) == sorted(NAMES)


def test_results_of_version_0_4_are_done(tmp_path: Path) -> None:
    made = output(tmp_path)
    for name in ("v", "sub/w"):
        make(made, name)
        os.utime(made.path(name), (1e9, 1e9))
    made.list.unlink()
    (tmp_path / "v_emb.nii.gz").write_bytes(b"of another ending")
    old = output(tmp_path)
    assert old.done("v") and old.done("sub/w") and not old.done("x")
    assert listed(tmp_path) == [{"name": "sub/w", "bytes": 6}, {"name": "v", "bytes": 6}]


def append(folder: Path, rank: int) -> None:
    made = output(folder)
    for i in range(200):
        make(made, f"{rank}-{i}", b"x" * i)


def test_ranks_append_to_one_list(tmp_path: Path) -> None:
    output(tmp_path)
    log = tmp_path / "log"
    finish([start(append, tmp_path, rank, log=log) for rank in range(3)], log)
    made = output(tmp_path)
    assert {item["name"]: item["bytes"] for item in listed(tmp_path)} == {
        f"{rank}-{i}": i for rank in range(3) for i in range(200)
    }
    assert len(made.list.read_bytes().splitlines()) == len(made.names()) == 600


def test_a_list_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    made = output(tmp_path)
    made.list.unlink()
    made.list.mkdir()
    with pytest.raises(UserError, match=r"made_with_recon\.jsonl: cannot be written \(Is a directory\); free space or"):
        make(made, "v")


def test_a_name_too_long_is_not_done(tmp_path: Path) -> None:
    assert not output(tmp_path).done("v" * 300)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    made = output(tmp_path)
    made.path("v").touch()
    with pytest.raises(UserError, match=r"v_recon\.nii\.gz: is there, but is no result of an earlier run; move it"):
        made.done("v")
    with pytest.raises(UserError, match=r"v_recon\.nii\.gz: is there, but is no result of an earlier run; move it"):
        output(tmp_path).done("v")  # the same command again: nothing that was there is taken for its own
    other = output(tmp_path / "other", overwrite=True)
    other.path("v").touch()
    assert not other.done("v")


def test_a_refusal_keeps_the_record_of_results_that_are_there(tmp_path: Path) -> None:
    made = output(tmp_path)
    make(made, "v")
    made.path("w").touch()
    with pytest.raises(UserError, match=r"w_recon\.nii\.gz: is there, but is no result of an earlier run; move it"):
        made.done("w")
    assert output(tmp_path).names() == ["v"]


def test_results_of_other_weights_or_settings_are_refused(tmp_path: Path) -> None:
    output(tmp_path)
    with pytest.raises(UserError, match=r"holds results of other weights \(1\.pt\); give another output_dir, or --ov"):
        output(tmp_path, sha256="2")
    with pytest.raises(UserError, match=r"holds results of other settings \(window was 64, now it is 32\); give"):
        output(tmp_path, window=32)
    (tmp_path / "made_with_recon.json").write_text("{")
    with pytest.raises(UserError, match=r"made_with_recon\.json: is damaged, so it is not known what results are"):
        output(tmp_path)
    output(tmp_path, sha256="2", window=32, overwrite=True)
    assert json.loads((tmp_path / "made_with_recon.json").read_text())["settings"] == {"window": 32}


def test_a_result_of_another_volume_of_the_same_name_is_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "one.nii", tmp_path / "two.nii"
    first.write_bytes(b"1")
    second.write_bytes(b"12")
    made = output(tmp_path / "results")
    made.path("v").write_bytes(b"voxels")
    made.finished("v", str(first))
    assert made.done("v", str(first)) and made.done("v") and made.done("v", str(tmp_path / "gone.nii"))
    again = output(tmp_path / "results")
    with pytest.raises(
        UserError, match=r"v_recon.nii.gz: was made of another file of that name \(1 bytes; .*two.nii has 2\)"
    ):
        again.done("v", str(second))
    assert not output(tmp_path / "results", overwrite=True).done("v", str(second))


def test_a_source_that_was_corrected_is_another_though_of_the_same_size(tmp_path: Path) -> None:
    (source := tmp_path / "v.nii").write_bytes(b"one")
    made = output(tmp_path / "out", corrected=True)
    make(made, "v")
    made.finished("v", str(source))
    assert made.done("v", str(source)) and output(tmp_path / "out", corrected=True).done("v", str(source))
    for content in (b"two", b"three"):
        source.write_bytes(content)
        assert not output(tmp_path / "out", corrected=True).done("v", str(source))
    source.write_bytes(b"one")
    assert made.done("v", str(source))
