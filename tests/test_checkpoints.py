"""Checkpoints: what is kept, what is found, what is refused, what an interrupted save leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from cyb_jax.checkpoints import Checkpoints
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
  with pytest.raises(InputError, match=r"checkpoint: 3 is not there; there are 2, 4, 5"):
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
def test_another_state_is_refused(saved, other, message):
  with pytest.raises(InputError, match=message):
    saved.restore(5, abstract(**other))


def test_none_and_no_best(tmp_path):
  empty = Checkpoints(tmp_path / "empty")
  with pytest.raises(InputError, match="holds no finished checkpoint"):
    empty.find("last")
  empty.save(1, STATE, {})
  empty.wait()
  with pytest.raises(InputError, match=r"checkpoint: 'best' needs a validation"):
    empty.find("best")
  empty.close()


def test_an_unfinished_save_is_not_seen(saved):
  # What orbax leaves when it is killed in mid-save: a folder under a temporary name.
  (saved.directory / "6.orbax-checkpoint-tmp").mkdir()
  again = Checkpoints(saved.directory, read_only=True)
  assert again.steps() == [2, 4, 5]
  again.close()
