"""Compiles the programs of a run for a TPU topology: the training step, the evaluation of a batch, and the sampler's
step.

No data, tokenizer or weights are needed, because the shapes follow from the config.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging

from cyb_jax import configs, training
from cyb_jax.compilation import STEPS, programs
from cyb_jax.compilation.memory import CLASSES, memory_by_class, refused_bytes
from cyb_jax.compilation.programs import Program
from cyb_jax.compilation.roofline import MODEL, roofline
from cyb_jax.compilation.topologies import open_topology
from cyb_jax.compilation.traffic import traffic
from cyb_jax.configs import Config
from cyb_jax.costs import flops
from cyb_jax.costs.flops import Chip
from cyb_jax.costs.memory import bytes_per_device, count_parameters
from cyb_jax.methods.parameters import trained_part
from cyb_jax.progress import track
from cyb_jax.studies.resolution import resolve
from cyb_jax.training.estimate import Knob, Outline

# The instructions with the most HBM traffic that a record lists.
_MOVES_SHOWN = 10


def for_tpu(source: Mapping[str, Any]) -> Config:
  """Freezes a nested config as on a TPU, on any platform: 'auto' means bfloat16.

  Raises:
    InputError: see `studies.resolution.resolve`.
  """
  source = copy.deepcopy(configs.to_dict(source))
  precision = source.get("precision")
  if isinstance(precision, dict) and precision.get("activations", "auto") == "auto":
    precision["activations"] = "bfloat16"
  return resolve(source)


def compile_steps(
  source: Mapping[str, Any],
  topology: str,
  steps: Sequence[str] = STEPS,
  *,
  decode_batch: int = 0,
  hlo: str = "",
  verify: bool = False,
) -> dict[str, Any]:
  """Compiles for a topology, and reports the memory and the time that the programs need.

  Args:
    source: a nested config.
    topology: such as 'v5e:4x4', see `topologies.SLICES`.
    steps: some of STEPS.
    decode_batch: the number of rows that are decoded together; 0: eight, or the number of parts of the batch if it is
      larger.
    hlo: the folder for the optimised HLO of each step, NAME.txt; '': not written.
    verify: whether the advice is also compiled, change by change.

  Returns:
    The object that the program prints; see docs/guides/distributed.md.

  Raises:
    InputError: the input is invalid; nothing was compiled.
  """
  # Compilation is timed, not a cache look-up. JAX reads this option only once, at its first compilation.
  jax.config.update("jax_enable_compilation_cache", False)
  config = for_tpu(source)
  devices = open_topology(topology)
  chip = flops.chip(devices[0])
  # Without the tokenizer its size may be unknown; the shapes are then those of the decoder config.
  vocab_size, vocabulary_from = training.vocabulary(config)
  run = training.outline(config, vocab_size, devices=devices)
  records, seconds = _compiled(run, chip, steps, decode_batch, hlo)
  fits = all(record["fits"] for record in records.values())
  peaks = [record["memory"]["peak"] for record in records.values()]
  result = {
    "method": run.method.name,
    "topology": topology,
    "chip": devices[0].device_kind,
    "devices": len(devices),
    "hosts": len({device.process_index for device in devices}),
    "strategy": config.parallelism.strategy,
    "mesh": dict(run.mesh.shape),
    "fits": fits,
    "peak_bytes": None if None in peaks else max(peaks),
    "hbm_bytes": chip.hbm_bytes,
    **_described(run, vocabulary_from),
    **records,
    "advice": None if fits else _advice(run, records),
    "model": MODEL,
    "timing": {"compile_seconds": seconds},
  }
  if verify and not fits:
    result["advice"] = _verified(source, result, topology, decode_batch)
  return result


def _compiled(
  run: Outline, chip: Chip, steps: Sequence[str], decode_batch: int, hlo: str
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
  """The record of each step, and the seconds of its compilation."""
  kinds = {
    "train": functools.partial(programs.train, run),
    "evaluate": functools.partial(programs.evaluate, run),
    "decode": functools.partial(programs.decode, run, decode_batch),
  }
  # All programs are created before the first is compiled, so that invalid input is reported at once.
  made = {step: kinds[step]() for step in steps}
  records, seconds = {}, {}
  for step, program in track(made.items(), "compiling", total=len(made), unit="programs"):
    start = time.perf_counter()
    with jax.default_matmul_precision(run.config.precision.matmul):
      records[step] = _record(program, chip, f"{hlo}/{step}.txt" if hlo else None)
    seconds[step] = time.perf_counter() - start
    logging.info("%s", _log_line(step, records[step], chip, seconds[step]))
  return records, seconds


def _described(run: Outline, vocabulary_from: str) -> dict[str, Any]:
  """The keys of the result about the run itself, independent of the compiled programs."""
  config, method = run.config, run.method
  length = config.data.sequence_length
  tokens = config.data.batch_size * length
  slots = method.costs(length).train_slots / length
  costs = training.costs_per_token(method, length)
  totals = {kind: {count: cost["total"] for count, cost in of.items()} for kind, of in costs.items()}
  return {
    "vocabulary": {"size": method.vocab_size, "rows": method.decoder.config.vocab_size, "from": vocabulary_from},
    "parameters": count_parameters(method)["total"],
    "state_bytes": _state_bytes(run),
    "activations": config.activation_dtype,
    "remat": method.decoder.config.remat,
    "accumulate": config.optimizer.accumulate,
    "per_step": {"tokens": tokens, "slots": tokens * slots},
    "flops_per_token": totals,
    "flops_per_slot": {kind: {name: value / slots for name, value in of.items()} for kind, of in totals.items()},
  }


def _state_bytes(run: Outline) -> int:
  state = run.strategy.abstract()
  return bytes_per_device((state.params, state.opt_state))


def _record(program: Program, chip: Chip, path: str | None) -> dict[str, Any]:
  try:
    compiled = program.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed, limit = refused_bytes(str(error))
    usable = limit or chip.hbm_bytes
    memory = dict.fromkeys(CLASSES) | {"peak": needed}
    over = None if needed is None else needed - usable
    reason = str(error).strip().splitlines()[0]
    refusal = {"fits": False, "memory": memory, "hbm_bytes": usable, "over_bytes": over, "refused": reason}
    return refusal | program.about
  text = compiled.as_text()
  if path is not None:
    with open(path, "w") as file:
      file.write(text)
  memory, moved = memory_by_class(compiled), traffic(text)
  if program.iterates:
    moved = moved.iteration()
  kernel = "tpu_custom_call" in text
  each = program.flops(kernel) / program.devices
  bound = roofline(chip, each, moved)
  return {
    "fits": memory["peak"] <= chip.hbm_bytes,
    "memory": memory,
    "hbm_bytes": chip.hbm_bytes,
    "over_bytes": max(0, memory["peak"] - chip.hbm_bytes),
    **program.about,
    "devices": program.devices,
    "attention": "kernel" if kernel else "xla",
    "collectives": moved.by_kind(),
    "sent_bytes": moved.sent,
    "hbm_traffic_bytes": moved.hbm_bytes,
    "open_loops": moved.open_loops,
    "flops": each,
    "arithmetic_intensity": each / moved.hbm_bytes,
    "step_seconds": bound.seconds,
    "bound": bound.bound,
    "seconds": dataclasses.asdict(bound),
    "tokens_per_second": program.tokens / bound.seconds,
    "largest_moves": [
      dataclasses.asdict(move) | {"seconds": move.bytes / chip.hbm_bandwidth} for move in moved.moves[:_MOVES_SHOWN]
    ],
    **_shares(program, chip, bound.seconds, moved.hbm_bytes),
  }


def _shares(program: Program, chip: Chip, seconds: float, hbm_bytes: float) -> dict[str, float]:
  """Shares of a step: `roofline_mfu`, the model FLOPs over what the chips could do in the time of the roofline, and
  `traffic_over_parameters`, the bytes of the step over those of the parameters.
  """
  shares = {}
  if program.model_flops is not None:
    shares["roofline_mfu"] = program.model_flops / (program.devices * seconds * chip.peak_flops)
  if program.parameter_bytes:
    shares["traffic_over_parameters"] = hbm_bytes / program.parameter_bytes
  return shares


def _log_line(step: str, record: Mapping[str, Any], chip: Chip, seconds: float) -> str:
  peak = record["memory"]["peak"]
  size = "more than the chip has" if peak is None else f"{peak / 2**30:.2f} GiB"
  return f"{step}: {size} of {chip.hbm_bytes / 2**30:.2f}, compiled in {seconds:.0f} s"


def _advice(run: Outline, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Changes that reduce memory, the most effective first; `flags`: the flags for a change, None if it needs more."""
  over = {step: record for step, record in records.items() if not record["fits"]}
  peak = max((record["memory"]["peak"] or 0 for record in over.values()), default=0) or None
  state = run.strategy.abstract()
  held = bytes_per_device((state.params, state.opt_state))
  held += bytes_per_device(trained_part(state.params, run.method.is_trained))
  knobs = training.knobs(run.config, held, peak, run.mesh.size)
  if set(over) == {"decode"}:  # decoding has no gradients and no accumulation
    knobs = [Knob("a smaller --decode_batch"), *(knob for knob in knobs if "parallelism.fsdp" in knob.fields)]
  return [
    {"change": knob.description, "flags": [f"--config.{name}={value}" for name, value in knob.fields.items()] or None}
    for knob in knobs
  ]


def _verified(
  source: Mapping[str, Any], result: Mapping[str, Any], topology: str, decode_batch: int
) -> list[dict[str, Any]]:
  """The advice, with whether the steps fit after each single change that flags can make."""
  over = [step for step in STEPS if step in result and not result[step]["fits"]]
  tried = []
  for change in result["advice"]:
    found = {}
    if change["flags"]:
      changed = copy.deepcopy(configs.to_dict(source))
      for flag in change["flags"]:
        name, _, value = flag.removeprefix("--config.").partition("=")
        part, field = name.split(".")
        changed[part][field] = int(value) if value.isdecimal() else value
      again = compile_steps(changed, topology, over, decode_batch=decode_batch)
      found = {"fits": again["fits"], "peak_bytes": again["peak_bytes"]}
    tried.append(change | found)
  return tried
