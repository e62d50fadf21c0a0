"""Generated volumes are functions of their seed; what becomes of noise is exact where the velocity is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.controlnet import Control, coded
from scripts.networks.flow import Flow, integrate
from scripts.networks.generation import Generator
from scripts.networks.unet import predict
from scripts.networks.windows import VolumeInferer
from tests.helpers import small_controlnet, small_unet

SIZE = (32, 16, 24)
CT = {"spacing": torch.tensor([[150.0, 150.0, 200.0]]), "modality": torch.tensor([1])}


class Enlarger(nn.Module):
    """Stands for an autoencoder: decodes the first channel, each voxel to 4 x 4 x 4."""

    latent_channels = 4

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(latent[:, :1], scale_factor=4, mode="nearest")


class Straight(nn.Module):
    """Stands for a UNet that knows one latent: the velocity to it from wherever it is asked."""

    include_spacing_input = include_top_region_index_input = include_bottom_region_index_input = False
    num_class_embeds = None

    def __init__(self, latent: torch.Tensor) -> None:
        super().__init__()
        self.latent, self.asked = latent, []

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, **_: Any) -> torch.Tensor:
        self.asked.append(float(timesteps))
        return (self.latent - x) / (timesteps / 1000)


def make(unet: nn.Module, window: list[int] | None = None, **options: Any) -> Generator:
    given = {"scale_factor": 1.0, "noise_flow": Flow(), "steps": 4, "amp": False} | options
    return Generator(unet=unet, autoencoder=Enlarger(), inferer=VolumeInferer(window), **given)


def latent_of(generator: Generator, seed: int = 0, conditions: Any = CT) -> torch.Tensor:
    with torch.inference_mode():
        return generator.latent(seed, SIZE, conditions)


@pytest.mark.parametrize("integrator", ["euler", "midpoint"])
def test_the_way_ends_at_the_latent_that_the_network_knows(integrator: str) -> None:
    wanted = torch.randn(1, 4, 8, 4, 6, generator=torch.Generator().manual_seed(5))
    unet, done = Straight(wanted), []
    generator = make(unet, scale_factor=2.0, integrator=integrator)
    found = generator.latent(0, SIZE, CT, lambda: done.append(1))
    torch.testing.assert_close(found, wanted / 2, atol=1e-5, rtol=1e-5)  # as the autoencoder encodes
    assert len(unet.asked) == {"euler": 4, "midpoint": 8}[integrator]
    assert unet.asked[0] == 1000 and unet.asked == sorted(unet.asked, reverse=True) and len(done) == 4


def test_a_latent_is_a_function_of_its_seed_and_conditions() -> None:
    generator = make(small_unet())
    first = latent_of(generator)
    torch.manual_seed(7)  # the state of PyTorch's own generator plays no part, and is left alone
    before = torch.get_rng_state()
    assert torch.equal(latent_of(generator), first) and torch.equal(torch.get_rng_state(), before)
    assert first.shape == (1, 4, 8, 4, 6) and first.dtype == torch.float32 and first.isfinite().all()
    others = [latent_of(generator, 1), latent_of(generator, 0, CT | {"modality": torch.tensor([8])}),
              latent_of(generator, 0, CT | {"spacing": torch.tensor([[80.0, 80.0, 500.0]])})]  # fmt: skip
    assert not any(torch.equal(other, first) for other in others)


def test_guidance_goes_beyond_what_the_modality_changes() -> None:
    conditional, unknown, guided = (
        latent_of(make(small_unet(), steps=1, guidance=guidance), 0, CT | {"modality": torch.tensor([modality])})
        for modality, guidance in ((1, 0.0), (0, 0.0), (1, 3.0))
    )
    torch.testing.assert_close(guided, unknown + 3 * (conditional - unknown), atol=1e-5, rtol=1e-5)


def telling() -> nn.Module:
    """A ControlNet to which labels matter."""
    network = small_controlnet()
    for parameter in network.controlnet_cond_embedding.parameters():
        parameter.data *= 4
    return network


MAPS = torch.randint(0, 256, (2, 1, *SIZE), generator=torch.Generator().manual_seed(3), dtype=torch.uint8).split(1)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_a_map_is_told_at_every_step_and_embedded_once(guidance: float) -> None:
    unet, network = small_unet(), telling()
    generator = make(unet, guidance=guidance, scale_factor=2.0, controlnet=network)
    embeddings: list[int] = []
    network.controlnet_cond_embedding.register_forward_hook(lambda *_: embeddings.append(1))
    with torch.inference_mode():
        found = generator.latent(7, SIZE, CT, labels=MAPS[0], unguided=MAPS[1] if guidance else None)
        assert len(embeddings) == (2 if guidance else 1)
        noise = torch.randn((1, 4, 8, 4, 6), generator=torch.Generator().manual_seed(7))
        control = Control(network, coded(MAPS[0]), coded(MAPS[1]))
        wanted = integrate(
            lambda x, t: predict(unet, x, t * 1000, **CT, guidance=guidance, control=control),
            noise, Flow().times(4, (8, 4, 6)),
        )  # fmt: skip
        assert torch.equal(found, wanted / 2)
        assert not torch.allclose(found, generator.latent(7, SIZE, CT), atol=1e-2)
        assert not torch.allclose(found, generator.latent(7, SIZE, CT, labels=MAPS[1]), atol=1e-2)


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_a_volume_of_a_map_is_that_of_a_plain_loop_over_stock_networks(guidance: float) -> None:
    unet, network, times = small_unet(), telling(), Flow().times(4, (8, 4, 6))
    x = torch.randn((1, 4, 8, 4, 6), generator=torch.Generator().manual_seed(7))
    # NV-Generate-CTMR's loop: both passes in one batch, the second without the region and without the modality
    maps = torch.cat([torch.stack([m[:, 0].long() >> bit & 1 for bit in range(8)], 1) for m in MAPS]).float()
    modality, spacing = torch.tensor([1, 0]), CT["spacing"].expand(2, -1)
    with torch.inference_mode():
        for t, following in zip(times, times[1:], strict=False):
            both, time = torch.cat([x, x]), (1000 * t).expand(2)
            down, middle = network(both, time, maps, class_labels=modality)
            told, away = unet(
                both, time, class_labels=modality, spacing_tensor=spacing,
                down_block_additional_residuals=down, mid_block_additional_residual=middle,
            ).chunk(2)  # fmt: skip
            x = x + (t - following) * (away + guidance * (told - away) if guidance else told)
        generator = make(unet, guidance=guidance, controlnet=network)
        found = generator.latent(7, SIZE, CT, labels=MAPS[0], unguided=MAPS[1])
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [None, [16, 16, 16], [16, 8, 12]])
def test_windows_put_the_decoded_latent_together(window: list[int] | None) -> None:
    generator, seen = make(small_unet(), window), []
    latent = torch.randn(1, 4, 8, 4, 6)
    whole = Enlarger().decode(latent)[0, 0]
    torch.testing.assert_close(generator.volume(latent), whole)
    parts = list(generator.slabs(latent, lambda: seen.append(1)))
    assert len(seen) == generator.inferer.count(SIZE)
    begin = 0
    for x, part in parts:
        assert x == begin and part.shape[1:] == whole.shape[1:]
        begin += len(part)
    assert begin == SIZE[0]


def test_what_cannot_be_sampled_is_refused() -> None:
    for options, told in (
        ({"steps": 0}, "diffusion_unet_inference#num_inference_steps is 0; use a whole number from 1"),
        ({"integrator": "rk4"}, "integrator is 'rk4'; use one of euler, midpoint"),
        ({"guidance": -1}, "diffusion_unet_inference#cfg_guidance_scale is -1; use 0 for no guidance"),
    ):
        with pytest.raises(UserError, match=told):
            make(small_unet(), **options)
