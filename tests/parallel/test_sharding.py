"""The same numbers on any mesh, and no device with more than its part."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from flax import nnx
from model_variants import draw_parameters

from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.models.loss import byte_nats
from megabyte_jax.parallel import activation_layout
from megabyte_jax.parallel.sharding import batch_sharding, check_mesh, lay_out_gradient, make_mesh, shard_abstract
from megabyte_jax.planning.collectives import collectives
from megabyte_jax.planning.lowering import lower
from megabyte_jax.training import state as training_state
from megabyte_jax.training.state import abstract_state, initial_state

assert jax.device_count() == 8


def level(patch_size, width, layers=2, **options):
  return Level(patch_size=patch_size, width=width, num_layers=layers, num_heads=4, **options)


MODELS = {
  "two levels": MegabyteConfig(context=32, levels=(level(4, 64), level(1, 16)), dropout=0.0),
  "cross-patch": MegabyteConfig(
    context=32, levels=(level(4, 64, conv_filters=(3,)), level(1, 16, rotary=True, cross_patch=4)), dropout=0.0
  ),
  "three levels": MegabyteConfig(context=64, levels=(level(8, 64, 1), level(2, 16, 1), level(1, 8, 1)), dropout=0.0),
  "transformer": MegabyteConfig(context=16, levels=(level(1, 16),), dropout=0.0),
  "modern": MegabyteConfig(
    context=32,
    levels=(level(4, 64, rotary=True), level(1, 16, rotary=True)),
    norm="rmsnorm",
    activation="swiglu",
    qk_norm=True,
    tied_output=False,
    dropout=0.0,
  ),
  "perceiver ar": PerceiverARConfig(
    context=32, latents=8, width=32, num_layers=2, num_heads=4, rotary=True, dropout=0.0
  ),
}
BATCH = 8


def mesh_of(name):
  """`fsdp4 tensor2` and the like; `1` is a single device."""
  if name == "1":
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])
  sizes = {word.rstrip("0123456789"): int(word.lstrip("abcdefghijklmnopqrstuvwxyz")) for word in name.split()}
  return make_mesh(MeshConfig(**{"data": 1, **sizes}))


def config_for(model):
  return Config(model=model, batch_size=BATCH, num_steps=10)


# -- Initial parameters --


@functools.cache
def state_on(mesh):
  return initial_state(config_for(MODELS["two levels"]), mesh_of(mesh))


@pytest.mark.parametrize(
  ("model", "mesh"),
  [
    (MegabyteConfig(context=16, levels=(level(4, 64, 1),), dropout=0.0), "fsdp4 tensor2"),
    *(
      pytest.param(MODELS["two levels"], mesh, marks=pytest.mark.slow)
      for mesh in ("fsdp4 tensor2", "data8", "fsdp8", "data2 seq4")
    ),
  ],
)
def test_initial_parameters_are_the_same_on_any_mesh(full_compile, model, mesh):
  """To the bit, as a run compiles them, until jaxlib 0.11.0; then but for roundings: XLA for CPUs may since compute the
  end of a part of an array otherwise than the middle of the whole.
  """

  def parameters_on(name):
    program = jax.jit(lambda: initial_state(config_for(model), mesh_of(name)).parameters)
    return program.lower().compile(full_compile)()

  spread, whole = parameters_on(mesh), parameters_on("1")
  to_the_bit = jaxlib.version.__version_info__[:3] <= (0, 11, 0)
  assert len(jax.tree.leaves(spread)[0].sharding.device_set) == 8
  drawn = jax.tree.leaves(whole)
  for part, one in zip(jax.tree.leaves(spread), drawn, strict=True):
    np.testing.assert_allclose(part, one, rtol=0, atol=0 if to_the_bit else 1e-6 * model.init_std)
  assert len({float(leaf.ravel()[0]) for leaf in drawn if leaf.std() > 0}) == sum(
    bool(leaf.std() > 0) for leaf in drawn
  )


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_is_spread(name):
  _, abstract = abstract_model(MODELS[name])
  spread = 0
  laid_out = shard_abstract(abstract, parameter_info(MODELS[name]), mesh_of("fsdp4 tensor2"))
  for path, leaf in jax.tree_util.tree_leaves_with_path(laid_out):
    where = jax.tree_util.keystr(path, simple=True, separator=".")
    if where.endswith(".embedder.output"):  # as the table
      assert 4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size, where
    if where.endswith("kernel") and "conv" not in where:
      spread += 1
      assert 8 * np.prod(leaf.sharding.shard_shape(leaf.shape)) == leaf.size, where
  assert spread >= 4


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4 tensor2"])
def test_no_device_holds_a_whole_sharded_array(mesh):
  state = state_on(mesh)
  sizes = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path((state.parameters, state.opt_state)):
    parts = {shard.data.size for shard in leaf.addressable_shards}
    assert len(parts) == 1
    sizes[jax.tree_util.keystr(path, simple=True, separator=".")] = parts.pop() / leaf.size
  matrices = [name for name in sizes if name.endswith(("kernel", "from_parent", "table", "pad"))]
  assert len(matrices) == 3 * (2 * 4 + 1 + 2 * 2)  # parameters and two moments: blocks, from_parent, table and pad
  per_device = 1 / 8
  whole = [name for name in matrices if sizes[name] > (per_device if "kernel" in name else 1 / 4)]
  assert not whole
  total = sum(leaf.size for leaf in jax.tree.leaves(state.parameters))
  held = sum(leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state.parameters))
  assert held < 0.2 * total


# -- Loss and gradient --


@functools.cache
def loss_and_gradient(name, mesh):
  """Of random parameters, as NumPy, computed on `mesh`."""
  model, mesh = MODELS[name], mesh_of(mesh)
  graph, abstract = abstract_model(model)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_abstract(abstract, parameter_info(model), mesh))
  parameters = jax.device_put(jax.tree.map(np.asarray, draw_parameters(model)), shardings)
  rng = np.random.default_rng(1)
  x_BT = jax.device_put(rng.integers(0, 256, (BATCH, model.context), np.uint8), batch_sharding(mesh))

  def loss(parameters, x_BT):
    nats_BT, scored_BT = byte_nats(nnx.merge(graph, parameters), x_BT)
    return jnp.sum(nats_BT) / jnp.sum(scored_BT)

  with jax.set_mesh(mesh):
    value, gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))(parameters, x_BT)
  return float(value), jax.tree.map(np.asarray, gradient)


FEW = [
  ("cross-patch", "fsdp2 seq2 tensor2"),  # with convolutions, which XLA splits wrongly there if they are its own
  ("perceiver ar", "fsdp2 seq2 tensor2"),
]
ALL_MESHES = [
  "data8",
  "fsdp8",
  "seq8",
  "data2 tensor4",
  "data2 seq4",
  "fsdp4 tensor2",
  "fsdp2 seq2 tensor2",
  "data2 fsdp2 seq2",
]
MANY = [(name, mesh) for name in MODELS for mesh in ALL_MESHES if (name, mesh) not in FEW]


@pytest.mark.parametrize(
  ("name", "mesh"),
  [
    *FEW,
    *(pytest.param(*case, marks=pytest.mark.slow) for case in MANY),
  ],
)
def test_loss_and_gradient_are_those_of_one_device(name, mesh):
  value, gradient = loss_and_gradient(name, mesh)
  expected_value, expected = loss_and_gradient(name, "1")
  assert value == pytest.approx(expected_value, rel=1e-6)
  for (path, leaf), other in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(gradient), strict=True):
    scale = np.abs(leaf).max()
    assert scale > 0, path
    np.testing.assert_allclose(other, leaf, rtol=2e-4, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))


def test_asking_for_a_gradients_layout_moves_nothing(monkeypatch):
  monkeypatch.setattr(activation_layout, "platform", lambda: "gpu")
  model, mesh = MODELS["two levels"], mesh_of("fsdp4 tensor2")
  infos = parameter_info(model)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_abstract(abstract_model(model)[1], infos, mesh))
  gradient = jax.device_put(jax.tree.map(np.asarray, draw_parameters(model)), shardings)
  with jax.set_mesh(mesh):
    program = jax.jit(lambda gradient: lay_out_gradient(gradient, infos), out_shardings=shardings)
    laid_out, lowered = program(gradient), program.lower(gradient)
    asked = len(re.findall(r"custom_call @LayoutConstraint", lowered.as_text()))
    assert asked == len(jax.tree.leaves(gradient))
    assert not collectives(lowered.compile().as_text())
  jax.tree.map(np.testing.assert_array_equal, laid_out, gradient)


def test_a_training_step_asks_for_the_layout_of_its_gradients(monkeypatch):
  asked = []
  monkeypatch.setattr(training_state, "lay_out_gradient", lambda gradient, infos: asked.append(infos) or gradient)
  lower(dataclasses.replace(config_for(MODELS["transformer"]), seed=77), mesh_of("fsdp8"), "train")
  assert asked == [parameter_info(MODELS["transformer"])]


# -- Meshes that do not fit --


@dataclasses.dataclass(frozen=True)
class Gpu:
  """As much of a GPU as laying out a mesh looks at; XLA numbers the hosts as slices."""

  id: int
  process_index: int
  slice_index: int
  device_kind: str = "NVIDIA H100 80GB HBM3"
  platform: str = "gpu"


@pytest.mark.parametrize(
  ("sizes", "replicas_are_hosts"),
  [({"data": 1, "fsdp": -1}, False), ({"data": 2, "fsdp": 16}, False), ({"data": 4, "fsdp": 8}, True)],
)
def test_any_mesh_of_gpus_on_several_hosts(sizes, replicas_are_hosts):
  gpus = [Gpu(8 * host + i, 8 * host + i, host) for host in range(4) for i in range(8)]
  mesh = make_mesh(MeshConfig(**sizes), gpus[::-1])
  assert [gpu.id for gpu in mesh.devices.ravel()] == list(range(32))
  if replicas_are_hosts:
    assert [{gpu.slice_index for gpu in replica.flat} for replica in mesh.devices] == [{0}, {1}, {2}, {3}]


def test_one_size_may_be_left_open():
  assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "seq": 1, "tensor": 1}
  assert dict(make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2)).shape) == {"data": 1, "fsdp": 4, "seq": 1, "tensor": 2}


@pytest.mark.parametrize(
  ("mesh", "message"),
  [
    (MeshConfig(data=3), r"does not fit 8 devices: the sizes must multiply to 8; data=8 would fit; -1 takes what is"),
    (MeshConfig(data=16), r"does not fit 8 devices.*; data=8 would fit"),
    (
      MeshConfig(data=-1, tensor=3),
      r"the fixed ones multiply to 3; tensor=1 or tensor=2 or tensor=4 or tensor=8 would",
    ),
    (MeshConfig(data=2, fsdp=2), r"multiply to 8; data=4 or fsdp=4 or seq=2 or tensor=2 would fit"),
    (MeshConfig(data=3, fsdp=3), r"each must be one of \[1, 2, 4, 8\]"),
  ],
)
def test_sizes_that_do_not_multiply(mesh, message):
  with pytest.raises(ConfigError, match=message) as error:
    make_mesh(mesh)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "mesh", "batch", "message"),
  [
    (
      "two levels",
      "data8",
      12,
      r"batch_size .* is 12, which mesh\.data \* mesh\.fsdp = 8 .*\[1, 2, 4\], or .*devices, .*batch_size=8 or 16",
    ),
    ("two levels", "tensor8", 8, r"levels\[0\]\.num_heads is 4, which mesh\.tensor = 8 does not divide.*\[1, 2, 4\]"),
    ("cross-patch", "seq8", 8, None),
    ("perceiver ar", "seq8", 8, r"mesh\.seq is 8, but PerceiverAR's sequences are not spread; set it to 1"),
    ("perceiver ar", "tensor8", 8, r"num_heads is 4, which mesh\.tensor = 8 does not divide"),
  ],
)
def test_meshes_that_do_not_divide_the_model_name_sizes_that_do(name, mesh, batch, message):
  if message is None:
    check_mesh(mesh_of(mesh), MODELS[name], batch)
    return
  with pytest.raises(ConfigError, match=message) as error:
    check_mesh(mesh_of(mesh), MODELS[name], batch)
  assert "\n" not in str(error.value)


def test_a_mesh_without_some_axes():
  """A mesh of the user's own may have `data` alone: parameters are then on every device."""
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  model = MODELS["two levels"]
  abstract = shard_abstract(abstract_model(model)[1], parameter_info(model), mesh)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(abstract))


def test_patches_that_cannot_be_spread():
  model = MegabyteConfig(context=12, levels=(level(4, 64), level(1, 16)))
  with pytest.raises(ConfigError, match=r"number of patches .* is 3, which mesh\.seq = 8 .* could be \[1\]"):
    abstract_state(config_for(model), mesh_of("seq8"))
