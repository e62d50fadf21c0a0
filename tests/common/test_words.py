from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from scripts.common.errors import UserError
from scripts.common.words import ANY, NUMBER, TEXT, TRUTH, door, is_path, read_word
from tests.helpers import TRICKY


@given(st.one_of(st.sampled_from(TRICKY), st.text(st.characters(exclude_characters="\0"))))
def test_no_text_is_changed(word: str) -> None:
    assume(not word.startswith(("['", '["', "('", '("')))
    assert read_word("--pattern", word, TEXT) == word
    if not word.startswith("~"):
        assert read_word("--output_dir", word, TEXT, path=True) == word


def test_a_list_of_quoted_texts_is_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert read_word("--json_data_list", "['a#1.json', \"~/b.json\"]", TEXT, path=True) == [
        "a#1.json",
        "/home/me/b.json",
    ]
    assert read_word("--data_dir", "[a.json]", TEXT, path=True) == "[a.json]"
    assert read_word("--data_dir", "~/x", TEXT, path=True) == "/home/me/x"
    assert read_word("--pattern", "~/x", TEXT) == "~/x"


@pytest.mark.parametrize(
    ("words", "value"), [("true True TRUE yes Yes 1", True), ("false False FALSE no NO 0", False)]
)  # fmt: skip
def test_truth_in_any_case_and_nothing_else(words: str, value: bool) -> None:
    assert [read_word("--resume", word, TRUTH) for word in words.split()] == [value] * 6
    for word in ("maybe", "", "2", "on", "'true'", "None"):
        with pytest.raises(
            UserError, match=f"--resume is {word!r}, which is neither true nor false; use one of true, yes"
        ):
            read_word("--resume", word, TRUTH)


def test_numbers_and_what_may_be_anything() -> None:
    assert [read_word("--seed", word, NUMBER) for word in ("3", "-1.5", "2e3", "1_000")] == [3, -1.5, 2000.0, 1000]
    for word in ("abc", "true", "3#4", "", "[1]"):
        with pytest.raises(UserError, match=r"--seed is .*, which is not a number; use one"):
            read_word("--seed", word, NUMBER)
    words = {"[96, 96, 96]": [96, 96, 96], "false": False, "NULL": None, "cpu": "cpu", "a,b": ("a", "b"), "1": 1}
    assert {word: read_word("--x", word, ANY) for word in words} == words


def test_what_is_a_path() -> None:
    paths = (
        "output_dir", "train#store_dir", "perceptual_linear_path", "json_data_list", "bundle_root", "output",
        "existing_ckpt_filepath",
    )  # fmt: skip
    assert all(map(is_path, paths)) and not any(map(is_path, ("modality", "pattern", "train::dataset", "outputs")))


def shown(data_dir: str, pattern: str | None = None, count: int = 1, strict: bool = False, shape: Any = (1, 2)) -> str:
    """Show what came."""
    return repr((data_dir, pattern, count, strict, shape))


@pytest.mark.parametrize("word", [word for word in TRICKY if word != "-"])  # by which Fire separates commands
def test_doors_take_words_as_they_are(word: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "show", f"--data_dir={word}", "--pattern", word, "--strict", "NO"])
    door({"show": shown})
    assert capsys.readouterr().out.strip() == repr((word, word, 1, False, (1, 2)))


def test_doors_refuse_what_is_of_another_kind(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "show", "20261125", "--count", "20", "--strict", "--shape", "[3,4]"])
    door({"show": shown})
    assert capsys.readouterr().out.strip() == repr(("20261125", None, 20, True, [3, 4]))
    monkeypatch.setattr(sys, "argv", ["x", "show", "d", "--strict", "maybe"])
    with pytest.raises(UserError, match="--strict is 'maybe', which is neither true nor false"):
        door({"show": shown})
    monkeypatch.setattr(sys, "argv", ["x", "show", "d", "--count", "2.5"])
    with pytest.raises(UserError, match="--count is '2.5', which is not a whole number; use one"):
        door({"show": shown})


@pytest.mark.parametrize("name", ["ct#2", "20261125"])
def test_the_folder_that_is_named_is_the_one_that_is_read(tmp_path: Path, name: str) -> None:
    for folder in ("ct", name):
        (tmp_path / folder).mkdir()
        for patient in (1, 2, 31):
            (tmp_path / folder / f"{patient}.nii.gz").touch()
    command = [sys.executable, "-m", "scripts.datalist", "build", "--data_dir", name, "--output", f"{name}.json"]
    options = ["--test_fraction=0", "--val_fraction=.4", "--pattern", "*1.nii.gz"]
    subprocess.run([*command, *options], cwd=tmp_path, env={"PYTHONPATH": str(Path.cwd())}, check=True)
    content = json.loads((tmp_path / f"{name}.json").read_text())
    images = [entry["image"] for split in content.values() for entry in split]
    assert sorted(images) == [str(tmp_path / name / f"{patient}.nii.gz") for patient in (1, 31)]
