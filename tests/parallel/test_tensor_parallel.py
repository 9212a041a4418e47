"""What heads and hidden layers spread over devices cost, counted in compiled programs with `tensor` alone.

A layer sums activations over devices after attention and after feed-forward, and in the backward pass the gradients
with respect to the inputs of both: four sums, fewer than which there are only where layers are left out. A sum sends an
array 2 (n - 1) / n times from each of n devices. Nothing else may grow with the model.

On GPUs the block is another program (three products, layouts that are asked for). Here it runs on CPUs as well.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_variants import draw_parameters

from megabyte_jax.config import Level, MegabyteConfig, MeshConfig
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.models.layers import block, stack
from megabyte_jax.models.loss import byte_nats
from megabyte_jax.parallel import activation_layout
from megabyte_jax.parallel.sharding import batch_sharding, make_mesh, shard_abstract
from megabyte_jax.planning.collectives import collectives

ROWS, LAYERS = 8, 2
MODERN = {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "bias": False}


@pytest.fixture(params=["cpu", "gpu"])
def form(request, monkeypatch):
  """The form that a block has on this kind of device; without the kernels, which only the device itself can run."""
  for module in (block, stack, activation_layout):
    monkeypatch.setattr(module, "platform", lambda: request.param)
  return request.param


def model(**options):
  rotary = "qk_norm" in options
  size = {"num_layers": LAYERS, "num_heads": 8, "rotary": rotary}
  levels = (Level(patch_size=4, width=64, **size), Level(patch_size=1, width=32, **size))
  return MegabyteConfig(context=64, levels=levels, dropout=0.0, **options)


def mesh_of(**sizes):
  return make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])


def gradient_of(config, mesh):
  """The jitted loss and gradient; and the shapes of its arguments, laid out as in training."""
  graph, parameters = abstract_model(config)
  laid_out = shard_abstract(parameters, parameter_info(config), mesh)
  x_BT = jax.ShapeDtypeStruct((ROWS, config.context), jnp.uint8, sharding=batch_sharding(mesh))

  def loss(parameters, x_BT):
    return byte_nats(nnx.merge(graph, parameters), x_BT)[0].sum()

  shardings = jax.tree.map(lambda leaf: leaf.sharding, laid_out)
  return jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings)), (laid_out, x_BT)


def program(config, mesh):
  """The compiled gradient, as text."""
  with jax.set_mesh(mesh):
    step, shapes = gradient_of(config, mesh)
    return step.lower(*shapes).compile().as_text()


def sent(config, mesh):
  """Bytes that a device sends for a gradient, by kind of collective."""
  found = collectives(program(config, mesh))
  total = dict.fromkeys({one.kind for one in found}, 0.0)
  for one in found:
    total[one.kind] += one.wire_bytes
  return total


def of_sums(config, devices, sums):
  """Bytes that a device sends for so many sums of activations a layer, float32."""
  numbers = sum(
    level.num_layers * spans * slots * level.width
    for level, (spans, slots) in zip(config.levels, config.attention_shapes, strict=True)
  )
  return sums * ROWS * numbers * 4 * 2 * (devices - 1) / devices


@pytest.mark.parametrize(
  ("devices", "options"),
  [
    (8, {"remat": "named"}),
    (2, {"remat": "named", **MODERN}),
    pytest.param(8, {"remat": "none"}, marks=pytest.mark.slow),
    pytest.param(2, {"remat": "none", **MODERN}, marks=pytest.mark.slow),
    pytest.param(8, {"remat": "named", **MODERN}, marks=pytest.mark.slow),
  ],
)
def test_a_layer_sums_activations_twice_in_each_direction(full_compile, form, devices, options):
  config = model(**options)
  found, necessary = sent(config, mesh_of(tensor=devices)), of_sums(config, devices, 4)
  assert set(found) == {"all-reduce"}
  assert necessary <= found["all-reduce"] <= 1.01 * necessary  # beside it, gradients of the scales of q and k


@pytest.mark.slow
def test_only_full_rematerialisation_sends_a_sum_again(full_compile, form):
  config = model(remat="full")
  assert sent(config, mesh_of(tensor=8)) == {"all-reduce": of_sums(config, 8, 5)}


def test_rows_spread_over_devices_send_gradients_alone(full_compile, form):
  """A layout that is asked for must not gather what it is asked for."""
  config = model(remat="named")
  [(kind, size)] = sent(config, mesh_of(data=8)).items()
  parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)[1]))
  assert kind == "all-reduce"
  tables = config.vocab_size * config.levels[-1].width  # summed apart, as the input's and as the output's
  assert size == pytest.approx(2 * 7 / 8 * 4 * (parameters + tables), rel=1e-3)


@pytest.mark.parametrize("form", ["gpu"], indirect=True)
def test_parameters_spread_over_devices_take_no_further_products_and_exchange_no_activations(full_compile, form):
  config = model(remat="named")
  spread, whole = (program(config, mesh) for mesh in (mesh_of(fsdp=2), mesh_of(data=2)))
  assert spread.count(" dot(") == whole.count(" dot(")
  assert {one.kind for one in collectives(spread)} == {"all-gather", "all-reduce"}  # a CPU scatters no sums


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_form_of_gpus_gives_the_same_on_a_mesh(monkeypatch, sizes):
  config = model(remat="named", **MODERN)
  parameters = jax.tree.map(np.asarray, draw_parameters(config))
  x_BT = np.random.default_rng(0).integers(0, 256, (ROWS, config.context), np.uint8)

  def on(mesh):
    with jax.set_mesh(mesh):
      step, shapes = gradient_of(config, mesh)
      value, gradient = step(*jax.device_put((parameters, x_BT), jax.tree.map(lambda leaf: leaf.sharding, shapes)))
    return float(value), jax.tree.map(np.asarray, gradient)

  expected_value, expected = on(mesh_of(data=1))
  for module in (block, stack, activation_layout):
    monkeypatch.setattr(module, "platform", lambda: "gpu")
  value, gradient = on(mesh_of(**sizes))
  assert value == pytest.approx(expected_value, rel=1e-6)
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradient), strict=True):
    scale = np.abs(leaf).max()
    assert scale > 0, path
    np.testing.assert_allclose(other, leaf, rtol=2e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
