#!/usr/bin/env bash
# Trains on all GPUs of this host, in one process, and goes on after a crash. See launch/README.md.
#     launch/gpu_8xa100.sh [--dry-run] [-- ARGUMENTS OF calm_jax.train]
set -euo pipefail

dry=''
while (($#)); do
    case $1 in
        --dry-run) dry=yes; shift ;;
        --) shift; break ;;
        *) break ;;
    esac
done
(($#)) || set -- --config configs/finetune.py:7b

python=${PYTHON:-.venv/bin/python}
# Compiled programs are kept: the second start takes seconds. JAX takes nearly all of a GPU's memory at once, so that
# nothing is lost to pieces between the buffers.
environment=(
    "JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/calm_jax}"
    "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}"
    "XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}"
)
command=(env "${environment[@]}" "$python" -m calm_jax.supervise -- -m calm_jax.train "$@")
if [[ -n $dry ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
exec "${command[@]}"
