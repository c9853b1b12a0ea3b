"""Export to a Hugging Face folder that transformers loads, and that this package imports again without a change.

Only the V entries of the vocabulary are written: the padding rows of the tables are masked in training, but would be
ordinary entries for other programs. Pauses and `<don't know>`, which are not entries of our vocabulary, become entries
after it:

    ids      0 .. V-1     V .. V+K-1                V+K
    input    embedding    pause_input               the output row if tied, else zeros
    output   unembedding  the input row if tied,    dont_know
                          else zeros

Parameters that transformers does not have are in cyb_jax.safetensors. The key `cyb_jax` of config.json holds the data
that other programs need to apply the method: log d is the log-softmax of the `<dont_know>` logit, with `prior_shift`,
`dont_know_bias` and `dont_know_offset` added, among the first `vocab_size` logits (or the log-sigmoid of the logit, if
`method.dont_know` is 'unit').
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np
from absl import logging
from jaxtyping import PyTree

from cyb_jax.data.tokenizers import text_boundaries
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError, writing
from cyb_jax.interop import huggingface
from cyb_jax.interop.architectures import FAMILIES, Family, objections
from cyb_jax.interop.families import Tensor
from cyb_jax.interop.huggingface import CYB_JAX, OWN, TOKENIZER
from cyb_jax.interop.new_folder import new_folder
from cyb_jax.interop.tensors import each, package
from cyb_jax.methods import MethodConfig
from cyb_jax.progress import track
from cyb_jax.stopping import prior_shift
from cyb_jax.storage import absolute

if TYPE_CHECKING:
  from cyb_jax.data import Tokenizer

_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_huggingface(
  output: str | os.PathLike,
  decoder_config: DecoderConfig,
  params: PyTree,
  tokenizer: Tokenizer | None,
  *,
  method: MethodConfig | None = None,
  dtype: str = "float32",
  max_shard_bytes: int = 2 << 30,
  max_positions: int = 2048,
  step: int | None = None,
) -> None:
  """Writes config.json, safetensors and the tokenizer's files atomically; the host holds one shard at a time.

  Args:
    output: a folder that does not exist or is empty.
    decoder_config: the config of params['decoder'].
    params: a method's parameters, bare arrays; layers stacked or not.
    tokenizer: the model's tokenizer; None: no tokenizer is written.
    method: the method of the run; None: an imported model without a method.
    dtype: the dtype of the tensors, 'float32' or 'bfloat16'.
    max_shard_bytes: the maximum size of a file; a larger tensor has its own file.
    max_positions: the maximum context length in config.json.
    step: the training step, which is recorded.

  Raises:
    InputError: the folder is not empty, no family can express the config, or LoRA is not merged.
    StorageError: writing fails; no files are left.
  """
  output = pathlib.Path(absolute(output)).absolute()
  family = family_of(decoder_config)
  _check_options(output, dtype, max_shard_bytes, params)
  table = family.table(decoder_config)
  _check_leaves(params["decoder"], table, decoder_config)
  vocab_size = decoder_config.vocab_size if tokenizer is None else tokenizer.vocab_size
  if vocab_size > decoder_config.vocab_size:
    raise InputError(f"tokenizer: {vocab_size} entries, but the decoder's tables have {decoder_config.vocab_size} rows")
  entries = _entries(params, vocab_size, method)
  package("safetensors", "output")
  with new_folder(output) as folder:
    special = _special_json(tokenizer, imported=method is None)
    config = _config_json(family, decoder_config, vocab_size + len(entries), dtype, max_positions) | special
    own = {name: np.asarray(jax.device_get(leaf)) for name, leaf in params.items() if name != "decoder"}
    if method is not None:
      config[CYB_JAX] = _own_json(method, own, entries, decoder_config.vocab_size, vocab_size, step)
    write_json(folder / "config.json", config)
    not_entries = {name: leaf for name, leaf in own.items() if name not in ("pause_input", "dont_know")}
    if not_entries:
      write_tensors(folder / OWN, not_entries)
    tensors = _tensors(params["decoder"], table, decoder_config, vocab_size, own, method)
    _write_shards(folder, tensors, _DTYPES[dtype], max_shard_bytes)
    if tokenizer is not None:
      write_json(folder / "generation_config.json", special)
      _write_tokenizer(folder, tokenizer, entries, imported=method is None)
    for path in folder.rglob("*"):
      if path.is_file():
        # safetensors gives read permission only to the owner.
        shutil.copymode(folder / "config.json", path)


def _check_options(output: pathlib.Path, dtype: str, max_shard_bytes: int, params: PyTree) -> None:
  if dtype not in _DTYPES:
    raise InputError(f"dtype: {dtype!r} is not one of {', '.join(map(repr, _DTYPES))}")
  if max_shard_bytes < 1:
    raise InputError(f"max_shard_bytes: {max_shard_bytes} must be positive")
  if "slot_heads" in params:
    raise InputError(
      "method.slot_heads: True is not supported in a Hugging Face folder, because programs that read it would apply the"
      " readout without the heads; train with method.slot_heads=False"
    )
  check_empty(output)


def check_empty(output: pathlib.Path) -> None:
  """Raises InputError if an output folder exists and is not empty."""
  with writing(str(output)):
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
      raise InputError(f"output: {output} exists and is not empty; give a new folder")


def family_of(config: DecoderConfig) -> Family:
  """The family whose files can express a config.

  Raises:
    InputError: there is no such family; the message lists what the closest family can't express.
  """
  found = {family: objections(family, config) for family in FAMILIES}
  family = min(found, key=lambda family: len(found[family]))
  if found[family]:
    raise InputError(
      f"decoder: no supported architecture of transformers can express this config; the closest, {family.architecture},"
      f" requires {'; '.join(found[family])}"
    )
  return family


def _entries(params: PyTree, vocab_size: int, method: MethodConfig | None) -> list[tuple[int, str]]:
  """(id, name) of the entries that are appended to a vocabulary of this size."""
  if method is None:
    if set(params) != {"decoder"}:
      raise ValueError(f"params: {sorted(set(params) - {'decoder'})} belong to a method, but method is None")
    return []
  names = [f"<pause_{k + 1}>" for k in range(method.pauses)] if "pause_input" in params else []
  names += ["<dont_know>"] if "dont_know" in params else []
  return [(vocab_size + number, name) for number, name in enumerate(names)]


def _check_leaves(params: PyTree, table: list[Tensor], config: DecoderConfig) -> None:
  """Raises InputError unless the parameters are exactly the leaves of the table."""
  expected = {leaf for tensor in table for leaf in tensor.leaves}
  for path, _ in jax.tree_util.tree_leaves_with_path(params):
    names = tuple(key.key for key in path)
    inside = names[1:] if names[0].startswith("layers") else names
    if inside not in expected:
      hint = "; merge it first (cyb_jax.decoder.merge_lora)" if "lora" in names[-1] else ""
      raise InputError(f"params: decoder.{'.'.join(names)} has no tensor in this architecture{hint}")
  for tensor, layer, _ in each(table, config.num_layers):
    for leaf in tensor.leaves:
      leaf_of(params, leaf, layer)


def leaf_of(params: PyTree, path: tuple[str, ...], layer: int | None) -> Any:
  """A leaf of params['decoder'], of one layer if layers are stacked; not fetched from the device."""
  stacked = layer is not None and "layers" in params
  if layer is not None:
    path = ("layers" if stacked else f"layers_{layer}", *path)
  value = params
  for name in path:
    if name not in value:
      raise InputError(f"params: decoder.{'.'.join(path)} is missing, but the config requires it")
    value = value[name]
  return value[layer] if stacked else value


def _tensors(
  params: PyTree,
  table: list[Tensor],
  config: DecoderConfig,
  vocab_size: int,
  own: Mapping[str, np.ndarray],
  method: MethodConfig | None,
) -> Iterator[tuple[str, np.ndarray]]:
  """(name, tensor), one after the other; tables have their first `vocab_size` rows and the appended rows."""
  appended = {"embedding": [], "unembedding": []}
  if method is not None and "pause_input" in own:
    rows = np.broadcast_to(own["pause_input"], (method.pauses, config.d_model))
    appended["embedding"].append(rows)
    appended["unembedding"].append(np.zeros_like(rows))
  if "dont_know" in own:
    row = own["dont_know"][None]
    appended["embedding"].append(row if config.tied_embeddings else np.zeros_like(row))
    appended["unembedding"].append(row)
  places = list(each(table, config.num_layers))
  for tensor, layer, name in track(places, "writing", total=len(places), unit="tensors"):
    leaves = (np.asarray(jax.device_get(leaf_of(params, leaf, layer))) for leaf in tensor.leaves)
    array = tensor.join(*leaves)
    rows = appended.get(tensor.leaves[0][0])
    yield name, array if rows is None else np.concatenate([array[:vocab_size], *rows])


def _write_shards(
  folder: pathlib.Path, tensors: Iterator[tuple[str, np.ndarray]], dtype: np.dtype, max_shard_bytes: int
) -> None:
  """Writes model.safetensors; or shards and their index, if one file would be too large."""
  shards: list[list[str]] = []
  shard: dict[str, np.ndarray] = {}
  total = 0

  def close() -> None:
    shards.append(list(shard))
    write_tensors(folder / f"shard-{len(shards)}", shard)
    shard.clear()

  for name, array in tensors:
    array = np.ascontiguousarray(array, dtype)
    total += array.nbytes
    if shard and array.nbytes + sum(x.nbytes for x in shard.values()) > max_shard_bytes:
      close()
    shard[name] = array
  close()
  if len(shards) == 1:
    (folder / "shard-1").rename(folder / huggingface.SINGLE)
    return
  weight_map = {}
  for number, names in enumerate(shards, 1):
    file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{number}").rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  write_json(folder / huggingface.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_tensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file.

  Raises:
    OSError: writing fails.
  """
  safetensors = package("safetensors", str(path))
  try:
    # Other programs read the framework from the metadata and accept 'pt'.
    package("safetensors.numpy", str(path)).save_file(dict(tensors), path, metadata={"format": "pt"})
  except safetensors.SafetensorError as error:  # not a subclass of OSError, even for errors of the disk
    found = re.search(r"\(os error (\d+)\)", str(error))
    if found is None:
      raise
    raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def _special_json(tokenizer: Tokenizer | None, imported: bool) -> dict[str, Any]:
  """The ids of special tokens under their names in config.json and generation_config.json."""
  if tokenizer is None:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
  special, boundaries = tokenizer.special_tokens, text_boundaries(tokenizer, imported=imported)
  start, ends = next(iter(boundaries.start), None), boundaries.end_ids
  return {
    "bos_token_id": start if special.bos_id is None else special.bos_id,
    "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
    "pad_token_id": special.pad_id,
  }


def _config_json(family: Family, config: DecoderConfig, rows: int, dtype: str, max_positions: int) -> dict[str, Any]:
  common = {
    "architectures": [family.architecture],
    "model_type": family.model_type,
    "vocab_size": rows,
    "hidden_size": config.d_model,
    "intermediate_size": config.mlp_size,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "max_position_embeddings": max(max_positions, config.window or 0),
    "tie_word_embeddings": config.tied_embeddings,
    # The older and the newer name; `family.write` also writes RoPE's fields in both spellings.
    "torch_dtype": dtype,
    "dtype": dtype,
  }
  return {family.names.get(name, name): value for name, value in common.items()} | family.write(config)


def _own_json(
  method: MethodConfig,
  own: Mapping[str, np.ndarray],
  entries: list[tuple[int, str]],
  rows: int,
  vocab_size: int,
  step: int | None,
) -> dict[str, Any]:
  """The block of config.json about the method, which `sources.Extras` represents."""
  dont_know = next((number for number, name in entries if name == "<dont_know>"), None)
  return {
    "version": 1,
    "method": {"name": method.name} | dataclasses.asdict(method),
    # The rows of the file's tables, and of the run's tables, whose additional rows are padding.
    "rows": vocab_size,
    "table_rows": rows,
    "vocab_size": vocab_size,
    "pause_ids": [number for number, name in entries if name != "<dont_know>"],
    "dont_know_id": dont_know,
    "prior_shift": None if dont_know is None else prior_shift(method.dont_know, method.dont_know_prior, vocab_size + 1),
    "dont_know_bias": float(own.get("dont_know_bias", 0.0)),
    "dont_know_offset": float(own.get("dont_know_offset", 0.0)),
    "own": {name: list(array.shape) for name, array in own.items()},
    "step": step,
  }


def _write_tokenizer(
  folder: pathlib.Path, tokenizer: Tokenizer, entries: list[tuple[int, str]], imported: bool
) -> None:
  """Writes the tokenizer for transformers, or, if that is unsupported, in its own form, so that it can be imported."""
  try:
    starts = bool(text_boundaries(tokenizer, imported=imported).start)
    tokenizer.write_huggingface(folder, entries, starts=starts)
  except InputError as error:
    logging.warning("the tokenizer can't be written for transformers: %s", error)
    (folder / TOKENIZER).mkdir()
    tokenizer.save(folder / TOKENIZER)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
  """Writes an object as indented JSON."""
  path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
