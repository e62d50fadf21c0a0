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

from scripts.checkpointing import attach_checkpointing
from scripts.errors import UserError
from scripts.patches import EpochSampler
from scripts.trainer import VaeTrainer, Warmup
from scripts.weights import save_weights
from tests.test_autoencoder import SMALL, stock_network
from tests.test_trainer import Patches, make_trainer


def begin(folder: Path, epochs: int, sampler: Any = None, validate: Any = None, **options) -> VaeTrainer:
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(batch_size=1, steps=2)
    trainer.state.max_epochs = epochs
    if sampler is not None:
        trainer.data_loader = DataLoader(Patches(sampler.length), 1, sampler=sampler)
        trainer.state.epoch_length = len(trainer.data_loader)
    else:
        dataset = trainer.data_loader.dataset
        trainer.data_loader = DataLoader(dataset, 1, sampler=EpochSampler(len(dataset), seed=5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer_g, lambda e: 1 / (e + 1))
    if validate is not None:
        trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: scheduler.step())
    state = {n: getattr(trainer, n) for n in ("autoencoder", "discriminator", "optimizer_g", "optimizer_d")}
    attach_checkpointing(trainer, state | {"scheduler": scheduler}, str(folder), **options)
    return trainer


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())


def test_resumed_training_equals_the_unbroken_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = begin(tmp_path / "whole", 3)
    whole.run()
    begin(tmp_path / "broken", 1).run()
    resumed = begin(tmp_path / "broken", 3)
    assert (resumed.state.epoch, resumed.state.iteration) == (1, 2)
    resumed.run()
    assert resumed.state.iteration == 6
    for name in ("autoencoder.pt", "discriminator.pt"):
        states = [torch.load(tmp_path / f / name, weights_only=True) for f in ("whole", "broken")]
        assert same(*states)
    assert same(whole.autoencoder.state_dict(), resumed.autoencoder.state_dict())


def test_weights_load_into_monais_network(tmp_path: Path) -> None:
    trainer = begin(tmp_path, 1)
    trainer.run()
    stock = AutoencoderKlMaisi(**SMALL).eval()
    stock.load_state_dict(torch.load(tmp_path / "autoencoder.pt", weights_only=True), strict=True)
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert (stock.reconstruct(x) - trainer.autoencoder.eval().reconstruct(x)[0]).abs().max() < 1e-4


def test_finetuning_starts_from_the_weights_and_keeps_the_earlier_training(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    begin(folder, 1).run()
    earlier = torch.load(folder / "autoencoder.pt", weights_only=True)
    options = {"finetune": True, "trained_autoencoder_path": str(folder / "autoencoder.pt")}
    finetuned = begin(folder, 1, **options)
    assert finetuned.state.iteration == 0 and same(finetuned.autoencoder.state_dict(), earlier)
    assert not (folder / "previous_1").exists()  # nothing is moved before there is something to save
    finetuned.run()
    assert same(torch.load(folder / "previous_1" / "autoencoder.pt", weights_only=True), earlier)
    assert not same(torch.load(folder / "autoencoder.pt", weights_only=True), earlier)
    again = begin(folder, 2, **options)  # the same command resumes the fine-tuning
    assert again.state.iteration == 2 and not (folder / "previous_2").exists()


def test_resuming_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
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


def test_a_changed_learning_rate_is_obeyed_on_resuming(tmp_path: Path) -> None:
    begin(tmp_path, 1).run()
    trainer = make_trainer(batch_size=1, steps=2)
    trainer.state.max_epochs = 2
    trainer.optimizer_g.param_groups[0]["lr"] = 5e-3
    trainer.optimizer_g.defaults["lr"] = 5e-3
    scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer_g, Warmup([9], [0.5]))
    state = {n: getattr(trainer, n) for n in ("autoencoder", "discriminator", "optimizer_g", "optimizer_d")}
    attach_checkpointing(trainer, state | {"scheduler": scheduler}, str(tmp_path))
    assert trainer.optimizer_g.param_groups[0]["lr"] == pytest.approx(2.5e-3)
    assert scheduler.last_epoch == 1


def test_only_the_best_validation_is_kept(tmp_path: Path) -> None:
    losses = iter([0.5, 0.7, 0.3, 0.4])
    trainer = make_trainer(batch_size=1, steps=1)
    trainer.state.max_epochs = 4

    def validate(engine) -> None:
        engine.state.validations.append({"epoch": engine.state.epoch, "loss": next(losses)})

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    state = {"autoencoder": trainer.autoencoder, "discriminator": trainer.discriminator}
    attach_checkpointing(trainer, state, str(tmp_path))
    kept = []
    trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: kept.append([p.name for p in tmp_path.glob("*best*")]))
    trainer.run()
    assert kept == [["autoencoder_best_epoch1.pt"]] * 2 + [["autoencoder_best_epoch3.pt"]] * 2
    names = {"autoencoder.pt", "discriminator.pt", "checkpoint.pt", "autoencoder_best_epoch3.pt"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_what_does_not_fit_is_refused_and_left_alone(tmp_path: Path) -> None:
    begin(tmp_path, 1).run()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"no such weights file; correct trained_autoencoder_path"):
        begin(tmp_path, 1, finetune=True, trained_autoencoder_path=str(tmp_path / "nothing.pt"))
    save_weights(stock_network(num_channels=[32, 32, 32]), tmp_path / "other.pt")
    with pytest.raises(UserError, match="use weights of this architecture"):
        begin(tmp_path, 1, finetune=True, trained_autoencoder_path=str(tmp_path / "other.pt"))
    (tmp_path / "other.pt").unlink()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    (tmp_path / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:5000])
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be resumed from .* --resume False --overwrite True"):
        begin(tmp_path, 2)
    assert torch.load(tmp_path / "autoencoder.pt", weights_only=True)


def test_a_changed_network_or_data_configuration_is_refused_by_name(tmp_path: Path) -> None:
    settings = {"data_option": {"spacing_type": "original", "random_aug": True}, "seed": 0, "data": list(range(20))}
    begin(tmp_path, 1, settings=settings).run()
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["settings"]["seed"] == 0 and len(content["digest"]) == 64
    begin(tmp_path, 2, settings=settings)
    changed = settings | {"data_option": {"spacing_type": "fixed", "random_aug": True}}
    with pytest.raises(UserError, match="data_option#spacing_type was original, now it is fixed; restore it"):
        begin(tmp_path, 2, settings=changed)
    with pytest.raises(UserError, match=r"seed was 0, now it is 3 \(and data\); restore it"):
        begin(tmp_path, 2, settings=settings | {"data": list(range(1, 21)), "seed": 3})
    trainer = begin(tmp_path / "other", 1)
    trainer.autoencoder.encoder.blocks[1].norm1.eps = 1e-3
    state = {n: getattr(trainer, n) for n in ("autoencoder", "discriminator", "optimizer_g", "optimizer_d")}
    with pytest.raises(UserError, match=r"autoencoder_def: encoder.blocks.1.norm1 was GroupNorm\(8, 16, eps=1e-06"):
        attach_checkpointing(trainer, state, str(tmp_path), settings=settings)


def test_starting_over_does_not_overwrite_unless_told_to(tmp_path: Path) -> None:
    begin(tmp_path, 1).run()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match="holds a trained model, and resume is false; give another model_dir"):
        begin(tmp_path, 1, resume=False)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    begin(tmp_path, 1, resume=False, overwrite=True).run()
    assert {p.name: p.read_bytes() for p in (tmp_path / "previous_1").iterdir()} == before


def test_another_number_of_ranks_goes_on_with_the_volumes_not_yet_seen(tmp_path: Path) -> None:
    trainer = begin(tmp_path, 2)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=3), lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    trainer.data_loader = DataLoader(Patches(6), 1, sampler=EpochSampler(6, seed=5))
    trainer.state.epoch_length = 6
    with pytest.raises(SystemExit):
        trainer.run()
    resumed = begin(tmp_path, 2, sampler=EpochSampler(6, seed=5, rank=1, num_replicas=2))
    assert (resumed.state.epoch, resumed.state.iteration) == (0, 1)  # 3 of 6 volumes seen: 1 of 3 steps
    resumed.run()
    assert resumed.state.iteration == 6


def test_a_signal_in_a_validation_ends_it_and_resuming_validates(tmp_path: Path) -> None:
    def validate(engine) -> None:
        seen.append(engine.state.epoch)
        if len(seen) == 1:
            engine.fire_event(Events.INTERRUPT)  # as Validate does
            engine.terminate()
        else:
            engine.state.validations.append({"epoch": engine.state.epoch, "loss": 1.0})

    seen: list[int] = []
    begin(tmp_path / "whole", 2).run()
    broken = begin(tmp_path / "broken", 2, validate=validate)
    with pytest.raises(SystemExit):
        broken.run()
    content = torch.load(tmp_path / "broken" / "checkpoint.pt", weights_only=True)
    assert (
        content["epoch_pending"] and content["iteration"] == 2 and not (tmp_path / "broken" / "autoencoder.pt").exists()
    )
    resumed = begin(tmp_path / "broken", 2, validate=validate)
    resumed.run()
    assert seen == [1, 1, 2] and [v["epoch"] for v in resumed.state.validations] == [1, 2]
    states = [torch.load(tmp_path / f / "autoencoder.pt", weights_only=True) for f in ("whole", "broken")]
    assert same(*states)


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    begin(tmp_path, 1).run()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    trainer = begin(tmp_path, 3, checkpoint_minutes=0)
    with torch.no_grad():
        trainer.discriminator.final_conv.conv.bias.fill_(torch.nan)
    trainer.run()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
