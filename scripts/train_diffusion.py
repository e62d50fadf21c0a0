"""Train latent diffusion with three files: python scripts/train_diffusion.py -e ENV -c TRAINING -t NETWORK -g N"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.training.launcher import Door, Kind, main  # noqa: E402

DOOR = Door(
    __doc__,
    "configs/train_diffusion.json",
    "configs/multi_gpu_train_diffusion.json",
    c=Kind("--model_config_path", "diffusion_unet_train", "the knobs: diffusion_unet_train, diffusion_unet_inference"),
    t=Kind("--model_def_path", "diffusion_unet_def", "the networks: diffusion_unet_def, noise_scheduler, ..."),
)

if __name__ == "__main__":
    main(DOOR)
