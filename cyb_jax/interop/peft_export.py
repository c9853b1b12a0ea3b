"""Export of a run's adapters to a folder that the package peft loads; see `cyb_jax.interop.peft`."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from cyb_jax import hub
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.interop import huggingface, peft
from cyb_jax.interop.export import check_empty, leaf_of, write_json, write_tensors
from cyb_jax.interop.new_folder import new_folder
from cyb_jax.interop.sources import Source
from cyb_jax.interop.tensors import package
from cyb_jax.methods import MethodConfig
from cyb_jax.stopping import prior_shift
from cyb_jax.storage import absolute


def write_adapters(
  output: str | os.PathLike[str],
  decoder_config: DecoderConfig,
  params: PyTree,
  base: Source,
  address: str,
  *,
  method: MethodConfig,
  vocab_size: int,
  step: int | None = None,
) -> int:
  """Writes the adapters, and next to them the method and its parameters outside of the decoder; atomically.

  Args:
    output: a folder that does not exist or is empty.
    decoder_config: the config of params['decoder'], with `lora`.
    params: the run's parameters, bare arrays; layers stacked or not.
    base: the adapted model.
    address: the path or the hub's address of the adapted model, which is recorded.
    method: the method of the run.
    vocab_size: the number of entries of the run's vocabulary.
    step: the training step, which is recorded.

  Returns:
    The number of written parameters.

  Raises:
    InputError: the folder is not empty, there are no adapters, or peft can't express them.
    StorageError: writing fails; no files are left.
  """
  lora = decoder_config.lora
  if lora is None:
    raise InputError("--to: peft, but the run has no adapters (tuning.weights is not 'lora'); give hf")
  folder = pathlib.Path(absolute(output)).absolute()
  check_empty(folder)
  names = peft.module_names(base)
  missing = [target for target in lora.targets if not any(leaf[-1] == target for leaf, _ in names)]
  if missing:
    raise InputError(
      f"--to: peft, but the files of {address} join {missing[0]!r} with other matrices, which have one adapter there;"
      " give hf, which merges the adapters"
    )
  package("safetensors", "output")
  tensors = {}
  for (leaf, layer), name in names.items():
    if leaf[-1] in lora.targets:
      a, b = (_leaf(params, (*leaf, part), layer) for part in ("lora_a", "lora_b"))
      tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
      tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
  own = {name: np.asarray(jax.device_get(leaf)) for name, leaf in params.items() if name != "decoder"}
  with new_folder(folder) as new:
    write_json(new / peft.CONFIG, _config(decoder_config, names, address))
    write_tensors(new / peft.WEIGHTS, tensors)
    write_json(new / peft.OWN_CONFIG, _own(method, own, base, vocab_size, step))
    if own:
      write_tensors(new / huggingface.OWN, own)
    for path in new.iterdir():
      shutil.copymode(new / peft.CONFIG, path)  # safetensors gives read permission only to the owner
  return sum(x.size for x in (*tensors.values(), *own.values()))


def _leaf(params: PyTree, path: tuple[str, ...], layer: int) -> np.ndarray:
  return np.asarray(jax.device_get(leaf_of(params["decoder"], path, layer)), np.float32)


def _config(config: DecoderConfig, names: Mapping[Any, str], address: str) -> dict[str, Any]:
  name, _, revision = address.removeprefix(hub.SCHEME).partition("@") if hub.in_hub(address) else (address, "", "")
  modules = {leaf[-1]: name.split(".")[-2:] for (leaf, _), name in names.items()}
  others = {last for target, (_, last) in modules.items() if target not in config.lora.targets}
  # The last part of the name, unless a matrix without an adapter has it too (GPT-2's c_proj).
  targets = {f"{part}.{last}" if last in others else last for part, last in map(modules.get, config.lora.targets)}
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": name,
    "revision": revision or None,
    "r": config.lora.rank,
    "lora_alpha": config.lora.alpha,
    "lora_dropout": 0.0,
    "target_modules": sorted(targets),
    "bias": "none",
    "fan_in_fan_out": config.learned_positions is not None,  # GPT-2's matrices are [inputs, outputs]
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "inference_mode": True,
  }


def _own(
  method: MethodConfig, own: dict[str, np.ndarray], base: Source, vocab_size: int, step: int | None
) -> dict[str, Any]:
  shift = None
  if "dont_know" in own:
    shift = prior_shift(method.dont_know, method.dont_know_prior, vocab_size + 1)
  return {
    "version": 1,
    "method": {"name": method.name} | dataclasses.asdict(method),
    "vocab_size": vocab_size,
    "prior_shift": shift,
    "own": {name: list(array.shape) for name, array in own.items()},
    "base": peft.fingerprint(base),
    "step": step,
  }
