#!/usr/bin/env bash
# Scores a model on one machine, a rank for each GPU.
set -euo pipefail

# shellcheck source=launch/_score.sh
. "$(dirname "${BASH_SOURCE[0]}")/_score.sh"

usage() {
    cat <<END
usage: bash launch/score.sh [OPTION ...] CONFIG [key=value ...]

Scores a model on this machine under torchrun: megascore score CONFIG key=value ...

$OPTIONS_HELP

$ENVIRONMENT_HELP
END
}

take_arguments " --nproc-per-node --max-restarts " "$@"
find_runner
prepare_environment
# All ranks are on this machine: gloo need not look up its name, which fails in many containers and VPNs.
case "$(uname -s)" in
Linux) default_environment GLOO_SOCKET_IFNAME lo ;;
Darwin) default_environment GLOO_SOCKET_IFNAME lo0 ;;
esac
start_agent --standalone --local-addr 127.0.0.1
