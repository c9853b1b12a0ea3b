#!/usr/bin/env bash
# What is done on a worker, by launch/tpu.py over ssh, by launch/startup.sh, or by hand. It lies in the checkout that it
# installs.
#
#   worker.sh install EXTRAS         a venv beside the checkout, with the pinned versions; again: nothing new
#   worker.sh run FLAGS              cyb-train with these flags, in a tmux session that outlives the connection
#   worker.sh follow [LINE]          its log from that line on, until it ends; then one line with its exit code
#   worker.sh log [LINES]            the end of its log, and the state
#   worker.sh state                  running, none, or the exit code; "stopped" behind it where stop was asked for
#   worker.sh stop [SECONDS]         SIGTERM, so that it saves and exits with 75; SIGKILL after so many seconds
#   worker.sh halt [SECONDS]         the same, without leaving word that it was meant to stay stopped
#   worker.sh program FLAGS          only writes what `run` would run (for the service of launch/startup.sh)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$(dirname "$root")/cyb_venv"
run="$(dirname "$root")/cyb_run"
poll="${CYB_POLL:-1}"

# A service where startup.sh has left its mark, else a tmux session.
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
    echo 'it trains already; nothing is installed under it'
    return
  fi
  # On a machine's first boot its own updates hold apt for minutes.
  local apt=(sudo apt-get -o DPkg::Lock::Timeout=600 -qq)
  # The base images' own python3 is older than 3.11.
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

program() {
  {
    echo '#!/usr/bin/env bash'
    printf 'cd %q || exit 1\n' "$root"
    # Told to stop, it waits for what it runs, which saves.
    echo 'trap : TERM INT HUP'
    printf 'echo $$ > %q\n' "$run/pid"
    printf '%q ' "$venv/bin/cyb-train" "$@"
    printf '>> %q 2>&1\n' "$run/log"
    # Whole or not at all: who follows reads it.
    # shellcheck disable=SC2016
    printf 'code=$?\necho "$code" > %q && mv %q %q\nexit "$code"\n' "$run/exit.new" "$run/exit.new" "$run/exit"
  } >"$run/train.sh"
}

start() {
  if alive; then
    echo 'it trains already'
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
    # A service that has not come so far yet will: its machine is still being set up.
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
    # A service that is stopped isn't started again, whatever code it ends with.
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
  run) start "$@" ;;
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
    echo "error: ${verb:-no verb}: none of install, run, follow, log, state, stop, halt, program" >&2
    exit 2
    ;;
esac
