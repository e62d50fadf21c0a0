"""Which type a device computes in."""

from __future__ import annotations

import torch


def amp_dtype(device: torch.device | str, amp: bool) -> torch.dtype:
    """What autocast computes in: bfloat16 where the device has it, else float16 (CUDA), else float32."""
    device = torch.device(device)
    if not amp:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    usable = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if usable else torch.float32


def autocast(device: torch.device | str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to `dtype` on `device`; off for float32."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
