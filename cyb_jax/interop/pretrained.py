"""What a run may start from (`init_from`): another run, a converted checkpoint (which is a run's folder), a Hugging
Face folder, a GGUF file, a llama2.c binary.

What a run's parameters are, in this order:

1. those of the newest checkpoint in its own folder; then nothing below happens;
2. else fresh ones, from `train.seed`;
3. in their place those that `init_from` has under the same name and in the same shape;
4. the rows of pauses and <don't know> that it does not have start as `tuning.new_rows` says, see
   `cyb_jax.interop.new_rows`;
5. then the method calibrates itself, where that is asked for (`method.calibration_batches`).

Step, optimizer state and data order start anew.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from absl import logging
from jaxtyping import Array, PyTree

from cyb_jax import configs, interop, runs, storage
from cyb_jax.checkpointing.workdir import is_run, newest_meta, read_config
from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, open_tokenizer
from cyb_jax.decoder import DecoderConfig, merge_lora
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.errors import InputError
from cyb_jax.interop import new_rows
from cyb_jax.methods import Calibrated, Method, MethodConfig, configure
from cyb_jax.partitioning.mesh import data_shards
from cyb_jax.runs import Run

# How a decoder is computed, not what it computes; and adapters, which are merged into what is taken over.
_MANNER = ("attention", "dtype", "initializer", "lora", "param_dtype", "remat")
# Where a source of weights doesn't say how long a text it was trained on, or says more than is practical.
_LONGEST_CONTEXT = 2048
_NOTHING_SPENT = {"train_tokens": 0, "train_slots": 0, "train_flops": 0.0}


class Pretrained(abc.ABC):
  """An opened `init_from`; no weights have been read.

  Attributes:
    path: as it was given.
    kind: 'run', or that of `interop.Source`.
    decoder: what its parameters fit.
    method: that its parameters outside the decoder belong to; None where it has none.
    context: tokens of the longest text that it says it reads; None: it doesn't say.
  """

  path: str
  kind: str
  decoder: DecoderConfig
  method: MethodConfig | None
  context: int | None = None

  @property
  @abc.abstractmethod
  def tokenizer(self) -> Tokenizer | None:
    """None where it holds none."""

  @abc.abstractmethod
  def params(self, wanted: PyTree) -> PyTree:
    """Those of a method's parameters that it has.

    Args:
      wanted: all of them, as jax.ShapeDtypeStruct with shardings.

    Returns:
      A nested dict of the same form, without what it hasn't got.
    """

  @property
  def unused_ids(self) -> list[int]:
    """The entries of its vocabulary that are meant for no text."""
    return [] if self.tokenizer is None else self.tokenizer.unused_ids()

  def check(self, method: Method, tokenizer: Tokenizer, config: Config) -> None:
    """Whether a run with this method, tokenizer and config can start from it.

    Raises:
      InputError: another decoder or tokenizer, or too few unused entries for `tuning.new_rows`.
    """
    new_rows.check(config.tuning.new_rows, method, self.unused_ids)
    if self.tokenizer is None:
      logging.warning("init_from: %s holds no tokenizer; that data.tokenizer is its own can't be checked", self.path)
    elif self.tokenizer.describe() != tokenizer.describe():
      raise InputError(
        f"init_from: {self.path} was trained with another tokenizer; leave data.tokenizer at '' to take its own, or"
        " give data.store a store that was prepared with it"
      )
    for field in dataclasses.fields(DecoderConfig):
      ours, found = getattr(method.decoder.config, field.name), getattr(self.decoder, field.name)
      if field.name not in self._free_fields and ours != found:
        raise InputError(f"init_from: {self.path} has decoder.{field.name} = {found!r}, but this config has {ours!r}")
    trained = self.method
    if trained is None or trained.name != method.name or not isinstance(method, Calibrated):
      return
    if trained.dont_know != method.config.dont_know:
      raise InputError(
        f"method.dont_know: {method.config.dont_know!r}, but init_from = {self.path} was trained with"
        f" {trained.dont_know!r}, and its row means something else there; take that"
      )
    if trained.calibration_batches and not method.config.calibration_batches:
      raise InputError(
        f"method.calibration_batches: 0, but init_from = {self.path} was calibrated; set it to"
        f" {trained.calibration_batches}, which keeps that run's offset"
      )

  # Fields of the decoder in which a run that starts from it may differ.
  _free_fields: tuple[str, ...] = _MANNER


class _FromRun(Pretrained):
  kind = "run"

  def __init__(self, path: str, checkpoint: int | str = "last"):
    self.path, self.checkpoint = path, checkpoint
    if newest_meta(path) is None:
      raise InputError(f"init_from: {path} holds no run with a checkpoint")
    config = configs.freeze(configs.migrated(read_config(path)))
    self.method = config.method
    self.decoder = config.decoder_config(self.tokenizer.vocab_size)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return runs.load_tokenizer(self.path)

  def params(self, wanted: PyTree) -> PyTree:
    run = runs.load(self.path, self.checkpoint)
    decoder, _ = merge_lora(run.params["decoder"], run.method.decoder.config)
    found = run.params | {"decoder": decoder}
    _tell_left_behind(found, wanted)
    return _placed(found, wanted)


class _FromSource(Pretrained):
  """Files of others, and what we have written in their form."""

  # Both forms are read.
  _free_fields = (*_MANNER, "scan_layers")

  def __init__(self, path: str, tokenizer: str = ""):
    self._source = interop.open_source(path)
    self.path, self.kind = path, self._source.kind
    self.decoder, self.context = self._source.decoder, self._source.context
    extras = self._source.extras
    self.method = None if extras is None else extras.method
    self._tokenizer = tokenizer

  @functools.cached_property
  def tokenizer(self) -> Tokenizer | None:
    if self._tokenizer:
      return open_tokenizer(self._tokenizer, self._source.vocab_size)
    return self._source.tokenizer()

  @property
  def step(self) -> int:
    """Of the training of an export of ours."""
    extras = self._source.extras
    return 0 if extras is None or extras.step is None else extras.step

  def params(self, wanted: PyTree) -> PyTree:
    found = {"decoder": interop.load_decoder(self._source, _without_adapters(wanted["decoder"]))}
    if self.method is not None:
      shapes = self._source.extras.own
      own = {name: x for name, x in wanted.items() if name != "decoder" and shapes.get(name) == x.shape}
      found |= interop.load_own(self._source, own)
    return found


def open_pretrained(path: str, *, checkpoint: int | str = "last", tokenizer: str = "") -> Pretrained:
  """Opens what `init_from` names, whatever it is.

  Args:
    path: a run's folder, a Hugging Face folder, a GGUF file or a llama2.c binary.
    checkpoint: of a run.
    tokenizer: of a source that holds none, or in place of the one that it holds; see `open_tokenizer`.

  Raises:
    InputError: nothing there, or nothing that can be read.
  """
  path = storage.absolute(path)
  if is_run(path):
    if tokenizer:
      raise InputError(f"--tokenizer: {tokenizer!r} is given, but {path} is a run, which has its own")
    return _FromRun(path, checkpoint)
  if checkpoint != "last":
    raise InputError(f"--checkpoint: {checkpoint!r} is given, but {path} is no run, and has no checkpoints")
  return _FromSource(path, tokenizer)


def fill_decoder(source: Mapping[str, Any], workdir: str | os.PathLike | None = None) -> Mapping[str, Any]:
  """A nested config whose decoder, where it is left open (`decoder.preset=''`), is that of `init_from`.

  Args:
    source: see `configs.freeze`.
    workdir: the run's folder; a decoder that was filled in when the run began is taken from there, so that `init_from`
      need not exist when the run is continued.

  Raises:
    InputError: `init_from` can't be read.
  """
  decoder = source.get("decoder", {})
  open_decoder = isinstance(decoder, Mapping) and decoder.get("preset") == ""
  if open_decoder and not source.get("init_from") and decoder.get("d_model") is None:
    raise InputError("init_from: not given, and decoder.preset = '' is the decoder of that; give it, or a preset")
  if not (open_decoder and isinstance(source.get("init_from"), str)):
    return source
  found: Mapping[str, Any] = {}
  with storage.starting(workdir or ""):
    held = workdir is not None and storage.exists(storage.place(workdir) / "config.json")
  if held:
    recorded = runs.with_absolute_paths(read_config(workdir))
    if recorded.get("init_from") == runs.with_absolute_paths(source)["init_from"]:
      found = recorded["decoder"]
  if not found and source["init_from"]:
    found = dataclasses.asdict(open_pretrained(source["init_from"]).decoder)
    found = {name: value for name, value in found.items() if name in configs.DECODER_FIELDS and name not in _MANNER}
  filled = {name: value for name, value in found.items() if decoder.get(name) is None}
  return dict(source) | {"decoder": decoder | filled}


def parameters(pretrained: Pretrained, method: Method, wanted: PyTree, config: Config) -> PyTree:
  """What a run's parameters are before its first step; see the head of this file.

  Args:
    pretrained: what it starts from.
    method: of the run, over its vocabulary.
    wanted: shapes, dtypes and shardings.
    config: of the run; `train.seed` and `tuning.new_rows` are read.

  Returns:
    Bare arrays, placed. What the start has is never drawn first, so that no two copies are held.
  """
  found = pretrained.params(wanted)
  absent = {name: leaf for name, leaf in wanted.items() if name not in found}
  seed, choice = config.train.seed, config.tuning.new_rows
  rows = new_rows.start(choice, method, absent, found["decoder"], pretrained.unused_ids, seed)
  missing = [path for path, _ in jax.tree_util.tree_leaves_with_path(wanted) if _at(found, path) is None]
  drawn = [path for path in missing if path[0].key not in rows]
  for path in drawn:
    if path[-1].key not in LEAVES:  # adapters always do
      logging.info("init_from: %s has its initial value", jax.tree_util.keystr(path, simple=True, separator="."))
  fresh = _drawn(method, seed, drawn)

  def pick(path, leaf):
    there = _at(found, path)
    if there is not None:
      return there
    value = fresh[path] if path in fresh else rows[path[0].key]
    return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

  return jax.tree_util.tree_map_with_path(pick, wanted)


def _drawn(method: Method, seed: int, paths: list[tuple[Any, ...]]) -> dict[tuple[Any, ...], Array]:
  """Some of the fresh parameters, as `training.init_state` has them; the others aren't drawn."""

  def draw():
    params = nn.unbox(method.init(jax.random.fold_in(jax.random.key(seed), 0)))
    return [_at(params, path) for path in paths]

  return dict(zip(paths, jax.jit(draw)())) if paths else {}


def load(
  path: str | Pretrained,
  config: Config | None = None,
  *,
  checkpoint: int | str = "last",
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
) -> Run:
  """What training would start from, ready to use.

  Args:
    path: see `open_pretrained`; or what that has opened.
    config: of the run that would start from it; None: its own. That of weights of others is the method 'baseline',
      which has neither pauses nor <don't know>: its logits are theirs.
    checkpoint: of a run that `path` names.
    dtype: of the decoder's parameters, where `config` is None.
    mesh: where the parameters go; None: the default device.

  Raises:
    InputError: see `open_pretrained` and `Pretrained.check`; or no tokenizer is known.
  """
  found = path if isinstance(path, Pretrained) else open_pretrained(path, checkpoint=checkpoint)
  if isinstance(found, _FromRun) and config is None:
    return runs.load(found.path, found.checkpoint, mesh)
  own = found.tokenizer
  if own is None and config is not None and config.data.tokenizer:
    own = open_tokenizer(config.data.tokenizer, found.decoder.vocab_size)
  if own is None:
    raise InputError(f"--tokenizer: not given, and {found.path} holds none; give the one that it was trained with")
  step = 0
  if config is None:
    config, step = _own_config(found, dtype), found.step
  method = config.build_method(own.vocab_size, data_shards=1 if mesh is None else data_shards(mesh))
  found.check(method, own, config)
  params = parameters(found, method, runs.abstract_params(method, mesh), config)
  meta = _NOTHING_SPENT | {"source": {"kind": found.kind, "path": str(found.path)}}
  # An export of ours is no model of another project, nor is a run.
  imported = isinstance(found, _FromSource) and found.method is None
  return Run(config, method, params, own, step, meta, imported)


def _own_config(found: _FromSource, dtype: str) -> Config:
  config = configs.default()
  config.precision.params = dtype
  config.train.epochs = 0.0  # it's read, not trained
  method = found.method or configure("baseline")
  config.method.update(configs.written_method(method))
  config.data.tokenizer = ""
  config.data.sequence_length = min(found.context or _LONGEST_CONTEXT, _LONGEST_CONTEXT)
  config.decoder.preset = ""
  fields = dataclasses.asdict(found.decoder)
  config.decoder.update({k: v for k, v in fields.items() if k in configs.DECODER_FIELDS and k not in _MANNER})
  return configs.freeze(config)


def _without_adapters(decoder: Mapping[str, Any]) -> dict[str, Any]:
  """The decoder's leaves but for LoRA's, which are nobody's but ours."""
  return {
    name: _without_adapters(leaf) if isinstance(leaf, Mapping) else leaf
    for name, leaf in decoder.items()
    if name not in LEAVES
  }


def _placed(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
  """What of `found` has the name and the shape of a wanted array, in that one's dtype and place."""
  placed = {}
  for name, leaf in wanted.items():
    there = found.get(name)
    if isinstance(leaf, Mapping):
      placed[name] = _placed(there or {}, leaf)
    elif there is not None and there.shape == leaf.shape:
      placed[name] = jax.device_put(there.astype(leaf.dtype), leaf.sharding)
  return placed


def _at(tree: PyTree, path: tuple[Any, ...]) -> Any:
  """The leaf at a path of dict keys; None where there is none."""
  for key in path:
    tree = tree.get(key.key) if isinstance(tree, Mapping) else None
  return tree


def _tell_left_behind(found: PyTree, wanted: PyTree) -> None:
  for path, _ in jax.tree_util.tree_leaves_with_path(found):
    if _at(wanted, path) is None:
      logging.info("init_from: %s is left behind", jax.tree_util.keystr(path))
