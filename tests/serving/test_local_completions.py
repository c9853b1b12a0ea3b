"""lm-evaluation-harness's model `local-completions` against the server, and against the adapter of this package."""

import os
import types

import pytest

pytest.importorskip("lm_eval", reason="the extra harness isn't installed")
pytest.importorskip("tenacity", reason="lm-evaluation-harness needs it for models behind a server")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def remote(served):
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  return LocalCompletionsAPI(
    base_url=f"{served.url}/v1/completions", model="tiny", max_length=served.model.context - 1, batch_size=2
  )


def instances(kind, *arguments):
  from lm_eval.api.instance import Instance

  return [Instance(kind, {}, args, 0, metadata=("task", 0, 1)) for args in arguments]


def test_likelihoods_are_those_of_the_adapter(run, remote):
  from cyb_jax.generation.harness import CybLM

  assert type(remote.tokenizer).__name__ == "RemoteTokenizer"
  pairs = [("ab", " c"), ("abc", "def"), ("x", "yz"), ("ab", " d"), ("q" * 30, "r")]
  expected = CybLM(run=run).loglikelihood(instances("loglikelihood", *pairs))
  got = remote.loglikelihood(instances("loglikelihood", *pairs))
  for (one, greedy), (other, other_greedy) in zip(got, expected):
    assert one == pytest.approx(other, abs=1e-4)
    assert greedy == other_greedy


def test_text_is_that_of_the_adapter(run, remote):
  from cyb_jax.generation.harness import CybLM

  requests = [(text, {"until": ["zzz"], "max_gen_toks": 6, "temperature": 0}) for text in ("ab", "c")]
  expected = CybLM(run=run, mode="self_paced").generate_until(instances("generate_until", *requests))
  assert remote.generate_until(instances("generate_until", *requests)) == expected
  options = types.MappingProxyType({"until": ["zzz"], "max_gen_toks": 6, "mode": "none"})
  (none,) = remote.generate_until(instances("generate_until", ("ab", dict(options))))
  assert none == CybLM(run=run, mode="none").generate_until(instances("generate_until", requests[0]))[0]


def test_rolling_likelihoods(run, remote):
  from cyb_jax.generation.harness import CybLM

  texts = [("hello there",)]
  expected = CybLM(run=run).loglikelihood_rolling(instances("loglikelihood_rolling", *texts))
  got = remote.loglikelihood_rolling(instances("loglikelihood_rolling", *texts))
  assert got == pytest.approx(expected, abs=1e-3)
