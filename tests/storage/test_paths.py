"""Absolute paths, by hand."""

import pytest

from cyb_jax import storage
from cyb_jax.errors import InputError
from cyb_jax.storage.paths import unchecked_place


def test_absolute_paths(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", "/home/ann")
  here = str(tmp_path)
  assert storage.absolute("runs/x") == storage.absolute("./runs//x/") == f"{here}/runs/x"
  assert storage.absolute("~/runs/x") == "/home/ann/runs/x"
  assert storage.absolute("./~/x") == f"{here}/~/x"
  assert storage.absolute("a~b") == f"{here}/a~b"
  assert storage.absolute("books/**/*.txt") == f"{here}/books/**/*.txt"
  for path in ("", "/a/b", "gs://bucket/a/../b"):
    assert storage.absolute(path) == path
  assert str(storage.place("~/x")) == str(unchecked_place("~/x")) == "/home/ann/x"
  with pytest.raises(
    InputError, match=r"~nosuchuser/x: no user has the home folder ~nosuchuser; give \./~nosuchuser/x"
  ):
    storage.absolute("~nosuchuser/x")


def test_parent_folders(tmp_path, monkeypatch):
  (tmp_path / "a" / "deep").mkdir(parents=True)
  (tmp_path / "b").mkdir()
  (tmp_path / "b" / "link").symlink_to(tmp_path / "a" / "deep")
  monkeypatch.chdir(tmp_path / "b")
  assert storage.absolute("../a/*.txt") == f"{tmp_path}/a/*.txt"
  # The parent of a symbolic link's target is meant.
  assert storage.absolute("link/../x") == f"{tmp_path}/a/x"
  assert storage.absolute("link/x") == f"{tmp_path}/b/link/x"
  assert storage.absolute("*/../x") == f"{tmp_path}/b/*/../x"
