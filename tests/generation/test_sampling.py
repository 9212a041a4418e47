"""Generation beside being exact: stops, seeds, parameters cast once or spread over a mesh, a million bytes."""

import dataclasses
import math
import pathlib
import re
import resource

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from flax import nnx

from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.generation import sampling as sampling_module
from megabyte_jax.generation.sampling import Sampling, generate
from megabyte_jax.models.build import abstract_model, in_compute_dtype, make_model, parameter_info
from megabyte_jax.parallel.sharding import make_mesh, shard_abstract
from megabyte_jax.planning.lowering import lower

COARSE = Level(patch_size=8, width=32, num_layers=3, num_heads=2)
CACHES = {
  "levels": MegabyteConfig(context=512, levels=(COARSE, Level(patch_size=1, width=8, num_layers=2, num_heads=2))),
  "cross_patch": MegabyteConfig(
    context=512,
    levels=(COARSE, Level(patch_size=1, width=8, num_layers=2, num_heads=2, rotary=True, cross_patch=8)),
  ),
  "perceiver_ar": PerceiverARConfig(context=64, latents=32, width=32, num_layers=3, num_heads=2),
}


@pytest.mark.parametrize(
  "name", ["without_global_cross_patch", pytest.param("conv", marks=pytest.mark.slow), "perceiver_ar"]
)
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_samples(name):
  model, lengths = variants.model(name), 40
  one, three, eight = (generate(model, b"\3\1", lengths, num_samples=n, seed=5).bytes_ for n in (1, 3, 8))
  np.testing.assert_array_equal(one, eight[:1])
  np.testing.assert_array_equal(three, eight[:3])
  assert len(np.unique(eight, axis=0)) == 8
  assert (generate(model, b"\3\1", lengths, seed=6).bytes_ != one).any()


def test_the_randomness_of_a_byte_depends_on_its_place_alone():
  """With all bytes equally probable, only the draws are left to see."""
  name = "without_global_cross_patch"
  model = nnx.merge(abstract_model(variants.VARIANTS[name])[0], jax.tree.map(jnp.zeros_like, variants.parameters(name)))
  text = generate(model, b"", 64, seed=3).bytes_[0]
  for start in (3, 21):
    np.testing.assert_array_equal(generate(model, bytes(start), 64 - start, seed=3).bytes_[0], text[start:])
  for period in range(1, 33):  # the place in the text, not in the window: nothing comes again when the window moves
    assert (text[period:] == text[:-period]).mean() < 0.4


def test_samples_stop_at_bytes_and_where_a_function_says(monkeypatch):
  monkeypatch.setattr(sampling_module, "_CHUNK_BYTES", 4)
  model, pieces = variants.model("without_local"), []
  whole = generate(model, b"\3\1", 40, num_samples=3, seed=5).bytes_
  for length in (2, 1, 3):
    stop = whole[1, 12 : 12 + length].tobytes()
    ends = [row.tobytes().find(stop) + length for row in whole]
    ends = [end if end >= length else 40 for end in ends]
    made = generate(model, b"\3\1", 40, num_samples=3, seed=5, stop=stop)
    np.testing.assert_array_equal(made.lengths, ends)
    assert made.bytes_.shape == made.nats.shape == (3, max(ends))
    for row, text, end in zip(made.bytes_, whole, ends, strict=True):
      np.testing.assert_array_equal(row[:end], text[:end])
  stop = lambda text: text.index(whole[0, 9]) + 1 if whole[0, 9] in text else None  # noqa: E731
  made = generate(model, b"\3\1", 40, seed=5, stop=stop, on_bytes=lambda new: pieces.append(new.copy()))
  assert made.lengths[0] == whole[0].tolist().index(whole[0, 9]) + 1
  np.testing.assert_array_equal(np.concatenate(pieces, axis=1)[0], whole[0, : made.lengths[0]])
  assert generate(model, b"\3\1", 40, stop=lambda text: 0).bytes_.shape == (1, 0)
  # The prompt does not count, not even together with what follows it.
  after = whole[0, :1].tobytes()
  assert generate(model, b"\3\1", 40, seed=5, stop=b"\1" + after).lengths[0] != 1
  with pytest.raises(ConfigError, match="stop at are empty"):
    generate(model, stop=b"")


@pytest.mark.parametrize("name", ["rmsnorm_without_bias", pytest.param("perceiver_ar", marks=pytest.mark.slow)])
def test_parameters_are_cast_once_to_the_same_results(name):
  """Norms keep theirs in float32; of the others nothing is used but what the cast leaves."""
  config = dataclasses.replace(variants.VARIANTS[name], compute_dtype="bfloat16")
  graph, parameters = abstract_model(config)[0], variants.parameters(name)
  cast = in_compute_dtype(config, parameters, 1)
  kinds = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(cast)}
  assert all((dtype == jnp.float32) == ("norm" in path) for path, dtype in kinds.items())
  assert all(
    leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(in_compute_dtype(variants.VARIANTS[name], parameters, 1))
  )
  # Rounded here and not by the model, because XLA leaves out roundings within a computation on CPU.
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cast)
  x_BT = variants.random_bytes(name, 2, seed=9)
  forward = jax.jit(lambda p: nnx.merge(graph, p)(x_BT))
  np.testing.assert_array_equal(forward(cast), forward(rounded))
  step = jax.jit(lambda p: nnx.merge(graph, p).read_prompt(jnp.asarray(x_BT), 4))
  jax.tree.map(np.testing.assert_array_equal, step(cast), step(rounded))
  np.testing.assert_allclose(forward(cast), forward(parameters), atol=0.2)


@pytest.mark.parametrize(
  ("name", "axes"),
  [
    ("transformer", {"fsdp": 8}),
    pytest.param("cross_patch", {"fsdp": 2, "seq": 2, "tensor": 2}, marks=pytest.mark.slow),
    ("perceiver_ar", {"data": 4, "tensor": 2}),
  ],
  ids=str,
)
def test_generation_with_parameters_spread_over_a_mesh(name, axes):
  config = variants.VARIANTS[name]
  mesh = make_mesh(MeshConfig(**{"data": 1} | axes))
  graph, abstract = abstract_model(config)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shard_abstract(abstract, parameter_info(config), mesh))
  spread = nnx.merge(graph, jax.device_put(variants.parameters(name), shardings))
  options = dict(num_bytes=config.context + 3, num_samples=3, seed=4)  # past the context, more rows than asked for
  expected = generate(variants.model(name), b"\3\1\2", **options)
  made = generate(spread, b"\3\1\2", **options)
  np.testing.assert_array_equal(made.bytes_, expected.bytes_)
  np.testing.assert_allclose(made.nats, expected.nats, atol=1e-4)


def test_decoding_on_a_mesh_moves_activations_and_no_parameters():
  levels = (
    Level(patch_size=8, width=256, num_layers=2, num_heads=4),
    Level(patch_size=1, width=128, num_layers=2, num_heads=4),
  )
  model = MegabyteConfig(context=64, levels=levels)
  config = Config(model=model, batch_size=8, num_steps=1, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
  program = lower(config, make_mesh(config.mesh), "generate").compile().as_text()
  moved = re.findall(r" = \w+\[([\d,]*)\]\S* (?:all-gather|all-reduce|all-to-all|reduce-scatter)\(", program)
  assert len(moved) > 4
  assert max(math.prod(map(int, shape.split(","))) for shape in moved) <= 8 * 8 * 256  # the logits of a patch
  assert 8 * 8 * 256 < 128 * 3 * 128  # the smallest of the large parameters


@pytest.mark.parametrize(
  ("name", "axes"),
  [
    pytest.param("levels", {"data": 1}, marks=pytest.mark.slow),
    ("cross_patch", {"data": 2, "fsdp": 2, "tensor": 2}),
    ("perceiver_ar", {"data": 1}),
  ],
  ids=str,
)
def test_decoding_copies_no_cache_as_a_whole(full_compile, name, axes):
  """Each step reads all of a cache and writes one slot of it; a copy would cost more than both."""
  config = Config(model=CACHES[name], batch_size=4, num_steps=1, mesh=MeshConfig(**axes))
  devices = jax.devices()[: math.prod(axes.values())]
  program = lower(config, make_mesh(config.mesh, devices), "generate").compile(full_compile).as_text()
  inside, kept = re.split(r"^ENTRY ", program, flags=re.MULTILINE)
  kept = set(re.findall(r" = (\w+\[\d+,\d+,1,\d+,\d+,\d+\])\S* parameter\(", kept))  # of the program: the caches
  assert kept and all(shape in inside for shape in kept)
  assert not kept & set(re.findall(r" = (\w+\[[\d,]*\])\S* copy\(", inside))


def test_one_state_is_in_memory_when_the_window_moves(monkeypatch):
  model, held, read = variants.model("transformer"), [], sampling_module._read_prompt

  def counting(*arguments):
    held.append(sum(a.ndim == 6 for a in jax.live_arrays()))
    return read(*arguments)

  monkeypatch.setattr(sampling_module, "_read_prompt", counting)
  generate(model, b"", 40)
  assert len(held) > 2 and held == held[:1] * len(held)


def test_what_a_model_cannot_read_or_say_is_one_error():
  model, name = variants.model("two_levels"), "two_levels"
  with pytest.raises(ConfigError, match=r"the prompt is of type str; give bytes, such as text\.encode"):
    generate(model, "text", 3)
  with pytest.raises(ConfigError, match="knows only bytes below 25"):
    generate(model, b"\3\x19", 4)
  for seed in (-1, 1 << 32):
    with pytest.raises(ConfigError, match=rf"seed is {seed}; it must be at least 0 and below"):
      generate(model, seed=seed)
  for options, message in (
    ({"num_bytes": 4.0}, "the number of bytes to generate is 4.0; it must be a whole number"),
    ({"num_bytes": 10**20}, "it must be at most 2147483647"),
    ({"seed": 1.5}, "the seed is 1.5; it must be a whole number"),
    ({"num_samples": "2"}, "the number of samples is '2'; it must be a whole number"),
  ):
    with pytest.raises(ConfigError, match=message):
      generate(model, **options)
  for options in ({"top_k": 1.5}, {"temperature": "1"}, {"top_p": None}):
    with pytest.raises(ConfigError, match=r"it must be a (whole )?number"):
      Sampling(**options)
  assert Sampling(top_k=np.int64(3)) == Sampling(top_k=3)
  broken = jax.tree.map(lambda a: a * jnp.nan, variants.parameters(name))
  with pytest.raises(FloatingPointError, match="not finite"):
    generate(nnx.merge(abstract_model(variants.VARIANTS[name])[0], broken), b"\3", 4)


@pytest.mark.slow
def test_a_million_bytes_in_one_call_and_bounded_memory():
  """An image of 640 x 640 pixels, the largest of Table 5, by a tiny model, through all of its context."""
  size = 640 * 640 * 3
  levels = (
    Level(patch_size=192, width=192, num_layers=2, num_heads=2),
    Level(patch_size=1, width=16, num_layers=1, num_heads=1),
  )
  model, held, pieces = make_model(MegabyteConfig(context=size, levels=levels), nnx.Rngs(0)), [], []

  def on_bytes(new):
    pieces.append(new.size)
    if len(pieces) % 500 == 100:  # compiled, and warm
      held.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

  made = generate(model, b"", size, on_bytes=on_bytes)
  assert made.bytes_.shape == (1, size) and sum(pieces) == size
  assert np.isfinite(made.nats).all() and len(np.unique(made.bytes_[0, -1000:])) > 100
  assert max(held) - held[0] < 200e6
