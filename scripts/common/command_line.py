"""MONAI's command line: overrides read word by word, and misspelt keys, which MONAI would accept without a word."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fire.core import _IsFlag, _ParseKeywordArgs
from fire.inspectutils import GetFullArgSpec
from fire.parser import DefaultParseValue, SeparateFlagArgs
from monai.bundle import ConfigParser
from monai.bundle import run as monai_run
from monai.bundle.utils import ID_SEP_KEY
from monai.utils import ensure_tuple

from scripts.common.errors import UserError
from scripts.common.monai_bundle import literal, live_parser, merged, refers
from scripts.common.words import ANY, NUMBER, TEXT, TRUTH, is_path, read_word

_RUN_ARGUMENTS = ("run_id", "init_id", "final_id", "meta_file", "config_file", "logging_file", "tracking", "args_file")
_WORKFLOW = ("initialize", "run", "finalize")  # lists that MONAI runs
_UNREAD = ("controlnet_infer",)  # in files of NV-Generate-CTMR, like a key of ours and not meant for it


def read(argv: Sequence[str] | None = None) -> None:
    """Read the overrides of `python -m monai.bundle run` again, and the home folder in paths of config files.

    The first thing that `initialize` does. Overrides keep MONAI's meaning where they refer to a key: `@key`, or
    `$ an expression with @key`.

    Args:
        argv: the command line, `sys.argv` where it is None; only paths are read unless it runs `monai.bundle`.

    Raises:
        UserError: for a misspelt key, see `check_command_line`; or a word that its key cannot have.
    """
    parser = live_parser()
    options, defaults = check_command_line(argv)
    if parser is None:
        return
    for key, word in options.items():
        kind = _kind(key, defaults)
        if word is None and kind != TRUTH:
            raise UserError(f"--{key} has no value; give one, after = where it begins with dashes")
        if word is None or refers(word, defaults):
            continue
        value = read_word(f"--{key}", word, kind, is_path(key))
        if value is None or (_get(key, defaults) is None and word.lower() in ("null", "none")):
            parser[key] = None
        else:
            parser[key] = _literal(value) if kind == TEXT else value
    files: Any = defaults.get() or {}
    content: Any = parser.get()
    for key, value in list(content.items()):
        if is_path(key) and key not in options:
            written = files.get(key)  # MONAI has put "::" for "#" by now
            parser[key] = _at_home(written if repr(written).replace("#", "::") == repr(value) else value)
    parser.parse(reset=True)


def _kind(key: str, defaults: ConfigParser) -> str:
    default = _get(key, defaults)
    if isinstance(default, bool):
        return TRUTH
    if is_path(key):
        return TEXT
    if isinstance(default, (int, float)):
        return NUMBER
    return TEXT if isinstance(default, str) and not default.startswith("$") else ANY


def _get(key: str, defaults: ConfigParser) -> Any:
    """What the config files say of a key, or of that which it refers to."""
    default = defaults.get(key, None)
    while isinstance(default, str) and default.startswith("@"):
        default = defaults.get(default[1:], None)
    return default


def _literal(value: str | list[str]) -> str | list[str]:
    return literal(value) if isinstance(value, str) else [literal(item) for item in value]


def _at_home(value: Any) -> Any:
    """A path of a config file, or several, with the home folder for `~`, and nothing in it that MONAI would change."""
    if isinstance(value, list):
        return [_at_home(item) for item in value]
    if not isinstance(value, str) or value.startswith(("$", "@", "%")):
        return value
    path = os.path.expanduser(value)  # noqa: PTH111
    if "::" in path and not Path(path).exists():  # which MONAI has put for "#" in what Python gave
        path = path.replace("::", "#")
    return literal(path)


def check_command_line(argv: Sequence[str] | None = None) -> tuple[dict[str, str | None], ConfigParser]:
    """Refuse a misspelt `--key` or a misspelt key in a later config file, which MONAI would accept without a word.

    Keys of later files that resemble no key of the first are let pass: the network file of NV-Generate-CTMR
    brings definitions that nothing here refers to.

    Args:
        argv: the command line, `sys.argv` where it is None; nothing is checked unless it runs `monai.bundle`.

    Returns:
        the overrides, by key: their words, None where a key stands alone; and what the config files say.

    Raises:
        UserError: naming the key, where it stands, and what was probably meant.
    """
    options = _options(sys.argv if argv is None else argv)
    given = _config_file(options)
    if not given:
        return {}, ConfigParser({})
    several = given.split(",") if isinstance(given, str) and not Path(given).is_file() else ensure_tuple(given)
    parser, configs = merged([str(file) for file in several])
    if not configs:
        return {}, parser
    first, *layers = configs
    known = ConfigParser(configs[first])
    for file in layers:
        for key in configs[file]:
            name = key.lstrip("+")
            if name in known or name in (*_WORKFLOW, *_UNREAD):
                continue
            if close := _close(name, known, 0.85):
                raise UserError(f"{file}: unknown key {name!r}; did you mean {close!r}?")
    overrides = {key: word for key, word in options.items() if key not in _RUN_ARGUMENTS}
    for key in overrides:
        if key not in parser:
            close = _close(key, parser, 0.75)
            hint = f"did you mean --{close}?" if close else "the config file lists the keys"
            raise UserError(f"--{key}: no such key in {', '.join(configs)}; {hint}")
    return overrides, parser


def _config_file(options: Mapping[str, str | None]) -> Any:
    """What `--config_file` says, as Fire reads it for MONAI, or `config_file` in the file that `--args_file` names."""
    if word := options.get("config_file"):
        return DefaultParseValue(word)
    arguments = options.get("args_file")
    return ConfigParser.load_config_file(arguments).get("config_file") if arguments else None


def _options(argv: Sequence[str]) -> dict[str, str | None]:
    """The words of a command line by key, as Fire deals them out; None for a key that stands alone."""
    words, _ = SeparateFlagArgs(list(argv[1:]))
    words = words[: words.index("-")] if "-" in words else words
    options, _, _ = _ParseKeywordArgs(words, GetFullArgSpec(monai_run))
    pairs = zip(words, [*words[1:], "--"], strict=False)
    alone = {word.lstrip("-").replace("-", "_") for word, following in pairs if _IsFlag(word) and _IsFlag(following)}
    return {key: None if key in alone else word for key, word in options.items()}


def _close(key: str, parser: ConfigParser, likeness: float) -> str | None:
    """The known key that `key` resembles, at its own depth."""
    separator = "#" if "#" in key else ID_SEP_KEY
    *parents, last = key.split(separator)
    group = parser.get(ID_SEP_KEY.join(parents), None) if parents else parser.get()
    names = [k for k in group if not k.startswith("_")] if isinstance(group, dict) else []
    matches = get_close_matches(last, names, n=1, cutoff=likeness)
    return separator.join([*parents, matches[0]]) if matches else None
