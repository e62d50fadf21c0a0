from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import PatchDiscriminator

from scripts.common.errors import UserError
from scripts.data.datasets import VolumeLoader
from scripts.data.intensity import CT_WINDOW, Intensity
from scripts.networks.lpips import PerceptualLoss
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.networks.windows import VolumeInferer
from scripts.training.losses import LeastSquaresAdversarialLoss, VaeLoss
from scripts.training.validation import VaeValidation
from tests.helpers import stock_network


class Items(list):
    """Volumes at hand, as a dataset."""

    data: list[dict] = property(lambda self: self)  # type: ignore[assignment]


def make_evaluator(items: list[dict], network: FastAutoencoderKlMaisi, **options: Any) -> VaeValidation:
    return VaeValidation(
        device="cpu",
        val_data_loader=VolumeLoader(Items(items)),  # type: ignore[arg-type]
        network=network,
        generator_loss=VaeLoss(PerceptualLoss(pretrained=False), kl_weight=1e-3),
        discriminator=PatchDiscriminator(spatial_dims=3, channels=8, in_channels=1, norm="INSTANCE"),
        adversarial_loss=LeastSquaresAdversarialLoss(),
        inferer=VolumeInferer([16, 16, 16]),
        amp=False,
        **options,
    )


def item(size: int, error: str = "") -> dict[str, Any]:
    if error:
        return {"image": "v.nii.gz", "name": "v", "error": error}
    voxels = torch.rand(1, 1, 20, 24, size) * 2000 - 1000
    facts = {"image": "v.nii.gz", "name": "v", "spacing": [1.0, 1.0, 2.0]}
    return {**facts, "voxels": voxels, "intensity": Intensity(CT_WINDOW, clip=True)}


def test_evaluation_is_deterministic_and_averages_volumes() -> None:
    torch.manual_seed(0)
    volumes = [item(17 + 4 * i) for i in range(3)]
    network = FastAutoencoderKlMaisi(stock_network())

    def evaluate(items: list[dict]) -> dict[str, float]:
        torch.manual_seed(3)  # of the discriminator
        evaluator = make_evaluator(items, network)
        evaluator.run()
        return evaluator.state.metrics

    network.train()
    together = evaluate(volumes)
    assert network.training
    assert together == evaluate(volumes)
    apart = [evaluate([v]) for v in volumes]
    for name in ("loss", "recons_loss", "kl_loss", "p_loss", "psnr", "ssim", "mae_hu", "adv_loss", "d_loss"):
        assert together[name] == pytest.approx(np.mean([a[name] for a in apart]), rel=1e-6)
    expected = together["recons_loss"] + 1e-3 * together["kl_loss"] + 0.3 * together["p_loss"]
    assert together["loss"] == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_validation_has_no_metrics_and_the_next_one_is_whole() -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    evaluator = make_evaluator([item(16), item(16), item(16)], network)
    seen: list[int] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.iteration))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: len(seen) == 1 and e.interrupt())
    evaluator.run()
    assert evaluator.state.metrics == {} and evaluator.interrupted and seen == [1]
    evaluator.run()
    assert evaluator.state.metrics["psnr"] > 0 and seen == [1, 1, 2, 3]


def test_a_volume_that_cannot_be_read_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    network = FastAutoencoderKlMaisi(stock_network())
    good = item(16)
    evaluator = make_evaluator([item(0, "v.nii.gz: gone"), good], network, max_bad_volumes=1)
    torch.manual_seed(0)
    evaluator.run()
    assert "passed over in validation: v.nii.gz: gone" in caplog.text
    alone = make_evaluator([good], network)
    alone.run()
    assert evaluator.state.metrics["psnr"] == alone.state.metrics["psnr"]
    strict = make_evaluator([item(0, "v.nii.gz: gone"), good], network, max_bad_volumes=0)
    with pytest.raises(
        UserError, match=r"1 volumes could not be validated \(max_bad_volumes is 0\), the last: v.nii.gz: gone"
    ):
        strict.run()


def test_running_out_of_memory_says_which_knob_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make_evaluator([item(16)], FastAutoencoderKlMaisi(stock_network()))

    def fail(window: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(evaluator.network, "reconstruct", fail)
    with pytest.raises(UserError, match=r"out of memory with windows of \[16, 16, 16\] .*lower .*val_sliding_window"):
        evaluator.run()
