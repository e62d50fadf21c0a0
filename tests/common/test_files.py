from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.files import disown, make_folders, own, read_json, sweep, whole, write_json, write_text
from tests.helpers import start


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/models: cannot be written to \(Not a directory\)"):
        make_folders(str(tmp_path / "new"), str(tmp_path / "file" / "models"))
    with pytest.raises(UserError, match=r"/file: cannot be written to \(File exists\)"):
        make_folders(str(tmp_path / "file"))


def test_what_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(UserError, match=r"a\.json: cannot be written \(broken\); free space or"), whole(path) as part:
        part.write_text("half")
        raise OSError("broken")
    assert path.read_text() == '{\n    "old": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"nan": float("nan")})


def test_names_of_any_length_and_any_bytes_are_written(tmp_path: Path) -> None:
    longest = tmp_path / ("a" * 248 + ".nii.gz")  # 255 bytes
    with whole(longest) as part:
        assert part.name.endswith(".nii.gz")
        part.touch()
    assert longest.exists()
    with pytest.raises(UserError, match="File name too long"), whole(tmp_path / ("b" * 256)) as part:
        part.touch()
    names = ["\udcfc", "\udcff\udcfe", 'ü"\n']
    write_json(tmp_path / "x.json", names)
    assert read_json(tmp_path / "x.json") == names
    write_text(tmp_path / "x.txt", "a\udcfcü")
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == "a\\udcfcü"


def test_two_writers_of_one_file_leave_one_of_theirs(tmp_path: Path) -> None:
    first, second = whole(tmp_path / "w.pt"), whole(tmp_path / "w.pt")
    with first as a, second as b:
        assert a != b
        a.write_text("first")
        b.write_text("second")
    assert (tmp_path / "w.pt").read_text() == "first" and len(list(tmp_path.iterdir())) == 1  # the last to end


def test_what_killed_runs_left_is_removed_when_it_is_old(tmp_path: Path) -> None:
    old, new, other = (tmp_path / name for name in (".part-1.pt", ".part-2.pt", "kept.pt"))
    for path in (old, new, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    make_folders(str(tmp_path))
    assert not old.exists() and new.exists() and other.exists()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.pt"]


def owner(folder: Path, said: Path) -> None:
    try:
        own(folder)
        said.write_text("mine")
    except UserError as error:
        said.write_text(str(error))
        return
    if os.fork() == 0:  # as a data-loader worker, which outlives its parent a while
        time.sleep(60)
        os._exit(0)
    threading.Event().wait(60)


def asked(folder: Path, said: Path) -> tuple[str, object]:
    process = start(owner, folder, said, log=folder / "log")
    limit = time.monotonic() + 60
    while not said.exists() or not said.read_text():
        assert time.monotonic() < limit
        time.sleep(0.02)
    return said.read_text(), process


def test_a_folder_has_one_owner_whose_death_frees_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".part-x").touch()
    told, first = asked(tmp_path, tmp_path / "1")
    assert told == "mine" and not (tmp_path / ".part-x").exists()
    told, second = asked(tmp_path, tmp_path / "2")
    assert told.startswith(f"{tmp_path}: is in use by process {first.pid} on ") and told.endswith("give another folder")
    second.join()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    os.kill(first.pid, signal.SIGKILL)  # its child lives on
    first.join()
    own(tmp_path)
    own(tmp_path)  # by itself, that is nothing
    told, third = asked(tmp_path, tmp_path / "3")
    assert f"process {os.getpid()} on " in told and ", job 77, since 20" in told
    disown(tmp_path)
    told, fourth = asked(tmp_path, tmp_path / "4")
    assert told == "mine"
    for process in (first, third, fourth):
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
