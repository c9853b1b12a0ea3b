"""Every example in a docstring of the package is executed, and every public name of the core has an example."""

import doctest
import importlib
import inspect
import os
import pathlib

import pytest
from models import tiny_config

import cyb_jax
from cyb_jax import configs

ROOT = pathlib.Path(cyb_jax.__file__).parent
CORE = ("stopping", "losses", "pauses", "readout")


def _module_name(path):
  return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = [_module_name(path) for path in sorted(ROOT.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]
# The folder of the run that the examples use.
RUN = "runs/ap"


class _Checker(doctest.OutputChecker):
  """Accepts any output of an example without an expected output, such as generated text; the example must still run."""

  def check_output(self, want, got, optionflags):
    return not want or super().check_output(want, got, optionflags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with a run in `runs/ap`."""
  from cyb_jax import training

  folder = tmp_path_factory.mktemp("doctests")
  config = tiny_config(pauses=1, dont_know_prior=0.5)
  config.train.update(steps=1, eval_every=0)
  training.train(configs.freeze(config), str(folder / RUN))
  return folder


def examples(name):
  module = importlib.import_module(name)
  names = {**vars(module), "cyb_jax": cyb_jax}
  found = [test for test in doctest.DocTestFinder().find(module, globs=names) if test.examples]
  assert found, f"{name}: '>>> ' outside of the docstrings of public names"
  return found


@pytest.mark.parametrize("name", MODULES)
def test_examples_are_executed(name, request, monkeypatch):
  found = examples(name)
  if any(RUN in test.docstring for test in found):
    monkeypatch.chdir(request.getfixturevalue("folder"))
  runner = doctest.DocTestRunner(checker=_Checker(), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
  report = []
  for test in found:
    runner.run(test, out=report.append)
  assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_no_example_is_skipped():
  skipped = [test.name for name in MODULES for test in examples(name) if "+SKIP" in test.docstring]
  assert skipped == []


@pytest.mark.parametrize("name", CORE)
def test_every_public_name_of_the_core_has_an_example(name):
  module = importlib.import_module(f"cyb_jax.{name}")
  with_example = {test.name.removeprefix(f"{module.__name__}.") for test in examples(module.__name__)}
  public = {
    key
    for key, value in vars(module).items()
    if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
  }
  functions = {key for key in public if inspect.isfunction(getattr(module, key))}
  assert functions <= with_example, functions - with_example
  assert "SlotScores" not in public or {"SlotScores", "SlotScores.from_logits"} <= with_example


def test_a_wrong_output_is_an_error_and_a_missing_one_is_not(tmp_path):
  text = ">>> 1 + 1\n3\n\n>>> 'any output'\n"
  test = doctest.DocTestParser().get_doctest(text, {}, "text", os.devnull, 0)
  runner = doctest.DocTestRunner(checker=_Checker(), verbose=False)
  assert runner.run(test, out=lambda text: None) == (1, 2)
