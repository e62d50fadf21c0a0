"""The part of a fake CUDA device that fake_cuda.cpp cannot give: what PyTorch's Python code asks of it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from tests.gpu.tracker import Tracker

LATE = 30  # operators launched after an event: the device works while the host waits for it
KERNELS = torch.library.Library("aten", "IMPL")
attention = F.scaled_dot_product_attention


class Generator(torch.Generator):
    """One of the host, whatever device it is asked for; what it draws is never computed."""

    def __new__(cls, device: torch.device | str = "cpu") -> Any:
        return super().__new__(cls)


class Event:
    """Is reached once the device has got something to do after it."""

    tracker: Tracker

    def __init__(self, *_: Any, **__: Any) -> None:
        self.recorded = -LATE

    def record(self, stream: Any = None) -> None:
        self.recorded = self.tracker.launched

    def query(self) -> bool:
        return self.tracker.launched >= self.recorded + LATE

    def synchronize(self) -> None:
        if not self.query():
            self.tracker.waits("Event.synchronize")

    def wait(self, stream: Any = None) -> None:
        """The device waits, not the host."""


class Stream:
    """The only one, whichever is asked for."""

    tracker: Tracker

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        """The device waits, not the host; likewise below."""

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        self.tracker.waits("Stream.synchronize")


def install(tracker: Tracker) -> None:
    """Make this process see a CUDA device; nothing takes that back.

    Args:
        tracker: is told where the host waits.
    """
    Event.tracker = Stream.tracker = tracker
    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "device_count": 1, "set_device": None,
        "current_device": 0, "memory_allocated": 0, "max_memory_allocated": 0, "mem_get_info": (0, 0),
        "current_stream": Stream(), "set_stream": None, "stream": nullcontext(),
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.synchronize = lambda *_: tracker.waits("cuda.synchronize")
    torch.cuda.Event = torch.Event = Event  # type: ignore[misc, assignment]
    torch.cuda.Stream = Stream  # type: ignore[misc, assignment]
    torch.Generator = Generator  # type: ignore[misc, assignment]
    FakeTensorMode.avoid_device_init = True  # type: ignore[method-assign, assignment]
    FakeTensor.numpy, FakeTensor.pin_memory = _numpy, _pinned_by(tracker)  # type: ignore[method-assign]
    nn.Module._apply = _apply  # type: ignore[method-assign, assignment]
    F.scaled_dot_product_attention = _attention
    # CUDA has one kernel for it; a build for CPUs would put it together from several.
    KERNELS.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "CUDA")


def _numpy(tensor: FakeTensor, force: bool = False) -> np.ndarray:
    """Zeros."""
    if tensor.device.type == "cuda":
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _pinned_by(tracker: Tracker) -> Any:
    def pin_memory(tensor: FakeTensor, device: Any = None) -> torch.Tensor:
        pinned = torch.empty_like(tensor)
        tracker.hold(pinned, pinned=True)
        return pinned

    return pin_memory


def _apply(module: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """What PyTorch's own cannot do to fake tensors: with new parameters in the place of the old ones."""
    for child in module.children():
        _apply(child, function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(function(parameter.detach()), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def _attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **options: Any) -> torch.Tensor:
    """As CUDA chooses in 16 bits where there is no mask."""
    if query.device.type != "cuda" or query.dtype == torch.float32 or attn_mask is not None:
        return attention(query, key, value, attn_mask, *args, **options)
    dropout, causal = options.pop("dropout_p", 0.0), options.pop("is_causal", False)
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, **options)[0]
