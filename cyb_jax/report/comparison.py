"""Runs compared: which are equal but for seeds, how they differ, what one needs to reach the loss of another.

G groups of documents (see `groups` in statistics.json).
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

# A seed is an initialisation and an order of the data.
_SEEDS = (("train", "seed"), ("data", "seed"))
# What a data regime is: epochs, and how much data.
_REGIME = (("data", "fraction"), ("train", "epochs"), ("train", "steps"))
RESAMPLES = 10_000
_BOOTSTRAP_SEED = 20251013
# What runs may spend: the field in metrics.jsonl, and its name.
SPENDS = {"train_tokens": "tokens", "train_slots": "slots", "train_flops": "FLOPs"}


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A run that is compared.

  Attributes:
    workdir: as it was given.
    source: the nested dict of its config.
    meta: of its checkpoint.
    statistics: see statistics.json; {} where the run isn't evaluated yet.
    validation: rows of metrics.jsonl whose split is validation, by step.
    vocab_size: of its tokenizer; None: as many entries as its decoder has rows.
  """

  workdir: str
  source: Mapping[str, Any]
  meta: Mapping[str, Any]
  statistics: Mapping[str, Any]
  validation: Sequence[Mapping[str, Any]]
  vocab_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that are equal but for their seeds.

  Attributes:
    label: the shortest that distinguishes it from the others.
    model: the label without the data regime.
    regime: epochs and data, '' where all groups have one regime.
    runs: at least one.
  """

  label: str
  model: str
  regime: str
  runs: tuple[Candidate, ...]

  @property
  def causal(self) -> bool:
    """Whether statistics and validations predict each token from the tokens before it alone: it doesn't look ahead."""
    return not looks_ahead(self.runs[0].statistics)

  def values(self, read: Callable[[Mapping[str, Any]], Any]) -> list[Any]:
    """What `read` takes from the statistics of each run."""
    return [read(run.statistics) for run in self.runs]


def check_comparable(runs: Sequence[Candidate]) -> None:
  """Whether the runs were read on the same text in the same way; of runs that aren't read yet, whether they can be.

  Raises:
    InputError: it names two runs and the field in which they differ.
  """
  first = runs[0]

  def fields(run: Candidate) -> dict[str, Any]:
    data = configs.filled(run.source)["data"]
    return {
      # A tokenizer may go by several names: what is in the store decides.
      "data.store": run.meta["store"],
      "data.sequence_length": data["sequence_length"],
      "split": run.statistics.get("split"),
      "limit": run.statistics.get("limit"),
    }

  def refuse(run: Candidate, name: str, expected: Any, found: Any) -> None:
    raise InputError(
      f"--compare: {first.workdir} and {run.workdir} can't be compared: {name} is {expected!r} there and"
      f" {found!r} here; compare runs that were read on the same text in the same way"
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
        " differ; compute them anew over the same split"
      )


def group_runs(runs: Sequence[Candidate]) -> list[Group]:
  """Runs that differ in nothing but their seeds, together, in the order in which they were given.

  Raises:
    InputError: a run was given twice, or two runs have the same seeds.
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
          f"--compare: {a.workdir} and {b.workdir} are the same run twice (train.seed and data.seed too); give each"
          " once, or another seed"
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
  """The shortest labels that distinguish configs: the method's name, and as few fields as suffice.

  Configs that are equal, or differ in nothing that changes results, get equal labels.
  """
  sources = [_without(source, _SEEDS) for source in sources]
  found = [method_name(source["method"]) for source in sources]
  for name in dict.fromkeys(found):
    alike = [i for i, other in enumerate(found) if other == name]
    first, *others = (sources[i] for i in alike)
    lines = itertools.chain.from_iterable(configs.differences(first, other) for other in others)
    # Of the method first: that is what is compared most often.
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
  """Validation losses of a run against what it had spent.

  Attributes:
    spent: ascending.
    losses: nats per token.
  """

  spent: tuple[float, ...]
  losses: tuple[float, ...]


def common_windows(runs: Sequence[Candidate]) -> int | None:
  """On how many windows (None: the split whole) the curves are read: those on which the run with the fewest
  validations has the most. Losses over other windows are other losses.
  """
  limits = {row.get("limit") for run in runs for row in run.validation}
  counts = {limit: min(sum(row.get("limit") == limit for row in run.validation) for run in runs) for limit in limits}
  # Of equals the one with the most windows.
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
  """What it takes to reach a loss, interpolated linearly in the loss over the logarithm of what is spent.

  Returns:
    What is spent, and whether that is only known to be enough (the first validation is below the loss already); None
    where the loss isn't reached.
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
  """What B spends in all, over what A needs to reach B's last validation loss: 2 means that half of it suffices.

  Returns:
    `ratios`, one per pair of seeds (A's runs outside), None: not reached; `at_least`, whether one of them is only a
    lower bound; `median`, `low` and `high` over the pairs, in which what is not reached is below every number.
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
  """Nats per token of A less those of B, the mean over the seeds of each, and its 95% interval over documents.

  The same documents are drawn for both (paired bootstrap); seeds are not drawn, see `low` and `high`.

  Returns:
    `mean`; `interval`; `low` and `high`: over the pairs of seeds.
  """
  tokens = np.asarray(a.runs[0].statistics["groups"]["tokens"], np.float64)
  ours, theirs = (np.array([r.statistics["groups"]["nats"] for r in group.runs], np.float64) for group in (a, b))
  gaps = ours.mean(0) - theirs.mean(0)
  draws = np.random.default_rng(_BOOTSTRAP_SEED)
  means = []
  # In parts: at once they would take 80 MB.
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
  """What each group spent and reached."""
  return [_outcome(group) for group in groups]


def _outcome(group: Group) -> Outcome:
  first = group.runs[0]
  config = configs.freeze(first.source)
  method, length = config.build_method(first.vocab_size), config.data.sequence_length
  records, paces = [], []
  for run in group.runs:
    found = run.statistics
    # What decoding took is measured by evaluations; the last one at the same step has it.
    measured = next((row for row in reversed(run.validation) if row.get("step") == found["step"]), {})
    seen = {name: measured[name] for name in ("inference_flops", "inference_slots") if name in measured}
    pauses = 0.0 if found["num_slots"] == 1 else (found["latency"] or {}).get("mean_pauses")
    records.append(
      {"method": config.method.name, "perplexity": found["perplexity"]["mixture"], "mean_pauses": pauses}
      | {"autoregressive": found.get("autoregressive")}
      # Older statistics don't have them.
      | {"loss_perplexity": found["perplexity"].get("loss")}
      | {"training_omega": {"perplexity": found["perplexity"].get("training")}}
      | {spend: run.meta[spend] for spend in SPENDS}
      | seen
    )
    # An older report has it of methods that decide nothing too.
    if (paced := found["self_paced"]) and is_adaptive(method):
      cost = method.costs(length, slots=paced["context_pauses"] + 1).inference
      paces.append(paced | {"inference_flops": float(cost.total)})
  return Outcome.of(group.label, records, Costs.of(config, first.vocab_size), paces)


def compare(groups: Sequence[Group]) -> dict[str, Any]:
  """What comparison.json holds.

  Groups that aren't causal are in `looks_ahead`, by label, and have neither differences nor efficiency: these come from
  what is read of a whole window at once.
  """
  causal = [group for group in groups if group.causal]
  windows = common_windows([run for group in causal or groups for run in group.runs])
  first = groups[0].runs[0].statistics
  # Each group has a perplexity, with its seeds, and what training has spent of its own.
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
  """What comparison.json holds of a group but for its trade-off."""
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
    # Of the same windows, which are fewer than those of the other numbers here.
    "self_paced_cost": spread([s["perplexity"] / s["constant_perplexity"] - 1 for s in paces])
    if len(paces) == len(group.runs)
    else None,
    **{spend: [run.meta[spend] for run in group.runs] for spend in SPENDS},
  }
