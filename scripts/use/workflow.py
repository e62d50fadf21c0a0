"""What all uses of a trained network have in common: each volume by itself, and a word on those that fail."""

from __future__ import annotations

import errno
import logging
import time
from dataclasses import dataclass
from typing import Any

import ignite.distributed as idist

from scripts.common import ranks
from scripts.common.errors import UserError
from scripts.data.datasets import VolumeLoader
from scripts.networks.whole_volumes import NotFiniteError, WholeVolumes

logger = logging.getLogger(__name__)


@dataclass
class Share:
    """What one rank did.

    Attributes:
        done: how many volumes it processed.
        failed: why others could not be, by their places among all volumes.
        findings: what it found out about those it processed.
    """

    done: int
    failed: dict[int, str]
    findings: Any


class VolumeWorkflow(WholeVolumes):
    """Takes volumes through a trained network; those that fail are named and passed over, and an error at the end.

    Attributes:
        done: how many volumes this rank has processed.
        failed: why others could not be, once the run is over: those of all ranks, in the order of all volumes.
    """

    data_loader: VolumeLoader
    verb = "processed"  # what happens to a volume

    def findings(self) -> Any:
        """What this rank found out, for `conclude`; anything that pickles."""

    def conclude(self, findings: list[Any]) -> None:
        """What rank 0 does at the end of a run, with the findings of all ranks."""

    def run(self, global_epoch: int = 1) -> None:  # type: ignore[override]
        """Process all volumes.

        Raises:
            UserError: at the end, where volumes could not be processed, naming the first.
        """
        self.failed: list[str] = []
        self.done, self._failed = 0, dict[int, str]()
        super().run(global_epoch)
        assert self.done + len(self._failed) == len(self.data_loader)
        shares = ranks.gather(Share(self.done, self._failed, self.findings()))
        self.failed = [why for _, why in sorted(pair for share in shares for pair in share.failed.items())]
        done, skipped = sum(share.done for share in shares), self.data_loader.done
        if idist.get_rank() == 0:
            there = f", {skipped} were there already" if skipped else ""
            logger.info("%d volumes %s%s, %d failed", done, self.verb, there, len(self.failed))
            self.conclude([share.findings for share in shares])
        idist.barrier()
        if self.failed:
            total = len(self.failed) + done + skipped
            raise UserError(f"{len(self.failed)} of {total} volumes could not be {self.verb}: {self.failed[0]}")

    def take(self, volume: dict[str, Any]) -> None:
        """Process one volume, unless that fails for a reason that need not concern the others."""
        started = time.perf_counter()
        try:
            super().take(volume)
        except (NotFiniteError, UserError) as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno != errno.ENAMETOOLONG:
                raise  # its result cannot be written: those of others cannot either, unless that is its name's fault
            self.pass_over(f"{volume['image']}: {error}")
        except RuntimeError as error:
            logger.exception("%s could not be %s", volume["image"], self.verb)
            self.pass_over(f"{volume['image']}: {error}")
        else:
            self.done += 1
            logger.info("%s %s in %.1f s", volume["image"], self.verb, time.perf_counter() - started)

    def pass_over(self, why: str) -> None:
        """Name a volume that failed, and go on."""
        logger.error("passed over: %s", why)
        self._failed[self.index] = why
