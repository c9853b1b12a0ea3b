"""Repositories of the hub in place of folders; a fake of huggingface_hub's download stands for the network."""

import json

import cli
import httpx2
import imported_models
import pytest

from cyb_jax import configs, hub, interop, runs
from cyb_jax.data.tokenizers import open_tokenizer
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def repository(tmp_path, monkeypatch):
  """A repository `someone/small` with the revision `v1`, and the requests for it."""
  folder = imported_models.write_folder(tmp_path / "snapshot", "llama3", [0])
  requests = []

  def download(name, *, revision, allow_patterns, ignore_patterns):
    requests.append((name, revision, tuple(allow_patterns)))
    assert ignore_patterns == ["*/*"]
    assert not {"*.bin", "*.pt"} & set(allow_patterns)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  monkeypatch.chdir(tmp_path)
  return folder, requests


def test_a_repository_is_a_folder(repository):
  folder, requests = repository
  assert interop.open_source("hf://someone/small").decoder == interop.open_source(folder).decoder
  found = pretrained.open_pretrained("hf://someone/small@v1")
  assert (found.path, found.kind) == ("hf://someone/small@v1", "huggingface")
  assert found.tokenizer.describe() == open_tokenizer(folder, imported_models.ROWS).describe()
  assert [request[:2] for request in requests] == [("someone/small", None), ("someone/small", "v1")]
  assert all("*.safetensors" in patterns for *_, patterns in requests)


def test_a_tokenizer_needs_no_weights(repository):
  folder, requests = repository
  (folder / "model.safetensors").unlink()
  assert open_tokenizer("hf://someone/small").vocab_size
  assert "*.safetensors" not in requests[0][2]
  with pytest.raises(InputError, match="hf://someone/small: the repository has no safetensors, and other weights"):
    interop.open_source("hf://someone/small")


def test_a_run_records_the_repository(repository):
  config = configs.default()
  config.init_from, config.data.tokenizer = "hf://someone/small@v1", "hf://someone/small"
  recorded = runs.with_absolute_paths(configs.to_dict(config))
  assert (recorded["init_from"], recorded["data"]["tokenizer"]) == ("hf://someone/small@v1", "hf://someone/small")


def test_programs_read_the_cache_without_a_network(tmp_path):
  """The actual client in its offline mode, and its cache with one snapshot."""
  cached = tmp_path / "cache" / "models--someone--small"
  imported_models.write_folder(cached / "snapshots" / ("0" * 40), "llama3", [0])
  (cached / "refs").mkdir()
  (cached / "refs" / "main").write_text("0" * 40)
  env = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
  flags = ("--from=hf", "--input=hf://someone/small", f"--output={tmp_path / 'out'}")
  result, _ = cli.run("convert", *flags, env=env)
  assert result["method"] == "baseline"
  fields = json.loads((tmp_path / "out" / "config.json").read_text())
  assert fields["architectures"] == ["LlamaForCausalLM"]


def failing(name, status=None):
  """An exception of the hub's client, as it raises them."""
  kind = getattr(huggingface_hub.errors, name, None) or getattr(httpx2, name)
  if status is None:
    return kind("first line\nsecond line")
  request = httpx2.Request("GET", "https://huggingface.co/someone/small")
  return kind("first line\nsecond line", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (
      ("GatedRepoError", 403),
      r"the repository is gated; accept its licence at https://huggingface\.co/someone/small, and log in",
    ),
    (("RepositoryNotFoundError", 404), "there is no such repository, or it is private"),
    (("RevisionNotFoundError", 404), "the repository has no revision 'v1'; give a branch"),
    (("LocalEntryNotFoundError",), r"the hub can't be reached \(first line\), and .* hf download someone/small"),
    (("OfflineModeIsEnabled",), "the hub can't be reached"),
    (("HfHubHTTPError", 500), r"can't be downloaded \(first line\); try again"),
    (("ProxyError",), r"can't be downloaded \(first line\)"),
  ],
)
def test_failures_are_one_error(monkeypatch, error, message):
  def download(*_, **__):
    raise failing(*error)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  for opened in (hub.fetch, interop.open_source, pretrained.open_pretrained, open_tokenizer):
    with pytest.raises(InputError, match=rf"hf://someone/small@v1: {message}") as caught:
      opened("hf://someone/small@v1")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["hf://", "hf://a/b/c", "hf://a/b@", "hf://../b", "hf://a b"])
def test_other_addresses_are_refused(address):
  with pytest.raises(InputError, match=r"not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
    hub.fetch(address)


def test_no_network_and_an_empty_cache(monkeypatch, tmp_path):
  """The actual client, in its offline mode."""
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(InputError, match="hf://someone/small: the hub can't be reached"):
    hub.fetch("hf://someone/small")


def test_a_missing_package(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "huggingface_hub.errors", None)
  with pytest.raises(InputError, match=r"needs the package huggingface_hub; pip install 'cyb_jax\[pretrained\]'"):
    hub.fetch("hf://someone/small")
