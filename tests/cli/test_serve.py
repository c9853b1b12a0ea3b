"""cyb-serve as a program: one line for bad input, and its end by a signal."""

import http.client
import json
import signal
import socket
import threading

import cli
import pytest
from served import until

pytest.importorskip("starlette", reason="the extra serve isn't installed")
pytest.importorskip("uvicorn", reason="the extra serve isn't installed")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("serve")
  config = cli.write_config(folder)
  cli.run("train", f"--config={config}", f"--workdir={folder}/run", "--config.train.steps=6")
  return folder / "run"


def test_bad_input_is_one_line(workdir, tmp_path):
  with socket.socket() as taken:
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    message = cli.complaint("serve", f"--workdir={workdir}", f"--port={port}")
  assert message == f"--port: {port} on 127.0.0.1 is in use; give another port, or 0 for any free port"
  for flags, message in (
    (["--port=0"], "--workdir: not given; give the run's folder as --workdir, or pretrained weights as --init_from"),
    ([f"--workdir={tmp_path}", "--port=0"], f"workdir: {tmp_path} contains no run"),
    ([f"--workdir={workdir}", "--port=70000"], "--port: 70000 must be in 0..65535"),
    ([f"--workdir={workdir}", "--port=0", "--rows=0"], "--rows: 0 must be at least 1"),
    ([f"--workdir={workdir}", "--port=0", "--host=256.0.0.1"], "--host: '256.0.0.1' is no address of this machine"),
  ):
    assert cli.complaint("serve", *flags).startswith(message)
  config = json.loads((workdir / "config.json").read_text())
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text(json.dumps(config))
  assert "no finished checkpoint" in cli.complaint("serve", f"--workdir={tmp_path}/run", "--port=0")


def log(program):
  try:
    return program.texts()[1]
  except FileNotFoundError:  # the process has not begun yet
    return ""


def test_a_signal_ends_the_server_after_its_requests(workdir):
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  program = cli.Forked("serve", f"--workdir={workdir}", f"--port={port}", "--rows=2", "--model_name=small")
  until(lambda: f"small: the page is http://127.0.0.1:{port}/" in log(program), seconds=120)
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  body = json.dumps({"prompt": "ab", "max_tokens": 12, "n": 8, "stream": True, "seed": 1})
  connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
  answer = connection.getresponse()
  first = answer.readline()
  program.kill(signal.SIGTERM)
  whole = []
  reader = threading.Thread(target=lambda: whole.append(first + answer.read()))
  reader.start()
  code, out, err = program.wait(60)
  reader.join(10)
  assert code == 0, err
  assert whole[0].endswith(b"data: [DONE]\n\n")
  summary = json.loads(out.splitlines()[-1])
  assert (summary["finished"], summary["failed"]) == (8, 0)
  assert summary["tokens"] == whole[0].count(b'"token_ids":[')
  assert "Traceback" not in err
