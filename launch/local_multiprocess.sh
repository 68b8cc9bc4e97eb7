#!/usr/bin/env bash
# Run several processes on one machine, as on a pod. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
# JAX_PROCESS_ID connect them.
#   launch/local_multiprocess.sh PROCESSES idgrpo train configs/quickstart.py --workdir runs/two [...]
# Each process uses its own GPU (CUDA_VISIBLE_DEVICES); DEVICES=n gives each process n CPU devices
# instead. EXTRA=cuda installs with that extra. Process 0 prints to the terminal, the others to
# files in LOGS (default: runs/logs). If a process fails, all are stopped, and the script exits with
# the status of the failed process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    echo "usage: launch/local_multiprocess.sh PROCESSES COMMAND [ARGUMENTS]; PROCESSES is a number of 1 or more" >&2
    exit 2
fi
processes="$1"
shift
source launch/environment.sh "${EXTRA:-}"

port="${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}"
logs="${LOGS:-runs/logs}"
mkdir -p "$logs"
export JAX_COORDINATOR_ADDRESS="127.0.0.1:$port" JAX_NUM_PROCESSES="$processes"
if [ -n "${DEVICES:-}" ]; then
    export JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
fi

started=()
stop() { kill "${started[@]}" 2>/dev/null || true; }
trap stop INT TERM
for ((number = 0; number < processes; number++)); do
    export JAX_PROCESS_ID="$number"
    [ -n "${DEVICES:-}" ] || export CUDA_VISIBLE_DEVICES="$number"
    if [ "$number" -eq 0 ]; then
        "$@" &
    else
        "$@" >"$logs/process-$number.log" 2>&1 &
    fi
    started+=("$!")
done

status=0
for ((left = processes; left > 0; left--)); do
    wait -n || {
        status=$?
        echo "a process ended with status $status; the others are stopped; see $logs" >&2
        stop
        break
    }
done
wait || true
exit "$status"
