#!/usr/bin/env bash
# Train a ControlNet on chosen GPUs of this machine, further arguments being overrides:
#
#     GPU_IDS="0,2,4" scripts/train_controlnet_gpu.sh --controlnet_train#n_epochs 200
#
# The three files can be set from outside, as GPU_IDS is here, and so can all else that train_gpu.sh lists.
set -euo pipefail

ENVIRONMENT_FILE="${ENVIRONMENT_FILE:-docs/examples/environment_maisi_controlnet_train.json}"
TRAINING_FILE="${TRAINING_FILE:-docs/examples/config_maisi_controlnet_train.json}"
NETWORK_FILE="${NETWORK_FILE:-docs/examples/config_network_rflow.json}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec scripts/train_gpu.sh controlnet -e "$ENVIRONMENT_FILE" -c "$TRAINING_FILE" -t "$NETWORK_FILE" "$@"
