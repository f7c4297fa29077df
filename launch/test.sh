#!/usr/bin/env bash
# The whole test suite from a fresh clone: environment, lint, format, types, tests.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/test.sh [PYTEST ARGUMENT ...]

Runs ruff, mypy and pytest in the active virtual environment, or in .venv, which is made where it is missing.
Arguments go to pytest, for example: bash launch/test.sh tests/hooks -k l2_norm

Environment variables: MEGASCORE_PYTHON, the Python 3.10-3.12 to make .venv with; MEGASCORE_TORCH, such as
torch==2.9.1, the torch to install where there is none.
END
}

case "${1:-}" in -h | --help)
    usage
    exit 0
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_environment.sh
. launch/_environment.sh

use_environment
install_project dev

say "ruff"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
say "mypy"
"$PYTHON" -m mypy
say "pytest"
exec "$PYTHON" -m pytest "$@"
