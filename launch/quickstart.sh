#!/usr/bin/env bash
# Train an adapter on two CPU cores from a fresh clone: installs into .venv, trains
# configs/quickstart.py, exports the adapter, compares it with the base on held-out people, and
# writes an HTML report. Run the script again to resume. It downloads only packages.
#   launch/quickstart.sh [WORKDIR] [--section.field VALUE ...]      options of `idgrpo train`, such as --run.steps 20 for a quick look
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
workdir="runs/quickstart"
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    workdir="$1"
    shift
fi
source launch/environment.sh ""

idgrpo train configs/quickstart.py --workdir "$workdir" "$@"
idgrpo evaluate configs/quickstart.py --prompts embedded:eval --out "$workdir/evaluation" --lora "tuned=$workdir/export" "$@"
idgrpo report "$workdir"

echo
cat "$workdir/evaluation/table.md"
echo
echo "adapter: $(realpath "$workdir")/export  (PEFT layout, loads in diffusers)"
echo "report:  $(realpath "$workdir")/report.html"
