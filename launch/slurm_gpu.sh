#!/usr/bin/env bash
# Trains on GPUs of several nodes under Slurm, with one process per GPU; jax detects the hosts (--coordinator=auto).
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm_gpu.sh \
#     --config=experiments/c4.py:ap,gpt2_124m --config.data.store=/shared/stores/c4 --workdir=/shared/runs/ap
#
# Run it in the checkout. The checkout and --workdir must be on a disk that all nodes share. Before the first run, on a
# node with network access:
#
#   python3.11 -m venv .venv && .venv/bin/pip install -c constraints.txt '.[gpu,reviews]'
#
# Before the time limit, and on preemption, Slurm sends SIGTERM to all processes: they save and exit with 75, and the
# job is requeued under the same number. A crash (1), bad input (2) and scancel end the job.
#SBATCH --job-name=cyb
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
# The signal is sent to all processes this many seconds before the limit; a step and a save must fit into this time.
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=cyb-%j.log
set -uo pipefail

if [[ $# -eq 0 ]]; then
  echo "error: no flags; give the flags of cyb-train after the script's name: --config=... --workdir=..." >&2
  exit 2
fi
# sbatch runs a copy of this script, so the checkout is the folder in which sbatch was called.
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
venv="${CYB_VENV:-$PWD/.venv}"
if [[ ! -x "$venv/bin/cyb-train" ]]; then
  echo "error: $venv/bin/cyb-train does not exist; install it as described in this script, or set CYB_VENV" >&2
  exit 2
fi

# The script itself ignores SIGTERM and waits until the processes have saved.
trap : TERM
# Every process sees all GPUs of its node and uses the one with its own number. When a process ends, the others get time
# to detect this and to report it.
srun --kill-on-bad-exit=0 --wait=180 --label "$venv/bin/cyb-train" --coordinator=auto "$@"
code=$?

echo "cyb-train has ended with exit code $code"
job="$(scontrol show job --oneliner "${SLURM_JOB_ID:-}" 2>/dev/null)"
if [[ $code -eq 75 && "$job" != *JobState=CANCELLED* ]]; then
  echo 'interrupted and saved; the job is requeued'
  scontrol requeue "$SLURM_JOB_ID"
  # The script waits until Slurm removes the job, because Slurm would take an exit for the end of the job.
  sleep "${CYB_REQUEUE_SECONDS:-600}"
fi
exit "$code"
