"""What MONAI's bundle leaves open: where the parser is, and how a config value is a text and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from monai.bundle import ConfigParser, ConfigWorkflow
from monai.bundle.utils import merge_kv


def live_parser() -> ConfigParser | None:
    """The parser of the workflow whose expression calls this; None where none does.

    MONAI hands an expression what is resolved so far, but not the parser. The workflow is found among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(caller := frame.f_locals.get("self"), ConfigWorkflow):
            return caller.parser
        frame = frame.f_back  # type: ignore[assignment]
    return None


def merged(files: list[str]) -> tuple[ConfigParser, dict[str, dict]]:
    """What config files say together, and each by itself; files that are not there are MONAI's to report."""
    configs = {file: ConfigParser.load_config_file(file) for file in files if Path(file).is_file()}
    parser = ConfigParser({})
    for config in configs.values():
        for key, value in config.items():
            merge_kv(parser, key, value)
    return parser, configs


def literal(text: str) -> str:
    """A config value that is `text`: where MONAI would take "#" for "::", "@" for a key, "$" for code, "%" for a file.

    Texts without these come back as they are.
    """
    if "#" not in text and not text.startswith(("@", "$", "%")):
        return text
    return "$" + repr(text).replace("#", r"\x23").replace("@", r"\x40")


def refers(text: str, parser: ConfigParser) -> bool:
    """Whether a text is meant as MONAI's: `@key`, or an expression with it, for a key that there is."""
    keys = parser.ref_resolver.match_refs_pattern(text)
    return any(key and key in parser for key in keys)
