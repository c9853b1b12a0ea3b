"""Eight CPU devices for every test, so that sharded steps can be compared with one device in the same process."""

import importlib.metadata
import os
import pathlib

# jax 0.9.2 - 0.10.2 deadlocks with forced CPU devices unless the thread pool has twice as many threads; the variable
# is read before the backend starts.
os.environ.setdefault("NPROC", "32")
# Most of the tests' time is compilation: a fast compilation mode makes it several times shorter, and a cache keeps
# compiled programs. The fusion emitters of XLA's CPU back end alone take half of the time that is left; they can be
# switched off in jaxlib 0.10, and jaxlib 0.12 ends the process because it does not know the flag.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):
  FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
import skips
from hypothesis import settings

# CYB_JAX_EXAMPLES=1000 searches longer, each time with other examples.
EXAMPLES = os.environ.get("CYB_JAX_EXAMPLES")
settings.register_profile("cyb_jax", deadline=None, max_examples=int(EXAMPLES or 10), derandomize=EXAMPLES is None)
settings.load_profile("cyb_jax")


@pytest.fixture
def exact():
  """Matrix products in full f32, which the parity tests require."""
  with jax.default_matmul_precision("highest"):
    yield


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
  """Token stores of tests are prepared in a separate folder, once per session."""
  before = os.environ.get("XDG_CACHE_HOME")
  os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
  yield
  if before is None:
    del os.environ["XDG_CACHE_HOME"]
  else:
    os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture(scope="module", autouse=True)
def _released():
  """Compiled programs of a module are not kept for the next one, because they would fill gigabytes."""
  yield
  jax.clear_caches()


def pytest_terminal_summary(terminalreporter):
  """Says at the end of a run what would run the skipped tests."""
  skips.report(terminalreporter)
