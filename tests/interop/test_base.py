"""Checkpoints of runs with a frozen decoder: what they contain, and the base from which the rest is read."""

import ast
import dataclasses
import json
import pathlib
import shutil
import types

import cli
import imported_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import report_page
from models import assert_trees_equal, tiny_config

import cyb_jax
from cyb_jax import configs, training
from cyb_jax.checkpointing.workdir import checkpoints_in
from cyb_jax.cli import report
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.interop.base import BaseReference
from cyb_jax.studies.resolution import resolve

PACKAGE = pathlib.Path(cyb_jax.__file__).parent


def tuned(base, **train):
  """A config that trains adapters on a quantised base."""
  config = tiny_config(pauses=1)
  config.decoder = configs.default().decoder
  config.decoder.preset = ""
  config.data.tokenizer = ""
  config.init_from = str(base)
  config.tuning.update(weights="lora", lora_rank=2)
  config.precision.params = "nf4"
  config.optimizer.learning_rate = 0.01
  config.train.update({"steps": 4, "checkpoint_every": 2, "keep": 2, "eval_every": 0, "last_eval_limit": 8} | train)
  return config


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A model of another project, and a run that has trained adapters on it."""
  folder = tmp_path_factory.mktemp("base")
  imported_models.write_folder(folder / "model", "llama3.2", [0])
  training.train(resolve(tuned(folder / "model")), folder / "run")
  return folder


def saved(workdir, step=4):
  return checkpoints_in(workdir, read_only=True).read(step)


def test_a_checkpoint_has_the_trained_part_alone(folders):
  found, run = saved(folders / "run"), cyb_jax.load(str(folders / "run"))
  names = [path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(found.state["params"]["decoder"])]
  assert set(names) == set(LEAVES)
  assert found.state["params"].keys() == run.params.keys()
  shapes = sorted(x.shape for x in jax.tree.leaves(found.state["params"]))
  moments = sorted(x.shape for x in jax.tree.leaves(found.state["opt_state"]) if x.ndim)
  assert moments == sorted(shape for shape in shapes + shapes if shape)
  held = sum(x.nbytes for x in jax.tree.leaves(found.state))
  assert held < sum(x.nbytes for x in jax.tree.leaves(run.params["decoder"])) / 2
  reference = BaseReference.of_checkpoint(found.meta)
  assert reference == pretrained.open_pretrained(str(folders / "model")).reference
  assert (reference.path, reference.checkpoint, len(reference.checksum)) == (str(folders / "model"), None, 64)
  # The whole model: the frozen parameters are those of the base, the others those of the checkpoint.
  base = pretrained.load(pretrained.open_pretrained(str(folders / "model")), resolve(tuned(folders / "model")))
  query, expected = (x.params["decoder"]["layers_0"]["attention"]["query"] for x in (run, base))
  assert query["kernel"].dtype == jnp.uint8
  np.testing.assert_array_equal(query["kernel"], expected["kernel"])
  assert np.abs(query["lora_b"]).max() > 0
  assert_trees_equal(query["lora_b"], found.state["params"]["decoder"]["layers_0"]["attention"]["query"]["lora_b"])


def moved(folders, tmp_path):
  """The run in another folder, with its last checkpoint, and its base, which is no longer where it was."""
  shutil.copytree(folders / "run", tmp_path / "run")
  shutil.copytree(folders / "model", tmp_path / "moved")
  path = tmp_path / "run" / "config.json"
  path.write_text(path.read_text().replace(str(folders / "model"), str(tmp_path / "gone")))
  return tmp_path / "run", tmp_path / "moved"


def test_a_moved_base(folders, tmp_path):
  workdir, base = moved(folders, tmp_path)
  message = (
    f"workdir: {workdir} has only the trained parameters; the others are those of its base, {tmp_path}/gone, which"
    rf" can't be read \({tmp_path}/gone: no such folder or file.*\); set init_from in {workdir}/config\.json to the"
    r" model that the run started from, or give it as base$"
  )
  with pytest.raises(InputError, match=message):
    cyb_jax.load(str(workdir))
  expected = cyb_jax.load(str(folders / "run"))
  found = cyb_jax.load(str(workdir), base=str(base))
  assert_trees_equal(found.params, expected.params)
  # What is exported names the base that was found.
  assert (found.config.init_from, expected.config.init_from) == (str(base), str(folders / "model"))
  path = workdir / "config.json"
  path.write_text(path.read_text().replace(str(tmp_path / "gone"), str(base)))
  assert_trees_equal(cyb_jax.load(str(workdir)).params, expected.params)
  with pytest.raises(InputError, match=r"^base: .*moved' is given, but .*model is not a run; omit it"):
    cyb_jax.load(str(folders / "model"), base=str(base))


def test_training_continues_bit_for_bit_on_a_moved_base(folders, tmp_path):
  workdir, base = moved(folders, tmp_path)
  shutil.rmtree(workdir / "checkpoints" / "4")
  record = training.train(resolve(tuned(base), workdir), workdir)
  assert record == json.loads((folders / "run" / "evaluation.json").read_text())
  assert_trees_equal(saved(workdir).state, saved(folders / "run").state)
  # The new place is recorded.
  assert_trees_equal(cyb_jax.load(str(workdir)).params, cyb_jax.load(str(folders / "run")).params)


def test_another_base_is_refused(folders, tmp_path):
  workdir, base = moved(folders, tmp_path)
  weights = bytearray((base / "model.safetensors").read_bytes())
  weights[-1] ^= 1
  (base / "model.safetensors").write_bytes(weights)
  message = rf"{base}, which has other weights than at the start of the run \(checksum \w{{12}}, not \w{{12}}\); set"
  with pytest.raises(InputError, match=message):
    cyb_jax.load(str(workdir), base=str(base))
  with pytest.raises(InputError, match=rf"{message} .*, or give it as --config\.init_from$"):
    training.train(resolve(tuned(base), workdir), workdir)


def test_every_call_passes_the_place_of_the_base_on():
  """Wherever the package loads a run, the base can have moved; the message names the option of the program at hand."""
  calls = []
  for path in sorted(PACKAGE.rglob("*.py")):
    text = path.read_text()
    for node in ast.walk(ast.parse(text)) if "pretrained.load_run" in text else ():
      called = isinstance(node, ast.Call) and (node.func, *node.args)
      if called and "pretrained.load_run" in map(ast.unparse, called):
        names = {keyword.arg for keyword in node.keywords}
        calls.append((path.name, None in names or {"base", "base_option"} <= names))
  assert {name for name, _ in calls} >= {"models.py", "convert.py", "report.py", "harness.py", "memory.py"}
  assert [name for name, passed in calls if not passed] == []


REMEDY = " to the model that the run started from, or give it as --base"


@pytest.mark.parametrize(
  "words",
  [
    ("generate", "--workdir=RUN", "--prompt=a"),
    ("generate", "--init_from=RUN", "--prompt=a"),
    ("evaluate", "--workdir=RUN"),
    ("convert", "--to=hf", "--workdir=RUN", "--output=RUN/out"),
    ("report", "--workdir=RUN"),
    ("report", "--compare=RUN,OTHER", "--output=RUN/out"),
    ("benchmark", "decode", "--workdir=RUN"),
    ("benchmark", "memory", "--workdir=RUN", "--activities=evaluation"),
    pytest.param(("benchmark", "serve", "--workdir=RUN"), marks=pytest.mark.slow),
  ],
  ids=" ".join,
)
def test_programs_name_their_option(folders, tmp_path, words):
  workdir, _ = moved(folders, tmp_path)
  other = another_seed(workdir)
  program, *options = [word.replace("RUN", str(workdir)).replace("OTHER", str(other)) for word in words]
  message = cli.complaint(program, *options)
  assert f"its base, {tmp_path}/gone, which can't be read" in message
  assert message.endswith(f"set init_from in {workdir}/config.json{REMEDY}")


def another_seed(workdir):
  """A copy of a run, as if it had another seed."""
  folder = workdir.parent / "other"
  shutil.copytree(workdir, folder)
  config = json.loads((folder / "config.json").read_text())
  config["train"]["seed"] = config["data"]["seed"] = 1
  (folder / "config.json").write_text(json.dumps(config))
  return folder


def test_bases_of_compared_runs(folders, tmp_path, monkeypatch):
  """One base for all runs with a frozen decoder, or one for each folder."""
  workdir, base = moved(folders, tmp_path)
  other = another_seed(workdir)
  loaded = []

  def compared(*folders, **given):
    loaded.clear()
    with pytest.raises(InputError) as error:
      report_page.call(monkeypatch, compare=",".join(map(str, folders)), output=tmp_path / "report", **given)
    return str(error.value)

  def statistics(run, *_):
    loaded.append(run.config.init_from)
    if len(loaded) == 2:
      raise InputError("both are loaded")
    return {}

  monkeypatch.setattr(report, "_statistics", statistics)
  assert compared(workdir, other, base=base) == "both are loaded"
  assert loaded == [str(base), str(base)]
  assert "gone, which can't be read" in compared(workdir, other, base=f"{base},")
  assert loaded == [str(base)]
  shutil.copyfile(folders / "run" / "config.json", workdir / "config.json")
  assert compared(workdir, other, base=f",{base}") == "both are loaded"
  assert loaded == [str(folders / "model"), str(base)]
  message = "--base: '/a,/b,/c' has 3 paths, but --compare has 2 folders; give one path for all runs with a frozen"
  assert compared(workdir, other, base="/a,/b,/c").startswith(message)
  meta = {str(workdir): {}, str(other): {"base": {}}}
  candidates = [types.SimpleNamespace(workdir=folder, meta=found) for folder, found in meta.items()]
  monkeypatch.setattr(report.flags, "FLAGS", types.SimpleNamespace(base=["there"]))
  assert report._bases(candidates) == {str(workdir): "", str(other): "there"}
  with pytest.raises(InputError, match="--base: 'there' is given, but the checkpoints of all runs have all parameters"):
    report._bases(candidates[:1])


@pytest.mark.slow
@pytest.mark.parametrize("source", ["workdir", "init_from"])
def test_a_program_reads_a_moved_base(folders, tmp_path, source):
  workdir, base = moved(folders, tmp_path)
  flags = ("--prompt=a", "--max_new_tokens=4", "--temperature=0")
  expected, _ = cli.run("generate", f"--workdir={folders / 'run'}", *flags)
  found, _ = cli.run("generate", f"--{source}={workdir}", f"--base={base}", *flags)
  assert (found["text"], found["pauses"]) == (expected["text"], expected["pauses"])
  message = cli.complaint("generate", f"--init_from={base}", f"--base={base}", *flags)
  assert message == f"--base: '{base}' is given, but {base} is not a run; omit it"


def test_the_harness_reads_a_moved_base(folders, tmp_path):
  pytest.importorskip("lm_eval", reason="the extra harness isn't installed")
  from cyb_jax.generation.harness import CybLM

  workdir, base = moved(folders, tmp_path)
  expected = cyb_jax.load(str(folders / "run"))
  for source in ("workdir", "init_from"):
    found = CybLM(**{source: str(workdir)}, base=str(base)).run
    assert found.config.init_from == str(base)
    assert_trees_equal(found.params, expected.params)
    with pytest.raises(InputError, match=r"set init_from in .*, or give it as base in --model_args$"):
      CybLM(**{source: str(workdir)})
  with pytest.raises(InputError, match=r"^base: 'x' is given, but a loaded run has all parameters; omit it"):
    CybLM(run=found, base="x")


def test_the_base_of_a_base_is_named_by_its_config(folders, tmp_path):
  """No option of the program gives the place of the base of another run."""
  workdir, _ = moved(folders, tmp_path)
  config = resolve(tuned(folders / "run"))
  for start in (
    lambda: training.train(dataclasses.replace(config, init_from=str(workdir)), tmp_path / "second"),
    lambda: pretrained.load(pretrained.open_pretrained(str(workdir)), config),
  ):
    with pytest.raises(InputError, match=rf"set init_from in {workdir}/config\.json to the model .* started from$"):
      start()


def test_a_checkpoint_with_all_parameters_needs_no_base(folders, tmp_path):
  """Such as those of earlier versions; the run goes on saving all parameters."""
  workdir, _ = moved(folders, tmp_path)
  run, found = cyb_jax.load(str(folders / "run")), saved(folders / "run", 2)
  # Checkpoint 2 with the frozen parameters.
  base = pretrained.open_base(workdir, str(folders / "model"), run.method, found.meta)
  params = jax.device_get(base.complete(found.state["params"], jax.tree.map(_shape, run.params)))
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "evaluation.json").unlink()
  checkpoints = checkpoints_in(workdir)
  meta = {name: value for name, value in found.meta.items() if name != "base"}
  checkpoints.save(2, found.state | {"params": params}, meta)
  checkpoints.close()
  assert_trees_equal(cyb_jax.load(str(workdir)).params, params)
  with pytest.raises(InputError, match=r"^base: .*model' is given, but checkpoint 2 of .*run has all parameters; omit"):
    cyb_jax.load(str(workdir), base=str(folders / "model"))
  training.train(resolve(tuned(tmp_path / "gone"), workdir), workdir)
  assert "base" not in saved(workdir).meta
  assert_trees_equal(saved(workdir).state["params"], jax.device_get(run.params))


def _shape(leaf):
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


@pytest.mark.slow
def test_a_run_as_a_base(folders, tmp_path):
  """The reference has the step, and the checksum is that of the checkpoint."""
  shutil.copytree(folders / "run", tmp_path / "first")
  first = tmp_path / "first"
  config = tuned(first, steps=0, epochs=0.0)
  training.train(resolve(config), tmp_path / "second")
  reference = BaseReference.of_checkpoint(saved(tmp_path / "second", 0).meta)
  assert reference == BaseReference(str(first), 4, checkpoints_in(first, read_only=True).fingerprint(4))
  run = cyb_jax.load(str(tmp_path / "second"))
  # The adapters of the first run are in the matrices of the second.
  expected = pretrained.load(pretrained.open_pretrained(str(first)), resolve(config)).params
  assert_trees_equal(run.params["decoder"]["layers_0"], expected["decoder"]["layers_0"])
  shutil.rmtree(first / "checkpoints" / "4")
  with pytest.raises(
    InputError, match=r"first, which can't be read \(checkpoint: there is no checkpoint 4; give one of 2"
  ):
    cyb_jax.load(str(tmp_path / "second"))


def test_a_repository_is_pinned():
  reference = BaseReference("hf://someone/small@0123", None, "")
  assert reference.pinned("hf://someone/small") == "hf://someone/small@0123"
  others = ("hf://someone/small@v2", "hf://someone/smaller", "hf://someone/smal", "/models/small")
  assert [reference.pinned(path) for path in others] == list(others)
  assert dataclasses.replace(reference, path="/models/small").pinned("/models/small") == "/models/small"


@pytest.mark.parametrize("reference", [None, [], {"path": "x"}, {"path": 1, "checkpoint": None, "checksum": "y"}])
def test_a_damaged_reference_is_refused(reference):
  with pytest.raises(InputError, match=r"checkpoint: base = .* is no reference to a model; restore the checkpoint"):
    BaseReference.of_checkpoint({"base": reference})
