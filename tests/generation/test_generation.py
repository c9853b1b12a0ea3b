"""The sampler against the training forward, against slow loops that run the complete prefix again, and against the
exact distribution."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, build
from scipy import stats

from cyb_jax import methods
from cyb_jax.errors import InputError
from cyb_jax.generation import Sampler, SamplingOptions, default_mode
from cyb_jax.generation.sampler import _advance
from cyb_jax.methods import option_names
from cyb_jax.pauses import pack
from cyb_jax.stopping import log_stopping_distribution

END = 3
PROMPTS = [[5], [1, 7, 2, 9], [4, 4], [8, 6, 0, 11, 12, 13, 2]]
VARIANTS = {
  "visible": {},
  "hidden": {
    "pause_visibility": "hidden", "pause_input": "token+pause", "pause_offset": True, "slot_heads": True,
  },
  "shifting": {"pause_positions": "shifting", "pause_shared": True, "dont_know": "unit"},
  # Hidden pauses keep their positions.
  "hidden shifting": {"pause_visibility": "hidden", "pause_positions": "shifting"},
}  # fmt: skip
# Decoders whose slots depend on the positions of other slots than by RoPE alone; with visible or hidden pauses.
_WINDOWS = dict(window=2, global_every=2, query_key_norm="head", norm_placement="both", local_rope_base=100.0)
DECODERS = {
  "window": _WINDOWS,
  "window hidden": _WINDOWS | {"attention_soft_cap": 2.0},
  "window scan": _WINDOWS | {"scan_layers": True},
  "learned": {"learned_positions": 16},
}
VARIANTS_OF_DECODERS = {"window hidden": VARIANTS["hidden"]}


@functools.cache
def model(variant="visible", name="cyb", pauses=2, scan=False):
  """A model whose d is spread over (0, 1): at the prior all rows would pause."""
  decoder = dataclasses.replace(TINY, **{"scan_layers": scan} | DECODERS.get(variant, {}))
  options = {"pauses": pauses} if "pauses" in option_names(name) else {}
  if name == "cyb":
    options["dont_know_prior"] = 0.6
  variants = VARIANTS | VARIANTS_OF_DECODERS
  method, params = build(decoder, name=name, **options, **variants.get(variant, {}))
  if name == "cyb":
    params["dont_know"] = 2 * jax.random.normal(jax.random.key(5), params["dont_know"].shape)
  if "slot_heads" in params:
    params["slot_heads"] = params["slot_heads"] + 0.1 * jax.random.normal(jax.random.key(8), params["slot_heads"].shape)
  return method, params


def generate(method, params, prompts=PROMPTS, *, new=6, seeds=0, end_id=None, **options):
  stated = {k: options.pop(k) for k in ("stop", "callback", "chunk", "context") if k in options}
  with jax.default_matmul_precision("highest"):
    sampler = Sampler(method, SamplingOptions(**options))
    return sampler.generate(params, prompts, max_new_tokens=new, seeds=seeds, end_id=end_id, **stated)


@functools.partial(jax.jit, static_argnums=0)
def uncached_scores(method, params, tokens, lengths):
  """The training forward over one row, given the number of slots of each token: the scores of each token's slots,
  f32[T, W, V] and so on; slots after a token's last slot repeat it.
  """
  if method.hides_pauses:  # as in training, where all hidden pauses run and only their own token sees them
    hidden = method.hidden(params, {"tokens": tokens[None]})[0]
  else:
    packing = pack(lengths[None], method.num_slots, tokens.shape[0] * method.num_slots)
    hidden = method.hidden_packed(params, {"tokens": tokens[None]}, packing)[0][packing.places[0]]
  return method.token_scores(params, hidden, jnp.broadcast_to(jnp.arange(method.num_slots), hidden.shape[:-1]))


def padded(tokens, lengths, size=16):
  """Padded to one shape, so that one program suffices; attention is causal, so the padding is not seen."""
  fill = [0] * (size - len(tokens))
  return jnp.array(tokens + fill), jnp.array(lengths + [1] * len(fill))


def run_again(method, params, prompt, lengths, generated, slots):
  """The scores of slot number `slots` - 1 of the last token, from a run of the complete prefix."""
  tokens = prompt + generated
  with jax.default_matmul_precision("highest"):
    scores = uncached_scores(method, params, *padded(tokens, [*lengths, slots]))
  return jax.tree.map(lambda x: np.asarray(x[len(tokens) - 1, slots - 1]), scores)


def slow_self_paced(method, params, prompt, new, in_prompt, draw=None, seed=0):
  """Token by token and slot by slot; greedy, or with the sampler's own draws."""
  lengths = [in_prompt] * (len(prompt) - 1)
  generated, pauses, log_probs = [], [], []
  for count in range(new):
    for slot in range(method.num_slots):
      scores = run_again(method, params, prompt, lengths, generated, slot + 1)
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), count), slot)
      if draw:
        abstains = jax.random.uniform(jax.random.fold_in(key, 1)) < np.exp(scores.log_dont_know)
      else:
        abstains = scores.log_dont_know > np.log(0.5)
      if slot == method.num_slots - 1 or not abstains:
        break
    word = scores.log_probs.argmax()
    if draw:
      word = jax.random.categorical(jax.random.fold_in(key, 2), scores.log_probs / draw)
    generated.append(int(word))
    pauses.append(slot)
    log_probs.append(float(scores.log_probs[word]))
    lengths.append(slot + 1)
  return generated, pauses, log_probs


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in DECODERS)])
def test_self_paced_equals_a_slow_loop(variant):
  method, params = model(variant)
  got = generate(method, params, read="threshold", temperature=0)
  for row, prompt in enumerate(PROMPTS):
    generated, pauses, log_probs = slow_self_paced(method, params, prompt, 6, 1)
    assert (got.tokens[row], got.pauses[row]) == (generated, pauses)
    np.testing.assert_allclose(got.log_probs[row], log_probs, atol=1e-5)
  in_all = [pause for row in got.pauses for pause in row]
  assert len(set(in_all)) > 1  # otherwise the test shows nothing
  assert got.slots == [6 + sum(row) for row in got.pauses]
  # The number of iterations is the number of slots of the longest row.
  assert got.iterations == max(got.slots)


@pytest.mark.slow
def test_sampled_self_paced_with_pauses_in_the_prompt():
  method, params = model(scan=True)
  got = generate(method, params, temperature=0.7, prompt_pauses="all", seeds=[11, 12, 13, 14], new=4)
  for row, prompt in enumerate(PROMPTS):
    generated, pauses, log_probs = slow_self_paced(method, params, prompt, 4, 3, draw=0.7, seed=11 + row)
    assert (got.tokens[row], got.pauses[row]) == (generated, pauses)
    np.testing.assert_allclose(got.log_probs[row], log_probs, atol=1e-5)


@pytest.mark.parametrize(
  ("variant", "read"),
  [
    ("visible", "sample"),
    ("visible", "threshold"),
    ("window", "threshold"),
    pytest.param("window hidden", "threshold", marks=pytest.mark.slow),
    pytest.param("window scan", "threshold", marks=pytest.mark.slow),
    pytest.param("learned", "threshold", marks=pytest.mark.slow),
    pytest.param("hidden", "mixture", marks=pytest.mark.slow),
    pytest.param("shifting", "mixture", marks=pytest.mark.slow),
    pytest.param("hidden shifting", "threshold", marks=pytest.mark.slow),
  ],
)
def test_constant_equals_the_training_forward(variant, read):
  method, params = model(variant)
  got = generate(method, params, mode="constant", read=read, temperature=0 if read != "sample" else 1.0)
  assert got.slots == [18] * len(PROMPTS)
  assert got.iterations == 6
  for row, prompt in enumerate(PROMPTS):
    tokens = jnp.array([prompt + got.tokens[row][:-1]])
    with jax.default_matmul_precision("highest"):
      hidden = method.hidden(params, {"tokens": tokens})[0, len(prompt) - 1 :]
    scores = method.token_scores(params, hidden, jnp.arange(3))
    log_s = log_stopping_distribution(scores.log_dont_know, scores.log_answer)
    if read == "mixture":
      log_probs = jax.nn.logsumexp(log_s[..., None] + scores.log_probs, 1)
    else:
      log_probs = np.asarray(scores.log_probs)[np.arange(6), got.pauses[row]]
    words = np.array(got.tokens[row])
    np.testing.assert_allclose(got.log_probs[row], np.asarray(log_probs)[np.arange(6), words], atol=1e-5)
    if read == "threshold":
      first = [next((i for i in range(2) if row[i] <= 0.5), 2) for row in np.exp(np.asarray(scores.log_dont_know))]
      assert got.pauses[row] == first
    if read != "sample":
      assert words.tolist() == np.asarray(log_probs).argmax(-1).tolist()


@pytest.mark.parametrize(
  "mode", ["self_paced", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("constant", "none"))]
)
def test_other_rows_and_padding_change_nothing(mode):
  method, params = model()
  together = generate(method, params, mode=mode, seeds=[1, 2, 3, 4], end_id=END, new=8)
  for row, prompt in enumerate(PROMPTS if mode == "self_paced" else []):
    alone = generate(method, params, [prompt], mode=mode, seeds=[row + 1], end_id=END, new=8)
    assert (alone.tokens[0], alone.pauses[0]) == (together.tokens[row], together.pauses[row])
    np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], atol=1e-5)
  # The prompts have other padding and another order.
  long = [2] * 20
  shuffled = generate(method, params, [long, *PROMPTS[::-1]], mode=mode, seeds=[9, 4, 3, 2, 1], end_id=END, new=8)
  assert shuffled.tokens[1:] == together.tokens[::-1]
  assert shuffled.pauses[1:] == together.pauses[::-1]


def exact(method, params, prompt, omega=None):
  """Pr(pauses, token) of the next token, f64[W, V], from the complete prefix."""
  lengths = [method.num_slots] * len(prompt)
  scores = uncached_scores(method, params, *padded(prompt, lengths))
  scores = jax.tree.map(lambda x: np.asarray(x[len(prompt) - 1], np.float64), scores)
  d = np.exp(scores.log_dont_know)
  omega = np.eye(len(d))[-1] if omega is None else np.array(omega) / np.sum(omega)
  s, waited = [], 1.0
  for i in range(len(d)):
    s.append(waited * (omega[i] + (1 - d[i]) * omega[i + 1 :].sum()))
    waited *= d[i]
  return np.array(s)[:, None] * np.exp(scores.log_probs)


@pytest.mark.parametrize(
  "options",
  [
    pytest.param({"mode": "self_paced", "prompt_pauses": "all"}, marks=pytest.mark.slow),
    pytest.param({"mode": "self_paced", "prompt_pauses": "all", "omega": (2.0, 0.0, 1.0)}, marks=pytest.mark.slow),
    {"mode": "constant", "omega": (1.0, 2.0, 1.0)},
    pytest.param({"mode": "constant", "read": "mixture"}, marks=pytest.mark.slow),
  ],
)
def test_draws_have_the_exact_distribution(options):
  decoder = dataclasses.replace(TINY, vocab_size=8)
  method, params = model()
  method = methods.build(method.config, decoder, vocab_size=5)
  # Smaller rows, so that no outcome is too rare for the statistics.
  decoder_params = params["decoder"] | {"embedding": 0.3 * params["decoder"]["embedding"][:8]}
  params = params | {"decoder": decoder_params, "dont_know": 0.1 * params["dont_know"]}
  prompt, rows = [1, 4, 2], 6000
  got = generate(method, params, [prompt] * rows, new=1, seeds=100, **options)
  expected = exact(method, params, prompt, options.get("omega"))
  counts = np.zeros_like(expected)
  np.add.at(counts, (np.ravel(got.pauses), np.ravel(got.tokens)), 1)
  if options.get("read") == "mixture":
    counts, expected = counts.sum(0), expected.sum(0)
  assert expected.sum() == pytest.approx(1.0, rel=1e-4)
  assert not counts[expected == 0].any()
  counts, expected = counts[expected > 0], expected[expected > 0]
  assert expected.min() * rows > 5
  assert fits(counts, expected) > 1e-3
  # A distribution that differs by a tenth fails the test.
  assert fits(counts, expected * (1 + 0.1 * (-1.0) ** np.arange(len(expected)))) < 1e-3


def fits(counts, expected):
  """The p-value of a chi-square test."""
  return stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue


@pytest.mark.parametrize(
  ("options", "mode"),
  [
    ({}, "constant"),
    ({"pause_visibility": "hidden"}, "self_paced"),
    ({"recipe": "on_policy"}, "self_paced"),
    ({"recipe": "sampled", "omega": (1.0, 1.0, 1.0)}, "self_paced"),
    ({"pauses": 0}, "none"),
  ],
)
def test_default_mode_is_a_context_of_training(options, mode):
  config = methods.configure(**{"name": "cyb", "pauses": 2} | options)
  assert default_mode(methods.build(config, TINY, vocab_size=8)) == mode


@pytest.mark.parametrize(
  ("name", "mode", "pauses"), [pytest.param("tbys", "constant", 2, marks=pytest.mark.slow), ("baseline", "none", 0)]
)
def test_methods_without_a_decision(name, mode, pauses):
  method, params = model(name=name, pauses=pauses)
  assert default_mode(method) == mode
  got = generate(method, params, mode=mode, temperature=0)
  assert got.pauses == [[pauses] * 6] * len(PROMPTS)
  # Slot by slot, with pauses in the prompt, the text is the same.
  again = generate(method, params, mode="self_paced", temperature=0, prompt_pauses="all" if pauses else "none")
  assert again.tokens == got.tokens
  assert again.pauses == got.pauses
  np.testing.assert_allclose(again.log_probs, got.log_probs, atol=1e-5)


@pytest.mark.slow
def test_constant_stop_pauses_by_its_shares():
  method, params = model(name="constant_stop")
  shares = jnp.array([0.2, 0.5, 0.3])
  params = params | {"stopping_logits": jnp.log(shares) / TINY.d_model}
  got = generate(method, params, [[1, 2]] * 3000, new=1, mode="self_paced")
  counts = np.bincount(np.ravel(got.pauses), minlength=3)
  assert fits(counts, np.asarray(shares, np.float64)) > 1e-3


@pytest.mark.slow
def test_limits_on_pauses():
  method, params = model()
  free = generate(method, params, seeds=3, new=8)
  assert max(sum(row) for row in free.pauses) > 3
  budget = generate(method, params, seeds=3, new=8, pause_budget=3)
  for row, freely in zip(budget.pauses, free.pauses):
    assert sum(row) == min(3, sum(freely))
  at_most_one = generate(method, params, seeds=3, new=8, max_pauses=1)
  assert {pause for row in at_most_one.pauses for pause in row} == {0, 1}
  denied = generate(method, params, seeds=3, new=8, omega=(1.0, 0.0, 0.0))
  none = generate(method, params, seeds=3, new=8, mode="none")
  assert denied.tokens == none.tokens
  assert none.pauses == [[0] * 8] * len(PROMPTS)
  assert none.slots == [8] * len(PROMPTS)
  always = generate(method, params, seeds=3, new=8, read="threshold", threshold=0.0)
  assert always.pauses == [[2] * 8] * len(PROMPTS)


@pytest.mark.slow
def test_tokens_that_may_be_drawn():
  method, params = model()
  greedy = generate(method, params, [[1, 2]], seeds=0, mode="none", temperature=0, new=1)
  best = exact(method, params, [1, 2])[0]
  # In mode none the prompt has no pauses: only the first slot of the same model.
  scores = uncached_scores(method, params, *padded([1, 2], [1, 1]))
  best = np.asarray(scores.log_probs)[1, 0]
  order = np.argsort(-best)
  assert greedy.tokens[0][0] == order[0]
  rows = [[1, 2]] * 400
  for options, kept in (
    ({"top_k": 3}, 3),
    ({"top_p": 0.5}, int((np.cumsum(np.exp(best[order])) < 0.5).sum()) + 1),
    ({"top_k": 4, "top_p": 0.999999}, 4),
    ({"top_k": 1}, 1),
  ):
    got = {row[0] for row in generate(method, params, rows, mode="none", new=1, **options).tokens}
    assert got == set(order[:kept].tolist())
  # Padding rows of the vocabulary, dk and pauses are never generated.
  hot = generate(method, params, [[1, 2]] * 400, mode="self_paced", temperature=50.0, new=3)
  assert {token for row in hot.tokens for token in row} == set(range(VOCABULARY))


def test_rows_end_independently():
  method, params = model()
  free = generate(method, params, seeds=5, new=12)
  word = free.tokens[1][2]
  ended = generate(method, params, seeds=5, new=12, end_id=word)
  for row, freely in zip(ended.tokens, free.tokens):
    assert row == (freely[: freely.index(word) + 1] if word in freely else freely)
  bounded = generate(method, params, seeds=5, new=12, context=9)
  assert [len(row) for row in bounded.tokens] == [8, 5, 7, 2]
  assert bounded.tokens[3] == free.tokens[3][:2]
  # Stopped by the caller in mid-chunk; later tokens are cut off, and the callback gets the tokens in pieces.
  streamed = {}
  programs = _advance._cache_size()

  def receive(row, tokens, pauses):
    streamed.setdefault(row, []).extend(zip(tokens, pauses))

  stopped = generate(
    method, params, seeds=5, new=12, chunk=3, callback=receive,
    stop=lambda row, generated: 4 if row == 2 and len(generated) > 4 else None,
  )  # fmt: skip
  assert stopped.tokens == [*free.tokens[:2], free.tokens[2][:4], free.tokens[3]]
  assert streamed == {row: list(zip(stopped.tokens[row], stopped.pauses[row])) for row in range(4)}
  assert stopped.slots[2] == 4 + sum(free.pauses[2][:4])
  assert _advance._cache_size() == programs  # the callback does not cause a compilation


def test_other_numbers_do_not_recompile():
  method, params = model()
  generate(method, params, read="threshold", threshold=0.4, temperature=0.5, top_k=3, omega=(1.0, 2.0, 1.0))
  programs = _advance._cache_size()
  generate(method, params, read="threshold", threshold=0.6, temperature=0.9, top_p=0.5, omega=(3.0, 1.0, 1.0))
  assert _advance._cache_size() == programs


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"mode": "slow"}, "mode: 'slow' is not one of self_paced, constant, none"),
    ({"read": "mixture"}, "use mode 'constant'"),
    ({"max_pauses": 3}, "max_pauses: 3 must be in 0..2"),
    ({"omega": (1.0, 1.0)}, "give max_pauses + 1 = 3 weights"),
    ({"temperature": -1.0}, "temperature: -1.0"),
    ({"temperature": 1e-30}, "temperature: 1e-30"),
    ({"top_p": 0.0}, "top_p: 0.0"),
    ({"top_k": -1}, "top_k: -1"),
    ({"threshold": 1.5}, "threshold: 1.5"),
    ({"mode": "constant", "pause_budget": 3}, "pause_budget: 3 is set"),
    ({"mode": "none", "prompt_pauses": "all"}, "prompt_pauses: 'all'"),
  ],
)
def test_bad_options(options, message):
  method, _ = model()
  with pytest.raises(InputError, match=re.escape(message)):
    Sampler(method, SamplingOptions(**options))


@pytest.mark.parametrize(
  ("prompts", "options", "message"),
  [
    ([], {}, "prompt: no prompt is given"),
    ([[1], []], {}, "prompt: number 2 is empty"),
    ([[1, VOCABULARY]], {}, f"prompt: number 1 has the id {VOCABULARY}"),
    ([[1, 2, 3]], {"context": 3}, "prompt: number 1 has 3 tokens, but the context is 3"),
    ([[1]], {"new": 0}, "max_new_tokens: 0"),
    ([[1]], {"seeds": [1, 2]}, "seeds: 2 seeds for 1 prompts"),
    ([[1]], {"seeds": -1}, "seed: -1"),
  ],
)
def test_bad_prompts(prompts, options, message):
  method, params = model()
  with pytest.raises(InputError, match=re.escape(message)):
    generate(method, params, prompts, **options)
