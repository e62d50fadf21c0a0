"""The one loop that takes whole volumes through a network: for validation, and for all uses of a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from ignite.engine import Events
from monai.engines import Evaluator
from torch import nn

from scripts.common.memory import memory_advice
from scripts.common.precision import amp_dtype, autocast
from scripts.common.progress import progress_bar
from scripts.networks.windows import VolumeInferer


class NotFiniteError(ValueError):
    """A network's output that is not a number."""


def finite(values: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity among them; ten times as fast as `isfinite().all()`, on a CPU."""
    return all(bool(extreme.isfinite()) for extreme in values.aminmax())


class WholeVolumes(Evaluator):
    """Takes volumes through a network, one at a time, each rank its share; a subclass says what is done with them.

    The items of the loader are dictionaries: `image`, the path of the volume; `name`; `voxels`, (1, 1, X, Y, Z), int16
    or float32, unscaled, on the CPU; `intensity`, whose `normalise` makes what the network takes of them. Where a
    volume cannot be read, `error` says why, instead of `voxels` and what belongs to them.

    A subclass writes `process(volume)`, and `pass_over(why)` for volumes without voxels; an error in `process` ends
    the run, unless the subclass catches it in `take`. `start` and `finish` frame a run, also on ranks that have no
    volume; handlers of `EPOCH_COMPLETED` come after `finish`. Each volume is forgotten before the next one.

    Args:
        device: where windows are computed.
        val_data_loader: gives the items, those of this rank; it has a length.
        network: what windows go through, on `device`.
        inferer: cuts volumes into windows.
        amp: compute in `amp_dtype`. Its bfloat16 moved a reconstruction by 4 HU on average, so the default is float32.
        engine_kwargs: for `monai.engines.Evaluator`: `val_handlers`, ...
    """

    state: Any
    remedy = "lower val_sliding_window_patch_size (memory goes with its voxels)"  # what to do when memory runs out
    refuse_not_finite = True  # whether `slabs` raises NotFiniteError

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: Iterable[dict[str, Any]],
        network: nn.Module,
        inferer: VolumeInferer,
        amp: bool = False,
        **engine_kwargs: Any,
    ) -> None:
        handlers = engine_kwargs.pop("val_handlers", None)
        super().__init__(device=device, val_data_loader=val_data_loader, amp=amp, decollate=False, **engine_kwargs)
        self.network, self.inferer = network, inferer
        self.dtype = amp_dtype(self.state.device, amp)
        self.add_event_handler(Events.EPOCH_COMPLETED, lambda _: self.finish())
        self._register_handlers(handlers or [])  # they find what `finish` has put together
        self.add_event_handler(Events.ITERATION_COMPLETED, self._forget)

    def start(self) -> None:
        """Forget what an earlier run found out."""

    def process(self, volume: dict[str, Any]) -> None:
        """Do with one volume what this is for."""
        raise NotImplementedError

    def pass_over(self, why: str) -> None:
        """Take note that a volume cannot be used; `why` names it."""
        raise NotImplementedError

    def finish(self) -> None:
        """Put together what the ranks found out; called once on each of them."""

    def slabs(
        self, volume: dict[str, Any], function: Callable[[torch.Tensor], Any]
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """What `VolumeInferer.slabs` yields for the normalised windows of a volume, with a progress bar.

        Raises:
            NotFiniteError: where what the network makes of it is not, and `refuse_not_finite`.
        """

        def compute(window: torch.Tensor) -> Any:
            with autocast(window.device, self.dtype):
                return function(window)

        voxels = volume["voxels"]
        place = f"{self.state.iteration}/{self.state.epoch_length} {volume['name']}"
        bar = progress_bar(self.inferer.count(voxels.shape[2:]), place, "window")
        with bar:
            for x, parts in self.inferer.slabs(voxels, compute, volume["intensity"].normalise, bar.update):
                if self.refuse_not_finite and not all(map(finite, parts)):
                    raise NotFiniteError("what the network makes of it is not finite (NaN or infinite)")
                yield x, parts
                del parts  # not to be held while the next ones are computed

    @property
    def index(self) -> int:
        """Of the present volume among all, whatever share of them a `VolumeLoader` gives to this rank."""
        return self.data_loader.indices[self.state.iteration - 1]  # type: ignore[union-attr]

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Take all volumes of this rank through the network."""
        self.start()
        if len(self.data_loader) > 0:  # type: ignore[arg-type]
            super().run(global_epoch)
        else:  # more ranks than volumes: only take part in what all ranks do
            self.finish()

    def take(self, volume: dict[str, Any]) -> None:
        """Process one volume, with the network in evaluation mode and without gradients.

        Raises:
            UserError: with advice, where memory runs out.
        """
        what = partial(self.described, volume)
        with memory_advice(self.state.device, what, self.remedy), torch.inference_mode(), self.mode(self.network):
            self.process(volume)

    def described(self, volume: dict[str, Any]) -> str:
        """What is computed of a volume, for the advice where memory runs out."""
        return f"windows of {self.inferer.window(volume['voxels'].shape[2:])} voxels"

    def _iteration(self, engine: Any, volume: dict[str, Any]) -> None:  # type: ignore[override]
        if "error" in volume:
            self.pass_over(volume["error"])
        else:
            self.take(volume)

    def _forget(self, engine: Any) -> None:
        engine.state.batch = engine.state.output = None  # a whole volume, not to be held while the next one is read
