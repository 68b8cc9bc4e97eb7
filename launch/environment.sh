# shellcheck shell=bash
# Create, update and activate .venv. Other scripts source this file from the repository's root.
# The first argument is an extra of the package. The package is installed with the exact versions of
# constraints.txt, again whenever constraints.txt or pyproject.toml changes.
# PYTHON selects the interpreter of .venv (default: the first Python 3.11 or later on the path).
set -euo pipefail

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "jax-idgrpo needs Python 3.11 or later with venv; install it (on Debian: apt install python3 python3-venv) or set PYTHON" >&2
    exit 2
}

extra="${1:-}"
# venv writes activate last. An environment without it is incomplete and is created again.
if [ ! -x .venv/bin/python ] || [ ! -f .venv/bin/activate ]; then
    interpreter="$(find_python)"
    echo "creating .venv with $("$interpreter" --version)"
    rm -f .venv/bin/activate
    "$interpreter" -m venv --clear .venv
fi

stamp=".venv/.installed-${extra:-base}"
wanted="$(cat pyproject.toml constraints.txt | cksum)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "installing requirements (a few minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".${extra:+[$extra]}"
    echo "$wanted" >"$stamp"
fi

# shellcheck disable=SC1091
source .venv/bin/activate

# On CPUs XLA allocates and frees its buffers at every step; huge pages make this a third faster.
# A C library without this tunable ignores it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
