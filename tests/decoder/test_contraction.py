"""The product of activations and a matrix, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax.decoder.contraction import contract

SHAPES = {  # axes that are contracted, further axes of the kernel
  "read": ((6,), (2, 3)),
  "write": ((2, 3), (6,)),
  "plain": ((5,), (7,)),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_tensordot(name, dtype):
  inputs, outputs = SHAPES[name]
  rng = np.random.default_rng(0)
  x, kernel, cotangent = (
    jnp.asarray(rng.normal(size=shape), dtype) for shape in ((3, 4, *inputs), (*inputs, *outputs), (3, 4, *outputs))
  )
  count = len(inputs)
  y, pull = jax.vjp(lambda x, kernel: contract(x, kernel, count), x, kernel)
  expected, expected_pull = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, axes=count), x, kernel)
  np.testing.assert_array_equal(y, expected)
  for got, want in zip(pull(cotangent), expected_pull(cotangent)):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=tolerance, atol=tolerance)


def test_under_a_mesh_it_is_tensordot():
  kernel = jnp.zeros((6, 5))
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  with jax.set_mesh(mesh):
    text = str(jax.make_jaxpr(lambda x, kernel: contract(x, kernel, 1))(jnp.zeros((2, 6)), kernel))
  assert "custom_vjp" not in text
  assert "custom_vjp" in str(jax.make_jaxpr(lambda x, kernel: contract(x, kernel, 1))(jnp.zeros((2, 6)), kernel))
