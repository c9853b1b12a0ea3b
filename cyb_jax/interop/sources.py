"""Models in the formats of other projects: their config, and their weights, which are loaded leaf by leaf.

`open_model` checks the headers before any weight is read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import PyTree

from cyb_jax import hub, methods, storage
from cyb_jax.configs import methods_group
from cyb_jax.decoder import DecoderConfig, quantization
from cyb_jax.decoder.config import matrix_shape
from cyb_jax.errors import InputError, reading, shown
from cyb_jax.interop import gguf, huggingface, llama2c
from cyb_jax.interop.base import checksum_of_files
from cyb_jax.interop.families import LeafPath, Tensor, same_layout
from cyb_jax.interop.tensors import Fields, TensorFiles, TensorInfo, check
from cyb_jax.methods import MethodConfig
from cyb_jax.progress import Meter

if TYPE_CHECKING:
  from cyb_jax.data import Tokenizer

_TABLES = (("embedding",), ("unembedding",))
# The largest number of rows that pad a table in memory, in addition to its own number.
_MOST_PADDING = 4096


@dataclasses.dataclass(frozen=True)
class Extras:
  """The part of our exports that other models do not have.

  Attributes:
    method: the options of the trained method.
    vocab_size: the number of the decoder's rows that are vocabulary entries; the other rows are padding.
    file_rows: the number of the decoder's rows in the files; the other rows are padding and are read as zeros.
    pause_ids: the ids of the entries `<pause_1>`.. that follow the decoder's rows.
    dont_know_id: the id of the entry `<dont_know>`; None: there is no such entry.
    prior_shift: the shift of the `<don't know>` logit in the readout, in nats; None: no shift.
    step: the training step; None: not recorded.
    own: the leaves outside of params['decoder'], and their shapes.
  """

  method: MethodConfig
  vocab_size: int
  file_rows: int
  pause_ids: tuple[int, ...]
  dont_know_id: int | None
  prior_shift: float | None
  step: int | None
  own: Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
  """An opened and checked model; no weights have been read.

  Attributes:
    kind: 'huggingface', 'gguf' or 'llama2c'.
    path: the folder or file.
    decoder: the decoder's config, with param_dtype float32.
    files: the tensors of its files, by name.
    table: the tensors and the leaves of the decoder's parameters that they hold.
    extras: the additional data of our exports; None: other models.
    context: the stated context length in tokens; None: not stated.
    own_files: the tensors of our exports outside of the decoder; None: there are none.
  """

  kind: str
  path: pathlib.Path
  decoder: DecoderConfig
  files: TensorFiles = dataclasses.field(repr=False)
  table: Sequence[Tensor] = dataclasses.field(repr=False)
  extras: Extras | None = None
  context: int | None = None
  own_files: TensorFiles | None = dataclasses.field(default=None, repr=False)

  @functools.cached_property
  def _parts(self) -> dict[LeafPath, tuple[Tensor, int]]:
    """The tensor that holds a leaf, and the index of the leaf within the tensor."""
    return {leaf: (tensor, part) for tensor in self.table for part, leaf in enumerate(tensor.leaves)}

  def holds(self, path: LeafPath) -> bool:
    """Whether the files have a leaf."""
    return path in self._parts

  def read(self, path: LeafPath, layer: int | None = None) -> np.ndarray:
    """One leaf of params['decoder'], in our layout and in the file's precision (f32 if it is quantised).

    Args:
      path: ('embedding',), ('final_norm', 'scale'); within a layer: ('attention', 'query', 'kernel').
      layer: the number of the layer; None: the leaf is not in a layer.
    """
    tensor, part = self._parts[path]
    array = tensor.split(self.files.read(tensor.name.format(layer=layer)))[part]
    if path not in _TABLES or self.extras is None:
      return array
    array = array[: self.extras.file_rows]
    return np.pad(array, ((0, self.decoder.vocab_size - len(array)), (0, 0)))

  def read_own(self, name: str) -> np.ndarray:
    """One leaf of our export outside of params['decoder']."""
    if name not in ("pause_input", "dont_know"):
      return self.own_files.read(name)
    shape = self.extras.own[name]
    if name == "pause_input":
      leaf, first = ("embedding",), self.extras.pause_ids[0]
    else:
      leaf, first = ("embedding" if self.decoder.tied_embeddings else "unembedding",), self.extras.dont_know_id
    tensor, _ = self._parts[leaf]
    return self.files.read(tensor.name)[first : first + math.prod(shape[:-1])].reshape(shape)

  @property
  def vocab_size(self) -> int:
    """The number of the decoder's rows that are vocabulary entries; all rows, unless the source is our export."""
    return self.decoder.vocab_size if self.extras is None else self.extras.vocab_size

  def checksum(self) -> str:
    """A hexadecimal sha256 of the files with the weights, whatever their names; the files are read."""
    return checksum_of_files({info.file for info in self._all_infos()})

  def _all_infos(self) -> list[TensorInfo]:
    """The headers of all tensors of the decoder."""
    return list(self.files.infos.values())

  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer of the source; None if it has no tokenizer."""
    from cyb_jax.data import tokenizers

    path = self.path
    if (path / huggingface.TOKENIZER).is_dir():
      return tokenizers.load(path / huggingface.TOKENIZER)
    if self.kind == "huggingface" and not any((self.path / x).exists() for x in ("tokenizer.json", "tokenizer.model")):
      return None
    if self.kind == "llama2c":
      path = self.path.with_name("tokenizer.bin")
      if not path.exists():
        return None
    return tokenizers.open_tokenizer(path, rows=self.vocab_size)


def open_model(path: str | os.PathLike) -> Source:
  """Opens a Hugging Face folder, a GGUF file or a llama2.c binary; the format is detected from the contents.

  Args:
    path: a local path, or a repository of the hub, see `cyb_jax.hub`.

  Raises:
    InputError: the source is invalid; the message names the file and, if applicable, the tensor or field.
  """
  with reading(str(path)):
    return _open(path)


def _open(path: str | os.PathLike) -> Source:
  local = pathlib.Path(hub.fetch(str(path)) if hub.in_hub(path) else storage.absolute(path))
  if local.is_dir():
    return _open_folder(local)
  if not local.is_file():
    raise InputError(_absent(str(path)))
  with local.open("rb") as file:
    start = file.read(4)
  if start == b"GGUF":
    source = gguf.GgufFile(local)
    config = gguf.read_config(source)
    found = _checked("gguf", local, config, source, gguf.table(source, config), gguf.HARMLESS_TENSORS)
    name = f"{source.architecture}.context_length"
    return dataclasses.replace(found, context=source.metadata(name).get(name))
  pickled = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
  # A .bin file may be a llama2.c binary.
  if pickled or (local.suffix in huggingface.PICKLES and local.suffix != ".bin"):
    raise InputError(
      f"{path}: a pickle or an archive, which this version never opens; convert it to safetensors, or unpack it"
    )
  if local.suffix == ".safetensors":
    raise InputError(f"{path}: one file of a model; give its folder, with config.json")
  source = llama2c.Llama2cFile(local)
  found = _checked("llama2c", local, source.config, source, source.table())
  return dataclasses.replace(found, context=source.context)


def _open_folder(folder: pathlib.Path) -> Source:
  if not (folder / "config.json").is_file():
    inside = sorted(folder.glob("*.gguf"))
    instead = (
      f"give the file, {inside[0]}" if inside else "give a Hugging Face folder, a .gguf file or a llama2.c binary"
    )
    raise InputError(f"{folder}: there is no config.json; {instead}")
  family, config, fields = huggingface.read_config(folder / "config.json")
  files = huggingface.SafetensorsFiles(folder)
  table = family.table(config)
  harmless = huggingface.HARMLESS_TENSORS
  if config.tied_embeddings:
    untied = family.table(dataclasses.replace(config, tied_embeddings=False))
    (output,) = (tensor for tensor in untied if tensor.leaves == (("unembedding",),))
    if output.name in files.infos:
      _check_tied(files, table[0].name, output.name)
      harmless = (*harmless, re.escape(output.name))
  if family.prefix and not any(name.startswith(family.prefix) for name in files.infos):
    table = [dataclasses.replace(tensor, name=tensor.name.removeprefix(family.prefix)) for tensor in table]
  source = _checked("huggingface", folder, config, files, table, harmless)
  source = dataclasses.replace(source, context=fields.get("max_position_embeddings"))
  if fields.get(huggingface.CYB_JAX) is None:
    return source
  return _with_extras(source, fields[huggingface.CYB_JAX])


def _with_extras(source: Source, written: Any) -> Source:
  """The source of our export; `cyb_jax.interop.export` documents the block `cyb_jax` of its config.json."""
  path = source.path / "config.json"
  fields = block(path, huggingface.CYB_JAX, written)
  if fields.take("version", int) != 1:
    raise InputError(f"{path}: cyb_jax.version = {shown(written['version'])}; this version reads 1")
  config = method_config(path, fields.take("method", dict))
  rows, vocab_size = fields.take("rows", int), fields.take("vocab_size", int)
  table_rows = fields.take("table_rows", int, rows)
  pause_ids, dont_know_id = fields.take("pause_ids", list), fields.take("dont_know_id", int, None)
  appended = [*pause_ids, *(() if dont_know_id is None else (dont_know_id,))]
  # The tables in memory are padded to a multiple of a small number.
  valid = all(isinstance(x, int) for x in appended) and 0 < vocab_size <= rows <= table_rows <= 2 * rows + _MOST_PADDING
  if not valid or appended != list(range(rows, source.decoder.vocab_size)):
    raise InputError(
      f"{path}: cyb_jax: {shown(rows)} of {shown(table_rows)} rows, {shown(vocab_size)} vocabulary entries and the"
      f" appended entries {shown(appended)} don't give vocab_size = {source.decoder.vocab_size}; export the run again"
    )
  pauses = getattr(config, "pauses", 0)
  if len(pause_ids) != pauses:
    raise InputError(
      f"{path}: cyb_jax.pause_ids has {len(pause_ids)} entries, but cyb_jax.method.pauses = {pauses}; export"
      " the run again"
    )
  decoder = dataclasses.replace(source.decoder, vocab_size=table_rows)
  own = own_shapes(path, config, decoder)
  # A parameter that `own` does not list would be silently reinitialised.
  shapes = {name: list(shape) for name, shape in own.items()}
  if fields.take("own", dict) != shapes:
    raise InputError(
      f"{path}: cyb_jax.own = {shown(written['own'])}, but its method has {shapes!r}; export the run again"
    )
  if (dont_know_id is not None) != ("dont_know" in own):
    raise InputError(
      f"{path}: cyb_jax.dont_know_id = {dont_know_id!r}, but its method has {sorted(own)}; export the run again"
    )
  extras = Extras(
    method=config,
    vocab_size=vocab_size,
    file_rows=rows,
    pause_ids=tuple(pause_ids),
    dont_know_id=dont_know_id,
    prior_shift=fields.take("prior_shift", float, None),
    step=fields.take("step", int, None),
    own=own,
  )
  not_entries = {name: shape for name, shape in own.items() if name not in ("pause_input", "dont_know")}
  files = None
  if not_entries:
    files = huggingface.SafetensorsFiles(source.path, huggingface.OWN)
    check(files, [same_layout(name, (name,), shape) for name, shape in not_entries.items()], 0, source.path)
  return dataclasses.replace(source, decoder=decoder, extras=extras, own_files=files)


def block(path: pathlib.Path, name: str, values: Any) -> Fields:
  """The fields of an object inside config.json."""
  if not isinstance(values, dict):
    raise InputError(f"{path}: {name} = {shown(values)} must be an object; export the run again")
  return Fields(path, {f"{name}.{key}": value for key, value in values.items()}, f"{name}.")


def method_config(path: pathlib.Path, written: Any) -> MethodConfig:
  """The options of the method that an export records; an option that is absent has its default.

  Version 0.1 recorded the options of all methods: those that the method does not have, at their old defaults, are
  ignored.
  """
  block(path, f"{huggingface.CYB_JAX}.method", written)
  values = {name: value for name, value in written.items() if value is not None or name == "dont_know_prior"}
  for name, value in values.items():
    if isinstance(value, list):
      if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise InputError(f"{path}: cyb_jax.method.{name} = {shown(value)} must be a list of numbers")
      values[name] = ":".join(f"{x!r}" for x in value)
  try:
    return methods_group.parse_method(methods_group.migrated(values))
  except InputError as error:
    raise InputError(f"{path}: cyb_jax.{str(error).removeprefix('config.')}") from None


def own_shapes(path: pathlib.Path, config: MethodConfig, decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
  """The shapes of a method's parameters outside of the decoder.

  Raises:
    InputError: the method can't be built with these options.
  """
  try:
    # The shapes do not depend on the number of layers, and tracing all layers takes most of a second.
    method = methods.build(config, dataclasses.replace(decoder, num_layers=1))
  except InputError as error:
    raise InputError(f"{path}: cyb_jax.{error}") from None
  shapes = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  return {name: leaf.shape for name, leaf in shapes.items() if name != "decoder"}


def _check_tied(files: TensorFiles, embedding: str, output: str) -> None:
  """Raises InputError if a config ties two tables that differ."""
  if embedding not in files.infos:
    return  # reported later
  if not np.array_equal(files.read(embedding), files.read(output)):
    raise InputError(
      f"{files.infos[output].file}: the tensor {output} differs from {embedding}, but config.json ties them; set"
      " tie_word_embeddings to false in config.json"
    )


def _checked(
  kind: str,
  path: pathlib.Path,
  config: DecoderConfig,
  files: TensorFiles,
  table: Sequence[Tensor],
  harmless: Sequence[str] = (),
) -> Source:
  check(files, table, config.num_layers, path, harmless)
  return Source(kind, path, config, files, table)


def _absent(path: str) -> str:
  if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
    return f"{path}: no such folder or file; if it is a repository of the Hugging Face Hub, give hf://{path}"
  return f"{path}: no such folder or file; give a Hugging Face folder, a .gguf file or a llama2.c binary"


def load_decoder(source: Source, abstract: PyTree) -> PyTree:
  """Reads, casts and places the weights one after the other, so that the host holds one leaf at a time.

  Args:
    source: from `opening.open_source`.
    abstract: params['decoder'] as jax.ShapeDtypeStruct with shardings, layers stacked (`scan_layers`) or not, and
      matrices quantised or not.

  Returns:
    The same tree, of arrays.

  Raises:
    InputError: the source does not have a leaf, or has it in another shape.
  """

  scheme = quantization.scheme_of(abstract)

  def read(names: LeafPath, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
    if scheme is not None and names[-1] in ("kernel", quantization.SCALE):
      integers, scale = quantized(names[:-1], layer)
      array = _checked_shape(source, names, integers if names[-1] == "kernel" else scale, shape)
    else:
      array = _read(source, names, layer, shape)
    meter.advance()
    return array

  # The integers and the scales are two leaves of one tensor.
  @functools.lru_cache(maxsize=1)
  def quantized(module: LeafPath, layer: int | None) -> tuple[np.ndarray, np.ndarray]:
    inputs, outputs = matrix_shape(source.decoder, module[-1])
    kernel = _read(source, (*module, "kernel"), layer, inputs + outputs)
    return quantization.quantize(scheme, kernel, len(inputs))

  def load(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    names = tuple(key.key for key in path)
    first, _, number = names[0].partition("_")
    if first != "layers":
      return _place(read(names, None, leaf.shape), leaf)
    if number:
      return _place(read(names[1:], int(number), leaf.shape), leaf)
    stacked = np.empty(leaf.shape, leaf.dtype)
    for layer in range(source.decoder.num_layers):
      stacked[layer] = read(names[1:], layer, leaf.shape[1:])
    return _place(stacked, leaf)

  layers = abstract.get("layers")
  count = sum(name.startswith("layers_") for name in abstract)
  if layers is not None:
    count = jax.tree.leaves(layers)[0].shape[0]
  if count != source.decoder.num_layers:
    raise InputError(f"{source.path}: {source.decoder.num_layers} layers, but the decoder has {count}")
  # Stacked or not, each layer's leaves are read one by one.
  stacked = len(jax.tree.leaves(layers)) * (count - 1)
  with Meter(f"reading {source.path}", total=len(jax.tree.leaves(abstract)) + stacked, unit="tensors") as meter:
    return jax.tree_util.tree_map_with_path(load, abstract)


def load_own(source: Source, abstract: PyTree) -> PyTree:
  """The leaves of our export outside of params['decoder'].

  Args:
    source: a source with `extras`.
    abstract: these leaves, as jax.ShapeDtypeStruct with shardings: `pause_input`, `dont_know` and others.

  Returns:
    The same tree, of arrays.

  Raises:
    InputError: the source has no such leaf, or has it in another shape.
  """
  own = {} if source.extras is None else source.extras.own

  def load(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    name = ".".join(key.key for key in path)
    if own.get(name) != tuple(leaf.shape):
      found = f"has the shape {own[name]}" if name in own else "is missing"
      raise InputError(f"{source.path}: {name} {found}; it must have the shape {tuple(leaf.shape)}")
    return _place(source.read_own(name), leaf)

  return jax.tree_util.tree_map_with_path(load, abstract)


def _read(source: Source, path: LeafPath, layer: int | None, shape: tuple[int, ...]) -> np.ndarray:
  if not source.holds(path):
    raise InputError(f"{source.path}: {'.'.join(path)} is missing, but the decoder requires it")
  return _checked_shape(source, path, source.read(path, layer), shape)


def _checked_shape(source: Source, path: LeafPath, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  if array.shape != tuple(shape):
    raise InputError(
      f"{source.path}: {'.'.join(path)} has the shape {array.shape}; the decoder requires {tuple(shape)}"
    )
  return array


def _place(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  # ascontiguousarray would turn a scalar into an array with one axis.
  array = np.asarray(array, leaf.dtype, order="C")
  if leaf.sharding is None:
    return jax.device_put(array)
  return jax.make_array_from_callback(array.shape, leaf.sharding, lambda index: array[index])
