#!/usr/bin/env bash
# The startup script of a TPU VM: installs a checkout from a bucket and trains, as a service that is restarted after
# crashes and reboots. It runs as root at every boot and repeats only missing steps. Its settings are in the machine's
# metadata, which launch/tpu.py --runner=startup writes:
#
#   cyb-source   gs://BUCKET/PATH.tar.gz, an archive of `git archive`
#   cyb-flags    the flags of cyb-train, one per line
#   cyb-extras   the extras to install; the default is tpu,reviews
#   cyb-disk     set if the machine has a data disk, which is mounted at /mnt/data
#
# After exit codes 0 (done) and 2 (bad input), training is not started again, even after a reboot. After 75 (interrupted
# and saved) and 1 (a crash), it is started again, at most three times per hour. The machine has the permissions of its
# service account; the script contains no secrets.
set -euo pipefail

home="${CYB_HOME:-/opt/cyb}"
units="${CYB_UNITS:-/etc/systemd/system}"
metadata="${CYB_METADATA:-http://metadata.google.internal/computeMetadata/v1/instance/attributes}"
root="$home/cyb_jax" run="$home/cyb_run"

attribute() {
  curl --silent --fail --retry 5 --header 'Metadata-Flavor: Google' "$metadata/$1"
}

mkdir -p "$run"
touch "$run/service" "$run/log"
chmod 755 "$home" "$run"
exec > >(tee -a "$run/log") 2>&1
# An exit code ends `worker.sh follow`, which would otherwise wait for more lines.
failed() {
  echo "startup.sh: line $1 failed"
  echo 1 >"$run/exit"
  exit 1
}
trap 'failed $LINENO' ERR

source="$(attribute cyb-source)"
flags="$(attribute cyb-flags)"
extras="$(attribute cyb-extras || echo tpu,reviews)"
request="$source $extras $flags"

if [[ -e "$run/request" && "$(<"$run/request")" == "$request" ]]; then
  case "$(cat "$run/exit" 2>/dev/null)" in
    0 | 2)
      echo "startup.sh: training has ended with exit code $(<"$run/exit"); nothing to do"
      exit 0
      ;;
  esac
  if [[ -e "$run/stopped" ]]; then
    echo 'startup.sh: training was stopped by hand; nothing to do'
    exit 0
  fi
else
  systemctl stop cyb-train 2>/dev/null || true
  rm -rf "$run/request" "$run/stopped" "$root"
fi
rm -f "$run/exit"

if [[ ! -e "$run/request" ]]; then
  echo "startup.sh: installing $source"
  gcloud storage cp "$source" "$home/cyb_jax.tar.gz"
  mkdir -p "$root"
  tar -xzf "$home/cyb_jax.tar.gz" -C "$root"
  bash "$root/launch/worker.sh" install "$extras"
  mapfile -t words <<<"$flags"
  bash "$root/launch/worker.sh" program "${words[@]}"
  cat >"$units/cyb-train.service" <<UNIT
[Unit]
Description=cyb-train
StartLimitIntervalSec=3600
StartLimitBurst=3

[Service]
ExecStart=/usr/bin/env bash $run/train.sh
Restart=on-failure
RestartPreventExitStatus=2
RestartSec=30
TimeoutStopSec=600
UNIT
  systemctl daemon-reload
  # This file is written last, so an interrupted installation is repeated.
  printf '%s' "$request" >"$run/request"
fi
if attribute cyb-disk >/dev/null; then bash "$root/launch/worker.sh" mount; fi
systemctl reset-failed cyb-train 2>/dev/null || true
systemctl start --no-block cyb-train
echo 'startup.sh: cyb-train was started'
