"""Misspelt keys, on the command line and in layers, which MONAI would accept without a word."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from fire.parser import DefaultParseValue
from monai.bundle import ConfigParser
from monai.bundle.utils import ID_SEP_KEY, merge_kv
from monai.utils import ensure_tuple

from scripts.common.errors import UserError

_RUN_ARGUMENTS = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")
_WORKFLOW = ("initialize", "run", "finalize")  # lists that MONAI runs


def check_command_line(argv: Sequence[str] | None = None) -> None:
    """Refuse a misspelt `--key` or a misspelt key in a later config file.

    Keys of later files that resemble no key of the first are let pass: the network file of NV-Generate-CTMR
    brings definitions that nothing here refers to.

    Args:
        argv: the command line, `sys.argv` where it is None; nothing is checked unless it runs `monai.bundle`.

    Raises:
        UserError: naming the key, where it stands, and what was probably meant.
    """
    argv = sys.argv if argv is None else argv
    options = _options(argv)
    if "config_file" not in options:
        return
    given = DefaultParseValue(options["config_file"])  # as Fire reads it for MONAI, which then splits at commas
    several = given.split(",") if isinstance(given, str) and not Path(given).is_file() else ensure_tuple(given)
    files = [str(file) for file in several]
    configs = {file: ConfigParser.load_config_file(file) for file in files if Path(file).is_file()}
    if not configs:
        return
    first, *layers = configs
    parser = ConfigParser(dict(configs[first]))
    for file in layers:
        for key in configs[file]:
            name = key.lstrip("+")
            if name not in _WORKFLOW and name not in parser and (close := _close(name, parser, 0.85)):
                raise UserError(f"{file}: unknown key {name!r}; did you mean {close!r}?")
        for key, value in configs[file].items():
            merge_kv(parser, key, value)
    for key in options:
        if key not in _RUN_ARGUMENTS and key not in parser:
            close = _close(key, parser, 0.75)
            hint = f"did you mean --{close}?" if close else "the config file lists the keys"
            raise UserError(f"--{key}: no such key in {', '.join(files)}; {hint}")


def _options(argv: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for index, word in enumerate(argv):
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            following = argv[index + 1] if index + 1 < len(argv) else ""
            options[key] = value if equals else following
    return options


def _close(key: str, parser: ConfigParser, likeness: float) -> str | None:
    """The known key that `key` resembles, at its own depth."""
    separator = "#" if "#" in key else ID_SEP_KEY
    *parents, last = key.split(separator)
    group = parser.get(ID_SEP_KEY.join(parents), None) if parents else parser.get()
    names = [k for k in group if not k.startswith("_")] if isinstance(group, dict) else []
    matches = get_close_matches(last, names, n=1, cutoff=likeness)
    return separator.join([*parents, matches[0]]) if matches else None
