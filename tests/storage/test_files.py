"""Files on a disk: what a folder of files holds if the process dies."""

import os
import pathlib

import pytest

from cyb_jax import storage


def test_files_of_a_new_folder_are_flushed_before_they_appear(tmp_path, monkeypatch):
  events, replace, fsync = [], pathlib.Path.replace, os.fsync
  folder = tmp_path / "tokenizer"

  def replaced(path, target):
    events.append(target.name)
    return replace(path, target)

  monkeypatch.setattr(pathlib.Path, "replace", replaced)
  monkeypatch.setattr(os, "fsync", lambda number: events.append("flushed") or fsync(number))
  with storage.new_folder(folder) as written:
    (written / "tokenizer.model").write_text("model")
    (written / "tokenizer.json").write_text("{}")
    assert not folder.exists()
  assert events == ["flushed", "tokenizer.json", "flushed", "tokenizer.model", "flushed"]
  # The files of a process that was killed while it wrote are removed; a block that fails changes nothing.
  (folder / "tokenizer.json.123.tmp").write_text("")
  with storage.new_folder(folder) as written:
    (written / "tokenizer.json").write_text("[]")
  assert {path.name: path.read_text() for path in folder.iterdir()} == {
    "tokenizer.json": "[]", "tokenizer.model": "model",
  }  # fmt: skip
  with pytest.raises(KeyboardInterrupt), storage.new_folder(tmp_path / "other"):
    raise KeyboardInterrupt
  assert not (tmp_path / "other").exists()
