"""The Block-Recurrent Transformer's parameters and FLOPs, its first values, and sizes that it cannot have."""

import count_products
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megabyte_jax.config import BlockRecurrentConfig
from megabyte_jax.config.block_recurrent import BUCKETS
from megabyte_jax.errors import ConfigError
from megabyte_jax.models import flops
from megabyte_jax.models.build import abstract_model, initial_parameters


@pytest.mark.parametrize("options", [{}, {"gate": "lstm", "skip": False, "bias": False, "activation": "swiglu"}])
def test_counts_are_the_models(options):
  """Parameters from the arrays, dense FLOPs from the products of two windows."""
  sizes = {"context": 8, "window": 4, "states": 3, "width": 8, "num_heads": 2, "recurrent_layers": (0, 2)}
  counted = BlockRecurrentConfig(num_layers=3, **sizes, **options)
  graph, p = abstract_model(counted)
  assert sum(leaf.size for leaf in jax.tree.leaves(p)) == counted.parameter_count()

  def read_one(p, x_BT):
    one = nnx.merge(graph, p)
    return one.segment(one.empty_memory(1), x_BT)

  found = count_products.operations(read_one, p, jax.ShapeDtypeStruct((1, 8), jnp.int32))
  of_biases = 3 * 2 * BUCKETS * 4 * 2  # a table's rows of one window's distances, in each layer
  assert found == pytest.approx(8 * flops.flops_per_byte(counted, attention="dense") + of_biases, rel=1e-9)


def test_counts_by_hand():
  """The 12 layers of the paper, with the cell of their third from the end."""
  sizes = {"context": 4096, "width": 1024, "num_layers": 12, "num_heads": 8, "ff_width": 4096}
  paper = BlockRecurrentConfig(**sizes, bias=False, norm="rmsnorm")
  layer = 12 * 1024**2 + 2 * 1024 + 33 * 8
  cell = (2 + 4 + 2) * 1024**2 + 3 * 8 + 1024 + 2 * 512 * 1024 + 1024
  assert paper.parameter_count() == 257 * 1024 + 12 * layer + cell + 1024
  parts = flops.flops_breakdown(paper)
  assert (
    parts["levels[0].attention"]
    == 4 * 12 * 512 * 1024
    == flops.flops_breakdown(paper, attention="dense")["levels[0].attention"] / 2
  )
  assert parts["cells.weights"] == 2 * (2 + 6) * 1024**2
  assert parts["cells.attention"] == 4 * 1024 * (512 + 512 + 1024)


def test_first_values():
  """N(0, 1) for states' positions, N(0, 0.1) for first states and fixed gates, 1 for scales."""
  sizes = {"context": 8, "window": 8, "states": 64, "width": 32, "num_layers": 1, "recurrent_layers": (0,)}
  tiny = BlockRecurrentConfig(num_heads=2, **sizes)
  made = jax.jit(lambda key: initial_parameters(tiny, key))(jax.random.key(0))
  cell = jax.tree.map(lambda a: a[0], made["cells"])
  for values, deviation in ((cell["positions"], 1.0), (cell["first"], 0.1), (cell["gate"]["b_g"], 0.1)):
    assert float(jnp.std(values)) == pytest.approx(deviation, rel=0.3)
  assert (made["blocks"]["scale"] == 1).all() and (cell["cross_scale"] == 1).all()


def test_first_values_of_an_lstms_gates():
  """Those of the authors' code: biases of N(0, 0.1), also without `bias`, and a tenth of the variance of matrices."""
  tiny = BlockRecurrentConfig(
    context=8, window=8, states=2, width=64, num_layers=1, num_heads=2, recurrent_layers=(0,), gate="lstm", bias=False
  )
  made = jax.jit(lambda key: initial_parameters(tiny, key))(jax.random.key(0))["cells"]["gate"]
  for values, deviation in ((made["b_if"], 0.1), (made["gates"]["kernel"], 0.1**0.5 * tiny.init_std)):
    assert float(jnp.std(values)) == pytest.approx(deviation, rel=0.2)
  assert float(jnp.std(made["linear"]["kernel"])) == pytest.approx(tiny.init_std, rel=0.2)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"window": 3}, "model.context 8 is not a multiple of model.window 3"),
    ({"recurrent_layers": (2,)}, r"model.recurrent_layers is \(2,\); give different ones of the 2 layers"),
    ({"recurrent_layers": (0, -2)}, "give different ones of the 2 layers, from -2 to 1"),
    ({"qk_norm": True}, "model.qk_norm is True"),
    ({"attention": "cudnn"}, "model.attention=cudnn cannot serve here"),
    ({"states": 0}, "model.states is 0"),
    ({"recurrent_layers": ()}, "model.recurrent_layers is empty"),
  ],
)
def test_impossible_sizes_are_one_line(options, message):
  sizes = {"context": 8, "window": 4, "states": 3, "width": 8, "num_layers": 2, "num_heads": 2}
  with pytest.raises(ConfigError, match=message):
    BlockRecurrentConfig(**{**sizes, "recurrent_layers": (-1,), **options})
