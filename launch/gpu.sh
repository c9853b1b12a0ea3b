#!/usr/bin/env bash
# Runs the GPU's part of the study and of the benchmarks from a pack (experiments/gpu_pack.py), without a network:
#
#   bash PACK/run.sh runs/gpu
#
# The machine has Python 3.12 and jax for CUDA; the pack has all other packages, which are installed to a folder of
# OUTPUT and change nothing of the machine's own (a pack without wheels uses the machine's packages). OUTPUT gets
#   benchmarks.jsonl   the measurements of launch/gpu_benchmarks.sh
#   gpu.json, gpu.md   the results of the plan `gpu`, and its tables
# The same command continues after an interruption. Environment variables:
#   PARTS          'benchmarks study' by default, or one of the two
#   TIME_LIMIT     seconds after which the command saves and ends with exit code 75; 0: none
#   JOBS           runs of the study at a time; by default one for each 30 GiB of GPU memory, at most 4
#   STATE          the folder of installed packages, token stores and runs (OUTPUT/state, about 20 GiB)
#   CYB_DRY_RUN=1  tiny sizes and two steps, as a test of the pack on a CPU; the names of its files have -dry-run
set -uo pipefail

pack=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) || exit 2
if [[ $# -ne 1 || ! -f $pack/stores.tar.xz ]]; then
  echo "error: give the folder of the results: bash PACK/run.sh OUTPUT, where PACK is written by experiments/gpu_pack.py" >&2
  exit 2
fi
for part in ${PARTS:=benchmarks study}; do
  if [[ $part != benchmarks && $part != study ]]; then
    echo "error: PARTS has $part; give some of benchmarks and study" >&2
    exit 2
  fi
done
mkdir -p "$1" && output=$(cd "$1" && pwd) || exit 2
: "${TIME_LIMIT:=0}" "${PYTHON:=python3}" "${STATE:=$output/state}" "${CYB_DRY_RUN:=}"
mkdir -p "$STATE" && STATE=$(cd "$STATE" && pwd) || exit 2
export PYTHON

# Packages and stores are complete when they have their final names.
site=$STATE/site
if [[ -d $pack/wheels && ! -d $site ]]; then
  rm -rf "$site.partial"
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --disable-pip-version-check \
    --target "$site.partial" "$pack"/wheels/*.whl || exit 1
  mv "$site.partial" "$site"
fi
[[ ! -d $site ]] || export PYTHONPATH=$site
if [[ ! -d $STATE/stores ]]; then
  rm -rf "$STATE/partial" && mkdir -p "$STATE/partial"
  "$PYTHON" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="data")' \
    "$pack/stores.tar.xz" "$STATE/partial" || exit 1
  mv "$STATE/partial/stores" "$STATE/stores" && rmdir "$STATE/partial"
fi
# The working directory has no folder experiments, so that the configs are those of the pack.
cd "$STATE" || exit 1
export XDG_CACHE_HOME=$STATE/cache
"$PYTHON" -c 'import jax, sys
device = jax.devices()[0]
print("jax", jax.__version__, "on", device.device_kind)
if device.platform == "cpu" and not sys.argv[1]:
  sys.exit("error: jax finds no GPU; install jax for CUDA, or set CYB_DRY_RUN=1 for a test on a CPU")
' "$CYB_DRY_RUN" || exit 2

if [[ -z ${JOBS:-} ]]; then
  gpu_mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
  JOBS=$((${gpu_mib:-0} / 30720))
  JOBS=$((JOBS < 1 ? 1 : JOBS > 4 ? 4 : JOBS))
fi
dry=() suffix=''
if [[ -n $CYB_DRY_RUN ]]; then
  export PRESET=nano LENGTH=32 VOCABULARY=512 WINDOWS=2 PAUSE_WINDOWS=2 STEPS=2 BLOCKS=1 ROWS=1,2 NEW_TOKENS=4 REPEATS=2
  export SLOTS=256 TIMED_SLOTS=128 WIDTH=64
  dry=(--dry_run) suffix=-dry-run
fi

# limited COMMAND...: with TIME_LIMIT, the command is interrupted when the time is over.
limited() {
  local left=$((TIME_LIMIT - SECONDS))
  if ((TIME_LIMIT == 0)); then
    "$@"
  elif ((left > 0)); then
    timeout --signal=INT --kill-after=30 "$left" "$@"
  else
    return 124
  fi
}

code=0
for part in $PARTS; do
  case $part in
    benchmarks) limited bash "$pack/gpu_benchmarks.sh" "$output/benchmarks$suffix.jsonl" ;;
    study)
      limited "$PYTHON" -m cyb_jax.cli.study --plan=gpu "${dry[@]}" "--stores=$STATE/stores" "--workdir=$STATE/runs$suffix" \
        "--results=$output/gpu$suffix.json" "--jobs=$JOBS"
      ;;
  esac
  found=$?
  # 75: interrupted and saved; 124 and 137: the time is over.
  case $found in 0) ;; 75 | 124 | 130 | 137) code=75 ;; *) code=1 ;; esac
done
if [[ -f $output/gpu$suffix.json ]]; then
  "$PYTHON" -m cyb_jax.cli.study --plan=gpu "${dry[@]}" "--results=$output/gpu$suffix.json" --table \
    >"$output/gpu$suffix.md"
fi
exit $code
