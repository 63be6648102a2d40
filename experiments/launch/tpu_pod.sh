#!/usr/bin/env bash
# A run on a Cloud TPU slice: every host of it runs `sysdpo train` as a systemd unit.
#
#   export PROJECT=... ZONE=us-west4-a BUCKET=my-bucket CONFIG=/mnt/runs/my_run.yaml
#   experiments/launch/tpu_pod.sh create     # a queued resource, spot by default; wait until `status` says ACTIVE
#   experiments/launch/tpu_pod.sh install    # the library, and the bucket at $MOUNT, on all hosts
#   experiments/launch/tpu_pod.sh run        # starts, or goes on from the newest checkpoint
#   experiments/launch/tpu_pod.sh logs | stop | status | delete
#
# Checkpoints go to the bucket, which all hosts see (create it with a hierarchical namespace, where renaming a folder is
# atomic). Where a process dies the others end with an error, and systemd starts all of them again. `stop`, a maintenance
# event and a preemption send SIGTERM: the state is saved. After a maintenance event, which restarts the hosts: install,
# run. A preempted spot slice does not come back by itself: delete, create, install, run.
set -euo pipefail

: "${PROJECT:?the Google Cloud project}" "${ZONE:?the zone of the slice}"
NAME=${NAME:-sysdpo}
ACCELERATOR=${ACCELERATOR:-v5litepod-16}
RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite}
SPOT=${SPOT---spot}
MOUNT=${MOUNT:-/mnt/runs}
RUN=${RUN:-aligned}
# Anything else that `sysdpo train` takes.
FLAGS=${FLAGS:-}
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-help}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" ${SPOT:+"$SPOT"}
    ;;
  status)
    gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" --format="value(state.state)"
    ;;
  install)
    : "${BUCKET:?the bucket that holds weights, preferences and checkpoints}"
    tar --exclude=.git --exclude=.venv --exclude=runs -czf "/tmp/$NAME.tar.gz" -C "$REPOSITORY" .
    gcloud compute tpus tpu-vm scp "/tmp/$NAME.tar.gz" "$NAME:/tmp/" --project="$PROJECT" --zone="$ZONE" --worker=all
    on_all "set -e
      mkdir -p ~/sysdpo && tar -xzf /tmp/$NAME.tar.gz -C ~/sysdpo
      python3 -m venv ~/sysdpo/.venv && ~/sysdpo/.venv/bin/pip install --quiet -e ~/sysdpo'[tpu]'
      sudo mkdir -p $MOUNT && sudo chown \$USER $MOUNT
      mountpoint -q $MOUNT || gcsfuse --implicit-dirs $BUCKET $MOUNT"
    ;;
  run)
    : "${CONFIG:?the YAML file of the run, which all hosts see: below the mount}"
    # 75 (EX_TEMPFAIL) marks a preempted run as not finished. A unit that failed keeps its name until it is reset.
    on_all "sudo systemctl reset-failed $NAME 2> /dev/null || true; sudo systemd-run --unit=$NAME --uid=\$USER --working-directory=\$HOME/sysdpo --setenv=HOME=\$HOME \
      --property=Restart=on-failure --property=RestartSec=30 --property=TimeoutStopSec=90 \
      \$HOME/sysdpo/.venv/bin/sysdpo train $CONFIG --directory $MOUNT/$RUN \
      --preempted-exit-code 75 $FLAGS"
    ;;
  logs) on_all "journalctl --unit=$NAME --lines=50 --no-pager" ;;
  stop) on_all "sudo systemctl stop $NAME" ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force --quiet
    ;;
  *)
    sed -n '2,15p' "${BASH_SOURCE[0]}"
    exit 2
    ;;
esac
