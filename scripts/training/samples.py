"""What a diffusion model generates while it is trained: pictures of the same seeds, from time to time."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Events
from monai.networks.utils import eval_mode
from torch import nn

from scripts.common.errors import UserError
from scripts.common.progress import progress_bar
from scripts.data.latents import LatentDataset
from scripts.measure.pictures import in_grey, label_planes, save_sheet, three_planes
from scripts.networks.generation import Generator
from scripts.training.diffusion import conditions
from scripts.training.tensorboard_log import TensorBoardLog

logger = logging.getLogger(__name__)


class SampleVolumes:
    """Generates volumes, for TensorBoard (`sample_<seed>`: three planes) and as `samples.png`.

    Their size and conditions are those of the first training latent of the commonest size, so what is seen is what is
    trained. A stop that was asked for comes first.

    Args:
        interval: in epochs; also after the last one.
        generator: with the weights that are to be judged.
        dataset: of the training latents.
        log: where the pictures go.
        output_dir: where `samples.png` goes.
        count: of volumes, with the seeds 0, 1, ...

    Raises:
        UserError: for a `count` that is none.
    """

    def __init__(
        self,
        interval: int,
        generator: Generator,
        dataset: LatentDataset,
        log: TensorBoardLog,
        output_dir: str,
        count: int = 2,
    ) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(
                f"sample_count is {count!r}; use a whole number from 1 (sample_interval 0 is for no samples)"
            )
        self.interval, self.generator, self.count = interval, generator, count
        self.dataset, self.log, self.output_dir = dataset, log, Path(output_dir)

    def attach(self, engine: Any) -> None:
        """Generate as `engine` trains."""

        def due(engine: Any, epoch: int) -> bool:
            return epoch % self.interval == 0 or epoch == engine.state.max_epochs

        engine.add_event_handler(Events.EPOCH_COMPLETED(event_filter=due), self)

    def __call__(self, engine: Any) -> None:
        """Generate now."""
        if engine.stop.received or engine.progress.interrupted:
            return
        started, epoch = time.perf_counter(), engine.state.epoch
        planes = {}
        bar = progress_bar(self.count * self.generator.steps, "samples", "step")
        with bar, torch.inference_mode(), eval_mode(*self.networks()):
            for number in range(self.count):
                name, picture = self.sample(number, bar.update)
                planes[name] = picture
        with self.log.writing() as writer:
            for name, picture in planes.items():
                layout = "HW" if picture.ndim == 2 else "HWC"
                writer.add_image(f"sample_{name.replace(' ', '_')}", picture, epoch, dataformats=layout)
            writer.flush()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        save_sheet(planes, self.output_dir / "samples.png", f"epoch {epoch}")
        logger.info("epoch %d: %d volumes sampled (%.0f s)", epoch, self.count, time.perf_counter() - started)

    def networks(self) -> list[nn.Module]:
        """Those that are trained, which sample in evaluation mode."""
        return [self.generator.unet]

    def sample(self, number: int, step_done: Callable[[], object]) -> tuple[str, np.ndarray]:
        """The name and the picture of a volume."""
        sizes = self.dataset.sizes()
        index = sizes.index(Counter(sizes).most_common(1)[0][0])
        return f"seed {number}", three_planes(self.generated(number, index, step_done), self.spacing(index))

    def generated(self, seed: int, index: int, step_done: Callable[[], object]) -> np.ndarray:
        """A volume (X, Y, Z) in [0, 1], in the size and with the conditions of a latent.

        Args:
            seed: of the noise.
            index: of the latent in the dataset.
            step_done: called after each step.
        """
        item = {k: v[None] for k, v in self.dataset[index].items() if isinstance(v, torch.Tensor)}
        given = {**conditions(item), "modality": item["modality"]}
        size = [n * self.generator.inferer.factor for n in self.dataset.sizes()[index]]
        labels = {"labels": item["label"]} if "label" in item else {}
        latent = self.generator.latent(seed, size, given, step_done, **labels)
        return self.generator.volume(latent).clamp(0, 1).numpy()

    def spacing(self, index: int) -> list[float]:
        """Of a latent's volume, in mm."""
        return self.dataset.data[index]["spacing"]


class SampleMaps(SampleVolumes):
    """Generates a volume for each of the first label maps: its planes beneath those of the map; see `SampleVolumes`.

    Args:
        kwargs: of `SampleVolumes`; the dataset has label maps, and one that is held back shows more.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = min(self.count, len(self.dataset))

    def networks(self) -> list[nn.Module]:
        """The ControlNet; the UNet is frozen."""
        return [self.generator.controlnet]

    def sample(self, number: int, step_done: Callable[[], object]) -> tuple[str, np.ndarray]:
        """The name of a map, and the picture of both."""
        labels, spacing = self.dataset[number]["label"][0].numpy(), self.spacing(number)
        volume = three_planes(self.generated(0, number, step_done), spacing)
        name = Path(self.dataset.data[number]["label"]).name.split(".")[0]
        return name, np.concatenate([label_planes(labels, spacing), in_grey(volume)])


def held_out(validation: LatentDataset, training: LatentDataset) -> LatentDataset:
    """The dataset that pictures are of: what is validated on, where there is such."""
    return validation if len(validation) else training
