"""Repositories of the Hugging Face Hub in place of local folders: hf://OWNER/NAME, or hf://OWNER/NAME@REVISION.

The form is that of huggingface_hub's own URIs. It is explicit, so that no mistyped path becomes a request, and a run
records it as it is. Files go into huggingface_hub's cache; what is in the cache needs no network.
"""

from __future__ import annotations

import importlib
import os
import re
import types

from absl import logging

from cyb_jax.errors import InputError

SCHEME = "hf://"
# A model's config and tokenizer, and its weights as safetensors. Pickles are never fetched.
_SMALL = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
_WEIGHTS = ("*.safetensors",)
_IN_FOLDERS = ("*/*",)
_ADDRESS = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def in_hub(path: str | os.PathLike[str]) -> bool:
  """Whether a path names a repository of the hub."""
  return os.fspath(path).startswith(SCHEME)


def fetch(address: str, *, weights: bool = True) -> str:
  """The local folder with the files of a repository, after those that the cache lacks have been downloaded.

  Args:
    address: hf://OWNER/NAME or hf://OWNER/NAME@REVISION; a revision is a branch, a tag or a commit. Without one it is
      the default branch.
    weights: whether the weights are needed, and not the tokenizer alone.

  Raises:
    InputError: the package or the repository is missing, the repository is gated or has no safetensors, or the hub
      can't be reached and the cache lacks the repository.
  """
  name = address.removeprefix(SCHEME)
  if not _ADDRESS.fullmatch(name):
    raise InputError(f"{address}: not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
  repository, _, revision = name.partition("@")
  hub = _package(address)
  errors = hub.errors
  patterns = [*_SMALL, *(_WEIGHTS if weights else ())]
  try:
    folder = hub.snapshot_download(
      repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=list(_IN_FOLDERS)
    )
  # Gated repositories are also missing ones, and missing files in the cache are also errors of the disk.
  except errors.GatedRepoError:
    raise InputError(
      f"{address}: the repository is gated; accept its licence at https://huggingface.co/{repository}, and log in"
      " (hf auth login)"
    ) from None
  except errors.RepositoryNotFoundError:
    raise InputError(
      f"{address}: there is no such repository, or it is private; check the name, or log in (hf auth login)"
    ) from None
  except errors.RevisionNotFoundError:
    raise InputError(
      f"{address}: the repository has no revision {revision!r}; give a branch, a tag or a commit"
    ) from None
  except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError, TimeoutError) as error:
    raise InputError(
      f"{address}: the hub can't be reached ({_first_line(error)}), and the repository is not in the local cache; run"
      f" hf download {repository} where there is a network, or give a local folder"
    ) from None
  except Exception as error:  # of the client's network library
    raise InputError(
      f"{address}: can't be downloaded ({_first_line(error)}); try again, or give a local folder"
    ) from None
  if weights and not any(file.endswith(".safetensors") for file in os.listdir(folder)):
    raise InputError(f"{address}: the repository has no safetensors, and other weights are never read")
  logging.info("%s: %s", address, folder)
  return str(folder)


def pinned(address: str) -> str:
  """The address with the commit of the fetched files as its revision, see `fetch`."""
  name = address.removeprefix(SCHEME).partition("@")[0]
  # The cache has a folder for each commit.
  return f"{SCHEME}{name}@{os.path.basename(fetch(address))}"


def _package(address: str) -> types.ModuleType:
  try:
    importlib.import_module("huggingface_hub.errors")
    return importlib.import_module("huggingface_hub")
  except ImportError as error:
    raise InputError(f"{address}: needs the package huggingface_hub; pip install 'cyb_jax[pretrained]'") from error


def _first_line(error: BaseException) -> str:
  return (str(error).strip() or type(error).__name__).splitlines()[0]
