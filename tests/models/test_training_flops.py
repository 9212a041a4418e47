"""What a training step of families with a memory costs: our count, the products of the program, and XLA's count."""

import dataclasses

import count_products
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from megabyte_jax.config import CompressiveTransformerConfig, TransformerXLConfig
from megabyte_jax.models import flops
from megabyte_jax.models.build import abstract_model

T = 8
SIZES = {"context": T, "vocab_size": 11, "width": 16, "num_layers": 2, "num_heads": 2, "memory_length": 2 * T}
COMPRESSED = {**SIZES, "compressed_length": 4, "compression_rate": 4}
CONFIGS = {
  "Transformer-XL": TransformerXLConfig(**SIZES),
  "pre-norm": TransformerXLConfig(**SIZES, norm_place="pre"),
  "pre-norm, convolution": CompressiveTransformerConfig(**COMPRESSED, norm_place="pre"),
  "convolution": CompressiveTransformerConfig(**COMPRESSED),
  "dilated convolution": CompressiveTransformerConfig(**COMPRESSED, compression="dilated_convolution", head_dim=12),
  "mean": CompressiveTransformerConfig(**COMPRESSED, compression="mean"),
}


def training(config, batch):
  """The gradient of a step's loss and the memory afterwards; and its arguments."""
  graph, parameters = abstract_model(dataclasses.replace(config, remat="none"))

  def loss(parameters, x_BT):
    model = nnx.merge(graph, parameters)
    nats_BT, _, memory, extra = model.segment_nats(model.empty_memory(batch), x_BT)
    return jnp.sum(nats_BT) + extra, memory

  return jax.grad(loss, has_aux=True), (parameters, jax.ShapeDtypeStruct((batch, config.context), jnp.int32))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_training_step_has_the_products_that_are_counted(name):
  """A second row's: the first one's hold those of the distances, too, which all rows share."""
  config = CONFIGS[name]
  one, two = (count_products.operations(step, *given) for step, given in (training(config, b) for b in (1, 2)))
  of_lookup = 2 * config.vocab_size * config.width * T  # the table's gradient by one-hot vectors
  assert two - one - of_lookup == T * flops.flops_per_byte(config, attention="dense", training=True)


@pytest.mark.parametrize("family", [TransformerXLConfig, CompressiveTransformerConfig])
def test_the_count_is_xlas(family):
  """Of one layer, as XLA counts a loop once. The products of distances are added: XLA has them for each step."""
  sizes = {"context": 128, "vocab_size": 64, "width": 256, "num_layers": 1, "num_heads": 2, "memory_length": 256}
  config = family(**sizes, **({"compressed_length": 128} if family is CompressiveTransformerConfig else {}))
  step, given = training(config, 2)
  found = jax.jit(step).lower(*given).cost_analysis()["flops"]
  slots = config.context + config.memory_length + getattr(config, "compressed_length", 0)
  of_distances = 2 * 2 * slots * config.width**2  # forward, and the gradient of W_k,R
  ours = 2 * config.context * flops.flops_per_byte(config, attention="dense", training=True) + of_distances
  assert found == pytest.approx(ours, rel=0.02)
  assert found < 0.96 * (ours + 2 * config.context * config.stopped_flops)  # three times the forward pass
