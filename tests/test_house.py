"""The rules of the house, held by the imports and the sizes themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path("scripts")
ROOMS = ("common", "data", "networks", "measure", "training", "use")
# Which rooms a room may import; the doors, which are what lies in scripts/ itself, may import any.
MAY = {
    "common": set(),
    "data": {"common"},
    "networks": {"common"},
    "measure": {"common"},
    "training": {"common", "data", "networks", "measure"},
    "use": {"common", "data", "networks", "measure"},
}
FILE_LINES, FUNCTION_LINES = 300, 45


def modules(folder: Path = SCRIPTS) -> dict[Path, str]:
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}


def imported(source: str) -> Iterator[str]:
    """The modules of ours that a source names, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "scripts")


def forbidden(path: Path, source: str) -> list[str]:
    """What a module imports that its room may not."""
    room = path.relative_to(SCRIPTS).parts[0]
    if room not in MAY:
        return []
    found = []
    for name in imported(source):
        other = name.split(".")[1]
        if other != room and other not in MAY[room]:  # type: ignore[operator]
            found.append(f"{path} imports {name}")
    return found


def test_rooms_import_only_what_lies_below_them() -> None:
    assert {path.name for path in SCRIPTS.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(ROOMS)
    assert [line for path, source in modules().items() for line in forbidden(path, source)] == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("common/files.py", "from scripts.data.nifti import read_nifti"),
        ("data/store.py", "import scripts.networks.windows"),
        ("networks/windows.py", "from scripts.data import store"),
        ("measure/metrics.py", "def late():\n    from scripts.use.inputs import find"),
        ("training/vae.py", "from scripts.use.workflow import VolumeWorkflow"),
        ("use/encode.py", "from scripts.training.engine import TrainingEngine"),
        ("use/encode.py", "from scripts.datalist import build"),
    ],
)
def test_a_forbidden_import_is_found(path: str, line: str) -> None:
    source = (SCRIPTS / path).read_text(encoding="utf-8")
    assert len(forbidden(SCRIPTS / path, f"{source}\n{line}\n")) == 1


def test_modules_import_one_another_without_a_circle() -> None:
    paths = {".".join(path.with_suffix("").parts): path for path in modules()}
    below = {
        name: {other for found in imported(paths[name].read_text(encoding="utf-8")) for other in paths
               if found == other or found.rpartition(".")[0] == other}
        for name in paths
    }  # fmt: skip
    while below:
        free = [name for name, others in below.items() if not others & below.keys() - {name}]
        assert free, f"a circle among {sorted(below)}"
        below = {name: others for name, others in below.items() if name not in free}


def test_files_and_functions_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    files = {str(path): len(source.splitlines()) for path, source in modules().items()}
    functions = {
        f"{path}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, source in modules().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    longest_file, longest = max(files, key=files.__getitem__), max(functions, key=functions.__getitem__)
    with capsys.disabled():
        print(f"\nlongest file {longest_file}: {files[longest_file]}; function {longest}: {functions[longest]} lines")
    assert files[longest_file] <= FILE_LINES and functions[longest] <= FUNCTION_LINES


def test_tests_mirror_the_rooms_and_do_not_import_one_another() -> None:
    folders = {path.name for path in Path("tests").iterdir() if (path / "__init__.py").exists()}
    assert set(ROOMS) | {"runs", "benchmarks", "gpu"} == folders
    for path, source in modules(Path("tests")).items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not node.module.split(".")[-1].startswith("test_"), f"{path} imports {node.module}"


ENGINE = ("engine", "checkpointing", "model_folder", "handlers", "guard", "preflight", "tensorboard_log", "signals")
NAMES = ("autoencoder", "discriminator", "generator", "recons_loss", "kl_loss", "p_loss", "adv_loss", "d_loss", "psnr",
         "ssim", "optimizer_g", "optimizer_d", "scaler_g")  # fmt: skip


@pytest.mark.parametrize("module", ENGINE)
def test_what_trainings_share_names_no_loss_and_no_network(module: str) -> None:
    source = (SCRIPTS / "training" / f"{module}.py").read_text(encoding="utf-8")
    assert [name for name in NAMES if name in source] == []
