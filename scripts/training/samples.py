"""What a diffusion model generates while it is trained: pictures of the same seeds, from time to time."""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Events
from monai.networks.utils import eval_mode

from scripts.common.errors import UserError
from scripts.common.progress import progress_bar
from scripts.data.latents import LatentDataset
from scripts.measure.pictures import save_sheet, three_planes
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
        sizes = self.dataset.sizes()
        index = sizes.index(Counter(sizes).most_common(1)[0][0])
        item = {name: value[None] for name, value in self.dataset[index].items() if isinstance(value, torch.Tensor)}
        spacing = self.dataset.data[index]["spacing"]
        given = {**conditions(item), "modality": item["modality"]}
        size = [n * self.generator.inferer.factor for n in sizes[index]]
        planes = {}
        bar = progress_bar(self.count * self.generator.steps, "samples", "step")
        with bar, torch.inference_mode(), eval_mode(self.generator.unet):
            for seed in range(self.count):
                latent = self.generator.latent(seed, size, given, bar.update)
                volume = self.generator.volume(latent).clamp(0, 1).numpy()
                planes[f"seed {seed}"] = three_planes(volume, spacing)
        with self.log.writing() as writer:
            for name, picture in planes.items():
                writer.add_image(f"sample_{name.replace(' ', '_')}", picture[None], epoch)
            writer.flush()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        save_sheet(planes, self.output_dir / "samples.png", f"epoch {epoch}")
        logger.info("epoch %d: %d volumes sampled (%.0f s)", epoch, self.count, time.perf_counter() - started)
