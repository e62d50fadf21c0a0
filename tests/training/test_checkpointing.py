"""Saving and resuming: what is continued, what is refused, what is kept."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from torch.utils.data import DataLoader

from scripts.common.errors import UserError
from scripts.data.sampler import EpochSampler
from scripts.networks.weights import save_weights
from scripts.training.checkpointing import attach_checkpointing
from scripts.training.vae import VaeTrainer
from tests.helpers import STOCK, same, stock_network
from tests.training.small_vae import Patches, make_trainer
from tests.training.toy import toy_training

FILES = {"autoencoder.pt": "autoencoder", "discriminator.pt": "discriminator"}
FILES |= {"autoencoder_best_epoch{}.pt": "autoencoder"}


class Validation:
    """Stands for a validation that finds given losses; None is one that a signal interrupts, as `Validate` tells it."""

    def __init__(self, *losses: float | None) -> None:
        self.losses, self.seen = list(losses), list[int]()

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.seen.append(engine.state.epoch)
        loss = self.losses.pop(0)
        if loss is None:
            engine.progress.interrupted = True
            engine.terminate()
        else:
            engine.progress.validations.append({"epoch": engine.state.epoch, "loss": loss})


def begin(folder: Path, epochs: int, handlers: Any = None, **options: Any) -> VaeTrainer:
    """A training of two steps an epoch, with all of its files in `folder`."""
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(batch_size=1, steps=2, size=16, layers=1, handlers=handlers)
    trainer.state.max_epochs, trainer.best_by = epochs, "loss"
    dataset = trainer.data_loader.dataset
    trainer.data_loader = DataLoader(dataset, 1, sampler=EpochSampler(len(dataset), seed=5))
    attach_checkpointing(trainer, str(folder), FILES, **options)
    return trainer


def finetune(path: Path) -> dict[str, Any]:
    return {"finetune": True, "start_weights": {"autoencoder": str(path)}}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a training of one epoch; not to be changed."""
    folder = tmp_path_factory.mktemp("once")
    begin(folder, 1).run()
    return folder


@pytest.fixture
def copy(once: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    folder = tmp_path / "models"
    folder.mkdir()
    for file in once.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_resumed_training_equals_the_unbroken_one(copy: Path, tmp_path: Path) -> None:
    whole = begin(tmp_path / "whole", 3)
    whole.run()
    resumed = begin(copy, 3)
    assert (resumed.state.epoch, resumed.state.iteration) == (1, 2)
    resumed.run()
    assert resumed.state.iteration == 6
    for name in ("autoencoder.pt", "discriminator.pt"):
        assert same(*(torch.load(f / name, weights_only=True) for f in (tmp_path / "whole", copy)))
    assert same(whole.bare["autoencoder"].state_dict(), resumed.bare["autoencoder"].state_dict())


def test_weights_load_into_monais_network(once: Path) -> None:
    stock = AutoencoderKlMaisi(**STOCK).eval()
    stock.load_state_dict(torch.load(once / "autoencoder.pt", weights_only=True), strict=True)
    ours = make_trainer(steps=1).bare["autoencoder"].eval()
    ours.load_state_dict(torch.load(once / "autoencoder.pt", weights_only=True))
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert (stock.reconstruct(x) - ours.reconstruct(x)[0]).abs().max() < 1e-4


def test_finetuning_starts_from_the_weights_and_keeps_the_earlier_training(copy: Path) -> None:
    earlier = torch.load(copy / "autoencoder.pt", weights_only=True)
    options = finetune(copy / "autoencoder.pt")
    finetuned = begin(copy, 1, **options)
    assert finetuned.state.iteration == 0 and same(finetuned.bare["autoencoder"].state_dict(), earlier)
    assert not (copy / "previous_1").exists()  # nothing is moved before there is something to save
    finetuned.run()
    assert same(torch.load(copy / "previous_1" / "autoencoder.pt", weights_only=True), earlier)
    assert not same(torch.load(copy / "autoencoder.pt", weights_only=True), earlier)
    again = begin(copy, 2, **options)  # the same command resumes the fine-tuning
    assert again.state.iteration == 2 and not (copy / "previous_2").exists()


def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    begin(tmp_path / "whole", 2).run()
    broken = begin(tmp_path / "broken", 2)
    broken.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as status:
        broken.run()
    assert status.value.code == 75 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (tmp_path / "broken" / "autoencoder.pt").unlink()
    resumed = begin(tmp_path / "broken", 2)
    assert resumed.state.iteration == 3
    resumed.run()
    assert resumed.state.iteration == 4
    states = [torch.load(tmp_path / f / "autoencoder.pt", weights_only=True) for f in ("whole", "broken")]
    assert same(*states)


def test_only_the_best_validation_is_kept(tmp_path: Path) -> None:
    trainer = begin(tmp_path, 4, handlers=[Validation(0.5, 0.7, 0.3, 0.4)])
    kept = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: kept.append([p.name for p in tmp_path.glob("*best*")]))
    trainer.run()
    assert kept == [["autoencoder_best_epoch1.pt"]] * 2 + [["autoencoder_best_epoch3.pt"]] * 2
    names = {"autoencoder.pt", "discriminator.pt", "checkpoint.pt", "autoencoder_best_epoch3.pt"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_a_validation_of_nan_is_never_the_best(tmp_path: Path) -> None:
    begin(tmp_path, 3, handlers=[Validation(0.5, float("nan"), 0.6)]).run()
    assert [p.name for p in tmp_path.glob("*best*")] == ["autoencoder_best_epoch1.pt"]


def test_what_does_not_fit_is_refused_and_left_alone(copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(UserError, match=r"no such weights file; correct trained_autoencoder_path"):
        begin(copy, 1, **finetune(copy / "nothing.pt"))
    save_weights(stock_network(num_channels=[32, 32, 32]), copy / "other.pt")
    with pytest.raises(UserError, match="use weights of this architecture"):
        begin(copy, 1, **finetune(copy / "other.pt"))
    (copy / "other.pt").unlink()
    assert contents(copy) == before
    (copy / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:5000])
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be resumed from .* --resume False --overwrite True"):
        begin(copy, 2)
    assert torch.load(copy / "autoencoder.pt", weights_only=True)


def test_a_changed_network_or_data_configuration_is_refused_by_name(tmp_path: Path) -> None:
    settings = {"data_option": {"spacing_type": "original", "random_aug": True}, "seed": 0, "data": list(range(20))}
    toy_training(tmp_path, 1, settings=settings).run()
    assert torch.load(tmp_path / "models" / "checkpoint.pt", weights_only=True)["settings"]["seed"] == 0
    toy_training(tmp_path, 2, settings=settings)
    changed = settings | {"data_option": {"spacing_type": "fixed", "random_aug": True}}
    with pytest.raises(UserError, match="data_option#spacing_type was original, now it is fixed; restore it"):
        toy_training(tmp_path, 2, settings=changed)
    with pytest.raises(UserError, match=r"seed was 0, now it is 3 \(and data\); restore it"):
        toy_training(tmp_path, 2, settings=settings | {"data": list(range(1, 21)), "seed": 3})


def test_a_changed_layer_is_refused_by_name(copy: Path) -> None:
    trainer = make_trainer(batch_size=1, steps=2, size=16, layers=1)
    trainer.bare["autoencoder"].encoder.blocks[1].norm1.eps = 1e-3
    with pytest.raises(UserError, match=r"autoencoder_def: encoder.blocks.1.norm1 was GroupNorm\(8, 16, eps=1e-06"):
        attach_checkpointing(trainer, str(copy), FILES)


def test_starting_over_does_not_overwrite_unless_told_to(copy: Path) -> None:
    before = contents(copy)
    with pytest.raises(UserError, match="holds a trained model, and resume is false; give another model_dir"):
        begin(copy, 1, resume=False)
    assert contents(copy) == before
    begin(copy, 1, resume=False, overwrite=True).run()
    assert contents(copy / "previous_1") == before


def test_another_number_of_ranks_goes_on_with_the_volumes_not_yet_seen(tmp_path: Path) -> None:
    def with_six(sampler: EpochSampler, trainer: VaeTrainer) -> VaeTrainer:
        trainer.data_loader = DataLoader(Patches(6, 16), 1, sampler=sampler)
        trainer.state.epoch_length = len(trainer.data_loader)
        return trainer

    def six(sampler: EpochSampler) -> VaeTrainer:
        trainer = with_six(sampler, make_trainer(batch_size=1, steps=2, size=16, layers=1))
        trainer.state.max_epochs = 2
        attach_checkpointing(trainer, str(tmp_path), FILES)
        return trainer

    trainer = six(EpochSampler(6, seed=5))
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    with pytest.raises(SystemExit):
        trainer.run()
    resumed = six(EpochSampler(6, seed=5, rank=1, num_replicas=2))
    assert (resumed.state.epoch, resumed.state.iteration) == (0, 1)  # 3 of 6 volumes seen: 1 of 3 steps
    resumed.run()
    assert resumed.state.iteration == 6


def test_a_signal_in_a_validation_ends_it_and_resuming_validates(tmp_path: Path) -> None:
    begin(tmp_path / "whole", 2).run()
    first = Validation(None)
    broken = begin(tmp_path / "broken", 2, handlers=[first])
    with pytest.raises(SystemExit):
        broken.run()
    content = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)
    assert content["epoch_pending"] and content["iteration"] == 2
    assert not (tmp_path / "broken" / "autoencoder.pt").exists()
    second = Validation(1.0, 1.0)
    resumed = begin(tmp_path / "broken", 2, handlers=[second])
    resumed.run()
    assert first.seen + second.seen == [1, 1, 2] and [v["epoch"] for v in resumed.progress.validations] == [1, 2]
    states = [torch.load(tmp_path / f / "autoencoder.pt", weights_only=True) for f in ("whole", "broken")]
    assert same(*states)


def test_weights_that_are_not_finite_are_not_saved(copy: Path) -> None:
    before = contents(copy)
    trainer = begin(copy, 3, checkpoint_minutes=0)
    with torch.no_grad():
        trainer.bare["discriminator"].final_conv.conv.bias.fill_(torch.nan)
    trainer.run()
    assert contents(copy) == before
