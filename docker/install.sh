#!/usr/bin/env bash
# Installs megascore into a base image, and fails if that changed anything that the base brought.
set -euo pipefail

case "${1:--h}" in -h | --help)
    cat <<'END'
usage: bash docker/install.sh FOLDER

Installs the megascore wheel that is in FOLDER, with megatron-core, transformers and what else is missing, pinned by
launch/constraints.txt. What is installed already stays, at its version and in its place: if a requirement can't be met
that way, nothing is installed, and pip says which package of the base is in the way.
Environment variable: PYTHON (default: python3).
END
    exit 0
    ;;
esac
python="${PYTHON:-python3}"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
wheels=("$1"/megascore-*.whl)
if [ ${#wheels[@]} -ne 1 ] || [ ! -f "${wheels[0]}" ]; then
    printf 'error: %s has no wheel of megascore, or several: docker/build_wheel.sh makes one\n' "$1" >&2
    exit 2
fi
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' || {
    printf 'error: the base has no torch\n' >&2
    exit 2
}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$python" "$here/base_packages.py" snapshot "$scratch/base.json"
"$python" "$here/base_packages.py" constraints "$here/../launch/constraints.txt" >"$scratch/constraints.txt"
# In place of the constraints of NVIDIA's images, which name packages that are not in them too: ours hold all that are.
# Wheels only, so that nothing is compiled against another torch.
PIP_CONSTRAINT="$scratch/constraints.txt" "$python" -m pip install --no-cache-dir --disable-pip-version-check \
    --only-binary :all: "${wheels[0]}[megatron,huggingface]"
"$python" "$here/base_packages.py" check "$scratch/base.json"
