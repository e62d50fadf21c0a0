"""The one reader of command-line words: a word means what the thing that it sets can be, and is never guessed.

Fire takes each word for Python: `false` for a text, `ct#2` for `ct`, `2e3` for a number. Here the type of what a word
sets decides.
"""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import fire
from fire import decorators
from fire.parser import DefaultParseValue

from scripts.common import errors
from scripts.common.errors import UserError

_PATH_ENDINGS = ("_dir", "_path", "_filepath", "_file", "_list")
_PATHS = ("bundle_root", "output", "file", "datalist", "relative_to")
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

TEXT, TRUTH, COUNT, NUMBER, ANY = "a text", "true or false", "a whole number", "a number", "a value"


def read_word(name: str, word: str, kind: str, path: bool = False) -> Any:
    """What a word of the command line means.

    Args:
        name: of what it sets, with its dashes.
        word: as the shell gave it.
        kind: `TEXT`: the word itself, or a list where it is written as one of quoted texts; `TRUTH`: true, yes, 1,
            false, no or 0, in any case; `COUNT`: a whole number; `NUMBER`; or `ANY`: a Python literal, else a text, as
            Fire reads it.
        path: whether `~` at its beginning is the home folder.

    Raises:
        UserError: naming it, where the word is none of its kind.
    """
    if kind == TEXT:
        texts = _list_of_texts(word)
        if not path:
            return texts or word
        return list(map(os.path.expanduser, texts)) if texts else os.path.expanduser(word)  # noqa: PTH111 (keeps "./")
    if kind == TRUTH:
        if word.lower() not in _TRUTH:
            raise UserError(f"{name} is {word!r}, which is neither true nor false; use one of {', '.join(_TRUTH)}")
        return _TRUTH[word.lower()]
    if kind == ANY and word.lower() in ("true", "false"):
        return word.lower() == "true"
    if kind == ANY and word.lower() in ("null", "none"):
        return None
    return _number(name, word, kind) if kind in (COUNT, NUMBER) else DefaultParseValue(word)


def _number(name: str, word: str, kind: str) -> int | float:
    for number in (int, float) if kind == NUMBER else (int,):
        with suppress(ValueError):
            return number(word)
    raise UserError(f"{name} is {word!r}, which is not {kind}; use one")


def _list_of_texts(word: str) -> list[str] | None:
    if not word.startswith(("[", "(")):
        return None
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return None
    return list(value) if value and all(isinstance(item, str) for item in value) else None


def is_path(key: str) -> bool:
    """Whether what a key names is a path, by the way that such keys end."""
    last = key.replace("::", "#").rpartition("#")[2]
    return last in _PATHS or last.endswith(_PATH_ENDINGS)


def door(commands: Mapping[str, Callable[..., Any]]) -> None:
    """Run one of `commands` by the command line; words are read by the annotations of its parameters."""
    errors.install()
    for function in commands.values():
        named = {
            name: _reader(name, str(parameter.annotation))
            for name, parameter in inspect.signature(function).parameters.items()
        }
        decorators.SetParseFns(**named)(function)
    fire.Fire(dict(commands))


def _reader(name: str, annotation: str) -> Callable[[str], Any]:
    kinds = {"str": TEXT, "bool": TRUTH, "int": COUNT, "float": NUMBER}
    kind = kinds.get(annotation.split(" | ")[0], ANY)
    return lambda word: read_word(f"--{name}", word, kind, is_path(name))
