#!/usr/bin/env bash
# Training on GPUs of several nodes under Slurm, one process for each GPU; `jax` finds the others by itself (--coordinator=auto).
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm_gpu.sh \
#     --config=experiments/c4.py:ap,gpt2_124m --config.data.store=/shared/stores/c4 --workdir=/shared/runs/ap
#
# From the checkout, which lies on a disk that all nodes see, as --workdir does. Once, beforehand, on a node with network:
#
#   python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt '.[gpu,reviews]'
#
# Before the time limit, and when it is preempted, Slurm sends SIGTERM to all processes: they save and exit with 75, and
# the job is queued again under its own number. A crash (1), bad input (2) and scancel end it.
#SBATCH --job-name=cyb
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# So long before the limit, to all processes: as long as a step and a save take.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cyb-%j.log
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: no flags; the flags of cyb-train come behind the script's name: --config=... --workdir=..." >&2
  exit 2
fi
# sbatch runs a copy of this script: the checkout is where it was called.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
venv="${CYB_VENV:-$PWD/.venv}"
if [[ ! -x "$venv/bin/cyb-train" ]]; then
  echo "error: $venv/bin/cyb-train is not there; see the head of this script, or set CYB_VENV" >&2
  exit 2
fi

# The script itself waits until they have saved.
trap : TERM
# Every process sees all GPUs of its node and takes the one of its own number. When one ends, the others have the time to
# notice it by themselves, and to say so.
srun --kill-on-bad-exit=0 --wait=180 --label "$venv/bin/cyb-train" --coordinator=auto "$@"
code=$?

echo "cyb-train has ended with exit code $code"
job="$(scontrol show job --oneliner "${SLURM_JOB_ID:-}" 2>/dev/null)"
if [[ $code -eq 75 && "$job" != *JobState=CANCELLED* ]]; then
  echo 'interrupted and saved; the job is queued again'
  scontrol requeue "$SLURM_JOB_ID"
  # Until Slurm takes the job away; ending here would count as its end.
  sleep "${CYB_REQUEUE_SECONDS:-600}"
fi
exit "$code"
