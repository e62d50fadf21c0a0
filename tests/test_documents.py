"""The guide says what configs and sources say: defaults, error texts, links, and both languages alike."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

GUIDE = sorted([*Path("docs").glob("guide*.md"), *Path("docs/guide").glob("*.md")])
ENGLISH = [page for page in GUIDE if not page.name.endswith(".zh-TW.md")]
NAMES = (
    "train", "evaluate", "inference", "encode", "train_diffusion", "train_controlnet", "generate", "evaluate_generated",
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {name: json.loads(Path(f"configs/{name}.json").read_text()) for name in NAMES}
GROUPS = ("data_option", "autoencoder_train", "diffusion_unet_train", "diffusion_unet_inference", "controlnet_train")
HEADS = ("default", "預設值", "in the script", "腳本中的值")  # of the column of defaults
MISSING = object()
# Keys that are no knobs: what MONAI runs, what the layer for several GPUs sets, and second names of networks.
NO_KNOBS = {"_desc_", "imports", "initialize", "run", "finalize", "rank", "num_ranks", "network_def", "autoencoder"}
# Defaults that are told in words.
WORDS = {
    "device": ("the GPU, if there is one", "GPU（若有的話）"),
    "VENV": ("`.venv`, if it is there", "`.venv`（若存在）"),
    "MASTER_PORT": ("a free one", "一個未被佔用的連接埠"),
    "--requeue": ("set", "已設定"),
    "tissues": ("bone, lung, air", "bone、lung、air"),
    "roi_labels": ("those of train_controlnet.json", "train_controlnet.json 的"),
}
# Messages that are quoted, but come from elsewhere.
FOREIGN = (
    "DataLoader worker (pid ...) is killed by signal: Killed",  # PyTorch
    "Not all config files are in configs",  # MONAI
    "Root Cause (first observed failure)",  # torchrun
    "address already in use",  # torchrun
)
COMMAND = re.compile(
    r"(python|make|pip|docker|torchrun|sbatch|ssh|scancel|watch|tail|export|[A-Z_]+=|2>)|--\S+ [^:;]*$"
)


class Table(NamedTuple):
    """A table of a page: the heading over it, the cells of its head, and its rows with their line numbers."""

    heading: str
    head: list[str]
    rows: list[tuple[int, list[str]]]


def without_code(text: str) -> str:
    """The text with its code blocks emptied; lines keep their numbers."""
    return re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.M | re.S)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", without_code(text), flags=re.M)


def tables(text: str) -> Iterator[Table]:
    heading, rows = "", []
    for number, line in enumerate([*without_code(text).splitlines(), ""], 1):
        if line.startswith("|"):
            rows.append((number, [cell.strip() for cell in line.strip()[1:-1].split("|")]))
        elif rows:
            yield Table(heading, rows[0][1], rows[2:])
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def at(config: Any, key: str) -> Any:
    """The value of `a#b#c` with its references followed; of a component, its class; MISSING where there is none."""
    value = config
    for part in key.split("#"):
        value = value.get(part, MISSING) if isinstance(value, dict) else MISSING
    if isinstance(value, dict) and "_target_" in value:
        return value["_target_"]
    if isinstance(value, str) and (found := re.fullmatch(r"\$?@([\w#]+)(?: \+ '(.*)')?", value)):
        return at(config, found[1]) if found[2] is None else (at(config, found[1]) + found[2]).removeprefix("./")
    return value


def told(cell: str, keys: int) -> list[dict[str, str]]:
    """The defaults that a cell tells of its keys, by config; "" stands for those that are not named."""
    parts = [re.fullmatch(r"(?:(\w+)[:：] ?)?(.*)", part) for part in re.split(r"[;；] ?", cell)]
    if len(parts) == 1 and keys > 1:
        values = re.findall(r"`[^`]*`|[^\s,、]+", cell) or [""]
        return [{"": value} for value in (values * keys if len(values) == 1 else values + ["nothing"] * keys)][:keys]
    return [{part[1] or "": part[2] for part in parts if part}] * keys


def entries(table: Table) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Line, key and defaults of all rows; the name of a group, which heads its table, goes before its keys."""
    group = "".join(f"{name}#" for name in spans(table.head[0]))
    for line, row in table.rows:
        keys = spans(row[0])
        yield from ((line, group + key, cells) for key, cells in zip(keys, told(row[1], len(keys)), strict=True))


def configs_of(table: Table) -> list[str]:
    return [name for name in CONFIGS if f"{name}.json" in table.heading]


def same(cell: str, expected: Any) -> bool:
    """Whether a cell says a value: as JSON, so that 1e-4 is 0.0001; of a class, its name is enough."""
    text = cell.strip("`")
    try:
        return json.loads(text) == expected and isinstance(json.loads(text), bool) == isinstance(expected, bool)
    except ValueError:
        return text == expected or ("." not in text and str(expected).endswith(f".{text}"))


def wrong_defaults(page: str, text: str) -> list[str]:
    """Rows of the tables of defaults that do not say what the configs say."""
    wrong = []
    for table in tables(text):
        names = configs_of(table) if table.head[1] in HEADS else []
        for line, key, cells in entries(table) if names else ():
            values = {name: at(CONFIGS[name], key) for name in names}
            if all(value is MISSING for value in values.values()):
                wrong.append(f"{page}:{line}: {key} is no key of {', '.join(names)}")
            for name, value in values.items():
                cell = cells.get(name, cells.get("", "nothing"))
                if value is not MISSING and cell not in WORDS.get(key, ()) and not same(cell, value):
                    wrong.append(f"{page}:{line}: {key} is {cell}, but {value!r} in configs/{name}.json")
    return wrong


def knobs(name: str) -> set[str]:
    """What a user may set in a config: plain values, paths made of them, and what the groups hold."""
    config = CONFIGS[name]
    plain = {key for key, value in config.items() if not isinstance(value, dict) and str(at(config, key))[:1] != "$"}
    grouped = {f"{group}#{key}" for group in GROUPS for key in config.get(group, {})}
    return plain - NO_KNOBS | grouped | ({"device", "autoencoder_def"} & config.keys())


@pytest.mark.parametrize("page", GUIDE, ids=str)
def test_defaults_are_those_of_the_configs(page: Path) -> None:
    assert wrong_defaults(str(page), page.read_text()) == []


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("page", [page for page in GUIDE if page.name.startswith("reference")], ids=str)
def test_every_knob_is_in_the_reference(page: Path, name: str) -> None:
    mine = [table for table in tables(page.read_text()) if name in configs_of(table)]
    assert sorted(knobs(name) - {key for table in mine for _, key, _ in entries(table)}) == []


def wrong_scripts(page: str, text: str) -> tuple[list[str], set[str]]:
    """Rows of the tables of variables and Slurm options that the scripts contradict, and what is in no such table."""
    gpu = "".join(Path(f"scripts/{name}.sh").read_text() for name in ("train_gpu", "train_vae_ct_gpu"))
    slurm = Path("scripts/train_vae_ct.sh").read_text()
    values = dict(re.findall(r'^(\w+)="\$\{\1:-([^}]*)\}"', gpu, flags=re.M)) | {"MASTER_PORT": ""}
    values |= dict(re.findall(r"^#SBATCH (--[\w-]+)=?(.*)$", slurm, flags=re.M))
    told_of = [e for table in tables(text) if table.head[1] in HEADS and not configs_of(table) for e in entries(table)]
    wrong = [
        f"{page}:{line}: {key} is {cells['']}, but {values.get(key)!r} in the script"
        for line, key, cells in told_of
        if cells[""] not in WORDS.get(key, ()) and cells[""].strip("`") != values.get(key)
    ]
    return wrong, values.keys() - {key for _, key, _ in told_of}


@pytest.mark.parametrize("language", ["", ".zh-TW"])
def test_variables_and_options_are_those_of_the_scripts(language: str) -> None:
    pages = [page.with_name(f"{page.stem}{language}.md") for page in ENGLISH]
    results = [wrong_scripts(str(page), page.read_text()) for page in pages]
    assert [line for wrong, _ in results for line in wrong] == []
    assert set.intersection(*(missing for _, missing in results)) == set()


WILD = "\0"  # what is filled in


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.replace("...", WILD))


def literal(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """A string of the sources, with what is filled in left open, or looked up where it is a string by name."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part, names) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return literal(node.value, names)
    if isinstance(node, ast.Name) and node.id in names:
        return literal(names[node.id], {})
    return re.sub(r"%[\d.]*[a-z]", WILD, str(node.value)) if isinstance(node, ast.Constant) else WILD


def strings(source: str) -> Iterator[str]:
    nodes = list(ast.walk(ast.parse(source)))
    assigned = [n for n in nodes if isinstance(n, ast.Assign) and isinstance(n.value, (ast.Constant, ast.JoinedStr))]
    names = {target.id: n.value for n in assigned for target in n.targets if isinstance(target, ast.Name)}
    yield from (literal(node, names) for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr)))


@cache
def messages() -> list[list[str]]:
    """What the sources can say, as tokens."""
    found = {text for path in Path("scripts").rglob("*.py") for text in strings(path.read_text())}
    shell = re.findall(r'(?:fail|echo) "(.*)"', Path("scripts/train_gpu.sh").read_text())
    found |= {re.sub(r"\$\(\(.*?\)\)|\$\{?\w+\}?", WILD, line) for line in shell}
    return [tokens(text.strip()) for text in found if len(re.findall(r"[a-z]{2,}", text)) > 2]


def agreement(quote: list[str], message: list[str]) -> int:
    """How many words a quote has in common with a message that can read like it; -1 if none can.

    What is filled into a message is any text without a semicolon, which parts an error from its remedy; what `...`
    stands for in a quote is any text.
    """
    table = [[-1] * (len(message) + 1) for _ in range(len(quote) + 1)]
    table[-1][-1] = 0
    for i in range(len(quote), -1, -1):
        for j in range(len(message), -1, -1):
            ways = [table[i][j]]
            mine, theirs = quote[i] if i < len(quote) else "", message[j] if j < len(message) else ""
            if mine == theirs != "" and table[i + 1][j + 1] >= 0:
                ways.append(table[i + 1][j + 1] + mine.isalpha())
            if theirs and WILD in (mine, theirs):
                ways.append(table[i][j + 1])
            if mine and (mine == WILD or (theirs == WILD and mine != ";")):
                ways.append(table[i + 1][j])
            table[i][j] = max(ways)
    return table[0][0]


def sayable(quote: str) -> bool:
    """Whether some message can read like a quote; the path before a message may be left out."""
    wanted = tokens(quote)
    words = {word for word in wanted if word.isalpha()}
    near = [m for m in messages() if len(words.intersection(m)) > 2]
    return any(agreement(wanted, m) > 2 or (m[:2] == [WILD, ":"] and agreement(wanted, m[2:]) > 2) for m in near)


def quotes(text: str) -> list[tuple[int, str]]:
    """The code spans that look like messages, with their lines: words, not commands, settings or formulas."""
    found = []
    for span in re.finditer(r"`([^`]+)`", without_code(text)):
        quote = " ".join(span[1].split())
        if len(re.findall(r"\b[a-z]{2,}\b", quote)) > 3 and not COMMAND.match(quote) and quote not in FOREIGN:
            found.append((text[: span.start()].count("\n") + 1, quote))
    return found


@pytest.mark.parametrize("page", GUIDE, ids=str)
def test_quoted_messages_are_those_of_the_sources(page: Path) -> None:
    found = quotes(page.read_text())
    assert len(found) > 35 or not page.name.startswith("troubleshooting")
    assert [f"{page}:{line}: no source says: {quote}" for line, quote in found if not sayable(quote)] == []


def test_what_is_wrong_is_found() -> None:
    text = Path("docs/guide/reference.md").read_text()
    for right, wrong in (
        ("| `kl_weight` | 1e-7 |", "| `kl_weight` | 1e-6 |"),
        ("| `finetune` | `false` |", "| `finetune` | 0 |"),
        ("`outputs/tfevent_ct` |", "`outputs/tfevent` |"),
        ("| `seed` |", "| `sead` |"),
        ("inference: `outputs/reconstructions`", "inference: `outputs`"),
    ):
        assert len(wrong_defaults("reference.md", text.replace(right, wrong, 1))) == 1, wrong
    assert len(wrong_scripts("reference.md", text.replace("| `GPU_IDS` | `0` |", "| `GPU_IDS` | `1` |"))[0]) == 1
    assert sayable("PATH: no such datalist; make one with python -m scripts.datalist build")
    assert not sayable("PATH: no such datalist; bake one with python -m scripts.datalist build")
    assert not sayable("PATH: is empty (0 bytes); remove it or throw the file away")
    assert not sayable("PATH: holds a trained model, and resume is wrong; ...")


def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of the headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page.read_text())}


@pytest.mark.parametrize("page", [*GUIDE, Path("docs/performance.md")], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        leads = there.exists() and (not anchor or there.suffix != ".md" or anchor in anchors(there))
        if "://" not in target and not leads:
            broken.append(f"{page}: {target}")
    assert broken == []


@pytest.mark.parametrize("english", ENGLISH, ids=str)
def test_both_languages_have_the_same_parts(english: Path) -> None:
    texts = [page.read_text() for page in (english, english.with_name(f"{english.stem}.zh-TW.md"))]
    counts = [len(headings(text)) for text in texts]
    assert counts[0] == counts[1], "headings"
    rows = [[len(table.rows) for table in tables(text)] for text in texts]
    assert rows[0] == rows[1], "rows of the tables"
    blocks = [re.findall(r"^```.*?^```", text, flags=re.M | re.S) for text in texts]
    code = [[re.sub(r" +# .*", "", block) for block in page] for page in blocks]  # comments are translated
    assert code[0] == code[1], "code blocks"
