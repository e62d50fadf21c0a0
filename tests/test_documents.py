"""The documents say what configs and sources say: defaults, error texts, links, and both languages alike."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

GUIDE = sorted([*Path("docs").glob("guide*.md"), *Path("docs/guide").glob("*.md")])
DOCUMENTS = [
    *GUIDE,
    *map(Path, ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/README.md", "docs/performance.md")),
]
CONFIGS = {
    name: json.loads(Path(f"configs/{name}.json").read_text()) for name in ("train", "evaluate", "inference", "encode")
}
GROUPS = ("data_option", "autoencoder_train")
# Defaults that a person would rather read in words.
WORDS = {
    "device": ("the GPU, if there is one", "GPU（若有的話）"),
    "val_interval": ("that of `autoencoder_train`", "與 `autoencoder_train` 中的相同"),
    "autoencoder_def": ("as MAISI's", "與 MAISI 相同"),
    "discriminator_def": ("as MAISI's", "與 MAISI 相同"),
    "VENV": ("`.venv`, if it is there", "`.venv`（若存在）"),
    "MASTER_PORT": ("a free one", "一個未被佔用的連接埠"),
}
UNTOLD = {"rank", "num_ranks", "is_main"}  # set by the layer for several GPUs; the guide says so in a sentence


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def tables(text: str) -> Iterator[list[list[str]]]:
    """The rows of each table, as cells; the line of dashes left out."""
    for block in re.findall(r"(?:^\|.*\n)+", without_code(text) + "\n", flags=re.M):
        rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines()]
        yield [row for row in rows if not set("".join(row)) <= set("-: ")]


def resolved(name: str, key: str, group: str | None = None) -> Any:
    """The default of a key, paths put together."""
    config = CONFIGS[name]
    value = config[group][key] if group else config[key]
    while isinstance(value, str) and (found := re.fullmatch(r"\$@(\w+) \+ '(.*)'", value)):
        start = resolved(name, found[1])
        value = (start + found[2]).removeprefix("./")
    return value


def value_of(cell: str) -> Any:
    """What a cell says: JSON, in backticks or bare, else its text."""
    text = cell.strip("`")
    try:
        return json.loads(text)
    except ValueError:
        return text


def wrong_defaults(text: str, name: str = "train") -> list[str]:
    """Rows of the tables of defaults that do not agree with `configs/<name>.json`; and keys that are not there."""
    wrong = []
    for head, *rows in tables(text):
        if len(head) < 3 or head[1] not in ("default", "預設值") or head[0] in ("variable", "變數"):
            continue
        group = head[0].strip("`") if head[0].strip("`") in GROUPS else None
        for row in rows:
            keys = re.findall(r"`([^`]+)`", row[0])
            told = (
                re.split(r"[、,] ?", row[1])
                if len(keys) > 1 and row[1] not in WORDS.get(keys[0], ())
                else [row[1]] * len(keys)
            )
            for key, cell in zip(keys, told, strict=True):
                if cell in WORDS.get(key, ()) or row[1] in WORDS.get(key, ()):
                    continue
                known = key in (CONFIGS[name][group] if group else CONFIGS[name])
                expected = resolved(name, key, group) if known else "no such key"
                if value_of(cell) != expected:
                    wrong.append(f"{key}: the document says {cell}, configs/{name}.json {expected!r}")
    return wrong


@pytest.mark.parametrize("path", [p for p in GUIDE if p.name.startswith("reference")], ids=lambda p: p.name)
def test_defaults_are_those_of_the_config(path: Path) -> None:
    text = path.read_text()
    assert wrong_defaults(text) == []
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for table in tables(text) for row in table)))
    assert {knob for group in GROUPS for knob in CONFIGS["train"][group]} <= named
    chosen = {key for key, value in CONFIGS["train"].items() if not isinstance(value, (dict, list)) and key[0] != "_"}
    internal = {key for key in chosen if str(CONFIGS["train"][key]).startswith(("@", "$@discriminator", "$@network"))}
    assert chosen - internal - UNTOLD <= named


def test_a_changed_default_is_found() -> None:
    text = Path("docs/guide/reference.md").read_text()
    assert wrong_defaults(text.replace("| `kl_weight` | 1e-7 |", "| `kl_weight` | 1e-6 |")) == [
        "kl_weight: the document says 1e-6, configs/train.json 1e-07"
    ]
    assert len(wrong_defaults(text.replace("`outputs/tfevent_ct`", "`outputs/tfevent`"))) == 1
    assert len(wrong_defaults(text.replace("| `seed` |", "| `sead` |"))) == 1


@pytest.mark.parametrize("path", [p for p in GUIDE if p.name.startswith("several")], ids=lambda p: p.name)
def test_launchers_variables_and_options_are_those_of_the_scripts(path: Path) -> None:
    gpu, slurm = (Path(f"scripts/{name}").read_text() for name in ("train_vae_ct_gpu.sh", "train_vae_ct.sh"))
    defaults = dict(re.findall(r'^(\w+)="\$\{\1:-([^}]*)\}"', gpu, flags=re.M))
    asked = dict(re.findall(r"^#SBATCH (--[\w-]+)(?:=(.*))?$", slurm, flags=re.M))
    seen: set[str] = set()
    for head, *rows in tables(path.read_text()):
        for row in rows:
            names = re.findall(r"`([\w-]+)`", row[0])
            for name in names if head[0] in ("variable", "變數") else ():
                assert row[1].strip("`") == defaults.get(name) or row[1] in WORDS.get(name, ()), (name, row[1])
            for name in names if head[0] in ("option", "選項") else ():
                seen.add(name)
                assert not asked[name] or asked[name] in row[1], (name, row[1])
    assert seen >= asked.keys() - {"--ntasks-per-node"}


FILLED_IN = r"\.\.\.|\w+(?:[._#]\w+)+|\d[\d.,]*|PATH|'[^']*'|[()\[\]]"  # names, numbers, paths, quoted words, lists


def templates() -> list[list[str]]:
    """The literal pieces of each string of the sources, in their order; what is filled in lies between them."""
    found = []
    for path in Path("scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.split(r"%\w", node.value))
            elif isinstance(node, ast.JoinedStr):
                found.append([str(part.value) for part in node.values if isinstance(part, ast.Constant)])
    shell = Path("scripts/train_vae_ct_gpu.sh").read_text()
    found += [re.split(r"\$\(\(.*?\)\)|\$\{?\w+\}?", line) for line in re.findall(r'fail "(.*)"', shell)]
    return [[part for piece in pieces for part in re.split(FILLED_IN, piece)] for pieces in found]


def sayable(quote: str, known: list[list[str]]) -> bool:
    """Whether the sources can say a quote: of what is not filled in, most letters must be literal in one of them."""
    parts = [part.strip() for part in re.split(FILLED_IN, quote)]
    found = [(len(part), max(_literal(part, pieces) for pieces in known)) for part in parts if len(part) > 5]
    enough = sum(said for _, said in found) >= 0.45 * sum(length for length, _ in found)
    return enough and all(said >= 0.3 * length for length, said in found if length > 25)


def _literal(part: str, pieces: list[str]) -> int:
    """How many letters of a part of a quote one string of the sources has."""
    if any(part in piece for piece in pieces):
        return len(part)
    return sum(len(piece.strip()) for piece in pieces if len(piece.strip()) > 2 and piece.strip() in part)


@pytest.mark.parametrize("path", [p for p in GUIDE if p.name.startswith("troubleshooting")], ids=lambda p: p.name)
def test_quoted_errors_are_those_of_the_sources(path: Path) -> None:
    text, known = re.sub(r"\s+", " ", without_code(path.read_text())), templates()
    quotes = [q for q in re.findall(r"`([^`]+)`", text) if re.search(r"\w[;:] .*\w{3} |\w{3} \w+ \w+ \w+ \w+", q)]
    of_others = ("address already in use", "DataLoader worker", "Not all config files", "error: ...")
    quotes = [quote for quote in quotes if not quote.startswith(of_others)]
    assert len(quotes) > 30
    assert [quote for quote in quotes if not sayable(quote, known)] == []


def test_an_error_that_no_source_says_is_found() -> None:
    known = templates()
    assert sayable("PATH: no such datalist; make one with python -m scripts.datalist build", known)
    assert not sayable("PATH: no such datalist; bake one with python -m scripts.datalist build", known)
    assert not sayable("PATH: holds a trained model, and resume is wrong; ...", known)


def anchors(path: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", without_code(path.read_text())):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        assert there.exists(), f"{path}: {target}"
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{path}: {target}"


@pytest.mark.parametrize("english", [p for p in GUIDE if "zh-TW" not in p.name], ids=str)
def test_both_languages_have_the_same_parts(english: Path) -> None:
    chinese = english.with_name(f"{english.stem}.zh-TW.md")
    for pattern in (r"^#+ ", r"^```", r"^\| ", r"^- ", r"^\d+\. "):
        counts = [len(re.findall(pattern, page.read_text(), flags=re.M)) for page in (english, chinese)]
        assert counts[0] == counts[1], (pattern, counts)
    spans = [re.findall(r"^```.*?^```", page.read_text(), flags=re.M | re.S) for page in (english, chinese)]
    code = [[re.sub(r" +#.*", "", block) for block in blocks] for blocks in spans]
    assert code[0] == code[1]
