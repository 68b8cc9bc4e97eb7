#!/usr/bin/env bash
# Creates .venv when it is missing, installs the package with its test requirements, and runs the tests.
# Arguments go to pytest: `launch/test.sh -m slow`, `launch/test.sh tests/test_cli.py`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test
exec python -m pytest "$@"
