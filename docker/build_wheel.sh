#!/usr/bin/env bash
# Builds megascore's wheel, in a stage of its own: the images need neither the sources nor what builds them.
set -euo pipefail

case "${1:--h}" in -h | --help)
    printf 'usage: bash docker/build_wheel.sh FOLDER\n\nBuilds the wheel of this checkout into FOLDER; the Python (%s) has setuptools.\n' \
        "PYTHON, or python3"
    exit 0
    ;;
esac
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Without isolation, which would take whatever setuptools is the newest.
"${PYTHON:-python3}" -m pip wheel --quiet --no-cache-dir --disable-pip-version-check --no-build-isolation --no-deps \
    --wheel-dir "$folder" .
