from __future__ import annotations

import torch

from scripts.common.precision import amp_dtype, autocast


def test_amp_dtype_without_amp_is_float32() -> None:
    assert amp_dtype("cpu", False) == torch.float32


def test_autocast_to_float32_is_none() -> None:
    with autocast("cpu", torch.float32):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("cpu", torch.bfloat16):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16 and torch.is_autocast_enabled("cpu")
