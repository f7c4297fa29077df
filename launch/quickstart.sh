#!/usr/bin/env bash
# From a fresh clone to a score file of a real model, and with --prune on to a smaller model.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [--processes N] [--prune] [key=value ...]

Scores SmolLM2-135M-Instruct on a text that ships with the project, tensor-parallel under torchrun, and shows the result.
Needs Python 3.10-3.12, pip, about 4 GB of disk and 4 GB of memory; no GPU, no model at hand. The first run installs
into the active virtual environment, or into .venv, which is made where there is none. Result: megascore-quickstart/

  --prune         go on from the scores: plan a model with at most 80 % of its size, make it, and say what it lost on the
                  beginning of another novel, beside the same plan with channels taken at random; some minutes more
  --processes N   ranks to start: 1 or 3, or more with other parallel.* settings (default: 3; 1 with one or two GPUs)
  key=value       settings over those of launch/quickstart.yaml, such as data.num_samples=64 or run.steps=0 (dry run);
                  relative paths start at the checkout

Environment variables: MEGASCORE_PYTHON, the Python 3.10-3.12 to make .venv with; MEGASCORE_TORCH, such as
torch==2.12.1, the torch to install where there is none; XDG_CACHE_HOME, where the converted model is kept (0.5 GB).
END
}

fail_usage() {
    printf 'error: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

processes=""
prune=""
while :; do
    case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    --prune)
        prune=yes
        shift
        ;;
    --processes)
        processes="${2:-}"
        case "$processes" in "" | 0* | *[!0-9]*) fail_usage "--processes takes a number of at least 1, got '$processes'" ;; esac
        shift 2
        ;;
    *) break ;;
    esac
done

# What the job writes, and whether it writes: a later override wins, as in megascore itself.
output="megascore-quickstart/scores.safetensors"
dry_run=""
for override in "$@"; do
    case "$override" in
    run.output=*) output="${override#run.output=}" ;;
    run.steps=0) dry_run=yes ;;
    run.steps=*) dry_run="" ;;
    -*) fail_usage "unknown option '$override'" ;;
    ?*=*) ;;
    *) fail_usage "'$override' is not key=value" ;;
    esac
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_environment.sh
. launch/_environment.sh

use_environment
install_project megatron,huggingface,quickstart

model=$("$PYTHON" launch/smollm2.py) || die "SmolLM2 could not be converted, see above."
mkdir -p megascore-quickstart || die "$PWD/megascore-quickstart cannot be made: is $PWD writable?"

# SmolLM2 has 9 heads and 3 KV heads: 3 ranks, or 1.
num_gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
if [ -z "$processes" ]; then
    case "$num_gpus" in 1 | 2) processes=1 ;; *) processes=3 ;; esac
fi
layout="parallel.tensor=1"
[ "$processes" -eq 1 ] || layout="parallel.tensor=$processes parallel.sequence=true"

if [ -z "${OMP_NUM_THREADS:-}" ]; then
    num_cores=$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')
    OMP_NUM_THREADS=$((num_cores > processes ? num_cores / processes : 1))
fi
export OMP_NUM_THREADS
# All ranks are on this machine: gloo need not look up its name, which fails in many containers and VPNs.
case "$(uname -s)" in
Linux) export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}" ;;
Darwin) export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo0}" ;;
esac

[ -z "$prune" ] || [ -z "$dry_run" ] || fail_usage "a dry run (run.steps=0) makes no scores to prune by"

run_ranks() {
    "$PYTHON" -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" \
        -m megascore "$@"
}

say "Scoring with $processes process(es), $layout"
# $layout is two words.
# shellcheck disable=SC2086
run_ranks score launch/quickstart.yaml "model.hf=$model" $layout "$@"

if [ -z "$dry_run" ]; then
    say "The scores are in $output; look again with: $PYTHON -m megascore show $output"
fi

if [ -n "$prune" ]; then
    plan="megascore-quickstart/plan.yaml"
    smaller="megascore-quickstart/smaller"
    say "Planning a model with at most 80 % of the parameters"
    "$PYTHON" -m megascore plan "$output" params=80% "tensor_parallel=$processes" "model=$model" --to "$plan" --overwrite
    say "Pruning"
    rm -rf "$smaller"
    "$PYTHON" -m megascore prune "$plan" "$model" "$smaller"
    say "Evaluating on the beginning of Persuasion, which was not scored on"
    # shellcheck disable=SC2086
    run_ranks evaluate launch/quickstart.yaml "model.hf=$model" $layout "$@" data.text=launch/text/persuasion.txt \
        data.num_samples=16 "smaller=$smaller" json=megascore-quickstart/evaluation.json
    say "The smaller model is in $smaller, the plan in $plan: edit it, and prune again"
fi
