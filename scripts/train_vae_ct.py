"""Train with the guide's three files: python scripts/train_vae_ct.py -e ENV -c NETWORK -t TRAINING -g N"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.training.launcher import Door, Kind, main  # noqa: E402

DOOR = Door(
    __doc__,
    "configs/train.json",
    "configs/multi_gpu_train.json",
    c=Kind("--config-file", "autoencoder_def", "the networks: autoencoder_def, ..."),
    t=Kind("--training-config", "autoencoder_train", "the knobs: data_option and autoencoder_train"),
)

if __name__ == "__main__":
    main(DOOR)
