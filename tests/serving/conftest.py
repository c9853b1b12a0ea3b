"""One tiny run and one server of it for all tests of the folder."""

import pytest

pytest.importorskip("starlette", reason="the extra serve isn't installed")
pytest.importorskip("uvicorn", reason="the extra serve isn't installed")

import served as support


@pytest.fixture(scope="session")
def run():
  return support.untrained_run()


@pytest.fixture(scope="session")
def served(run):
  with support.serving(run) as server:
    yield server
