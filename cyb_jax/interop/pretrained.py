"""Sources of initial parameters (`init_from`): another run, a converted checkpoint (which is a run's folder), a Hugging
Face folder, a GGUF file, or a llama2.c binary.

The initial parameters of a run are determined in this order:

1. If the run's folder has a checkpoint, the parameters of the newest one; the following steps are then skipped.
2. Otherwise fresh parameters from `train.seed`.
3. Parameters of `init_from` with the same name and shape replace them.
4. `tuning.new_rows` initialises the rows of pauses and <don't know> that `init_from` does not have, see
   `cyb_jax.interop.new_rows`.
5. If `method.calibration_batches` is set, the method is calibrated.

Step, optimizer state and data order are new. If the decoder is frozen, `init_from` is also the base of the run's
checkpoints, see `cyb_jax.interop.base`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jaxtyping import PyTree

from cyb_jax import configs, hub, interop, runs, storage
from cyb_jax.checkpointing.workdir import checkpoints_in, is_run, newest_meta, read_config
from cyb_jax.configs import Config
from cyb_jax.data import Tokenizer, open_tokenizer
from cyb_jax.decoder import DecoderConfig, LoraConfig, merge_lora, quantization
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.distributed.cluster import ALONE, Cluster
from cyb_jax.errors import InputError
from cyb_jax.interop import initial, new_rows
from cyb_jax.interop.base import Base, BaseReference
from cyb_jax.interop.peft import AdaptedSource
from cyb_jax.methods import Calibrated, Method, MethodConfig, configure
from cyb_jax.methods.parameters import trained_part
from cyb_jax.partitioning.mesh import data_shards
from cyb_jax.runs import Run

# Fields that do not change the function of a decoder, and adapters, which are merged into the imported matrices.
MANNER = ("attention", "dtype", "initializer", "lora", "param_dtype", "remat")
# The context length if a source does not state it, and its upper bound.
_LONGEST_CONTEXT = 2048
_NOTHING_SPENT = {"train_tokens": 0, "train_slots": 0, "train_flops": 0.0}


class Pretrained(abc.ABC):
  """An opened `init_from`; no weights have been read.

  Attributes:
    path: the path as given.
    kind: 'run', or the kind of `interop.Source`.
    decoder: the config of its decoder.
    method: the method of its parameters outside of the decoder; None: it has no such parameters.
    context: its stated context length in tokens; None: not stated.
  """

  path: str
  kind: str
  decoder: DecoderConfig
  method: MethodConfig | None
  context: int | None = None

  @property
  @abc.abstractmethod
  def tokenizer(self) -> Tokenizer | None:
    """The tokenizer of the source; None if it has no tokenizer."""

  @property
  @abc.abstractmethod
  def reference(self) -> BaseReference:
    """The identity of the source, for the checkpoints of runs that refer to it; all of its weights are read."""

  @abc.abstractmethod
  def decoder_params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree:
    """The parameters of a decoder that the source has.

    Args:
      wanted: parameters of `params['decoder']`, at least one in each layer.
      lora: see `params`.
    """

  @abc.abstractmethod
  def params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree:
    """The parameters of a method that the source has.

    Args:
      wanted: all parameters of the method, as jax.ShapeDtypeStruct with shardings.
      lora: the adapters of the run. A folder of adapters of the same form gives them; all others are merged.

    Returns:
      A nested dict of the same structure, without the parameters that the source does not have.
    """

  @property
  def unused_ids(self) -> list[int]:
    """The unused entries of its vocabulary."""
    return [] if self.tokenizer is None else self.tokenizer.unused_ids()

  def check(self, method: Method, tokenizer: Tokenizer, config: Config) -> None:
    """Checks that a run with this method, tokenizer and config can start from the source.

    Raises:
      InputError: the decoder or the tokenizer differs, or there are too few unused entries for `tuning.new_rows`.
    """
    new_rows.check(config.tuning.new_rows, method, self.unused_ids)
    if self.tokenizer is None:
      logging.warning("init_from: %s has no tokenizer, so data.tokenizer can't be checked against it", self.path)
    elif self.tokenizer.describe() != tokenizer.describe():
      raise InputError(
        f"init_from: {self.path} was trained with another tokenizer; leave data.tokenizer at '' to use that tokenizer,"
        " or set data.store to a store that was prepared with it"
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
        f" {trained.dont_know!r}, whose row has another meaning; use {trained.dont_know!r}"
      )
    if trained.calibration_batches and not method.config.calibration_batches:
      raise InputError(
        f"method.calibration_batches: 0, but init_from = {self.path} was calibrated; set it to"
        f" {trained.calibration_batches}, which keeps that run's offset"
      )

  # Fields of the decoder that may differ in a run that starts from the source.
  _free_fields: tuple[str, ...] = MANNER


class FromRun(Pretrained):
  """Another run."""

  kind = "run"

  def __init__(self, path: str, checkpoint: int | str = "last", base: str = "", base_option: str = ""):
    self.path, self.checkpoint = path, checkpoint
    self._base = {"base": base, "base_option": base_option}
    if newest_meta(path) is None:
      raise InputError(f"init_from: {path} is a run without a checkpoint; give a run with a checkpoint")
    config = configs.freeze(configs.migrated(read_config(path)))
    self.method = config.method
    self.decoder = config.decoder_config(self.tokenizer.vocab_size)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return runs.load_tokenizer(self.path)

  @functools.cached_property
  def reference(self) -> BaseReference:
    checkpoints = checkpoints_in(self.path, read_only=True)
    # The parameters are then read from this checkpoint, even if the run has saved others in the meantime.
    self.checkpoint = step = checkpoints.find(self.checkpoint)
    return BaseReference(self.path, step, checkpoints.fingerprint(step))

  def decoder_params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree:
    del lora
    return initial.placed(self._decoder(self.load(), wanted), wanted)

  def params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree:
    del lora
    run = self.load()
    found = run.params | {"decoder": self._decoder(run, wanted["decoder"])}
    _log_unused(found, wanted)
    return initial.placed(found, wanted)

  def load(self, mesh: jax.sharding.Mesh | None = None) -> Run:
    """The run on a mesh, see `load_run`."""
    return load_run(self.path, self.checkpoint, mesh, **self._base)

  @staticmethod
  def _decoder(run: Run, wanted: PyTree) -> PyTree:
    decoder, config = merge_lora(run.params["decoder"], run.method.decoder.config)
    scheme = quantization.scheme_of(wanted)
    return decoder if scheme is None else quantization.quantize_decoder(scheme, decoder, stacked=config.scan_layers)


class FromSource(Pretrained):
  """Files in formats of other projects, including our exports."""

  # Stacked and separate layers are both supported.
  _free_fields = (*MANNER, "scan_layers")

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
    """The training step of our export; 0 for other models."""
    extras = self._source.extras
    return 0 if extras is None or extras.step is None else extras.step

  @property
  def source(self) -> interop.Source:
    """The opened files."""
    return self._source

  @functools.cached_property
  def reference(self) -> BaseReference:
    path = hub.pinned(self.path) if hub.in_hub(self.path) else str(self.path)
    return BaseReference(path, None, self._source.checksum())

  def decoder_params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree:
    source = self._source
    if isinstance(source, AdaptedSource):
      source = source.for_run(lora)
    if not isinstance(source, AdaptedSource) or source.merges:
      # Files of other projects do not have those of LoRA.
      wanted = trained_part(wanted, lambda path: path[-1] not in LEAVES)
    return interop.load_decoder(source, wanted)

  def params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree:
    if isinstance(self._source, AdaptedSource):
      merges = self._source.for_run(lora).merges
      what = "merged" if merges else "trained further, because the run has adapters of the same form"
      logging.info("init_from: the adapters of %s are %s", self.path, what)
    found = {"decoder": self.decoder_params(wanted["decoder"], lora)}
    if self.method is not None:
      shapes = self._source.extras.own
      own = {name: x for name, x in wanted.items() if name != "decoder" and shapes.get(name) == x.shape}
      found |= interop.load_own(self._source, own)
    return found


def open_pretrained(
  path: str, *, checkpoint: int | str = "last", tokenizer: str = "", base: str = "", base_option: str = ""
) -> Pretrained:
  """Opens the source that `init_from` names.

  Args:
    path: a run's folder, a Hugging Face folder, a repository of the hub (hf://OWNER/NAME@REVISION), a GGUF file or a
      llama2.c binary.
    checkpoint: the checkpoint of a run.
    tokenizer: the tokenizer of a source without one, or a replacement of its tokenizer; see `open_tokenizer`.
    base, base_option: the base of a run, see `load_run`; the option '' means that the user can't give a base here.

  Raises:
    InputError: the path does not exist, or can't be read.
  """
  path = storage.absolute(path)
  if not hub.in_hub(path) and is_run(path):
    if tokenizer:
      raise InputError(f"--tokenizer: {tokenizer!r} is given, but {path} is a run, which has its own; leave it out")
    return FromRun(path, checkpoint, base, base_option)
  if base:
    raise InputError(f"{base_option}: {base!r} is given, but {path} is not a run; omit it")
  if checkpoint != "last":
    raise InputError(
      f"--checkpoint: {checkpoint!r} is given, but {path} is not a run and has no checkpoints; leave it out"
    )
  return FromSource(path, tokenizer)


def load_run(
  workdir: str | os.PathLike,
  checkpoint: int | str = "last",
  mesh: jax.sharding.Mesh | None = None,
  *,
  base: str = "",
  base_option: str = "base",
  cluster: Cluster = ALONE,
) -> Run:
  """Loads a run's parameters, without its optimizer state.

  Args:
    workdir: the run's folder.
    checkpoint: a step, 'last', or 'best' (the lowest validation loss).
    mesh: the mesh over which the parameters are sharded; None means the default device.
    base: the model that the run started from, if it is no longer where `init_from` of its config.json says; see
      `open_base`.
    base_option: what the user calls `base`, for messages; see `open_base`.
    cluster: the hosts that load the run together; host 0 checks the checkpoint for all.

  Raises:
    InputError: there is no run or no such checkpoint, the checkpoint is damaged, or see `open_base`. For 'last',
      damaged checkpoints are skipped with a warning.
  """
  config, tokenizer = runs.load_config(workdir), runs.load_tokenizer(workdir)
  method = config.build_method(tokenizer.vocab_size, data_shards=1 if mesh is None else data_shards(mesh))
  checkpoints = checkpoints_in(workdir, read_only=True)
  wanted = runs.abstract_params(method, mesh)
  while True:
    step = cluster.broadcast(checkpoints.find(checkpoint) if cluster.index == 0 else None)
    try:
      meta = checkpoints.meta(step)
      frozen = open_base(workdir, base or config.init_from, method, meta, base_option)
      if frozen is None and base:
        raise InputError(
          f"{base_option}: {base!r} is given, but checkpoint {step} of {workdir} has all parameters; omit it"
        )
      if frozen is None:
        return Run(config, method, checkpoints.restore_params(step, wanted), tokenizer, step, meta)
      params = frozen.complete(checkpoints.restore_params(step, frozen.saved_part(wanted)), wanted)
      config = dataclasses.replace(config, init_from=frozen.source.path)
      return Run(config, method, params, tokenizer, step, meta)
    except Exception:
      # A training run may have deleted the checkpoint in the meantime; then there is a newer checkpoint. Several hosts
      # may not all fail, so they end.
      if cluster.count > 1 or step in checkpoints.steps():
        raise


def open_base(
  workdir: str | os.PathLike, path: str, method: Method, meta: Mapping[str, Any], option: str = "base"
) -> Base | None:
  """Opens the base of a run's checkpoint, and compares its checksum.

  Args:
    workdir: the run's folder, for messages.
    path: where the base is: `init_from` of the run, or another path.
    method: the method of the run.
    meta: the JSON object of the checkpoint.
    option: the flag or argument with which the user gives another path, for messages; '': there is none.

  Returns:
    The base; None: the checkpoint has all parameters.

  Raises:
    InputError: the base can't be read, or has other weights than those that the run started from.
  """
  expected = BaseReference.of_checkpoint(meta)
  if expected is None:
    return None
  path = storage.absolute(expected.pinned(path))
  remedy = f"set init_from in {storage.place(workdir) / 'config.json'} to the model that the run started from"
  if option:
    remedy += f", or give it as {option}"
  about = f"workdir: {workdir} has only the trained parameters; the others are those of its base, {path}, which"
  try:
    source = open_pretrained(path, checkpoint="last" if expected.checkpoint is None else expected.checkpoint)
    found = source.reference
  except InputError as error:
    raise InputError(f"{about} can't be read ({error}); {remedy}") from None
  if found.checksum != expected.checksum:
    raise InputError(
      f"{about} has other weights than at the start of the run (checksum {found.checksum[:12]}, not"
      f" {expected.checksum[:12]}); {remedy}"
    )
  return Base(source, method)


def load(
  path: str | Pretrained,
  config: Config | None = None,
  *,
  checkpoint: int | str = "last",
  dtype: str = "float32",
  mesh: jax.sharding.Mesh | None = None,
  base: str = "",
  base_option: str = "base",
) -> Run:
  """The initial run that training would start from.

  Args:
    path: see `open_pretrained`; or its result, which has `checkpoint`, `base` and `base_option` already.
    config: the config of the run; None: the source's own config. For imported weights it has the method 'baseline',
      without pauses and <don't know>, so that the logits equal those of the imported model.
    checkpoint: the checkpoint of a run that `path` names.
    dtype: the dtype of the decoder's parameters if `config` is None.
    mesh: the mesh of the parameters; None: the default device.
    base, base_option: the base of a run that `path` names, see `load_run`.

  Raises:
    InputError: see `open_pretrained` and `Pretrained.check`; or there is no tokenizer.
  """
  if isinstance(path, Pretrained):
    found = path
  else:
    found = open_pretrained(path, checkpoint=checkpoint, base=base, base_option=base_option)
  if isinstance(found, FromRun) and config is None:
    return found.load(mesh)
  own = found.tokenizer
  if own is None and config is not None and config.data.tokenizer:
    own = open_tokenizer(config.data.tokenizer, found.decoder.vocab_size)
  if own is None:
    raise InputError(
      f"--tokenizer: not given, and {found.path} has no tokenizer; give the tokenizer that it was trained with"
    )
  step = 0
  if config is None:
    config, step = _own_config(found, dtype), found.step
  method = config.build_method(own.vocab_size, data_shards=1 if mesh is None else data_shards(mesh))
  found.check(method, own, config)
  params = initial.parameters(found, method, runs.abstract_params(method, mesh), config)
  meta = _NOTHING_SPENT | {"source": {"kind": found.kind, "path": str(found.path)}}
  # Our exports and runs are not models of another project.
  imported = isinstance(found, FromSource) and found.method is None
  return Run(config, method, params, own, step, meta, imported)


def _own_config(found: FromSource, dtype: str) -> Config:
  config = configs.default()
  config.precision.params = dtype
  config.train.epochs = 0.0  # the run is not trained
  method = found.method or configure("baseline")
  config.method.update(configs.written_method(method))
  config.data.tokenizer = ""
  config.data.sequence_length = min(found.context or _LONGEST_CONTEXT, _LONGEST_CONTEXT)
  config.decoder.preset = ""
  fields = dataclasses.asdict(found.decoder)
  config.decoder.update({k: v for k, v in fields.items() if k in configs.DECODER_FIELDS and k not in MANNER})
  return configs.freeze(config)


def _log_unused(found: PyTree, wanted: PyTree) -> None:
  for path, _ in jax.tree_util.tree_leaves_with_path(found):
    if initial.leaf_at(wanted, path) is None:
      logging.info("init_from: %s is not used", jax.tree_util.keystr(path))
