"""Do further slots help where depth is missing? Lookups in sequence, by a model of one layer.

    for s in baseline ap looped cyb_looped; do
      cyb-train --config=experiments/synthetic_hops.py:$s --workdir=runs/hops/$s
    done
    cyb-report --compare=runs/hops/baseline,runs/hops/ap,runs/hops/looped,runs/hops/cyb_looped --output=runs/hops/report

The answer applies a permutation m times, and each application needs the result of the one before. Pauses are as deep as
their token, so they should not help; further passes through the layers should. Settings: baseline; ap (CYB-AP with 3
pauses); looped (4 passes, cross-entropy after the last one); cyb_looped (CYB-AP over the 4 passes). The difficulty m of
an answer is known, so the report shows accuracy and pauses by m. experiments/README.md has the results.
"""

from cyb_jax import configs
from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.studies import settings

_SLOTS = {"pauses": 3, "dont_know_prior": 0.5}
_METHODS = {
  "baseline": {"name": "baseline"},
  "ap": {"name": "cyb", "loss": "ap", "pause_input": "token+pause"} | _SLOTS,
  "looped": {"name": "looped", "pauses": 3},
  "cyb_looped": {"name": "cyb_looped", "loss": "ap"} | _SLOTS,
}


def get_config(argument: str = ""):
  setting = argument or "cyb_looped"
  if setting not in _METHODS:
    raise InputError(f"--config: the setting {setting!r} is unknown; {did_you_mean(setting, _METHODS)}")
  config = configs.default()
  config.method.update(_METHODS[setting])
  config.decoder.update(preset="nano", num_layers=1, num_heads=4, num_kv_heads=4, head_size=16)
  # A window has seven documents of fourteen tokens.
  settings.on_questions(config, "synthetic_hops", "documents=100000,max_difficulty=5", 98)
  config.optimizer.learning_rate = 4e-3
  config.train.steps = 5_000
  return config
