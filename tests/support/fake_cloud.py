"""A simulated cloud: `gcloud` creates processes and folders on this machine instead of TPUs.

The `gcloud` on PATH only sends its arguments to this process over the loopback interface, because starting Python for
each call would take most of the time. A worker is a home folder. Commands that are sent to it over ssh are really run,
by bash, with a simulated tmux and python3.11.
"""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import socket
import socketserver
import subprocess
import threading
import time

# The first character of each line of an answer is its kind: output, output without a line end, error, or exit code.
GCLOUD = """
exec 3<>"/dev/tcp/127.0.0.1/{port}"
printf '%s\\0' "$#" "$@" >&3
while IFS= read -r line <&3; do
  case $line in
    o*) printf '%s\\n' "${{line:1}}" ;;
    p*) printf '%s' "${{line:1}}" ;;
    e*) printf '%s\\n' "${{line:1}}" >&2 ;;
    x*) exit "${{line:1}}" ;;
  esac
done
exit 255
"""

TMUX = """
alive() {
  [[ -e $HOME/tmux.pid ]] && read -r _ _ state _ 2>/dev/null <"/proc/$(<"$HOME/tmux.pid")/stat" && [[ $state != Z ]]
}
case $1 in
  has-session) alive ;;
  new-session)
    alive && { echo 'duplicate session: cyb' >&2; exit 1; }
    setsid bash -c "${@: -1}" </dev/null >/dev/null 2>&1 &
    echo $! >"$HOME/tmux.pid" ;;
esac
"""

# Replaces Python on a worker; the pip of its venv installs a cyb-train that follows the scenario.
PYTHON = """
case "$*" in
  '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip install '*)
    test -e constraints.txt || exit 1
    echo "$@" >>"$CLOUD/pip"
    cp "$CLOUD/worker-bin/cyb-train" "$(dirname "$0")/cyb-train" ;;
esac
"""

CYB_TRAIN = """
starts="$CLOUD/starts-$NODE-$WORKER"
n=$(($(cat "$starts" 2>/dev/null || echo 0) + 1))
echo "$n" >"$starts"
mapfile -t behaviours <"$CLOUD/train"
echo "start $n"
line=$((n <= ${#behaviours[@]} ? n : ${#behaviours[@]}))
IFS=, read -ra here <<<"${behaviours[line - 1]}"
does="${here[WORKER]:-${here[0]}}"
for i in 1 2 3; do echo "step $i"; done
trap 'echo saved; exit 75' TERM
[[ $does != stubborn ]] || trap '' TERM
printf '%s\\n' "$@" >"$CLOUD/flags-$WORKER"
case $does in
  wait | stubborn | force*)
    if [[ $does == force* && $WORKER == 0 ]]; then
      until [[ "$(cat "$CLOUD/starts-$NODE-1" 2>/dev/null)" == "$n" ]]; do sleep 0.05; done
      echo "${does#force }" >"$CLOUD/force"
    fi
    while :; do sleep 5 & wait $!; done ;;
  slow) sleep 0.8; for i in 4 5 6; do echo "step $i"; done; echo '{"perplexity": 2.5}' ;;
  *) echo '{"perplexity": 2.5}'; exit "$does" ;;
esac
"""


MOUNT = """
echo "$@" >>"$CLOUD/mounts"
touch "$HOME/mounted"
"""


def script(path, text):
  path.write_text(f"#!/usr/bin/env bash\n{text.strip()}\n")
  path.chmod(0o755)


class Refusal(Exception):
  """The message with which gcloud fails."""


class Call:
  """A call of gcloud: its words, and the connection for the answer."""

  def __init__(self, connection):
    self._connection = connection
    self._lock = threading.Lock()
    self.gone = threading.Event()
    file = connection.makefile("rb")
    read = lambda: b"".join(iter(lambda: file.read(1), b"\0")).decode()  # noqa: E731
    self.words = [read() for _ in range(int(read()))]
    # If the calling process is killed, its connection is closed.
    threading.Thread(target=self._wait, args=(file,), daemon=True).start()

  def _wait(self, file):
    with contextlib.suppress(OSError):
      file.read(1)
    self.gone.set()

  def send(self, kind, text):
    with self._lock, contextlib.suppress(OSError):
      self._connection.sendall(f"{kind}{text}\n".encode())

  def hang(self, seconds=60):
    self.gone.wait(seconds)

  def flag(self, name):
    values = [word.partition("=")[2] for word in self.words if word.startswith(f"--{name}=")]
    return values[-1] if values else ""

  def positional(self):
    return [word for word in self.words[4:] if not word.startswith("--")]


class FakeCloud:
  """The resources of the cloud, and the scenario of events.

  Args:
    folder: an empty folder.
  """

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self.queued, self.nodes, self.made, self.recorded = {}, {}, 0, []
    self._taken = {}
    self._lock = threading.RLock()
    cloud = self

    class Handler(socketserver.BaseRequestHandler):
      def handle(self):
        call = Call(self.request)
        code = 0
        try:
          code = cloud.answer(call) or 0
        except Refusal as refusal:
          call.send("e", f"ERROR: (gcloud.{'.'.join(call.words[:4])}) {refusal}")
          code = 1
        finally:
          call.send("x", code)
          with contextlib.suppress(OSError):
            self.request.shutdown(socket.SHUT_RDWR)

    self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    for place in ("bin", "worker-bin"):
      (self.folder / place).mkdir()
      script(self.folder / place / "gcloud", GCLOUD.format(port=self._server.server_address[1]))
    programs = {"tmux": TMUX, "python3.11": PYTHON, "cyb-train": CYB_TRAIN, "sudo": 'exec "$@"', "mount": MOUNT}
    for name, text in (programs | {"mountpoint": 'test -e "$HOME/mounted"'}).items():
      script(self.folder / "worker-bin" / name, text)
    self.plays()

  def close(self):
    self._server.shutdown()
    self._server.server_close()
    for node in list(self.nodes):
      self._remove_node(node)

  def plays(self, train=("0",), **scenario):
    """Sets the scenario.

    Args:
      train: the behaviour of each start of cyb-train, of which the last is repeated: an exit code, wait, stubborn,
        slow, or 'force STATE'; or the behaviours of the workers, separated by commas.
      scenario: `hosts`, the number of workers; `create` and `delete`, the outcomes of calls; `states`, the states of
        each machine, which are reported one by one and of which the last is repeated; `ssh`, rules.
    """
    self.scenario = {"hosts": 2, "create": [], "delete": [], "delete_default": "ok", "states": [["ACTIVE"]], "ssh": []}
    assert scenario.keys() <= self.scenario.keys()
    self.scenario |= scenario
    (self.folder / "train").write_text("".join(f"{line}\n" for line in train))

  def _next(self, key, default="ok"):
    with self._lock:
      i = self._taken[key] = self._taken.get(key, -1) + 1
      outcomes = self.scenario[key]
    return outcomes[i] if i < len(outcomes) else default

  def answer(self, call):
    with self._lock:
      self.recorded.append(call.words)
    if call.words[0] == "storage":
      bucket = self.folder / "bucket" / call.words[-1].removeprefix("gs://")
      bucket.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(call.words[-2], bucket)
      return 0
    assert call.words[:2] == ["compute", "tpus"], call.words
    kind, verb = call.words[2:4]
    return getattr(self, f"_{kind}_{verb}".replace("-", "_"))(call)

  def _queued_resources_create(self, call):
    (name,) = call.positional()
    outcome = self._next("create")
    for word in call.flag("metadata-from-file").split(","):
      if word.startswith("cyb-flags="):
        self.flags_of_the_machine = pathlib.Path(word.partition("=")[2]).read_text().splitlines()
    refusals = {
      "quota": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' has been exceeded.",
      "capacity": 'There is no more capacity in the zone "z"; you can try in another zone',
      "denied": "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied",
    }
    if outcome in refusals:
      raise Refusal(refusals[outcome])
    if outcome == "slow":
      time.sleep(1)
    with self._lock:
      if name in self.queued:
        raise Refusal(f"ALREADY_EXISTS: Resource '{name}' already exists")
      count = int(call.flag("node-count") or 1)
      nodes = [call.flag("node-id")] if count == 1 else [f"{call.flag('node-prefix')}-{i}" for i in range(count)]
      states = self.scenario["states"]
      states = list(states[min(self.made, len(states) - 1)])
      self.queued[name] = {"type": call.flag("accelerator-type"), "nodes": nodes, "states": states, "exists": False}
      self.made += 1

  def _queued_resources_describe(self, call):
    (name,) = call.positional()
    with self._lock:
      if name not in self.queued:
        raise Refusal(f"NOT_FOUND: Resource '{name}' was not found")
      resource = self.queued[name]
      now = resource["states"][0]
      if len(resource["states"]) > 1:
        resource["states"].pop(0)
      force = self.folder / "force"
      if force.exists():
        forced = force.read_text().strip()
        force.unlink()
        for node in resource["nodes"]:
          if forced == "PREEMPTED":
            self.nodes[node]["state"] = forced
          else:
            self._remove_node(node)
        if forced not in ("PREEMPTED", "VANISHED"):
          now = forced
          resource["states"] = [now]
      if now == "ACTIVE" and not resource["exists"]:
        resource["exists"] = True
        for node in resource["nodes"]:
          self.nodes[node] = {"state": "READY", "hosts": self.scenario["hosts"]}
          for worker in range(self.scenario["hosts"]):
            (self.folder / "homes" / node / str(worker)).mkdir(parents=True)
    found = {"name": f"projects/p/locations/z/queuedResources/{name}", "state": {"state": now}}
    if now == "FAILED":
      found["state"]["failedData"] = {"error": {"code": 8, "message": "no capacity left"}}
    node = {"acceleratorType": resource["type"]}
    found["tpu"] = {"nodeSpec": [{"nodeId": n, "node": node} for n in resource["nodes"]]}
    call.send("o", json.dumps(found))

  def _tpu_vm_describe(self, call):
    (node,) = call.positional()
    if node not in self.nodes:
      raise Refusal(f"NOT_FOUND: Resource '{node}' was not found")
    found = self.nodes[node]
    endpoints = [{"ipAddress": f"10.0.0.{i}", "port": 8470} for i in range(found["hosts"])]
    found = {"name": node, "state": found["state"], "health": "HEALTHY", "networkEndpoints": endpoints}
    call.send("o", json.dumps(found))

  def _queued_resources_delete(self, call):
    (name,) = call.positional()
    outcome = self._next("delete", self.scenario["delete_default"])
    if outcome == "fail":
      raise Refusal("INTERNAL: the operation failed")
    if outcome == "hang":
      return call.hang()
    with self._lock:
      if name not in self.queued:
        raise Refusal(f"NOT_FOUND: Resource '{name}' was not found")
      resource = self.queued[name]
      if "--force" not in call.words and resource["states"][0] not in ("ACCEPTED", "FAILED", "SUSPENDED"):
        raise Refusal("FAILED_PRECONDITION: it has nodes; use --force")
      del self.queued[name]
      if outcome != "leave the node":
        for node in resource["nodes"]:
          self._remove_node(node)

  def _tpu_vm_delete(self, call):
    with self._lock:
      self._remove_node(*call.positional())

  def _remove_node(self, node):
    self.nodes.pop(node, None)
    home = self.folder / "homes" / node
    for pid in home.glob("*/tmux.pid"):
      with contextlib.suppress(ProcessLookupError, ValueError):
        os.killpg(int(pid.read_text()), signal.SIGKILL)
    # A process that is being killed may write again.
    while home.exists():
      shutil.rmtree(home, ignore_errors=True)

  def _rule(self, worker, what):
    """The scenario's behaviour of a command on a worker; '' means that it is run."""
    with self._lock:
      for i, rule in enumerate(self.scenario["ssh"]):
        used = self._taken.get(f"rule {i}", 0)
        fits = rule["match"] in what and rule.get("worker", worker) == worker
        if fits and used < rule.get("times", 10**9) and self.made <= rule.get("machines", 10**9):
          self._taken[f"rule {i}"] = used + 1
          return rule["do"]
    return ""

  def _on_worker(self, call, node, worker, what, run):
    do = self._rule(worker, what)
    if do == "fail":
      call.send("e", f"ERROR: (gcloud...) [/usr/bin/ssh] exited with return code [255]. (worker {worker})")
      return 255
    if do.startswith("force "):
      (self.folder / "force").write_text(do.split()[1])
    if do == "hang" or do.startswith("force "):
      call.hang()
      return 255
    if do.startswith("ends "):
      call.send("o", f"cyb-launch: exit {do.split()[1]}")
      return 0
    if do.startswith("exit "):
      call.send("e", "the command failed")
      return int(do.split()[1])
    home = self.folder / "homes" / node / worker
    return run(home, worker, do)

  def _workers(self, call, node, what, run):
    found = self.nodes.get(node)
    if found is None or found["state"] != "READY":
      raise Refusal(f"NOT_FOUND: {node} is in an unusable state")
    wanted = call.flag("worker") or "0"
    workers = [str(w) for w in range(found["hosts"])] if wanted == "all" else [wanted]
    codes = []
    threads = [
      threading.Thread(target=lambda w=w: codes.append(self._on_worker(call, node, w, what, run))) for w in workers
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return max(codes, default=255)

  def _tpu_vm_ssh(self, call):
    command = call.flag("command")
    (node,) = call.positional()

    def run(home, worker, do):
      env = {
        "HOME": str(home),
        "PATH": f"{self.folder / 'worker-bin'}:/usr/bin:/bin",
        "CLOUD": str(self.folder),
        "NODE": node,
        "WORKER": worker,
        "CYB_POLL": "0.15",
        "CYB_DATA": str(home / "data"),
      }
      try:
        process = subprocess.Popen(
          ["bash", "-c", command],
          cwd=home,
          env=env,
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          stderr=subprocess.STDOUT,
          text=True,
          start_new_session=True,
        )
      except FileNotFoundError:  # the machine was just deleted
        return 255

      def end():
        # After the command has ended, its background processes must continue.
        if process.poll() is None:
          with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

      threading.Thread(target=lambda: (call.gone.wait(), end()), daemon=True).start()
      if do == "drop":
        threading.Timer(0.4, end).start()
      for line in process.stdout:
        call.send("o", line.rstrip("\n"))
      code = process.wait()
      if code < 0:
        # The connection breaks in the middle of a line.
        call.send("p", "ste")
        call.send("e", "ERROR: (gcloud...) [/usr/bin/ssh] exited with return code [255].")
      return code if code >= 0 else 255

    return self._workers(call, node, command, run)

  def _tpu_vm_scp(self, call):
    path, target = call.positional()
    node, _, name = target.partition(":")

    def run(home, worker, do):
      shutil.copy(path, home / name)
      return 0

    return self._workers(call, node, "scp", run)

  def calls(self):
    """Short descriptions of the calls in order, without `describe` and `follow`."""
    calls = []
    for words in list(self.recorded):
      verb = words[3] if words[0] == "compute" else words[0]
      command = "".join(w for w in words if w.startswith("--command="))
      if verb == "ssh":
        inner = shlex.split(command.removeprefix("--command="))
        script = [w for w in inner if w.endswith("worker.sh")]
        verb = inner[inner.index(script[0]) + 1] if script else "unpack"
      elif words[2:4] == ["tpu-vm", "delete"]:
        verb = "delete node"
      worker = "".join(w.removeprefix("--worker=") for w in words if w.startswith("--worker="))
      if verb not in ("describe", "follow"):
        calls.append(f"{verb} {worker}".strip())
    return calls

  def is_empty(self):
    """Whether nothing is billed and nothing runs."""
    return not self.queued and not self.nodes and not list(self.folder.glob("homes/*"))
