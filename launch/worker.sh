#!/usr/bin/env bash
# The commands that run on a worker, called by launch/tpu.py over ssh, by launch/startup.sh, or by hand. The script is
# part of the checkout that it installs.
#
#   worker.sh install EXTRAS         installs the pinned versions in a venv next to the checkout; may be repeated
#   worker.sh mount                  mounts the machine's data disk read-only at /mnt/data, unless it is mounted
#   worker.sh run FLAGS              runs cyb-train with these flags, in a tmux session that outlives the connection;
#                                    with other flags than a training in progress, it changes nothing and exits with 2
#   worker.sh trains                 prints the flags of the training in progress, one per line; nothing if there is none
#   worker.sh follow [LINE]          prints the log from this line until training ends, then a line with the exit code
#   worker.sh log [LINES]            prints the end of the log, and the state
#   worker.sh state                  prints running, none, or the exit code; then "stopped" if stop was called
#   worker.sh stop [SECONDS]         sends SIGTERM, so that training saves and exits with 75; SIGKILL after SECONDS
#   worker.sh halt [SECONDS]         like stop, but the state does not become "stopped"
#   worker.sh program FLAGS          only writes the script that `run` runs (for the service of launch/startup.sh)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$(dirname "$root")/cyb_venv"
run="$(dirname "$root")/cyb_run"
poll="${CYB_POLL:-1}"
data="${CYB_DATA:-/mnt/data}"

# Training is a service if startup.sh has created the file `service`, and otherwise a tmux session.
alive() {
  if [[ -e "$run/service" ]]; then
    case "$(systemctl show --property=ActiveState --value cyb-train)" in
      active | activating | deactivating | reloading) return 0 ;;
      *) return 1 ;;
    esac
  fi
  tmux has-session -t =cyb 2>/dev/null
}

state() {
  local word=none
  if alive; then word=running; elif [[ -s "$run/exit" ]]; then word="$(<"$run/exit")"; fi
  if [[ -e "$run/stopped" && "$word" != running ]]; then word+=' stopped'; fi
  echo "$word"
}

install() {
  if alive; then
    echo 'training is in progress; nothing is installed'
    return
  fi
  # On the first boot of a machine, its updates lock apt for some minutes.
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 -qq)
  # The python3 of the base images is older than 3.11.
  if ! command -v python3.11 >/dev/null; then
    sudo add-apt-repository -y ppa:deadsnakes/ppa
    "${apt[@]}" update
    "${apt[@]}" install -y python3.11 python3.11-venv
  fi
  command -v tmux >/dev/null || "${apt[@]}" install -y tmux
  [[ -x "$venv/bin/python" ]] || python3.11 -m venv "$venv"
  (cd "$root" && "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt ".[$1]")
  echo 'installed'
}

mount_data() {
  if mountpoint -q "$data"; then
    echo "the data disk is already mounted at $data"
    return
  fi
  sudo mkdir -p "$data"
  # noload: the journal of a disk that several hosts attach must not be replayed.
  sudo mount -o ro,noload /dev/disk/by-id/google-persistent-disk-1 "$data"
  echo "the data disk is mounted at $data"
}

program() {
  printf '%s\n' "$@" >"$run/flags"
  {
    echo '#!/usr/bin/env bash'
    printf 'cd %q || exit 1\n' "$root"
    # On a signal, the script waits for cyb-train, which saves.
    echo 'trap : TERM INT HUP'
    printf 'echo $$ > %q\n' "$run/pid"
    printf '%q ' "$venv/bin/cyb-train" "$@"
    printf '>> %q 2>&1\n' "$run/log"
    # The file is renamed, so that `follow` never reads an incomplete exit code.
    # shellcheck disable=SC2016
    printf 'code=$?\necho "$code" > %q && mv %q %q\nexit "$code"\n' "$run/exit.new" "$run/exit.new" "$run/exit"
  } >"$run/train.sh"
}

start() {
  if alive; then
    if [[ "$(cat "$run/flags" 2>/dev/null)" != "$(printf '%s\n' "$@")" ]]; then
      echo "error: training is already in progress with other flags: $(tr '\n' ' ' <"$run/flags")" >&2
      exit 2
    fi
    echo 'training is already in progress with these flags'
    return
  fi
  rm -f "$run/exit" "$run/stopped" "$run/service"
  program "$@"
  tmux new-session -d -s cyb "bash $(printf '%q' "$run/train.sh")"
  echo 'started'
}

follow() {
  local next="$1" last going
  while :; do
    going=''
    # A service without an exit code has not started yet, because its machine is still being set up.
    if alive || [[ -e "$run/service" && ! -e "$run/exit" ]]; then going=1; fi
    last=0
    [[ ! -e "$run/log" ]] || last="$(wc -l <"$run/log")"
    if ((last >= next)); then
      sed -n "${next},${last}p;${last}q" "$run/log"
      next=$((last + 1))
    fi
    [[ -n "$going" ]] || break
    sleep "$poll"
  done
  echo "cyb-launch: exit $(state)"
}

signal() {
  if [[ -e "$run/service" ]]; then
    sudo systemctl "--signal=$1" kill cyb-train || true
  else
    pkill "-$1" -P "$(<"$run/pid")" || true
  fi
}

halt() {
  local tries="$1"
  if alive; then
    # systemd does not restart a stopped service, regardless of its exit code.
    if [[ -e "$run/service" ]]; then sudo systemctl stop --no-block cyb-train; else signal TERM; fi
    while alive && ((tries > 0)); do
      sleep "$poll"
      tries=$((tries - 1))
    done
    if alive; then signal KILL; fi
    while alive; do sleep "$poll"; done
  fi
  state
}

verb="${1:-}"
[[ $# -eq 0 ]] || shift
[[ -z "$verb" ]] || mkdir -p "$run"
case "$verb" in
  install) install "${1:-tpu,reviews}" ;;
  mount) mount_data ;;
  run) start "$@" ;;
  # A service trains with the flags of its machine also after it has ended.
  trains) if [[ -e "$run/flags" ]] && { alive || [[ -e "$run/service" ]]; }; then cat "$run/flags"; fi ;;
  program) program "$@" ;;
  follow) follow "${1:-1}" ;;
  log)
    [[ ! -e "$run/log" ]] || tail -n "${1:-100}" "$run/log"
    echo "cyb-launch: exit $(state)"
    ;;
  state) state ;;
  stop)
    touch "$run/stopped"
    halt "${1:-300}"
    ;;
  halt) halt "${1:-300}" ;;
  *)
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
    echo "error: command: '$verb' is unknown; give install, mount, run, trains, follow, log, state, stop, halt or program" >&2
    exit 2
    ;;
esac
