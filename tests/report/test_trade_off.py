"""Perplexity against FLOPs: the front by hand, the compared perplexity of non-causal methods, rows and plots."""

import dataclasses
import math

import pytest
from models import TINY, tiny_config
from statistics_example import example

from cyb_jax import configs
from cyb_jax.cli import report
from cyb_jax.methods import METHODS, build, configure
from cyb_jax.report import comparison, side_by_side, trade_off
from cyb_jax.report.comparison import Candidate
from cyb_jax.report.trade_off import Costs, Outcome, SelfPaced

COSTS = Costs(
  train=3e6, train_executed=4e6, inference=1e6, autoregressive=1e6, learnt=1.0, slots=4.0, parameters=1234
)  # fmt: skip


def record(perplexity, **more):
  return {
    "method": "x", "perplexity": perplexity, "mean_pauses": 1.5, "train_tokens": 100, "train_flops": 3e8,
    "inference_flops": 1e6, "inference_slots": None,
  } | more  # fmt: skip


def outcome(label, perplexities, train, inference, paced=None):
  records = [record(p, train_flops=train, inference_flops=inference) for p in perplexities]
  found = Outcome.of(label, records, COSTS)
  return found if paced is None else Outcome(**vars(found) | {"self_paced": paced})


def test_front_by_hand():
  # A: cheapest     B: dominated by A    C: on the front       D: as C, but costs more   E: equal to C    F: infinite
  places = [(1.0, 20.0), (2.0, 20.0), (2.0, 15.0), (3.0, 15.0), (2.0, 15.0), (0.5, math.inf)]
  assert trade_off.pareto_front(places) == [True, False, True, False, True, False]


def test_the_mean_over_seeds_is_compared_and_their_range_is_drawn():
  outcomes = [outcome("a", [10.0, 30.0], 1e9, 4e6), outcome("b", [19.0], 2e9, 1e6), outcome("c", [21.0], 3e9, 1e6)]
  a, b, c = trade_off.points(outcomes, "train_flops")
  assert (a.x, a.y, a.low, a.high) == (1e9, 20.0, 10.0, 30.0)
  assert [p.on_front for p in (a, b, c)] == [True, True, False]
  assert [p.on_front for p in trade_off.points(outcomes, "inference_flops")] == [False, True, False]
  rows = trade_off.describe(outcomes)
  assert [row["pareto"] for row in rows] == [
    {"train_flops": True, "inference_flops": False},
    {"train_flops": True, "inference_flops": True},
    {"train_flops": False, "inference_flops": False},
  ]
  assert rows[0]["perplexity_seeds"] == [10.0, 30.0]
  assert rows[0]["perplexity_deviation"] == pytest.approx(math.sqrt(200))
  assert rows[1]["perplexity_deviation"] is None


def test_the_training_objective_has_its_own_columns():
  """If it differs from the compared perplexity; without such rows these columns do not exist."""
  omega = {"training_omega": {"perplexity": 12.5, "mean_pauses": 1.0}}
  found = [
    Outcome.of("discount", [record(10.0, loss_perplexity=11.0), record(10.0, loss_perplexity=13.0)], COSTS),
    Outcome.of("omega", [record(10.0, loss_perplexity=12.5, **omega)], COSTS),
    Outcome.of("plain", [record(10.0, loss_perplexity=10.0000001, training_omega=None)], COSTS),
    Outcome.of("old", [record(10.0)], COSTS),
  ]
  rows = trade_off.describe(found)
  assert [row["loss_perplexity"] for row in rows] == [12.0, 12.5, None, None]
  assert [row["training_perplexity"] for row in rows] == [None, 12.5, None, None]
  header, table = trade_off.table(found)
  assert header[2:6] == ("perplexity", "exp(loss)", "under the training omega", "lowest to highest")
  assert [row[3:5] for row in table] == [("12.00 ± 1.4", "-"), ("12.50", "12.50"), ("-", "-"), ("-", "-")]
  assert "exp(loss)" not in trade_off.table(found[2:])[0]
  paced = Outcome(**vars(found[0]) | {"self_paced": SelfPaced((11.0, 11.0), 0.5, 1e6)})
  header, table = trade_off.table([paced])
  assert [len(row) for row in table] == [len(header)] * 2


def test_executed_flops_of_the_same_steps():
  found = Outcome.of("a", [record(9.0), record(11.0)], COSTS)
  assert (found.perplexity, found.train_flops, found.train_executed_flops) == (10.0, 3e8, 4e8)
  assert (found.slots, found.parameters, found.blockwise) == (4.0, 1234, None)
  # A measured cost of decoding takes precedence over the cost counted by hand.
  seen = [record(9.0, inference_flops=5e5, inference_slots=slots) for slots in (2.0, 3.0)]
  assert (Outcome.of("a", seen, COSTS).inference_flops, Outcome.of("a", seen, COSTS).inference_slots) == (5e5, 2.5)
  old = {name: value for name, value in record(9.0).items() if not name.startswith("inference")}
  assert (Outcome.of("a", [old], COSTS).inference_flops, Outcome.of("a", [old], COSTS).inference_slots) == (1e6, None)


def test_non_causal_methods_are_compared_by_their_autoregressive_perplexity():
  """On the evaluated windows it is 10% higher than blockwise, so the perplexity of the split is multiplied by 1.1."""
  found = {"perplexity": 11.0, "blockwise_perplexity": 10.0, "windows": 16}
  costs = dataclasses.replace(COSTS, autoregressive=3e7, learnt=0.9)
  ahead = Outcome.of("bubbles", [record(20.0, autoregressive=found)], costs)
  assert ahead.perplexities == pytest.approx((22.0,))
  assert ahead.blockwise == (20.0,)
  plain = Outcome.of("plain", [record(21.0, autoregressive=None)], COSTS)
  (row, other) = trade_off.describe([ahead, plain])
  assert (row["autoregressive"], row["blockwise_perplexity"]) == (True, 20.0)
  assert (other["autoregressive"], other["blockwise_perplexity"]) == (False, None)
  # The cost too: without a cache each token takes one pass.
  assert (row["inference_flops"], row["blockwise_inference_flops"]) == (3e7, 1e6)
  assert (other["inference_flops"], other["blockwise_inference_flops"]) == (1e6, None)
  assert (row["train_tokens"], row["train_tokens_learnt"], other["train_tokens_learnt"]) == (100, 90, 100)
  assert trade_off.compared_perplexity({"perplexity": None}) == math.inf
  assert trade_off.compared_perplexity({"perplexity": 2.0, "autoregressive": {"perplexity": None}}) == math.inf
  # The row is dominated, although it would be on the front with its blockwise perplexity.
  assert (row["pareto"]["train_flops"], other["pareto"]["train_flops"]) == (False, True)
  header, cells = trade_off.table([ahead, plain], {"rate": ["0.1", "0.2"]})
  assert header[:4] == ("#", "runs", "rate", "perplexity")
  assert [row[:4] for row in cells] == [("1", "bubbles", "0.1", "22.00 (20.00)"), ("2", "plain", "0.2", "21.00")]
  assert [(row[-5], row[-2]) for row in cells] == [("90", "30M (1M)"), ("100", "1M")]
  section = side_by_side.trade_offs([ahead, plain])
  assert "non-causal methods" in section.body
  assert "non-causal methods" not in side_by_side.trade_offs([plain]).body


def test_a_self_paced_context_is_a_separate_point():
  paced = SelfPaced((10.5,), pauses=0.5, inference_flops=4e5)
  outcomes = [outcome("ap", [10.0], 4e9, 1e6, paced), outcome("plain", [12.0], 1e9, 4e5)]
  assert len(trade_off.points(outcomes, "train_flops")) == 2
  ap, own, plain = trade_off.points(outcomes, "inference_flops")
  assert (own.row, own.x, own.y, own.self_paced) == (0, 4e5, 10.5, True)
  assert [p.on_front for p in (ap, own, plain)] == [True, True, False]
  described = trade_off.describe(outcomes)[0]["self_paced"]
  assert described == {
    "perplexities": (10.5,), "perplexity": 10.5, "pauses": 0.5, "inference_flops": 4e5, "pareto": True,
  }  # fmt: skip
  header, rows = trade_off.table(outcomes, {"rate": ["0.1", "0.2"]})
  assert [row[0] for row in rows] == ["1", "1s", "2"]
  assert {len(row) for row in rows} == {len(header)}
  # A run without a self-paced evaluation has no such point, nor has a group in which one run has none.
  pair = [record(10.0), record(11.0)]
  more = {"constant_perplexity": 8.0, "context_pauses": 0.5}
  assert Outcome.of("ap", pair, COSTS, [record(8.8, **more)]).self_paced is None
  both = Outcome.of("ap", pair, COSTS, [record(8.8, **more), record(8.0, **more)])
  assert both.self_paced.perplexities == pytest.approx((11.0, 11.0))


def test_tables_are_readable_as_text():
  text = trade_off.markdown(("a", "word"), [("1", "x|y"), ("22", "z")])
  assert text == "| a  | word |\n|----|------|\n| 1  | x\\|y |\n| 22 | z    |\n"
  assert trade_off.flops(1.9021e6) == "1.902M"
  assert trade_off.flops(401_792) == "401,792"
  assert trade_off.flops(7.4e12) == "7.4T"


def candidate(workdir, seed=0, **method):
  config = tiny_config(**method)
  config.train.seed = config.data.seed = seed
  meta = {"train_tokens": 640, "train_slots": 1920, "train_flops": 3e9, "store": "f" * 64}
  slots = method.get("pauses", 0) + 1
  statistics = example(slots, step=12, nats=3 + seed / 100)
  return Candidate(workdir, configs.freeze(config).source | {}, meta, statistics, [{"step": 12}], 257)


def test_the_comparison_page_shows_the_same_numbers():
  runs = [candidate("a0", pauses=2), candidate("a1", 1, pauses=2)]
  runs += [candidate("b", name="baseline")]
  for run in runs[:2]:
    run.statistics["self_paced"] = {
      "windows": 5, "perplexity": 22.0, "constant_perplexity": 20.0, "mean_pauses": 1.0, "context_pauses": 1.0,
      "tokens": 9,
    }  # fmt: skip
  groups = comparison.group_runs(runs)
  pauses, plain = comparison.outcomes(groups)
  method = configs.freeze(runs[0].source).build_method(257)
  assert pauses.perplexities == (pytest.approx(math.exp(3)), pytest.approx(math.exp(3.01)))
  assert pauses.inference_flops == method.costs(16).inference.total
  # Two of three slots.
  assert pauses.self_paced.inference_flops == method.costs(16, slots=2.0).inference.total < pauses.inference_flops
  assert pauses.self_paced.perplexities[0] == pytest.approx(1.1 * math.exp(3))
  assert (pauses.slots, plain.slots, plain.pauses) == (3.0, 1.0, 0.0)
  numbers = comparison.compare(groups)
  row = numbers["groups"][0]
  assert row["perplexity"]["values"] == list(pauses.perplexities)
  assert row["pareto"] == {"train_flops": False, "inference_flops": False}
  assert numbers["groups"][1]["pareto"] == {"train_flops": True, "inference_flops": True}
  assert row["train_flops"] == [3e9, 3e9]
  assert row["self_paced"]["pauses"] == 1.0
  # A measurement of an evaluation at the same step takes precedence over the count.
  runs[2].validation.append({"step": 12, "inference_flops": 7e5, "inference_slots": 1.5})
  assert comparison.outcomes(groups)[1].inference_flops == 7e5
  text, pictures = side_by_side.build(groups, numbers)
  assert {"pareto_train.png", "pareto_inference.png"} <= set(pictures)
  assert "CYB-AP, self-paced" in text


def test_a_method_that_is_not_adaptive_has_no_self_paced_point():
  run = candidate("a", name="tbys", pauses=2)
  run.statistics["self_paced"] = {"perplexity": 22.0, "constant_perplexity": 20.0, "context_pauses": 1.0}
  groups = comparison.group_runs([run])
  assert comparison.outcomes(groups)[0].self_paced is None
  assert comparison.compare(groups)["groups"][0]["self_paced_cost"] is None
  # Nor is it evaluated self-paced for its report.
  built = {name: build(configure(name), TINY) for name in METHODS}
  assert [name for name, method in built.items() if report._is_self_paced(method)] == ["cyb", "cyb_looped"]


def test_non_causal_methods_are_left_out_of_blockwise_sections():
  runs = [candidate("a", pauses=2), candidate("b", name="baseline")]
  ahead = candidate("c", name="thoughtbubbles")
  ahead.statistics["autoregressive"] = {"perplexity": 12.0, "blockwise_perplexity": 10.0}
  groups = comparison.group_runs([ahead, *runs])
  numbers = comparison.compare(groups)
  row = numbers["groups"][0]
  assert row["perplexity"]["values"] == [pytest.approx(1.2 * math.exp(3))]
  assert row["blockwise_perplexity"] == pytest.approx(math.exp(3))
  method = configs.freeze(ahead.source).build_method(257)
  assert row["inference_flops"] == method.costs(16).autoregressive.total
  assert row["blockwise_inference_flops"] == method.costs(16).inference.total
  assert numbers["looks_ahead"] == ["thoughtbubbles"]
  assert [(d["a"], d["b"]) for d in numbers["differences"]] == [("CYB-AP", "baseline")]
  assert {e["a"] for e in numbers["efficiency"]["train_tokens"]} == {"CYB-AP", "baseline"}
  text, _ = side_by_side.build(groups, numbers)
  assert text.count("the methods are non-causal: thoughtbubbles.") == 3
