"""Train a ControlNet with three files: python scripts/train_controlnet.py -e ENV -c TRAINING -t NETWORK -g N"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.training.launcher import Door, Kind, main  # noqa: E402

DOOR = Door(
    __doc__,
    "configs/train_controlnet.json",
    "configs/multi_gpu_train_controlnet.json",
    c=Kind("--model_config_path", "controlnet_train", "the knobs: controlnet_train"),
    t=Kind(
        "--model_def_path", "controlnet_def", "the networks: controlnet_def, diffusion_unet_def, noise_scheduler, ..."
    ),
)

if __name__ == "__main__":
    main(DOOR)
