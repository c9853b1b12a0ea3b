#!/usr/bin/env bash
# Installs this checkout on a TPU VM and trains there, in a tmux session that outlives the connection.
#
#   launch/tpu_vm.sh --name=NAME --zone=ZONE [--type=v4-8] [--image=IMAGE] [--spot] [--dry-run] -- FLAGS OF cyb-train
set -euo pipefail

name='' zone='' type='v4-8' image='' spot='' dry=''

usage() {
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --spot) spot=1 ;;
    --dry-run) dry=1 ;;
    --) shift; break ;;
    *) usage "$1 is no flag of this script; the flags of cyb-train come after --" ;;
  esac
  shift
done
[[ -n "$name" ]] || usage "--name: not given; name the TPU VM"
[[ -n "$zone" ]] || usage "--zone: not given; e.g. us-central2-b"
(($#)) || usage "no flags for cyb-train after --"
[[ " $*" == *" --config="* && " $*" == *" --workdir="* ]] || usage "cyb-train needs --config=... and --workdir=..."

if [[ -z "$image" ]]; then
  case "$type" in
    v4-* | v5p-*) image='tpu-ubuntu2204-base' ;;
    v5litepod-*) image='v2-alpha-tpuv5-lite' ;;
    v6e-*) image='v2-alpha-tpuv6e' ;;
    *) usage "--image: not given, and there is no default for --type=$type" ;;
  esac
fi

root="$(cd "$(dirname "$0")/.." && pwd)"
at=("$name" "--zone=$zone")

run() {
  printf '+ %s\n' "$(printf '%q ' "$@")" >&2
  [[ -n "$dry" ]] || "$@"
}

on_vm() {
  run gcloud compute tpus tpu-vm ssh "${at[@]}" --worker=all "--command=$1"
}

if [[ -n "$dry" ]] || ! gcloud compute tpus tpu-vm describe "${at[@]}" >/dev/null 2>&1; then
  run gcloud compute tpus tpu-vm create "${at[@]}" "--accelerator-type=$type" "--version=$image" ${spot:+--spot}
fi

# What git tracks, so that runs, venvs and caches stay here.
archive="$(mktemp -t cyb_jax.XXXXXX)"
trap 'rm -f "$archive"' EXIT
run git -C "$root" archive --format=tar.gz "--output=$archive" HEAD
run gcloud compute tpus tpu-vm scp "$archive" "$name:cyb_jax.tar.gz" "--zone=$zone" --worker=all
on_vm 'mkdir -p cyb_jax && tar -xzf cyb_jax.tar.gz -C cyb_jax'
# python3.11 or newer; the base images' own python3 is older.
on_vm 'command -v python3.11 || (sudo add-apt-repository -y ppa:deadsnakes/ppa && sudo apt-get update && sudo apt-get install -y python3.11 python3.11-venv)'
on_vm 'cd cyb_jax && python3.11 -m venv .venv && .venv/bin/pip install --quiet -c constraints.txt ".[reviews,tpu]"'
# One session of this name: a second start while one trains is refused by tmux.
train="cd cyb_jax && .venv/bin/cyb-train $(printf '%q ' "$@") 2>&1 | tee -a ~/cyb-train.log"
on_vm "tmux new-session -d -s cyb $(printf '%q' "$train")"
echo "follow it with: gcloud compute tpus tpu-vm ssh $name --zone=$zone --command='tail -f cyb-train.log'" >&2
