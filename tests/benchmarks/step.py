"""One adversarial training step: this bundle against MONAI's stock parts in a plain loop, on the same input.

    python -m tests.benchmarks.step [--sizes 32 64] [--repeats 5] [--device cuda]

Time, peak memory, operators and saved activations, with the full MAISI network ([64, 128, 256]). Ours is the trainer of
configs/train.json with what it has in a step, but for the one term of the loss that the stock loop has not.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from ignite.engine import Events
from monai.bundle import ConfigParser
from monai.losses import PatchAdversarialLoss
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scripts.networks.lpips import PerceptualLoss
from scripts.training.vae import VaeTrainer
from tests.benchmarks.table import median, print_table

TRAIN = Path("configs/train.json")
CHECKPOINTING = "ours amp, activation_checkpointing"
LIKE_STOCK: dict[str, Any] = {"scale_equivariance": 0}  # the stock loop has no such term
OURS: dict[str, dict[str, Any]] = {
    "ours float32": LIKE_STOCK | {"autoencoder_train#amp": False},
    "ours amp": LIKE_STOCK,
    CHECKPOINTING: LIKE_STOCK | {"activation_checkpointing": True},
}
VARIANTS = ("stock float32", "stock autocast", *OURS)
STEPS = {"cpu": 1, "cuda": 5}  # between two looks at the clock, for which a GPU is waited


def networks(stock: bool, device: str, **overrides: Any) -> tuple[nn.Module, nn.Module]:
    """Those of configs/train.json with `overrides`; the reference sets num_splits to 1 and leaves save_mem on."""
    torch.manual_seed(0)
    parser = configured(device, **{"autoencoder_def#save_mem": True} | overrides)
    autoencoder = parser.get_parsed_content("autoencoder_def" if stock else "autoencoder_net").to(device)
    return autoencoder, parser.get_parsed_content("discriminator_net")


def configured(device: str, **overrides: Any) -> ConfigParser:
    """configs/train.json on `device`, with overrides as a user would type them."""
    parser = ConfigParser()
    parser.read_config(TRAIN)
    parser.update({"device": device, "perceptual_pretrained": False} | overrides)
    return parser


class StockLoop:
    """The reference's training loop (NV-Generate-CTMR, train_vae_tutorial.ipynb), less its host synchronisations.

    The perceptual term is this bundle's in both loops, so that neither needs torchvision and the ratio is that of
    the rest.
    """

    def __init__(
        self, device: str, amp: bool, parts: tuple[nn.Module, nn.Module, nn.Module] | None = None, lr: float = 1e-4
    ) -> None:
        self.autoencoder, self.discriminator, self.perceptual = parts or (
            *networks(True, device),
            quiet_perceptual(device),
        )
        self.adversarial = PatchAdversarialLoss(criterion="least_squares")
        self.adam_g = torch.optim.Adam(self.autoencoder.parameters(), lr, eps=1e-6)
        self.adam_d = torch.optim.Adam(self.discriminator.parameters(), lr, eps=1e-6)
        self.amp, self.device = amp, device

    def step(self, images: torch.Tensor) -> None:
        images = images.to(self.device, non_blocking=True)
        self.adam_g.zero_grad(set_to_none=True)
        self.adam_d.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            reconstruction, mu, sigma = self.autoencoder(images)
            variance = sigma.pow(2)
            kl = 0.5 * torch.sum(mu.pow(2) + variance - torch.log(variance + 1e-10) - 1, dim=[1, 2, 3, 4]).mean()
            p_loss = self.perceptual(reconstruction.float(), images.float())
            fake = self.discriminator(reconstruction.contiguous().float())[-1]
            adv = self.adversarial(fake, target_is_real=True, for_discriminator=False)
            (F.l1_loss(reconstruction, images) + 1e-7 * kl + 0.3 * p_loss + 0.1 * adv).backward()
            self.adam_g.step()
            fake = self.discriminator(reconstruction.contiguous().detach())[-1]
            loss_fake = self.adversarial(fake, target_is_real=False, for_discriminator=True)
            real = self.discriminator(images.contiguous().detach())[-1]
            loss_real = self.adversarial(real, target_is_real=True, for_discriminator=True)
            ((loss_fake + loss_real) * 0.5).backward()
            self.adam_d.step()


class OurLoop:
    """A training as configs/train.json has it, one step at a time, on images that are given.

    Only the data loader is missing, and the handlers that do not belong to a step, or read losses once a second. The
    discriminator counts from the first step.

    Args:
        device: "cpu" or "cuda".
        overrides: of the config, as a user would type them.
    """

    def __init__(self, device: str, **overrides: Any) -> None:
        parser = configured(device, **{"discriminator_start": 0} | overrides)
        guard = [handler for handler in parser["train"]["handlers"] if handler["_target_"].endswith(".Guard")]
        parser.update({"train#dataloader": [None], "train#handlers": guard})
        logging.getLogger("scripts.networks.lpips").setLevel(logging.ERROR)  # untrained features cost the same
        torch.manual_seed(0)
        self.trainer: VaeTrainer = parser.get_parsed_content("train#trainer")
        self.trainer.state.epoch = 1

    def step(self, images: torch.Tensor) -> None:
        state, count = self.trainer.state, len(images)
        state.iteration += 1
        state.batch = {"image": images, "path": ["volume"] * count, "error": [""] * count}
        state.output = self.trainer._iteration(self.trainer, state.batch)
        self.trainer.fire_event(Events.ITERATION_COMPLETED)


def step_tflop(size: int, **overrides: Any) -> float:
    """TFLOP of one step of `OurLoop` with one patch of size^3, of which nothing is computed.

    Without `activation_checkpointing`, which computes convolutions again, it is what any loop needs for that step.
    """
    trainer = OurLoop("cpu", **overrides).trainer
    trainer.update = lambda name, loss, frozen=(): loss.backward()  # type: ignore[method-assign]
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        trainer.state.iteration += 1
        trainer.step({"image": torch.empty(1, 1, size, size, size)})
    return counter.get_total_flops() / 1e12


def quiet_perceptual(device: str) -> PerceptualLoss:
    logging.getLogger("scripts.networks.lpips").setLevel(logging.ERROR)  # untrained features cost the same
    return PerceptualLoss(pretrained=False).to(device)


def make_loop(variant: str, device: str) -> Any:
    return OurLoop(device, **OURS[variant]) if variant in OURS else StockLoop(device, not variant.endswith("float32"))


class _Count(TorchDispatchMode):
    """Counts the ATen operators that are dispatched, or those of one name."""

    def __init__(self, name: str | None) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self.name in (None, function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def forward(network: nn.Module, images: torch.Tensor, amp: bool) -> torch.Tensor:
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        mu, sigma = network.encode(images)  # type: ignore[operator]
        return network.decode(mu + sigma)  # type: ignore[operator]


def count_operators(network: nn.Module, images: torch.Tensor, amp: bool, name: str | None = None) -> int:
    """Of one forward and backward pass of the autoencoder: all, or those called `name` ("convolution")."""
    with _Count(name) as counter:
        forward(network, images, amp).float().mean().backward()
    return counter.count


def saved_bytes(network: nn.Module, images: torch.Tensor, amp: bool) -> int:
    """Bytes that one forward pass of the autoencoder keeps for the backward pass, parameters excluded."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert forward(network, images, amp).requires_grad
    return sum(s.nbytes() for s in kept.values())


def gemm_rate(device: str, dtype: torch.dtype, size: int = 4096) -> float:
    """TFLOP/s of a product of two matrices of size^2, the best of six: what the machine could do."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = [timed(lambda: a @ b, device) for _ in range(6)]
    return 2 * size**3 / min(times) / 1e12


def timed(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def host_images(size: int, device: str) -> torch.Tensor:
    """A patch (1, 1, X, Y, Z) as the data loader hands it over: in main memory, pinned where it goes to a GPU."""
    images = torch.rand(1, 1, size, size, size, generator=torch.Generator().manual_seed(0))
    return images.pin_memory() if device == "cuda" else images


def seconds_a_step(loop: Any, images: torch.Tensor, device: str, steps: int = 0) -> float:
    """Of `steps` steps in a row, or as many as `STEPS` says; a GPU is waited for after the last one."""
    steps = steps or STEPS[device]
    return timed(lambda: [loop.step(images) for _ in range(steps)], device) / steps


def _peak(variant: str, size: int, device: str, queue: Any) -> None:
    """Peak memory in MiB of a process that makes two steps, less what it took before them."""
    loop, images = make_loop(variant, device), host_images(size, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(2):
            loop.step(images)
        queue.put((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    before = int(Path("/proc/self/statm").read_text().split()[1])
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        loop.step(images)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    queue.put(int(status["VmHWM"].split()[0]) / 1024 - before * 4096 / 2**20)


def peak_memory(variant: str, size: int, device: str) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(variant, size, device, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def time_table(size: int, repeats: int, device: str, rates: dict[str, float]) -> None:
    images = host_images(size, device)
    loops = {variant: make_loop(variant, device) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for loop in loops.values():
        loop.step(images)
    for _ in range(repeats):  # in turns, as the machine's speed drifts
        for variant, loop in loops.items():
            times[variant].append(seconds_a_step(loop, images, device))
    seconds = {variant: median(values) for variant, values in times.items()}
    tflop = step_tflop(size, **LIKE_STOCK)
    rows = []
    for variant, value in seconds.items():
        rate = rates["float32" if variant.endswith("float32") else "bfloat16"]
        ratios = [f"{value / seconds[stock]:.2f}" for stock in VARIANTS[:2]]
        rows.append((variant, f"{value:.3f}", *ratios, f"{tflop / value / rate:.0%}"))
    print_table((f"step at {size}^3", "seconds", "/ stock float32", "/ stock autocast", "of the GEMM rate"), rows)


def saved_table(size: int, device: str) -> None:
    rows, stock = [], 0
    images = torch.rand(1, 1, size, size, size, device=device)
    small = torch.rand(1, 1, 32, 32, 32, device=device)
    for name in ("stock autocast", "ours amp", CHECKPOINTING):
        network, _ = networks(name.startswith("stock"), device, activation_checkpointing=name == CHECKPOINTING)
        saved = saved_bytes(network, images, amp=True)
        stock = stock or saved
        counts = (f"{count_operators(network, small, True, kind)}" for kind in (None, "convolution"))
        rows.append((name, f"{saved / 2**30:.2f} GiB", f"{saved / stock:.1%}", *counts))
    head = (f"autocast bfloat16, {size}^3", "saved activations", "of stock", "operators", "convolutions")
    print_table(head, rows)


def peak_table(size: int, device: str) -> None:
    peaks = {v: peak_memory(v, size, device) for v in ("stock autocast", "ours amp", CHECKPOINTING)}
    rows = [(v, f"{p:.0f} MiB", f"{p / peaks['stock autocast']:.2f}") for v, p in peaks.items()]
    print_table((f"peak memory of two steps at {size}^3", "above the start", "of stock"), rows)


def main(sizes: list[int], repeats: int, device: str, memory_size: int, activation_size: int) -> None:
    side = 8192 if device == "cuda" else 4096
    rates = {"float32": gemm_rate(device, torch.float32, side), "bfloat16": gemm_rate(device, torch.bfloat16, side)}
    for size in sizes:
        time_table(size, repeats if size < 64 else max(repeats - 1, 1), device, rates)
    saved_table(activation_size, device)
    peak_table(memory_size, device)
    print_table(("the machine", "figure"), [(f"{name} GEMM", f"{rate:.3f} TFLOP/s") for name, rate in rates.items()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory_size", type=int, default=64)
    parser.add_argument("--activation_size", type=int, default=96)
    main(**vars(parser.parse_args()))
