"""The persistent cache of compiled programs."""

import os
import re
import subprocess
import sys

import cli
import pytest

from cyb_jax.cli import compilation_cache
from cyb_jax.errors import InputError

_PROGRAM = """
import sys
if sys.argv[2] == "before":  # as a config file does
  import jax
from cyb_jax.cli import compilation_cache
compilation_cache._MIN_SECONDS = 0.0
compilation_cache.enable(None if sys.argv[1] == "none" else sys.argv[1])
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((3, 3))).block_until_ready()
print(jax.config.jax_compilation_cache_dir, hits.count("/jax/compilation_cache/cache_hits"))
"""


def _run(folder, imported="after", **variables):
  environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))}
  environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"} | variables
  done = subprocess.run(
    [sys.executable, "-c", _PROGRAM, str(folder), imported],
    capture_output=True, text=True, env=environment, check=True,
  )  # fmt: skip
  *_, last = done.stdout.strip().splitlines()
  found, hits = last.split()
  return found, int(hits)


@pytest.mark.parametrize("imported", ["before", "after"])
def test_a_second_process_compiles_nothing_again(tmp_path, imported):
  assert _run(tmp_path / "programs", imported) == (str(tmp_path / "programs"), 0)
  assert _run(tmp_path / "programs", imported)[1] >= 1


def test_default_folder_is_the_users(tmp_path):
  found, _ = _run("none", XDG_CACHE_HOME=str(tmp_path))
  assert found.startswith(str(tmp_path / "cyb_jax" / "compiled"))


@pytest.fixture
def variables(monkeypatch):
  """The environment after `enable`, without the effects on this process."""
  monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith(("JAX_C", "JAX_P"))})
  monkeypatch.delitem(sys.modules, "jax")
  return os.environ


def test_variable_of_jax_is_respected(variables):
  variables["JAX_COMPILATION_CACHE_DIR"] = "/elsewhere"
  before = dict(variables)
  compilation_cache.enable(None)
  assert variables == before


def test_flag_overrides_the_variable_and_empty_is_off(variables):
  variables["JAX_COMPILATION_CACHE_DIR"] = "/elsewhere"
  compilation_cache.enable("")
  assert variables["JAX_COMPILATION_CACHE_DIR"] == ""
  assert "JAX_COMPILATION_CACHE_MAX_SIZE" not in variables


def test_size_is_bounded_on_a_disk(variables, tmp_path):
  compilation_cache.enable(str(tmp_path))
  assert variables["JAX_COMPILATION_CACHE_MAX_SIZE"] == str(compilation_cache.MAX_BYTES)


def test_folder_that_cannot_be_written(variables, tmp_path):
  """An error if the flag names it; the user's own folder is left out silently."""
  (tmp_path / "file").touch()
  folder = tmp_path / "file" / "programs"
  with pytest.raises(InputError, match=f"--compilation_cache: {folder} can't be written; give another folder"):
    compilation_cache.enable(str(folder))
  assert "JAX_COMPILATION_CACHE_DIR" not in variables
  variables["XDG_CACHE_HOME"] = str(tmp_path / "file")
  compilation_cache.enable(None)
  assert variables["JAX_COMPILATION_CACHE_DIR"] == ""


def test_a_warning_of_a_library_is_one_line():
  """Such as jax's, if another process holds the lock of the compilation cache."""
  code = (
    "import warnings; from cyb_jax.cli import launching; launching._set_up_logging(); warnings.warn('held\\n by 7')"
  )
  done = subprocess.run([sys.executable, "-c", code], env=cli.environment(), capture_output=True, text=True, check=True)
  before, line = done.stderr.splitlines()
  assert before == "WARNING: Logging before flag parsing goes to stderr."  # absl's, because no program runs here
  assert re.search(r"\] UserWarning: held by 7 \(<string>, line 1\)$", line), line
