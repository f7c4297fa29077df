#!/usr/bin/env bash
# Gives the small image its base: torch without CUDA.
set -euo pipefail

case "${1:--h}" in -h | --help)
    cat <<'END'
usage: bash docker/install_torch_cpu.sh VERSION

Installs the CPU build of torch VERSION, without what it needs: docker/install.sh adds that, pinned.
Environment variables: PYTHON (default: python3); TORCH_INDEX, a mirror of https://download.pytorch.org/whl/cpu.
END
    exit 0
    ;;
esac
# Those of Python's image are too old for torch, and would stay as part of the base.
"${PYTHON:-python3}" -m pip uninstall --quiet --yes setuptools wheel
# PyTorch's index also has copies of a few other packages: hence only torch from there.
"${PYTHON:-python3}" -m pip install --no-cache-dir --disable-pip-version-check --no-deps --only-binary :all: \
    --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "torch==$1"
