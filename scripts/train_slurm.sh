# shellcheck shell=bash
# What a job does, for the scripts that sbatch takes: run the launcher given as arguments, with the overrides that
# follow, on each node. Slurm copies those scripts elsewhere, so that they find this one by the folder of submission.
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
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
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "$@" &
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
