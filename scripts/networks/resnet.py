"""ResNet50 as RadImageNet trained it (Mei et al. 2022), in pure torch: features for an FID of medical images."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scripts.common.errors import UserError
from scripts.networks.lpips import PooledSqueezeNet, check_shapes
from scripts.networks.weights import read_tensors

# Keras's ResNet50, whose weights these are: convolutions have biases, and a block's first one has its stride.
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))  # width, blocks
_EXPANSION, _EPSILON = 4, 1.001e-5
_MEAN = (0.406, 0.456, 0.485)  # of blue, green and red, in this order


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = _EXPANSION * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, stride), nn.BatchNorm2d(width, _EPSILON)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, _EPSILON)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1), nn.BatchNorm2d(outputs, _EPSILON)
        self.downsample: nn.Module = nn.Identity()
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs, _EPSILON))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x), inplace=True)


class RadImageNetResNet50(nn.Module):
    """What RadImageNet's ResNet50 makes of slices, averaged over space, as MAISI's published 2.5D FID has it.

    Args:
        path: `RadImageNet-ResNet50_notop.pth`, the state dict that torch.hub's Warvito/radimagenet-models loads
            (`conv1.weight`, `conv1.bias`, `bn1.*`, `layer1.0.conv1.weight`, ..., `layer1.0.downsample.0.weight`, ...).

    Raises:
        UserError: naming the file, where it is missing or does not fit.
    """

    features, label = _EXPANSION * _STAGES[-1][0], "ResNet50 (RadImageNet)"
    mean: torch.Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3), nn.BatchNorm2d(64, _EPSILON)
        inputs = 64
        for number, (width, blocks) in enumerate(_STAGES, 1):
            first = _Bottleneck(inputs, width, stride=1 if number == 1 else 2)
            inputs = _EXPANSION * width
            rest = [_Bottleneck(inputs, width) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self._load(Path(path))
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # faster on a CPU

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such weights file; correct radimagenet_path, or leave it out")
        weights = read_tensors(path, f"{path}: is damaged or holds more than tensors", "; fetch it again")
        own = {name: t for name, t in self.state_dict().items() if not name.endswith("num_batches_tracked")}
        check_shapes(weights, {name: tensor.shape for name, tensor in own.items()}, path)
        self.load_state_dict({name: weights[name] for name in own}, strict=False)

    def forward(self, slices: torch.Tensor, chunk: int = 8) -> torch.Tensor:
        """Of slices (N, 1, H, W) in [0, 1] of one plane, on any device: (N, 2048), `chunk` computed at a time.

        As in NV-Generate-CTMR, their common minimum and maximum become 0 and 1, then ImageNet's mean is subtracted.
        """
        low, high = slices.min(), slices.max()
        pooled = []
        for few in slices.split(chunk):
            x = ((few - low) / (high - low + 1e-10)).to(self.mean.device) - self.mean
            x = F.max_pool2d(F.relu(self.bn1(self.conv1(x)), inplace=True), 3, 2, padding=1)
            for number in range(1, len(_STAGES) + 1):
                x = self.get_submodule(f"layer{number}")(x)
            pooled.append(x.mean((2, 3)))
        return torch.cat(pooled)


def feature_networks(backbone_path: str, pretrained: bool = True, radimagenet_path: str | None = None) -> nn.ModuleDict:
    """The networks whose features an FID is of: SqueezeNet, and RadImageNet's ResNet50 where its file is given.

    Args:
        backbone_path: see `PooledSqueezeNet`.
        pretrained: see `PooledSqueezeNet`.
        radimagenet_path: see `RadImageNetResNet50`; None leaves it out.

    Returns:
        by `squeezenet` and `radimagenet`; each has a `label` and how many `features` it gives.
    """
    networks: dict[str, nn.Module] = {"squeezenet": PooledSqueezeNet(pretrained, backbone_path)}
    if radimagenet_path:
        networks["radimagenet"] = RadImageNetResNet50(radimagenet_path)
    return nn.ModuleDict(networks)
