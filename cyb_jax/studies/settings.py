"""The named settings of the experiments: the rows of the paper's tables (arXiv 2510.13879), as config fields.

`experiments/*.py` take them as arguments, `NAME.py:SETTING,SIZE,REGIME`, each of which may be left out. A model that is
trained from scratch may also be a plain model of the same cost as a setting: `deeper@ap`, `wider@ap/training`;
fine-tuning accepts only settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections

from cyb_jax.decoder import PRESETS
from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.methods import METHODS, WEIGHTS, option_names

_PRIORS = {"uniform": "1:1:1:1", "bimodal": "4:1:1:4", "early": "11:3:3:3"}


def _cyb(pauses: int = 3, **fields: Any) -> dict[str, Any]:
  return {"name": "cyb", "loss": "ap", "pauses": pauses} | fields


SETTINGS: dict[str, dict[str, Any]] = {
  # The initial model is evaluated without training: no pauses, no steps.
  "pretrained": {"name": "baseline"},
  "baseline": {"name": "baseline"},
  # The initialisation is that of PonderLM-2.
  "baseline_small": {"name": "baseline"},
  **{f"tbys{k}": {"name": "tbys", "pauses": k} for k in (1, 2, 3)},
  "ap": _cyb(),
  "ap1": _cyb(1),
  "ap2": _cyb(2),
  "ap_discount": _cyb(gamma="exponential:0.99"),
  "ap_uniform": _cyb(omega=_PRIORS["uniform"]),
  "ap_bimodal": _cyb(omega=_PRIORS["bimodal"]),
  **{f"va_{name}": _cyb(loss="va", rho=rho) for name, rho in _PRIORS.items()},
  **{f"dp_{name}": _cyb(loss="dp", rho=rho, alpha=0.01) for name, rho in _PRIORS.items()},
  **{f"dp_{name}_strong": _cyb(loss="dp", rho=rho, alpha=0.1) for name, rho in _PRIORS.items()},
  # Described in the paper without results; and our own variants.
  "ap_unit": _cyb(dont_know="unit"),
  "ap_sampled": _cyb(recipe="sampled", omega=_PRIORS["uniform"]),
  "ap_on_policy": _cyb(recipe="on_policy"),
  "ap_hidden": _cyb(pause_visibility="hidden"),
  "ap_heads": _cyb(slot_heads=True),
  # The recipe with the lowest validation perplexity from scratch, see "Results of scratch" in experiments/README.md.
  "ap_scratch": _cyb(slot_heads=True, dont_know_prior=0.5),
  # The pauses of earlier work: they share one embedding, and each has its own position.
  "ap_shared": _cyb(pause_shared=True, pause_positions="shifting"),
  # Controls: a mixture over slots with weights that do not depend on the token; independently trained slots.
  "constant_stop": {"name": "constant_stop", "pauses": 3},
  "mean_slots": {"name": "mean_slots", "pauses": 3},
  # A mixture of four softmaxes of one hidden state, without pauses.
  "mos": {"name": "mos", "heads": 4},
  # A plain model that runs its layers four times; and the stopping-time losses over these passes.
  "looped": {"name": "looped", "pauses": 3},
  "cyb_looped": {"name": "cyb_looped", "loss": "ap", "pauses": 3},
  # The pauses of earlier work: a tenth of the text at random positions; ten after a prompt.
  "pause_training": {"name": "pause_training", "pauses": 10},
  # Latent thoughts: one for every token, as published; or up to three, with a router that decides their number.
  "ponderlm2": {"name": "ponderlm2", "pauses": 1, "jacobi": "2:3"},
  "ponderlm3": {
    "name": "ponderlm3",
    "pauses": 3,
    "jacobi": "2:3",
    # Ours: the router starts late and slowly, see cyb_jax/methods/ponderlm3.py.
    "full_depth": 0.15,
    "router_rate": 0.1,
    "router_penalty": 1e-3,
  },
  # Streams that fork, two and four per token; three additional copies that do not fork.
  "thoughtbubbles": {"name": "thoughtbubbles", "stream_budget": 2.0},
  "thoughtbubbles4": {"name": "thoughtbubbles", "stream_budget": 4.0},
  "copy_k": {"name": "copy_k", "pauses": 3},
}

# A description of each setting in one line.
MEANINGS: dict[str, str] = {
  "pretrained": "the model that training would start from (init_from), evaluated without training",
  "baseline": "a plain model: cross-entropy, no pauses",
  "baseline_small": "a plain model with PonderLM-2's initialisation: small weights, scaled inputs, an untied output",
  "tbys1": "one pause after every token, cross-entropy at the pause",
  **{f"tbys{k}": f"{k} pauses after every token, cross-entropy at the last pause" for k in (2, 3)},
  "ap": "CYB-AP with 3 pauses, omega = 0:0:0:1 and gamma = 1: the best setting of the paper",
  "ap1": "CYB-AP with 1 pause",
  "ap2": "CYB-AP with 2 pauses",
  "ap_discount": "CYB-AP with the discount 0.99^(i-1) at slot i",
  "ap_uniform": "CYB-AP with the step budget omega = 1:1:1:1",
  "ap_bimodal": "CYB-AP with the step budget omega = 4:1:1:4",
  **{f"va_{name}": f"CYB-VA with the prior rho = {rho}" for name, rho in _PRIORS.items()},
  **{f"dp_{name}": f"CYB-DP with the prior rho = {rho} and alpha = 0.01" for name, rho in _PRIORS.items()},
  **{f"dp_{name}_strong": f"CYB-DP with the prior rho = {rho} and alpha = 0.1" for name, rho in _PRIORS.items()},
  "ap_unit": "CYB-AP whose <don't know> is a separate logistic unit, not an output (in the paper without results)",
  "ap_sampled": "CYB-AP that draws each token's number of slots from omega = 1:1:1:1 (in the paper without results)",
  "ap_on_policy": "CYB-AP that draws each token's number of slots from the model's own stopping distribution (ours)",
  "ap_hidden": "CYB-AP whose pauses are seen only by their own token (ours)",
  "ap_heads": "CYB-AP whose slots have their own projections, as the heads of mos do without pauses (ours)",
  "ap_scratch": "ap_heads with a prior of 0.5 and PonderLM-2's initialisation: the best recipe from scratch (ours)",
  "ap_shared": "CYB-AP whose pauses share one embedding and have their own positions, as in earlier work",
  "constant_stop": "a control: a mixture over slots whose weights are the same for every token",
  "mean_slots": "a control: every slot is trained independently, and the mean of the slots is read",
  "mos": "a control: a mixture of four softmaxes of one hidden state, without pauses",
  "looped": "a control: a plain model that runs its layers four times",
  "cyb_looped": "CYB-AP over four passes through the layers instead of pauses (ours)",
  "pause_training": "pauses at random places, a tenth of the text, with positions of their own, and ten after a prompt",
  "ponderlm2": "one latent thought after every token, whose input is the previous state (PonderLM-2)",
  "ponderlm3": "up to three latent thoughts after every token; a router decides their number (PonderLM-3)",
  "thoughtbubbles": "streams that fork between layers, at most 2 per token on average; not causal (Thoughtbubbles)",
  "thoughtbubbles4": "streams that fork between layers, at most 4 per token on average; not causal",
  "copy_k": "three additional copies of every token's embedding; the state of the last copy is read",
}
# Descriptions of names such as 'deeper@ap', which only models that are trained from scratch accept.
MATCH_MEANINGS: dict[str, str] = {
  "deeper@SETTING": "a plain model with more layers and the FLOPs of SETTING at inference",
  "wider@SETTING": "a plain model with more heads, a larger width and the FLOPs of SETTING at inference",
  "deeper@SETTING/training": "the same, with the FLOPs of SETTING in a training step; also wider@SETTING/training",
}

# The initialisation of PonderLM-2, as published.
PONDER_DECODER = {"initializer": "small", "scale_embeddings": True, "tied_embeddings": False}
# Fields of the decoder that a setting changes if it is trained from scratch.
DECODERS: dict[str, dict[str, Any]] = dict.fromkeys(
  ("ponderlm2", "ponderlm3", "baseline_small", "ap_scratch"), PONDER_DECODER
)

# The settings that represent their methods in a list with one setting per method; for other methods it is the first of
# SETTINGS.
_REPRESENTATIVES = ("baseline", "tbys3", "ap")
# Plain models of the same cost as a setting, DIRECTION@SETTING/MEASURE: the direction is the size that grows, layers or
# width; the measure is the matched cost, FLOPs per real token of decoding or of a training step.
PLAIN = "baseline"
DIRECTIONS = ("deeper", "wider")
MEASURES = ("inference", "training")

# The 2 x 2 of pause-training: pretraining and fine-tuning, each with and without pauses; and the tasks.
PAUSE_RUNS = ("pretrain_standard", "pretrain_pause", "finetune_standard", "finetune_pause")
PAUSE_TASKS = ("synthetic_questions", "commonsense_qa", "hellaswag", "piqa")

# Epochs x data: the number of passes, and the thirds of the training windows (the paper's 1x, 2x and 3x data).
REGIMES: dict[str, tuple[float, int]] = {"1x1": (1, 1), "2x1": (2, 1), "1x2": (1, 2), "1x3": (1, 3)}


@dataclasses.dataclass(frozen=True)
class Match:
  """The cost that a plain model must have, as in 'wider@ap/training'.

  Attributes:
    direction: one of DIRECTIONS.
    setting: a key of SETTINGS.
    measure: one of MEASURES; 'inference' if the name has no measure.
  """

  direction: str
  setting: str
  measure: str


def parse_match(name: str) -> Match | None:
  """The parts of a setting such as 'deeper@ap'; None for any other name.

  Raises:
    InputError: a part is unknown, or the setting is itself a plain model.
  """
  direction, at, rest = name.partition("@")
  if not at:
    return None
  setting, slash, measure = rest.partition("/")
  direction = _one_of("setting", direction, DIRECTIONS)
  if "@" in rest or SETTINGS.get(setting, {}).get("name") == SETTINGS[PLAIN]["name"]:
    raise InputError(
      f"config argument: setting {name!r} matches {rest!r}, which is itself a plain model; match a setting of higher"
      f" cost, such as {direction}@ap"
    )
  setting = _one_of("setting", setting, SETTINGS)
  return Match(direction, setting, _one_of("measure", measure, MEASURES) if slash else MEASURES[0])


def check(name: str) -> str:
  """Returns the name of a setting: a key of SETTINGS, or a plain model that is matched to a setting.

  Raises:
    InputError: the name is neither.
  """
  return name if parse_match(name) else _one_of("setting", name, SETTINGS)


def representatives() -> list[str]:
  """One setting for each method, in the order of the registry."""
  found = []
  for method in METHODS:
    named = [name for name in (*_REPRESENTATIVES, *SETTINGS) if SETTINGS[name]["name"] == method]
    found += named[:1]
  return found


def parse(argument: str | None, *, setting: str, size: str, regime: str) -> tuple[str, str, str]:
  """(setting, size, regime) from 'SETTING,SIZE,REGIME'; missing parts have the defaults.

  Raises:
    InputError: a name is unknown, or there is a fourth part.
  """
  given = _parts(argument, (setting, size, regime), "it must have at most the three SETTING,SIZE,REGIME")
  return (
    check(given[0]),
    _one_of("size", given[1], PRESETS),
    _one_of("data regime", given[2], REGIMES),
  )


def parse_tuning(argument: str | None, *, setting: str = "ap") -> tuple[str, str]:
  """(setting, tuned weights) from 'SETTING,WEIGHTS'; the defaults are `setting` and 'all'.

  Raises:
    InputError: a name is unknown, or there is a third part.
  """
  setting, tuned = _parts(argument, (setting, "all"), "it must have at most the two SETTING,WEIGHTS")
  return _one_of("setting", setting, SETTINGS), _one_of("tuning.weights", tuned, WEIGHTS)


def parse_pause_training(argument: str | None) -> tuple[str, str]:
  """(run, task) of experiments/pause_training.py from 'RUN,TASK'; the defaults are 'pretrain_pause' and
  'synthetic_questions', the task of fine-tuning.

  Raises:
    InputError: a name is unknown, or there is a third part.
  """
  run, task = _parts(argument, ("pretrain_pause", "synthetic_questions"), "it must have at most the two RUN,TASK")
  return _one_of("run", run, PAUSE_RUNS), _one_of("data.task", task, PAUSE_TASKS)


def _parts(argument: str | None, defaults: Sequence[str], wanted: str) -> list[str]:
  given = [part.strip() for part in (argument or "").split(",")]
  if len(given) > len(defaults):
    raise InputError(f"config argument: {argument!r} has {len(given)} parts; {wanted}")
  given += [""] * (len(defaults) - len(given))
  return [part or default for part, default in zip(given, defaults)]


def fine_tune(config: ml_collections.ConfigDict, setting: str, tuned: str, *, calibrated: bool = True) -> None:
  """Sets the method; the decoder and the tokenizer are those of `init_from`.

  Args:
    config: the config, which is modified.
    setting: a key of SETTINGS.
    tuned: `tuning.weights`. LoRA and new rows need a higher learning rate than all weights.
    calibrated: whether d starts at our prior, see `calibrate`; False: at the paper's prior.
  """
  config.method.update(SETTINGS[setting])
  if calibrated:
    calibrate(config)
  config.decoder.preset = ""
  config.data.tokenizer = ""
  config.tuning.weights = tuned
  config.optimizer.learning_rate = 1e-4 if tuned == "all" else 1e-3
  config.optimizer.warmup_fraction = 0.02
  if setting == "pretrained":
    config.train.epochs = 0.0


def calibrate(config: ml_collections.ConfigDict) -> None:
  """Sets the initial median of d over the first four batches to 0.5, if the method has this option.

  The paper's prior is 0.9. With it the last slot gets 73% of the gradient and the first slot 10%, so the last slot of a
  model that was not trained with pauses is trained fastest, and the model learns to always wait for the last slot.
  """
  if "calibration_batches" in option_names(config.method.name):
    config.method.calibration_batches = 4
    config.method.dont_know_prior = 0.5


def _one_of(kind: str, name: str, accepted: Iterable[str]) -> str:
  accepted = list(accepted)
  if name not in accepted:
    raise InputError(f"config argument: {kind} {name!r} is unknown; {did_you_mean(name, accepted)}")
  return name


def apply(
  config: ml_collections.ConfigDict, setting: str, size: str, regime: str, *, from_scratch: bool = False
) -> None:
  """Sets the method, the decoder's preset with the setting's changes, the share of the data, and the number of epochs.

  Args:
    config: the config, which is modified.
    setting: a key of SETTINGS; or a name such as 'deeper@ap', which stays in `method.name` until the complete config is
      resolved, see `resolution`.
    size: a decoder preset.
    regime: a key of REGIMES.
    from_scratch: whether the model is trained from scratch. Pauses then include their token's embedding if the method
      has that option, because they otherwise collapse to the first slot.
  """
  if parse_match(setting):
    config.method.name = setting
  else:
    config.method.update(SETTINGS[setting])
    if from_scratch and "pause_input" in option_names(config.method.name):
      config.method.pause_input = "token+pause"
  config.decoder.preset = size
  if from_scratch:
    config.decoder.update(DECODERS.get(setting, {}))
  epochs, thirds = REGIMES[regime]
  config.train.epochs = float(epochs) if setting != "pretrained" else 0.0
  config.data.fraction = thirds / 3


def on_questions(config: ml_collections.ConfigDict, task: str, options: str, sequence_length: int) -> None:
  """Sets the data and training of a tiny model on a generated task with answers of known difficulty, in place.

  Args:
    config: the config.
    task: the task.
    options: of the task.
    sequence_length: a multiple of the tokens of a document, so that documents are complete.
  """
  config.decoder.update(PONDER_DECODER)
  config.data.update(
    task=task, options=options, tokenizer="bytes", sequence_length=sequence_length, document_mask=True, batch_size=16
  )
  config.optimizer.update(warmup_fraction=0.02, weight_decay=0.0)
  config.train.update(log_every=200, checkpoint_every=1_000)


def on_reviews(config: ml_collections.ConfigDict, size: str) -> None:
  """Sets the film reviews, windows and learning rate for a decoder of this size, and the logging periods."""
  small = size in ("nano", "tiny", "small")
  config.data.task = "imdb_reviews"
  config.data.tokenizer = "sentencepiece:8192"
  config.data.sequence_length = 128 if small else 512
  config.data.batch_size = 16 if small else 64
  config.optimizer.learning_rate = 1e-3 if small else 6e-4
  config.optimizer.warmup_fraction = 0.02
  config.train.log_every = 50
  config.train.eval_every = 500
  config.train.eval_limit = 128
  config.train.checkpoint_every = 500
