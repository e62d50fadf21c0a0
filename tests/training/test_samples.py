"""Pictures of what a diffusion model generates while it is trained."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from scripts.common.errors import UserError
from scripts.data.labels import LabelStore
from scripts.data.latent_list import load_latents
from scripts.data.latents import LatentDataset, LatentStore
from scripts.measure.pictures import label_planes
from scripts.networks.flow import Flow
from scripts.networks.generation import Generator
from scripts.networks.windows import VolumeInferer
from scripts.training.samples import SampleMaps, SampleVolumes, held_out
from scripts.training.tensorboard_log import TensorBoardLog
from tests.helpers import make_labelled, make_latents, scalars, small_controlnet, small_unet

MAPPING = {"ct": 1, "ct_contrast": 3, "mri_t1": 9}


class Enlarger(nn.Module):
    """Stands for an autoencoder."""

    latent_channels = 4

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(latent[:, :1], scale_factor=4, mode="nearest")


def engine(epoch: int, epochs: int = 5, stopped: bool = False, interrupted: bool = False) -> Any:
    """What a training is to the handler."""
    state = SimpleNamespace(epoch=epoch, max_epochs=epochs)
    progress, stop = SimpleNamespace(interrupted=interrupted), SimpleNamespace(received=int(stopped))
    return SimpleNamespace(state=state, progress=progress, stop=stop)


def generator(**networks: nn.Module) -> Generator:
    return Generator(
        **{"unet": small_unet(), **networks}, autoencoder=Enlarger(), inferer=VolumeInferer(), scale_factor=1.0,
        noise_flow=Flow(), steps=2, amp=False,
    )  # fmt: skip


def make(folder: Path, unet: nn.Module | None = None, sizes: Any = None, **options: Any) -> SampleVolumes:
    datalist = make_latents(folder / "latents", sizes)
    data = load_latents(str(datalist), "training", modality_mapping=MAPPING)
    dataset, log = LatentDataset(data, LatentStore(str(folder / "store"))), TensorBoardLog(str(folder / "events"))
    return SampleVolumes(2, generator(unet=unet or small_unet()), dataset, log, str(folder / "outputs"), **options)


def of_maps(folder: Path, split: str = "validation") -> LatentDataset:
    """Two label maps that are held back, or three that are trained on."""
    datalist = make_labelled(folder / "latents", [(8, 4, 4)] * 3 + [(8, 4, 6)] * 2)
    data = load_latents(str(datalist), split, modality_mapping=MAPPING, labels=True, fold=0)
    return LatentDataset(data, LatentStore(str(folder / "store")), LabelStore(str(folder / "store")))


def pictures(folder: Path) -> dict[tuple[str, int], bytes]:
    log = scalars(folder / "events")
    return {(tag, event.step): event.encoded_image_string for tag in log.Tags()["images"] for event in log.Images(tag)}


def test_the_same_seeds_give_the_same_pictures_and_other_weights_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sampler = make(tmp_path / name, small_unet(seed))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        sampler(engine(2))
        assert torch.equal(torch.get_rng_state(), before)
        sampler(engine(4))
        sampler.log.close()
    a, b, c = (pictures(tmp_path / name) for name in "abc")
    assert sorted(a) == [(f"sample_seed_{seed}", epoch) for seed in (0, 1) for epoch in (2, 4)]
    assert a == b and all(a[key] != c[key] for key in a)
    assert a["sample_seed_0", 2] == a["sample_seed_0", 4] != a["sample_seed_1", 2]
    sheet = np.asarray(Image.open(tmp_path / "a" / "outputs" / "samples.png"))
    assert sheet.shape[0] > 50 and len(np.unique(sheet)) > 50


def test_volumes_are_of_the_commonest_size_and_its_conditions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, asked = make(tmp_path, sizes={"training": [(8, 4, 6), (8, 4, 4), (8, 4, 4)]}, count=3), []
    latent = sampler.generator.latent

    def spy(seed: int, size: Any, conditions: Any, *rest: Any) -> torch.Tensor:
        asked.append((seed, list(size), {name: value.tolist() for name, value in conditions.items()}))
        return latent(seed, size, conditions, *rest)

    monkeypatch.setattr(sampler.generator, "latent", spy)
    sampler(engine(2))
    given = {"spacing": [[150.0, 150.0, 300.0]], "modality": [3]}  # of the second latent
    assert asked == [(seed, [32, 16, 16], given) for seed in range(3)]


def test_the_network_is_judged_in_evaluation_mode_and_left_as_it_was(tmp_path: Path) -> None:
    unet, seen = small_unet().train(), []
    unet.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    make(tmp_path, unet, count=1)(engine(2))
    assert seen == [(False, False)] * 2 and unet.training and all(p.grad is None for p in unet.parameters())


def test_a_stop_comes_first(tmp_path: Path) -> None:
    sampler = make(tmp_path)
    sampler(engine(2, stopped=True))
    sampler(engine(2, interrupted=True))
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "events").exists()


def test_it_is_due_at_intervals_and_at_the_end() -> None:
    filters: list[Any] = []
    target = SimpleNamespace(add_event_handler=lambda event, handler: filters.append(event.filter))
    SampleVolumes(2, *[None] * 3, "").attach(target)  # type: ignore[list-item]
    (due,) = filters
    assert [epoch for epoch in range(1, 6) if due(engine(epoch), epoch)] == [2, 4, 5]


def test_a_count_that_is_none_is_refused_at_the_start(tmp_path: Path) -> None:
    for count in (0, 1.5, True):
        with pytest.raises(UserError, match=f"^sample_count is {count}; use a whole number from 1"):
            make(tmp_path, count=count)


# Of label maps


def test_a_map_is_shown_above_the_volume_that_was_made_for_it(tmp_path: Path) -> None:
    dataset, pairs = of_maps(tmp_path), []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        log = TensorBoardLog(str(folder / "events"))
        network = small_controlnet(seed).train()
        sampler = SampleMaps(
            interval=2, generator=generator(controlnet=network), dataset=dataset, log=log,
            output_dir=str(folder / "outputs"), count=5,
        )  # fmt: skip
        sampler(engine(2))
        log.close()
        assert network.training
        pairs.append(pictures(folder))
        assert (folder / "outputs" / "samples.png").stat().st_size > 5000
    assert list(pairs[0]) == [("sample_v3_label", 2), ("sample_v4_label", 2)] == list(pairs[1])
    for number, ((_, one), (_, other)) in enumerate(zip(pairs[0].items(), pairs[1].items(), strict=True)):
        shown = label_planes(dataset[number]["label"][0].numpy(), dataset.data[number]["spacing"])
        images = [np.asarray(Image.open(BytesIO(png))) for png in (one, other)]
        assert all(image.shape == (2 * shown.shape[0], *shown.shape[1:]) for image in images)
        above, beneath = zip(*(np.split(image, 2) for image in images), strict=True)
        assert all(np.abs(image / 255 - shown).max() < 0.01 for image in above)
        assert (beneath[0] != beneath[1]).any() and (beneath[0][..., 0] == beneath[0][..., 2]).all()


def test_the_network_is_told_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, asked = of_maps(tmp_path), []
    made = generator(controlnet=small_controlnet())
    latent = made.latent

    def spy(seed: int, size: Any, conditions: Any, *rest: Any, labels: torch.Tensor) -> torch.Tensor:
        asked.append((seed, list(size), labels))
        return latent(seed, size, conditions, *rest, labels=labels)

    monkeypatch.setattr(made, "latent", spy)
    log = TensorBoardLog(str(tmp_path / "events"))
    SampleMaps(interval=2, generator=made, dataset=dataset, log=log, output_dir=str(tmp_path), count=1)(engine(2))
    ((seed, size, labels),) = asked
    assert (seed, size) == (0, [32, 16, 24]) and torch.equal(labels, dataset[0]["label"][None])


def test_maps_that_are_held_back_come_first(tmp_path: Path) -> None:
    validation, training = of_maps(tmp_path), of_maps(tmp_path, "training")
    assert held_out(validation, training) is validation
    nothing = LatentDataset([], validation.store, validation.labels)
    assert held_out(nothing, training) is training
