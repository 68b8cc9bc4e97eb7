#!/usr/bin/env bash
# Create .venv if it is missing, install the package with its test requirements, and run the tests.
# Arguments are passed to pytest: `launch/test.sh -m slow`, `launch/test.sh tests/unit`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test
exec python -m pytest "$@"
