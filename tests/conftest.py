"""Eight CPU devices for every test, so that sharded steps can be compared with one device in the same process."""

import os

# jax 0.9.2 - 0.10.2 deadlocks with forced CPU devices unless the thread pool has twice as many threads; read before
# the backend starts.
os.environ.setdefault("NPROC", "32")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

settings.register_profile("cyb_jax", deadline=None, max_examples=15, derandomize=True)
settings.load_profile("cyb_jax")


@pytest.fixture
def exact():
  """Matrix products in full f32, as the parity tests ask."""
  with jax.default_matmul_precision("highest"):
    yield
