"""The groups of a run's config as frozen dataclasses.

`parsing` creates them from a ConfigDict, and `validation` checks their values.
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
    task: the name of the task from which text is read (`cyb_jax.data.tasks`), or 'seqio:NAME'.
    tokenizer: the tokenizer: 'sentencepiece:SIZE' (trained on the task), 'bytes', the path of a tokenizer
      (`data.open_tokenizer`), or '' for the tokenizer of `init_from`. If `store` is a prepared store, programs use its
      tokenizer, unless this field is also set on the command line.
    store: the folder of the token store, which is prepared if it is missing; '': a folder in the user's cache folder.
    options: the options of the task, as 'key=value,key=value'; a comma inside a value is '\\,'.
    mixture: several sources with weights instead of `task`, as 'c4_en:0.7,jsonl(pattern=x.jsonl):0.3'; a source is a
      task with its options, or the folder of a token store.
    sequence_length: T, the number of real tokens in a window.
    batch_size: the number of windows in a step, over all devices and hosts.
    fraction: the fraction of the training windows that is used; the selection doesn't depend on the seed.
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
    warmup_fraction: the fraction of the steps that is warm-up.
    decay_fraction: the fraction of the steps, at the end, in which the rate decays (wsd).
    final_fraction: the final rate as a fraction of the highest rate.
    beta1: the decay of Adam's first moment.
    beta2: the decay of Adam's second moment.
    epsilon: the constant in the denominator of Adam's update.
    weight_decay: the weight decay of matrices, which is multiplied by the learning rate; norms, biases, embeddings and
      output rows have no weight decay.
    clip_norm: the global gradient norm is clipped to this value; 0: no clipping.
    accumulate: the number of parts of the batch that are processed one after another; the gradient is the gradient of
      the entire batch.
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
    steps: the number of training steps; 0: the number of steps of `epochs` epochs.
    epochs: the number of passes over the used windows, if `steps` is 0.
    seed: the seed of the initialisation and of the methods' random draws.
    log_every: the number of steps between two lines of metrics.
    eval_every: the number of steps between two validations; 0: only at the end.
    eval_limit: the number of windows of a validation during training; 0: all windows.
    last_eval_limit: the number of windows of the evaluation at the end; 0: all windows, which comparisons require.
    checkpoint_every: the number of steps between two checkpoints; 0: only at the end.
    keep: the number of newest checkpoints that are kept, in addition to the best one.
    trackers: the experiment trackers that receive the metrics, in addition to metrics.jsonl: 'tensorboard', 'wandb',
      'trackio' and 'mlflow', for example 'tensorboard,wandb'; '': none. A tracker that fails is disabled and does not
      stop the run.
    max_skipped: the run stops after this many consecutive steps whose loss or gradient isn't finite. Fewer such steps
      are skipped: they are not applied, but counted and logged.
    collapse_warning: a warning is logged when the mean probability of stopping at one slot exceeds this value.
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
  """The division of a step among devices.

  Attributes:
    strategy: the transformation of the step: 'jit', over a mesh; or 'pmap', which is only data-parallel.
    data: the number of devices on the mesh axis that splits the batch; -1: all devices divided by fsdp x tensor.
    fsdp: the number of devices on the axis that splits the batch and the parameters.
    tensor: the number of devices on the axis that splits heads, mlp and vocabulary.
    chunk_size: the number of slots that the readout processes at once, per device; 0: as many as have 256 MiB of f32
      logits.
  """

  strategy: str = "jit"
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  chunk_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Number formats. Trained parameters and the optimizer state are f32.

  Attributes:
    activations: the number format of activations: 'float32', 'bfloat16', or 'auto', which is bfloat16 on accelerators
      and float32 on CPUs.
    params: the number format of the decoder's parameters: 'float32'; or, if they aren't trained (`tuning.weights`),
      'bfloat16', 'int8' or 'nf4': with the last two the matrices of the layers have 8 or 4 bits, and the other
      parameters are bfloat16 (`cyb_jax.decoder.quantization`).
    matmul: the precision of f32 matrix products: 'default', 'high' or 'highest'.
  """

  activations: str = "auto"
  params: str = "float32"
  matmul: str = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
  """The selection of the trained parameters. The other parameters have neither gradient nor optimizer state.

  Attributes:
    weights: the parameters that are trained: 'all'; 'lora': adapters of the decoder's matrices, and the new rows; or
      'new': only the new rows, which are the method's parameters outside the decoder, such as the rows of pauses and of
      `<don't know>`.
    lora_rank: the inner size of the adapters, see `cyb_jax.decoder.LoraConfig`.
    lora_alpha: the output of an adapter is multiplied by lora_alpha / lora_rank.
    lora_targets: the matrices that have an adapter, in every layer.
    new_rate: a factor on the learning rate of the new rows.
    new_rows: the initial values of the rows of pauses and of `<don't know>` that the model of `init_from` lacks:
      'zero': zeros plus noise; 'unused': unused entries of the vocabulary; 'draws': samples around the mean of the
      embeddings; 'mean': unused entries, or that mean if there are none; 'auto': one of these
      (`cyb_jax.interop.new_rows`).
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


# Fields of DecoderConfig that are determined by other groups of the config.
_ELSEWHERE = ("dtype", "param_dtype", "lora")
DECODER_FIELDS = {f.name: f for f in dataclasses.fields(DecoderConfig) if f.name not in _ELSEWHERE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """The frozen and validated config of a run.

  Attributes:
    method: the method that is trained, and its options.
    decoder: the name of the preset, or '' for none, and the fields of `DecoderConfig` that override it.
    data: the text that is read.
    optimizer: AdamW and its schedule.
    train: the length of training, and when metrics, validations and checkpoints are written.
    parallelism: the division of a step among devices.
    precision: number formats.
    tuning: the selection of the trained parameters.
    init_from: the initial parameters: a run's folder or the weights of other projects (`cyb_jax.interop.pretrained`);
      '': newly initialised parameters. If the decoder is frozen, it is also the base that the run's checkpoints need,
      and may be changed to its new place when it has been moved (`cyb_jax.interop.base`).
    source: the nested dict from which this config was created; it is the content of config.json.
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

    Its tables have `decoder.vocab_size` rows. If that isn't set, they have the size of the vocabulary rounded up to a
    multiple of 128, so that they can be sharded. For `vocab_size` None, they have the preset's size (for counting and
    compiling without a tokenizer).

    Raises:
      InputError: the vocabulary has more than decoder.vocab_size entries.
    """
    fields = {k: v for k, v in self.decoder.items() if k != "preset" and v is not None}
    rows = fields.get("vocab_size")
    if vocab_size is not None:
      if rows is None:
        fields["vocab_size"] = -(-vocab_size // 128) * 128
      elif rows < vocab_size:
        raise InputError(
          f"decoder.vocab_size: {rows}, but the tokenizer has {vocab_size} entries; give at least this number"
        )
    lora = self.tuning.lora if self.tuning.weights == "lora" else None
    fields |= dict(lora=lora, dtype=self.activation_dtype, param_dtype=self.precision.params)
    if self.decoder["preset"]:
      return preset(self.decoder["preset"], **fields)
    for size in SIZES:
      if size not in fields:
        raise InputError(f"decoder.{size}: not set; set it, or set decoder.preset, or set init_from to use its decoder")
    return DecoderConfig(**fields)

  @property
  def tokenizer(self) -> str:
    """The spec of the tokenizer: `data.tokenizer`, or `init_from` if `data.tokenizer` is ''.

    Raises:
      InputError: neither is given.
    """
    if not (self.data.tokenizer or self.init_from):
      raise InputError("data.tokenizer: '' means the tokenizer of init_from, which isn't set; set one of them")
    return self.data.tokenizer or self.init_from

  @property
  def evaluation_rows(self) -> int:
    """The number of windows in a batch of evaluation: as many as training processes at once."""
    return self.data.batch_size // self.optimizer.accumulate

  @property
  def activation_dtype(self) -> str:
    if self.precision.activations != "auto":
      return self.precision.activations
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"

  def build_method(self, vocab_size: int | None = None, *, data_shards: int = 1) -> Method:
    """The method for a vocabulary.

    Args:
      vocab_size: the size of the vocabulary, see `decoder_config`.
      data_shards: the number of devices over which a batch is split, under jit.

    Raises:
      InputError: a window of text has more positions than the decoder's table of learned positions.
    """
    method = methods.build(
      self.method,
      self.decoder_config(vocab_size),
      vocab_size=vocab_size,
      chunk_size=self.parallelism.chunk_size or None,
      shards=data_shards,
      weights=self.tuning.weights,
    )
    rows = method.decoder.config.learned_positions
    positions = self.data.sequence_length * (method.num_slots if getattr(method, "shifts_positions", False) else 1)
    if rows is not None and positions > rows:
      raise InputError(
        f"data.sequence_length: {self.data.sequence_length} tokens have {positions} positions, but the decoder has"
        f" learned positions for {rows} (decoder.learned_positions); give a shorter window"
      )
    return method

  def task_options(self) -> dict[str, str]:
    """`data.options` as a dict."""
    return parse_options("data.options", self.data.options)

  def mixture(self) -> tuple[Item, ...]:
    """The sources of `data.mixture`; empty if it is ''."""
    return parse_mixture("data.mixture", self.data.mixture) if self.data.mixture else ()
