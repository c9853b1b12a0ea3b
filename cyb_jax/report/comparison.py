"""Comparison of runs: groups of runs that differ only in their seeds, differences between groups, and the compute that
one group needs to reach the loss of another.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cyb_jax import configs
from cyb_jax.errors import InputError
from cyb_jax.evaluation.abilities import is_adaptive
from cyb_jax.report import trade_off
from cyb_jax.report.facts import looks_ahead, method_name
from cyb_jax.report.trade_off import Costs, Outcome

# The seeds of the initialisation and of the order of the data.
_SEEDS = (("train", "seed"), ("data", "seed"))
# The fields of a data regime: the number of epochs or steps, and the amount of data.
_REGIME = (("data", "fraction"), ("train", "epochs"), ("train", "steps"))
RESAMPLES = 10_000
_BOOTSTRAP_SEED = 20251013
# Measures of training compute: the field in metrics.jsonl, and its name.
SPENDS = {"train_tokens": "tokens", "train_slots": "slots", "train_flops": "FLOPs"}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A run of a comparison.

  Attributes:
    workdir: the work directory as given on the command line.
    source: the nested dict of its config.
    meta: the metadata of its checkpoint.
    statistics: the statistics of statistics.json; {} if the run has not been evaluated.
    validation: the rows of metrics.jsonl with split 'validation', by step.
    vocab_size: the vocabulary size of its tokenizer; None: the number of rows of its decoder's tables.
  """

  workdir: str
  source: Mapping[str, Any]
  meta: Mapping[str, Any]
  statistics: Mapping[str, Any]
  validation: Sequence[Mapping[str, Any]]
  vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ only in their seeds.

  Attributes:
    label: the shortest label that distinguishes the group from the others.
    model: the label without the data regime.
    regime: epochs and data, '' if all groups have the same regime.
    runs: the runs, at least one.
  """

  label: str
  model: str
  regime: str
  runs: tuple[Candidate, ...]

  @property
  def causal(self) -> bool:
    """Whether statistics and validations predict each token only from the tokens before it."""
    return not looks_ahead(self.runs[0].statistics)

  def values(self, read: Callable[[Mapping[str, Any]], Any]) -> list[Any]:
    """The results of `read` for the statistics of each run."""
    return [read(run.statistics) for run in self.runs]


def check_comparable(runs: Sequence[Candidate]) -> None:
  """Checks that the runs were, or can be, evaluated on the same text in the same way.

  Raises:
    InputError: two runs differ; the message names the runs and the field.
  """
  first = runs[0]

  def fields(run: Candidate) -> dict[str, Any]:
    data = configs.filled(run.source)["data"]
    return {
      # A tokenizer may have several names, so the contents of the store decide.
      "data.store": run.meta["store"],
      "data.sequence_length": data["sequence_length"],
      "split": run.statistics.get("split"),
      "limit": run.statistics.get("limit"),
    }

  def refuse(run: Candidate, name: str, expected: Any, found: Any) -> None:
    raise InputError(
      f"--compare: {first.workdir} and {run.workdir} can't be compared: {name} is {expected!r} in the first and"
      f" {found!r} in the second; compare runs that were evaluated on the same text in the same way"
    )

  expected = fields(first)
  for run in runs[1:]:
    for name, found in fields(run).items():
      if found == expected[name]:
        continue
      if name == "data.store":
        a, b = (configs.filled(r.source)["data"]["tokenizer"] for r in (first, run))
        if a != b:
          refuse(run, "data.tokenizer", a, b)
        refuse(run, "the fingerprint of data.store", expected[name][:12], found[:12])
      refuse(run, name, expected[name], found)
    if run.statistics and run.statistics["groups"]["tokens"] != first.statistics["groups"]["tokens"]:
      raise InputError(
        f"--compare: {first.workdir} and {run.workdir} can't be compared: groups.tokens of their statistics.json"
        " differ; recompute them over the same split"
      )


def group_runs(runs: Sequence[Candidate]) -> list[Group]:
  """Groups of runs that differ only in their seeds, in the given order.

  Raises:
    InputError: a run is given twice, or two runs have the same seeds.
  """
  together: list[list[Candidate]] = []
  for run in runs:
    for group in together:
      if not configs.differences(_without(group[0].source, _SEEDS), _without(run.source, _SEEDS)):
        group.append(run)
        break
    else:
      together.append([run])
  for group in together:
    for a, b in itertools.combinations(group, 2):
      if not configs.differences(a.source, b.source):
        raise InputError(
          f"--compare: {a.workdir} and {b.workdir} have equal configs and equal seeds (train.seed, data.seed); give"
          " each run once, or runs with different seeds"
        )
  sources = [group[0].source for group in together]
  regimes = [_regime(source) for source in sources]
  models = labels([_without(source, _REGIME) for source in sources])
  several = len(set(regimes)) > 1
  return [
    Group(label, model, regime if several else "", tuple(group))
    for label, model, regime, group in zip(labels(sources), models, regimes, together)
  ]


def labels(sources: Sequence[Mapping[str, Any]]) -> list[str]:
  """The shortest labels that distinguish configs: the method's name, and the fewest fields that suffice.

  Configs that are equal, or whose differences do not change results, get equal labels.
  """
  sources = [_without(source, _SEEDS) for source in sources]
  found = [method_name(source["method"]) for source in sources]
  for name in dict.fromkeys(found):
    alike = [i for i, other in enumerate(found) if other == name]
    first, *others = (sources[i] for i in alike)
    lines = itertools.chain.from_iterable(configs.differences(first, other) for other in others)
    # Fields of the method come first, because they are compared most often.
    fields = sorted({line.split(": ")[0] for line in lines}, key=lambda f: (not f.startswith("method."), f))

    def values(i: int, some: Sequence[str]) -> tuple[str, ...]:
      return tuple(_value(sources[i], field) for field in some)

    kinds = len({values(i, fields) for i in alike})
    some: Sequence[str] = ()
    for count in range(len(fields) + 1):
      sets = itertools.combinations(fields, count)
      enough = next((some for some in sets if len({values(i, some) for i in alike}) == kinds), None)
      if enough is not None:
        some = enough
        break
    for i in alike:
      words = [f"{field.rpartition('.')[2]} {value}" for field, value in zip(some, values(i, some))]
      found[i] = ", ".join([name, *words])
  return found


def _regime(source: Mapping[str, Any]) -> str:
  source = configs.filled(source)
  steps, epochs, fraction = source["train"]["steps"], source["train"]["epochs"], source["data"]["fraction"]
  length = f"{steps:,} steps" if steps else f"{epochs:g} epochs"
  return length if fraction == 1 else f"{length} of {fraction:.3g} of the data"


def _without(source: Mapping[str, Any], fields: Sequence[tuple[str, str]]) -> dict[str, Any]:
  """The config with these fields at their defaults."""
  result = configs.filled(source)
  defaults = configs.default().to_dict()
  for part, name in fields:
    result[part] = result[part] | {name: defaults[part][name]}
  return result


def _value(source: Mapping[str, Any], field: str) -> str:
  value: Any = source
  for part in field.split("."):
    value = value[part]
  if isinstance(value, float) and float(f"{value:g}") == value:
    return f"{value:g}"
  return str(value) or "default"


@dataclasses.dataclass(frozen=True)
class Curve:
  """Validation losses of a run against its training compute.

  Attributes:
    spent: the compute at each validation, ascending.
    losses: the losses in nats per token.
  """

  spent: tuple[float, ...]
  losses: tuple[float, ...]


def common_windows(runs: Sequence[Candidate]) -> int | None:
  """The number of windows (None: the complete split) of the validations in the curves.

  Losses on different numbers of windows are not comparable, so one number is chosen: the one with the largest minimum
  number of validations over the runs.
  """
  limits = {row.get("limit") for run in runs for row in run.validation}
  counts = {limit: min(sum(row.get("limit") == limit for row in run.validation) for run in runs) for limit in limits}
  # Ties are resolved in favour of more windows.
  return max(counts, key=lambda limit: (counts[limit], math.inf if limit is None else limit), default=None)


def curve(run: Candidate, spend: str, windows: int | None) -> Curve:
  """A run's validation curve: log perplexity against `spend`, one of SPENDS."""
  points = {
    row[spend]: math.log(row["perplexity"])
    for row in run.validation
    # An infinite perplexity is null in the file.
    if row.get("limit") == windows and math.isfinite(row.get("perplexity") or math.inf) and row.get(spend)
  }
  return Curve(tuple(sorted(points)), tuple(points[spent] for spent in sorted(points)))


def spent_at(curve: Curve, loss: float) -> tuple[float, bool] | None:
  """The compute at which a curve reaches a loss: log compute is interpolated linearly in the loss.

  Returns:
    The compute, and whether it is only an upper bound because the first validation is already below the loss; None if
    the loss is not reached.
  """
  for i, found in enumerate(curve.losses):
    if found <= loss:
      if i == 0:
        return curve.spent[0], found < loss
      before, after = curve.losses[i - 1], found
      share = (before - loss) / (before - after)
      logs = np.log(curve.spent[i - 1 : i + 1])
      return float(np.exp(logs[0] + share * (logs[1] - logs[0]))), False
  return None


def efficiency(a: Group, b: Group, spend: str, windows: int | None) -> dict[str, Any]:
  """The ratio of B's total compute to the compute with which A reaches B's last validation loss.

  A ratio of 2 means that A needs half of B's compute.

  Returns:
    `ratios`, one per pair of seeds (A's runs in the outer loop), None: not reached; `at_least`, whether one of them is
    only a lower bound; `median`, `low` and `high` over the pairs, where a loss that is not reached counts as the lowest
    ratio.
  """
  ratios: list[float | None] = []
  at_least = False
  for x, y in itertools.product(a.runs, b.runs):
    ours, theirs = curve(x, spend, windows), curve(y, spend, windows)
    reached = spent_at(ours, theirs.losses[-1]) if ours.spent and theirs.spent else None
    ratios.append(theirs.spent[-1] / reached[0] if reached else None)
    at_least |= bool(reached and reached[1])
  ordered = sorted(0.0 if ratio is None else ratio for ratio in ratios)
  middle = ordered[(len(ordered) - 1) // 2], ordered[len(ordered) // 2]
  return {
    "ratios": ratios,
    "at_least": at_least,
    "median": sum(middle) / 2 if all(middle) else None,
    "low": ordered[0] or None,
    "high": ordered[-1] or None,
  }


def difference_in_nats(a: Group, b: Group) -> dict[str, Any]:
  """The difference in nats per token, A minus B, between the means over seeds, and its 95% interval over documents.

  The bootstrap is paired: the same documents are drawn for both. Seeds are not resampled, see `low` and `high`.

  Returns:
    `mean`; `interval`; `low` and `high`, the range over the pairs of seeds.
  """
  tokens = np.asarray(a.runs[0].statistics["groups"]["tokens"], np.float64)
  ours, theirs = (np.array([r.statistics["groups"]["nats"] for r in group.runs], np.float64) for group in (a, b))
  gaps = ours.mean(0) - theirs.mean(0)
  draws = np.random.default_rng(_BOOTSTRAP_SEED)
  means = []
  # In parts, because all resamples together would take 80 MB.
  for _ in range(10):
    counts = draws.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), RESAMPLES // 10)
    drawn = counts @ tokens
    means.append((counts @ gaps)[drawn > 0] / drawn[drawn > 0])
  pairs = (ours.sum(-1)[:, None] - theirs.sum(-1)[None]) / tokens.sum()
  return {
    "mean": float(gaps.sum() / tokens.sum()),
    "interval": np.quantile(np.concatenate(means), [0.025, 0.975]).tolist(),
    "low": float(pairs.min()),
    "high": float(pairs.max()),
  }


def spread(values: Sequence[float]) -> dict[str, Any]:
  """Mean, standard deviation (None for one value) and the values themselves."""
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return {"mean": float(np.mean(values)), "deviation": deviation, "values": list(values)}


def outcomes(groups: Sequence[Group]) -> list[Outcome]:
  """The compute and the perplexity of each group."""
  return [_outcome(group) for group in groups]


def _outcome(group: Group) -> Outcome:
  first = group.runs[0]
  config = configs.freeze(first.source)
  method, length = config.build_method(first.vocab_size), config.data.sequence_length
  records, paces = [], []
  for run in group.runs:
    found = run.statistics
    # Evaluations measure the cost of decoding; the last evaluation at the same step is used.
    measured = next((row for row in reversed(run.validation) if row.get("step") == found["step"]), {})
    seen = {name: measured[name] for name in ("inference_flops", "inference_slots") if name in measured}
    pauses = 0.0 if found["num_slots"] == 1 else (found["latency"] or {}).get("mean_pauses")
    records.append(
      {"method": config.method.name, "perplexity": found["perplexity"]["mixture"], "mean_pauses": pauses}
      | {"autoregressive": found.get("autoregressive")}
      # Older statistics don't have these keys.
      | {"loss_perplexity": found["perplexity"].get("loss")}
      | {"training_omega": {"perplexity": found["perplexity"].get("training")}}
      | {spend: run.meta[spend] for spend in SPENDS}
      | seen
    )
    # Older reports also have this key for methods that are not adaptive.
    if (paced := found["self_paced"]) and is_adaptive(method):
      cost = method.costs(length, slots=paced["context_pauses"] + 1).inference
      paces.append(paced | {"inference_flops": float(cost.total)})
  return Outcome.of(group.label, records, Costs.of(config, first.vocab_size), paces)


def compare(groups: Sequence[Group]) -> dict[str, Any]:
  """The contents of comparison.json.

  `looks_ahead` lists the labels of non-causal groups. They have neither differences nor efficiency, because both are
  computed from blockwise likelihoods.
  """
  causal = [group for group in groups if group.causal]
  windows = common_windows([run for group in causal or groups for run in group.runs])
  first = groups[0].runs[0].statistics
  # `_row` adds the perplexity with its seeds and the training compute of each group.
  found = outcomes(groups)
  trade_offs = [
    {k: v for k, v in described.items() if k not in ("perplexity_seeds", "perplexity_deviation", "train_tokens")}
    for described in trade_off.describe(found)
  ]
  pairs = [(a, b) for a in causal for b in causal if a is not b]
  return {
    "split": first["split"],
    "limit": first["limit"],
    "tokens": first["tokens"],
    "curve_windows": windows,
    "groups": [described | _row(*of_group) for described, *of_group in zip(trade_offs, groups, found)],
    "looks_ahead": [group.label for group in groups if not group.causal],
    "efficiency": {
      spend: [{"a": a.label, "b": b.label} | efficiency(a, b, spend, windows) for a, b in pairs] for spend in SPENDS
    },
    "differences": [
      {"a": a.label, "b": b.label} | difference_in_nats(a, b) for a, b in itertools.combinations(causal, 2)
    ],
  }


def _row(group: Group, outcome: Outcome) -> dict[str, Any]:
  """The keys of a group in comparison.json, except those of its trade-off."""
  latencies = group.values(lambda s: s["latency"])
  pauses = [(latency or {}).get("mean_pauses") for latency in latencies]
  shares = [latency["mean"] for latency in latencies if latency]
  paces = [s for s in group.values(lambda s: s["self_paced"]) if s] if outcome.self_paced else []
  return {
    "label": group.label,
    "model": group.model,
    "regime": group.regime or None,
    "workdirs": [run.workdir for run in group.runs],
    "steps": [run.statistics["step"] for run in group.runs],
    "num_slots": group.runs[0].statistics["num_slots"],
    "perplexity": spread(outcome.perplexities),
    "mean_pauses": spread(pauses) if None not in pauses else None,
    "latency": np.mean(shares, 0).tolist() if shares else None,
    # Both perplexities are over the same windows, which are fewer than those of the other keys.
    "self_paced_cost": spread([s["perplexity"] / s["constant_perplexity"] - 1 for s in paces])
    if len(paces) == len(group.runs)
    else None,
    **{spend: [run.meta[spend] for run in group.runs] for spend in SPENDS},
  }
