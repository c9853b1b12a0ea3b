"""Folders of adapters, as the package peft writes them: adapter_config.json and adapter_model.safetensors.

A folder names the model that it adapts. In memory an adapter is the pair A, B of `cyb_jax.decoder.lora`; in the files
A is [r, inputs] and B is [outputs, r]. Our folders also have the method's parameters outside of the decoder in
cyb_jax.safetensors, and what belongs to them in cyb_jax.json, with a fingerprint of the adapted model. The package peft
ignores both files.

Letters: r rank of an adapter.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cyb_jax import hub
from cyb_jax.decoder import DecoderConfig, LoraConfig
from cyb_jax.decoder.config import TARGETS, matrix_shape
from cyb_jax.errors import InputError, shown
from cyb_jax.interop import huggingface
from cyb_jax.interop.families import LeafPath, same_layout
from cyb_jax.interop.sources import Extras, Source, block, method_config, own_shapes
from cyb_jax.interop.tensors import Fields, TensorInfo, check, each

# The largest rank, far above the width of a matrix.
_MOST_RANK = 1 << 20
CONFIG, WEIGHTS, OWN_CONFIG = "adapter_config.json", "adapter_model.safetensors", "cyb_jax.json"
PREFIX = "base_model.model."
# Fields about training or the program that wrote the file, and fields that follow from the tensors.
_HARMLESS = frozenset({
  "auto_mapping", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode",
  "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
  "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "runtime_config", "target_modules",
  "task_type",
})  # fmt: skip
# Values of fields that would change the computation.
_DEMANDS: Mapping[str, tuple[Any, ...]] = {
  "peft_type": ("LORA",), "bias": (None, "none"), "modules_to_save": (None, []), "rank_pattern": (None, {}),
  "alpha_pattern": (None, {}), "layer_replication": (None,), "lora_bias": (None, False), "use_qalora": (None, False),
  "target_parameters": (None, []), "trainable_token_indices": (None,), "alora_invocation_tokens": (None,),
  "use_bdlora": (None, False), "velora_config": (None,), "kasa_config": (None,),
  "monteclora_config": (None,), "arrow_config": (None,),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapters:
  """The adapters of a folder; no weights have been read.

  Attributes:
    folder: the folder.
    config: the rank, alpha and targets.
    decoder: the decoder that they adapt.
    files: the tensors.
    modules: the start of the tensors' names, by the path of a matrix in a layer and the number of the layer.
    magnitudes: whether every adapted matrix also has its norms (DoRA, https://arxiv.org/abs/2402.09353).
  """

  folder: pathlib.Path
  config: LoraConfig
  decoder: DecoderConfig
  files: huggingface.SafetensorsFiles
  modules: Mapping[tuple[LeafPath, int], str]
  magnitudes: bool

  def leaf(self, path: LeafPath, layer: int) -> np.ndarray:
    """`lora_a` or `lora_b` in our layout."""
    name = self.modules[path[:-1], layer]
    inputs, outputs = matrix_shape(self.decoder, path[-2])
    if path[-1] == "lora_a":
      return self.files.read(f"{name}.lora_A.weight").astype(np.float32).T.reshape(*inputs, -1)
    return self.files.read(f"{name}.lora_B.weight").astype(np.float32).T.reshape(-1, *outputs)

  def merged(self, kernel: np.ndarray, path: LeafPath, layer: int) -> np.ndarray:
    """The kernel with its adapter, f32; unchanged if it has none."""
    if (path, layer) not in self.modules:
      return kernel
    name, rank = self.modules[path, layer], self.config.rank
    a, b = (self.leaf((*path, leaf), layer) for leaf in ("lora_a", "lora_b"))
    product = a.reshape(-1, rank) @ b.reshape(rank, -1)
    flat = kernel.astype(np.float32).reshape(product.shape) + np.float32(self.config.scale) * product
    if self.magnitudes:
      flat = flat * (self.files.read(_magnitude(self.files, name)).astype(np.float32) / np.linalg.norm(flat, axis=0))
    return flat.reshape(kernel.shape)

  @property
  def everywhere(self) -> bool:
    """Whether every layer has all adapters, and they are plain LoRA: then a run can go on training them."""
    return not self.magnitudes and len(self.modules) == len(self.config.targets) * self.decoder.num_layers


@dataclasses.dataclass(frozen=True)
class AdaptedSource(Source):
  """A model with adapters.

  Attributes:
    adapters: the adapters.
    merges: whether matrices are read with their adapters in them; else the adapters are leaves of their own.
  """

  adapters: Adapters | None = None
  merges: bool = True

  def for_run(self, lora: LoraConfig | None) -> AdaptedSource:
    """The source for a run with these adapters: if they have the same form, the run goes on training them."""
    return dataclasses.replace(self, merges=not _same(lora, self.adapters))

  def holds(self, path: LeafPath) -> bool:
    if path[-1] in ("lora_a", "lora_b"):
      return not self.merges
    return super().holds(path)

  def read(self, path: LeafPath, layer: int | None = None) -> np.ndarray:
    if path[-1] in ("lora_a", "lora_b"):
      return self.adapters.leaf(path, layer)
    array = super().read(path, layer)
    if self.merges and path[-1] == "kernel":
      return self.adapters.merged(array, path[:-1], layer)
    return array

  def read_own(self, name: str) -> np.ndarray:
    return self.own_files.read(name)

  def _all_infos(self) -> list[TensorInfo]:
    return [*super()._all_infos(), *self.adapters.files.infos.values()]


def _same(lora: LoraConfig | None, adapters: Adapters) -> bool:
  found = adapters.config
  return (
    lora is not None
    and adapters.everywhere
    and (lora.rank, lora.alpha, set(lora.targets)) == (found.rank, found.alpha, set(found.targets))
  )


def module_names(source: Source) -> dict[tuple[LeafPath, int], str]:
  """The start of the names of adapters' tensors, by the path of a matrix and its layer.

  Matrices that a family stores in one tensor, such as query, key and value of GPT-2, are not included: peft has one
  adapter for them, and we have three.
  """
  names = {}
  for tensor, layer, name in each(source.table, source.decoder.num_layers):
    leaf = tensor.leaves[0]
    if len(tensor.leaves) == 1 and leaf[-1] == "kernel" and leaf[-2] in TARGETS:
      names[leaf[:-1], layer] = PREFIX + name.removesuffix(".weight")
  return names


def open_adapters(folder: pathlib.Path, open_base: Callable[[str], Source]) -> AdaptedSource:
  """Opens a folder of adapters and the model that it names.

  Args:
    folder: the folder.
    open_base: opens a model.

  Raises:
    InputError: the folder, a field, a tensor or the model is invalid; or the adapters are of another model.
  """
  path = folder / CONFIG
  fields = Fields(path, huggingface.read_json(path))
  for name, accepted in _DEMANDS.items():
    fields.demand(name, accepted)
  rank, alpha = fields.count("r"), fields.take("lora_alpha", float)
  if rank is None or rank > _MOST_RANK:
    raise InputError(f"{path}: r = {shown(rank)} must be an integer from 1 to {_MOST_RANK}")
  if fields.take("use_rslora", bool, False):
    alpha *= math.sqrt(rank)  # https://arxiv.org/abs/2312.03732: the factor is alpha / sqrt(r)
  dora = fields.take("use_dora", bool, False)
  fields.take("fan_in_fan_out", bool, False)  # the layout of the adapted matrix, which does not concern A and B
  base = _base(folder, fields, open_base)
  fields.finish(_HARMLESS)
  files = huggingface.SafetensorsFiles(folder, WEIGHTS)
  modules = _modules(folder / WEIGHTS, base, files, rank, dora)
  targets = tuple(target for target in TARGETS if any(leaf[-1] == target for leaf, _ in modules))
  try:
    config = LoraConfig(rank=rank, alpha=alpha, targets=targets)
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  adapters = Adapters(folder, config, base.decoder, files, modules, dora)
  of_base = {field.name: getattr(base, field.name) for field in dataclasses.fields(Source)}
  source = AdaptedSource(**of_base, adapters=adapters)
  return _with_own(source, folder) if (folder / OWN_CONFIG).exists() else source


def _base(folder: pathlib.Path, fields: Fields, open_base: Callable[[str], Source]) -> Source:
  name, revision = fields.take("base_model_name_or_path", str), fields.take("revision", str, None)
  local = next((x for x in (folder / name, pathlib.Path(name)) if x.exists()), None)
  if local is None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
    raise InputError(
      f"{folder / CONFIG}: base_model_name_or_path = {name!r} does not exist; set it to the folder of the model"
    )
  address = str(local) if local is not None else f"{hub.SCHEME}{name}" + (f"@{revision}" if revision else "")
  base = open_base(address)
  if isinstance(base, AdaptedSource) or base.kind != "huggingface" or base.extras is not None:
    raise InputError(
      f"{folder / CONFIG}: base_model_name_or_path = {name!r} is no plain Hugging Face folder; only such models are"
      " adapted"
    )
  return base


def _modules(
  path: pathlib.Path, base: Source, files: huggingface.SafetensorsFiles, rank: int, dora: bool
) -> dict[tuple[LeafPath, int], str]:
  """The adapted matrices; checks the names and shapes of all tensors."""
  expected: dict[str, tuple[int, ...]] = {}
  modules = {}
  for (leaf, layer), name in module_names(base).items():
    if f"{name}.lora_A.weight" not in files.infos and f"{name}.lora_B.weight" not in files.infos:
      continue
    inputs, outputs = (math.prod(axes) for axes in matrix_shape(base.decoder, leaf[-1]))
    modules[leaf, layer] = name
    expected |= {f"{name}.lora_A.weight": (rank, inputs), f"{name}.lora_B.weight": (outputs, rank)}
    if dora:
      expected[_magnitude(files, name)] = (outputs,)
  for name, shape in expected.items():
    info = files.infos.get(name)
    if info is None:
      raise InputError(f"{path}: the tensor {name} is missing, but the other part of the adapter is there")
    if tuple(info.shape) != shape or not info.readable:
      raise InputError(
        f"{path}: the tensor {name} has the shape {list(info.shape)} and the dtype {info.dtype}; the model {base.path}"
        f" and r = {rank} require floats of shape {list(shape)}. The adapters may be of another model"
      )
  unknown = [name for name in files.infos if name not in expected]
  if unknown or not modules:
    what = f"unknown tensor {unknown[0]}" if unknown else "no adapters"
    raise InputError(
      f"{path}: {what}; this version adapts the matrices {', '.join(TARGETS)} of {base.path}, unless its files join"
      " several of them"
    )
  return modules


def _magnitude(files: huggingface.SafetensorsFiles, name: str) -> str:
  older = f"{name}.lora_magnitude_vector.weight"
  return older if older in files.infos else f"{name}.lora_magnitude_vector"


def _with_own(source: AdaptedSource, folder: pathlib.Path) -> AdaptedSource:
  """The source with the method and its parameters outside of the decoder."""
  path = folder / OWN_CONFIG
  written = huggingface.read_json(path)
  fields = block(path, "cyb_jax", written)
  if fields.take("version", int) != 1:
    raise InputError(f"{path}: version = {shown(written['version'])}; this version reads 1")
  if fields.take("base", str) != fingerprint(source):
    raise InputError(
      f"{path}: the adapters were trained on another model than {source.path}; set base_model_name_or_path in"
      f" {CONFIG} to that model"
    )
  method, vocab_size = method_config(path, fields.take("method", dict)), fields.take("vocab_size", int)
  own = own_shapes(path, method, source.decoder)
  if fields.take("own", dict) != {name: list(shape) for name, shape in own.items()}:
    raise InputError(f"{path}: own = {shown(written['own'])}, but its method has {own!r}; export the run again")
  extras = Extras(
    method=method,
    vocab_size=vocab_size,
    file_rows=source.decoder.vocab_size,
    pause_ids=(),
    dont_know_id=None,
    prior_shift=fields.take("prior_shift", float, None),
    step=fields.take("step", int, None),
    own=own,
  )
  files = None
  if own:
    files = huggingface.SafetensorsFiles(folder, huggingface.OWN)
    check(files, [same_layout(name, (name,), shape) for name, shape in own.items()], 0, folder)
  return dataclasses.replace(source, extras=extras, own_files=files)


@functools.lru_cache(maxsize=8)
def _digest(files: huggingface.SafetensorsFiles, norm: str) -> str:
  found = hashlib.sha256()
  for name in sorted(files.infos):
    found.update(f"{name} {tuple(files.infos[name].shape)}\n".encode())
  found.update(np.asarray(files.read(norm), np.float32).tobytes())
  return found.hexdigest()


def fingerprint(source: Source) -> str:
  """A digest of a model that reads little of it: the names and shapes of its tensors, and the values of the final norm.

  It does not depend on the number format of the file, if its values are exact in it.
  """
  (norm,) = (tensor.name for tensor in source.table if tensor.leaves == (("final_norm", "scale"),))
  return _digest(source.files, norm)
