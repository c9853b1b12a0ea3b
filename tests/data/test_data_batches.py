"""Batches: each window once per epoch, independent of the number of hosts, resumable at any step."""

import itertools
import time

import numpy as np
import pytest

from cyb_jax.data import Permutation, Prefetch, TrainBatches, evaluation_batches, prepare
from cyb_jax.errors import InputError

T = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  path = tmp_path_factory.mktemp("store") / "s"
  return prepare("synthetic_sums", "bytes", path, options={"documents": 100}, shard_tokens=1000)


def test_windows_by_hand(store):
  batches = TrainBatches(store, sequence_length=T, batch_size=3, seed=0)
  batch = batches(5)
  assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
    'tokens': ((3, T), 'int32'), 'targets': ((3, T), 'int32'), 'weights': ((3, T), 'float32')
  }  # fmt: skip
  tokens, weights = store.windows("train", batches.windows(5), T)
  np.testing.assert_array_equal(batch["tokens"], tokens[:, :-1])
  np.testing.assert_array_equal(batch["targets"], tokens[:, 1:])
  np.testing.assert_array_equal(batch["weights"], weights)
  assert batches.num_windows == batches.windows_per_epoch == store.num_windows("train", T)
  assert batches.steps_per_epoch == batches.num_windows / 3


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 1000, 65537])
def test_permutation_is_a_bijection(size):
  permuted = Permutation(size, "key")(np.arange(size))
  assert permuted.dtype == np.int64
  assert np.array_equal(np.sort(permuted), np.arange(size))


def test_permutation_of_a_huge_range():
  size = 10**12 + 39
  permuted = Permutation(size, "key")(np.arange(size - 10000, size))
  assert len(set(permuted.tolist())) == 10000
  assert permuted.min() >= 0
  assert permuted.max() < size
  assert abs(permuted.mean() / size - 0.5) < 0.02


def test_permutation_looks_random():
  size = 10007
  x = np.arange(size)
  orders = [Permutation(size, f"{seed}:0")(x) for seed in range(8)]
  for order in orders:
    assert abs(np.corrcoef(order, x)[0, 1]) < 0.05
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert np.mean(np.diff(order) == 1) < 0.005
  for one, two in itertools.combinations(orders, 2):
    assert np.mean(one == two) < 0.002
  # Each of the six orders of three elements is equally likely.
  counts = np.unique([Permutation(3, f"{s}")(np.arange(3)) @ [9, 3, 1] for s in range(3000)], return_counts=True)[1]
  assert len(counts) == 6
  assert counts.min() > 400


def test_golden_order():
  # A run that is resumed by a newer version must continue in the same order, so these values must never change.
  assert Permutation(1000, "0:0")(np.arange(6)).tolist() == [513, 592, 286, 613, 134, 632]


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_every_window_once_an_epoch(store, batch_size):
  batches = TrainBatches(store, sequence_length=T, batch_size=batch_size, seed=3)
  n = batches.windows_per_epoch
  steps = -(-3 * n // batch_size)
  seen = np.concatenate([batches.windows(step) for step in range(steps)])[: 3 * n].reshape(3, n)
  for epoch in seen:
    assert np.array_equal(np.sort(epoch), np.arange(n))
  assert not np.array_equal(seen[0], seen[1])
  assert not np.array_equal(seen[1], seen[2])


def test_seeds_change_only_the_order(store):
  def used(seed, fraction):
    batches = TrainBatches(store, sequence_length=T, batch_size=1, seed=seed, fraction=fraction)
    return [int(batches.windows(step)[0]) for step in range(batches.windows_per_epoch)]

  n = store.num_windows("train", T)
  third, other, half = used(0, 1 / 3), used(1, 1 / 3), used(0, 0.5)
  assert len(third) == n // 3
  assert third != other
  assert set(third) == set(other) < set(half)
  assert len(used(0, 1e-9)) == 1
  # A fraction is sampled from the entire data.
  assert 0.35 < np.mean(third) / n < 0.65


def test_the_same_on_any_number_of_hosts(store):
  whole = TrainBatches(store, sequence_length=T, batch_size=8, seed=0)
  for hosts in (1, 2, 4):
    parts = [
      TrainBatches(store, sequence_length=T, batch_size=8, seed=0, rows=rows) for rows in np.split(np.arange(8), hosts)
    ]
    for step in (0, 1, 70, 10**6):
      read = [part(step) for part in parts]
      for name, array in whole(step).items():
        assert len(read[0][name]) == 8 // hosts
        np.testing.assert_array_equal(np.concatenate([batch[name] for batch in read]), array)


def test_resumes_at_any_step(store):
  first = TrainBatches(store, sequence_length=T, batch_size=8, seed=0)
  run = [first(step)["tokens"] for step in range(150)]
  for step in (149, 64, 63, 0, 100):
    again = TrainBatches(store, sequence_length=T, batch_size=8, seed=0)
    np.testing.assert_array_equal(again(step)["tokens"], run[step])


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("limit", [None, 5, 10**6])
def test_evaluation_reads_every_target_once(store, hosts, limit):
  parts = [
    list(evaluation_batches(store, "test", sequence_length=T, batch_size=4, limit=limit, rows=rows))
    for rows in np.split(np.arange(4), hosts)
  ]
  assert len({len(part) for part in parts}) == 1
  rows = {name: [] for name in ("tokens", "targets", "weights")}
  for batches in zip(*parts):
    for name in rows:
      rows[name] += [batch[name] for batch in batches]
      assert all(batch[name].shape == (4 // hosts, T) for batch in batches)
  rows = {name: np.concatenate(arrays) for name, arrays in rows.items()}
  windows = min(limit or 10**9, store.num_windows("test", T))
  tokens, weights = store.windows("test", np.arange(windows), T)
  np.testing.assert_array_equal(rows["tokens"][:windows], tokens[:, :-1])
  np.testing.assert_array_equal(rows["targets"][:windows], tokens[:, 1:])
  np.testing.assert_array_equal(rows["weights"][:windows], weights)
  assert rows["weights"][windows:].sum() == 0
  assert len(rows["weights"]) == -(-windows // 4) * 4
  if limit != 5:
    assert rows["weights"].sum() == store.num_tokens("test") - 1


def test_bad_sizes(store):
  def batches(**changed):
    return TrainBatches(store, **{"sequence_length": T, "batch_size": 4, "seed": 0, **changed})

  for changed, message in (
    ({"batch_size": 0}, "batch_size=0"),
    ({"fraction": 0.0}, r"fraction=0\.0"),
    ({"fraction": 1.5}, r"fraction=1\.5"),
    ({"sequence_length": 10**6}, "sequence_length=1000000"),
  ):
    with pytest.raises(InputError, match=message):
      batches(**changed)
  # The error is raised before the first batch is requested.
  with pytest.raises(InputError, match="dev"):
    evaluation_batches(store, "dev", sequence_length=T, batch_size=4)
  with pytest.raises(InputError, match="limit=0"):
    evaluation_batches(store, "test", sequence_length=T, batch_size=4, limit=0)


def test_prefetch_reads_in_order_and_ahead_of_the_consumer(store):
  batches = TrainBatches(store, sequence_length=T, batch_size=4, seed=0)
  with Prefetch(batches, start=7, stop=12) as ahead:
    read = list(ahead)
  assert len(read) == 5
  for step, batch in enumerate(read, 7):
    np.testing.assert_array_equal(batch["tokens"], batches(step)["tokens"])

  requested = []
  ahead = Prefetch(lambda step: requested.append(step) or step, start=3)
  assert next(ahead) == 3
  deadline = time.monotonic() + 10
  while len(requested) < 4 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert requested == [3, 4, 5, 6]  # two batches are ready, and one waits for a free slot
  ahead.close()
  ahead.close()
  assert not ahead._thread.is_alive()
  with pytest.raises(StopIteration):
    next(ahead)


def test_prefetch_raises_the_readers_error():
  def read(step):
    if step == 2:
      raise InputError("the disk is gone")
    time.sleep(0.05)
    return step

  ahead = Prefetch(read)
  assert [next(ahead), next(ahead)] == [0, 1]
  with pytest.raises(InputError, match="the disk is gone"):
    next(ahead)
  assert ahead.waited > 0.02
  assert not ahead._thread.is_alive()
