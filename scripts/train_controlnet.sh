#!/usr/bin/env bash
# Train a ControlNet under Slurm, on one node or more, further arguments being overrides:
#
#     sbatch scripts/train_controlnet.sh
#     sbatch --nodes=2 --gres=gpu:8 --time=3-00:00:00 scripts/train_controlnet.sh --controlnet_train#n_epochs 200
#
# GPU_IDS, CPU_PROCESSES, the three files and the environment are set as for train_controlnet_gpu.sh, which runs on each
# node. Three minutes before the time limit the training is asked to stop: it saves, the job is requeued, and goes on.

#SBATCH --job-name=controlnet_train_ct
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/controlnet_train_ct_%j.out

# shellcheck disable=SC1091
source "${SLURM_SUBMIT_DIR:?submit this with sbatch from the root of the bundle}/scripts/train_slurm.sh" \
    scripts/train_controlnet_gpu.sh "$@"
