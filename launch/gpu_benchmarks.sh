#!/usr/bin/env bash
# Measures the training step, decoding and the readout on one GPU, and appends one JSON line for each measurement to a
# file. A measurement that the file already has is not repeated, so that the same command continues after an
# interruption. A measurement that fails (for lack of memory, for example) is reported, and the others go on.
#
#   bash launch/gpu_benchmarks.sh runs/gpu/benchmarks.jsonl
#
# It takes about 10 minutes on one H100 or H200 (estimated, not measured). Environment variables change the sizes:
#   PRESET, LENGTH, VOCABULARY   the model (gpt2_124m, 1024, 50304: a multiple of 128, which GPUs multiply fastest)
#   WINDOWS, PAUSE_WINDOWS       windows of a step without and with pauses (32, 8)
#   STEPS, BLOCKS                timed steps and blocks (20, 3)
#   ROWS, NEW_TOKENS, REPEATS    decoding (1,8,64; 128; 3)
#   SLOTS, TIMED_SLOTS, WIDTH    the readout (131072, 16384, 768)
#   PYTHON                       the interpreter (python3)
#   CYB_ONLY                     only measurements whose name matches this regular expression
set -uo pipefail

if [[ $# -ne 1 ]]; then
  echo "error: give the file of the measurements: bash launch/gpu_benchmarks.sh FILE.jsonl" >&2
  exit 2
fi
file=$1
: "${PRESET:=gpt2_124m}" "${LENGTH:=1024}" "${VOCABULARY:=50304}" "${WINDOWS:=32}" "${PAUSE_WINDOWS:=8}"
: "${STEPS:=20}" "${BLOCKS:=3}" "${ROWS:=1,8,64}" "${NEW_TOKENS:=128}" "${REPEATS:=3}"
: "${SLOTS:=131072}" "${TIMED_SLOTS:=16384}" "${WIDTH:=768}" "${PYTHON:=python3}" "${CYB_ONLY:=.}"
mkdir -p "$(dirname "$file")" || exit 2
touch "$file" || exit 2
failed=0

# measure NAME PART FLAGS...: runs cyb-benchmark, and writes its last line with the name and the seconds that it took.
measure() {
  local name=$1 start=$SECONDS line
  shift
  [[ $name =~ $CYB_ONLY ]] || return 0
  if grep -q "^{\"name\": \"$name\"," "$file"; then
    echo "$name: measured already" >&2
    return 0
  fi
  echo "$name: cyb-benchmark $*" >&2
  if line=$("$PYTHON" -m cyb_jax.cli.benchmark "$@" | tail -n 1) && [[ $line == "{"* ]]; then
    printf '{"name": "%s", "total_seconds": %d, %s\n' "$name" $((SECONDS - start)) "${line#\{}" | tee -a "$file"
  else
    echo "$name: failed" >&2
    failed=1
  fi
}

# train NAME SETTING WINDOWS FIELDS...: nothing is recomputed unless a field says so.
train() {
  local name=$1 setting=$2 windows=$3
  shift 3
  measure "$name" train "--config=experiments/c4.py:$setting,$PRESET" "--vocabulary=$VOCABULARY" \
    "--config.data.sequence_length=$LENGTH" "--config.data.batch_size=$windows" --config.decoder.remat=none \
    "--steps=$STEPS" "--blocks=$BLOCKS" "${@/#/--config.}"
}

# Attention is cuDNN's: rows are causal, or hidden pauses are heads of causal rows.
measure attention attention "--batch_size=$PAUSE_WINDOWS" "--tokens=$LENGTH" --implementations=auto,xla \
  "--repeats=$REPEATS"
train train_w1 baseline "$WINDOWS"
train train_w4_visible ap "$PAUSE_WINDOWS"
train train_w4_hidden ap "$PAUSE_WINDOWS" method.pause_visibility=hidden
measure readout readout "--slots=$SLOTS" "--timed_slots=$TIMED_SLOTS" "--width=$WIDTH" "--vocabulary=$VOCABULARY" \
  "--repeats=$REPEATS"
for rows in ${ROWS//,/ }; do
  measure "decode_$rows" decode "--config=experiments/c4.py:ap,$PRESET" "--vocabulary=$VOCABULARY" \
    "--batch_sizes=$rows" --prompt_tokens=32 "--new_tokens=$NEW_TOKENS" "--repeats=$REPEATS"
done
# How much recomputation costs, and whether it is needed for larger steps.
train train_w1_remat baseline "$WINDOWS" decoder.remat=dots
train train_w4_visible_remat ap "$PAUSE_WINDOWS" decoder.remat=dots
exit $failed
