"""A statistics.json with invented numbers, for tests of plots and tables."""

import itertools

import numpy as np

HOSTILE = "<script>alert('x')</script>&\"$^{"


def example(num_slots=3, *, decides=True, seed=0, groups=32, step=40, difficulty=False, trained=False, nats=3.0):
  """A complete statistics.json; `nats`: the log perplexity."""
  rng = np.random.default_rng(seed)
  tokens = [100 + 3 * g for g in range(groups)]
  noise = rng.normal(0, 0.1, groups)
  sums = [float(n * (nats + x - noise.mean())) for n, x in zip(tokens, noise)]
  result = {
    "method": "cyb", "step": step, "split": "validation", "limit": None, "windows": 50, "tokens": sum(tokens),
    "documents": 2 * groups, "num_slots": num_slots,
    "perplexity": {
      "mixture": float(np.exp(nats)), "interval": [float(np.exp(nats - 0.05)), float(np.exp(nats + 0.05))],
      "mean_of_logs": None, "oracle": None, "hard": None, "slots": None,
    },
    "groups": {"count": groups, "documents": 2 * groups, "nats": sums, "tokens": tokens},
    **dict.fromkeys((
      "latency", "training_latency", "calibration", "curves", "self_paced", "types", "word_position", "word_class",
      "frequency", "difficulty", "autoregressive",
    )),
  }  # fmt: skip
  if num_slots == 1:
    return result | {"method": "baseline"}
  shares = rng.dirichlet(np.ones(num_slots))
  mean = float(shares @ np.arange(num_slots))
  latency = {
    "mean": shares.tolist(), "mean_pauses": mean,
    "histogram": {
      "edges": np.linspace(0, num_slots - 1, 65).tolist(), "counts": rng.poisson(50, 64).tolist(),
    },
  }  # fmt: skip
  result["perplexity"] |= {
    "mean_of_logs": float(np.exp(nats + 0.1)), "oracle": float(np.exp(nats - 0.2)),
    "slots": np.exp(nats + 0.1 * np.arange(num_slots)[::-1]).tolist(),
  }  # fmt: skip
  result |= {"latency": latency, "training_latency": latency if trained else None}

  def row(piece, median, variance):
    return {"piece": piece, "token": 7, "count": 40, "median": median, "mean": median + 0.1, "variance": variance}

  result["types"] = {
    "min_count": 20, "eligible": 300, "thresholds": {"median": [0.5, 1.5], "variance": [0.1, 0.4]},
    "median_resolution": 0.0625,
    "corners": {
      "low_low": [row(HOSTILE, 0.25, 0.05), row("▁wasn", 0.3, 0.04)],
      "high_low": [row("▁players", 1.75, 0.02)],
      "low_high": [row("\n", 0.1, 0.6)],
      "high_high": [],
    },
    "paper": [
      row("n", 0.3, 0.1) | {"word": "isn", "group": "low_low"},
      {"word": "etc", "group": "low_low", "count": 0, "median": None, "mean": None, "variance": None},
    ],
    "most_paused": [row(f"▁m{i}", 2 - i / 20, 0.1) for i in range(20)],
    "least_paused": [row(f"▁l{i}", i / 20, 0.1) for i in range(20)],
  }  # fmt: skip
  kind = {"count": 500, "mean": mean, "variance": 0.2}
  result["word_position"] = [
    {"position": name} | kind | {"count": i * 100} for i, name in enumerate(("other", "whole", "first", "last"))
  ]
  result["word_class"] = [{"class": "NN", "examples": ["film", "plot<b>"]} | kind]
  result["frequency"] = [{"low": 2**i, "high": 2 ** (i + 1) - 1, "types": 10} | kind for i in range(5)]
  if difficulty:
    result["difficulty"] = [
      {
        "difficulty": m, "count": 100, "mean_pauses": m / 2, "stopping": shares.tolist(), "accuracy": 1 - m / 10,
        "slot_accuracy": [0.5 + 0.1 * i for i in range(num_slots)], "perplexity": 2.0 + m,
      }
      for m in range(4)
    ]  # fmt: skip
  if not decides:
    return result | {"method": "tbys"}
  result["perplexity"]["hard"] = float(np.exp(nats + 0.02))
  result["calibration"] = []
  for i in range(1, num_slots):
    counts = np.zeros((64, 64), int)
    counts[20:60, 28:36] = rng.poisson(5, (40, 8))
    bins = np.linspace(0, 1, 11)
    result["calibration"].append(
      {
        "step": i, "spearman": 0.3, "interval": [0.25, 0.35],
        "density": {
          "decision_edges": np.linspace(0, 1, 65).tolist(), "gain_edges": np.linspace(-1, 1, 65).tolist(),
          "counts": counts.tolist(),
        },
        "reliability": [
          {"low": a, "high": b, "count": 9, "decision": (a + b) / 2, "better": a} for a, b in itertools.pairwise(bins)
        ],
        "deciles": [
          {"low": a, "high": b, "count": 9, "decision": (a + b) / 2, "gain": a / 9, "gain_nats": a / 3, "better": a}
          for a, b in itertools.pairwise(bins)
        ],
      }
    )  # fmt: skip
  result["curves"] = {
    "threshold": [
      {"threshold": x, "mean_pauses": (num_slots - 1) * (1 - x), "perplexity": float(np.exp(nats + 0.1 * x))}
      for x in np.linspace(0, 1, 9).tolist()
    ],
    "budget": [
      {
        "omega": np.eye(num_slots)[i].tolist(), "mean_steps": i + 1.0, "mean_pauses": 0.9 * i,
        "perplexity": float(np.exp(nats + 0.2 - 0.05 * i)),
      }
      for i in range(num_slots)
    ],
  }  # fmt: skip
  return result
