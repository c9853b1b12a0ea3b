"""One tiny run and one server of it for all tests of the folder, which need the extra `serve`."""

import importlib.util

import pytest
import served as support

if any(importlib.util.find_spec(name) is None for name in ("starlette", "uvicorn", "prometheus_client")):
  collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def run():
  return support.untrained_run()


@pytest.fixture(scope="session")
def served(run):
  with support.serving(run) as server:
    yield server
