"""Initial parameters, dropout, rematerialisation, precision and input lengths of the models."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx
from jax.ad_checkpoint import print_saved_residuals

from megabyte_jax.config import Config, Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models.build import abstract_model, initial_parameters, make_model, parameter_info
from megabyte_jax.models.layers import block as block_module
from megabyte_jax.models.layers import dropout
from megabyte_jax.models.layers.block import activate
from megabyte_jax.models.loss import byte_nats
from megabyte_jax.training.optimizer import make_optimizer
from megabyte_jax.training.state import TrainState, make_train_step


def named(tree):
  """(dotted name, array) of every parameter."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [(".".join(str(k.key) for k in path), np.asarray(leaf)) for path, leaf in leaves]


# --- Initial parameters ---

WIDE = {
  "megabyte": MegabyteConfig(
    context=64,
    levels=(
      Level(patch_size=4, width=128, num_layers=8, num_heads=4, conv_filters=(3,)),
      Level(patch_size=1, width=64, num_layers=2, num_heads=4),
    ),
  ),
  "perceiver_ar": PerceiverARConfig(context=64, latents=32, width=64, num_layers=2, num_heads=4),
}


@functools.cache
def drawn(family):
  return jax.jit(lambda key: initial_parameters(WIDE[family], key))(jax.random.key(0))


@pytest.mark.parametrize("family", WIDE)
def test_initial_parameters_are_a_cut_normal(family):
  """Normal(0, 0.006) cut at two sigma, whose standard deviation is 0.8796 of the whole normal's."""
  seen = set()
  for name, leaf in named(drawn(family)):
    assert leaf.dtype == np.float32
    if name.endswith("bias"):
      assert (leaf == 0).all(), name
    elif name.endswith("scale"):
      assert (leaf == 1).all(), name
    else:
      sigma = 0.006
      if re.search(r"(attention_out|ff_out)\.kernel$", name):  # residual outputs: 1 / sqrt(2 L)
        depth = {"levels.0": 8, "levels.1": 2, "decoder.": 2, "cross.a": 3, "cross.f": 3}
        sigma /= np.sqrt(2 * next(L for start, L in depth.items() if name.startswith(start)))
      assert np.abs(leaf).max() <= 2 * sigma * 1.0001, name
      assert np.abs(leaf).max() > (1.5 if "pad" in name else 1.9) * sigma, name  # pads are drawn too, not zeros
      error = 4 / np.sqrt(2 * leaf.size)
      assert abs(leaf.std() / (0.8796 * sigma) - 1) < error, name
      assert abs(leaf.mean()) < 4 * sigma / np.sqrt(leaf.size), name
      seen.add(name.rsplit(".", 1)[-1])
  assert {"kernel", "table", "positions", "pad"} <= seen


@pytest.mark.slow
def test_balanced_parents_start_as_large_as_the_embeddings_that_they_are_added_to():
  levels = (
    Level(patch_size=8, width=512, num_layers=1, num_heads=4),
    Level(patch_size=2, width=128, num_layers=1, num_heads=4),
    Level(patch_size=1, width=32, num_layers=1, num_heads=4),
  )

  def ratios(parent_init):
    model = make_model(MegabyteConfig(context=64, levels=levels, init_std=0.04, parent_init=parent_init), nnx.Rngs(0))
    x_BT = jax.random.randint(jax.random.key(1), (4, 64), 0, 256)
    graph, parameters = nnx.split(model)

    @jax.jit
    def measured(parameters, x_BT):
      found, parent = [], None
      for i, level in enumerate(nnx.merge(graph, parameters).levels):
        if parent is not None:
          added = level.add_parent(jnp.zeros((4, 64 // level.span, level.slots_per_span, levels[i].width)), parent)
          found.append(added.std() / level.embedder.embed(x_BT.reshape(4, -1, level.span)).std())
        parent = level(x_BT, parent)[0].reshape(4, -1, levels[i].width)
      return found

    return measured(parameters, x_BT)

  sizes = [128**0.5, 64**0.5]  # of a normed output's 2 x 64 and 64 numbers
  np.testing.assert_allclose(ratios("paper"), [size / 2**0.5 for size in sizes], rtol=0.1)  # table and positions
  np.testing.assert_allclose(ratios("balanced"), [1 / 2**0.5, 1 / 2**0.5], rtol=0.1)


def test_fan_in_values_and_embeddings_of_their_own():
  """Each matrix by its number of inputs, none shrunk for its depth; tables, positions and pads by `embedding_std`."""
  options = {"init": "fan_in", "embedding_std": 0.5, "tied_output": False}
  config = dataclasses.replace(WIDE["megabyte"], **options)
  infos, kinds = parameter_info(config), set()
  for name, leaf in named(jax.jit(lambda key: initial_parameters(config, key))(jax.random.key(0))):
    info = infos[name]
    if info.kind in ("table", "positions", "pad", "matrix", "output", "convolution"):
      deviation = info.fan_in**-0.5 if info.inputs else 0.5
      assert abs(leaf.std() / deviation - 1) < 4 / np.sqrt(2 * leaf.size), name
      assert leaf.size < 1000 or np.abs(leaf).max() > 2.5 * deviation, f"{name} is cut at two deviations"
      kinds.add(info.kind)
  assert {"table", "positions", "pad", "matrix", "output"} <= kinds


def test_no_two_parameters_are_drawn_alike():
  firsts = []
  for name, leaf in named(drawn("megabyte")):
    if not name.endswith(("bias", "scale")):
      rows = leaf if ".blocks." in name else leaf[None]  # layers of a stack one by one
      shrunk = rows.reshape(len(rows), -1)[:, :8]
      firsts += [row / np.abs(row).max() for row in shrunk]
  firsts = np.stack(firsts)
  assert len(np.unique(firsts.round(4), axis=0)) == len(firsts)


# --- Dropout ---


def dropping(name, **options):
  """(graph, parameters) of a variant with dropout."""
  return abstract_model(dataclasses.replace(variants.VARIANTS[name], **options))[0], variants.parameters(name)


def test_dropout_is_off_without_a_key_and_a_function_of_the_key():
  name = "two_levels"
  graph, parameters = dropping(name, dropout=0.3, attention_dropout=0.3)
  x_BT = variants.random_bytes(name, variants.VARIANTS[name].context)
  run = jax.jit(lambda p, x, key: nnx.merge(graph, p)(x, dropout_key=key))
  np.testing.assert_allclose(run(parameters, x_BT, None), variants.logits(name, x_BT), atol=1e-5)
  one, same, other = (run(parameters, x_BT, jax.random.key(seed)) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.1
  assert np.abs(one - run(parameters, x_BT, None)).max() > 0.1


@pytest.mark.parametrize("name", ["two_levels", "conv", "perceiver_ar"])
def test_embeddings_are_never_dropped(name):
  """With all outputs of attention and feed-forward layers dropped, the embeddings still arrive, unscaled."""
  config, x_BT = variants.VARIANTS[name], variants.random_bytes(name, 2)
  graph, parameters = dropping(name, dropout=1 - 1e-9)
  dropped = jax.jit(lambda p, x: nnx.merge(graph, p)(x, dropout_key=jax.random.key(3)))(parameters, x_BT)

  @jax.jit
  def of_embeddings(parameters, x_BT):
    model = nnx.merge(graph, parameters)
    if variants.is_perceiver(config):
      slots = model.embedder.slots(x_BT[:, None])[:, 0, -config.latents :]
      return model.embedder.logits(model.decoder.norm(slots))
    first, second = model.levels
    h_global = first.decoder.norm(first.embedder.slots(x_BT[:, None]))[:, 0]
    patches = x_BT.reshape(2, h_global.shape[1], -1)
    h_local = second.decoder.norm(second.add_parent(second.embedder.slots(patches), h_global))
    return second.embedder.logits(h_local).reshape(2, config.context, -1)

  np.testing.assert_allclose(dropped, of_embeddings(parameters, x_BT), atol=1e-4)


def test_every_layer_draws_its_own_dropout(monkeypatch):
  """Two kinds of output in each layer and the attention's probabilities: no key serves twice."""
  name = "two_levels"
  graph, parameters = dropping(name, dropout=0.1, attention_dropout=0.1)
  drawn, random_bits = [], dropout.random_bits

  def recording(key, *arguments):
    jax.debug.callback(lambda data: drawn.append(tuple(data.tolist())), jax.random.key_data(key))  # in each layer
    return random_bits(key, *arguments)

  monkeypatch.setattr(dropout, "random_bits", recording)
  x_BT = jnp.asarray(variants.random_bytes(name, 1)[:, :4])
  jax.jit(lambda parameters: nnx.merge(graph, parameters)(x_BT, dropout_key=jax.random.key(4)))(parameters)
  jax.effects_barrier()
  assert len(drawn) == 3 * sum(level.num_layers for level in variants.VARIANTS[name].levels)
  assert len(set(drawn)) == len(drawn)


# --- Rematerialisation, scanning, precision ---


def loss_and_gradient(name, **options):
  """(jitted (parameters, key) -> (nats, gradients), its program before compilation)."""
  graph, parameters = dropping(name, **options)
  x_BT = jnp.asarray(variants.random_bytes(name, 4, seed=11))

  def loss(p, key):
    return jnp.sum(byte_nats(nnx.merge(graph, p), x_BT, dropout_key=key)[0])

  step = jax.jit(jax.value_and_grad(loss))
  return step(parameters, jax.random.key(0)), step.trace(parameters, jax.random.key(0))


@pytest.mark.parametrize("bias", [True, False])
def test_queries_keys_and_values_are_the_same_as_one_product_or_three(monkeypatch, bias):
  options = dataclasses.replace(variants.VARIANTS["two_levels"], bias=bias)
  block = block_module.Block(options.levels[0], options, nnx.Rngs(0))
  y_BNMD = jax.random.normal(jax.random.key(1), (2, 1, 5, options.levels[0].width))
  one = block_module.products_apart(block.qkv, y_BNMD)
  monkeypatch.setattr(block_module, "platform", lambda: "gpu")
  for a, b in zip(one, block_module.products_apart(block.qkv, y_BNMD), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_remat_and_scan_change_neither_loss_nor_gradients():
  name = "without_global_cross_patch"
  kinds = [("none", "always"), ("none", "never"), ("named", "always"), ("full", "always"), ("full", "never")]
  options = [dict(remat=remat, scan_layers=scan) for remat, scan in kinds]
  runs = [loss_and_gradient(name, dropout=0.1, **o) for o in options]
  (loss, gradient), _ = runs[0]
  for (other_loss, other_gradient), _ in runs[1:]:
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for (leaf_name, a), (_, b) in zip(named(gradient), named(other_gradient), strict=True):
      np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), err_msg=leaf_name)
  # They do change the program: what backward multiplies again, and whether layers are a loop.
  products = [str(traced.jaxpr).count("dot_general") for _, traced in runs]
  assert products[0] < products[2] < products[3]  # none < named < full
  for o, (_, traced) in zip(options, runs, strict=True):
    assert ("unroll=1\n" in str(traced.jaxpr)) == (o["scan_layers"] == "always")


@pytest.mark.slow
def test_remat_holds_for_perceiver_ars_cross_attention(capsys):
  """Its weights of 5 latents over 23 bytes are kept for the backward pass without it alone."""
  config = PerceiverARConfig(context=23, latents=5, width=8, num_layers=1, num_heads=2, dropout=0.0)
  parameters = jax.jit(lambda key: initial_parameters(config, key))(jax.random.key(0))
  gradients = []
  for remat, is_kept in (("none", True), ("full", False)):
    graph, _ = abstract_model(dataclasses.replace(config, remat=remat))

    def loss(parameters, graph=graph):
      return byte_nats(nnx.merge(graph, parameters), jnp.arange(23)[None])[0].sum()

    print_saved_residuals(loss, parameters)
    assert ("5,23]" in capsys.readouterr().out) == is_kept
    gradients.append(jax.jit(jax.grad(loss))(parameters))
  for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
    np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


def cosine(a, b):
  return (a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum())


def test_bfloat16_compute_stays_near_float32():
  name = "without_global_cross_patch"
  (loss, gradient), _ = loss_and_gradient(name, compute_dtype="float32")
  (loss_16, gradient_16), _ = loss_and_gradient(name, compute_dtype="bfloat16")
  assert loss != loss_16 and abs(loss_16 / loss - 1) < 0.01
  for (leaf_name, a), (_, b) in zip(named(gradient), named(gradient_16), strict=True):
    assert b.dtype == np.float32, leaf_name
    assert cosine(a, b) > 0.85, leaf_name
  everything, everything_16 = (np.concatenate([a.ravel() for _, a in named(g)]) for g in (gradient, gradient_16))
  assert cosine(everything, everything_16) > 0.97
  graph, parameters = dropping(name, compute_dtype="bfloat16")
  x_BT = variants.random_bytes(name, 4, seed=11)
  logits = jax.jit(lambda p, x: nnx.merge(graph, p)(x))(parameters, x_BT)
  assert logits.dtype == jnp.float32
  error = np.abs(logits - variants.logits(name, x_BT))
  assert 1e-4 < error.max() < 0.25 and error.mean() < 0.03  # logits here have a spread of about 2


# --- Lengths, accumulation ---


@pytest.mark.parametrize("name", ["two_levels", "without_global", "perceiver_ar"])
def test_empty_and_too_long_inputs_are_one_clear_error(name):
  model, context = variants.model(name), variants.VARIANTS[name].context
  for length in (0, context + 1):
    with pytest.raises(ConfigError, match=f"the input has {length} bytes; the model takes 1 to {context}"):
      model(jnp.zeros((1, length), jnp.int32))


@pytest.mark.parametrize("wrong", [-1, 256, 300])
def test_what_is_no_byte_is_not_scored(wrong):
  config = dataclasses.replace(variants.VARIANTS["two_levels"], vocab_size=256)
  model = nnx.merge(abstract_model(config)[0], variants.draw_parameters(config))
  with pytest.raises(ConfigError, match=f"knows only bytes below 256 .*; the data have {wrong}"):
    byte_nats(model, jnp.array([[65, wrong, 66]]))


@pytest.mark.slow
def test_accumulation_equals_one_batch():
  """Rows of different lengths: a mean of means would weigh their bytes unevenly. test_train.py has a quick twin."""
  name = "without_global"
  x_BT = variants.random_bytes(name, 8, seed=12).astype(np.uint8)
  length_B = np.array([16, 3, 9, 1, 16, 7, 2, 12], np.int32)
  results = []
  for accumulate in (1, 4):
    config = Config(model=variants.VARIANTS[name], batch_size=8, accumulate=accumulate, num_steps=10)
    state = TrainState(jnp.int32(3), jax.tree.map(jnp.copy, variants.parameters(name)), None)
    optimizer = make_optimizer(config.optimizer, config.num_steps, parameter_info(config.model))
    optimizer_state = jax.jit(optimizer.init)(state.parameters)
    results.append(make_train_step(config)(state._replace(opt_state=optimizer_state), x_BT, length_B))
  (one, metrics), (parts, metrics_of_parts) = results
  assert int(metrics["bytes"]) == int(metrics_of_parts["bytes"]) == length_B.sum()
  for key in ("nats", "grad_norm"):
    np.testing.assert_allclose(metrics_of_parts[key], metrics[key], rtol=1e-5)
  for (leaf_name, a), (_, b) in zip(named(one.opt_state[1][0].mu), named(parts.opt_state[1][0].mu), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max() + 1e-9, err_msg=leaf_name)


def test_the_gradient_of_a_gated_layer_is_joined_not_padded():
  """Padded halves would be written and added: more memory traffic in the widest arrays of a block."""
  level = Level(patch_size=1, width=8, num_layers=1, num_heads=2)
  options = MegabyteConfig(context=4, levels=(level,), activation="swiglu")
  hidden = jax.random.normal(jax.random.key(0), (3, 2, 5))
  gradient = jax.grad(lambda hidden: jnp.sum(activate(hidden, options)))
  program = str(jax.make_jaxpr(gradient)(hidden))
  assert "concatenate" in program and "pad" not in program
  expected = jax.grad(lambda hidden: jnp.sum(jax.nn.silu(hidden[:, 0]) * hidden[:, 1]))(hidden)
  np.testing.assert_allclose(gradient(hidden), expected, rtol=1e-6)
