"""Training steps and a validation on fake CUDA tensors: what they would cost on a GPU, and where the host would wait.

`counted.py` starts it, as

    LD_PRELOAD=fake_cuda.so python -m tests.gpu.fake vae diffusion ...

Dispatch, autocast, backward pass and optimizers are PyTorch's own, for CUDA; nothing is computed. Prints JSON: for each
case and each of its steps what `tracker.Counts` says, and the `error` that ended a case.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.data import set_track_meta
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import Dataset

from scripts.data.intensity import CT_WINDOW, Intensity
from scripts.networks import pipeline
from scripts.training import handlers
from scripts.training.checkpointing import Checkpointing
from scripts.training.engine import TrainingEngine
from scripts.training.model_folder import ModelFolder
from tests.gpu import planted
from tests.gpu.device import install
from tests.gpu.tracker import Tracker

LENGTH = 150  # steps of an epoch
Step = tuple[int, Mapping[str, Any]]  # an iteration, and the batch that it gets
Counted = dict[str, Any]


class Unread(Dataset):
    """Stands for the data of a config."""

    data: Any = ()

    def __len__(self) -> int:
        return LENGTH

    def sizes(self) -> list[tuple[int, ...]]:
        return [(8, 8, 8)] * LENGTH


class Late:
    """In the place of a thread, since fake tensors are for one: does what it is given when the result is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return SimpleNamespace(result=functools.cache(lambda: function(*arguments)))

    def __enter__(self) -> Late:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def parser_of(config: str, folder: str, overrides: Mapping[str, Any]) -> ConfigParser:
    """A config that writes into a folder, without data; of its handlers those that act at each step."""
    parser = ConfigParser()
    parser.read_config(f"configs/{config}.json")
    for key, value in ({"model_dir": folder, "tfevent_path": folder, "output_dir": folder} | dict(overrides)).items():
        parser[key] = value
    parser["train#dataset"], parser["validate#dataset"] = Unread(), Unread()
    parser["train#handlers"] = [handler for handler in parser["train#handlers"] if "interval" not in handler]
    return parser


def count_steps(tracker: Tracker, trainer: TrainingEngine, steps: Mapping[str, Step]) -> Iterable[tuple[str, Counted]]:
    """What steps of a training cost, with all that its handlers do at each.

    Args:
        tracker: to be active for that time.
        trainer: not yet begun.
        steps: by the names of their counts, iterations ascending.
    """
    with trainer.closing, trainer.stop, tracker:
        for tensor in _tensors(trainer):
            tracker.hold(tensor)
        for number, (name, (iteration, batch)) in enumerate(steps.items()):
            tracker.take()
            state = trainer.state
            state.iteration, state.epoch, state.batch = iteration, -(-iteration // LENGTH), dict(batch)
            if not number:
                trainer.fire_event(Events.EPOCH_STARTED)
            for event in (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED):
                trainer.fire_event(event)
            state.output = trainer._iteration(trainer, state.batch)
            trainer.fire_event(Events.ITERATION_COMPLETED)
            yield name, tracker.take()


def _tensors(trainer: TrainingEngine) -> Iterable[torch.Tensor]:
    """All that the networks of a trainer hold."""
    modules = [*trainer.networks.values(), *trainer.results().values()]
    for module in modules + [value for value in vars(trainer).values() if isinstance(value, nn.Module)]:
        yield from (*module.parameters(), *module.buffers())


def trained(
    tracker: Tracker, config: str, steps: Callable[[ConfigParser], Mapping[str, Step]], **overrides: Any
) -> Iterable[tuple[str, Counted]]:
    """What steps of a config's training cost.

    Args:
        tracker: as of `count_steps`.
        config: its name.
        steps: of the config, see `count_steps`.
        overrides: of the config; its `#` are `__`.
    """
    with tempfile.TemporaryDirectory() as folder:
        parser = parser_of(config, folder, {key.replace("__", "#"): value for key, value in overrides.items()})
        trainer = parser.get_parsed_content("train#trainer")
        Checkpointing(trainer, ModelFolder(folder, {}), is_main=False).attach(checkpoint_minutes=30)
        yield from count_steps(tracker, trainer, steps(parser))


def vae(tracker: Tracker, **overrides: Any) -> Iterable[tuple[str, Counted]]:
    """Before the discriminator begins, with all terms at two sizes, and the decoder alone with the norms of terms."""
    small, large = ({"image": torch.empty(1, 1, n, n, n), "path": ["a"], "error": [""]} for n in (64, 96))
    steps = {"begin": (1, small), "64^3": (14001, small), "96^3": (14002, large), "finish": (22400, small)}
    return trained(tracker, "train", lambda _: steps, decoder_finish=0.01, perceptual_pretrained=False, **overrides)


def checkpointed(tracker: Tracker) -> Iterable[tuple[str, Counted]]:
    return vae(tracker, activation_checkpointing=True)


def latents(parser: ConfigParser, group: str) -> dict[str, Any]:
    """A batch of volumes of 256 x 256 x 128 voxels, as many as a config takes."""
    count = parser.get_parsed_content(f"{group}#batch_size")
    return {
        "latent": torch.empty(count, 4, 64, 64, 32), "spacing": torch.empty(count, 3),
        "modality": torch.empty(count, dtype=torch.int64), "path": ["a"] * count, "error": [""] * count,
    }  # fmt: skip


def diffusion(tracker: Tracker) -> Iterable[tuple[str, Counted]]:
    def steps(parser: ConfigParser) -> Mapping[str, Step]:
        batch = latents(parser, "diffusion_unet_train")
        return {"begin": (1, batch), "64 x 64 x 32": (2, batch)}

    scale = {"_target_": "types.SimpleNamespace", "value": 1.0}
    return trained(tracker, "train_diffusion", steps, scale=scale, train__trainer__facts={})


def controlnet(tracker: Tracker, contrast: bool = False) -> Iterable[tuple[str, Counted]]:
    def steps(parser: ConfigParser) -> Mapping[str, Step]:
        batch = latents(parser, "controlnet_train")
        maps = torch.empty(len(batch["latent"]), 1, 256, 256, 128, dtype=torch.uint8)
        batch |= {"label": maps, "label_without": maps, "removed": ["1"] * len(maps)}
        return {"begin": (1, batch)} | ({} if contrast else {"64 x 64 x 32": (2, batch)})

    weights = {"_target_": "types.SimpleNamespace", "network": "@diffusion_unet_def", "scale_factor": 1.0}
    regions = {"use_region_contrasive_loss": True, "weighted_loss_label": [1, 2], "weighted_loss": 10}
    knobs = {f"controlnet_train__{key}": value for key, value in regions.items()} if contrast else {}
    return trained(tracker, "train_controlnet", steps, weights=weights, train__trainer__facts={}, **knobs)


def contrast(tracker: Tracker) -> Iterable[tuple[str, Counted]]:
    return controlnet(tracker, contrast=True)


def validation(tracker: Tracker) -> Iterable[tuple[str, Counted]]:
    """Of one volume in two windows."""
    volume = {
        "image": "a.nii.gz", "name": "a", "voxels": torch.empty(1, 1, 96, 96, 128, dtype=torch.int16),
        "intensity": Intensity(CT_WINDOW, clip=True), "spacing": [1.0, 1.0, 1.0],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        parser = parser_of("train", folder, {"perceptual_pretrained": False})
        validator = parser.get_parsed_content("validate#evaluator")
        validator.start()
        validator.state.iteration = validator.state.epoch_length = 1
        with tracker:
            tracker.take()
            validator.take(volume)
            yield "volume", tracker.take()


def faults(tracker: Tracker) -> Iterable[tuple[str, Counted]]:
    """Of the small training: each planted fault, and none, in the types that a device may compute in."""
    for group in ("WAITS", "FREE", "MIXED", "WIDE"):
        for name, fault in getattr(planted, group).items():
            yield from small(tracker, f"{group} {name}", in_step=fault)
    yield from small(tracker, "in a handler", in_handler=planted.WAITS["item"])
    yield from small(tracker, "float32", amp=False)
    torch.cuda.is_bf16_supported = lambda *_, **__: False  # type: ignore[assignment]
    yield from small(tracker, "float16", max_grad_norm=1.0)
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]


def small(tracker: Tracker, case: str, **options: Any) -> Iterable[tuple[str, Counted]]:
    batch = {"image": torch.empty(1, 1, 8, 8, 8)}
    try:
        trainer = planted.small_training(**options)
        ((_, found),) = count_steps(tracker, trainer, {"1": (1, batch)})
    except RuntimeError as error:  # of a fault; what was counted until then tells of it
        found = tracker.take() | {"error": str(error)}
    yield case, found


def known(tracker: Tracker) -> Iterable[tuple[str, Counted]]:
    with tracker:
        tracker.take()
        planted.known()
        yield "known", tracker.take()


CASES = (vae, checkpointed, diffusion, controlnet, contrast, validation, faults, known)


def main(names: Iterable[str]) -> dict[str, dict[str, Counted]]:
    """The counts of cases, by the names of their steps."""
    logging.disable(logging.WARNING)
    torch.autograd.set_multithreading_enabled(False)  # backward passes in this thread: they have lines, too
    pipeline.ThreadPoolExecutor = Late  # type: ignore[misc, assignment]
    set_track_meta(False)  # fake tensors are of a subclass already
    handlers.REPORT_SECONDS = 0.0  # else losses are shown now and then
    tracker = Tracker()
    install(tracker)
    cases, found = {case.__name__: case for case in CASES}, {}
    for name in names:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found[name] = dict(cases[name](tracker))
        gc.collect()  # the memory of its networks
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
