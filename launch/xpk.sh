#!/usr/bin/env bash
# Run on a GKE cluster through xpk, which creates the JobSet and queues it.
#   CLUSTER=mine ZONE=us-east5-a TYPE=v5p-64 IMAGE=registry/idgrpo:tpu launch/xpk.sh NAME idgrpo train configs/vace_14b.py --workdir /data/runs/mine
# SLICES (default 1) is the number of slices of TYPE. IMAGE is built from launch/Dockerfile.
# The cluster defines priority, quotas and volumes.
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${CLUSTER:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${TYPE:-}" ] || [ -z "${IMAGE:-}" ]; then
    echo "usage: CLUSTER=c ZONE=z TYPE=v5p-64 IMAGE=i launch/xpk.sh NAME COMMAND [ARGUMENTS]" >&2
    exit 2
fi
name="$1"
shift
printf -v command '%q ' "$@"
exec xpk workload create \
    --cluster "$CLUSTER" --zone "$ZONE" --workload "$name" \
    --tpu-type "$TYPE" --num-slices "${SLICES:-1}" --docker-image "$IMAGE" \
    --env IDGRPO_DISTRIBUTED=auto --max-restarts "${RESTARTS:-10}" \
    --command "$command"
