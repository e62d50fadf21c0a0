"""LPIPS (Zhang et al. 2018) on slices of volumes, in pure torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.weights import read_tensors

logger = logging.getLogger(__name__)

# LPIPS v0.1 (Zhang et al. 2018): channel statistics, and SqueezeNet 1.1 up to its last tap (Iandola et al. 2016).
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_TAPS = (1, 4, 7, 9, 10, 11, 12)
_TAP_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
_FIRE = {3: (64, 16, 64), 4: (128, 16, 64), 6: (128, 32, 128), 7: (256, 32, 128)}
_FIRE |= {9: (256, 48, 192), 10: (384, 48, 192), 11: (384, 64, 256), 12: (512, 64, 256)}
_POOLS = (2, 5, 8)
_FETCH = "fetch them with python -m monai.bundle download_large_files --bundle_path ."
_SMALLEST = 17  # pixels that its strides leave something of


class _Fire(nn.Module):
    """Fewer channels, then twice `expand` of them, half from 1 x 1 and half from 3 x 3 convolutions."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x), inplace=True)
        return F.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1), inplace=True)


class SqueezeNetFeatures(nn.Module):
    """The convolutional part of SqueezeNet 1.1, with torchvision's parameter names (`features.3.squeeze.weight`)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(max(_TAPS) + 1):
            if index in _FIRE:
                layers.append(_Fire(*_FIRE[index]))
            elif index in _POOLS:
                layers.append(nn.MaxPool2d(3, stride=2, ceil_mode=True))
            else:
                layers.append(nn.Conv2d(3, 64, 3, stride=2) if index == 0 else nn.ReLU())
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features (B, C, H', W') at the seven taps of images (B, 3, H, W)."""
        taps = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in _TAPS:
                taps.append(x)
        return taps


class PerceptualLoss(nn.Module):
    """LPIPS (SqueezeNet 1.1, version 0.1) on slices of volumes, in pure torch.

    What `monai.losses.PerceptualLoss(3, "squeeze", is_fake_3d=True, fake_3d_ratio=0.2)` computes, images in [0, 1]
    not rescaled to [-1, 1] as there, but from two weight files on disk: nothing is downloaded at run time, and no
    torchvision is needed. Slices are chosen for each sample of the batch by itself.

    Args:
        pretrained: false draws untrained features from a fixed seed: they need no files, and measure less.
        backbone_path: `squeezenet1_1-b8a52dc0.pth`, as torchvision publishes it.
        linear_path: `lpips_squeeze_v0.1.pth`, as the LPIPS authors publish it.
        slice_ratio: share of the slices along each axis that is compared.

    Raises:
        UserError: naming the weight file that is missing or does not fit.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        pretrained: bool = True,
        backbone_path: str | Path = "models/squeezenet1_1-b8a52dc0.pth",
        linear_path: str | Path = "models/lpips_squeeze_v0.1.pth",
        slice_ratio: float = 0.2,
    ) -> None:
        super().__init__()
        self.slice_ratio = slice_ratio
        self.backbone = _backbone(Path(backbone_path) if pretrained else None)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        for index, channels in enumerate(_TAP_CHANNELS):
            self.register_buffer(f"linear{index}", torch.full((channels,), 1.0 / channels))
        if pretrained:
            self._load_linear(Path(linear_path))
        self.eval().requires_grad_(False)

    def _load_linear(self, path: Path) -> None:
        linear = _read(path)
        names = [f"lin{index}.model.1.weight" for index in range(len(_TAPS))]
        shapes = {name: torch.Size((1, c, 1, 1)) for name, c in zip(names, _TAP_CHANNELS, strict=True)}
        check_shapes(linear, shapes, path)
        for index, name in enumerate(names):
            getattr(self, f"linear{index}").copy_(linear[name].flatten())

    def train(self, mode: bool = True) -> PerceptualLoss:
        """Always in evaluation mode: it is a measure, not something that learns."""
        return super().train(False)

    def features(self, slices: torch.Tensor) -> list[torch.Tensor]:
        """Unit-normalised features at the seven taps of slices (N, 1, H, W)."""
        taps = self.backbone((_large_enough(slices) - self.shift) / self.scale)
        return [tap / (tap.square().sum(1, keepdim=True) + 1e-10).sqrt() for tap in (t.float() for t in taps)]

    def distance(self, slices: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """LPIPS of each pair of slices (N, 1, H, W): (N,). No graph is built for `target`."""
        with torch.no_grad():
            wanted = self.features(target)
        total = slices.new_zeros(len(slices), dtype=torch.float32)
        for index, (ours, theirs) in enumerate(zip(self.features(slices), wanted, strict=True)):
            weight = getattr(self, f"linear{index}").reshape(1, -1, 1, 1)
            total = total + ((ours - theirs).square() * weight).sum(1).mean((1, 2))
        return total

    def forward(
        self, reconstruction: torch.Tensor, target: torch.Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Sum over the three axes of the mean LPIPS of the chosen slices.

        Args:
            reconstruction: (B, 1, X, Y, Z).
            target: in the same shape, in [0, 1].
            generators: one for each sample, on the CPU, that choose its slices; None takes evenly spaced slices, so
                that a validation is deterministic.
        """
        loss = reconstruction.new_zeros((), dtype=torch.float32)
        for axis in (2, 3, 4):
            picks = [self._pick(target.shape[axis], generators[b] if generators else None) for b in range(len(target))]
            loss = loss + self._mean_distance(_slices(reconstruction, axis, picks), _slices(target, axis, picks))
        return loss

    @torch.no_grad()
    def lpips(self, reconstruction: torch.Tensor, target: torch.Tensor, chunk: int = 16) -> float:
        """The mean over the three axes of the mean LPIPS of evenly spaced slices of volumes (X, Y, Z) on any device."""
        device, total = self.shift.device, 0.0
        for axis in range(3):
            picks = self._pick(target.shape[axis], None)
            ours, theirs = (_slices(v[None, None], axis + 2, [picks]).split(chunk) for v in (reconstruction, target))
            pairs = zip(ours, theirs, strict=True)
            total += float(torch.cat([self.distance(a.to(device), b.to(device)) for a, b in pairs]).mean()) / 3
        return total

    def _pick(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Which of `count` slices are compared: drawn, or evenly spaced where there is no generator."""
        wanted = max(int(count * self.slice_ratio), 1)
        if generator is None:
            return ((torch.arange(wanted) + 0.5) * (count / wanted)).long()
        return torch.randperm(count, generator=generator)[:wanted]

    def _mean_distance(self, slices: torch.Tensor, target: torch.Tensor, chunk: int = 16) -> torch.Tensor:
        """The mean over pairs; of a volume's many slices, only `chunk` are held as features where nothing learns."""
        if torch.is_grad_enabled() or len(slices) <= chunk:
            return self.distance(slices, target).mean()
        pairs = zip(slices.split(chunk), target.split(chunk), strict=True)
        return torch.cat([self.distance(a, b) for a, b in pairs]).mean()


class PooledSqueezeNet(nn.Module):
    """What the convolutional part of SqueezeNet 1.1 makes of slices, averaged over space: features for an FID.

    Slices are scaled to ImageNet's statistics, as the network was trained.

    Args:
        pretrained: false draws untrained features from a fixed seed: they need no file, and measure less.
        backbone_path: `squeezenet1_1-b8a52dc0.pth`, as torchvision publishes it.

    Raises:
        UserError: naming the weight file that is missing or does not fit.
    """

    features = _TAP_CHANNELS[-1]
    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self, pretrained: bool = True, backbone_path: str | Path = "models/squeezenet1_1-b8a52dc0.pth"
    ) -> None:
        super().__init__()
        self.label = "SqueezeNet 1.1 (ImageNet)" if pretrained else "SqueezeNet 1.1, untrained"
        self.backbone = _backbone(Path(backbone_path) if pretrained else None)
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # 2.6 times as fast on a CPU

    def forward(self, slices: torch.Tensor, chunk: int = 8) -> torch.Tensor:
        """Of slices (N, 1, H, W) in [0, 1], on any device: (N, 512), of which `chunk` are computed at a time."""
        pooled = []
        for few in slices.split(chunk):
            # LPIPS's statistics are ImageNet's for images in [-1, 1].
            scaled = (2 * _large_enough(few.to(self.shift.device)) - 1 - self.shift) / self.scale
            pooled.append(self.backbone(scaled)[-1].mean((2, 3)))
        return torch.cat(pooled)


def lpips_if_there(
    backbone_path: str, linear_path: str, device: torch.device | str, slice_ratio: float = 0.2
) -> PerceptualLoss | None:
    """`PerceptualLoss` with its published weights, on `device`, or None, said in the log, where these are missing."""
    missing = [path for path in (backbone_path, linear_path) if not Path(path).is_file()]
    if missing:
        logger.warning("LPIPS is left out: %s is missing; %s", missing[0], _FETCH)
        return None
    return PerceptualLoss(True, backbone_path, linear_path, slice_ratio).to(device)


def _backbone(path: Path | None) -> SqueezeNetFeatures:
    """SqueezeNet with the weights of a file; None: untrained ones from a fixed seed, with a warning."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = SqueezeNetFeatures()
        for layer in backbone.modules():
            if isinstance(layer, nn.Conv2d):  # keeps the size of features through the layers
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    if path is None:
        logger.warning("perceptual_pretrained is false: untrained features, for tries only")
        return backbone
    weights, own = _read(path), backbone.state_dict()
    check_shapes(weights, {name: tensor.shape for name, tensor in own.items()}, path)
    backbone.load_state_dict({name: weights[name] for name in own})
    return backbone


def _large_enough(slices: torch.Tensor) -> torch.Tensor:
    """Slices (N, 1, H, W), their border repeated where they are thinner than SqueezeNet can take."""
    height, width = (max(_SMALLEST - n, 0) for n in slices.shape[2:])
    return F.pad(slices, (0, width, 0, height), mode="replicate") if height or width else slices


def _slices(volumes: torch.Tensor, axis: int, picks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of volumes (B, 1, X, Y, Z), the slices across `axis` (2, 3 or 4) that are picked for each: (N, 1, H, W)."""
    chosen = []
    for volume, pick in zip(volumes, picks, strict=True):  # (1, X, Y, Z); selected before anything is copied
        few = volume.index_select(axis - 1, pick.to(volume.device, non_blocking=True))
        chosen.append(few[0].movedim(axis - 2, 0)[:, None])
    return torch.cat(chosen)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"{path}: perceptual weights are missing; {_FETCH}, or set perceptual_pretrained to false for a try"
        )
    return read_tensors(path, f"{path}: is damaged or holds more than tensors", "; fetch it again")


def check_shapes(state: Any, shapes: dict[str, torch.Size], path: str | Path) -> None:
    """Whether a file's tensors have these names and shapes; what else it holds does not matter.

    Raises:
        UserError: naming the first tensor that is missing or of another shape.
    """
    for name, shape in shapes.items():
        tensor = state.get(name) if isinstance(state, dict) else None
        found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else "missing"
        if found != shape:
            raise UserError(f"{path}: {name} is {found}, expected {tuple(shape)}; this is another file, fetch it again")
