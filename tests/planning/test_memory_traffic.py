"""What the roofline takes attention to a memory to move, against the models' own products and by hand."""

import dataclasses

import count_products
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megabyte_jax.config import (
  BlockRecurrentConfig,
  CompressiveTransformerConfig,
  Config,
  DataConfig,
  TransformerXLConfig,
)
from megabyte_jax.models.build import abstract_model
from megabyte_jax.planning import roofline

SIZES = {"vocab_size": 13, "width": 16, "num_layers": 2, "num_heads": 2, "head_dim": 5, "compute_dtype": "bfloat16"}
XL = TransformerXLConfig(**SIZES, context=4, memory_length=6)
COMPRESSIVE = CompressiveTransformerConfig(**SIZES, context=4, memory_length=8, compressed_length=3)
BLOCK_RECURRENT = BlockRecurrentConfig(**SIZES, context=8, window=4, states=3, recurrent_layers=(1,))


@pytest.mark.parametrize("config", [XL, COMPRESSIVE, BLOCK_RECURRENT], ids=lambda config: config.family)
def test_scores_are_those_of_the_model(config):
  graph, parameters = abstract_model(config)

  def read_one(parameters, x_BT):
    one = nnx.merge(graph, parameters)
    return one.segment(one.empty_memory(1), x_BT)

  x_BT = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
  assert config.memory_traffic.scores == count_products.scores(read_one, parameters, x_BT, head_dim=5)


def test_traffic_by_hand():
  """Scores: layers x heads x queries x keys; numbers: of a remembered slot in a layer, and of a state in a window."""
  kept, keys_and_values = 2 * 16, 2 * 2 * 10  # read and written, both
  assert XL.memory_traffic == (2 * 2 * 4 * (2 * 10), 2 * 6 * (kept + keys_and_values))
  compared = 4 + 2
  assert COMPRESSIVE.memory_traffic == (
    2 * 2 * 4 * (2 * 15 + compared),
    2 * (11 * (kept + keys_and_values) + compared * keys_and_values),
  )
  tokens, states = 8 * (2 * 8 + 3), 2 * 3 * (3 + 8)
  of_window, of_states = 2 * 4 * keys_and_values, 2 * 3 * (2 * kept + 8 * 10)
  assert BLOCK_RECURRENT.memory_traffic == (2 * (tokens + states), of_window + of_states)


def test_the_roofline_counts_memories_and_windows():
  data = DataConfig(train="x")

  def moved(model):
    return roofline.memory_traffic(Config(model=model, data=data, batch_size=2, num_steps=1), 1, 1, "eval")

  longer = dataclasses.replace(XL, memory_length=106)
  more = 2 * 2 * 4 * (2 * 100) * 2 * 4 + 2 * 100 * (2 * 16 + 4 * 10) * 2
  assert moved(longer) - moved(XL) == 2 * more
  one, two, three = (moved(dataclasses.replace(BLOCK_RECURRENT, context=tokens)) for tokens in (8, 16, 24))
  assert three - two == two - one > 0  # not by the square of the segment
