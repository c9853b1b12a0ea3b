"""Import and export of weights. The goldens are transformers' own logits, written by `make test-parity`."""

import dataclasses
import functools
import io
import json
import os
import pathlib
import shutil
import socket
import subprocess
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from file_formats import llama2c_bytes, write_gguf
from safetensors.numpy import load_file, save_file

from cyb_jax import configs, interop, methods
from cyb_jax.checkpointing.workdir import is_run
from cyb_jax.data.tokenizers import ByteTokenizer, train_sentencepiece
from cyb_jax.decoder import PRESETS, Decoder, DecoderConfig, empty_cache, init_params, num_params
from cyb_jax.errors import InputError, StorageError
from cyb_jax.interop import export, huggingface, new_folder
from cyb_jax.methods import configure
from cyb_jax.partitioning.mesh import make_mesh, shardings
from cyb_jax.stopping import prior_shift

GOLDENS = pathlib.Path(os.environ.get("CYB_JAX_GOLDENS", pathlib.Path(__file__).parents[1] / "parity" / "goldens"))
MODELS = sorted(path.parent.name for path in GOLDENS.glob("*/goldens.npz"))


def abstract(decoder_config, mesh=None):
  """The shapes and shardings of params['decoder']."""
  boxed = jax.eval_shape(functools.partial(init_params, Decoder(decoder_config)), jax.random.key(0))
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: here, nn.unbox(boxed))
  else:
    placed = shardings(boxed, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), placed)


def load(path, **fields):
  """(source, config, params['decoder']) of a model, with some fields of its config replaced."""
  source = interop.open_source(path)
  config = dataclasses.replace(source.decoder, **fields)
  return source, config, interop.load_decoder(source, abstract(config))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
  decoder, variables = Decoder(config), {"params": params}
  inputs = decoder.apply(variables, tokens, method="embed")
  return read_out(config, params, decoder.apply(variables, inputs, jnp.arange(tokens.shape[1])[None]))


def read_out(config, params, hidden):
  read = hidden @ params.get("unembedding", params["embedding"]).T
  return read if config.soft_cap is None else config.soft_cap * jnp.tanh(read / config.soft_cap)


def golden(name):
  """(tokens, logits)."""
  with np.load(GOLDENS / name / "goldens.npz") as arrays:
    return arrays["tokens"], arrays["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, exact):
  tokens, expected = golden(name)
  assert expected.std() > 1.4  # nats: a mistake would give a larger difference
  _, config, params = load(GOLDENS / name)
  np.testing.assert_allclose(logits(config, params, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  "name", ["gemma2", "gemma3", "gpt2", "llama_llama3", "mistral", "olmo2", "qwen3_window", "smollm3"]
)
def test_decoding_on_a_cache_gives_the_logits_of_transformers(name, exact):
  """A prompt of four tokens at once, and the others one by one; and the whole text in blocks."""
  tokens, expected = golden(name)
  _, config, params = load(GOLDENS / name)
  decoder, variables = Decoder(config), {"params": params}

  @functools.partial(jax.jit, static_argnames="empty")
  def extend(tokens, positions, cache, start, empty=False):
    inputs = decoder.apply(variables, tokens, method="embed")
    return decoder.apply(variables, inputs, positions, cache, None if empty else start, method="extend")

  places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  cache, states = empty_cache(config, len(tokens), 12), []
  for first, end in ((0, 4), *((step, step + 1) for step in range(4, tokens.shape[1]))):
    start = jnp.full(len(tokens), first)
    hidden, cache = extend(tokens[:, first:end], places[:, first:end], cache, start, empty=first == 0)
    states.append(hidden)
  np.testing.assert_allclose(read_out(config, params, jnp.concatenate(states, 1)), expected, rtol=0, atol=1e-4)
  blocks = dataclasses.replace(config, attention="blocks")
  inputs = decoder.apply(variables, tokens, method="embed")
  hidden = jax.jit(Decoder(blocks).apply, static_argnames="slots_per_position")(
    variables, inputs, places[:1], slots_per_position=1
  )
  np.testing.assert_allclose(read_out(config, params, hidden), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_untied_biased", "pythia"])
def test_stacked_layers_on_a_mesh_equal_separate_layers(name):
  source, config, params = load(GOLDENS / name)
  mesh = make_mesh(configs.ParallelismConfig(fsdp=2, tensor=2))
  stacked = dataclasses.replace(config, scan_layers=True)
  placed = interop.load_decoder(source, abstract(stacked, mesh))
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layers_{i}"] for i in range(2)))
  jax.tree.map(np.testing.assert_array_equal, placed["layers"], together)
  np.testing.assert_array_equal(placed["embedding"], params["embedding"])
  kernel = placed["layers"]["mlp"]["up"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[1:] == (config.d_model // 2, config.mlp_size // 2)


def tensors(folder):
  return {name: array for path in sorted(folder.glob("model*.safetensors")) for name, array in load_file(path).items()}


def random_params(init, seed=0):
  """Parameters with the shapes of `init`; no parameter is zero or one."""
  shapes = jax.eval_shape(lambda key: nn.unbox(init(key)), jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


def assert_same(a, b):
  """Compares leaves bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


# Export.


@pytest.mark.parametrize("name", MODELS)
def test_export_and_import_are_inverse(name, tmp_path):
  """The exported file equals the imported file bit for bit; so does the config."""
  _, config, params = load(GOLDENS / name)
  interop.write_huggingface(tmp_path / "out", config, {"decoder": params}, None)
  source, again, back = load(tmp_path / "out")
  assert again == config
  assert source.extras is None
  assert_same(back, params)
  theirs, ours = tensors(GOLDENS / name), tensors(tmp_path / "out")
  assert theirs.keys() == ours.keys()
  for tensor, array in theirs.items():
    np.testing.assert_array_equal(ours[tensor], array)
  written, found = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "out", GOLDENS / name))
  same = ("architectures", "model_type", "vocab_size", "rope_parameters", "tie_word_embeddings", "layer_types")
  for field in same:
    if field in found:
      assert written[field] == found[field], field


def test_export_in_shards_of_16_bits(tmp_path):
  """An index, and shards of at most the requested size; the bfloat16 weights are imported exactly in either dtype."""
  _, config, params = load(GOLDENS / "gemma", scan_layers=True)
  interop.write_huggingface(tmp_path / "out", config, {"decoder": params}, None, dtype="bfloat16", max_shard_bytes=9000)
  shards = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(shards) > 3
  assert max(path.stat().st_size for path in shards) < 9000 + 2000  # the header's size
  index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors(tmp_path / "out").values())
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  _, _, wide = load(tmp_path / "out", scan_layers=True)
  assert_same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
  _, _, narrow = load(tmp_path / "out", scan_layers=True, param_dtype="bfloat16")
  assert_same(narrow, rounded)


class Words(ByteTokenizer):
  """A tokenizer with 61 ids for a model with 67 rows; it records what is written for transformers."""

  vocab_size = 61
  separator_id = 60
  start_id = 59

  def write_huggingface(self, directory, added, *, starts):
    (pathlib.Path(directory) / "tokenizer.json").write_text(json.dumps(list(added)))


_RMS = dict(num_layers=2, d_model=24, num_heads=4, num_kv_heads=2, head_size=6, mlp_size=40, vocab_size=67)
_GPT = dict(
  _RMS, num_kv_heads=4, norm="layernorm", activation="gelu_tanh", gated_mlp=False, attention_bias="all", mlp_bias=True
)
_EXPORTS = {
  "own_rows": (
    _RMS,
    dict(name="cyb", pauses=3, omega=(0.0, 0.0, 1.0, 1.0), gamma=(1.0, 0.9, 0.8, 0.7), pause_offset=True,
         calibration_batches=2),
  ),
  "unit_of_one_pause_for_all": (
    _GPT, dict(name="cyb", pauses=2, dont_know="unit", pause_shared=True, loss="dp", rho=(1.0, 1.0, 2.0), alpha=0.01)
  ),
  "untied": (dict(_GPT, tied_embeddings=False, scan_layers=True), dict(name="cyb", pauses=2, dont_know_prior=None)),
  "no_dont_know": (_RMS, dict(name="tbys", pauses=2)),
  "shares": (_RMS, dict(name="constant_stop", pauses=2)),
  "no_pauses": (_RMS, dict(name="baseline")),
}  # fmt: skip


@pytest.mark.parametrize("name", _EXPORTS)
def test_pauses_are_exported_and_imported(name, tmp_path):
  decoder, options = _EXPORTS[name]
  decoder, options = DecoderConfig(**decoder), configure(**options)
  method = methods.build(options, decoder, vocab_size=Words.vocab_size)
  params = random_params(method.init)
  out = tmp_path / "out"
  interop.write_huggingface(out, decoder, params, Words(), method=options, step=7)

  source, config, back = load(out, scan_layers=decoder.scan_layers)
  assert config == decoder  # the appended entries don't belong to the decoder
  assert source.extras.method == options
  assert (source.extras.step, source.extras.vocab_size) == (7, 61)
  # Only vocabulary entries are written; padding rows are imported as zeros.
  for table in ("embedding", "unembedding"):
    if table in params["decoder"]:
      params["decoder"][table] = params["decoder"][table].copy()
      params["decoder"][table][Words.vocab_size :] = 0
  assert_same(back, params["decoder"])
  own = {k: v for k, v in params.items() if k != "decoder"}
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in own.items()}
  assert_same(interop.load_own(source, shapes), own)
  assert set(source.extras.own) == set(own)

  # The rows of the tables that transformers sees.
  rows, there = Words.vocab_size, tensors(out)
  pauses, abstains = getattr(options, "pauses", 0), "dont_know" in own
  stem = "gpt_neox.embed_in" if decoder.norm == "layernorm" else "model.embed_tokens"
  table = there[f"{stem}.weight"]
  fields = json.loads((out / "config.json").read_text())
  assert len(table) == fields["vocab_size"] == rows + pauses + abstains
  assert (fields["eos_token_id"], fields["bos_token_id"]) == (60, 59)
  for k in range(pauses):
    np.testing.assert_array_equal(table[rows + k], own["pause_input"][0 if options.pause_shared else k])
  if abstains:
    outputs = table if decoder.tied_embeddings else there["embed_out.weight"]
    np.testing.assert_array_equal(outputs[rows + pauses], own["dont_know"])
    assert source.extras.dont_know_id == rows + pauses
    expected = prior_shift(options.dont_know, options.dont_know_prior, 61 + 1)
    assert fields["cyb_jax"]["prior_shift"] == source.extras.prior_shift == expected
  if not decoder.tied_embeddings:
    assert not there["embed_out.weight"][rows : rows + pauses].any()
    assert not table[rows + pauses :].any()
  names = [*(f"<pause_{k + 1}>" for k in range(pauses)), *(["<dont_know>"] if abstains else [])]
  added = json.loads((out / "tokenizer.json").read_text())
  assert added == [[rows + place, name] for place, name in enumerate(names)]
  if not own:
    assert not (out / "cyb_jax.safetensors").exists()


def test_a_tokenizer_is_exported_and_imported(tmp_path):
  """A tokenizer that transformers supports, with our entries appended, and an unsupported tokenizer in its own form."""
  _, config, params = load(GOLDENS / "llama")
  texts = ["A film that wasn't bad, wasn't good"]
  rows = 384 - config.vocab_size
  config = dataclasses.replace(config, vocab_size=384)
  params = {**params, "embedding": jnp.pad(params["embedding"], ((0, rows), (0, 0)))}
  for tokenizer in (ByteTokenizer(), train_sentencepiece(texts, 276)):
    own = {"pause_input": jnp.ones((2, config.d_model)), "dont_know": jnp.ones(config.d_model)}
    out = tmp_path / tokenizer.describe()["kind"]
    interop.write_huggingface(out, config, {"decoder": params} | own, tokenizer, method=configure(pauses=2))
    source = interop.open_source(out)
    assert source.tokenizer().describe() == tokenizer.describe()
    assert source.extras.vocab_size == tokenizer.vocab_size
    assert source.tokenizer().encode(texts[0]) == tokenizer.encode(texts[0])


# The method in an export of version 0.1: the options of all methods, tuples as lists.
_ALL_OPTIONS = {
  "loss": "ap", "pauses": 0, "omega": None, "gamma": None, "rho": None, "alpha": 0.0, "recipe": "constant",
  "slot_budget": 0.0, "policy_floor": 0.1, "dont_know": "token", "dont_know_prior": 0.9, "calibration_batches": 0,
  "stopping_warmup": 0, "pause_input": "pause", "pause_visibility": "visible", "pause_offset": False,
  "pause_shared": False, "pause_positions": "token", "pause_places": "random", "pause_fraction": 0.1, "jacobi": [2, 3],
  "router_penalty": 0.0, "prune_below": 1e-4, "fork_layers": None, "stream_budget": 2.0, "combine": "probabilities",
}  # fmt: skip


@pytest.mark.parametrize("name", _EXPORTS)
def test_exports_of_version_0_1_load(name, tmp_path):
  decoder, options = _EXPORTS[name]
  decoder, options = DecoderConfig(**decoder), configure(**options)
  method = methods.build(options, decoder, vocab_size=Words.vocab_size)
  out = tmp_path / "out"
  interop.write_huggingface(out, decoder, random_params(method.init), Words(), method=options, step=7)
  fields = json.loads((out / "config.json").read_text())
  written = fields["cyb_jax"]["method"]
  written = {name: value for name, value in written.items() if name != "slot_heads"}  # newer than version 0.1
  fields["cyb_jax"]["method"] = _ALL_OPTIONS | written
  assert len(fields["cyb_jax"]["method"]) == 27
  (out / "config.json").write_text(json.dumps(fields))
  assert interop.open_source(out).extras.method == options
  # Version 0.1 never wrote another value than the default for an option that the method does not have.
  fields["cyb_jax"]["method"]["prune_below"] = 0.5
  (out / "config.json").write_text(json.dumps(fields))
  with pytest.raises(InputError, match=r"cyb_jax\.method\.prune_below: unknown field; method .* has no such option"):
    interop.open_source(out)


def test_slot_heads_are_not_exported(tmp_path):
  decoder, options = DecoderConfig(**_RMS), configure(pauses=2, slot_heads=True)
  params = random_params(methods.build(options, decoder).init)
  with pytest.raises(InputError, match=r"^method\.slot_heads: True is not supported"):
    interop.write_huggingface(tmp_path / "out", decoder, params, None, method=options)
  assert not (tmp_path / "out").exists()


def test_own_rows_of_another_shape_are_refused(tmp_path):
  decoder, options = DecoderConfig(**_RMS), configure(pauses=2)
  params = random_params(methods.build(options, decoder).init)
  interop.write_huggingface(tmp_path / "out", decoder, params, None, method=options)
  source = interop.open_source(tmp_path / "out")
  with pytest.raises(InputError, match=r"pause_input has the shape \(2, 24\); it must have the shape \(3, 24\)"):
    interop.load_own(source, {"pause_input": jax.ShapeDtypeStruct((3, 24), jnp.float32)})
  with pytest.raises(InputError, match=r"pause_offset is missing; it must have"):
    interop.load_own(source, {"pause_offset": jax.ShapeDtypeStruct((2, 24), jnp.float32)})


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    (dict(own={}), r"own = \{\}, but its method has .*'pause_input': \[3, 24\]"),
    (dict(own={"pause_input": [1, 24]}), r"own = .*\[1, 24\]"),
    (dict(own={"pause_input": 3}), "own = "),
    (dict(own=None), "own is missing"),
    (dict(pauses=2), r"pause_ids has 3 entries, but cyb_jax\.method\.pauses = 2"),
    (dict(pauses="3"), r"cyb_jax\.method\.pauses: '3' must be int"),
    (dict(loss=7), r"cyb_jax\.method\.loss: 7 must be str"),
    (dict(loss="xy"), r"cyb_jax\.method\.loss: 'xy' must be one of"),
    (dict(omega=[1.0, "2", 1.0, 1.0]), r"method\.omega = .* must be a list of numbers"),
    (dict(patience=3), r"cyb_jax\.method\.patience: unknown field; there are pauses, "),
    (dict(name="tbys", dont_know_prior=0.9), "cyb_jax.own = "),
    (dict(pause_ids=67), "pause_ids = 67 must be of type list"),
    (dict(dont_know_id=70.0), "dont_know_id = 70.0 must be of type int"),
    (dict(pause_ids=[67, 68], pauses=2), r"the appended entries \[67, 68, 70\] don't give vocab_size = 71"),
    (dict(pause_ids=[67.0, 68, 69]), r"the appended entries \[67\.0, 68, 69, 70\] don't"),
    (dict(name="constant_stop", own={"pause_input": [3, 24], "stopping_logits": [4]}), "dont_know_id = 70, but its"),
    (dict(version=2), r"cyb_jax\.version = 2; this version reads 1"),
    (dict(rows="67"), "rows = '67' must be of type int"),
    (None, "cyb_jax = 3 must be an object"),
  ],
)  # fmt: skip
def test_an_inconsistent_export_is_refused(changed, message, tmp_path):
  decoder, options = DecoderConfig(**_RMS), configure(pauses=3)
  params = random_params(methods.build(options, decoder).init)
  interop.write_huggingface(tmp_path / "out", decoder, params, None, method=options)
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  for name, value in (changed or {}).items():
    there = fields["cyb_jax"]
    (there if name in there else there["method"])[name] = value
  if changed is None:
    fields["cyb_jax"] = 3
  (tmp_path / "out" / "config.json").write_text(json.dumps(fields))
  with pytest.raises(InputError, match=message) as error:
    interop.open_source(tmp_path / "out")
  assert "out/config.json: cyb_jax" in str(error.value)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (dict(soft_cap=30.0), "closest, LlamaForCausalLM, requires decoder.soft_cap = None, not 30.0"),
    (dict(rope_fraction=1 / 3), "LlamaForCausalLM, requires decoder.rope_fraction = 1.0"),
    (dict(norm="layernorm", attention_bias="all", mlp_bias=True, gated_mlp=False), "decoder.num_kv_heads = 4"),
    (dict(d_model=26, mlp_bias=True), "decoder.num_heads to divide d_model = 26, not 4"),
  ],
)
def test_a_config_that_no_family_expresses_is_refused(fields, message, tmp_path):
  with pytest.raises(InputError, match=message):
    interop.write_huggingface(tmp_path / "out", DecoderConfig(**(_RMS | fields)), {"decoder": {}}, None)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("preset", "architecture"),
  [
    ("gpt2_124m", "GPTNeoX"), ("pythia_160m", "GPTNeoX"), ("smollm2_135m", "Llama"), ("tiny", "Llama"),
    ("gemma1_2b", "Gemma"),
  ],
)  # fmt: skip
def test_presets_have_a_family(preset, architecture):
  assert export.family_of(PRESETS[preset]).architecture == f"{architecture}ForCausalLM"


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
  _, config, params = load(GOLDENS / "llama")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "file").touch()
  with pytest.raises(InputError, match="not empty"):
    interop.write_huggingface(tmp_path / "full", config, {"decoder": params}, None)
  lora = {**params["layers_0"], "attention": {"query": {"lora_a": np.zeros(1)}}}
  with pytest.raises(
    InputError, match=r"layers_0\.attention\.query\.lora_a has no tensor in this architecture; merge it"
  ):
    interop.write_huggingface(tmp_path / "out", config, {"decoder": {**params, "layers_0": lora}}, None)

  def fail(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(new_folder, "_sync", fail)
  with pytest.raises(StorageError, match="disk is full"):
    interop.write_huggingface(tmp_path / "out", config, {"decoder": params}, None)
  assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_full_disk_reported_by_safetensors(tmp_path, monkeypatch):
  """No files are left, nor the folders that were created for the output."""
  import safetensors.numpy

  _, config, params = load(GOLDENS / "llama")

  def fail(*_, **__):
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

  with monkeypatch.context() as patch:
    patch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(StorageError, match="new/deeper/out can't be written: the disk is full"):
      interop.write_huggingface(tmp_path / "new" / "deeper" / "out", config, {"decoder": params}, None)
  assert not list(tmp_path.iterdir())
  interop.write_huggingface(tmp_path / "new" / "deeper" / "out", config, {"decoder": params}, None)
  assert interop.open_source(tmp_path / "new" / "deeper" / "out").decoder == config


def test_leftovers_of_killed_writes_are_removed(tmp_path):
  _, config, params = load(GOLDENS / "llama")
  ended = subprocess.Popen(["true"])
  ended.wait()
  host = socket.gethostname()
  gone = [f"out.{host}.{ended.pid}.tmp", f"out.{host}.{os.getpid()}.tmp"]
  # Of a running process, another output, another host, another program.
  kept = [
    f"out.{host}.{os.getppid()}.tmp",
    f"other.{host}.{ended.pid}.tmp",
    f"out.x{host}.{ended.pid}.tmp",
    "out.x.tmp",
  ]
  for name in gone + kept:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").touch()
  interop.write_huggingface(tmp_path / "out", config, {"decoder": params}, None)
  assert {path.name for path in tmp_path.iterdir()} == {"out", *kept}


def test_the_second_of_two_writers_of_one_folder_is_refused(tmp_path):
  output = tmp_path / "out"

  def second():
    with new_folder.new_folder(output) as folder:
      (folder / "config.json").write_text("second")
      output.mkdir()
      (output / "config.json").write_text("first")

  with pytest.raises(InputError, match=r"--output: .*out was written by another process in the meantime, and is"):
    second()
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  assert (output / "config.json").read_text() == "first"


# GGUF and llama2.c files, written here from a golden model.


@pytest.mark.parametrize("name", ["llama", "llama_untied_biased", "qwen2", "gemma"])
def test_gguf_of_f32(name, tmp_path, exact):
  source, config, params = load(GOLDENS / name)
  architecture = name.split("_")[0]
  write_gguf(tmp_path / "m.gguf", tensors(GOLDENS / name), config, architecture)
  source, found, back = load(tmp_path / "m.gguf")
  assert (source.kind, found) == ("gguf", config)
  tokens, expected = golden(name)
  np.testing.assert_allclose(logits(found, back, tokens), expected, rtol=0, atol=1e-4)
  if architecture != "gemma":  # the scales are rounded after adding 1
    assert_same(back, params)


_WINDOW = dict(attention__sliding_window=3)
_GGUF = {
  "qwen3": {}, "olmo2": {}, "llama_linear": dict(rope__scaling__type="linear", rope__scaling__factor=4.0),
  "llama_yarn": dict(
    rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=6
  ),
  "gemma2": _WINDOW | dict(attn_logit_softcapping=2.0, final_logit_softcapping=6.0),
  "gemma3": _WINDOW | dict(
    attention__sliding_window_pattern=2, rope__freq_base_swa=1000.0, rope__scaling__type="linear",
    rope__scaling__factor=8.0,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", _GGUF)
def test_gguf_of_newer_families(name, tmp_path):
  """The config and the weights; test_gguf_of_f32 and the goldens show that these give the logits."""
  _, config, params = load(GOLDENS / name)
  # llama.cpp has no field for this number.
  config = dataclasses.replace(config, query_scalar=None)
  architecture = name.split("_")[0]
  write_gguf(tmp_path / "m.gguf", tensors(GOLDENS / name), config, architecture, **_GGUF[name])
  _, found, back = load(tmp_path / "m.gguf")
  assert found == config
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=3e-7), back, params)


def test_gguf_of_llama3(tmp_path):
  """The scaling is a tensor of divisors there, from which its numbers follow."""
  config = DecoderConfig(
    **_RMS | dict(d_model=64, num_heads=1, num_kv_heads=1, head_size=64), rope_base=5e5,
    rope_scaling="llama3:factor=32,context=8192",
  )  # fmt: skip
  params = random_params(functools.partial(init_params, Decoder(config)))
  interop.write_huggingface(tmp_path / "hf", config, {"decoder": params}, None)
  plain = 5e5 ** -(np.arange(0, 64, 2) / 64)
  divisors = (plain / config.scaling.frequencies(64, 5e5)).astype(np.float32)
  assert (divisors[0], divisors[-1]) == (1, 32)
  arrays = tensors(tmp_path / "hf")
  write_gguf(tmp_path / "m.gguf", arrays | {"rope_freqs.weight": divisors}, config, "llama")
  _, found, back = load(tmp_path / "m.gguf")
  assert found == config
  assert_same(back, params)
  write_gguf(tmp_path / "n.gguf", arrays | {"rope_freqs.weight": divisors**2}, config, "llama")
  with pytest.raises(InputError, match=r"n\.gguf: the tensor rope_freqs\.weight scales .* in another way than Llama 3"):
    interop.open_source(tmp_path / "n.gguf")


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_1", "BF16"])
def test_gguf_dequantised(quantisation, tmp_path):
  """The package's values of each matrix, in our order; permuting rows and quantising commute."""
  gguf = pytest.importorskip("gguf")
  config = DecoderConfig(**(_RMS | dict(d_model=64, head_size=16, mlp_size=96)))
  params = random_params(functools.partial(init_params, Decoder(config)))
  interop.write_huggingface(tmp_path / "hf", config, {"decoder": params}, None)
  arrays = tensors(tmp_path / "hf")
  write_gguf(tmp_path / "m.gguf", arrays, config, "llama", quantisation)
  kind = gguf.GGMLQuantizationType[quantisation]
  for name, array in arrays.items():
    if array.ndim == 2:
      arrays[name] = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind)
  shutil.copytree(tmp_path / "hf", tmp_path / "rounded")
  save_file(arrays, tmp_path / "rounded" / "model.safetensors")
  assert_same(load(tmp_path / "m.gguf")[2], load(tmp_path / "rounded")[2])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", ["legacy", "version1"])
def test_llama2c(form, tied, tmp_path):
  config = DecoderConfig(**(_RMS | dict(tied_embeddings=tied)))
  params = random_params(functools.partial(init_params, Decoder(config)))
  interop.write_huggingface(tmp_path / "hf", config, {"decoder": params}, None)
  written = llama2c_bytes(form, tensors(tmp_path / "hf"), config)
  (tmp_path / "m.bin").write_bytes(written)
  source, found, back = load(tmp_path / "m.bin")
  assert (source.kind, found) == ("llama2c", config)
  assert_same(back, params)
  # A tokenizer may follow; a truncated model is refused.
  (tmp_path / "m.bin").write_bytes(written + b"more")
  assert_same(load(tmp_path / "m.bin")[2], params)
  kept = len(written) - (12 * 6 * 4 if form == "legacy" and tied else 0)  # except for the cosines and sines
  (tmp_path / "m.bin").write_bytes(written[: kept - 1])
  with pytest.raises(InputError, match=r"m\.bin: truncated, \d+ bytes; the tensor .* ends at"):
    interop.open_source(tmp_path / "m.bin")


# Published configs.

_PUBLISHED = {
  "llama_1b": {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
  },
  "smollm2_135m": {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 0, "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": True,
    "vocab_size": 49152,
  },
  "pythia_160m": {
    "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
    "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12, "num_hidden_layers": 12,
    "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
    "transformers_version": "4.24.0", "use_cache": True, "use_parallel_residual": True, "vocab_size": 50304,
  },
  "gemma1_2b": {
    "architectures": ["GemmaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 2,
    "eos_token_id": 1, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
    "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
    "transformers_version": "4.38.0.dev0", "use_cache": True, "vocab_size": 256000,
  },
}  # fmt: skip


@pytest.mark.parametrize("preset", _PUBLISHED)
def test_published_configs_equal_our_presets(preset, tmp_path):
  (tmp_path / "config.json").write_text(json.dumps(_PUBLISHED[preset]))
  _, config, _ = huggingface.read_config(tmp_path / "config.json")
  assert dataclasses.replace(config, initializer=PRESETS[preset].initializer) == PRESETS[preset]


# The fields of published configs that differ from transformers' defaults, and the models' sizes by their reports.
_SIZED = {
  "Qwen3-0.6B": (
    {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
     "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
     "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
     "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
     "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936},
    596_049_920, {"query_key_norm": "head", "window": None},
  ),
  "gemma-2-2b": (
    {"architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
     "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
     "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
     "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
     "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
     "sliding_window": 4096, "cache_implementation": "hybrid", "vocab_size": 256000},
    2_614_341_888, {"window": 4096, "global_every": 2, "attention_soft_cap": 50.0, "soft_cap": 30.0},
  ),
  "gemma-3-1b": (
    {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
     "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
     "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
     "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
     "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
     "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
     "vocab_size": 262144},
    999_885_952, {"window": 512, "global_every": 6, "local_rope_base": 1e4, "rope_base": 1e6, "soft_cap": None},
  ),
  "SmolLM3-3B": (
    {"architectures": ["SmolLM3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
     "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
     "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3", "no_rope_layer_interval": 4,
     "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
     "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
     "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256},
    3_075_098_624, {"global_every": 4, "global_rope": False},
  ),
  "OLMo-2-0425-1B": (
    {"architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
     "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "olmo2", "num_attention_heads": 16,
     "num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None,
     "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
    1_484_916_736, {"norm_placement": "after", "query_key_norm": "all"},
  ),
  "gpt2": (
    {"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
     "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
     "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
     "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
     "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257},
    124_439_808, {"learned_positions": 1024},
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", _SIZED)
def test_published_configs(name, tmp_path):
  written, size, fields = _SIZED[name]
  (tmp_path / "config.json").write_text(json.dumps(written))
  _, config, _ = huggingface.read_config(tmp_path / "config.json")
  assert num_params(dataclasses.replace(config, scan_layers=True)) == size
  for field, value in fields.items():
    assert getattr(config, field) == value, field


def test_the_config_of_qwen2_0_5b(tmp_path):
  fields = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
  }  # fmt: skip
  (tmp_path / "config.json").write_text(json.dumps(fields))
  _, config, _ = huggingface.read_config(tmp_path / "config.json")
  assert num_params(config) == 494_032_768  # the number of parameters in the model card


# Refused sources.


@pytest.mark.parametrize(
  ("model", "field", "value", "message"),
  [
    ("llama", "architectures", ["PhiForCausalLM"], r"json: architectures = \['Phi.*LlamaForCausalLM, Qwen2"),
    ("llama", "architectures", 5, "architectures = 5 must be of type list"),
    ("llama", "architectures", True, "architectures = True must be of type list"),
    ("llama", "model_type", "gemma2", "model_type = 'gemma2'"),
    ("llama", "max_position_embeddings", "64", "max_position_embeddings = '64' must be of type int"),
    ("llama", "max_position_embeddings", 64.0, "max_position_embeddings = 64.0 must be of type int"),
    ("llama", "max_position_embeddings", -5, "max_position_embeddings = -5 must be at least 1"),
    ("llama", "rope_parameters", {"rope_theta": True}, "rope_parameters.rope_theta = True must be of type float"),
    ("llama", "rope_parameters", {"rope_theta": 1e4, "factor": 2}, "rope_parameters.factor = 2 is unknown"),
    ("llama", "rope_theta", True, "rope_theta = True must be of type float"),
    ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}, "rope_parameters.factor is missing"),
    ("llama", "rope_parameters", {"rope_type": "longrope"}, r"rope_type = 'longrope'; this version only supports"),
    ("llama", "rope_scaling", {"type": "linear", "factor": 0.5}, r"rope_scaling: factor = 0\.5 must be at least 1"),
    ("llama", "rope_scaling", {"type": "yarn", "factor": 2.0, "mix": 1}, r"rope_scaling\.mix = 1 is unknown"),
    ("llama_dynamic", "max_position_embeddings", None, r"max_position_embeddings is missing, and rope_parameters has"),
    ("mistral", "sliding_window", 65, r"sliding_window = 65 is longer than the context, max_position_embeddings = 64"),
    ("mistral", "sliding_window", 0, "sliding_window = 0 must be at least 1"),
    ("gemma2", "layer_types", ["full_attention"], "layer_types has 1 entries; it must have one of 'sliding_attention'"),
    ("gemma2", "layer_types", ["chunked_attention"] * 3, "layer_types has 'chunked_attention'"),
    ("gemma2", "layer_types", ["full_attention"] * 2 + ["sliding_attention"], "in the order GGl; this version"),
    ("gemma2", "sliding_window", None, "sliding_window = None must be a number of tokens"),
    ("gemma3", "attn_logit_softcapping", 50.0, r"attn_logit_softcapping = 50\.0; this version only supports None"),
    ("gemma3", "use_bidirectional_attention", True, "use_bidirectional_attention = True"),
    ("smollm3", "no_rope_layers", [1, 2, 1], "must have 0 or 1 for each of the 3 layers"),
    ("smollm3", "use_sliding_window", True, "use_sliding_window = True"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", "n_head", 5, "n_embd = 36 must be a multiple of n_head = 5"),
    ("llama", "attention_multiplier", 0.1, "attention_multiplier = 0.1 is unknown"),
    ("llama", "quantization_config", {"quant_method": "new"}, r"quantization_config = .*'new'.* only supports None"),
    ("llama", "hidden_act", "relu2", "hidden_act = 'relu2' is not one of"),
    ("llama", "hidden_size", 37, r"\[67, 36\]; the config requires \[67, 37\]"),
    ("llama", "num_hidden_layers", 3, r"the tensor model\.layers\.2.* is missing"),
    ("llama", "num_hidden_layers", 1, r"unknown tensor model\.layers\.1\..* and \d more"),
    ("llama", "vocab_size", None, "vocab_size is missing"),
    ("llama", "vocab_size", "67", "vocab_size = '67' must be of type int"),
    ("llama", "num_key_value_heads", 4, "decoder.num_kv_heads: 4"),
    ("qwen2", "layer_types", ["full_attention", "sliding_attention"], "use_sliding_window is not true"),
    ("gemma", "final_logit_softcapping", 30.0, "final_logit_softcapping = 30.0"),
    ("gemma", "hidden_activation", "gelu", "hidden_activation = 'gelu'"),
    ("pythia", "hidden_act", "relu", "hidden_act = 'relu'"),
  ],
)  # fmt: skip
def test_configs_of_unsupported_models_are_refused(model, field, value, message, tmp_path):
  folder = shutil.copytree(GOLDENS / model, tmp_path / "m")
  fields = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(fields | {field: value}))
  with pytest.raises(InputError, match=message) as error:
    interop.open_source(folder)
  assert "\n" not in str(error.value)
  assert str(folder) in str(error.value)


def test_older_field_names_give_the_same_config(tmp_path):
  for name, new, old in (
    ("llama", "rope_parameters", {"rope_theta": 1000, "rope_scaling": None, "torch_dtype": "float32"}),
    ("pythia", "rope_parameters", {"rotary_emb_base": 1000, "rotary_pct": 0.25}),
    ("gemma", "hidden_act", {"hidden_act": "gelu", "hidden_activation": None}),
  ):
    folder = shutil.copytree(GOLDENS / name, tmp_path / name)
    fields = json.loads((folder / "config.json").read_text())
    del fields[new]
    (folder / "config.json").write_text(json.dumps(fields | old))
    assert interop.open_source(folder).decoder == interop.open_source(GOLDENS / name).decoder


def test_mistral_without_a_window_is_llama(tmp_path):
  folder = shutil.copytree(GOLDENS / "llama", tmp_path / "m")
  fields = json.loads((folder / "config.json").read_text())
  del fields["attention_bias"], fields["mlp_bias"], fields["pretraining_tp"]
  fields |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
  # A missing field means a window of 4096 tokens, null no window.
  (folder / "config.json").write_text(json.dumps(fields | {"max_position_embeddings": 4096}))
  assert interop.open_source(folder).decoder.window == 4096
  (folder / "config.json").write_text(json.dumps(fields | {"sliding_window": None}))
  _, config, params = load(folder)
  _, expected_config, expected = load(GOLDENS / "llama")
  assert config == expected_config
  assert_same(params, expected)


def test_gpt2_without_its_output_table(tmp_path):
  """Files of the model without the output table have shorter names, and older ones have the causal mask as a buffer."""
  folder = shutil.copytree(GOLDENS / "gpt2", tmp_path / "m")
  arrays = {name.removeprefix("transformer."): x for name, x in load_file(folder / "model.safetensors").items()}
  assert all("transformer" not in name for name in arrays)
  save_file(arrays | {"h.0.attn.bias": np.ones((1, 1, 16, 16), np.float32)}, folder / "model.safetensors")
  assert_same(load(folder)[2], load(GOLDENS / "gpt2")[2])


def test_tensors_that_do_not_fit(tmp_path):
  folder = shutil.copytree(GOLDENS / "pythia", tmp_path / "m")
  arrays = load_file(folder / "model.safetensors")

  def refused(message, **changed):
    save_file({k: v for k, v in (arrays | changed).items() if v is not None}, folder / "model.safetensors")
    with pytest.raises(InputError, match=message):
      interop.open_source(folder)

  # Buffers of older files are ignored.
  buffers = {
    "gpt_neox.layers.0.attention.bias": np.ones((1, 1, 4, 4), bool),
    "gpt_neox.layers.1.attention.masked_bias": np.array(-1e9, np.float32),
    "gpt_neox.layers.1.attention.rotary_emb.inv_freq": np.ones(2, np.float32),
  }
  save_file(arrays | buffers, folder / "model.safetensors")
  interop.open_source(folder)
  refused(r"model\.safetensors: unknown tensor gpt_neox\.layers\.0\.extra", **{"gpt_neox.layers.0.extra": np.ones(2)})
  refused(r"the tensor embed_out\.weight \[67, 48\] is missing", **{"embed_out.weight": None})
  refused(r"embed_out\.weight has the shape \[66, 48\]", **{"embed_out.weight": arrays["embed_out.weight"][1:]})
  wide = arrays["embed_out.weight"].astype(np.float64)
  refused(r"embed_out\.weight has the dtype F64", **{"embed_out.weight": wide})


def test_a_tied_output_table_must_be_the_embedding(tmp_path):
  folder = shutil.copytree(GOLDENS / "llama", tmp_path / "m")
  arrays = load_file(folder / "model.safetensors")
  table = arrays["model.embed_tokens.weight"]
  save_file(arrays | {"lm_head.weight": table.copy()}, folder / "model.safetensors")
  assert_same(load(folder)[2], load(GOLDENS / "llama")[2])
  save_file(arrays | {"lm_head.weight": table + 1}, folder / "model.safetensors")
  with pytest.raises(InputError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
    interop.open_source(folder)


def test_incomplete_shards_are_refused(tmp_path):
  folder = shutil.copytree(GOLDENS / "llama_untied_biased", tmp_path / "m")
  shard = folder / "model-00003-of-00007.safetensors"
  complete = shard.read_bytes()
  shard.write_bytes(complete[:-4])
  with pytest.raises(InputError, match=rf"{shard}: not a complete safetensors file, {len(complete) - 4} bytes"):
    interop.open_source(folder)
  shard.unlink()
  with pytest.raises(InputError, match=rf"{shard}: the shard is missing, but .* lists it for model\.layers"):
    interop.open_source(folder)
  save_file({"x": np.ones(1, np.float32)}, shard)
  with pytest.raises(InputError, match=rf"{shard}: the tensor model\.layers.* is missing"):
    interop.open_source(folder)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
  with pytest.raises(InputError, match="must be the name of a safetensors file in this folder"):
    interop.open_source(folder)


def test_other_files_are_refused(tmp_path):
  def refused(path, message):
    with pytest.raises(InputError, match=message) as error:
      interop.open_source(path)
    assert "\n" not in str(error.value)

  refused("google/gemma-2b", "no such folder or file; if it is a repository .*, give hf://google/gemma-2b")
  refused(tmp_path / "absent.gguf", "no such folder or file; give")
  refused(tmp_path, "there is no config.json")
  shutil.copy(GOLDENS / "llama" / "config.json", tmp_path)
  refused(tmp_path, r"neither model\.safetensors nor")
  with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
    file.writestr("archive/data.pkl", b"")
  for path in (tmp_path, tmp_path / "pytorch_model.bin"):
    refused(path, r"pytorch_model\.bin: a pickle( or an archive)?, .* never opens; convert it to safetensors")
  (tmp_path / "old.pt").write_bytes(b"\x80\x02rest")
  refused(tmp_path / "old.pt", "a pickle")
  (tmp_path / "odd.pth").write_bytes(b"whatever it holds")
  refused(tmp_path / "odd.pth", "a pickle")
  (tmp_path / "text").write_bytes(b"Not a model, but a text that is long enough to have a header")
  refused(tmp_path / "text", "is not that of a llama2.c binary")
  (tmp_path / "short").write_bytes(b"short")
  refused(tmp_path / "short", "not a llama2.c binary, 5 bytes")
  (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 10)
  refused(tmp_path / "m.gguf", r"m\.gguf: not a complete GGUF file, 14 bytes")


def test_unreadable_files_are_refused(tmp_path, monkeypatch):
  """The tests may run as a user with all permissions, so the permission error is simulated."""
  hf = shutil.copytree(GOLDENS / "llama", tmp_path / "hf")
  (tmp_path / "m.bin").write_bytes(b"\0" * 28)
  forbidden, plain = None, io.open

  def refuse(path, *args, **kwargs):
    if path == forbidden:
      raise PermissionError(13, "Permission denied", str(path))
    return plain(path, *args, **kwargs)

  monkeypatch.setattr(io, "open", refuse)  # as called by pathlib
  for model, file in ((tmp_path / "m.bin", "m.bin"), (hf, "hf/model.safetensors"), (hf, "hf/config.json")):
    forbidden = tmp_path / file
    with pytest.raises(InputError, match=rf"{file}: can't be read .*Permission denied"):
      interop.open_source(model)
  forbidden = None
  assert interop.open_source(hf).kind == "huggingface"


def test_an_inaccessible_folder_is_refused(tmp_path, monkeypatch):
  plain = os.stat

  def refuse(path, *args, **kwargs):
    if pathlib.Path(os.fsdecode(path)).parent == tmp_path / "m":
      raise PermissionError(13, "Permission denied", path)
    return plain(path, *args, **kwargs)

  (tmp_path / "m").mkdir()
  monkeypatch.setattr(os, "stat", refuse)
  for opened in (is_run, interop.open_source):
    with pytest.raises(InputError, match=r"can't be read \(Permission denied\)") as error:
      opened(tmp_path / "m")
    assert str(tmp_path / "m") in str(error.value)


@pytest.mark.parametrize(
  ("number", "message"),
  [
    (200, "a tensor has the quantisation of number 200, which the installed package gguf does not know; pip install"),
    (26, r"the tensor blk\.0\.attn_k\.weight has the dtype I32, which this version does not support"),
  ],
)
def test_unknown_quantisations_of_gguf_files(number, message, tmp_path):
  """Numbers of a format that the package does not know, and of one that it does not expand."""
  _, config, _ = load(GOLDENS / "llama")
  write_gguf(tmp_path / "m.gguf", tensors(GOLDENS / "llama"), config, "llama")
  written = bytearray((tmp_path / "m.gguf").read_bytes())
  name = b"blk.0.attn_k.weight"
  # After the name: the number of axes (u32), two axes (u64), and the format (u32), which is 0, f32.
  place = written.index(name) + len(name) + 4 + 2 * 8
  assert written[place : place + 4] == bytes(4)
  written[place : place + 4] = number.to_bytes(4, "little")
  (tmp_path / "m.gguf").write_bytes(written)
  with pytest.raises(InputError, match=rf"m\.gguf: {message}"):
    interop.open_source(tmp_path / "m.gguf")


def test_gguf_files_of_unsupported_models_are_refused(tmp_path):
  _, config, _ = load(GOLDENS / "llama")
  arrays = tensors(GOLDENS / "llama")
  write_gguf(tmp_path / "a.gguf", arrays, config, "phi3")
  with pytest.raises(
    InputError, match=r"general.architecture = 'phi3' is unsupported; this version loads llama, qwen2"
  ):
    interop.open_source(tmp_path / "a.gguf")
  write_gguf(tmp_path / "b.gguf", arrays, config, "llama", rope__scaling__type="longrope")
  with pytest.raises(InputError, match=r"llama.rope.scaling.type = 'longrope'"):
    interop.open_source(tmp_path / "b.gguf")
  write_gguf(tmp_path / "c.gguf", arrays, config, "llama", logit_scale="2")
  with pytest.raises(InputError, match=r"llama.logit_scale = '2' is unknown"):
    interop.open_source(tmp_path / "c.gguf")
  write_gguf(tmp_path / "e.gguf", arrays, config, "llama", context_length="64")
  with pytest.raises(InputError, match=r"e\.gguf: llama.context_length = '64' must be of type int"):
    interop.open_source(tmp_path / "e.gguf")
  write_gguf(tmp_path / "d.gguf", arrays, config, "llama")
  complete = (tmp_path / "d.gguf").read_bytes()
  (tmp_path / "d.gguf").write_bytes(complete[:-3000])
  with pytest.raises(InputError, match=r"d\.gguf: not a complete GGUF file"):
    interop.open_source(tmp_path / "d.gguf")


def test_a_decoder_of_another_shape(tmp_path):
  source = interop.open_source(GOLDENS / "llama")
  with pytest.raises(InputError, match="2 layers, but the decoder has 3"):
    interop.load_decoder(source, abstract(dataclasses.replace(source.decoder, num_layers=3)))
  with pytest.raises(InputError, match=r"embedding has the shape \(67, 36\); the decoder requires \(128, 36\)"):
    interop.load_decoder(source, abstract(dataclasses.replace(source.decoder, vocab_size=128)))
  with pytest.raises(InputError, match="unembedding is missing, but the decoder"):
    interop.load_decoder(source, abstract(dataclasses.replace(source.decoder, tied_embeddings=False)))
