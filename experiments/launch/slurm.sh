#!/usr/bin/env bash
# A run on GPU nodes under Slurm, one process a GPU: JAX finds the others in Slurm's environment.
#
#   CONFIG=/shared/my_run.yaml DIRECTORY=/shared/runs/my_run sbatch experiments/launch/slurm.sh
#
# The directory must be on a file system that all nodes see. 90 seconds before the time limit, and when the job is
# preempted, every process gets SIGTERM, saves and exits with 75; the job is then queued again and goes on. What fails
# otherwise ends the job.
#SBATCH --job-name=sysdpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@90
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

: "${CONFIG:?the YAML file of the run}" "${DIRECTORY:?on a file system that all nodes see}"
PYTHON=${PYTHON:-.venv/bin/python}
# Anything else that `sysdpo train` takes.
FLAGS=${FLAGS:-}

code=0
# The first process that has saved and exits must not have the others killed while they save; where one dies, JAX ends the
# others. FLAGS is split into words on purpose.
# shellcheck disable=SC2086
srun --kill-on-bad-exit=0 "$PYTHON" -m sysdpo_jax train "$CONFIG" --directory "$DIRECTORY" \
  --preempted-exit-code 75 $FLAGS || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
