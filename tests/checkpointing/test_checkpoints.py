"""Checkpoints: which are kept, found and rejected, and the remains of interrupted saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from cyb_jax.checkpointing.manager import Checkpoints
from cyb_jax.errors import InputError


def abstract(**arrays):
  here = SingleDeviceSharding(jax.devices()[0])
  return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in arrays.items()}


STATE = {"params": jnp.arange(4.0), "step": jnp.zeros((), jnp.int32)}


@pytest.fixture
def saved(tmp_path):
  checkpoints = Checkpoints(tmp_path / "c", keep=2)
  for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, float("nan")), (5, None)):
    checkpoints.save(step, jax.tree.map(lambda x, s=step: x + s, STATE), {"tokens": 10 * step}, loss=loss)
  checkpoints.wait()
  yield checkpoints
  checkpoints.close()


def test_the_newest_and_the_best_are_kept(saved):
  assert saved.steps() == [2, 4, 5]
  assert saved.find("last") == 5
  assert saved.find("best") == 2
  assert saved.find(4) == 4
  with pytest.raises(InputError, match=r"checkpoint: there is no checkpoint 3; give one of 2, 4, 5"):
    saved.find(3)


def test_restore(saved):
  restored = saved.restore(4, abstract(**STATE))
  assert restored.step == 4
  assert restored.meta == {"tokens": 40} == saved.meta(4)
  np.testing.assert_array_equal(restored.state["params"], jnp.arange(4.0) + 4)


@pytest.mark.parametrize(
  ("other", "message"),
  [
    (STATE | {"params": jnp.arange(5.0)}, r"params is float32\[4\], but this config has float32\[5\]"),
    (STATE | {"params": jnp.arange(4)}, r"params is float32\[4\], but this config has int32\[4\]"),
    (STATE | {"more": jnp.zeros(2)}, r"more is missing, but this config has float32\[2\]"),
    ({"step": STATE["step"]}, r"params is float32\[4\], but this config has no such array"),
  ],
)
def test_another_state_is_rejected(saved, other, message):
  with pytest.raises(InputError, match=message):
    saved.restore(5, abstract(**other))


def test_no_checkpoint_and_no_best(tmp_path):
  empty = Checkpoints(tmp_path / "empty")
  with pytest.raises(InputError, match="contains no finished checkpoint"):
    empty.find("last")
  empty.save(1, STATE, {})
  empty.wait()
  with pytest.raises(InputError, match=r"checkpoint: 'best' needs a validation"):
    empty.find("best")
  empty.close()


def test_an_unfinished_save_is_ignored(saved):
  # A kill during a save or a deletion leaves folders with other names.
  (saved.directory / "6.orbax-checkpoint-tmp").mkdir()
  (saved.directory / "unfinished" / "6" / "state").mkdir(parents=True)
  (saved.directory / "unfinished" / "4.deleted" / "state").mkdir(parents=True)
  again = Checkpoints(saved.directory, read_only=True)
  assert again.steps() == [2, 4, 5]
  assert (saved.directory / "unfinished" / "6").exists()  # a training run may be writing
  again.close()
  Checkpoints(saved.directory, keep=2).close()
  assert not (saved.directory / "unfinished").exists()


def files(folder):
  return sorted(p for p in folder.rglob("*") if p.is_file())


def test_any_damage_to_any_file_is_detected(saved):
  folder = saved.directory / "2"
  names = [str(p.relative_to(folder)) for p in files(folder)]
  assert len(names) > 10
  assert saved.damage(2) is None
  for name in names:
    path = folder / name
    whole = path.read_bytes()
    for place in {0, len(whole) // 2, len(whole) - 1}:
      flipped = bytearray(whole)
      flipped[place] ^= 1
      path.write_bytes(flipped)
      found = saved.damage(2)
      assert found is not None, (name, place)
      if name != "checksums.json":  # any of these files may be reported
        assert found == f"{name} was altered"
        assert (saved.damage(2, quick=True) is None) == name.startswith("state/")
    path.write_bytes(whole[:-1])
    expected = "checksums.json was altered" if name == "checksums.json" else f"{name} is {len(whole) - 1} bytes"
    assert saved.damage(2).startswith(expected)
    path.unlink()
    assert saved.damage(2, quick=True) == f"{name} is missing"
    path.write_bytes(whole)
  assert saved.damage(2) is None


def damage(checkpoints, step):
  max(files(checkpoints.directory / str(step) / "state"), key=lambda p: p.stat().st_size).unlink()


def test_a_damaged_checkpoint_is_not_selected(saved):
  damage(saved, 5)
  assert saved.find("last") == 4
  assert saved.find("best") == 2
  with pytest.raises(InputError, match=r"checkpoint: 5 in .* is damaged: state/.* is missing; give another step"):
    saved.find(5)
  damage(saved, 2)
  with pytest.raises(InputError, match=r"checkpoint: 2 in .* is damaged: state/"):
    saved.find("best")
  damage(saved, 4)
  with pytest.raises(
    InputError, match=r"checkpoints: all checkpoints in .* are damaged \(5: state/.*; 4: state/.*; 2: state/"
  ):
    saved.find("last")


def test_damaged_checkpoints_are_moved(saved):
  """Their steps can be saved again, and none of them is kept as the best."""
  for step in (2, 5):
    damage(saved, step)
  again = Checkpoints(saved.directory, keep=1)
  assert again.steps() == [4]
  assert sorted(p.name for p in (saved.directory / "damaged").iterdir()) == ["2", "5"]
  again.save(5, STATE, {"tokens": 50}, loss=2.0)
  again.save(6, STATE, {}, loss=2.5)
  again.save(7, STATE, {}, loss=2.5)
  again.wait()
  assert again.steps() == [5, 7]
  assert again.find("best") == 5
  again.close()
  damage(again, 5)
  Checkpoints(saved.directory).close()
  assert sorted(p.name for p in (saved.directory / "damaged").iterdir()) == ["2", "5", "5.1"]


def test_an_interrupted_deletion_leaves_no_partial_checkpoint(saved, monkeypatch):
  from cyb_jax.checkpointing import disk

  def killed(folder, **_):
    files(folder)[0].unlink()
    raise KeyError("cut short")

  with monkeypatch.context() as patch:
    patch.setattr(disk.shutil, "rmtree", killed)
    saved.save(6, STATE, {})
    with pytest.raises(KeyError):
      saved.wait()
  assert saved.steps() == [2, 5, 6]
  assert all(saved.damage(step) is None for step in saved.steps())


def test_deletion_during_reading_is_not_damage(saved, monkeypatch):
  """A training run continues while its newest checkpoint is checked."""
  reader = Checkpoints(saved.directory, read_only=True)
  look = Checkpoints.damage

  def overtaken(self, step, **options):
    if step == 5:
      saved.save(6, STATE, {})
      saved.save(7, STATE, {})
      saved.wait()
    return look(self, step, **options)

  monkeypatch.setattr(Checkpoints, "damage", overtaken)
  assert reader.find("last") == 7
