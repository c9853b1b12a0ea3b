"""Hugging Face folders: config.json and safetensors, one file or shards. Pickles are never opened.

`architectures` reads the fields of config.json that change the function; unsupported values and unknown fields are
refused by name.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cyb_jax import jsonl
from cyb_jax.data import tokenizers
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError, reading
from cyb_jax.interop.architectures import FAMILIES, Family
from cyb_jax.interop.tensors import Fields, TensorInfo, is_float, package

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# In our exports: the key in config.json, the file of parameters that transformers does not have, and the folder of a
# tokenizer that transformers does not support.
CYB_JAX = "cyb_jax"
OWN = "cyb_jax.safetensors"
TOKENIZER = tokenizers.EXPORTED
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Fields about training, generation or the program that wrote the file, and fields that are read elsewhere.
HARMLESS = frozenset({
  "_name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled",
  "architectures", "model_type", CYB_JAX, "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
  "initializer_range", "max_position_embeddings", "use_cache", "pretraining_tp", "is_llama_config", "unsloth_version",
  "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
  "attention_dropout", "hidden_dropout", "classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob",
  "cache_implementation", "gradient_checkpointing",
  "attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "summary_activation",
  "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
  "max_window_layers", "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
  "is_decoder", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "tokenizer_class",
  "finetuning_task", "prefix", "tie_encoder_decoder", "cross_attention_hidden_size", "pruned_heads", "use_bfloat16",
  "torchscript", "tf_legacy_loss", "bad_words_ids", "do_sample", "early_stopping", "max_length", "min_length",
  "num_beams", "num_beam_groups", "num_return_sequences", "temperature", "top_k", "top_p", "typical_p",
  "repetition_penalty", "length_penalty", "diversity_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
  "begin_suppress_tokens", "suppress_tokens", "exponential_decay_length_penalty", "forced_bos_token_id",
  "forced_eos_token_id", "remove_invalid_values", "return_dict_in_generate", "output_scores",
})  # fmt: skip

# Buffers that older versions of transformers stored with the weights.
HARMLESS_TENSORS = (r".*\.rotary_emb\.inv_freq", r".*\.(attention|attn)\.(bias|masked_bias)")


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    InputError: the file can't be read, or does not hold an object.
  """
  try:
    values = jsonl.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: can't be read ({error}); it must hold a JSON object") from None
  if not isinstance(values, dict):
    raise InputError(f"{path}: {type(values).__name__} instead of a JSON object")
  return values


def read_config(path: pathlib.Path) -> tuple[Family, DecoderConfig, dict[str, Any]]:
  """The family of a config.json, our config, and all its fields, with the name `max_position_embeddings` for the length
  of the context in all families.

  Raises:
    InputError: an architecture or a field is unsupported.
  """
  values = read_json(path)
  known = ", ".join(family.architecture for family in FAMILIES)
  fields = Fields(path, values)
  named = fields.take("architectures", list, [])
  kind = fields.take("model_type", str, None)
  for family in FAMILIES:
    if named == [family.architecture] or (not named and kind == family.model_type):
      break
  else:
    raise InputError(f"{path}: architectures = {named or kind!r} is unsupported; this version loads {known}")
  if kind not in (None, family.model_type):
    raise InputError(
      f"{path}: model_type = {kind!r}, but architectures = {named!r} has the model_type {family.model_type!r}"
    )
  for name in ("is_encoder_decoder", "add_cross_attention", "quantization_config"):
    fields.demand(name, (None, False))
  config = family.read(fields)
  context = fields.count(family.names.get("max_position_embeddings", "max_position_embeddings"))
  if context is not None and config.window is not None and config.window > context:
    raise InputError(
      f"{path}: sliding_window = {config.window} is longer than the context, max_position_embeddings = {context}"
    )
  fields.finish(HARMLESS)
  return family, config, values | {"max_position_embeddings": context}


class SafetensorsFiles:
  """The tensors of a folder's safetensors, memory-mapped.

  Args:
    folder: a folder with the single file, or with model.safetensors.index.json and its shards.
    single: the name of the single file.

  Raises:
    InputError: both are missing, a shard is missing or truncated, or a shard lacks a tensor of the index.
  """

  def __init__(self, folder: pathlib.Path, single: str = SINGLE):
    self.infos: dict[str, TensorInfo] = {}
    if (folder / single).is_file():
      self._add(folder / single)
    elif single != SINGLE:
      raise InputError(f"{folder / single}: missing, but config.json refers to it; download it")
    elif (folder / INDEX).is_file():
      self._add_shards(folder)
    else:
      raise InputError(_no_weights(folder))

  def _add(self, path: pathlib.Path, names: Sequence[str] | None = None) -> None:
    with reading(str(path)):
      path.open("rb").close()  # safetensors reports every file that it can't open as missing
    try:
      file = package("safetensors", str(path)).safe_open(path, framework="numpy")
    except OSError as error:
      raise InputError(f"{path}: can't be read ({error})") from None
    except Exception as error:  # safetensors' own exception, if the header doesn't match the file
      reason = " ".join(str(error).split())[:200]
      raise InputError(
        f"{path}: not a complete safetensors file, {path.stat().st_size} bytes ({reason}); download it again"
      ) from None
    present = set(file.keys())
    for name in sorted(present) if names is None else names:
      if name not in present:
        raise InputError(f"{path}: the tensor {name} is missing, but {INDEX} lists it; download the file again")
      part = file.get_slice(name)
      self.infos[name] = TensorInfo(tuple(part.get_shape()), part.get_dtype(), path, is_float(part.get_dtype()))

  def _add_shards(self, folder: pathlib.Path) -> None:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
      raise InputError(f"{folder / INDEX}: weight_map is missing; it must map each tensor to its file")
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
      shards.setdefault(file, []).append(name)
    for file, names in sorted(shards.items()):
      if pathlib.PurePath(file).name != file or not file.endswith(".safetensors"):
        raise InputError(f"{folder / INDEX}: {file!r} must be the name of a safetensors file in this folder")
      if not (folder / file).is_file():
        raise InputError(f"{folder / file}: the shard is missing, but {INDEX} lists it for {names[0]}; download it")
      self._add(folder / file, names)

  def read(self, name: str) -> np.ndarray:
    # Opened for each tensor, because pages that were read count as memory until the memory map is closed.
    path = self.infos[name].file
    with package("safetensors", str(path)).safe_open(path, framework="numpy") as file:
      try:
        return file.get_tensor(name)
      except Exception as error:  # of safetensors, for a dtype that numpy does not have
        info = self.infos[name]
        raise InputError(
          f"{path}: the tensor {name} of dtype {info.dtype} can't be read ({error}); convert it to F32 or BF16"
        ) from None


def _no_weights(folder: pathlib.Path) -> str:
  pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
  if pickles:
    return f"{folder / pickles[0]}: a pickle, which this version never opens; convert it to safetensors"
  return f"{folder}: neither {SINGLE} nor {INDEX} exists; give a Hugging Face folder with safetensors"
