from __future__ import annotations

from pathlib import Path

import pytest

from scripts.common.errors import UserError
from scripts.common.files import make_folders, whole, write_json


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
