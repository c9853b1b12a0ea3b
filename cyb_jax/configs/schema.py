"""The groups of a run's configuration as frozen dataclasses.

`parsing` makes them of a ConfigDict, `validation` checks their values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from cyb_jax import methods
from cyb_jax.decoder import SIZES, DecoderConfig, LoraConfig, preset
from cyb_jax.errors import InputError
from cyb_jax.methods import Method, MethodConfig
from cyb_jax.option_syntax import Item, parse_mixture, parse_options


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The text that is read.

  Attributes:
    task: the name of the task that the text is read from (`cyb_jax.data.tasks`), or 'seqio:NAME'.
    tokenizer: the tokenizer: 'sentencepiece:SIZE' (trained on the task), 'bytes', the path of one
      (`data.open_tokenizer`), or '': that of `init_from`. On the command line the tokenizer of a `store` that is
      prepared is taken, unless this field is set there too.
    store: the folder of the token store, which is prepared if it is missing; '': one in the user's cache folder.
    options: the options of the task, as 'key=value,key=value'; a comma inside a value is written '\\,'.
    mixture: several sources by weight in place of `task`, as 'c4_en:0.7,jsonl(pattern=x.jsonl):0.3'; a source is a task
      with its options, or the folder of a token store.
    sequence_length: T, the number of real tokens in a window.
    batch_size: the number of windows in a step, over all devices and hosts.
    fraction: the share of the training windows that is used; the windows don't depend on the seed.
    document_mask: whether attention is restricted to the token's own document.
    seed: the seed of the order of windows.
  """

  task: str = "imdb_reviews"
  tokenizer: str = "sentencepiece:8192"
  store: str = ""
  options: str = ""
  mixture: str = ""
  sequence_length: int = 128
  batch_size: int = 16
  fraction: float = 1.0
  document_mask: bool = False
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW and its schedule.

  Attributes:
    learning_rate: the highest learning rate of the schedule.
    rate_over_width: whether the rate is divided by d_model (the paper's form).
    schedule: how the rate changes: 'cosine' (to the final rate), 'wsd' (constant, then linear to the final rate) or
      'constant'; each after a linear warm-up.
    warmup_fraction: the share of the steps that is warm-up.
    decay_fraction: the share of the steps, at the end, in which the rate decays (wsd).
    final_fraction: the final rate as a fraction of the highest one.
    beta1: the decay of Adam's first moment.
    beta2: the decay of Adam's second moment.
    epsilon: the constant in the denominator of Adam's update.
    weight_decay: the decay of the matrices, times the learning rate; norms, biases, embeddings and output rows have
      none.
    clip_norm: the global gradient norm is clipped to this value; 0: no clipping.
    accumulate: the batch is processed in this many parts, one after another; the gradient is that of the whole batch.
  """

  learning_rate: float = 2e-3
  rate_over_width: bool = False
  schedule: str = "cosine"
  warmup_fraction: float = 0.01
  decay_fraction: float = 0.2
  final_fraction: float = 0.01
  beta1: float = 0.9
  beta2: float = 0.95
  epsilon: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  accumulate: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The length of training, and when metrics, validations and checkpoints are written.

  Attributes:
    steps: the number of training steps; 0: as many as `epochs` take.
    epochs: the number of passes over the used windows, where `steps` is 0.
    seed: the seed of the initialisation and of the methods' random draws.
    log_every: the number of steps between two lines of metrics.
    eval_every: the number of steps between two validations; 0: only at the end.
    eval_limit: the number of windows of a validation during training; 0: the whole split.
    last_eval_limit: the number of windows of the evaluation at the end; 0: the whole split, which comparisons require.
    checkpoint_every: the number of steps between two checkpoints; 0: only at the end.
    keep: how many of the newest checkpoints are kept, in addition to the best one.
    trackers: what the metrics are sent to, in addition to metrics.jsonl: 'tensorboard', 'wandb', 'trackio' and
      'mlflow', as 'tensorboard,wandb'; '': nothing. A tracker that fails is left out and does not stop the run.
    max_skipped: the run stops after this many steps in a row whose loss or gradient isn't finite. Fewer are skipped:
      they are not applied, but counted and logged.
    collapse_warning: a warning is logged when the mean probability of stopping at one slot is above this value.
  """

  steps: int = 0
  epochs: float = 1.0
  seed: int = 0
  log_every: int = 20
  eval_every: int = 0
  eval_limit: int = 0
  last_eval_limit: int = 0
  checkpoint_every: int = 200
  keep: int = 2
  trackers: str = "tensorboard"
  max_skipped: int = 10
  collapse_warning: float = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
  """How a step is divided among devices.

  Attributes:
    strategy: how the step is compiled: 'jit', over a mesh; or 'pmap', which is data-parallel only.
    data: the number of devices on the mesh axis that splits the batch; -1: all that the other axes leave.
    fsdp: the number of devices on the axis that splits the batch and the parameters.
    tensor: the number of devices on the axis that splits heads, mlp and vocabulary.
    chunk_size: the number of slots that the readout processes at once, per device; 0: as many as give 256 MiB of f32
      logits.
  """

  strategy: str = "jit"
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  chunk_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Number formats. Trained parameters and the optimizer's state are f32.

  Attributes:
    activations: the number format of activations: 'float32', 'bfloat16', or 'auto': bfloat16 on accelerators, float32
      on CPUs.
    params: the number format of the decoder's parameters: 'float32'; or 'bfloat16', where they aren't trained
      (`tuning.weights`).
    matmul: the precision of f32 matrix products: 'default', 'high' or 'highest'.
  """

  activations: str = "auto"
  params: str = "float32"
  matmul: str = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
  """Which parameters are trained. The others have neither gradient nor optimizer state.

  Attributes:
    weights: the parameters that are trained: 'all'; 'lora': adapters of the decoder's matrices, and the new rows; or
      'new': the new rows only, which are the method's own parameters outside of the decoder: those of the pauses and of
      `<don't know>`.
    lora_rank: the inner size of the adapters, see `cyb_jax.decoder.LoraConfig`.
    lora_alpha: the output of an adapter is multiplied by lora_alpha / lora_rank.
    lora_targets: the matrices that have an adapter, in every layer.
    new_rate: a factor on the learning rate of the new rows.
    new_rows: the initial values of the rows of pauses and of `<don't know>` that the model of `init_from` doesn't have:
      'zero', plus noise; 'unused', entries of the vocabulary that no text uses; 'draws' around the mean of the
      embeddings; 'mean', unused entries or else that mean; 'auto' picks one of them (`cyb_jax.interop.new_rows`).
  """

  weights: str = "all"
  lora_rank: int = 8
  lora_alpha: float = 16.0
  lora_targets: str = "query,value"
  new_rate: float = 1.0
  new_rows: str = "auto"

  @property
  def lora(self) -> LoraConfig:
    """The adapters that `weights` = 'lora' trains."""
    targets = tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())
    return LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha, targets=targets)


# Fields of DecoderConfig that other groups of the config decide.
_ELSEWHERE = ("dtype", "param_dtype", "lora")
DECODER_FIELDS = {f.name: f for f in dataclasses.fields(DecoderConfig) if f.name not in _ELSEWHERE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The config of a run, frozen and valid.

  Attributes:
    method: which method is trained, and its options.
    decoder: the preset's name, '' for none, and the fields of `DecoderConfig` that override it.
    data: the text that is read.
    optimizer: AdamW and its schedule.
    train: the length of training, and when metrics, validations and checkpoints are written.
    parallelism: how a step is divided among devices.
    precision: number formats.
    tuning: which parameters are trained.
    init_from: what training starts from: a run's folder or the weights of other projects
      (`cyb_jax.interop.pretrained`); '': fresh parameters.
    source: the nested dict that this was frozen from, which is the content of config.json.
  """

  method: MethodConfig
  decoder: Mapping[str, Any]
  data: DataConfig
  optimizer: OptimizerConfig
  train: TrainConfig
  parallelism: ParallelismConfig
  precision: PrecisionConfig
  tuning: TuningConfig
  init_from: str
  source: Mapping[str, Any]

  def decoder_config(self, vocab_size: int | None = None) -> DecoderConfig:
    """The decoder for a vocabulary.

    Its tables have `decoder.vocab_size` rows; where that isn't set, the size of the vocabulary rounded up to a multiple
    of 128, so that they can be sharded. None: the preset's own size (for counting and compiling without a tokenizer).

    Raises:
      InputError: the vocabulary doesn't fit into decoder.vocab_size.
    """
    fields = {k: v for k, v in self.decoder.items() if k != "preset" and v is not None}
    rows = fields.get("vocab_size")
    if vocab_size is not None:
      if rows is None:
        fields["vocab_size"] = -(-vocab_size // 128) * 128
      elif rows < vocab_size:
        raise InputError(f"decoder.vocab_size: {rows} rows, but the tokenizer has {vocab_size} entries")
    lora = self.tuning.lora if self.tuning.weights == "lora" else None
    fields |= dict(lora=lora, dtype=self.activation_dtype, param_dtype=self.precision.params)
    if self.decoder["preset"]:
      return preset(self.decoder["preset"], **fields)
    for size in SIZES:
      if size not in fields:
        raise InputError(
          f"decoder.{size}: not set; set it, or name a decoder.preset, or leave the decoder to that of init_from"
        )
    return DecoderConfig(**fields)

  @property
  def tokenizer(self) -> str:
    """The name of the tokenizer: `data.tokenizer`, or where that is '', `init_from`.

    Raises:
      InputError: neither is given.
    """
    if not (self.data.tokenizer or self.init_from):
      raise InputError("data.tokenizer: '' is the tokenizer of init_from, which isn't given; give either")
    return self.data.tokenizer or self.init_from

  @property
  def evaluation_rows(self) -> int:
    """Windows that evaluation reads at a time: as many as training processes at once."""
    return self.data.batch_size // self.optimizer.accumulate

  @property
  def activation_dtype(self) -> str:
    if self.precision.activations != "auto":
      return self.precision.activations
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"

  def build_method(self, vocab_size: int | None = None, *, data_shards: int = 1) -> Method:
    """The method over a vocabulary.

    Args:
      vocab_size: of the vocabulary, see `decoder_config`.
      data_shards: devices that a batch is split over, under jit.
    """
    return methods.build(
      self.method,
      self.decoder_config(vocab_size),
      vocab_size=vocab_size,
      chunk_size=self.parallelism.chunk_size or None,
      shards=data_shards,
      weights=self.tuning.weights,
    )

  def task_options(self) -> dict[str, str]:
    """`data.options` as a dict."""
    return parse_options("data.options", self.data.options)

  def mixture(self) -> tuple[Item, ...]:
    """The sources of `data.mixture`; none if it is ''."""
    return parse_mixture("data.mixture", self.data.mixture) if self.data.mixture else ()
