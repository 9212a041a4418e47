"""Kernels between matrix products, step by step on a CPU, against the plain layers, also on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from megabyte_jax import Level, MegabyteConfig, byte_nats, make_model
from megabyte_jax.config import MeshConfig
from megabyte_jax.models.kernels import qk_norm_rotary, rms_norm_swiglu
from megabyte_jax.models.layers import block
from megabyte_jax.parallel.activation_layout import AXES
from megabyte_jax.parallel.sharding import make_mesh


def norm_with(scale):
  norm = nnx.RMSNorm(scale.shape[-1], epsilon=1e-5, rngs=nnx.Rngs(0))
  norm.scale[...] = scale
  return norm


def drawn(*shapes):
  return [
    jax.random.normal(key, shape)
    for key, shape in zip(jax.random.split(jax.random.key(0), len(shapes)), shapes, strict=True)
  ]


def results_and_gradients(function, *arguments):
  """What the function returns, and the gradients of a sum in which every number weighs something else."""

  def weighted(*arguments):
    results = function(*arguments)
    weights = (jnp.cos(jnp.arange(result.size, dtype=jnp.float32)).reshape(result.shape) for result in results)
    return sum(jnp.sum(jnp.sin(result) * weight) for result, weight in zip(results, weights, strict=True)), results

  gradients, results = jax.jit(jax.grad(weighted, tuple(range(len(arguments))), has_aux=True))(*arguments)
  return [*results, *gradients]


def assert_equal(ours, exact):
  for a, b in zip(ours, exact, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.max(jnp.abs(b))))


def both_norms(width, interpret=True):
  def ours(x, scale):
    return rms_norm_swiglu.rms_norm(x, norm_with(scale), interpret=interpret)

  return ours, lambda x, scale: (x, norm_with(scale)(x))


def both_turns(slots, head_width, normed):
  slots_M = jnp.arange(slots)

  def norms(scales):
    return (norm_with(scales[0]), norm_with(scales[1])) if normed else None

  def ours(q, k, scales):
    return qk_norm_rotary.qk_norm_rotary(q, k, block.angles(slots_M, head_width), norms(scales), interpret=True)

  def plain(q, k, scales):
    if normed:
      q, k = (norm(x) for norm, x in zip(norms(scales), (q, k), strict=True))
    return block.rotate(q, slots_M), block.rotate(k, slots_M)

  return ours, plain


def both_gates():
  return (
    lambda hidden: (rms_norm_swiglu.swiglu(hidden, True),),
    lambda hidden: (jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :],),
  )


@pytest.mark.parametrize("width", [384, 80])
def test_norms_equal_the_layer(width):
  x, scale = drawn((2, 16, 32, width), (width,))
  ours, plain = both_norms(width)
  assert_equal(results_and_gradients(ours, x, 1 + scale / 4), results_and_gradients(plain, x, 1 + scale / 4))


@pytest.mark.parametrize(("spans", "slots", "normed"), [(16, 4, True), (1, 64, True), (4, 16, False)])
def test_qk_norm_rotary_equal_the_layers(spans, slots, normed):
  q, k, scales = drawn((1, spans, slots, 3, 32), (1, spans, slots, 3, 32), (2, 32))
  ours, plain = both_turns(slots, 32, normed)
  assert_equal(results_and_gradients(ours, q, k, 1 + scales / 4), results_and_gradients(plain, q, k, 1 + scales / 4))


@pytest.mark.parametrize("hidden", [256, 88])
def test_the_gate_equals_its_definition(hidden):
  (x,) = drawn((1, 8, 8, 2, hidden))
  ours, plain = both_gates()
  assert_equal(results_and_gradients(ours, x), results_and_gradients(plain, x))


@pytest.mark.parametrize("spans", [1, 16])
def test_a_mesh_changes_nothing(spans):
  slots = 256 // spans
  x, scale, q, k, scales, hidden = drawn(
    (2, spans, slots, 512),
    (512,),
    *[(2, spans, slots, 4, 32)] * 2,
    (2, 32),
    (2, spans, slots, 2, 64),
  )

  def ours(x, scale, q, k, scales, hidden):
    return *both_norms(512)[0](x, scale), *both_turns(slots, 32, True)[0](q, k, scales), *both_gates()[0](hidden)

  arguments = (x, 1 + scale / 4, q, k, 1 + scales / 4, hidden)
  alone = results_and_gradients(ours, *arguments)
  with jax.set_mesh(make_mesh(MeshConfig(data=2, seq=2, tensor=2))):
    spread = results_and_gradients(ours, *arguments)
  assert_equal(spread, alone)


def test_what_kernels_cannot_do_is_said(monkeypatch):
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  assert "not an NVIDIA GPU" in rms_norm_swiglu.norm_obstacle(shape((2, 16, 32, 384)))
  monkeypatch.setattr(rms_norm_swiglu, "platform", lambda: "gpu")
  assert rms_norm_swiglu.norm_obstacle(shape((2, 16, 32, 384))) == ""
  assert "rows do not divide" in rms_norm_swiglu.norm_obstacle(shape((1, 1, 2, 384)))
  assert "width 100" in rms_norm_swiglu.norm_obstacle(shape((2, 16, 32, 100)))
  assert "needs bfloat16" in rms_norm_swiglu.norm_obstacle(jax.ShapeDtypeStruct((2, 16, 32, 384), jnp.float32))
  assert qk_norm_rotary.qk_norm_rotary_obstacle(shape((1, 16, 8, 2, 64))) == ""
  assert "single slot" in qk_norm_rotary.qk_norm_rotary_obstacle(shape((64, 1, 1, 2, 64)))
  assert "head_dim 48" in qk_norm_rotary.qk_norm_rotary_obstacle(shape((1, 16, 8, 2, 48)))
  assert "12 slots" in qk_norm_rotary.qk_norm_rotary_obstacle(shape((1, 16, 12, 2, 64)))
  assert rms_norm_swiglu.swiglu_obstacle(shape((2, 16, 8, 2, 88))) == ""
  assert "multiple of 8" in rms_norm_swiglu.swiglu_obstacle(shape((2, 16, 8, 2, 84)))
  with jax.set_mesh(make_mesh(MeshConfig(data=2, seq=2, tensor=2))):
    assert rms_norm_swiglu.norm_obstacle(shape((2, 16, 32, 384))) == ""
    assert "do not divide axis 0" in rms_norm_swiglu.norm_obstacle(shape((3, 16, 32, 384)))
    assert "do not divide axis 3" in qk_norm_rotary.qk_norm_rotary_obstacle(shape((2, 16, 8, 3, 64)))


def lowered_for_a_gpu(config):
  """The program of a model's loss and gradients for a GPU, which needs none."""
  gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
  mesh = AbstractMesh((1,) * 4, AXES, axis_types=(AxisType.Auto,) * 4, abstract_device=gpu)
  with jax.sharding.use_abstract_mesh(mesh):
    graph, parameters = nnx.split(nnx.eval_shape(lambda: make_model(config, nnx.Rngs(0))))

    def mean_nats(parameters, x_BT):
      return byte_nats(nnx.merge(graph, parameters), x_BT)[0].mean()

    x_BT = jax.ShapeDtypeStruct((8, config.context), jnp.int32)
    return jax.jit(jax.grad(mean_nats)).trace(parameters, x_BT).lower(lowering_platforms=("cuda",)).as_text()


def modern(**options):
  levels = tuple(Level(patch_size=p, width=w, num_layers=1, num_heads=2, rotary=True) for p, w in ((32, 128), (1, 64)))
  choices = {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "bias": False, "compute_dtype": "bfloat16"}
  return MegabyteConfig(context=1024, levels=levels, dropout=0.0, **(choices | options))


KERNELS = ("rms_norm", "rms_norm_gradient", "qk_norm_rotary", "qk_norm_rotary_gradient", "swiglu_gradient")


def test_models_with_the_modern_recipe_take_them_on_a_gpu():
  program = lowered_for_a_gpu(modern())
  missing = [
    kernel for kernel in (*KERNELS, "forward_kernel", "backward_kernel") if f'name = "{kernel}"' not in program
  ]
  assert not missing, missing


@pytest.mark.parametrize("options", [{"attention": "xla"}, {"compute_dtype": "float32"}])
def test_models_without_kernels_take_none(options):
  program = lowered_for_a_gpu(modern(**options))
  assert not any(f'name = "{kernel}"' in program for kernel in KERNELS)
