"""Validation of latent diffusion: the weights alone change what it measures, whoever measures it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import nn

from scripts.common import ranks
from scripts.common.errors import UserError
from scripts.data.datasets import VolumeLoader
from scripts.networks.flow import Flow
from scripts.training.flow_validation import FlowValidation
from tests.helpers import Items, small_unet


def item(seed: int, size: tuple[int, ...] = (8, 4, 6), error: str = "") -> dict[str, Any]:
    latent = torch.randn(4, *size, generator=torch.Generator().manual_seed(seed))
    conditions = {"spacing": torch.tensor([150.0, 150.0, 300.0]), "modality": torch.tensor(1)}
    return {"latent": latent * math.nan if error else latent, **conditions, "path": "v_emb.nii.gz", "error": error}


def make(
    items: list[dict], network: nn.Module, rank: int = 0, num_ranks: int = 1, order: int = 1, **options: Any
) -> FlowValidation:
    loader = VolumeLoader(Items(items), rank=rank, num_ranks=num_ranks)  # type: ignore[arg-type]
    loader.indices = loader.indices[::order]
    given = {"scale_factor": 1.5, "noise_flow": Flow(base=None), "draws": 4, "amp": False, "seed": 3} | options
    return FlowValidation(device="cpu", val_data_loader=loader, network=network, **given)


def metrics(evaluator: FlowValidation) -> dict[str, float]:
    evaluator.run()
    return evaluator.state.metrics


def test_the_loss_is_that_of_fixed_times_and_noise_written_out() -> None:
    items, network = [item(0), item(1, (8, 4, 4))], small_unet()
    losses: dict[int, list[float]] = {}
    for index, one in enumerate(items):
        x = 1.5 * one["latent"][None]
        for place, t in enumerate((0.125, 0.375, 0.625, 0.875)):
            seed = int(np.random.SeedSequence([3, index, place]).generate_state(1)[0])
            n = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                told = network(
                    (1 - t) * x + t * n, torch.tensor([1000 * t]), class_labels=one["modality"][None],
                    spacing_tensor=one["spacing"][None],
                )  # fmt: skip
            losses.setdefault(place + 1, []).append(float((told - (x - n)).abs().mean()))
    found = metrics(make(items, network))
    assert list(found) == ["loss", *(f"loss_quarter_{q}" for q in range(1, 5))]
    assert found["loss"] == pytest.approx(np.mean([*losses.values()]), rel=1e-5)
    for q, values in losses.items():
        assert found[f"loss_quarter_{q}"] == pytest.approx(np.mean(values), rel=1e-5)


def test_times_are_shifted_as_in_training_and_quarters_without_any_are_left_out() -> None:
    found = metrics(make([item(0, (4, 4, 4))], small_unet(), noise_flow=Flow(), draws=8))  # r is an eighth
    assert list(found) == ["loss", "loss_quarter_1", "loss_quarter_2", "loss_quarter_3"]
    counts = (6, 1, 1)  # the last times are 0.22, 0.35 and 0.65
    weighted = sum(n * found[f"loss_quarter_{q}"] for q, n in enumerate(counts, 1)) / 8
    assert found["loss"] == pytest.approx(weighted, rel=1e-6)


def test_it_begins_where_a_network_that_tells_nothing_is() -> None:
    network = small_unet()
    for parameter in network.out[2].parameters():  # type: ignore[index]
        nn.init.zeros_(parameter)
    found = metrics(make([item(i, (8, 8, 8)) for i in range(4)], network, scale_factor=1.0))
    assert all(value == pytest.approx(2 / math.sqrt(math.pi), abs=0.03) for value in found.values())


def test_the_same_weights_give_the_same_loss_whatever_the_order_and_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    network, items = small_unet().train(), [item(i) for i in range(3)]
    together = make(items, network)
    whole = metrics(together)
    torch.manual_seed(5)
    assert metrics(together) == whole and network.training
    assert metrics(make(items, network, order=-1)) == whole
    assert metrics(make(items, small_unet(seed=1))) != whole
    shares = []
    for rank in range(2):
        one = make(items, network, rank, 2)
        one.run()
        shares.append((one.errors, one.broken))
    monkeypatch.setattr(ranks, "gather", lambda value: shares if isinstance(value, tuple) else [value, False])
    assert metrics(make(items, network, 0, 2)) == whole
    monkeypatch.setattr(ranks, "gather", lambda value: [value, shares[1]] if isinstance(value, tuple) else [value])
    assert metrics(make(items, network, 3, 4)) == metrics(make([], network))  # more ranks than latents


def test_an_interrupted_validation_has_no_metrics_and_the_next_one_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    items, network = [item(i) for i in range(3)], small_unet()
    evaluator, seen = make(items, network), []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.iteration))
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda e: len(seen) == 1 and e.interrupt())
    evaluator.run()
    assert evaluator.state.metrics == {} and evaluator.interrupted and seen == [1]
    assert metrics(evaluator) == metrics(make(items, network)) and seen == [1, 1, 2, 3]
    monkeypatch.setattr(ranks, "gather", lambda value: [value, ([], []) if isinstance(value, tuple) else True])
    evaluator.run()
    assert evaluator.interrupted and evaluator.state.metrics == {}  # one rank's is all ranks'


def test_latents_that_cannot_be_read_are_named_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    network, good, gone = small_unet(), item(1), item(0, error="v_emb.nii.gz: gone")
    assert metrics(make([gone, good], network, max_bad_volumes=1)) == metrics(make([good, good], network, order=-2))
    assert "passed over in validation: v_emb.nii.gz: gone" in caplog.text
    told = r"^1 latents could not be validated \(max_bad_volumes is 0\), the last: v_emb\.nii\.gz: gone; encode these v"
    with pytest.raises(UserError, match=told):
        make([gone, good], network, max_bad_volumes=0).run()
    with pytest.raises(UserError, match="^1 latents could not be validated"):
        make([gone], network).run()  # none is left


def test_handlers_find_the_metrics_of_this_validation() -> None:
    class Look:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda e: seen.append(dict(e.state.metrics)))

    seen: list[dict[str, float]] = []
    evaluator = make([item(0)], small_unet(), val_handlers=[Look()])
    assert seen == [] and metrics(evaluator) == seen[0]


def test_running_out_of_memory_names_the_latent() -> None:
    network = small_unet()

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    network.register_forward_pre_hook(fail)
    with pytest.raises(UserError, match=r"out of memory with a latent of \(4, 8, 4, 6\).*train on smaller latents"):
        make([item(0)], network).run()


def test_what_it_costs_is_told_and_no_draws_are_refused() -> None:
    network = small_unet()
    assert make([item(0), item(1)], network, draws=12).cost_rows(8 * 4 * 6) == {
        "a validation": "costs about 8 training steps"  # 24 forward passes, three of which are a step
    }
    assert "the datalist has no list 'validation'" in make([], network).cost_rows(1)["a validation"]
    for draws in (0, 1.5, True):
        with pytest.raises(UserError, match=f"^val_draws is {draws}; use a whole number from 1, e.g. 8"):
            make([item(0)], network, draws=draws)
