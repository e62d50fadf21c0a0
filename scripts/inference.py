"""Whole volumes through a trained network, one at a time; their reconstructions in the geometry they came in."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines import Evaluator
from torch import nn

from scripts.errors import UserError
from scripts.handlers import progress_bar
from scripts.inputs import VolumeLoader
from scripts.memory import explained
from scripts.nifti import write_like
from scripts.outputs import Output
from scripts.trainer import amp_dtype
from scripts.windows import VolumeInferer

logger = logging.getLogger(__name__)

KNOBS = "lower val_sliding_window_patch_size (memory goes with its voxels)"


class NotFiniteError(ValueError):
    """A network's output that is not a number."""


class VolumeEvaluator(Evaluator):
    """Takes `Volumes` through a network, each rank its share; what is done with each is for subclasses to say.

    A volume that cannot be processed is named and passed over; at the end of the run they are an error.

    Args:
        device: where windows are computed.
        val_data_loader: gives the items of `Volumes`, those of this rank.
        network: what windows go through, on `device`.
        inferer: cuts volumes into windows.
        amp: compute in `amp_dtype`. Its bfloat16 moved a reconstruction by 4 HU on average, so the default is float32.
        engine_kwargs: for `monai.engines.Evaluator`: `val_handlers`, ...
    """

    state: Any
    participle = "processed"

    def __init__(
        self,
        *,
        device: torch.device | str,
        val_data_loader: VolumeLoader,
        network: nn.Module,
        inferer: VolumeInferer,
        amp: bool = False,
        **engine_kwargs: Any,
    ) -> None:
        super().__init__(device=device, val_data_loader=val_data_loader, amp=amp, decollate=False, **engine_kwargs)
        self.network, self.inferer = network, inferer
        self.dtype = amp_dtype(self.state.device, amp)
        self.add_event_handler(Events.ITERATION_COMPLETED, self._forget)

    def start(self) -> None:
        """Forget the results of an earlier run."""

    def process(self, volume: dict[str, Any]) -> None:
        """Do with one volume what this workflow is for."""
        raise NotImplementedError

    def gather(self) -> Any:
        """What the ranks found out, put together; called on all of them."""

    def conclude(self, gathered: Any) -> None:
        """What rank 0 does with it at the end."""

    def slabs(
        self, volume: dict[str, Any], function: Callable[[torch.Tensor], Any]
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """What `VolumeInferer.slabs` yields for the normalised windows of a volume, with a progress bar."""

        def compute(window: torch.Tensor) -> Any:
            with torch.autocast(window.device.type, self.dtype, enabled=self.dtype != torch.float32):
                return function(window)

        voxels = volume["voxels"]
        place = f"{self.state.iteration}/{self.state.epoch_length} {volume['name']}"
        bar = progress_bar(self.inferer.count(voxels.shape[2:]), place, "window")
        with bar:
            for x, parts in self.inferer.slabs(voxels, compute, volume["intensity"].normalise, bar.update):
                if not all(part.isfinite().all() for part in parts):
                    raise NotFiniteError("what the network makes of it is not finite (NaN or infinite)")
                yield x, parts

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Process all volumes.

        Raises:
            UserError: at the end, where volumes could not be processed, naming the first.
        """
        self.failed: list[str] = []
        self.did = 0
        self.start()
        if len(self.data_loader) > 0:  # type: ignore[arg-type]  # else there are more ranks than volumes
            super().run(global_epoch)
        assert self.did + len(self.failed) == len(self.data_loader)  # type: ignore[arg-type]
        shares: Any = idist.all_gather((self.failed, self.did))
        self.failed = [error for share in shares for error in share[0]]
        self.did = sum(share[1] for share in shares)
        skipped: int = self.data_loader.done  # type: ignore[union-attr]
        gathered = self.gather()
        if idist.get_rank() == 0:
            there = f", {skipped} were there already" if skipped else ""
            logger.info("%d volumes %s%s, %d failed", self.did, self.participle, there, len(self.failed))
            self.conclude(gathered)
        idist.barrier()
        if self.failed:
            total = len(self.failed) + self.did + skipped
            raise UserError(f"{len(self.failed)} of {total} volumes could not be {self.participle}: {self.failed[0]}")

    def _iteration(self, engine: Any, volume: dict[str, Any]) -> None:  # type: ignore[override]
        if "error" in volume:
            self._fail(volume["error"])
            return
        started = time.perf_counter()
        try:
            with torch.inference_mode(), self.mode(self.network):
                self.process(volume)
        except NotFiniteError as error:
            self._fail(f"{volume['image']}: {error}")
        except (RuntimeError, MemoryError) as error:
            what = f"windows of {self.inferer.window(volume['voxels'].shape[2:])} voxels"
            told = explained(error, self.state.device, what, KNOBS)
            if told is error:
                logger.exception("%s could not be %s", volume["image"], self.participle)
            self._fail(f"{volume['image']}: {told}")
        else:
            self.did += 1
            logger.info("%s %s in %.1f s", volume["image"], self.participle, time.perf_counter() - started)

    def _fail(self, error: str) -> None:
        logger.error("passed over: %s", error)
        self.failed.append(error)

    def _forget(self, engine: Any) -> None:
        engine.state.batch = engine.state.output = None  # a whole volume, not to be held while the next one is read


class Reconstruction(VolumeEvaluator):
    """Writes the reconstruction of each volume in the shape, affine, orientation and header of its file.

    CT is HU as int16, within -1000..1000; MRI int16 where its values are whole numbers, else float32.

    Args:
        output: where to.
        kwargs: of `VolumeEvaluator`. The network gives one tensor; where it gives several, the first is taken.
    """

    participle = "reconstructed"

    def __init__(self, *, output: Output, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.output = output

    def process(self, volume: dict[str, Any]) -> None:
        voxels, intensity = volume["voxels"], volume["intensity"]
        dtype = torch.int16 if volume["class"] == "ct" else voxels.dtype
        restored = torch.empty(voxels.shape[2:], dtype=dtype)
        for x, (slab, *_) in self.slabs(volume, self.network):
            restored[x : x + slab.shape[2]] = intensity.restore(slab[0, 0], dtype)
        write_like(volume["image"], restored.numpy(), self.output.path(volume["name"]))
