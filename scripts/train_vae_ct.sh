#!/usr/bin/env bash
# Train under Slurm, on one node or more, further arguments being overrides:
#
#     sbatch scripts/train_vae_ct.sh
#     sbatch --nodes=2 --gres=gpu:8 --time=3-00:00:00 scripts/train_vae_ct.sh --autoencoder_train#n_epochs 300
#
# GPU_IDS, CPU_PROCESSES, the three files and the environment are set as for train_vae_ct_gpu.sh, which runs on each
# node. Three minutes before the time limit the training is asked to stop: it saves, the job is requeued, and goes on.

#SBATCH --job-name=vae_train_ct
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=logs/vae_train_ct_%j.out
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:?submit this with sbatch from the root of the bundle}"
export GPU_IDS="${GPU_IDS:-all}"
export NNODES="$SLURM_JOB_NUM_NODES"
if [[ "$NNODES" -gt 1 ]]; then
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    export MASTER_ADDR
    export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
fi
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"

stopping=""
trap 'stopping=yes; echo "asked to stop; forwarding to the training"; kill -USR1 "$step"' USR1
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 scripts/train_vae_ct_gpu.sh "$@" &
step=$!
status=0
wait "$step" || status=$?
while kill -0 "$step" 2>/dev/null; do # wait returns early when the trap has run
    status=0
    wait "$step" || status=$?
done

if [[ -n "$stopping" && "$status" -ne 0 ]]; then
    echo "requeued; the training goes on from its checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$status"
