"""Checkpoints of runs with a frozen decoder: what they contain, and the base from which the rest is read."""

import dataclasses
import json
import shutil

import imported_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import assert_trees_equal, tiny_config

import cyb_jax
from cyb_jax import configs, training
from cyb_jax.checkpointing.workdir import checkpoints_in
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.interop.base import BaseReference
from cyb_jax.studies.resolution import resolve


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
    r" model that the run started from, or give it as --base \(cyb-train: as --config\.init_from\)"
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
  with pytest.raises(InputError, match=r"--base: .*moved' is given, but .*model is not a run; omit it"):
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
  with pytest.raises(InputError, match=message):
    training.train(resolve(tuned(base), workdir), workdir)


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
  with pytest.raises(
    InputError, match=r"--base: .*model' is given, but checkpoint 2 of .*run has all parameters; omit"
  ):
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
