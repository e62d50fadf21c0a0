#!/usr/bin/env bash
# The sbatch script under a real Slurm: one node, on loopback, brought up here as root and taken down at the end.
#
#     tests/slurm/run.sh [keep]
#
# Job 1 trains to its end on two CPU processes. Job 2 is asked to stop, is requeued, and goes on. Needs Debian's
# slurm-wlm and munge, and the requirements in .venv or on PATH. With `keep`, the logs stay in the folder it names.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

for tool in slurmctld slurmd munged sbatch; do
    command -v "$tool" >/dev/null || { echo "skipped: no $tool (apt-get install slurm-wlm munge)"; exit 77; }
done
[[ "$(id -u)" -eq 0 ]] || { echo "skipped: slurmd runs as root only"; exit 77; }

dir="$(mktemp -d)"
jobs_done() { ! squeue --noheader --states=all --format=%T | grep -qvE 'COMPLETED|FAILED|CANCELLED|TIMEOUT'; }
finish() {
    scancel --user=root 2>/dev/null || true
    for name in slurmd slurmctld munged; do
        [[ ! -f "$dir/$name.pid" ]] || kill "$(cat "$dir/$name.pid")" 2>/dev/null || true
    done
    sleep 1
    if [[ "$keep" == keep ]]; then echo "logs are in $dir"; else rm -rf "$dir"; fi
}
keep="${1:-}"
trap finish EXIT

node="$(hostname -s)"
export SLURM_CONF="$dir/slurm.conf"
cat >"$SLURM_CONF" <<CONF
ClusterName=loopback
FirstJobId=$((1000000 + RANDOM))
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmctldPort=26817
SlurmdPort=26818
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
ReturnToService=2
KillWait=10
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$node Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p "$dir/state" "$dir/spool"
head -c 1024 /dev/urandom >"$dir/munge.key"
chmod 600 "$dir/munge.key"
chmod 755 "$dir"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
slurmctld
slurmd
for _ in $(seq 60); do
    [[ "$(sinfo --noheader --format=%T 2>/dev/null)" == idle ]] && break
    sleep 1
done
sinfo

# shellcheck disable=SC1091
[[ ! -f .venv/bin/activate ]] || source .venv/bin/activate
python -m scripts.phantom write --output_dir "$dir/phantoms" --count 6 2>/dev/null
python -m scripts.datalist build --data_dir "$dir/phantoms" --val_fraction 0.3 --test_fraction 0 --output "$dir/datalist.json"

submit() { # name, epochs
    CPU_PROCESSES=2 sbatch --parsable --gres=none --cpus-per-task="$(nproc)" scripts/train_vae_ct.sh \
        --json_data_list "$dir/datalist.json" --store_dir "$dir/store" --num_workers 1 --perceptual_pretrained False \
        --model_dir "$dir/$1/models" --output_dir "$dir/$1/outputs" --tfevent_path "$dir/$1/outputs/tfevent_ct" \
        --autoencoder_def#num_channels "[8,8,8]" --autoencoder_def#num_res_blocks "[1,1,1]" \
        --autoencoder_def#norm_num_groups 8 --discriminator_def#channels 8 \
        --autoencoder_train#patch_size "[32,32,32]" --autoencoder_train#n_epochs "$2"
}
fail() {
    echo "error: $1; the log:" >&2
    cat "$2" >&2
    exit 1
}
wait_for() { # text, log
    for _ in $(seq 300); do
        grep -q "$1" "$2" 2>/dev/null && return
        ! jobs_done || break
        sleep 1
    done
    grep -q "$1" "$2" || fail "no '$1'" "$2"
}

job="$(submit whole 2)"
log="logs/vae_train_ct_$job.out"
wait_for "epochs  *2" "$log"
until jobs_done; do sleep 1; done
[[ "$(grep -c 'epoch [12]/2: loss' "$log")" -eq 2 ]] || fail "job $job: not two epochs" "$log"
[[ "$(scontrol show job "$job" | grep -o 'JobState=[A-Z]*')" == JobState=COMPLETED ]] || fail "job $job: not completed" "$log"
[[ -f "$dir/whole/models/autoencoder.pt" ]] || fail "job $job: no model" "$log"
echo "job $job completed: two epochs in $log"
whole="$job"

job="$(submit stopped 12)"
log="logs/vae_train_ct_$job.out"
wait_for "epoch 2/12: loss" "$log"
scancel --signal=USR1 --batch "$job"
wait_for "requeued" "$log"
grep -q "stopped by SIGUSR1 after step" "$log" || fail "job $job: the training did not stop by itself" "$log"
wait_for "resuming from" "$log"
wait_for "epochs  *12" "$log"
until jobs_done; do sleep 1; done
for epoch in $(seq 12); do
    [[ "$(grep -c "epoch $epoch/12: loss" "$log")" -eq 1 ]] || fail "job $job: epoch $epoch is not there once" "$log"
done
rm "logs/vae_train_ct_$whole.out" "$log"
echo "job $job was asked to stop, requeued, and completed"
