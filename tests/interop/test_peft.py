"""Adapters of peft in and out. The goldens are peft's own logits (tests/parity/write_adapters.py)."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_interop import GOLDENS, abstract, assert_same, logits, random_params

from cyb_jax import interop, methods
from cyb_jax.decoder import LoraConfig
from cyb_jax.errors import InputError
from cyb_jax.interop import peft, peft_export
from cyb_jax.methods import configure

ADAPTERS = sorted(path.parent.name for path in (GOLDENS / "adapters").glob("*/goldens.npz"))


def load(folder, lora=None):
  """(source for a run, config, params['decoder']) of a folder of adapters."""
  source = interop.open_source(folder)
  source = source.for_run(lora)
  config = dataclasses.replace(source.decoder, lora=None if source.merges else lora)
  return source, config, interop.load_decoder(source, abstract(config))


@pytest.mark.parametrize("name", ADAPTERS)
def test_logits_equal_those_of_peft(name, exact):
  with np.load(GOLDENS / "adapters" / name / "goldens.npz") as arrays:
    tokens, expected = arrays["tokens"], arrays["logits"]
  source, config, params = load(GOLDENS / "adapters" / name)
  np.testing.assert_allclose(logits(config, params, tokens), expected, rtol=0, atol=1e-4)
  base = interop.load_decoder(interop.open_source(source.path), abstract(source.decoder))
  assert abs(logits(config, base, tokens) - expected).max() > 0.5  # the adapters matter
  adapted = source.adapters.config
  assert source.adapters.everywhere == ("dora" not in name)
  if "dora" not in name:
    # A run with adapters of the same form goes on training them.
    _, config, apart = load(GOLDENS / "adapters" / name, adapted)
    assert config.lora == adapted
    np.testing.assert_allclose(logits(config, apart, tokens), expected, rtol=0, atol=1e-4)
    assert apart["layers_0"]["attention"]["query"]["lora_a"].shape == (config.d_model, adapted.rank)
  other = dataclasses.replace(adapted, alpha=1.0)
  assert interop.open_source(GOLDENS / "adapters" / name).for_run(other).merges


def adapted_run(base, targets=("query", "out", "down"), **options):
  """(source of the base, config, params, method's options) of a run with adapters, with random numbers."""
  source = interop.open_source(base)
  config = dataclasses.replace(source.decoder, lora=LoraConfig(rank=2, alpha=3.0, targets=targets))
  options = configure(**options)
  method = methods.build(options, config, vocab_size=config.vocab_size, weights="lora")
  params = random_params(method.init)
  plain = interop.load_decoder(source, abstract(source.decoder))
  params["decoder"] = merge_trees(params["decoder"], plain)
  return source, config, params, options


def merge_trees(tree, over):
  """The tree with the leaves of another one in place of its own."""
  return {k: merge_trees(v, over[k]) if isinstance(v, dict) and k in over else over.get(k, v) for k, v in tree.items()}


@pytest.mark.parametrize("options", [dict(name="cyb", pauses=2), dict(name="baseline")], ids=["cyb", "baseline"])
def test_export_and_import_are_inverse(options, tmp_path):
  base = shutil.copytree(GOLDENS / "llama", tmp_path / "base")
  source, config, params, options = adapted_run(base, **options)
  out = tmp_path / "out"
  count = peft_export.write_adapters(
    out, config, params, source, str(base), method=options, vocab_size=config.vocab_size, step=5
  )
  back, again, decoder = load(out, config.lora)
  assert again == config
  assert_same(decoder, params["decoder"])
  own = {name: leaf for name, leaf in params.items() if name != "decoder"}
  assert (back.extras.method, back.extras.step) == (options, 5)
  shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=None) for name, x in own.items()}
  assert_same(interop.load_own(back, shapes), jax.tree.map(jnp.asarray, own))
  written = load_file(out / "adapter_model.safetensors")
  assert set(written) == {
    f"base_model.model.model.layers.{layer}.{module}.lora_{part}.weight"
    for layer in range(2) for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj") for part in "AB"
  }  # fmt: skip
  assert count == sum(x.size for x in (*written.values(), *own.values()))
  fields = json.loads((out / "adapter_config.json").read_text())
  assert fields["target_modules"] == ["down_proj", "o_proj", "q_proj"]
  assert (fields["base_model_name_or_path"], fields["r"], fields["lora_alpha"]) == (str(base), 2, 3.0)
  assert (out / "cyb_jax.safetensors").exists() == bool(own)


def test_stacked_layers_are_exported(tmp_path):
  source, config, params, options = adapted_run(GOLDENS / "llama", name="baseline")
  write = functools.partial(
    peft_export.write_adapters, base=source, address="x", method=options, vocab_size=config.vocab_size
  )
  write(tmp_path / "plain", config, params)
  layers = jax.tree.map(lambda *x: jnp.stack(x), *(params["decoder"][f"layers_{i}"] for i in range(2)))
  stacked = {name: leaf for name, leaf in params["decoder"].items() if not name.startswith("layers_")}
  write(tmp_path / "stacked", dataclasses.replace(config, scan_layers=True), {"decoder": stacked | {"layers": layers}})
  assert_same(*(load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "stacked")))


def test_adapters_of_another_model_are_refused(tmp_path):
  base = shutil.copytree(GOLDENS / "llama", tmp_path / "base")
  source, config, params, options = adapted_run(base, name="cyb", pauses=2)
  out = tmp_path / "out"
  peft_export.write_adapters(out, config, params, source, "../base", method=options, vocab_size=config.vocab_size)
  interop.open_source(out)
  # The same shapes with other values.
  arrays = load_file(base / "model.safetensors")
  save_file(arrays | {"model.norm.weight": arrays["model.norm.weight"] + 1}, base / "model.safetensors")
  with pytest.raises(InputError, match=r"cyb_jax\.json: the adapters were trained on another model than .*base; set"):
    interop.open_source(out)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(base_model_name_or_path="../../olmo2"), r"q_proj\.lora_A\.weight has the shape|lora_B\.weight has the shape"),
    (dict(base_model_name_or_path="../nowhere/at/all"), "does not exist; set it to the folder of the model"),
    (dict(base_model_name_or_path=None), "base_model_name_or_path is missing"),
    (dict(base_model_name_or_path="../../adapters/llama_lora"), "there is no config.json"),
    (dict(peft_type="IA3"), r"peft_type = 'IA3'; this version only supports 'LORA'"),
    (dict(bias="all"), "bias = 'all'"),
    (dict(modules_to_save=["lm_head"]), r"modules_to_save = \['lm_head'\]"),
    (dict(rank_pattern={"q_proj": 4}), "rank_pattern = "),
    (dict(r=4), r"lora_A\.weight has the shape \[3, 36\] .* r = 4 require floats of shape \[4, 36\]"),
    (dict(use_new_thing=True), "use_new_thing = True is unknown"),
    (dict(lora_alpha=-1), r"tuning\.lora_alpha: -1\.0 must be positive"),
  ],
)
def test_bad_configs_are_refused(fields, message, tmp_path):
  folder = _copied(tmp_path)
  config = json.loads((folder / "adapter_config.json").read_text())
  (folder / "adapter_config.json").write_text(json.dumps(config | fields))
  with pytest.raises(InputError, match=message) as error:
    interop.open_source(folder)
  assert "\n" not in str(error.value)
  assert "llama_lora" in str(error.value)


def test_bad_tensors_are_refused(tmp_path):
  folder = _copied(tmp_path)
  path = folder / "adapter_model.safetensors"
  arrays = load_file(path)
  first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

  def refused(message, **changed):
    save_file({name: x for name, x in (arrays | changed).items() if x is not None}, path)
    with pytest.raises(InputError, match=message):
      interop.open_source(folder)

  refused(r"q_proj\.lora_A\.weight is missing, but the other part of the adapter is there", **{first: None})
  head = {"base_model.model.lm_head.lora_A.weight": np.ones((3, 36), np.float32)}
  refused(
    r"unknown tensor base_model\.model\.lm_head\.lora_A\.weight; this version adapts the matrices query, key", **head
  )
  refused("no adapters", **dict.fromkeys(arrays))
  path.unlink()
  with pytest.raises(InputError, match=r"adapter_model\.safetensors: missing"):
    interop.open_source(folder)


def _copied(tmp_path):
  for name in ("llama", "olmo2"):
    shutil.copytree(GOLDENS / name, tmp_path / name)
  return shutil.copytree(GOLDENS / "adapters" / "llama_lora", tmp_path / "adapters" / "llama_lora")


def test_matrices_that_files_join_have_one_adapter(tmp_path):
  source, config, params, options = adapted_run(GOLDENS / "gpt2", ("query", "up"), name="baseline")
  write = functools.partial(
    peft_export.write_adapters, tmp_path / "out", base=source, address="gpt2", method=options, vocab_size=67
  )
  with pytest.raises(InputError, match="the files of gpt2 join 'query' with other matrices"):
    write(config, params)
  assert not list(tmp_path.iterdir())
  with pytest.raises(InputError, match="the run has no adapters"):
    write(dataclasses.replace(config, lora=None), params)
  assert {name[0][-1] for name in peft.module_names(source)} == {"out", "up", "down"}
  # Two matrices have the name c_proj, and one of them an adapter.
  source, config, params, _ = adapted_run(GOLDENS / "gpt2", ("out",), name="baseline")
  write(config, params)
  fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
  assert (fields["target_modules"], fields["fan_in_fan_out"]) == (["attn.c_proj"], True)


def test_a_base_that_is_no_plain_folder(tmp_path):
  """Exports with pauses have more entries than their decoder, so adapters of them would be of another model."""
  config = interop.open_source(GOLDENS / "llama").decoder
  options = configure(name="cyb", pauses=2)
  method = methods.build(options, config)
  interop.write_huggingface(tmp_path / "llama", config, random_params(method.init), None, method=options)
  folder = shutil.copytree(GOLDENS / "adapters" / "llama_lora", tmp_path / "adapters" / "llama_lora")
  with pytest.raises(InputError, match="is no plain Hugging Face folder; only such models are adapted"):
    interop.open_source(folder)
