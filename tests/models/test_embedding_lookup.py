"""The lookup of bytes is differentiated forwards and backwards, mapped and spread, always as a plain lookup is."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from megabyte_jax.config import MeshConfig
from megabyte_jax.models.layers.embedding_lookup import lookup, product_with_table
from megabyte_jax.parallel.sharding import make_mesh

TABLE = jax.random.normal(jax.random.key(0), (256, 8))
BYTES = jax.random.randint(jax.random.key(1), (4, 5, 7), 0, 256)
DTYPES = (jnp.float32, jnp.bfloat16)
equal = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def loss(table, bytes_, dtype=jnp.float32):
  """Not linear, so that second derivatives are not zero."""
  return jnp.sum(jnp.sin(lookup(table, bytes_, dtype).astype(jnp.float32)))


def plain(table, bytes_):
  return jnp.sum(jnp.sin(table[bytes_]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_a_product_with_float32_sums(dtype):
  gradient = jax.random.normal(jax.random.key(2), (*BYTES.shape, 8), dtype)
  _, pull_back = jax.vjp(lambda table: lookup(table, BYTES, dtype), TABLE)
  one_hot = jax.nn.one_hot(BYTES, 256, dtype=dtype)
  expected = jnp.einsum("...V,...d->Vd", one_hot, gradient, preferred_element_type=jnp.float32)
  np.testing.assert_array_equal(pull_back(gradient)[0], expected, strict=True)
  program = jax.jit(jax.grad(functools.partial(loss, dtype=dtype))).lower(TABLE, BYTES).as_text()
  assert "scatter" not in program and "dot_general" in program


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_mode_gives_the_rows_of_the_tangent(dtype):
  tangent = jax.random.normal(jax.random.key(2), TABLE.shape)
  rows, rows_of_tangent = jax.jvp(lambda table: lookup(table, BYTES, dtype), (TABLE,), (tangent,))
  np.testing.assert_array_equal(rows, TABLE[BYTES].astype(dtype), strict=True)
  np.testing.assert_array_equal(rows_of_tangent, tangent[BYTES].astype(dtype), strict=True)


@pytest.mark.parametrize("outer", [jax.jvp, "grad"])
def test_hessian_vector_products(outer):
  v = jax.random.normal(jax.random.key(2), TABLE.shape)

  def product(f):
    if outer == "grad":
      return jax.grad(lambda table: jnp.sum(jax.grad(f)(table, BYTES) * v))(TABLE)
    return jax.jvp(lambda table: jax.grad(f)(table, BYTES), (TABLE,), (v,))[1]

  equal(*(jax.jit(lambda f=f: product(f))() for f in (loss, plain)))


@pytest.mark.parametrize("axes", [(None, 0), (0, None), (0, 0), (None, 2), (2, None)])
def test_gradients_of_each_row_or_table(axes):
  tables = jnp.stack([TABLE, 2 * TABLE, 3 * TABLE, 4 * TABLE], axis=axes[0] or 0) if axes[0] is not None else TABLE
  made, expected = (jax.jit(jax.vmap(jax.grad(f), axes))(tables, BYTES) for f in (loss, plain))
  equal(made, expected)


@pytest.mark.parametrize("check", [True, False])
def test_gradients_within_shard_map_are_summed_over_devices(check):
  mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

  def total(table, bytes_):
    return jax.lax.psum(loss(table, bytes_), "data")

  spread = jax.shard_map(total, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check)
  (made, gradient), (expected, expected_gradient) = (
    jax.jit(jax.value_and_grad(f))(TABLE, BYTES) for f in (spread, plain)
  )
  equal(made, expected, rtol=1e-4)
  equal(gradient, expected_gradient)


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "seq": 4}, {"fsdp": 8}])
def test_nothing_need_be_traced_under_a_mesh(axes):
  with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1} | axes), jax.devices()[: math.prod(axes.values())])):
    bytes_ = jnp.tile(BYTES, (8, 8))
    equal(lookup(TABLE, bytes_, jnp.float32), TABLE[bytes_])
    equal(
      jax.grad(lambda table: jnp.sum(lookup(table, bytes_, jnp.float32)))(TABLE).sum(), bytes_.size * TABLE.shape[1]
    )


HIDDEN = jax.random.normal(jax.random.key(3), (4, 5, 8))


def of_product(h, table):
  return jnp.sum(jnp.sin(product_with_table(h, table)))


def of_plain_product(h, table):
  return jnp.sum(jnp.sin(jnp.einsum("...d,Vd->...V", h, table, precision="highest")))


def test_the_product_with_the_table_is_differentiated_as_a_plain_one():
  """Backwards, forwards, twice, and mapped over rows."""

  def results(f, h, table):
    return {
      "backwards": jax.value_and_grad(f, (0, 1))(h, table),
      "forwards": jax.jvp(f, (h, table), (jnp.ones_like(h), jnp.cos(table)))[1],
      "twice": jax.grad(lambda h: jnp.sum(jax.grad(f)(h, table) ** 2))(h),
      "mapped": jax.vmap(jax.grad(f), in_axes=(0, None))(h, table),
    }

  made, expected = (jax.jit(functools.partial(results, f))(HIDDEN, TABLE) for f in (of_product, of_plain_product))
  jax.tree.map(equal, made, expected)


def test_gradients_of_the_product_with_the_table_have_operands_of_the_compute_dtype():
  """The logits are float32, and so is what comes back to them; the products of the gradients are not."""
  h, table = (a.astype(jnp.bfloat16) for a in (HIDDEN, TABLE))
  assert product_with_table(h, table).dtype == jnp.float32
  program = jax.jit(jax.grad(of_product, (0, 1))).lower(h, table).as_text()
  products = [line for line in program.splitlines() if "dot_general" in line]
  assert len(products) == 3 and not [line for line in products if "f32>, tensor" in line]
  made, exact = jax.grad(of_product, (0, 1))(h, table), jax.grad(of_product, (0, 1))(HIDDEN, TABLE)
  for a, b in zip(made, exact, strict=True):
    assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.02 * jnp.linalg.norm(b)
