"""The configuration of a run: an ml_collections ConfigDict outside, frozen dataclasses inside.

`default()` is the ConfigDict that every file in `experiments/` starts from and that flags override; `freeze` turns it
into a `Config`, validated whole, before anything is compiled or written. `config.json` in a run's folder is the
ConfigDict as a nested dict.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import ml_collections
from ml_collections import config_dict

from cyb_jax import methods
from cyb_jax.decoder import PRESETS, SIZES, DecoderConfig, LoraConfig, preset
from cyb_jax.errors import InputError
from cyb_jax.losses import discount
from cyb_jax.methods import WEIGHTS, Method, MethodConfig
from cyb_jax.studies import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What is read.

  Attributes:
    task: a task of `cyb_jax.data.tasks`, or `seqio:NAME`.
    tokenizer: 'sentencepiece:SIZE' (trained on the task), 'bytes', the path of a tokenizer (`data.open_tokenizer`), or
      '': that of `init_from`.
    store: folder of the prepared token store; '': the user's cache folder, prepared when missing.
    options: of the task, as 'key=value,key=value'.
    sequence_length: T, real tokens in a window.
    batch_size: windows per step, over all devices and hosts.
    fraction: the share of the training windows that is used, the same windows whatever the seed.
    document_mask: whether attention stays inside a document.
    seed: of the order.
  """

  task: str = "imdb_reviews"
  tokenizer: str = "sentencepiece:8192"
  store: str = ""
  options: str = ""
  sequence_length: int = 128
  batch_size: int = 16
  fraction: float = 1.0
  document_mask: bool = False
  seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW and its schedule.

  Attributes:
    learning_rate: the highest rate.
    rate_over_width: divide the rate by d_model (the paper's form).
    schedule: 'cosine' (to the final rate), 'wsd' (constant, then linear to the final rate) or 'constant'; all after a
      linear warm-up.
    warmup_fraction: of the steps.
    decay_fraction: of the steps, at the end (wsd).
    final_fraction: the final rate as a fraction of the highest one.
    beta1: of Adam.
    beta2: of Adam.
    epsilon: of Adam.
    weight_decay: on the matrices; norms, biases, embeddings and output rows have none.
    clip_norm: the global gradient norm is clipped to this; 0: no clipping.
    accumulate: the batch is worked on in this many parts, one after the other, with the gradient of the whole.
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
  """How long, and what is written when.

  Attributes:
    steps: 0: as many as make `epochs`.
    epochs: passes over the used windows, where steps is 0.
    seed: of the initialisation, and of what methods draw.
    log_every: steps between lines of metrics.
    eval_every: steps between validations; 0: only at the end.
    eval_limit: windows of a validation in mid-run; 0: the split whole.
    last_eval_limit: windows of the evaluation at the end; 0: the split whole, which is what is to be compared.
    checkpoint_every: steps; 0: only at the end.
    keep: how many of the newest checkpoints are kept, beside the best one.
    tensorboard: whether event files are written.
    max_skipped: steps in a row whose loss or gradient isn't finite that stop the run. Fewer are skipped: they are not
      applied, but counted and logged.
    collapse_warning: warn when one slot's mean share of s is above this.
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
  tensorboard: bool = True
  max_skipped: int = 10
  collapse_warning: float = 0.98


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelismConfig:
  """How a step is spread over devices.

  Attributes:
    strategy: 'jit', over a mesh; or 'pmap', data parallel alone.
    data: devices on the mesh axis that splits the batch; -1: all that the others leave.
    fsdp: devices on the axis that splits the batch and the parameters.
    tensor: devices on the axis that splits heads, mlp and vocabulary.
    chunk_size: slots that the readout works on at once, per device; 0: as many as make 256 MiB of f32 logits.
  """

  strategy: str = "jit"
  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  chunk_size: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """Number formats. What is trained, and the optimizer's state, are f32.

  Attributes:
    activations: 'float32', 'bfloat16', or 'auto': bfloat16 on accelerators, float32 on CPUs.
    params: 'float32', or 'bfloat16', of the decoder's parameters where they aren't trained (`tuning.weights`).
    matmul: precision of f32 matrix products: 'default', 'high' or 'highest'.
  """

  activations: str = "auto"
  params: str = "float32"
  matmul: str = "default"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningConfig:
  """What of the parameters is trained. What isn't has neither gradient nor optimizer state.

  Attributes:
    weights: 'all'; 'lora', adapters beside the decoder's matrices, and the new rows; or 'new', the new rows alone: what
      stands beside the decoder, pauses' and `<don't know>`'s.
    lora_rank: of the adapters, see `cyb_jax.decoder.LoraConfig`.
    lora_alpha: what adapters add is multiplied by lora_alpha / lora_rank.
    lora_targets: some of query, key, value, out, gate, up, down.
    new_rate: a factor on the learning rate of the new rows.
  """

  weights: str = "all"
  lora_rank: int = 8
  lora_alpha: float = 16.0
  lora_targets: str = "query,value"
  new_rate: float = 1.0

  @property
  def lora(self) -> LoraConfig:
    """The adapters that `weights` = 'lora' has."""
    targets = tuple(name.strip() for name in self.lora_targets.split(",") if name.strip())
    return LoraConfig(rank=self.lora_rank, alpha=self.lora_alpha, targets=targets)


# Those that other groups of the config say.
_ELSEWHERE = ("dtype", "param_dtype", "lora")
DECODER_FIELDS = {f.name: f for f in dataclasses.fields(DecoderConfig) if f.name not in _ELSEWHERE}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """A whole run, frozen and valid.

  `init_from` is what training starts from, a run's folder or weights of others (`cyb_jax.interop.pretrained`), '' for
  fresh parameters; `decoder` holds the preset's name, '' for none, and the fields that override it; `source` is the
  nested dict that this was frozen from, what config.json holds.
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

    Its tables have `decoder.vocab_size` rows; where that isn't set, those of the vocabulary rounded up to a multiple of
    128, so that they can be sharded. None: the preset's own size (for counting and compiling without a tokenizer).

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
    """What `data.tokenizer` names: '' is the tokenizer of `init_from`.

    Raises:
      InputError: neither is given.
    """
    if not (self.data.tokenizer or self.init_from):
      raise InputError("data.tokenizer: '' is the tokenizer of init_from, which isn't given; give either")
    return self.data.tokenizer or self.init_from

  @property
  def evaluation_rows(self) -> int:
    """Windows that evaluation reads at a time: those that training works on at once."""
    return self.data.batch_size // self.optimizer.accumulate

  @property
  def activation_dtype(self) -> str:
    if self.precision.activations != "auto":
      return self.precision.activations
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"

  def build_method(self, vocab_size: int | None = None, *, data_shards: int = 1) -> Method:
    """The method over a vocabulary; `data_shards`: devices that a batch is split over, under jit."""
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
    options = {}
    for item in filter(None, self.data.options.split(",")):
      key, equals, value = item.partition("=")
      if not equals:
        raise InputError(f"data.options: {item!r} is not of the form key=value")
      options[key.strip()] = value
    return options


_PARTS: dict[str, type] = {
  "method": MethodConfig,
  "data": DataConfig,
  "optimizer": OptimizerConfig,
  "train": TrainConfig,
  "parallelism": ParallelismConfig,
  "precision": PrecisionConfig,
  "tuning": TuningConfig,
}
# Written '0:0:0:1'; gamma also 'linear:g0' and 'exponential:g0'.
LISTS = ("omega", "gamma", "rho")
# Written '2:3'.
_WHOLE_NUMBERS = {"jacobi": "2:3", "fork_layers": "3:7:11"}


def default() -> ml_collections.ConfigDict:
  """The ConfigDict that experiments start from: a tiny CYB-AP model on the reviews."""
  config = ml_collections.ConfigDict()
  for name, part in _PARTS.items():
    values = {field.name: field.default for field in dataclasses.fields(part)}
    if name == "method":
      values |= written_method(MethodConfig(pauses=3))
      # A reference, so that None (no shift) can be given too.
      values["dont_know_prior"] = config_dict.FieldReference(0.9, field_type=float)
    config[name] = ml_collections.ConfigDict(values)
  config.init_from = ""
  config.decoder = ml_collections.ConfigDict({"preset": "tiny"})
  for field in DECODER_FIELDS.values():
    config.decoder[field.name] = config_dict.placeholder(_plain_type(field.type))
  return config


def written_method(method: MethodConfig) -> dict[str, Any]:
  """A method's options as a ConfigDict has them: lists as 'a:b', '' where there is none."""
  values = dataclasses.asdict(method)
  for name in (*LISTS, *_WHOLE_NUMBERS):
    values[name] = "" if values[name] is None else ":".join(f"{value:g}" for value in values[name])
  return values


def _plain_type(annotation: Any) -> type:
  """The one type of `int`, `float | None`, ... given as a type or, with postponed annotations, as its source."""
  name = str(annotation).split("|")[0].strip()
  return {"int": int, "float": float, "bool": bool, "str": str}[name]


def to_dict(config: ml_collections.ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
  """A nested dict of plain values."""
  if isinstance(config, ml_collections.ConfigDict):
    return config.to_dict()
  return copy.deepcopy(dict(config))


def freeze(config: ml_collections.ConfigDict | Mapping[str, Any]) -> Config:
  """Frozen dataclasses from a ConfigDict (or the nested dict of a config.json), validated whole.

  Raises:
    InputError: one line that names the field, the value, and what would be accepted.
  """
  source = to_dict(config)
  _check_names("", source, [*_PARTS, "decoder", "init_from"])
  if match := _match(source):
    from cyb_jax.studies import matching  # which freezes what is matched

    source = matching.resolve(source, match)
  parts = {}
  for name, part in _PARTS.items():
    values = source.get(name, {})
    fields = {field.name: field for field in dataclasses.fields(part)}
    _check_names(f"{name}.", values, fields)
    values = dict(values)
    if name == "method":
      values = _parse_method(values)
    parts[name] = part(**{k: _typed(f"{name}.{k}", v, part, k) for k, v in values.items()})
  decoder = source.get("decoder", {})
  _check_names("decoder.", decoder, ["preset", *DECODER_FIELDS])
  decoder = {"preset": "tiny"} | decoder
  if decoder["preset"] not in ("", *PRESETS):
    raise InputError(
      f"decoder.preset: {decoder['preset']!r} is none of {', '.join(PRESETS)}, and not '', the decoder of init_from"
    )
  init_from = source.get("init_from", "")
  if not isinstance(init_from, str):
    raise InputError(f"init_from: {init_from!r} must be a folder or a file to start from, or ''")
  frozen = Config(
    init_from=init_from, decoder=types.MappingProxyType(decoder), source=types.MappingProxyType(source), **parts
  )
  _validate(frozen)
  return frozen


def _match(source: Mapping[str, Any]) -> settings.Match | None:
  """What a name of a method such as 'deeper@ap' asks for."""
  method = source.get("method")
  name = method.get("name") if isinstance(method, Mapping) else None
  return settings.parse_match(name) if isinstance(name, str) else None


def _check_names(prefix: str, values: Any, accepted: Any) -> None:
  if not isinstance(values, Mapping):
    raise InputError(f"config.{prefix.rstrip('.')}: {values!r} must be a group of fields")
  for name in values:
    if name not in accepted:
      close = difflib.get_close_matches(str(name), list(accepted), n=1)
      hint = f"did you mean {prefix}{close[0]}?" if close else f"there are {', '.join(accepted)}"
      raise InputError(f"config.{prefix}{name}: unknown field; {hint}")


def _typed(path: str, value: Any, part: type, name: str) -> Any:
  """The value, as the type of its field; an int will do for a float."""
  annotation = typing.get_type_hints(part)[name]
  accepted = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
  accepted = tuple(typing.get_origin(kind) or kind for kind in accepted)
  if float in accepted and isinstance(value, int | float) and not isinstance(value, bool):
    if not math.isfinite(value):
      raise InputError(f"{path}: {value!r} must be finite")
    return float(value)
  if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
    wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in accepted)
    raise InputError(f"{path}: {value!r} must be {wanted}")
  return value


def _parse_method(values: dict[str, Any]) -> dict[str, Any]:
  pauses = values.get("pauses", 0)
  num_slots = pauses + 1 if isinstance(pauses, int) and pauses >= 0 else 1
  for name in LISTS:
    if name in values:
      values[name] = _parse_list(name, values[name], num_slots)
  for name, example in _WHOLE_NUMBERS.items():
    if name in values:
      values[name] = _parse_whole_numbers(name, values[name], example)
  return values


def _parse_whole_numbers(name: str, value: Any, example: str) -> tuple[int, ...] | None:
  if value is None or value == "":
    return getattr(MethodConfig, name)
  try:
    numbers = tuple(int(x) if isinstance(x, str) else operator.index(x) for x in _items(value))
  except (TypeError, ValueError):
    raise InputError(
      f"method.{name}: {value!r} must be whole numbers such as {example!r}, or '' for the default"
    ) from None
  return numbers


def _items(value: Any) -> Iterable[Any]:
  return value.split(":") if isinstance(value, str) else value


def _parse_list(name: str, value: Any, num_slots: int) -> tuple[float, ...] | None:
  if value is None or value == "":
    return None
  if not isinstance(value, str):
    try:
      return tuple(float(x) for x in value)
    except (TypeError, ValueError):
      raise InputError(f"method.{name}: {value!r} must be weights such as '0:0:0:1', or '' for the default") from None
  kind, _, start = value.partition(":")
  try:
    if name == "gamma" and kind in ("linear", "exponential"):
      return tuple(discount(kind, num_slots, float(start)).tolist())
    weights = tuple(float(x) for x in value.split(":"))
    # What omega is where it isn't set, spelled out.
    default = name == "omega" and len(weights) == num_slots and weights[-1] > 0 and not any(weights[:-1])
    return None if default else weights
  except ValueError as error:
    detail = f" ({error})" if "gamma" in str(error) else ""
    also = ", 'linear:0.9', 'exponential:0.99'" if name == "gamma" else ""
    raise InputError(
      f"method.{name}: {value!r} must be {num_slots} numbers such as '{':'.join('1' * num_slots)}'{also},"
      f" or '' for the default{detail}"
    ) from None


def _validate(config: Config) -> None:
  """Everything that can be said before the data is seen."""

  def check(path: str, ok: bool, wanted: str) -> None:
    if not ok:
      part, name = path.split(".")
      raise InputError(f"{path}: {getattr(getattr(config, part), name)!r} must be {wanted}")

  data, optimizer, train = config.data, config.optimizer, config.train
  check("data.sequence_length", data.sequence_length >= 1, "at least 1")
  check("data.batch_size", data.batch_size >= 1, "at least 1")
  check("data.fraction", 0 < data.fraction <= 1, "in (0, 1]")
  check("data.seed", data.seed >= 0, "not negative")
  config.task_options()
  check("optimizer.learning_rate", optimizer.learning_rate > 0, "positive")
  check("optimizer.schedule", optimizer.schedule in ("cosine", "wsd", "constant"), "'cosine', 'wsd' or 'constant'")
  for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
    check(f"optimizer.{name}", 0 <= getattr(optimizer, name) <= 1, "in [0, 1]")
  if optimizer.schedule == "wsd" and optimizer.warmup_fraction + optimizer.decay_fraction > 1:
    check("optimizer.decay_fraction", False, f"at most 1 - warmup_fraction = {1 - optimizer.warmup_fraction:g}")
  for name in ("beta1", "beta2"):
    check(f"optimizer.{name}", 0 <= getattr(optimizer, name) < 1, "in [0, 1)")
  check("optimizer.epsilon", optimizer.epsilon > 0, "positive")
  check("optimizer.weight_decay", optimizer.weight_decay >= 0, "not negative")
  check("optimizer.clip_norm", optimizer.clip_norm >= 0, "not negative; 0 clips nothing")
  check(
    "optimizer.accumulate",
    optimizer.accumulate >= 1 and data.batch_size % max(1, optimizer.accumulate) == 0,
    f"at least 1 and a divisor of data.batch_size = {data.batch_size}",
  )
  check("train.steps", train.steps >= 0, "not negative; 0 takes train.epochs")
  check(
    "train.epochs", train.epochs >= 0, "not negative; 0 trains nothing and evaluates what training would start from"
  )
  check("train.log_every", train.log_every >= 1, "at least 1")
  check("train.max_skipped", train.max_skipped >= 1, "at least 1")
  check("train.keep", train.keep >= 1, "at least 1")
  check("train.collapse_warning", 0 < train.collapse_warning <= 1, "in (0, 1]")
  check("train.seed", train.seed >= 0, "not negative")
  for name in ("eval_every", "eval_limit", "last_eval_limit", "checkpoint_every"):
    check(f"train.{name}", getattr(train, name) >= 0, "not negative")
  parallelism = config.parallelism
  check("parallelism.strategy", parallelism.strategy in ("jit", "pmap"), "'jit' or 'pmap'")
  check("parallelism.data", parallelism.data == -1 or parallelism.data >= 1, "at least 1, or -1 for what is left")
  check("parallelism.chunk_size", parallelism.chunk_size >= 0, "not negative; 0 picks a size")
  for name in ("fsdp", "tensor"):
    value = getattr(parallelism, name)
    check(f"parallelism.{name}", value >= 1, "at least 1")
    if parallelism.strategy == "pmap":
      check(f"parallelism.{name}", value == 1, "1 under parallelism.strategy = 'pmap', which only splits the batch")
  choices = ("auto", "float32", "bfloat16")
  check("precision.activations", config.precision.activations in choices, f"one of {', '.join(choices)}")
  choices = ("default", "high", "highest")
  check("precision.matmul", config.precision.matmul in choices, f"one of {', '.join(choices)}")
  _validate_tuning(config, check)


def _validate_tuning(config: Config, check: Callable[[str, bool, str], None]) -> None:
  tuning, params = config.tuning, config.precision.params
  check("tuning.weights", tuning.weights in WEIGHTS, "'all', 'lora' or 'new'")
  check("tuning.new_rate", tuning.new_rate >= 0, "not negative; 0 leaves the new rows as they start")
  tuning.lora  # noqa: B018 - it checks its fields, used or not
  check("precision.params", params in ("float32", "bfloat16"), "one of float32, bfloat16")
  trains = config.train.steps > 0 or config.train.epochs > 0
  if params == "bfloat16" and tuning.weights == "all" and trains:
    wanted = "float32 where tuning.weights = 'all': small updates would be rounded away"
    check("precision.params", False, wanted)
  if tuning.weights != "all" and not config.init_from:
    raise InputError(
      f"init_from: '' with tuning.weights = {tuning.weights!r}, which leaves the decoder's weights as they start, and"
      " random ones can't be taught so; name the model to start from, or take tuning.weights = 'all'"
    )
  method = config.build_method()
  method.check_length(config.data.sequence_length)
  if tuning.weights == "new" and not any(method.is_trained((name,)) for name in method.new_parameters()):
    raise InputError(
      f"tuning.weights: 'new', but method {method.name!r} with {method.config.pauses} pauses has no new rows; take"
      " 'lora' or 'all'"
    )


# What may differ between the runs that share a work directory: it changes where and how fast, not what is computed.
_OPERATIONAL = (
  "parallelism", "data.store", "train.checkpoint_every", "train.keep", "train.tensorboard", "train.max_skipped",
)  # fmt: skip


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The fields in which two nested configs differ, as 'a.b: old -> new'; those that change no result are left out.

  A field that one of them doesn't have is at its default: an older version may have written it.
  """
  defaults = default().to_dict()
  return _differences(_filled(old, defaults), _filled(new, defaults), "")


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
  filled = dict(values)
  for name, value in defaults.items():
    if isinstance(value, Mapping) and isinstance(values.get(name, {}), Mapping):
      filled[name] = _filled(values.get(name, {}), value)
    else:
      filled.setdefault(name, value)
  return filled


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
  lines = []
  for name in sorted({*old, *new}):
    path = prefix + name
    if path in _OPERATIONAL:
      continue
    a, b = old.get(name), new.get(name)
    if isinstance(a, Mapping) or isinstance(b, Mapping):
      lines += _differences(a or {}, b or {}, f"{path}.")
    elif a != b:
      lines.append(f"{path}: {a!r} -> {b!r}")
  return lines


def to_json(config: Config) -> str:
  """The text of config.json."""
  return json.dumps(dict(config.source), indent=2, sort_keys=True) + "\n"
