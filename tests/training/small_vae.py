"""A small autoencoder and its discriminator, ready to train on random patches."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets import PatchDiscriminator
from torch.utils.data import DataLoader, Dataset

from scripts.networks.lpips import PerceptualLoss
from scripts.networks.recompute import FastAutoencoderKlMaisi
from scripts.training.losses import LeastSquaresAdversarialLoss, VaeLoss
from scripts.training.vae import VaeTrainer
from tests.helpers import stock_network


class Patches(Dataset):
    def __init__(self, count: int, size: int = 24) -> None:
        self.images = torch.rand(count, 1, size, size, size, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        return {"image": self.images[index], "path": f"{index}.nii.gz", "error": ""}


def make_trainer(
    batch_size: int = 2,
    steps: int = 3,
    amp: bool = False,
    size: int = 24,
    layers: int = 2,
    fused: bool = False,
    handlers: Any = None,
) -> VaeTrainer:
    torch.manual_seed(0)
    autoencoder = FastAutoencoderKlMaisi(stock_network())
    discriminator = PatchDiscriminator(spatial_dims=3, channels=8, in_channels=1, num_layers_d=layers, norm="INSTANCE")
    return VaeTrainer(
        device="cpu",
        max_epochs=1,
        train_data_loader=DataLoader(Patches(batch_size * steps, size), batch_size),
        networks={"autoencoder": autoencoder, "discriminator": discriminator},
        # eps well above the rounding of gradients, which would else decide the sign of some steps
        optimizers={
            "optimizer_g": torch.optim.Adam(autoencoder.parameters(), 1e-4, eps=1e-3, fused=fused),
            "optimizer_d": torch.optim.Adam(discriminator.parameters(), 1e-4, eps=1e-3, fused=fused),
        },
        train_handlers=handlers,
        generator_loss=VaeLoss(PerceptualLoss(pretrained=False)),
        adversarial_loss=LeastSquaresAdversarialLoss(),
        amp=amp,
        seed=11,
    )
