"""Which tensors of a file are a network's: trainers nest them, and name them after what was around the network."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from scripts.common.errors import UserError

Tensors = Mapping[str, torch.Tensor]

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names, anywhere in them.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
DEPTH = 5  # dictionaries within each other that are looked through


class Place(NamedTuple):
    """Tensors of a file that may be a network's.

    Attributes:
        keys: of the dictionaries around, outermost first.
        prefix: what their names begin with, up to a dot; empty where that is nothing.
        tensors: by their names without it and without wrappers.
    """

    keys: tuple[str, ...]
    prefix: str
    tensors: Tensors

    @property
    def plain(self) -> bool:
        """Whether they are what the file is."""
        return not self.keys and not self.prefix

    def __str__(self) -> str:
        under = [f"under {', '.join(map(repr, self.keys))}"] if self.keys else []
        return " as ".join(under + [f"'{self.prefix}*'"] * bool(self.prefix))


def find(content: Any, own: Tensors, path: str | Path, definition: str = "autoencoder_def") -> Place:
    """The place in a file that fits a network, whatever keys, prefixes and wrappers lead there.

    Args:
        content: of the file: dictionaries of dictionaries of tensors.
        own: the network's state dict.
        path: of the file, for what errors say.
        definition: the config's key of the network, likewise.

    Returns:
        the place, its tensors in the network's data types; the plainest, where several have the same ones.

    Raises:
        UserError: where no place fits, naming what is nearest to that; where several do with different tensors, unless
            one is the file itself; where a value is not finite.
    """
    places = sorted(_places(content, own), key=lambda p: (-len(p.tensors.keys() & own.keys()), len(p.keys), p.prefix))
    if not places:
        raise UserError(f"{path}: {_described(content, definition)}")
    fitting = [place for place in places if not _misfit(place.tensors, own, definition)]
    if not fitting:
        raise UserError(f"{_told(path, places[0])}: {_misfit(places[0].tensors, own, definition)}")
    first, *others = (p._replace(tensors={n: t.to(own[n].dtype) for n, t in p.tensors.items()}) for p in fitting)
    different = [str(p) for p in others if not all(torch.equal(t, p.tensors[n]) for n, t in first.tensors.items())]
    if different and not first.plain:
        raise UserError(
            f"{path}: holds several weights of this network ({'; '.join([str(first), *different])}); save the ones to "
            "use by themselves, as network.state_dict()"
        )
    for name, tensor in first.tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{_told(path, first)}: {name} is not finite (NaN or infinite); use weights saved earlier")
    return first


def _told(path: str | Path, place: Place) -> str:
    return f"{path}" if place.plain else f"{path}: {place}"


def _places(content: Any, names: Collection[str]) -> Iterator[Place]:
    """The places that have any of a network's names."""
    wrappers = WRAPPERS - {part for name in names for part in name.split(".")}

    def bare(parts: list[str]) -> str:
        return ".".join(part for part in parts if part not in wrappers)

    for keys, tensors in _state_dicts(content):
        split = [name.split(".") for name in tensors]
        prefixes = {"".join(f"{p}." for p in s[:i]) for s in split for i in range(len(s)) if bare(s[i:]) in names}
        for prefix in prefixes:
            found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            clean = {bare(name.split(".")): t for name, t in found.items()}
            yield Place(keys, prefix, clean if len(clean) == len(found) else found)


def _state_dicts(content: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensors]]:
    """The tensors of each dictionary in a file, with the keys that lead to it."""
    if not isinstance(content, Mapping):
        return
    if tensors := {n: t for n, t in content.items() if isinstance(n, str) and isinstance(t, torch.Tensor)}:
        yield keys, tensors
    for key, value in content.items() if len(keys) < DEPTH else ():
        yield from _state_dicts(value, (*keys, str(key)))


def _misfit(tensors: Tensors, own: Tensors, definition: str) -> str:
    """The first parameter that is missing, unknown, or of another shape or kind of number; empty where all fit."""
    for name, tensor in own.items():
        theirs = tensors.get(name, tensor)
        if theirs.shape != tensor.shape:
            return (
                f"{name} is {tuple(theirs.shape)}, but the network's is {tuple(tensor.shape)}; use weights of this "
                f"architecture, or the network definition of these weights ({definition})"
            )
        if theirs.is_floating_point() != tensor.is_floating_point():
            return f"{name} is {theirs.dtype}, but the network's is {tensor.dtype}; save weights that are not quantised"
    missing, unknown = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the network lacks"
        return f"{what} (weights of another architecture); correct the path or {definition}"
    return ""


def _described(content: Any, definition: str) -> str:
    """What a file holds that has none of a network's names."""
    keys, tensors = max(_state_dicts(content), key=lambda found: len(found[1]), default=((), {}))
    if not tensors:
        return "holds no plain state dict of tensors; save network.state_dict()"
    where = "" if not keys else f", {Place(keys, '', tensors)}"
    return (
        f"holds {len(tensors)} tensors named like {next(iter(tensors))!r}{where} (weights of another architecture); "
        f"correct the path or {definition}"
    )
