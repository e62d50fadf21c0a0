#!/usr/bin/env bash
# Train the autoencoder on chosen GPUs of this machine, further arguments being overrides:
#
#     GPU_IDS="0,2,4" scripts/train_vae_ct_gpu.sh --autoencoder_train#n_epochs 300
#
# The three files can be set from outside, as GPU_IDS is here, and so can all else that train_gpu.sh lists.
set -euo pipefail

ENVIRONMENT_FILE="${ENVIRONMENT_FILE:-docs/examples/environment_maisi_vae_train.json}"
NETWORK_FILE="${NETWORK_FILE:-docs/examples/config_network.json}"
TRAINING_FILE="${TRAINING_FILE:-docs/examples/config_maisi_vae_train.json}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec scripts/train_gpu.sh vae_ct -e "$ENVIRONMENT_FILE" -c "$NETWORK_FILE" -t "$TRAINING_FILE" "$@"
