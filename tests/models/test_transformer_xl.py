"""Transformer-XL against its equations, and what its memory may and may not do."""

import dataclasses
import functools

import count_products
import jax
import jax.numpy as jnp
import numpy as np
import numpy_transformer_xl
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from model_variants import draw_parameters

from megabyte_jax.config import ConfigError, TransformerXLConfig
from megabyte_jax.models import flops
from megabyte_jax.models.build import abstract_model, initial_parameters, parameter_info, trained_model

SIZES = {"context": 4, "vocab_size": 13, "width": 8, "num_layers": 2, "num_heads": 2, "dropout": 0.0}
CONFIGS = {
  "original": TransformerXLConfig(**SIZES, memory_length=6),
  "short_memory": TransformerXLConfig(**SIZES, memory_length=3, untie=True, head_dim=6, ff_width=10, clamp_length=4),
  "modern": TransformerXLConfig(
    **SIZES,
    memory_length=5,
    same_length=True,
    norm_place="pre",
    norm="rmsnorm",
    bias=False,
    qk_norm=True,
    activation="swiglu",
    scaled_embeddings=False,
    logit_scale="width",
    tied_output=False,
  ),
}
TOKENS = np.random.default_rng(0).integers(0, 13, 15)  # three segments and a part


@functools.cache
def parameters(name):
  return draw_parameters(CONFIGS[name])


def model(name, **changes):
  graph, _ = abstract_model(dataclasses.replace(CONFIGS[name], **changes))
  return nnx.merge(graph, parameters(name))


def in_segments(model, x_BT):
  """Logits of documents that are read segment after segment, and the memory afterwards."""
  memory, parts = model.empty_memory(len(x_BT)), []
  for start in range(0, x_BT.shape[1], model.config.context):
    logits, memory, _ = model.segment(memory, x_BT[:, start : start + model.config.context])
    parts.append(logits)
  return jnp.concatenate(parts, axis=1), memory


@functools.cache
def compiled(name, **changes):
  """The jitted `in_segments` of a model; x_BT has 16 rows, so that all tests share one compilation."""
  one = model(name, **changes)  # made outside of the trace: its parameters are kept for other tests
  run = jax.jit(lambda x_BT: in_segments(one, x_BT))
  return lambda x_BT: jax.tree.map(lambda a: a[: len(x_BT)], run(np.resize(x_BT, (16, x_BT.shape[1]))))


@pytest.mark.parametrize("name", CONFIGS)
def test_equations_and_decoding(name):
  expected = numpy_transformer_xl.logits(parameters(name), CONFIGS[name], TOKENS)
  np.testing.assert_allclose(compiled(name)(TOKENS[None])[0][0], expected, rtol=1e-4, atol=1e-4)
  one = model(name)
  step = jax.jit(one.decode_byte)
  state, previous_B = jax.jit(one.start_bytes, static_argnums=0)(1), jnp.zeros(1, jnp.int32)
  for token, logits in zip(TOKENS, expected, strict=True):
    state, decoded = step(state, previous_B)
    np.testing.assert_allclose(decoded[0], logits, rtol=1e-4, atol=1e-4)
    previous_B = jnp.full(1, token)


def test_prompts_of_any_length_are_read_as_they_are_decoded():
  one = model("original")
  expected = compiled("original")(TOKENS[None])[0][0]
  read = jax.jit(lambda x, n: one.decode_patch(one.read_prompt(x, n), lambda logits, position: jnp.full(1, 7)))
  for length in (0, 1, 4, 5, 8, 11, 14):
    after, token, logits = read(jnp.where(jnp.arange(15) < length, TOKENS, 1)[None], length)
    np.testing.assert_allclose(logits[0, 0], expected[length], rtol=1e-4, atol=1e-4)
    assert token[0, 0] == after.token_B[0] == 7 and after.position == length + 1


@pytest.mark.parametrize("name", ["original", "modern"])
def test_a_token_changes_what_comes_after_it_alone_and_the_memory_carries_that_on(name):
  x_BT = np.repeat(TOKENS[None], 16, axis=0)
  for place in range(15):
    x_BT[place + 1, place] = (x_BT[place + 1, place] + 1) % 13
  logits = np.asarray(compiled(name)(x_BT)[0])
  for place in range(15):
    changed = np.abs(logits[place + 1] - logits[0]).max(axis=-1)
    assert not changed[: place + 1].any()
    assert (changed[place + 1 : place + 5] > 1e-5).all()  # within the segment and in the next one


def test_a_fresh_row_knows_nothing_of_what_was_before():
  one = model("original")
  first, later = (jnp.asarray(np.repeat(TOKENS[None, part], 2, axis=0)) for part in (slice(0, 4), slice(4, 12)))
  _, memory = compiled("original")(later)
  step = jax.jit(one.segment)
  logits, after, extra = step(memory, first, fresh_B=jnp.array([True, False]))
  alone, memory_alone, _ = step(one.empty_memory(2), first, fresh_B=jnp.array([False, False]))
  np.testing.assert_array_equal(logits[0], alone[0])
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[0], b[0]), after, memory_alone)
  assert np.abs(logits[1] - alone[1]).max() > 1e-3 and after.filled_B.tolist() == [4, 6] and extra == 0
  np.testing.assert_allclose(jax.jit(one.__call__)(first), alone, rtol=1e-5, atol=1e-6)


def test_no_gradient_reaches_the_memory():
  _, memory = compiled("original")(TOKENS[None, :8])
  graph, _ = abstract_model(CONFIGS["original"])

  @jax.jit
  @jax.grad
  def gradient(arguments):
    inputs, parameters = arguments
    logits, after, _ = nnx.merge(graph, parameters).segment(memory._replace(inputs_BLMD=inputs), TOKENS[None, 8:12])
    return jnp.sum(logits**2) + jnp.sum(after.inputs_BLMD)

  of_memory, of_parameters = gradient((memory.inputs_BLMD, parameters("original")))
  assert not of_memory.any() and of_parameters["embedder"]["table"].any()


def test_a_memory_of_everything_makes_segments_one_long_pass():
  whole, _ = compiled("original", context=15, memory_length=0)(TOKENS[None])
  np.testing.assert_allclose(compiled("original", memory_length=12)(TOKENS[None])[0], whole, rtol=1e-4, atol=1e-5)
  assert np.abs(compiled("original")(TOKENS[None])[0] - whole).max() > 1e-3


def test_evaluation_may_have_a_longer_memory():
  config = dataclasses.replace(CONFIGS["original"], evaluation_memory_length=12)
  one = trained_model(config, parameters("original"))
  assert one.empty_memory(1).inputs_BLMD.shape == (1, 2, 12, 8)
  assert config.for_evaluation.for_evaluation == dataclasses.replace(config, memory_length=12)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_and_declared(name):
  config = CONFIGS[name]
  assert config.parameter_count() == sum(leaf.size for leaf in jax.tree.leaves(abstract_model(config)[1]))
  infos = parameter_info(config)
  offsets = [name for name, info in infos.items() if info.kind == "offset"]
  assert offsets == (["blocks.u", "blocks.v"] if config.untie else ["u", "v"])
  assert infos["blocks.key_value.kernel"].axes == ("layers", "width", "projections", "heads", "head_dim")


def test_u_and_v_begin_like_matrices():
  drawn = jax.jit(functools.partial(initial_parameters, CONFIGS["original"]))(jax.random.key(0))
  assert 0.01 < np.std([drawn["u"], drawn["v"]]) < 0.03


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_products(name):
  config, one = CONFIGS[name], model(name)
  shape = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  found = count_products.operations(lambda x: one.segment(one.empty_memory(1), x)[0], shape)
  heads = config.num_heads * config.level.heads[1]
  of_distances = 2 * config.num_layers * (config.memory_length + 4) * config.width * heads  # shared by all rows
  assert found - of_distances == 4 * flops.flops_per_byte(config, attention="dense")
  causal, whole = (sum(config.flops_breakdown(kind).values()) for kind in ("causal", "whole"))
  keys = {"original": (8, 10), "short_memory": (5, 7), "modern": (5, 5)}[name]  # seen on average, of M + 4
  per_key = 6 * config.num_layers * heads
  assert [flops.flops_per_byte(config, attention="dense") - a for a in (causal, whole)] == [
    per_key * (config.memory_length + 4 - k) for k in keys
  ]


@pytest.mark.slow
def test_remat_scans_bfloat16_and_dropout():
  _, memory = compiled("original")(TOKENS[None, :8])

  def gradient(**changes):
    graph, _ = abstract_model(dataclasses.replace(CONFIGS["original"], **changes))

    def loss(parameters, key):
      key = key if "dropout" in changes else None
      return jnp.mean(nnx.merge(graph, parameters).segment(memory, TOKENS[None, 8:12], dropout_key=key)[0] ** 2)

    found = jax.jit(jax.grad(loss))
    return [ravel_pytree(found(parameters("original"), jax.random.key(i)))[0] for i in (0, 1)]

  def apart(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)

  plain, _ = gradient()
  assert apart(gradient(remat="full", scan_layers="never")[0], plain) < 1e-5
  assert 1e-4 < apart(gradient(remat="named", compute_dtype="bfloat16")[0], plain) < 0.1
  assert apart(*gradient(dropout=0.3, attention_dropout=0.2)) > 0.1


def test_impossible_settings_are_said():
  for changes, message in (
    ({"memory_length": -1}, "memory_length is -1"),
    ({"memory_length": 0, "same_length": True}, "same_length"),
    ({"width": 9, "num_heads": 3}, "width is 9"),
    ({"attention": "cudnn"}, "attention=cudnn"),
  ):
    with pytest.raises(ConfigError, match=message):
      dataclasses.replace(CONFIGS["original"], **changes)
