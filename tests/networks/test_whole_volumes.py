"""The loop over whole volumes, with a subclass that keeps what it sees."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.whole_volumes import NotFiniteError, WholeVolumes, finite
from scripts.networks.windows import VolumeInferer, joined


class Plain:
    """Intensities that are taken as they are."""

    normalise = staticmethod(torch.Tensor.float)


class Kept(WholeVolumes):
    def start(self) -> None:
        self.seen: list[Any] = []
        self.finished = 0

    def process(self, volume: dict[str, Any]) -> None:
        (whole,) = joined(self.slabs(volume, self.network))
        self.seen.append((volume["name"], whole))

    def pass_over(self, why: str) -> None:
        self.seen.append(why)

    def finish(self) -> None:
        self.finished += 1


def item(name: str, error: str = "") -> dict[str, Any]:
    if error:
        return {"image": f"{name}.nii.gz", "name": name, "error": error}
    voxels = torch.randint(-1000, 1000, (1, 1, 10, 9, 7), dtype=torch.int16)
    return {"image": f"{name}.nii.gz", "name": name, "voxels": voxels, "intensity": Plain()}


def loop(items: Any, network: nn.Module | None = None, kind: type[WholeVolumes] = Kept, **options: Any) -> Any:
    inferer = VolumeInferer([8, 8, 4], factor=1)
    return kind(device="cpu", val_data_loader=items, network=network or nn.Identity(), inferer=inferer, **options)


def test_each_volume_goes_through_the_network_in_evaluation_mode_and_without_gradients() -> None:
    items = [item("a"), item("b", "b.nii.gz: gone"), item("c")]
    network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Dropout(1.0)).train()
    kept = loop(items, network)
    kept.run()
    (first, a), why, (last, c) = kept.seen
    assert (first, why, last, kept.finished) == ("a", "b.nii.gz: gone", "c", 1) and network.training
    assert torch.allclose(a, network[0](items[0]["voxels"].float()), atol=1e-3) and not a.requires_grad
    assert c.shape == (1, 1, 10, 9, 7)


def test_a_volume_is_forgotten_before_the_next_one_is_read() -> None:
    class Loader:
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Iterator[dict[str, Any]]:
            before: Any = lambda: None  # noqa: E731
            for name in "abc":
                assert before() is None
                volume = item(name)
                before = weakref.ref(volume["voxels"])
                yield volume
                del volume

    kept = loop(Loader())
    kept.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: kept.seen.clear())
    kept.run()
    assert kept.state.batch is None and kept.state.output is None and kept.state.iteration == 3


def test_a_rank_without_volumes_takes_part_in_the_end() -> None:
    kept = loop([])
    kept.run()
    assert kept.seen == [] and kept.finished == 1


def test_handlers_find_the_volume_and_what_was_put_together() -> None:
    found: list[Any] = []

    class Handler:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: found.append(e.state.batch["name"]))
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: found.append(e.finished))

    loop([item("a"), item("b")], val_handlers=[Handler()]).run()
    assert found == ["a", "b", 1]


class Broken(nn.Module):
    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return x * torch.nan


def test_what_is_not_finite_is_refused_unless_a_subclass_takes_it() -> None:
    with pytest.raises(NotFiniteError, match=r"what the network makes of it is not finite \(NaN or infinite\)"):
        loop([item("a")], Broken()).run()

    class Lenient(Kept):
        refuse_not_finite = False

    kept = loop([item("a")], Broken(), Lenient)
    kept.run()
    assert kept.seen[0][1].isnan().all()


def test_one_value_that_is_not_finite_is_found() -> None:
    values = torch.randn(3, 40, 33)[:, 1:-1, 2:]
    assert finite(values) and finite(torch.full((1,), 3e38))
    for bad in (torch.nan, torch.inf, -torch.inf):
        changed = values.clone()
        changed[1, 20, 13] = bad
        assert not finite(changed) and not finite(torch.tensor([bad]))


def test_errors_end_the_run_and_running_out_of_memory_says_which_knob_to_turn() -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        loop([item("a")], Broken(RuntimeError("out of luck"))).run()
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        with pytest.raises(
            UserError, match=r"out of memory with windows of \[8, 8, 4\] voxels .*; lower val_sliding_window"
        ):
            loop([item("a")], Broken(error)).run()


def test_windows_are_computed_in_the_type_that_amp_asks_for() -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x

    for amp in (False, True):
        kept = loop([item("a")], Watching(), amp=amp)
        kept.run()
        assert set(seen) == {amp and kept.dtype != torch.float32}
        seen.clear()
