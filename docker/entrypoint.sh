#!/usr/bin/env bash
# What the images start. It becomes the command (exec), so signals from 'docker stop' and Kubernetes go straight there:
# a shell in between would be process 1 and keep them. No init is needed for that; 'docker run --init' adds one.
set -euo pipefail

case "${1:-}" in
-h | --help)
    cat <<'END'
usage: docker run IMAGE [COMMAND ARGUMENT ...]
       docker run IMAGE TORCHRUN_OPTION ... -m megascore score CONFIG ...

Runs a command, such as: score.sh job.yaml, or: megascore show scores.safetensors, or: bash. Where the first word is an
option, all words go to torchrun, whose ranks get MEGASCORE_STOP_SECONDS (240) to save when the container is stopped;
give docker stop --time, or terminationGracePeriodSeconds, some more than that.
END
    exit 0
    ;;
"") set -- megascore --help ;;
-*) set -- python3 "${MEGASCORE_LAUNCH:-/opt/megascore/launch}/agent.py" "$@" ;;
esac

# NVIDIA's own entry point makes newer CUDA libraries work on older drivers, and then execs the command.
base="${MEGASCORE_BASE_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}"
if [ -x "$base" ]; then
    exec "$base" "$@"
fi
exec "$@"
