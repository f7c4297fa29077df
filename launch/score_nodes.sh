#!/usr/bin/env bash
# Scores a model on several machines: start it on each.
set -euo pipefail

# shellcheck source=launch/_score.sh
. "$(dirname "${BASH_SOURCE[0]}")/_score.sh"

usage() {
    cat <<END
usage: bash launch/score_nodes.sh --nnodes N --rdzv-endpoint HOST:PORT [OPTION ...] CONFIG [key=value ...]

Scores a model on N machines under torchrun: start the same command on each of them, in any order, within 15 minutes.
They meet at HOST:PORT, HOST being one of them. Under Slurm, launch/score.sbatch does that.

  --nnodes N           machines
  --rdzv-endpoint HOST:PORT
                       where they meet; any free port
  --rdzv-id NAME       tells this job from others that meet at the same place (default: megascore)
  --local-addr ADDR    this machine's address for the others, where its host name does not lead to it
  --network-interface NAME
                       such as ib0 or eth0, for NCCL and gloo, where they choose the wrong one
$OPTIONS_HELP

$ENVIRONMENT_HELP
To stop the run, signal one node or all; with --max-restarts, all.
END
}

take_arguments " --nnodes --rdzv-endpoint --rdzv-id --local-addr --network-interface --nproc-per-node --max-restarts " "$@"
require_count --nnodes "$nnodes" 1
case "$rdzv_endpoint" in ?*:[0-9]*) ;; *) fail_usage "--rdzv-endpoint takes HOST:PORT, got '$rdzv_endpoint'" ;; esac
find_runner
prepare_environment
if [ -n "$network_interface" ]; then
    default_environment GLOO_SOCKET_IFNAME "$network_interface"
    default_environment NCCL_SOCKET_IFNAME "$network_interface"
fi
# Nodes of a cluster come up minutes apart; torchrun itself waits 1 minute for the first and 10 for the others.
rendezvous="join_timeout=900,read_timeout=900"
# Whose place HOST is, torchrun finds by comparing names and addresses, which goes wrong where a node calls itself
# otherwise than Slurm does. Slurm's first node is the one that score.sbatch names.
case "${SLURM_NODEID:-}" in
"") ;;
0) rendezvous="$rendezvous,is_host=true" ;;
*) rendezvous="$rendezvous,is_host=false" ;;
esac
start_agent --nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$rdzv_endpoint" --rdzv-id "${rdzv_id:-megascore}" \
    --rdzv-conf "$rendezvous" ${local_addr:+--local-addr "$local_addr"}
