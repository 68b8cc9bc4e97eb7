#!/usr/bin/env bash
# Run on a TPU slice of any size through gcloud: copies the repository to every host, installs it
# there, and starts one process per host.
#   TPU=my-v5p-64 ZONE=us-east5-a launch/tpu_vm.sh idgrpo train configs/vace_14b.py --workdir /mnt/shared/runs/mine --model.path ...
# PROJECT (optional) is the project. The workdir and the models must be accessible to all hosts (a
# mounted bucket or a file store). The command continues if the connection is lost; its log is
# ~/idgrpo.log on every host. To stop it with a checkpoint:
#   gcloud compute tpus tpu-vm ssh my-v5p-64 --zone us-east5-a --worker=0 --command 'pkill -TERM idgrpo'
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -eq 0 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
    echo "usage: TPU=name ZONE=zone launch/tpu_vm.sh COMMAND [ARGUMENTS]" >&2
    exit 2
fi
where=(--zone "$ZONE" --worker=all)
[ -z "${PROJECT:-}" ] || where+=(--project "$PROJECT")

archive="$(mktemp --suffix=.tgz)"
trap 'rm -f "$archive"' EXIT
git archive --format=tgz --prefix=jax-idgrpo/ --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:idgrpo.tgz" "${where[@]}"

printf -v command '%q ' "$@"
gcloud compute tpus tpu-vm ssh "$TPU" "${where[@]}" --command "
    set -e
    tar xzf idgrpo.tgz
    cd jax-idgrpo
    source launch/environment.sh tpu
    export IDGRPO_DISTRIBUTED=auto
    nohup $command >~/idgrpo.log 2>&1 </dev/null &
    echo \"started on \$(hostname)\"
"
echo "follow it with: gcloud compute tpus tpu-vm ssh $TPU --zone $ZONE --worker=0 --command 'tail -f ~/idgrpo.log'"
