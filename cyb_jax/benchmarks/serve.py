"""Load test of cyb-serve: many clients that stream at the same time, against the same requests one after the other.

The server is a process of its own on the loopback interface, and the clients are threads of this one. Request number i
has the seed i and a prompt that depends on i alone, so that the two phases generate the same texts: an answer that
differs between them, or that is incomplete, fails the benchmark.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from absl import flags, logging

from cyb_jax import command_line
from cyb_jax.errors import Failed, InputError

_WORDS = ("The film was", "I saw", "A story of", "The music and the", "Nobody", "This is why", "In the end", "Well,")
_START_SECONDS = 600.0
_ANSWER_SECONDS = 120.0
_PERCENTILES = (50, 99)


def define_flags() -> None:
  command_line.define_path("workdir", None, "The trained run that is served.")
  command_line.define_base()
  flags.DEFINE_integer("clients", 64, "The number of clients that stream at the same time.")
  flags.DEFINE_float("seconds", 60.0, "The time in which clients send requests, in each of the two phases.")
  flags.DEFINE_integer("new_tokens", 32, "The largest number of tokens of a request.")
  flags.DEFINE_integer("rows", 16, "The number of continuations that the server generates together.")
  flags.DEFINE_integer("chunk", 4, "The number of iterations between which the server's rows join and leave.")


@dataclasses.dataclass(frozen=True)
class Answer:
  """A streamed answer.

  Attributes:
    tokens: the ids of the tokens and the pauses before each.
    arrivals: the seconds from the request to each token.
    complete: whether the stream has ended properly.
  """

  tokens: tuple[tuple[int, int], ...]
  arrivals: tuple[float, ...]
  complete: bool


def serve() -> dict[str, Any]:
  """The times of both phases, and the memory of the server.

  Raises:
    Failed: an answer is lost or differs between the phases; the result has their numbers.
    InputError: a flag is invalid, or the server refuses the run.
  """
  args = flags.FLAGS
  for name in ("clients", "new_tokens", "rows", "chunk"):
    if args[name].value < 1:
      raise InputError(f"--{name}: {args[name].value} must be at least 1")
  if not args.seconds > 0:
    raise InputError(f"--seconds: {args.seconds} must be positive")
  if not args.workdir:
    raise InputError("--workdir: not given; give the folder of a trained run")
  with server(args.workdir, args.base, args.rows, args.chunk, max(256, 2 * args.clients)) as (port, process):
    before = resident(process.pid)
    ask(port, 0, args.new_tokens)  # the first connection
    logging.info("%d clients", args.clients)
    together, seconds = _phase(port, args.clients)
    after = resident(process.pid)
    logging.info("%d answers; now one after the other", len(together))
    alone, alone_seconds = _phase(port, 1, numbers=sorted(together))
  lost = sum(not answer.complete for answer in (*together.values(), *alone.values()))
  both = together.keys() & alone.keys()
  different = sum(together[number].tokens != alone[number].tokens for number in both)
  described, sequential = describe(together.values(), seconds), describe(alone.values(), alone_seconds)
  result = {
    "benchmark": "serve",
    "source": args.workdir,
    "clients": args.clients,
    "rows": args.rows,
    "chunk": args.chunk,
    "new_tokens": args.new_tokens,
    "lost": lost,
    "compared": len(both),
    "different": different,
    "timing": {
      "together": described,
      "one_after_the_other": sequential,
      "tokens_per_second_ratio": described["tokens_per_second"] / sequential["tokens_per_second"],
      "server_bytes": {"before": before, "after": after},
    },
  }
  if lost or different:
    raise Failed(f"serve: {lost} answers are lost, and {different} of {len(both)} differ between the phases", result)
  return result


@contextlib.contextmanager
def server(workdir: str, base: str, rows: int, chunk: int, queue: int) -> Iterator[tuple[int, subprocess.Popen]]:
  """(port, process) of a server that has compiled its programs.

  Args:
    workdir: the served run.
    base: the place of its base, if this has been moved; otherwise ''.
    rows, chunk, queue: flags of cyb-serve.

  Raises:
    InputError: the server has refused the run.
  """
  command = [sys.executable, "-m", "cyb_jax.cli.serve", f"--workdir={workdir}", f"--base={base}", "--port=0",
    f"--rows={rows}", f"--chunk={chunk}", f"--queue={queue}"]  # fmt: skip
  with tempfile.TemporaryDirectory(prefix="cyb-serve-") as folder:
    log = pathlib.Path(folder) / "log"
    with log.open("w") as written:
      process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=written)
    try:
      yield _port(process, log), process
    finally:
      process.terminate()
      process.wait(_ANSWER_SECONDS)


def _port(process: subprocess.Popen, log: pathlib.Path) -> int:
  """The port that the server logs when it is ready."""
  end = time.monotonic() + _START_SECONDS
  while time.monotonic() < end:
    text = log.read_text(errors="replace")
    found = re.search(r"the page is http://[^/]*:(\d+)/", text)
    if found:
      return int(found[1])
    if process.poll() is not None:
      lines = [line for line in text.splitlines() if line.startswith("error: ")] or text.splitlines()[-1:]
      raise InputError(" ".join(lines).removeprefix("error: ") or "--workdir: the server has ended")
    time.sleep(0.1)
  raise InputError(f"--workdir: the server isn't ready after {_START_SECONDS:.0f} s")


def _phase(port: int, clients: int, numbers: list[int] | None = None) -> tuple[dict[int, Answer], float]:
  """(the answers by number, the seconds until the last one) of `clients` threads that ask for `--seconds` seconds.

  Args:
    port: the server's port.
    clients: the number of threads.
    numbers: the numbers of the requests; None: 0, 1, 2 and so on.
  """
  answers: dict[int, Answer] = {}
  start = time.perf_counter()
  end = start + flags.FLAGS.seconds
  waiting = iter(itertools.count() if numbers is None else numbers)
  lock = threading.Lock()

  def work() -> None:
    while time.perf_counter() < end:
      with lock:
        number = next(waiting, None)
      if number is None:
        return
      try:
        answers[number] = ask(port, number, flags.FLAGS.new_tokens)
      except (OSError, http.client.HTTPException, ValueError, LookupError):
        logging.exception("request %d is lost", number)
        answers[number] = Answer((), (), False)

  threads = [threading.Thread(target=work, daemon=True) for _ in range(clients)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  return answers, time.perf_counter() - start


def body_of(number: int, most_tokens: int) -> Mapping[str, Any]:
  """The request with this number, for at most `most_tokens` tokens; lengths and texts vary."""
  rng = np.random.default_rng(number)
  prompt = " ".join(rng.choice(_WORDS, rng.integers(1, 3)).tolist())
  new = int(rng.integers(1, most_tokens, endpoint=True))
  return {"prompt": prompt, "max_tokens": new, "seed": number, "temperature": 0.8, "stream": True}


def ask(port: int, number: int, most_tokens: int) -> Answer:
  """Sends a request and reads its stream."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_SECONDS)
  tokens, arrivals, reason, complete = [], [], None, False
  with contextlib.closing(connection):
    start = time.perf_counter()
    connection.request(
      "POST", "/v1/completions", json.dumps(body_of(number, most_tokens)), {"Content-Type": "application/json"}
    )
    answer = connection.getresponse()
    if answer.status != 200:
      raise ValueError(f"status {answer.status}: {answer.read(500)!r}")
    for line in answer:
      if line.startswith(b"data: [DONE]"):
        complete = reason is not None
      elif line.startswith(b"data: "):
        (choice,) = json.loads(line[6:])["choices"]
        tokens += zip(choice["token_ids"], choice["pauses"])
        arrivals.append(time.perf_counter() - start)
        reason = choice["finish_reason"]
  return Answer(tuple(tokens), tuple(arrivals), complete)


def describe(answers: Any, seconds: float) -> dict[str, Any]:
  """The sums and percentiles of the complete answers of a phase.

  `seconds_per_token` has the percentiles, over answers, of the mean time between the tokens after the first.
  """
  complete = [answer for answer in answers if answer.complete]
  tokens = sum(len(answer.tokens) for answer in complete)
  first = [answer.arrivals[0] for answer in complete if answer.arrivals]
  between = [
    (answer.arrivals[-1] - answer.arrivals[0]) / (len(answer.arrivals) - 1)
    for answer in complete
    if len(answer.arrivals) > 1
  ]
  return {
    "requests": len(complete),
    "seconds": seconds,
    "tokens": tokens,
    "mean_pauses": sum(pauses for answer in complete for _, pauses in answer.tokens) / tokens if tokens else None,
    "tokens_per_second": tokens / seconds,
    "seconds_to_first_token": percentiles(first),
    "seconds_per_token": percentiles(between),
    "seconds_per_request": percentiles([answer.arrivals[-1] for answer in complete if answer.arrivals]),
  }


def percentiles(values: list[float]) -> dict[str, float | None]:
  """The median and the 99th percentile.

  Example:
    >>> percentiles([1.0, 2.0, 3.0])
    {'p50': 2.0, 'p99': 2.98}
  """
  return {f"p{share}": float(np.percentile(values, share)) if values else None for share in _PERCENTILES}


def resident(pid: int) -> int | None:
  """The bytes of memory that a process holds; None where the system doesn't tell."""
  try:
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return None
  found = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
  return int(found[1]) * 1024 if found else None
