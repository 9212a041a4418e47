"""Every parameter of every model declares its kind, its axes and what they are to a product."""

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.checkpoints.arrays import flat_arrays
from megabyte_jax.config import MegabyteConfig
from megabyte_jax.models import build
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.parallel.parameter_info import ParameterInfo, map_with_info


@pytest.mark.parametrize("name", variants.every_variant)
def test_every_parameter_declares_its_axes(name):
  config = variants.VARIANTS[name]
  shapes, infos = flat_arrays(abstract_model(config)[1]), parameter_info(config)
  assert infos.keys() == shapes.keys()
  for parameter, info in infos.items():
    sizes = dict(zip(info.axes, shapes[parameter].shape, strict=True))
    assert len(sizes) == len(info.axes), f"{parameter} has two axes of one name"
    assert info.fan_in == np.prod([sizes[axis] for axis in info.inputs], dtype=int), parameter
    assert bool(info.inputs) == (info.kind in ("matrix", "output", "convolution")), parameter
    assert ("layers" in info.axes) == ("blocks" in parameter), parameter
    assert sizes.get("layers", config.levels[info.level].num_layers) == config.levels[info.level].num_layers


def test_kinds_levels_and_fan_in():
  infos = parameter_info(variants.VARIANTS["modern"])  # patches of 4 bytes, widths 16 and 8, 2 heads
  assert infos["levels.0.embedder.table"] == ParameterInfo("table", ("vocab", "byte_width"))
  assert infos["levels.1.embedder.pad"] == ParameterInfo("pad", ("patch", "byte_width"), level=1)
  assert infos["levels.1.from_parent"] == ParameterInfo("matrix", ("parent_width", "width"), ("parent_width",), 4, 1)
  out = infos["levels.0.decoder.blocks.attention_out.kernel"]
  assert out == ParameterInfo("matrix", ("layers", "heads", "head_dim", "width"), ("heads", "head_dim"), 16)
  assert (out.input_places, out.output_places) == ((1, 2), (3,))
  gate = infos["levels.1.decoder.blocks.ff_in.kernel"]
  assert gate == ParameterInfo("matrix", ("layers", "width", "halves", "hidden"), ("width",), 8, 1)
  assert (gate.input_places, gate.output_places) == ((1,), (3,))
  assert infos["levels.1.decoder.blocks.q_norm.scale"] == ParameterInfo("norm", ("layers", "head_dim"), level=1)
  convolution = parameter_info(variants.VARIANTS["conv"])["levels.0.embedder.convolutions.1.kernel"]
  assert (convolution.kind, convolution.fan_in) == ("convolution", 5 * 4)


@pytest.mark.parametrize(
  ("parameter", "message"),
  [
    (lambda: nnx.Param(jnp.zeros(3)), "parameter forgotten declares neither kind nor axes"),
    (lambda: nnx.Param(jnp.zeros((3, 2)), info=ParameterInfo("bias", ("channels",))), r"forgotten of shape \(3, 2\)"),
  ],
)
def test_a_parameter_that_declares_nothing_is_an_error(monkeypatch, parameter, message):
  family = build.FAMILIES[MegabyteConfig]

  def with_another(config, rngs):
    model = family(config, rngs)
    model.forgotten = parameter()
    return model

  monkeypatch.setitem(build.FAMILIES, MegabyteConfig, with_another)
  with pytest.raises(TypeError, match=message):
    parameter_info(variants.VARIANTS["transformer"])


def test_infos_reach_parameters_moments_and_nothing_else():
  infos = {"a.kernel": ParameterInfo("matrix", ("width", "hidden"), ("width",), 4)}
  tree = {"a": {"kernel": jnp.zeros((4, 2))}}
  moments = {"mu": tree, "count": jnp.int32(0), "kernel": jnp.zeros(3)}
  kinds = map_with_info(lambda _, info: info and info.kind, (tree, moments), infos)
  assert kinds == ({"a": {"kernel": "matrix"}}, {"mu": {"a": {"kernel": "matrix"}}, "count": None, "kernel": None})
  assert jax.tree.structure(tree) == jax.tree.structure(map_with_info(lambda leaf, _: leaf, tree, infos))


def test_a_model_draws_what_nnx_rngs_would_and_another_one_the_second_time():
  config = variants.VARIANTS["transformer"]
  rngs = nnx.Rngs(3)
  made, again = (jax.tree.leaves(nnx.state(build.make_model(config, rngs))) for _ in range(2))
  by_flax = jax.tree.leaves(jax.jit(lambda: nnx.state(build.family_of(config)(config, nnx.Rngs(3)), nnx.Param))())
  for one, other, second in zip(made, by_flax, again, strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-6)
    assert (one == second).all() == (len(np.unique(one)) == 1)  # biases and scales
