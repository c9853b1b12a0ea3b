"""The planned studies, as data: `cyb-study --plan=NAME` runs one of them.

A plan is a table of rows. Every row searches its learning rate with one seed and a short training, and is then trained
with its seeds. Nothing here imports jax.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

from cyb_jax.errors import InputError, did_you_mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """A row of a plan: runs that are equal but for their seeds.

  Attributes:
    name: of the row, unique in its plan.
    setting: a key of `settings.SETTINGS`, or the name of a plain model of the same cost, such as 'wider@ap'.
    steps: of training.
    seeds: the row is trained with the seeds 0 to seeds - 1.
    fields: of the config, 'a.b=value' each, in addition to those of the plan.
    rate_of: the row whose rate is taken; '': the row searches its own.
    compared_with: the row that it is compared with, its own name if with none; '': the reference of the plan.
    paced: whether the model decides how many slots it takes, and is evaluated at its own pace too.
    cost: of a training step, relative to the reference. It is only used to estimate times.
  """

  name: str
  setting: str
  steps: int
  seeds: int
  fields: tuple[str, ...] = ()
  rate_of: str = ""
  compared_with: str = ""
  paced: bool = False
  cost: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretraining:
  """The model that all rows of a plan start from, and the gate that it has to pass.

  The reference is trained further from it, for the steps of the plan's reference and of its longer row. If this makes a
  difference of more than `limit`, the model is not at its plateau, and the next length is tried. The last length is
  taken whatever the gate says.

  Attributes:
    config: the path of the experiment.
    argument: of the experiment.
    fields: of the config, in place of those of the plan.
    lengths: steps of training, in the order in which they are tried.
    rate: the learning rate.
    limit: nats per token.
    cost: of a training step, relative to that of the reference.
    task: the task whose training documents are divided; its validation documents are those of both parts. '': the
      parts are token stores that were prepared before, see experiments/gpu_pack.py.
    percent: of the documents that are pretraining text; the others are what the rows are trained on.
  """

  config: str
  argument: str
  fields: tuple[str, ...]
  lengths: tuple[int, ...]
  rate: float
  limit: float
  cost: float
  task: str
  percent: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedStudy:
  """A planned study.

  Attributes:
    name: of the plan.
    config: the path of the experiment that settings are arguments of.
    size: a decoder preset, the experiment's second argument.
    fields: of every run's config, 'a.b=value' each.
    step_tokens: real tokens in a step.
    rates: learning rates that are searched.
    search_steps: the steps of a run of the search; None: half of those of its row.
    groups: the rows. A group's runs come before those of the next; in a group the searches come first, then the runs
      with seed 0, and so on.
    reference: the row that the others are compared with.
    longer: the reference with more data, for the data efficiency.
    paced_windows: windows of the validation split that are read at a model's own pace.
    pretraining: what the rows start from; None: fresh parameters.
    note: what a reader must know of the plan, such as rows that are wanted and do not exist.
  """

  name: str
  config: str
  size: str
  fields: tuple[str, ...]
  step_tokens: int
  rates: tuple[float, ...]
  search_steps: int | None
  groups: tuple[tuple[Row, ...], ...]
  reference: str
  longer: str
  paced_windows: int
  pretraining: Pretraining | None = None
  note: str = ""

  @property
  def rows(self) -> Iterator[Row]:
    """All rows, in order."""
    return (row for group in self.groups for row in group)

  def row(self, name: str) -> Row:
    """The row with a name that the plan has."""
    return next(row for row in self.rows if row.name == name)

  def steps_of_search(self, row: Row) -> int:
    """The steps of each run of a row's search."""
    return self.search_steps or max(1, row.steps // 2)

  @property
  def identity(self) -> dict[str, Any]:
    """What all runs of the plan have in common, as JSON has it; its rows record the rest."""
    names = ("config", "size", "fields", "step_tokens", "rates", "search_steps", "paced_windows", "pretraining")
    values = dataclasses.asdict(self)
    return {name: _as_json(values[name]) for name in names}


def _as_json(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _as_json(item) for name, item in value.items()}
  return [_as_json(item) for item in value] if isinstance(value, tuple) else value


# No validation on the way, and small checkpoints often: an interrupted run loses a minute or two.
_RUNS = (
  "train.eval_every=0", "train.checkpoint_every=250", "train.keep=1", "train.log_every=50", "train.trackers=",
)  # fmt: skip
# The start of PonderLM-2.
_SMALL_START = (
  "decoder.initializer=small", "decoder.scale_embeddings=True", "decoder.tied_embeddings=False",
)  # fmt: skip
_PRIOR = "method.dont_know_prior"
# After 1,000 steps of the plan scratch with rate 1.6e-2, perplexity is 37.62 with these heads, and 39.85 with tanh.
_IDENTITY_HEADS = ("method.head_activation=none",)

_SCRATCH_STEPS = 2_500


def _scratch(name: str, setting: str, seeds: int, cost: float, **fields: Any) -> Row:
  return Row(name=name, setting=setting, steps=_SCRATCH_STEPS, seeds=seeds, cost=cost, **fields)


SCRATCH = PlannedStudy(
  name="scratch",
  config="experiments/reviews.py",
  size="nano",
  # 32 windows of 64 tokens a step.
  fields=(
    "data.tokenizer=sentencepiece:1024", "data.sequence_length=64", "data.batch_size=32", "data.fraction=1.0",
    *_SMALL_START, *_RUNS,
  ),
  step_tokens=32 * 64,
  # After 1,000 steps the best rate of `baseline` is 1.6e-2: perplexity 37.72; with 4e-3 42.07, with 8e-3 38.80 and with
  # 3.2e-2 39.14. Those of `ap` are 40.19 with 4e-3 and 37.21 with 8e-3.
  rates=(8e-3, 1.6e-2),
  search_steps=1_000,
  groups=(
    (
      _scratch("baseline", "baseline", 3, 1.0),
      _scratch("ap", "ap", 3, 4.7, fields=(f"{_PRIOR}=0.5",), paced=True),
      _scratch("mos", "mos", 3, 2.1, fields=_IDENTITY_HEADS),
      _scratch("ap_hidden", "ap_hidden", 3, 4.0, fields=(f"{_PRIOR}=0.5",), paced=True),
      _scratch("tbys3", "tbys3", 3, 3.8),
    ),
    (
      Row(name="baseline_3x", setting="baseline", steps=3 * _SCRATCH_STEPS, seeds=3, rate_of="baseline"),
      # Plain models that cost at inference what ap_hidden costs at its own pace, about 1.55 slots per token.
      _scratch("baseline_deeper", "baseline", 3, 1.67, fields=("decoder.num_layers=6",), rate_of="baseline"),
      _scratch(
        "baseline_wider", "baseline", 3, 1.55, fields=("decoder.d_model=80", "decoder.mlp_size=216"), rate_of="baseline"
      ),
    ),
    (
      # One seed, at the rate of the row that they are most like.
      _scratch("ap_prior_0.9", "ap", 1, 4.7, fields=(f"{_PRIOR}=0.9",), rate_of="ap", paced=True),
      _scratch("ap_on_policy", "ap_on_policy", 1, 6.2, fields=(f"{_PRIOR}=0.5",), rate_of="ap", paced=True),
      _scratch("constant_stop", "constant_stop", 1, 4.7, rate_of="ap"),
      _scratch("wider@ap", "wider@ap", 1, 4.7, rate_of="baseline"),
      # d is held at the prior for the first fifth of the steps.
      _scratch(
        "ap_held", "ap", 1, 4.7, fields=(f"{_PRIOR}=0.5", f"method.stopping_warmup={_SCRATCH_STEPS // 5}"),
        rate_of="ap", paced=True,
      ),
      _scratch("mos_tanh", "mos", 1, 2.1, rate_of="mos"),
      _scratch("ap_sampled", "ap_sampled", 1, 3.4, fields=(f"{_PRIOR}=0.5",), rate_of="ap", paced=True),
      _scratch("ap1", "ap1", 1, 2.1, fields=(f"{_PRIOR}=0.5",), rate_of="ap", paced=True),
      _scratch("mean_slots", "mean_slots", 1, 4.7, rate_of="ap"),
      _scratch("looped", "looped", 1, 3.0, rate_of="baseline"),
      _scratch("ponderlm2", "ponderlm2", 1, 6.1, rate_of="baseline"),
    ),
    (
      # What was best with one seed, and the heads together with hidden pauses, which the model reads at its own pace.
      _scratch("ap_heads", "ap_heads", 3, 4.8, fields=(f"{_PRIOR}=0.5",), rate_of="ap", paced=True),
      _scratch("cyb_looped", "cyb_looped", 3, 4.0, fields=(f"{_PRIOR}=0.5",), rate_of="ap", paced=True),
      _scratch(
        "ap_hidden_heads", "ap_heads", 3, 4.1, fields=(f"{_PRIOR}=0.5", "method.pause_visibility=hidden"), rate_of="ap",
        paced=True,
      ),
    ),
  ),
  reference="baseline",
  longer="baseline_3x",
  paced_windows=400,
  note=(
    "All start as PonderLM-2 does, with pauses that carry their token's embedding. In ap_heads every slot has its own"
    " projection before the readout, as the heads of mos do without pauses. The heads of mos have no activation, which"
    " is the better choice after 1,000 steps; those of mos_tanh are as published. In ap_held d is held at the prior"
    " for the first fifth of the steps."
  ),
)  # fmt: skip

# Where training starts: at nearly the pretrained model, or as in the paper.
_IDENTITY_START = ("method.pause_input=token+pause",)
_PAPER_START = ("method.pause_input=pause", f"{_PRIOR}=0.9", "method.calibration_batches=0")


def _tuned_row(
  steps: int, name: str, setting: str, cost: float, *, seeds: int = 3, times: float = 1.0, **fields: Any
) -> Row:
  """A row of fine-tuning, for `times` the steps of its plan."""
  return Row(name=name, setting=setting, steps=round(times * steps), seeds=seeds, cost=cost, **fields)


_tuned = functools.partial(_tuned_row, 600)
_AGAIN = {"compared_with": "baseline_again"}


FINETUNE = PlannedStudy(
  name="finetune",
  config="experiments/finetune_reviews.py",
  size="nano",
  # The decoder and the tokenizer are those of the pretrained model; 32 windows of 64 tokens a step.
  fields=(
    "decoder.preset=", "data.tokenizer=", "data.sequence_length=64", "data.batch_size=32", "data.fraction=1.0", *_RUNS,
  ),
  step_tokens=32 * 64,
  # Pretraining ends at a rate of zero from a peak of 8e-3.
  rates=(3e-4, 1e-3, 3e-3),
  search_steps=None,
  groups=(
    (
      _tuned("baseline", "baseline", 1.0),
      _tuned("ap", "ap", 4.7, fields=_IDENTITY_START, paced=True),
      _tuned("mos", "mos", 2.1, fields=_IDENTITY_HEADS),
      _tuned("ap_hidden", "ap_hidden", 4.0, fields=_IDENTITY_START, paced=True),
      _tuned("tbys3", "tbys3", 3.8, fields=_IDENTITY_START),
      _tuned("ap_3x", "ap", 4.7, seeds=1, times=3.0, rate_of="ap", fields=_IDENTITY_START, paced=True),
    ),
    (_tuned("baseline_3x", "baseline", 1.0, times=3.0, rate_of="baseline"),),
    (
      # One seed: the rows above agree within 0.001 nats with every seed. Between the groups the model was pretrained
      # again by a later version, whose last bits differ, so these rows have a reference of their own.
      _tuned("baseline_again", "baseline", 1.0, seeds=1, rate_of="baseline", **_AGAIN),
      _tuned("ap_paper_start", "ap", 4.7, seeds=1, fields=_PAPER_START, paced=True, **_AGAIN),
      _tuned("constant_stop", "constant_stop", 4.7, seeds=1, fields=_IDENTITY_START, **_AGAIN),
      _tuned("tbys3_1.8x", "tbys3", 3.8, seeds=1, times=1.8, rate_of="tbys3", fields=_IDENTITY_START, **_AGAIN),
      _tuned("ap1", "ap1", 2.1, seeds=1, fields=_IDENTITY_START, paced=True, **_AGAIN),
    ),
  ),
  reference="baseline",
  longer="baseline_3x",
  paced_windows=400,
  pretraining=Pretraining(
    config="experiments/reviews.py",
    argument="baseline,nano",
    fields=(
      *_SMALL_START, "data.tokenizer=sentencepiece:1024", "data.sequence_length=64", "data.batch_size=32",
      "data.fraction=1.0", *_RUNS,
    ),
    lengths=(15_000, 30_000),
    rate=8e-3,
    limit=0.03,
    cost=1.0,
    task="imdb_reviews",
    percent=60,
  ),
  note=(
    "tbys3_1.8x, ap_3x and baseline_3x take the rate of the same setting at 1x. All pauses but those of ap_paper_start"
    " carry their token's embedding and start near zero, and the heads of mos have no activation and start near the"
    " identity, so that training begins at nearly the pretrained model. The rows from baseline_again on start from a"
    " pretrained model that was trained again, with perplexity 26.71 instead of 26.77, and are compared with"
    " baseline_again."
  ),
)  # fmt: skip

# Seven times the tokens of `finetune`, in steps that are eight times as large.
_on_gpu = functools.partial(_tuned_row, 500)
# 64 windows of 256 tokens a step. A long step keeps a GPU busy, and a scanned layer compiles in a fraction of the time.
# A run takes about a minute, so an interrupted run is cheaper to repeat than checkpoints are to write.
_GPU_RUNS = (
  "data.sequence_length=256", "data.batch_size=64", "data.fraction=1.0", "decoder.scan_layers=True",
  "train.eval_every=0", "train.checkpoint_every=2000", "train.keep=1", "train.log_every=100", "train.trackers=",
)  # fmt: skip

GPU = PlannedStudy(
  name="gpu",
  config="experiments/finetune_reviews.py",
  size="medium",
  fields=("decoder.preset=", "data.tokenizer=", *_GPU_RUNS),
  step_tokens=64 * 256,
  rates=(1e-4, 3e-4, 1e-3),
  search_steps=150,
  # The first two groups answer the question of the study, should the time of the GPU end before the plan.
  groups=(
    (
      _on_gpu("baseline", "baseline", 1.0),
      _on_gpu("ap", "ap", 4.4, fields=_IDENTITY_START, paced=True),
      _on_gpu("mos", "mos", 1.4, fields=_IDENTITY_HEADS),
      _on_gpu("tbys3", "tbys3", 4.0, fields=_IDENTITY_START),
    ),
    (_on_gpu("baseline_3x", "baseline", 1.0, times=3.0, rate_of="baseline"),),
    (
      _on_gpu("constant_stop", "constant_stop", 4.4, fields=_IDENTITY_START),
      _on_gpu("ap_paper_start", "ap", 4.4, seeds=1, fields=_PAPER_START, paced=True),
      _on_gpu("tbys3_1.8x", "tbys3", 4.0, seeds=1, times=1.8, rate_of="tbys3", fields=_IDENTITY_START),
      _on_gpu("ap_hidden", "ap_hidden", 4.0, seeds=1, rate_of="ap", fields=_IDENTITY_START, paced=True),
      _on_gpu("ap1", "ap1", 2.1, seeds=1, rate_of="ap", fields=_IDENTITY_START, paced=True),
    ),
  ),
  reference="baseline",
  longer="baseline_3x",
  paced_windows=200,
  pretraining=Pretraining(
    config="experiments/reviews.py",
    argument="baseline,medium",
    # 30.7M parameters in the layers.
    fields=("decoder.num_layers=9", "data.tokenizer=sentencepiece:8192", *_GPU_RUNS),
    lengths=(3_000,),
    rate=1e-3,
    limit=0.03,
    cost=1.0,
    task="",
    percent=60,
  ),
  note=(
    "The rows are those of the plan finetune, for a larger model. ap_hidden and ap1 take the rate of ap; the rates of"
    " pretraining and the number of its passes are not searched."
  ),
)  # fmt: skip

PLANS = {plan.name: plan for plan in (SCRATCH, FINETUNE, GPU)}


# The sizes of a dry run.
_TINY_DATA = ("data.sequence_length=64", "data.batch_size=16", "train.last_eval_limit=64")
_TINY_DECODER = (
  "decoder.num_layers=2", "decoder.d_model=32", "decoder.num_heads=2", "decoder.num_kv_heads=2", "decoder.head_size=16",
  "decoder.mlp_size=64",
)  # fmt: skip


def dry_run(plan: PlannedStudy) -> PlannedStudy:
  """A plan with the same rows, a tiny model, two steps of training, one rate and one seed.

  It tests the programs and the data, and its results file is not accepted as one of the plan.
  """
  unit = plan.row(plan.reference).steps
  groups = tuple(
    tuple(dataclasses.replace(row, steps=max(2, round(2 * row.steps / unit)), seeds=1) for row in group)
    for group in plan.groups
  )
  pretraining, fields = plan.pretraining, _replaced(plan.fields, _TINY_DATA)
  if pretraining is None:
    fields = _replaced(fields, _TINY_DECODER)
  else:
    tiny = _replaced(_replaced(pretraining.fields, _TINY_DATA), _TINY_DECODER)
    pretraining = dataclasses.replace(pretraining, fields=tiny, lengths=(2,))
  return dataclasses.replace(
    plan,
    name=f"{plan.name}-dry-run",
    fields=fields,
    step_tokens=64 * 16,
    rates=plan.rates[:1],
    search_steps=1,
    groups=groups,
    paced_windows=8,
    pretraining=pretraining,
    note="A dry run: its numbers say nothing about the methods.",
  )


def _replaced(fields: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
  """The fields with the values of others, which are appended."""
  names = {field.partition("=")[0] for field in others}
  return (*(field for field in fields if field.partition("=")[0] not in names), *others)


def find(name: str) -> PlannedStudy:
  """A plan by its name.

  Raises:
    InputError: there is none.
  """
  if name not in PLANS:
    raise InputError(f"--plan: {name!r} is unknown; {did_you_mean(name, PLANS)}")
  return PLANS[name]
