"""Which label map belongs to which volume: that of its name, or of what a substitution makes of its name."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.common.errors import UserError
from scripts.data.nifti import stem


class Pairing:
    """Finds the label maps of volumes.

    Args:
        label_dir: the folder where a label map has the path that its volume has beneath its own; None for that one.
        label_pattern: a substitution, `s/REGULAR EXPRESSION/WHAT TAKES ITS PLACE/`, which makes the path of the label
            map of the volume's, both without their ending; None for the same path. With neither, there are none.

    Attributes:
        labels: the label maps of all volumes that were paired.

    Raises:
        UserError: for a pattern that is no substitution.
    """

    def __init__(self, label_dir: str | None = None, label_pattern: str | None = None) -> None:
        self.label_dir, self.pattern = label_dir, label_pattern
        self.wanted = label_dir is not None or label_pattern is not None
        self.substitution = None if label_pattern is None else _substitution(label_pattern)
        if label_dir is not None and not Path(label_dir).is_dir():
            raise UserError(f"{label_dir}: no such folder; correct --label_dir")
        self.labels: dict[Path, Path] = {}

    def pair(self, files: Sequence[Path], folder: str) -> list[Path]:
        """The files that are volumes, since they are no other one's label map; `labels` has theirs from now on.

        Args:
            files: what was found beneath `folder`.
            folder: of the volumes.

        Raises:
            UserError: naming the first volume without a label map, and how many there are.
        """
        if not self.wanted:
            return list(files)
        tried = {file: self._label(file, Path(folder)) for file in files}
        found = {file: label for file, (label, _) in tried.items() if label is not None}
        maps = set(found.values())
        volumes = [file for file in files if file not in maps]
        if missing := [file for file in volumes if file not in found]:
            raise UserError(
                f"{missing[0]}: has no label map ({tried[missing[0]][1]}), as {len(missing)} of {len(volumes)} "
                "volumes; correct --label_dir or --label_pattern, or leave these volumes out by --pattern"
            )
        self.labels |= {file: found[file] for file in volumes}
        return volumes

    def _label(self, file: Path, folder: Path) -> tuple[Path | None, str]:
        """The label map of a volume, or None and why it has none."""
        path = file.relative_to(folder)
        name = stem(path.as_posix())
        root, ending = Path(self.label_dir or folder), path.as_posix()[len(name) :]
        if self.substitution is not None:
            name, count = self.substitution[0].subn(self.substitution[1], name, count=1)
            if not count:
                return None, f"--label_pattern {self.pattern!r} finds nothing in {name!r}"
        endings = (ending, *(other for other in (".nii.gz", ".nii") if other != ending))
        there = (root / f"{name}{ending}" for ending in endings)
        label = next((label for label in there if label.is_file() and label != file), None)
        return label, f"no {root / name}{ending}"


def check_shared(splits: Mapping[str, Sequence[Path]], labels: Mapping[Path, Path]) -> None:
    """Warn of volumes that share a label map, as the phases of a scan may, and names by mistake.

    Raises:
        UserError: where they are in two splits.
    """
    first: dict[Path, tuple[str, Path]] = {}
    count, example = 0, ""
    for split, files in splits.items():
        for file in (file for file in files if file in labels):
            other_split, other = first.setdefault(labels[file].resolve(), (split, file))
            if other == file:
                continue
            told = f"{labels[file]}: is the label map of {other} and of {file}"
            if other_split != split:
                raise UserError(
                    f"{told}, which are in {other_split} and {split}; correct --label_dir or --label_pattern, or keep "
                    "what belongs together in one split, by --group_by say"
                )
            count, example = count + 1, example or told
    if count:
        others = f" ({count} such volumes)" if count > 1 else ""
        print(f"warning: {example}{others}; correct --label_dir or --label_pattern if they differ", file=sys.stderr)


def _substitution(text: str) -> tuple[re.Pattern[str], str]:
    """The two parts of `s/A/B/`, whose slashes may be any other character, as sed has it."""
    remedy = "write it like s/_ct$/_label/: a regular expression, and what takes the place of what it finds"
    mark = text[1:2]
    parts = re.split(rf"(?<!\\){re.escape(mark)}", text[2:]) if mark else []
    if text[:1] != "s" or mark.isalnum() or len(parts) != 3 or parts[2] or not parts[0]:
        raise UserError(f"--label_pattern {text!r} is no substitution; {remedy}")
    found, place = (part.replace(f"\\{mark}", mark) for part in parts[:2])
    try:
        (expression := re.compile(found)).sub(place, "")  # reads what takes its place, too
    except (re.error, IndexError) as error:
        raise UserError(f"--label_pattern {text!r} is no regular expression ({error}); {remedy}") from error
    return expression, place
