"""Whole-volume validation of an autoencoder: its metrics are means over volumes, whoever measured them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.networks.nets import PatchDiscriminator

from scripts.common import ranks
from scripts.common.errors import UserError
from scripts.data.datasets import VolumeLoader
from scripts.data.intensity import CT_WINDOW, Intensity
from scripts.networks.lpips import PerceptualLoss
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.networks.windows import VolumeInferer
from scripts.training import validation
from scripts.training.losses import LeastSquaresAdversarialLoss, VaeLoss
from scripts.training.validation import Share, VaeValidation
from tests.helpers import stock_network


class Items(list):
    """Volumes at hand, as a dataset."""

    data: list[dict] = property(lambda self: self)  # type: ignore[assignment]

    def voxels(self, index: int) -> int:
        return self[index]["voxels"].numel()


def small_network() -> FastAutoencoderKlMaisi:
    return FastAutoencoderKlMaisi(stock_network(num_channels=[8, 8, 8], num_res_blocks=[1, 1, 1], norm_num_groups=4))


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
    network = small_network()

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
    network = small_network()
    evaluator = make_evaluator([item(16), item(16), item(16)], network)
    seen: list[int] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.iteration))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: len(seen) == 1 and e.interrupt())
    evaluator.run()
    assert evaluator.state.metrics == {} and evaluator.interrupted and seen == [1]
    evaluator.run()
    assert evaluator.state.metrics["psnr"] > 0 and seen == [1, 1, 2, 3]


def test_a_volume_that_cannot_be_read_is_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    network = small_network()
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


def test_volumes_that_cannot_be_read_are_named_in_the_order_of_all(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    other = Share(broken={0: "x.nii.gz: gone", 2: "z.nii.gz: gone"})
    evaluator = make_evaluator([item(16), item(0, "v.nii.gz: gone")], small_network())
    monkeypatch.setattr(ranks, "gather", lambda value: [value, other if isinstance(value, Share) else False])
    evaluator.run()
    told = [record.message for record in caplog.records if record.name == validation.__name__]
    assert told == [f"passed over in validation: {name}.nii.gz: gone" for name in "xvz"]


def test_running_out_of_memory_says_which_knob_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make_evaluator([item(16)], small_network())

    def fail(window: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(evaluator.network, "reconstruct", fail)
    with pytest.raises(UserError, match=r"out of memory with windows of \[16, 16, 16\] .*lower .*val_sliding_window"):
        evaluator.run()


def test_ranks_measure_what_one_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    network, volumes = small_network(), [item(16), item(17)]

    def evaluate(items: list[dict], others: Share | None = None) -> VaeValidation:
        torch.manual_seed(3)  # of the discriminator
        with monkeypatch.context() as patch:
            if others is not None:
                patch.setattr(ranks, "gather", lambda value: [value, others if isinstance(value, Share) else False])
            evaluator = make_evaluator(items, network)
            evaluator.run()
        return evaluator

    together, alone = evaluate(volumes), evaluate(volumes[1:])
    assert evaluate(volumes[:1], alone.share).state.metrics == pytest.approx(together.state.metrics, rel=1e-9)
    assert evaluate([], alone.share).state.metrics == alone.state.metrics  # more ranks than volumes


def test_an_interruption_of_one_rank_is_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = make_evaluator([item(16)], small_network())
    monkeypatch.setattr(ranks, "gather", lambda value: [value, Share() if isinstance(value, Share) else True])
    evaluator.run()
    assert evaluator.interrupted and evaluator.state.metrics == {}


def test_the_first_volume_can_be_shown_until_the_validation_ends() -> None:
    volumes = [item(0, "v.nii.gz: gone"), item(16), item(17)]
    evaluator = make_evaluator(volumes, small_network())
    shown: list[Any] = []
    evaluator.add_event_handler(Events.EPOCH_COMPLETED, lambda e: shown.append(e.shown))
    evaluator.run()
    original, reconstruction, spacing = shown[0]
    assert np.array_equal(original, (volumes[1]["voxels"][0, 0].numpy() + 1000) / 2000)
    assert reconstruction.shape == original.shape and not 0 <= reconstruction.min() <= reconstruction.max() <= 1
    assert spacing == [1.0, 1.0, 2.0] and evaluator.shown is None


def test_a_network_that_is_broken_has_metrics_that_say_so() -> None:
    network = small_network()
    torch.nn.init.constant_(network.quant_conv_mu.conv.bias, torch.nan)  # type: ignore[union-attr, arg-type]
    evaluator = make_evaluator([item(16)], network)
    evaluator.run()
    metrics = evaluator.state.metrics
    assert all(math.isnan(metrics[name]) for name in ("loss", "kl_loss", "psnr", "ssim", "scale_factor"))


def test_mri_is_measured_beyond_its_window() -> None:
    volume = item(16)
    clipped, open_ended = (volume | {"intensity": Intensity((-500.0, 500.0), clip=clip)} for clip in (True, False))
    found = []
    for one in (clipped, open_ended):
        evaluator = make_evaluator([one], small_network())
        evaluator.run()
        found.append(evaluator.state.metrics["mae_hu"])
    assert found[1] > found[0]


def test_the_cost_of_a_validation_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    evaluator = make_evaluator([item(100), item(400)], small_network())
    rows = evaluator.cost_rows(20 * 24 * 10)
    windows = 500 / 10 / 0.75**3  # voxels are computed that many times those of a step
    assert rows == {
        "memory": "about 0.0 GB on the host to validate the largest volume",
        "a validation": f"costs about {0.3 * windows:.0f} training steps",
    }
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(validation, "available_memory", lambda: 10)
    evaluator.cost_rows(1000.0)
    assert "of memory, and 0.0 GB is left; set autoencoder_train#val_patch_size" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks_here", "volumes"), [("1", 1), ("2", 2), ("8", 3)])
def test_the_memory_of_a_validation_is_that_of_all_ranks_on_the_node(
    ranks_here: str, volumes: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluator = make_evaluator([item(16), item(16), item(16)], small_network())
    monkeypatch.setattr(evaluator.data_loader.dataset, "voxels", lambda index: (index + 1) * 10**9)  # type: ignore[union-attr]
    monkeypatch.setattr(validation, "available_memory", lambda: 110 * 10**9)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    # GB: 32 bytes a voxel of the largest ones, and 4 of those that are read ahead.
    needed = 32 * sum((3, 2, 1)[:volumes]) + 4 * sum((3, 2, 1)[volumes : 2 * volumes])
    assert evaluator.cost_rows(1e9)["memory"].startswith(f"about {needed}.0 GB on the host to validate the ")
    warned = capsys.readouterr().err
    assert (f"takes about {needed}.0 GB of memory, and 110.0 GB is left" in warned) == (needed > 110)
    assert ("largest volumes at once" in warned) == (needed > 110)
