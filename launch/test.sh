#!/usr/bin/env bash
# The tests from a fresh clone: environment, lint, format, types, tests.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/test.sh [--fast | --newest | --oldest] [PYTEST ARGUMENT ...]

Runs ruff, mypy and pytest in the active virtual environment, or in .venv, which is made where it is missing, on the
package versions of launch/constraints.txt. Arguments go to pytest: bash launch/test.sh tests/hooks -k l2_norm

  --fast     only the tests that are marked fast: after ruff and mypy, what one does before each commit
  --newest   on the newest versions that pyproject.toml allows today (torch as without), in .venv-newest
  --oldest   on the oldest that it allows, torch too, of those with wheels for the Python here, in .venv-oldest

The last two make their environment anew, and run pytest alone, as other versions lint and type other things; no warning
fails there.

Environment variables: MEGASCORE_PYTHON, the Python 3.10-3.12 to make environments with; MEGASCORE_TORCH, such as
torch==2.12.1, the torch to install where there is none.
END
}

versions=pinned
marks=()
case "${1:-}" in
-h | --help)
    usage
    exit 0
    ;;
--fast)
    marks=(-m fast)
    shift
    ;;
--newest | --oldest)
    versions="${1#--}"
    shift
    ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/_environment.sh
. launch/_environment.sh

environment_seconds=""
tell_time() {
    local status=$?
    say "Took $((SECONDS / 60)) min $((SECONDS % 60)) s, of that the environment ${environment_seconds:-$SECONDS} s; exit code $status"
}
trap tell_time EXIT

if [ "$versions" = pinned ]; then
    use_environment
    install_project dev
else
    use_new_environment ".venv-$versions"
    "install_$versions" dev
fi
environment_seconds=$SECONDS

# Two processes share the files and the cores; a GPU is for one process alone. A later -n overrides it: -n 0 for --pdb.
options=()
half=$("$PYTHON" -c 'import os, torch; print(0 if torch.cuda.is_available() else os.cpu_count() // 2)')
if [ "$half" -gt 0 ]; then
    options=(-n 2 --dist loadfile)
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$half}"
fi

if [ "$versions" = pinned ]; then
    say "ruff"
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    say "mypy"
    "$PYTHON" -m mypy
    say "pytest"
    "$PYTHON" -m pytest ${options[@]+"${options[@]}"} ${marks[@]+"${marks[@]}"} "$@"
else
    say "pytest, on the $versions versions"
    # Over the filters of pyproject.toml.
    "$PYTHON" -m pytest ${options[@]+"${options[@]}"} -W default "$@"
fi
