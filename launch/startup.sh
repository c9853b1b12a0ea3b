#!/usr/bin/env bash
# The startup script of a TPU VM: installs a checkout from a bucket and trains, as a service that outlives crashes and
# reboots. It is run as root at every boot and does again only what is missing. The machine's own metadata says what to
# do (launch/tpu.py --runner=startup writes it):
#
#   cyb-source   gs://BUCKET/PATH.tar.gz, what `git archive` wrote
#   cyb-flags    the flags of cyb-train, one on each line
#   cyb-extras   what to install beside the package itself; tpu,reviews where it isn't given
#
# Exit codes: 0 and 2 (done; bad input) end it for good, reboots included. 75 (interrupted, saved) and 1 (a crash) are
# started again, three times in an hour at most. What the machine may read and write is its service account's; there are
# no secrets here.
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
# Whoever follows the log is told that nothing more will come.
failed() {
  echo "startup.sh: line $1 failed"
  echo 1 >"$run/exit"
  exit 1
}
trap 'failed $LINENO' ERR

source="$(attribute cyb-source)"
flags="$(attribute cyb-flags)"
extras="$(attribute cyb-extras || echo tpu,reviews)"
asked="$source $extras $flags"

if [[ -e "$run/asked" && "$(<"$run/asked")" == "$asked" ]]; then
  case "$(cat "$run/exit" 2>/dev/null)" in
    0 | 2)
      echo "startup.sh: it has ended with exit code $(<"$run/exit"); nothing to do"
      exit 0
      ;;
  esac
  if [[ -e "$run/stopped" ]]; then
    echo 'startup.sh: it was stopped by hand; nothing to do'
    exit 0
  fi
else
  systemctl stop cyb-train 2>/dev/null || true
  rm -rf "$run/asked" "$run/stopped" "$root"
fi
rm -f "$run/exit"

if [[ ! -e "$run/asked" ]]; then
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
  # Last: what was cut short before is done again.
  printf '%s' "$asked" >"$run/asked"
fi
systemctl reset-failed cyb-train 2>/dev/null || true
systemctl start --no-block cyb-train
echo 'startup.sh: cyb-train is started'
