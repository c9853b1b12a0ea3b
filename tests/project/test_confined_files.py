"""A model's folder and a request cannot make the project open another file or a connection.

An audit hook of Python sees every file that Python opens and every socket. The folder of adapters is an exception: it
names the model that it adapts.
"""

import contextlib
import json
import os
import sys

import imported_models
import pytest
from foreign_readers import _served_model

from cyb_jax import interop
from cyb_jax.data import ByteTokenizer, open_token_store, prepare, tokenizers
from cyb_jax.data.store import fingerprint
from cyb_jax.errors import InputError

_SECRET = "outside-secret"
_seen = []
_watching = False


def _hook(event, args):
  if _watching and (event == "open" or event.startswith(("socket.", "urllib.", "subprocess.", "os.system", "os.exec"))):
    _seen.append((event, str(args[0]) if args else ""))


sys.addaudithook(_hook)  # can't be removed


@contextlib.contextmanager
def confined():
  """Fails if the `with` block opens a file with the secret's name, a socket or a process."""
  global _watching
  _seen.clear()
  _watching = True
  try:
    yield
  finally:
    _watching = False
  assert [(event, name) for event, name in _seen if event != "open" or _SECRET in name] == []


@pytest.fixture
def secret(tmp_path):
  """A valid model outside of the hostile folder, next to it."""
  return imported_models.write_folder(tmp_path / _SECRET, "llama2", [2])


def test_the_hook_sees_files_and_sockets(secret):
  import socket

  with pytest.raises(AssertionError), confined():
    (secret / "config.json").read_bytes()
  with pytest.raises(AssertionError), confined(), contextlib.closing(socket.socket()) as found:
    found.bind(("127.0.0.1", 0))
  with confined():
    pass


def _references(secret):
  return (f"../{_SECRET}", f"../{_SECRET}/tokenizer.json", str(secret), f"file://{secret}", "http://127.0.0.1:9/x",
          "hf://owner/name", "gs://bucket/name")  # fmt: skip


def test_fields_of_a_tokenizer_open_nothing(secret, tmp_path):
  names = ("tokenizer_file", "vocab_file", "merges_file", "name_or_path", "auto_map", "chat_template", "cyb_jax")
  names += ("tokenizer_class", "added_tokens_decoder", "extra_special_tokens", "base_tokenizer")
  for number, reference in enumerate(_references(secret)):
    folder = imported_models.write_folder(tmp_path / f"hostile{number}", "smollm2", [2])
    for file in ("tokenizer_config.json", "generation_config.json"):
      content = json.loads((folder / file).read_text())
      (folder / file).write_text(json.dumps(content | dict.fromkeys(names, reference)))
    with confined():
      tokenizer = tokenizers.open_tokenizer(folder)
      tokenizer.encode("a")
      assert tokenizers.render_chat(tokenizer, [{"role": "user", "content": "a"}]) == reference  # a text, not a file


def test_fields_of_a_model_open_nothing(secret, tmp_path):
  for number, reference in enumerate(_references(secret)):
    folder = imported_models.write_folder(tmp_path / f"hostile{number}", "llama2", [2])
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"_name_or_path": reference}))
    with confined():
      interop.open_source(folder)
    for name in ("auto_map", "quantization_config", "cyb_jax"):
      (folder / "config.json").write_text(json.dumps(content | {name: reference}))
      with pytest.raises(InputError, match=name), confined():
        interop.open_source(folder)


@pytest.mark.parametrize("form", ["../{}/model.safetensors", "{}/model.safetensors", "/{}/model.safetensors", ".."])
def test_an_index_names_only_shards_of_its_folder(secret, tmp_path, form):
  folder = imported_models.write_folder(tmp_path / "hostile", "llama2", [2])
  names = imported_models.weights("llama")
  (folder / "model.safetensors").unlink()
  index = {"weight_map": dict.fromkeys(names, form.format(_SECRET))}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  with pytest.raises(InputError, match="must be the name of a safetensors file in this folder"), confined():
    interop.open_source(folder)


@pytest.mark.parametrize("part", [None, "documents"])
def test_a_store_names_only_files_of_its_folder(tmp_path, part):
  prepare("synthetic_lookups", "bytes", tmp_path / _SECRET, options={"documents": 64}, progress=False)
  prepare("synthetic_lookups", "bytes", tmp_path / "store", options={"documents": 64}, progress=False)
  path = tmp_path / "store" / "store.json"
  description = json.loads(path.read_text())
  shard = description["splits"]["train"]["shards"][0]
  entry = shard if part is None else shard[part]
  entry["file"] = f"../{_SECRET}/{entry['file']}"
  path.write_text(json.dumps(description | {"fingerprint": fingerprint(description)}))
  with pytest.raises(InputError, match=r"file = .* must be the name of a file in the store's folder"), confined():
    open_token_store(tmp_path / "store")


def test_a_saved_tokenizer_names_no_file(secret, tmp_path):
  (tmp_path / "saved").mkdir()
  ByteTokenizer().save(tmp_path / "saved")
  path = tmp_path / "saved" / "tokenizer.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": f"../{_SECRET}"}))
  with pytest.raises(InputError, match="is unknown"), confined():
    tokenizers.load(tmp_path / "saved")


def test_requests_open_nothing(secret):
  pytest.importorskip("starlette")
  from cyb_jax.serving.errors import ApiError
  from cyb_jax.serving.protocol import parse_chat, parse_completion

  model = _served_model()
  for reference in _references(secret):
    parts = [{"type": "image_url", "image_url": {"url": reference}}, {"type": "file", "file": {"file_id": reference}}]
    for part in parts:
      with pytest.raises(ApiError), confined():
        parse_chat({"messages": [{"role": "user", "content": [part]}]}, model)
    with pytest.raises(ApiError, match="does not exist"), confined():
      parse_completion({"model": reference, "prompt": "a"}, model)
    with confined():
      assert parse_completion({"prompt": reference[:20]}, model).echoes == [reference[:20]]
  assert os.path.exists(secret)
