#!/usr/bin/env bash
# Run scripts/train_NAME.py with its three files on chosen GPUs of this machine, further arguments being overrides:
#
#     GPU_IDS="0,2,4" scripts/train_gpu.sh NAME -e FILE -c FILE -t FILE --seed 3
#
# train_NAME_gpu.sh does so with the files of docs/examples. What stands first below can be set from outside.
set -euo pipefail

GPU_IDS="${GPU_IDS:-0}"               # numbers among the GPUs that this shell sees, or all
CPU_PROCESSES="${CPU_PROCESSES:-}"    # set to a number to train with as many processes on the CPU instead
CONDA_ENV="${CONDA_ENV:-}"            # a conda environment to activate
VENV="${VENV:-}"                      # or a virtual environment's folder; else .venv, if there is one
# MASTER_PORT: a free one is chosen unless it is set.

fail() {
    echo "error: $*" >&2
    exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
name="${1:-}"
if [[ ! "$name" =~ ^[a-z_]+$ || ! -f "scripts/train_$name.py" ]]; then
    known=(scripts/train_*.py)
    known=("${known[@]#scripts/train_}")
    fail "there is no training '$name'; use one of ${known[*]%.py}"
fi
if [[ -n "$CONDA_ENV" ]]; then
    command -v conda >/dev/null || fail "CONDA_ENV is $CONDA_ENV, but there is no conda; load it first, or use VENV"
    # shellcheck disable=SC1091
    source "$(conda info --base)/etc/profile.d/conda.sh"
    set +u # some packages' activation scripts read variables that are not set
    conda activate "$CONDA_ENV"
    set -u
elif [[ -n "$VENV" || -f .venv/bin/activate ]]; then
    VENV="${VENV:-.venv}"
    [[ -f "$VENV/bin/activate" ]] || fail "VENV is $VENV, which has no bin/activate; give a virtual environment's folder"
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi

read -r CPU_PROCESSES <<<"$CPU_PROCESSES" # without the blanks around it
if [[ -n "$CPU_PROCESSES" ]]; then
    [[ "$CPU_PROCESSES" =~ ^[1-9][0-9]{0,3}$ ]] || fail "CPU_PROCESSES is $CPU_PROCESSES; use a number of processes, 2 say"
    export CUDA_VISIBLE_DEVICES=""
    processes="$CPU_PROCESSES"
else
    count="$(python -W ignore -c 'from scripts.common import errors, ranks; errors.install(); print(ranks.usable_gpus())')"
    [[ "$count" -gt 0 ]] || fail "GPU_IDS is $GPU_IDS, but this machine shows no GPU; set CPU_PROCESSES=2 to try on the CPU"
    if [[ "$GPU_IDS" =~ ^[[:space:]]*all[[:space:]]*$ ]]; then
        GPU_IDS="$(seq -s, 0 $((count - 1)))"
    fi
    IFS=, read -ra ids <<<"$GPU_IDS," # the comma keeps an empty last item
    shown="${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}"
    IFS=, read -ra visible <<<"${shown//[[:space:]]/}"
    chosen=()
    for id in "${ids[@]}"; do
        read -r id <<<"$id"
        [[ -n "$id" ]] || fail "GPU_IDS is $GPU_IDS: a number is missing beside a comma; use e.g. 0,2 or all"
        [[ "$id" =~ ^(0|[1-9][0-9]{0,3})$ && "$id" -lt "$count" ]] ||
            fail "GPU_IDS is $GPU_IDS: there is no GPU $id; this machine shows 0 to $((count - 1))"
        [[ " ${chosen[*]-} " != *" ${visible[$id]} "* ]] || fail "GPU_IDS is $GPU_IDS: GPU $id is named twice"
        chosen+=("${visible[$id]}")
    done
    CUDA_VISIBLE_DEVICES="$(IFS=,; echo "${chosen[*]}")"
    export CUDA_VISIBLE_DEVICES
    processes="${#chosen[@]}"
fi

exec python "scripts/train_$name.py" -g "$processes" "${@:2}"
