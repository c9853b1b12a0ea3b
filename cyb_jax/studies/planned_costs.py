"""The training FLOPs of a planned study, from the FLOPs that the library counts for each method."""

from __future__ import annotations

from typing import Any

from cyb_jax.report import trade_off
from cyb_jax.studies import plan as comparisons
from cyb_jax.studies.options import Options
from cyb_jax.studies.planned_runs import PRETRAINING, Run, expand
from cyb_jax.studies.plans import PlannedStudy

# Fields with which a run takes what its pretrained model has.
_TAKEN = ("decoder.preset=", "data.tokenizer=")


def costs(plan: PlannedStudy, flops_per_second: float | None = None) -> dict[str, Any]:
  """The model FLOPs of training all runs of a plan whose first pretrained model passes the gate.

  Evaluation, compilation and the start of processes are not counted.

  Args:
    plan: the plan.
    flops_per_second: the rate of training, for an estimate of the time.

  Returns:
    `plan`; `rows`: for each row its `row`, `runs`, `flops_per_token` of training, and the `flops` of all its runs;
    `runs` and `flops`, the totals; `hours` of training at the rate, if it is given.

  Raises:
    InputError: the config of a row is invalid.
  """
  rows: dict[str, dict[str, Any]] = {}
  for run in expand(plan, {}):
    if run.row not in rows:
      rows[run.row] = {
        "row": run.row,
        "runs": 0,
        "flops_per_token": step_flops(plan, run) / plan.step_tokens,
        "flops": 0,
      }
    row = rows[run.row]
    row["runs"] += 1
    row["flops"] += run.steps * plan.step_tokens * row["flops_per_token"]
  counted = {
    "plan": plan.name,
    "rows": list(rows.values()),
    "runs": sum(row["runs"] for row in rows.values()),
    "flops": sum(row["flops"] for row in rows.values()),
  }
  return counted | ({"hours": counted["flops"] / flops_per_second / 3600} if flops_per_second else {})


def step_flops(plan: PlannedStudy, run: Run) -> float:
  """The model FLOPs of a training step of a run."""
  return model_of(plan, run).step_flops


def model_of(plan: PlannedStudy, run: Run) -> comparisons.Model:
  """The model of a run; the decoder and the tokenizer of a pretrained model are those of its config."""
  pretraining = plan.pretraining
  if run.row == PRETRAINING:
    assert pretraining is not None
    config, size, fields = pretraining.config, pretraining.argument.partition(",")[2], [*run.fields]
  else:
    config, size, fields = plan.config, plan.size, [*plan.fields, *run.fields]
    if pretraining is not None:
      own = [field for field in pretraining.fields if field.startswith(("decoder.", "data.tokenizer="))]
      fields = [*own, *(field for field in fields if field not in _TAKEN)]
  options = Options(
    config=config, settings=[run.setting], rates=["1"], seeds=1, steps=1, jobs=1, size=size, fields=fields
  )
  return comparisons.model_of(options, run.setting)


def text(counted: dict[str, Any]) -> str:
  """The numbers of `costs` as a table in Markdown and a line."""
  total = counted["flops"]
  cells = [
    (row["row"], str(row["runs"]), trade_off.flops(row["flops_per_token"]), f"{row['flops']:.3g}",
     f"{row['flops'] / total:.0%}")
    for row in counted["rows"]
  ]  # fmt: skip
  line = f"{counted['plan']}: {counted['runs']} runs, {total:.4g} model FLOPs of training"
  if "hours" in counted:
    line += f", {60 * counted['hours']:.1f} minutes"
  header = ("row", "runs", "training FLOPs per token", "FLOPs of all runs", "share")
  return f"{trade_off.markdown(header, cells)}\n{line}.\n"
