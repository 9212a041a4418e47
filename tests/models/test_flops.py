"""Closed forms of parameters and operations, against the paper and against the models themselves."""

import dataclasses

import pytest

from megabyte_jax.config import Level, MegabyteConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models import flops


def level(patch_size, width, num_layers, **options):
  return Level(patch_size=patch_size, width=width, num_layers=num_layers, num_heads=width // 64, **options)


# Readings of Fig. 3 at T = 256 and T = 1,048,576 (P = 8), operations per token.
FIGURE_3 = {
  "Transformer 604M": (1.22e9, 5.28e10),
  "Transformer 6.4B": (1.29e10, 2.88e11),
  "Transformer 173B": (3.48e11, 2.82e12),
  "Linear Transformer 604M": (1.21e9, 1.21e9),
  "Linear Transformer 6.4B": (1.29e10, 1.29e10),
  "Linear Transformer 173B": (3.48e11, 3.48e11),
  "MEGABYTE 616M": (1.79e8, 9.8e8),
  "MEGABYTE 6.5B": (1.92e9, 6.3e9),
  "MEGABYTE 173B": (4.87e10, 8.7e10),
}


def test_figure_3():
  curves = flops.figure3_curves()
  assert set(curves) == set(FIGURE_3)
  for name, (short, long) in FIGURE_3.items():
    lengths, values = curves[name]
    assert (lengths[0], lengths[-1]) == (256, 1_048_576)
    assert (values[0], values[-1]) == (pytest.approx(short, rel=0.02), pytest.approx(long, rel=0.02)), name


def test_transformer_row_of_table_15():
  """SpaceByte's check of the compute matching: 732 MFLOPs per byte from nominal sizes; here the true ones."""
  transformer = MegabyteConfig(context=1024, levels=(level(1, 1024, 22),))
  assert flops.nominal_parameters(transformer.levels[0]) == pytest.approx(320e6, rel=0.01)
  assert flops.flops_per_byte(transformer) == 2 * 12 * 22 * 1024**2 + 2 * 22 * 1024 * 1024 + 2 * 256 * 1024
  assert flops.flops_per_byte(transformer, training=True) == 3 * flops.flops_per_byte(transformer)
  dense, causal = (flops.flops_breakdown(transformer, attention=a)["levels[0].attention"] for a in ("dense", "causal"))
  assert dense == 2 * causal
  assert flops.flops_breakdown(transformer, attention="whole")["levels[0].attention"] == dense


def test_whole_attention_counts_a_window_as_wide_as_it_is():
  """SpaceByte's count: 2 D W multiplications and additions a byte and layer, whatever a mask leaves of them."""
  windowed = MegabyteConfig(context=4096, levels=(level(1, 512, 6, attention_window=256),))
  assert flops.flops_breakdown(windowed, attention="whole")["levels[0].attention"] == 4 * 6 * 512 * 256
  perceiver = PerceiverARConfig(context=64, latents=16, width=8, num_layers=2, num_heads=2)
  parts = flops.flops_breakdown(perceiver, attention="whole")
  assert (parts["latents.attention"], parts["cross.attention"]) == (4 * 2 * 16 * 8, 4 * 64 * 8)


def test_fig3_and_the_model_agree_but_for_the_parts_fig3_leaves_out():
  model = MegabyteConfig(context=65536, levels=(level(8, 2048, 12), level(1, 512, 4)))
  ours = flops.flops_per_byte(model)
  w_i, head = 2 * 256 * 512, 2 * 256 * 512
  assert ours - w_i - head == pytest.approx(flops.megabyte_flops((12, 2048), (4, 512), 8, 65536))


def test_context_is_replaced():
  model = MegabyteConfig(context=64, levels=(level(8, 512, 2), level(1, 64, 1)))
  longer = dataclasses.replace(model, context=128)
  assert flops.flops_per_byte(model, 128) == flops.flops_per_byte(longer) > flops.flops_per_byte(model)
  with pytest.raises(ConfigError, match="does not divide"):
    flops.flops_per_byte(model, 63)
  with pytest.raises(ConfigError, match="causal"):
    flops.flops_per_byte(model, attention="sparse")


def test_causal_counts_are_the_area_under_the_mask():
  full = level(1, 64, 1)
  window = dataclasses.replace(full, attention_window=64)
  narrow = dataclasses.replace(full, attention_window=16)
  attention = [
    flops.flops_breakdown(MegabyteConfig(context=64, levels=(one,)))["levels[0].attention"]
    for one in (full, window, narrow)
  ]
  assert attention[0] == attention[1] == 2 * 64 * 64
  assert attention[2] == 4 * 64 * (16 - 16**2 / 128)
  prefixed = PerceiverARConfig(context=64, latents=16, width=64, num_layers=1, num_heads=1)
  parts = flops.flops_breakdown(prefixed)
  assert parts["cross.attention"] == 4 * 64 * (48 + 8)
  assert parts["latents.attention"] == 2 * 64 * 16


@pytest.mark.parametrize(
  ("width", "layers", "nominal"),
  [
    (2048, 14, 758e6),
    (1024, 18, 262e6),
    (1024, 17, 248e6),
    (2048, 17, 921e6),
    (2048, 13, 704e6),
    (768, 8, 83e6),
    (768, 15, 156e6),
    (2064, 24, 1.3e9),
    (2568, 32, 2.7e9),
  ],
)
def test_nominal_sizes_are_those_of_table_15(width, layers, nominal):
  one = Level(patch_size=1, width=width, num_layers=layers, num_heads=8)
  assert flops.nominal_parameters(one) == pytest.approx(nominal, rel=0.01)


def test_other_widths_have_no_nominal_size():
  assert flops.nominal_parameters(Level(patch_size=1, width=192, num_layers=3, num_heads=3)) is None
