"""Scores of every token of a text: against the scorer of continuations, and against the training forward."""

import jax
import numpy as np
import pytest
from models import VOCABULARY, build

from cyb_jax.errors import InputError
from cyb_jax.generation import Scorer
from cyb_jax.generation.prompt_scores import TextScorer

TEXT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.mark.parametrize("visibility", ["visible", pytest.param("hidden", marks=pytest.mark.slow)])
def test_tokens_are_scored_as_in_a_continuation(visibility):
  method, params = build(name="cyb", pauses=2, dont_know_prior=0.6, pause_visibility=visibility)
  with jax.default_matmul_precision("highest"):
    got = TextScorer(method, params, context=20, alternatives=4).score(TEXT, 3)
    scorer = Scorer(method, params, context=20, start_id=0)
    sums = [score.log_likelihood for score in scorer.score([(TEXT[:1], TEXT[1:n]) for n in range(2, 9)])]
    hidden = method.hidden(params, {"tokens": np.array([TEXT])})[0]
    log_probs = np.asarray(method.mixture_log_probs(params, hidden)[0])[:-1]
  np.testing.assert_allclose(np.cumsum(got.log_probs), sums, atol=1e-4)
  for place, alternatives in enumerate(got.alternatives):
    assert [token for token, _ in alternatives] == np.argsort(-log_probs[place])[:3].tolist()
    np.testing.assert_allclose([value for _, value in alternatives], np.sort(log_probs[place])[::-1][:3], atol=1e-5)


def test_bad_texts():
  method, params = build(name="baseline")
  scorer = TextScorer(method, params, context=4, alternatives=1)
  assert scorer.score([1]).log_probs == []
  for text, message in (([], "0 tokens"), ([1] * 5, "5 tokens; give 1 to 4"), ([1, VOCABULARY], "has the id")):
    with pytest.raises(InputError, match=message):
      scorer.score(text)
