from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.pipeline import AHEAD
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.networks.windows import VolumeInferer, factor_of, padded
from tests.helpers import stock_network


def pooled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stands for an autoencoder whose reconstruction is exact and whose latents are 4 x 4 x 4 means."""
    mu = nn.functional.avg_pool3d(x, 4)
    return x, mu, mu * 0 + 0.5


def test_windows_of_the_latents_fit_whatever_the_overlap() -> None:
    volume = torch.rand(1, 1, 60, 44, 52)
    for window, overlap in (([24, 24, 24], 0.25), ([20, 16, 28], 0.6), ([16, 16, 16], 0.9)):
        _, mu, _ = VolumeInferer(window, overlap=overlap)(volume, pooled)
        assert torch.allclose(mu, nn.functional.avg_pool3d(volume, 4), atol=1e-5)


@pytest.mark.parametrize("size", [(16, 16, 16), (40, 37, 18), (9, 50, 33), (2, 3, 5)])
@pytest.mark.parametrize("overlap", [0.0, 0.25])
def test_windows_give_back_the_volume_whatever_its_size(size: tuple[int, int, int], overlap: float) -> None:
    volume = torch.rand(1, 1, *size)
    reconstruction, mu, sigma = VolumeInferer([16, 16, 16], overlap=overlap)(volume, pooled)
    assert reconstruction.shape == volume.shape and torch.allclose(reconstruction, volume, atol=1e-6)
    short = [-n % 4 for n in size]
    longer = nn.functional.pad(volume, (0, short[2], 0, short[1], 0, short[0]))
    assert mu.shape == sigma.shape and torch.allclose(sigma, torch.tensor(0.5))
    assert torch.allclose(mu, nn.functional.avg_pool3d(longer, 4), atol=1e-6)


def test_no_window_takes_the_volume_in_one_piece() -> None:
    seen = []

    def network(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(tuple(x.shape[2:]))
        return pooled(x)

    VolumeInferer(None)(torch.rand(1, 1, 30, 21, 12), network)
    assert seen == [(32, 24, 12)]


def test_slabs_are_finished_disjoint_parts_and_windows_are_counted() -> None:
    inferer = VolumeInferer([16, 16, 16], overlap=0.25)
    volume = torch.randint(-1000, 1000, (1, 1, 50, 20, 30), dtype=torch.int16)
    seen: list[int] = []
    parts = list(
        inferer.slabs(volume, pooled, lambda w: (w.float() + 1000) / 2000, after_window=lambda: seen.append(1))
    )
    assert [x for x, _ in parts] == inferer.starts((50, 20, 30))[0] == [0, 12, 24, 36]
    assert len(seen) == inferer.count((50, 20, 30)) == 4 * 2 * 3
    assert [part.shape[2] for _, (part, *_) in parts] == [12, 12, 12, 14]
    together = torch.cat([part for _, (part, *_) in parts], dim=2)
    assert torch.allclose(together, (volume.float() + 1000) / 2000, atol=1e-6)
    assert all(part.shape[2] <= 16 for _, slabs in parts for part in slabs)


@pytest.mark.parametrize(("window", "overlap"), [(None, 0.25), ([16, 16, 16], 0.25), ([20, 16, 28], 0.6)])
def test_latents_are_decoded_in_windows_of_the_volume(window: list[int] | None, overlap: float) -> None:
    latents, seen = torch.rand(1, 3, 12, 5, 9), []

    def decode(part: torch.Tensor) -> torch.Tensor:
        seen.append([4 * n for n in part.shape[2:]])
        return nn.functional.interpolate(part[:, :1], scale_factor=4, mode="nearest")

    inferer, whole = VolumeInferer(window, overlap=overlap), decode(latents)
    seen.clear()
    parts = list(inferer.slabs(latents, decode, latents=True))
    torch.testing.assert_close(torch.cat([part for _, (part,) in parts], dim=2), whole)
    assert [x for x, _ in parts] == inferer.starts((48, 20, 36))[0]
    assert seen == [inferer.window((48, 20, 36))] * inferer.count((48, 20, 36))


def test_an_inferer_that_is_left_early_ends() -> None:
    running, seen = threading.active_count(), []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(threading.current_thread())
        if len(seen) == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    volume, inferer = torch.rand(1, 1, 40, 20, 20), VolumeInferer([8, 20, 20], overlap=0)
    slabs = inferer.slabs(volume, network)
    assert next(slabs)[0] == 0 and len(seen) == AHEAD and threading.active_count() == running + 1
    slabs.close()  # type: ignore[attr-defined]
    assert threading.active_count() == running
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        list(inferer.slabs(volume, network))
    assert threading.active_count() == running and set(seen) == {threading.current_thread()}


def test_an_identity_without_a_factor_is_not_padded() -> None:
    volume = torch.rand(1, 1, 21, 10, 7)
    out = VolumeInferer([8, 8, 8], factor=1)(volume, nn.Identity())
    assert torch.allclose(out, volume, atol=1e-6)


def test_blended_windows_leave_no_seam() -> None:
    """In the middle of a window a window sees all that the whole volume shows; at seams the blend must not jump."""
    torch.manual_seed(0)
    network = FastAutoencoderKlMaisi(stock_network()).eval()
    smooth = nn.functional.interpolate(torch.rand(1, 1, 8, 6, 2), scale_factor=8, mode="trilinear")

    with torch.no_grad():
        whole = VolumeInferer(None)(smooth, network.reconstruct)[0][0, 0]

    def jump(overlap: float) -> float:
        """How much more neighbours differ across the borders of windows than elsewhere."""
        inferer = VolumeInferer([32, 48, 16], overlap=overlap)
        with torch.no_grad():
            out = inferer(smooth, network.reconstruct)[0][0, 0]
        steps = (out - whole).diff(dim=0).abs().mean(dim=(1, 2))
        borders = [s - 1 for s in inferer.starts(smooth.shape[2:])[0][1:]]
        return float(steps[borders].max() / steps.median())

    assert jump(0.25) < 0.5 * jump(0.0)


def test_bad_windows_and_overlaps_are_named() -> None:
    with pytest.raises(UserError, match=r"val_sliding_window_patch_size is \[64, 64, 30\], not divisible by the netw"):
        VolumeInferer([64, 64, 30])
    with pytest.raises(UserError, match="val_sliding_window_patch_size is 64; use three positive integers"):
        VolumeInferer(64)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="val_overlap is 1; use a number from 0 up to below 1"):
        VolumeInferer(None, overlap=1)


def test_a_network_without_a_factor_keeps_the_size() -> None:
    assert factor_of(nn.Identity()) == 1 and factor_of(FastAutoencoderKlMaisi(stock_network())) == 4


def test_ends_are_padded_up_to_a_size() -> None:
    out = padded(torch.ones(2, 1, 3, 4, 5), (5, 4, 3))
    assert out.shape == (2, 1, 5, 4, 5) and out[:, :, :3].min() == 1 and out[:, :, 3:].max() == 0
