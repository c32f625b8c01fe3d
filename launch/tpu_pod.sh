#!/usr/bin/env bash
# A TPU slice, or several, from the queue to the last checkpoint. See launch/README.md.
set -euo pipefail

usage() {
    cat <<'TEXT'
launch/tpu_pod.sh VERB [OPTION...] [-- ARGUMENTS OF calm_jax.train]

  create    ask for the slice and wait until it is there; asks again when there is no capacity
  setup     copy this repository to every host and install it there
  run       start training on every host, supervised, behind -- its arguments
  watch     create, setup and run, and again whenever the slice is preempted, until training is done
  logs      follow the log of the first host
  check     state of the slice, processes of every host, last line of the log
  stop      tell training to save and end
  delete    give the slice back

  --name NAME        of the slice (calm)             --type TYPE        v5litepod-16, v5p-8, v6e-16, ... (v5litepod-16)
  --zone ZONE        (gcloud's own default)          --project PROJECT  (gcloud's own default)
  --runtime VERSION  (by type)                       --slices N         slices that train together (1)
  --spot             cheaper, and may be taken away  --bucket BUCKET    mounted as ~/calm-data on every host (gcsfuse)
  --tries N          of create, 0 = for ever (0)     --wait SECONDS     between two looks (30)
  --dry-run          print the commands instead
TEXT
}

fail() { echo "error: $1" >&2; exit 2; }

verb=${1:-}
[[ -n $verb ]] || { usage; exit 2; }
shift
name=calm type=v5litepod-16 zone='' project='' runtime='' slices=1 spot='' bucket='' tries=0 wait=30 dry='' arguments=()
while (($#)); do
    case $1 in
        --name | --type | --zone | --project | --runtime | --slices | --bucket | --tries | --wait)
            (($# > 1)) || fail "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2 ;;
        --spot) spot=yes; shift ;;
        --dry-run) dry=yes; shift ;;
        --) shift; arguments=("$@"); break ;;
        *) fail "there is no option $1; launch/tpu_pod.sh without a verb lists them" ;;
    esac
done
for number in "$slices" "$tries" "$wait"; do
    [[ $number =~ ^[0-9]+$ ]] || fail "$number is not a whole number"
done
((slices >= 1)) || fail "--slices is at least 1"
if [[ -z $runtime ]]; then
    case $type in
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v4-*) runtime=tpu-ubuntu2204-base ;;
        *) fail "name the --runtime of $type" ;;
    esac
fi
where=()
[[ -z $zone ]] || where+=(--zone "$zone")
[[ -z $project ]] || where+=(--project "$project")
if ((slices == 1)); then nodes=("$name"); else mapfile -t nodes < <(seq -f "$name-%.0f" 0 $((slices - 1))); fi

# Runs a command, or prints it so that it can be pasted.
act() {
    if [[ -n $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi
}

state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo GONE; }

# On all hosts of all slices at the same time; fails when one fails.
everywhere() {
    local node pids=() failed=0
    for node in "${nodes[@]}"; do
        if [[ -n $dry ]]; then
            act gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command "$1"
        else
            gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command "$1" &
            pids+=($!)
        fi
    done
    for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
    return $failed
}

ask() {
    local how=(--accelerator-type "$type" --runtime-version "$runtime")
    if ((slices == 1)); then how+=(--node-id "$name"); else how+=(--node-prefix "$name" --node-count "$slices"); fi
    [[ -z $spot ]] || how+=(--spot)
    act gcloud compute tpus queued-resources create "$name" "${where[@]}" "${how[@]}"
}

give_back() { act gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; }

create() {
    local try=0 now
    while :; do
        try=$((try + 1))
        if ask; then
            [[ -z $dry ]] || return 0
            while :; do
                now=$(state)
                case $now in
                    ACTIVE) echo "$name is there"; return 0 ;;
                    FAILED | SUSPENDED | SUSPENDING | GONE) break ;;
                esac
                echo "$name: $now; looking again in $wait s"
                sleep "$wait"
            done
            echo "$name: $now, asking again (try $try)" >&2
            give_back || true
        else
            echo "$name was refused, asking again (try $try)" >&2
        fi
        ((tries == 0 || try < tries)) || { echo "error: no slice after $try tries" >&2; return 1; }
        sleep "$wait"
    done
}

setup() {
    local root archive node
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    archive=$(mktemp -d)/calm_jax.tar.gz
    act git -C "$root" archive --format=tar.gz -o "$archive" HEAD
    for node in "${nodes[@]}"; do
        act gcloud compute tpus tpu-vm scp "$archive" "$node:calm_jax.tar.gz" "${where[@]}" --worker=all
    done
    local install='mkdir -p calm_jax && tar -xzf calm_jax.tar.gz -C calm_jax && cd calm_jax && python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
    [[ -z $bucket ]] || install+=" && mkdir -p ~/calm-data && (mountpoint -q ~/calm-data || gcsfuse --implicit-dirs $bucket ~/calm-data)"
    everywhere "$install"
}

run() {
    ((${#arguments[@]})) || fail "run needs the arguments of calm_jax.train behind --"
    local words
    words=$(printf '%q ' "${arguments[@]}")
    everywhere "cd calm_jax && JAX_COMPILATION_CACHE_DIR=\$HOME/.cache/calm_jax setsid nohup .venv/bin/python -m calm_jax.supervise -- -m calm_jax.train --distributed on $words > \$HOME/calm.log 2>&1 < /dev/null & sleep 2; pgrep -f calm_jax.supervise > /dev/null"
}

# The last line that the first host has to say, and whether it still runs.
last() {
    gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command \
        'pgrep -f calm_jax.supervise > /dev/null && echo RUNNING; tail -n 1 calm.log | tr "\r" "\n" | tail -n 1' 2>/dev/null || echo UNREACHABLE
}

watch() {
    ((${#arguments[@]})) || fail "watch needs the arguments of calm_jax.train behind --"
    if [[ -n $dry ]]; then create; setup; run; return; fi
    while :; do
        [[ $(state) == ACTIVE ]] || { give_back > /dev/null 2>&1 || true; create; setup; run; }
        local said
        said=$(last)
        case $said in
            RUNNING*) ;;
            done:*) echo "$said"; return 0 ;;
            UNREACHABLE) ;;
            error:* | "supervisor: given up"*) echo "$said" >&2; return 1 ;;
            *) run ;;
        esac
        sleep "$wait"
    done
}

case $verb in
    create | setup | run | watch) "$verb" ;;
    logs) act gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command 'tail -n 100 -F calm.log' ;;
    check)
        act gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format='value(state.state)'
        # shellcheck disable=SC2016  # expanded on the hosts
        everywhere 'echo "$(hostname): $(pgrep -fc calm_jax.train || true) process(es); $(tail -n 1 calm.log | tr "\r" "\n" | tail -n 1)"' ;;
    stop) everywhere 'pkill -TERM -f calm_jax.supervise; while pgrep -f calm_jax.supervise > /dev/null; do sleep 2; done' ;;
    delete) give_back ;;
    *) fail "there is no verb $verb; they are create, setup, run, watch, logs, check, stop and delete" ;;
esac
