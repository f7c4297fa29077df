#!/usr/bin/env bash
# Writes launch/constraints.txt: the newest versions that pyproject.toml allows today.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/pin.sh

Installs megascore[dev] into a new environment in the temporary folder, with the newest versions that pyproject.toml
allows, writes all of them to launch/constraints.txt, and removes the environment. Then run bash launch/test.sh, which
installs them, and commit the file if it passes.

Environment variables: MEGASCORE_PYTHON, the Python 3.10-3.12 to use; MEGASCORE_TORCH, such as torch==2.12.1, the torch
to choose the versions for.
END
}

case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
?*)
    printf 'error: takes no arguments\n\n' >&2
    usage >&2
    exit 2
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_environment.sh
. launch/_environment.sh

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
use_new_environment "$scratch/environment"
install_newest dev
"$PYTHON" launch/pins.py write launch/constraints.txt
say "Wrote launch/constraints.txt: $(grep -c == launch/constraints.txt) packages. Now run: bash launch/test.sh"
