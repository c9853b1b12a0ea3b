"""The warning about contexts that training has not shown."""

import json
import logging

import pytest
from models import TINY

from cyb_jax import methods
from cyb_jax.cli import contexts


def method(**options):
  return methods.build(methods.configure(name="cyb", pauses=2, **options), TINY, vocab_size=8)


@pytest.fixture
def logged(caplog):
  caplog.set_level(logging.WARNING, "absl")
  return caplog


def test_measured_gap_is_part_of_the_warning(tmp_path, logged):
  (tmp_path / "report").mkdir()
  paced = {"perplexity": 49.123, "constant_perplexity": 27.94}
  (tmp_path / "report" / "statistics.json").write_text(json.dumps({"step": 7, "self_paced": paced}))
  assert contexts.measured(tmp_path, 8) is None  # of another checkpoint
  assert contexts.measured(tmp_path, 7) == paced
  contexts.warn_of_untrained_context(method(), contexts.measured(tmp_path, 7))
  assert "perplexity is 49.12 at its own pace, and 27.94 with all pauses" in logged.text


def test_an_evaluation_in_another_context_is_not_a_measurement(tmp_path, logged):
  (tmp_path / "evaluation.json").write_text(json.dumps({"step": 7, "perplexity": 28.98}))
  assert contexts.measured(tmp_path, 7) is None
  assert contexts.measured(tmp_path / "missing", 7) is None
  assert contexts.measured(None, 7) is None
  contexts.warn_of_untrained_context(method(), None)
  assert "trained with all pauses of every token in the context. 'constant' is" in logged.text


@pytest.mark.parametrize("options", [{"pause_visibility": "hidden"}, {"recipe": "on_policy"}])
def test_no_warning_for_models_that_were_trained_with_such_contexts(options, logged):
  contexts.warn_of_untrained_context(method(**options), {"perplexity": 2.0, "constant_perplexity": 1.0})
  assert not logged.text
