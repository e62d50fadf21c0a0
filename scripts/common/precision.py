"""Which type a device computes in, and what cuDNN may do about it."""

from __future__ import annotations

import torch

# PyTorch leaves cuDNN for contiguous 3D convolutions in bfloat16 or float16 with these versions, the last excluded.
SLOW_CUDNN = (90800, 91500)


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


def set_up(tf32: bool = True, cudnn_benchmark: bool = False) -> None:
    """What cuDNN may do; nothing of it concerns a CPU.

    Args:
        tf32: round what float32 convolutions multiply to TF32, which has 10 bits for the 23 after the point, on GPUs
            that have it (Ampere and later); several times as fast.
        cudnn_benchmark: try the algorithms for each new shape of a convolution, and keep the fastest.
    """
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, cudnn_benchmark


def computed_in(device: torch.device | str, amp: bool) -> str:
    """In words: "bfloat16", "float32", or "float32 with TF32 convolutions", as `set_up` left it."""
    dtype, on_gpu = amp_dtype(device, amp), torch.device(device).type == "cuda"
    rounded = dtype == torch.float32 and on_gpu and torch.backends.cudnn.allow_tf32 and torch.cuda.is_tf32_supported()
    return spoken(dtype) + (" with TF32 convolutions" if rounded else "")


def spoken(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def cudnn_version() -> str:
    """Such as "9.15.1"; "none" where PyTorch has no cuDNN."""
    version = torch.backends.cudnn.version()
    return "none" if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def cudnn_warning(dtype: torch.dtype) -> str | None:
    """What is wrong with this version of cuDNN for convolutions in `dtype`, and what to do; None where nothing is."""
    low, high = SLOW_CUDNN
    if dtype == torch.float32 or not low <= (torch.backends.cudnn.version() or 0) < high:
        return None
    return (
        f"PyTorch computes 3D convolutions in {spoken(dtype)} without cuDNN {cudnn_version()}, "
        "several times slower; install cuDNN 9.15 or newer (pip install --upgrade "
        f'"nvidia-cudnn-cu{str(torch.version.cuda).split(".")[0]}>=9.15")'
    )
