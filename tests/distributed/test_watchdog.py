"""How a host reports that another host has died, and how it ends."""

import errno
import json
import threading

import jax
import pytest

from cyb_jax.distributed import watchdog
from cyb_jax.distributed.agreement import same_folder
from cyb_jax.distributed.channel import Channel, KeyValueStore
from cyb_jax.errors import HostLostError, StorageError, storage_cause

RESET = "UNAVAILABLE: recvmsg:Connection reset by peer"


@pytest.mark.parametrize(
  ("error", "cause", "shown"),
  [
    (jax.errors.JaxRuntimeError(RESET), None, RESET),
    # A collective outside a compiled function.
    (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), None, "Gloo AllGather failed"),
    # Orbax, which waits for the other hosts' parts of a checkpoint.
    (TimeoutError("async_write_complete barrier"), jax.errors.JaxRuntimeError(RESET), RESET),
  ],
)
def test_a_failed_connection_is_a_lost_host(monkeypatch, error, cause, shown):
  monkeypatch.setattr(watchdog, "_POLL_SECONDS", 0.001)
  error.__cause__ = cause
  assert storage_cause(error) is None
  lost = pytest.raises(HostLostError, match=f"another host has died.*{shown}.*with the same command")
  with lost, watchdog.lost_hosts(2):
    raise error
  with pytest.raises(type(error)), watchdog.lost_hosts(1):
    raise error


@pytest.mark.parametrize(
  "error",
  [ValueError("UNAVAILABLE: gs://runs"), KeyError("Gloo"), jax.errors.JaxRuntimeError("out of memory"), TimeoutError()],
)
def test_other_errors_are_not(error):
  with pytest.raises(type(error)), watchdog.lost_hosts(2):
    raise error


def test_a_disk_that_does_not_answer_is_not_a_bucket():
  assert storage_cause(OSError(errno.ETIMEDOUT, "timed out", "/nfs/run/metrics.jsonl")) == "Connection timed out"
  assert storage_cause(TimeoutError()) == "the bucket can't be reached (TimeoutError)"


@pytest.mark.parametrize("answers", [True, False])
def test_a_host_ends_although_the_store_does_not_answer(monkeypatch, answers):
  """The reporter is dismissed before the announcement, during which jax may abort the process."""
  reporter, left, told, codes = watchdog.ExitReporter("killed"), threading.Event(), [], []

  class Client:
    def key_value_set(self, key, value):
      assert reporter._process.poll() == 0
      if not answers:
        left.wait(60)
      told.append((key, json.loads(value)))

    def key_value_dir_get(self, folder):
      return []

  monkeypatch.setattr(watchdog, "_ANNOUNCING_SECONDS", 60.0 if answers else 0.01)
  monkeypatch.setattr(watchdog.os, "_exit", codes.append)
  watchdog.Watchdog(KeyValueStore(Client()), 1, reporter).abandon("the disk is full", 1)
  assert codes == [1]
  assert told == ([("cyb_jax/ended/1", ["the disk is full", 1])] if answers else [])
  left.set()


def test_a_folder_that_host_0_cannot_write(tmp_path):
  class Client:
    def key_value_set(self, key, value):
      pass

  channel = Channel(KeyValueStore(Client()), 0, 2)
  with pytest.raises(StorageError, match=r"workdir: .*missing can't be written: .* give the same command again"):
    same_folder(channel, tmp_path / "missing")


def test_host_0_has_died_while_another_host_waits_for_its_message():
  class Client:
    def key_value_set(self, key, value):
      pass

    def blocking_key_value_get(self, key, milliseconds):
      raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed\nAdditional GRPC error information: ...")

  message = (
    r"^hosts: host 0 has died or can't be reached \(UNAVAILABLE: Socket closed\)\. What was saved is intact: start all"
    r" hosts again with the same command$"
  )
  with pytest.raises(HostLostError, match=message):
    Channel(KeyValueStore(Client()), 1, 2).broadcast()
