"""What the engine gives to any training, seen on one of forty lines."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from torch.optim import lr_scheduler

from scripts.common.errors import UserError
from scripts.training.engine import Progress
from scripts.training.handlers import TrainingLog
from tests.helpers import same, scalars
from tests.training.toy import ToyTraining, toy_training


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "models" / "line.pt", weights_only=True)


def stop_at(trainer: ToyTraining, iteration: int, number: signal.Signals = signal.SIGTERM) -> None:
    trainer.add_event_handler(Events.ITERATION_STARTED(once=iteration), lambda _: os.kill(os.getpid(), number))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The unbroken training: 3 epochs of 6 steps."""
    toy_training(tmp_path / "whole").run()
    return tmp_path / "whole"


@pytest.mark.parametrize("iteration", [1, 6, 9, 17])
def test_a_stopped_training_ends_with_75_and_goes_on_bit_by_bit(iteration: int, whole: Path, tmp_path: Path) -> None:
    stopped = toy_training(tmp_path / "broken")
    stop_at(stopped, iteration)
    with pytest.raises(SystemExit) as status:
        stopped.run()
    assert status.value.code == 75 and stopped.state.iteration == iteration
    resumed = toy_training(tmp_path / "broken")
    assert resumed.state.iteration == iteration
    resumed.run()
    assert same(weights(whole), weights(tmp_path / "broken"))
    logs = [scalars(folder / "events") for folder in (whole, tmp_path / "broken")]
    for tag in ("square", "absolute", "grad_norm", "learning_rate"):
        steps, again = ([(e.step, e.value) for e in log.Scalars(f"train_iter/{tag}")] for log in logs)
        assert steps == again and [step for step, _ in steps] == list(range(1, 19))


def test_bar_log_line_and_tags_show_its_own_losses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.training.handlers.REPORT_SECONDS", 0.0)
    shown: list[dict[str, str]] = []
    trainer = toy_training(tmp_path, epochs=1)
    handlers = [h for h, *_ in trainer._event_handlers[Events.EPOCH_STARTED] if hasattr(h, "__self__")]
    log = next(h.__self__ for h in handlers if isinstance(h.__self__, TrainingLog))
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda _: monkeypatch.setattr(log.bar, "set_postfix", spy))

    def spy(values: dict[str, str], **_: Any) -> None:
        shown.append(values)

    with caplog.at_level(logging.INFO):
        trainer.run()
    assert len(shown) >= 6 and all(list(values) == ["square", "absolute"] for values in shown)
    line = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch 1/1: "))
    means = {tag: scalars(tmp_path / "events").Scalars(f"train_epoch/{tag}")[0].value for tag in ("square", "absolute")}
    assert line.startswith(f"epoch 1/1: square {means['square']:.4f}  absolute {means['absolute']:.4f}  lr ")
    assert "samples/s  data wait" in line
    names = {tag.removeprefix("train_iter/") for tag in scalars(tmp_path / "events").Tags()["scalars"]}
    assert {"square", "absolute", "grad_norm", "learning_rate"} <= names


def test_a_step_of_nan_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = toy_training(tmp_path, epochs=1)
    before: dict[int, Any] = {}

    @trainer.on(Events.ITERATION_STARTED)
    def spoil(engine: ToyTraining) -> None:
        before[engine.state.iteration] = copy.deepcopy(engine.bare["line"].state_dict())
        if engine.state.iteration == 3:
            engine.state.batch["x"][1, 2] = torch.nan

    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert same(before[3], before[4]) and not same(before[4], before[5])
    (told,) = (r.getMessage() for r in caplog.records if "passed over" in r.getMessage())
    assert told.startswith(
        "step 3 is passed over, as it is not finite: square is nan, absolute is nan, grad_norm is nan"
    )
    assert "(point " in told


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (i + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 11], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 18, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 12),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=18),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.CosineAnnealingLR(o, 13)], [5]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.95)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("interval", ["iteration", "epoch"])
def test_every_scheduler_resumes_bit_by_bit(name: str, interval: str, tmp_path: Path) -> None:
    def begin(folder: str, stop: int | None = None) -> list[list[Any]]:
        """Train, perhaps to a stop; the rate and the betas of each step."""
        trainer = toy_training(tmp_path / folder, schedule=SCHEDULERS[name], scheduler_interval=interval)
        rates: list[list[Any]] = []

        @trainer.on(Events.ITERATION_STARTED)
        def note(engine: ToyTraining) -> None:
            group = engine.optimizers["optimizer"].param_groups[0]
            rates.append([engine.state.iteration, group["lr"], group["betas"]])

        if stop is None:
            trainer.run()
            return rates
        stop_at(trainer, stop)
        with pytest.raises(SystemExit):
            trainer.run()
        return rates

    expected = begin("whole")
    assert len({rate for _, rate, _ in expected}) > 1 and len(expected) == 18
    assert begin("broken", 8) + begin("broken") == expected
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


class Plateau:
    """Stands for a validation; what it finds falls, rises twice, and falls."""

    def attach(self, engine: ToyTraining) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: ToyTraining) -> None:
        error = {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.4}[engine.state.epoch]
        engine.progress.validations.append({"epoch": engine.state.epoch, "error": error})


def test_a_plateau_is_found_by_validations_and_resumes(tmp_path: Path) -> None:
    def rate_after(epochs: int) -> float:
        schedule = lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0)  # noqa: E731
        options = {"schedule": schedule, "scheduler_interval": "epoch", "best_by": "error", "handlers": [Plateau()]}
        trainer = toy_training(tmp_path, epochs, **options)
        started.append(trainer.optimizers["optimizer"].param_groups[0]["lr"])
        trainer.run()
        return trainer.optimizers["optimizer"].param_groups[0]["lr"]

    started: list[float] = []
    assert rate_after(2) == 0.05 and rate_after(4) == 0.025
    assert started == [0.1, 0.05]


def test_a_changed_rate_and_other_settings_are_obeyed_on_resuming(tmp_path: Path) -> None:
    toy_training(tmp_path, epochs=1, lr=0.1).run()
    trainer = toy_training(tmp_path, epochs=2, lr=0.4)
    group = trainer.optimizers["optimizer"].param_groups[0]
    assert trainer.state.iteration == 6
    assert group["lr"] == pytest.approx(0.4 * (1 - 6 / 18) ** 2) and group["initial_lr"] == 0.4


def test_what_is_frozen_in_an_update_stays_with_its_optimizers_state(tmp_path: Path) -> None:
    class Frozen(ToyTraining):
        def update(self, name: str, loss: torch.Tensor, frozen: Any = ()) -> None:
            super().update(name, loss, [self.bare["line"].bias] if self.state.iteration > 6 else ())

    trainer = toy_training(tmp_path)
    trainer.__class__ = Frozen
    line, adam, seen = trainer.bare["line"], trainer.optimizers["optimizer"].state, []
    noted = lambda p: [p.detach().clone(), *(t.clone() for t in adam[p].values())]  # noqa: E731
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: seen.append((noted(line.weight), noted(line.bias))))
    trainer.run()
    for iteration, (one, other) in enumerate(itertools.pairwise(seen), 2):
        same_weight, same_bias = (all(map(torch.equal, *pair)) for pair in zip(one, other, strict=True))
        assert not same_weight and same_bias == (iteration > 6)


def test_an_unknown_interval_is_named() -> None:
    with pytest.raises(UserError, match="scheduler_interval is 'step'; use one of epoch, iteration"):
        ToyTraining(device="cpu", train_data_loader=[0], networks={}, optimizers={}, scheduler_interval="step")


def test_the_best_validation_is_the_first_of_the_lowest_and_never_nan() -> None:
    progress = Progress([{"epoch": e, "loss": v} for e, v in enumerate([float("nan"), 0.7, 0.3, 0.3], 1)])
    assert progress.best("loss") == {"epoch": 3, "loss": 0.3}
    assert Progress([{"epoch": 1, "loss": float("nan")}]).best("loss")["epoch"] == 1  # type: ignore[index]
    assert Progress().best("loss") is None


def test_seeds_do_not_depend_on_how_samples_are_spread(tmp_path: Path) -> None:
    trainer = toy_training(tmp_path)
    trainer.state.iteration = 5
    whole = trainer.seeds(4, streams=2)
    trainer.state.rank = 1
    assert (trainer.seeds(2, streams=2) == whole[2:]).all()
    trainer.state.iteration = 6
    assert not (trainer.seeds(2, streams=2) == whole[2:]).any()
