from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from scripts.common.precision import amp_dtype, autocast, computed_in, cudnn_version, cudnn_warning, set_up


def test_amp_dtype_without_amp_is_float32() -> None:
    assert amp_dtype("cpu", False) == torch.float32


def test_autocast_to_float32_is_none() -> None:
    with autocast("cpu", torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", torch.bfloat16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")


@pytest.fixture
def cudnn() -> Iterator[Any]:
    """Its settings, which are put back."""
    flags = torch.backends.cudnn
    before = flags.allow_tf32, flags.benchmark
    yield flags
    flags.allow_tf32, flags.benchmark = before


def test_cudnn_may_do_what_it_is_told(cudnn: Any) -> None:
    for tf32, benchmark in ((False, True), (True, False)):
        set_up(tf32, benchmark)
        assert (cudnn.allow_tf32, cudnn.benchmark) == (tf32, benchmark)
    set_up(tf32=False)
    assert (cudnn.allow_tf32, cudnn.benchmark) == (False, False)


def test_what_is_computed_in_is_told_in_words(cudnn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert computed_in("cpu", False) == "float32"
    for has_it in (True, False):
        monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda has_it=has_it: has_it)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        set_up(tf32=True)
        assert computed_in("cuda", False) == ("float32 with TF32 convolutions" if has_it else "float32")
        assert computed_in("cuda", True) == ("bfloat16" if has_it else "float16")
        assert computed_in("cpu", False) == "float32"
        set_up(tf32=False)
        assert computed_in("cuda", False) == "float32"


@pytest.mark.parametrize(
    ("version", "spoken", "slow"),
    [(90701, "9.7.1", False), (90800, "9.8.0", True), (91401, "9.14.1", True), (91500, "9.15.0", False)],
)
def test_slow_versions_of_cudnn_are_warned_of(
    version: int, spoken: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert cudnn_version() == spoken and cudnn_warning(torch.float32) is None
    told = (
        f"PyTorch computes 3D convolutions in bfloat16 without cuDNN {spoken}, several times slower; "
        'install cuDNN 9.15 or newer (pip install --upgrade "nvidia-cudnn-cu13>=9.15")'
    )
    assert cudnn_warning(torch.bfloat16) == (told if slow else None)


def test_without_cudnn_there_is_no_version_and_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert cudnn_version() == "none" and cudnn_warning(torch.bfloat16) is None
