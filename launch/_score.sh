# shellcheck shell=bash
# shellcheck disable=SC2034  # variables that the scripts read
# Sourced by score.sh and score_nodes.sh: their arguments, the Python that has megascore, the environment, the start.
# Runs under bash 3.2, the one that macOS has. The caller's working directory stays: a job's relative paths start there.

LAUNCH_FOLDER=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/_environment.sh
. "$LAUNCH_FOLDER/_environment.sh"

OPTIONS_HELP="  --nproc-per-node N   ranks on each node (default: one for each GPU that is visible, 1 without)
  --max-restarts N     times that all ranks start again after one failed, from the last checkpoint (default: 0)
  --dry-run            print the command and the environment, and start nothing; run.steps=0 is megascore's own dry run"

ENVIRONMENT_HELP="Python is the active environment's, or the checkout's .venv, or python3; nothing is installed.

A stop: SIGUSR1, SIGTERM, SIGHUP and Ctrl-C reach every rank of this node. The run finishes its step, saves, and exits
with 75 within MEGASCORE_STOP_SECONDS (default: 240); the same command goes on from there. A second Ctrl-C ends it at once.
SIGUSR2 makes it save and go on.
Other exit codes are those of the first rank that failed: see megascore --help.

Set only where they are not set: OMP_NUM_THREADS, CUDA_DEVICE_MAX_CONNECTIONS, NCCL_DEBUG,
TORCH_NCCL_ASYNC_ERROR_HANDLING, TORCH_NCCL_DUMP_ON_TIMEOUT.
torchrun's other options can be given as PET_*, such as PET_LOG_DIR=logs PET_TEE=3."

fail_usage() {
    printf 'error: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

require_count() {
    case "$2" in "" | *[!0-9]*) fail_usage "$1 takes a number, got '$2'" ;; esac
    [ "$2" -ge "$3" ] || fail_usage "$1 takes a number of at least $3, got '$2'"
}

# take_arguments OPTIONS ARGUMENT...: sets a variable for each option, and job=(CONFIG key=value ...).
# OPTIONS are those that take a value and that the script knows, each between spaces.
take_arguments() {
    local known="$1" name
    shift
    nproc_per_node="" max_restarts=0 dry_run="" nnodes="" rdzv_endpoint="" rdzv_id="" local_addr="" network_interface=""
    while [ $# -gt 0 ]; do
        case "$1" in
        -h | --help)
            usage
            exit 0
            ;;
        --dry-run)
            dry_run=yes
            shift
            ;;
        --*=*)
            name="${1%%=*}"
            set -- "$name" "${1#*=}" "${@:2}"
            ;;
        -*)
            case "$known" in *" $1 "*) ;; *) fail_usage "unknown option '$1'" ;; esac
            [ $# -ge 2 ] || fail_usage "$1 takes a value"
            name="${1#--}"
            printf -v "${name//-/_}" '%s' "$2"
            shift 2
            ;;
        *) break ;;
        esac
    done
    [ -z "$nproc_per_node" ] || require_count --nproc-per-node "$nproc_per_node" 1
    require_count --max-restarts "$max_restarts" 0
    [ $# -gt 0 ] || fail_usage "which job? Give a YAML file"
    [ -f "$1" ] || fail_usage "there is no file '$1'"
    job=("$@")
    shift
    for name in "$@"; do
        case "$name" in
        -*) fail_usage "'$name' comes after the job's file: options go before it" ;;
        ?*=*) ;;
        *) fail_usage "'$name' is not key=value" ;;
        esac
    done
}

has_megascore() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("torch", "megascore"))))' 2>/dev/null
}

# Sets PYTHON. An active environment without megascore is an error: another one would not be what the user expects.
find_runner() {
    local prefix="${VIRTUAL_ENV:-}" candidate
    if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        prefix="${CONDA_PREFIX:-}"
    fi
    if [ -n "$prefix" ]; then
        PYTHON="$prefix/bin/python"
        has_megascore "$PYTHON" || die "the active environment $prefix has no torch or no megascore: install them, for example with pip install -e '$(dirname "$LAUNCH_FOLDER")[megatron,huggingface]'"
        return
    fi
    for candidate in "$(dirname "$LAUNCH_FOLDER")/.venv/bin/python" python3 python; do
        if has_megascore "$candidate"; then
            PYTHON="$candidate"
            return
        fi
    done
    die "found no Python with torch and megascore: activate an environment that has them, or make .venv with: bash launch/quickstart.sh"
}

# default_environment NAME VALUE: what the user has set stays.
settings=()
default_environment() {
    if [ -z "${!1+set}" ]; then
        export "$1=$2"
        settings+=("$1=$2")
    fi
}

# Sets nproc_per_node, and what torch, NCCL and Megatron read.
prepare_environment() {
    local num_cores
    if [ -z "$nproc_per_node" ]; then
        nproc_per_node=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 1)') ||
            die "GPUs could not be counted, see above: give --nproc-per-node."
    fi
    num_cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
    # torchrun would set 1, which leaves cores idle while weights are read and scores added up.
    default_environment OMP_NUM_THREADS $((num_cores > nproc_per_node ? num_cores / nproc_per_node : 1))
    # Megatron's tensor parallelism orders its kernels by there being one queue.
    default_environment CUDA_DEVICE_MAX_CONNECTIONS 1
    default_environment NCCL_DEBUG WARN
    # A collective that another rank never joins ends this rank after run.timeout_minutes instead of hanging. It is
    # torch's default too; it is said here because stopping and restarting rely on it.
    default_environment TORCH_NCCL_ASYNC_ERROR_HANDLING 3
    # And then every rank writes down its last collectives, for torchfrtrace to say who was missing.
    default_environment TORCH_NCCL_DUMP_ON_TIMEOUT 1
}

# start_agent TORCHRUN_ARGUMENT...: becomes the agent, so that signals go straight to it.
start_agent() {
    local command=("$PYTHON" "$LAUNCH_FOLDER/agent.py" --nproc-per-node "$nproc_per_node" --max-restarts "$max_restarts"
        "$@" -m megascore score "${job[@]}")
    if [ -n "$dry_run" ]; then
        printf '%q ' ${settings[@]+"${settings[@]}"} "${command[@]}"
        printf '\n'
        exit 0
    fi
    exec "${command[@]}"
}
