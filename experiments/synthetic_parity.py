"""Do pauses help where width is missing? The parity of m letters, by a model with an MLP of 4 hidden units.

    for s in baseline tbys ap; do
      cyb-train --config=experiments/synthetic_parity.py:$s --workdir=runs/parity/$s
      cyb-report --workdir=runs/parity/$s      # "Known difficulty": accuracy and pauses by m
    done

A count of m capitals has m + 1 values, and its parity is a zigzag over them. The MLP of a slot has as many pieces as
hidden units; W slots together have W times as many. So W = 6 slots could do what one slot of this width cannot, and the
difficulty m is known. Settings: baseline, tbys (5 pauses, cross-entropy at the last one), ap (CYB-AP with 5 pauses,
discount 0.97; d is held at 0.9 for the first half of the steps). experiments/README.md has the results, which are
negative: at this size the extra slots are not learnt to be used.
"""

from cyb_jax import configs
from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.studies import settings

_STEPS = 4_000
_PAUSES = {"pauses": 5, "pause_input": "token+pause", "pause_visibility": "hidden"}
_METHODS = {
  "baseline": {"name": "baseline"},
  "tbys": {"name": "tbys"} | _PAUSES,
  "ap": {"name": "cyb", "loss": "ap", "gamma": "exponential:0.97", "stopping_warmup": _STEPS // 2} | _PAUSES,
}


def get_config(argument: str = ""):
  setting = argument or "ap"
  if setting not in _METHODS:
    raise InputError(f"--config: the setting {setting!r} is unknown; {did_you_mean(setting, _METHODS)}")
  config = configs.default()
  config.method.update(_METHODS[setting])
  config.decoder.update(preset="nano", num_layers=2, d_model=16, num_heads=1, num_kv_heads=1, head_size=8, mlp_size=4)
  # A window has eight documents of eleven tokens.
  settings.on_questions(config, "synthetic_parity", "documents=60000", 88)
  config.optimizer.learning_rate = 6e-3
  config.train.steps = _STEPS
  return config
