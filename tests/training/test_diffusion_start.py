"""What is settled before latent diffusion begins: latents that fit, their scale, and files that are never replaced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scripts.common.errors import UserError
from scripts.data.latent_list import load_latents
from scripts.data.latents import LatentStore
from scripts.networks import diffusion_files
from scripts.networks.diffusion_files import UNET
from scripts.networks.weights import write_tensors
from scripts.training.average import AveragedNetwork
from scripts.training.diffusion_start import (
    Scale,
    check_latents,
    checkpoint_name,
    decoder,
    facts,
    modality_mapping,
    rows,
    scale_for,
    weights_files,
)
from tests.helpers import make_latents, same, small_unet

MAPPING = {"ct": 1, "ct_contrast": 3, "mri_t1": 9}


def entries(folder: Path, count: int = 3, **options: Any) -> list[dict[str, Any]]:
    sizes = {"training": [(8, 4, 4)] * count}
    return load_latents(str(make_latents(folder, sizes, **options)), "training", modality_mapping=MAPPING)


def start_file(path: Path, scale: float, autoencoder: str | None = None) -> str:
    facts = {} if autoencoder is None else {"autoencoder_sha256": autoencoder}
    write_tensors(
        diffusion_files.content(small_unet(seed=1), UNET, epoch=3, loss=0.5, scale_factor=scale, facts=facts), path
    )
    return str(path)


def scale_of(found: list[dict[str, Any]], folder: Path, start: str | None = None) -> Scale:
    return scale_for(found, LatentStore(str(folder / "store")), small_unet(), start)


# The scale factor


def test_the_scale_is_measured_over_all_training_latents(tmp_path: Path) -> None:
    found = entries(tmp_path, std=2.0)
    data = np.concatenate([np.random.default_rng(0).normal(0, 2, (3, 8, 4, 4, 4)).astype(np.float32)])
    assert scale_of(found, tmp_path) == (pytest.approx(1 / data.std(), rel=1e-4), "1 / std over all 3 training latents")


def test_one_latent_takes_the_scale_of_the_set_it_was_encoded_with(tmp_path: Path) -> None:
    found, statistics = entries(tmp_path, 1), tmp_path / "latent_stats.json"
    with pytest.raises(UserError, match="1 training latents are too few to measure a scale factor"):
        scale_of(found, tmp_path)
    statistics.write_text(json.dumps({"scale_factor": 0.8}))
    assert scale_of(found, tmp_path) == (0.8, f"of {statistics}")
    for damaged in ("{", "[]", "{}", '{"scale_factor": null}'):
        statistics.write_text(damaged)
        with pytest.raises(UserError, match=r"latent_stats\.json: is damaged; encode again$"):
            scale_of(found, tmp_path)


@pytest.mark.parametrize("known", [True, False])
def test_finetuning_keeps_the_scale_and_loads_the_weights(
    known: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start, network = start_file(tmp_path / "start.pt", 1.03125, "ab" * 32 if known else None), small_unet()
    assert scale_for(entries(tmp_path), LatentStore(str(tmp_path / "store")), network, start) == (
        1.03125,
        f"of {start}",
    )
    assert same(dict(network.state_dict()), dict(small_unet(seed=1).state_dict())) and caplog.text == ""
    (tmp_path / "one").mkdir()
    assert (
        scale_of(entries(tmp_path / "one", 1), tmp_path, start).value == 1.03125
    )  # too few to measure; none is needed


def test_a_scale_that_is_kept_and_far_from_the_latents_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start, found = start_file(tmp_path / "start.pt", 1.25), entries(tmp_path)
    own = scale_of(found, tmp_path).value
    assert scale_of(found, tmp_path, start).value == 1.25
    assert f"start.pt, 1.2500, is kept; that of these latents would be {own:.4f}: was another" in caplog.text


def test_latents_of_another_autoencoder_are_measured_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start, found = start_file(tmp_path / "start.pt", 1.25, "cd" * 32), entries(tmp_path)
    assert scale_of(found, tmp_path, start) == scale_of(found, tmp_path)
    assert "latents of another autoencoder (SHA-256 cdcdcdcdcdcd, these are of abababababab)" in caplog.text
    with pytest.raises(UserError, match="1 training latents are too few"):
        scale_of(entries(tmp_path / "one", 1), tmp_path, start)


def test_weights_without_a_scale_take_that_of_the_latents(tmp_path: Path) -> None:
    torch.save(small_unet(seed=1).state_dict(), tmp_path / "bare.pt")
    found = entries(tmp_path)
    assert scale_of(found, tmp_path, str(tmp_path / "bare.pt")) == scale_of(found, tmp_path)


# Whose files


def test_files_are_named_after_the_model(tmp_path: Path) -> None:
    names = weights_files(str(tmp_path), "unet.v2.pt")
    assert names == {"unet.v2.pt": "unet", "unet.v2_best_epoch{}.pt": "unet"}
    assert checkpoint_name(names) == "unet.v2_checkpoint.pt"
    for bad in ("", "a/b.pt", "../b.pt", "/b.pt"):
        with pytest.raises(UserError, match=rf"^model_filename is '{bad}'; use the name of a file, its folder being"):
            weights_files(str(tmp_path), bad)


@pytest.mark.parametrize("which", ["unet.pt", "unet_best_epoch3.pt", "link.pt"])
def test_what_a_training_starts_from_is_none_of_the_files_that_it_writes(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("unet.pt", "unet_best_epoch3.pt", "other.pt"):
        (tmp_path / name).touch()
    (tmp_path / "link.pt").symlink_to("unet.pt")
    monkeypatch.chdir(tmp_path)
    names = weights_files(str(tmp_path), "unet.pt", f"./{which}")
    assert names == {"unet_finetuned.pt": "unet", "unet_finetuned_best_epoch{}.pt": "unet"}
    assert checkpoint_name(names) == "unet_finetuned_checkpoint.pt"
    assert f"{which} is what the training starts from, and is kept; it writes unet_finetuned.pt" in caplog.text
    assert list(weights_files(str(tmp_path), "unet.pt", "other.pt"))[0] == "unet.pt"
    assert list(weights_files(str(tmp_path / "elsewhere"), "unet.pt", which))[0] == "unet.pt"


# What the network can take


def test_latents_that_the_network_cannot_take_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(tmp_path)
    capsys.readouterr()  # the bar
    check_latents(found, small_unet())
    assert capsys.readouterr().err == ""
    with pytest.raises(
        UserError, match=r"3 of 3 latents have sizes that are no multiples of 8; .*--resize_multiple 32"
    ):
        check_latents(
            found, small_unet(num_channels=[8] * 4, attention_levels=[False] * 4, num_head_channels=[0, 0, 0, 8])
        )
    told = r"v1_emb\.nii\.gz: modality ct_contrast has number 3, but the network knows 0 to 2 \(diffusion_unet_def#num_"
    with pytest.raises(UserError, match=told):
        check_latents(found, small_unet(num_class_embeds=3))
    check_latents(found, small_unet(num_class_embeds=None))  # takes no modality


def test_latents_of_several_autoencoders_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(tmp_path)
    capsys.readouterr()  # the bar
    check_latents([*found[:2], found[2] | {"weights_sha256": "cd" * 32}], small_unet())
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and said.count("\n") == 1 and "v2_emb.nii.gz come from different auto" in said
    assert "(SHA-256 abababababab and cdcdcdcdcdcd)" in said


def test_the_mapping_is_read_only_where_modalities_are_taken(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps(MAPPING))
    assert modality_mapping(small_unet(), str(tmp_path / "m.json")) == MAPPING
    assert modality_mapping(small_unet(num_class_embeds=None), str(tmp_path / "none.json")) is None
    with pytest.raises(UserError, match=r"none\.json: is no readable JSON file"):
        modality_mapping(small_unet(), str(tmp_path / "none.json"))


def test_the_autoencoder_is_needed_only_for_samples(tmp_path: Path) -> None:
    class Decoder(torch.nn.Linear):
        pass

    network: Any = Decoder(2, 2)
    assert decoder(0, network, str(tmp_path), None, "cpu") is None
    with pytest.raises(
        UserError, match=r"holds no weights .*; or set sample_interval to 0, for a training without pic"
    ):
        decoder(5, network, str(tmp_path), None, "cpu")
    torch.save({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, tmp_path / "a.pt")
    found = decoder(5, network, str(tmp_path), str(tmp_path / "a.pt"), "cpu")
    assert found is network and bool((network.weight == 1).all())
    for bad in (-1, 1.5, True, None):
        with pytest.raises(UserError, match=f"^sample_interval is {bad}; use a whole number of epochs, 0 for no sam"):
            decoder(bad, network, str(tmp_path), None, "cpu")  # type: ignore[arg-type]


# What is told and kept


def test_what_was_trained_on_is_kept_with_the_weights(tmp_path: Path) -> None:
    found = entries(tmp_path)
    assert facts(found, Scale(1.5, "here")) == {
        "autoencoder_sha256": "ab" * 32, "scale_factor_origin": "here", "sizes": [[8, 4, 4]],
        "spacing": [[1.5, 1.5], [1.5, 1.5], [2.0, 4.0]], "modalities": MAPPING,
        "field_of_view": [[48.0, 48.0], [24.0, 24.0], [32.0, 64.0]],
    }  # fmt: skip
    unknown = [{key: value for key, value in entry.items() if key != "weights_sha256"} for entry in found]
    assert facts(unknown, Scale(1.5, "here"))["autoencoder_sha256"] is None


def test_the_table_tells_latents_scale_and_memory(tmp_path: Path) -> None:
    class Trainer:
        def __init__(self, decay: float) -> None:
            self.bare = {"unet": torch.nn.Linear(9999, 100_000, device="meta")}  # 1e9 weights
            self.averages = {"unet": AveragedNetwork(self.bare["unet"], decay)}

    found = entries(tmp_path)
    for decay, memory in ((0.5, "20.00"), (0.0, "16.00")):
        told = rows(found, Scale(1.25, "here"), Trainer(decay))  # type: ignore[arg-type]
        assert told == {
            "latents": "3 of 8 x 4 x 4", "spacing": "1.5..1.5 x 1.5..1.5 x 2..4 mm",
            "modalities": "1 ct (1), 1 ct_contrast (3), 1 mri_t1 (9)", "scale factor": "1.2500 (here)",
            "weights": f"{memory} GB on the device, with gradients, Adam and average; activations come on top",
        }  # fmt: skip
    frozen: Any = torch.nn.Linear(9999, 50_000, device="meta")
    told = rows(found, Scale(1.25, "here"), Trainer(0.5), frozen)  # type: ignore[arg-type]
    assert told["weights"].startswith("22.00 GB on the device, with gradients, Adam, average and the frozen UNet;")
