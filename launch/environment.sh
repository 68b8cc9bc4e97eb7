# shellcheck shell=bash
# Sourced by the other scripts from the repository's root: makes .venv when it is missing, installs the package and the extra named by
# the first argument with the exact versions of constraints.txt when they or pyproject.toml changed, and activates it.
# PYTHON names the interpreter to make .venv with (default: the first Python 3.11 or later on the path).
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
# venv writes activate last: an environment without it was interrupted while it was made, and is made again from nothing.
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

# XLA allocates and frees its buffers at every step on CPUs; with huge pages that costs a third less time. Ignored where unknown.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
