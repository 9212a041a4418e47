"""JAX_ENABLE_X64=1, which other libraries of a program may ask for, changes no dtype and breaks nothing."""

import os
import subprocess
import sys

import pytest
from run_commands import ROOT

CODE = """
import sys
import jax, numpy as np
from flax import nnx
import megabyte_jax as m
from megabyte_jax.generation import compression, entropy_coding
assert jax.numpy.zeros(1).dtype == np.float64
entropy_coding.pays = lambda coded, stored: True
fine = m.Level(patch_size=1, width=8, num_layers=1, num_heads=2, rotary=True, cross_patch=2)
levels = (m.Level(patch_size=4, width=16, num_layers=1, num_heads=2, conv_filters=(3,)), fine)
text = b"more bytes than one context holds"
configs = {
  "megabyte": m.MegabyteConfig(context=16, levels=levels),
  "perceiver_ar": m.PerceiverARConfig(context=16, latents=4, width=8, num_layers=1, num_heads=2),
}
model = m.make_model(configs[sys.argv[1]], nnx.Rngs(0))
assert {str(leaf.dtype) for leaf in jax.tree.leaves(nnx.state(model))} == {"float32"}
made = m.generate(model, text[:3], 20)
assert made.bytes_.shape == (1, 20)
nats = jax.jit(lambda x_BT: m.byte_nats(model, x_BT)[0])(np.frombuffer(text[:16], np.uint8)[None])
assert nats.dtype == np.float32
assert compression.decompress(model, compression.compress(model, text)) == text
"""


@pytest.mark.parametrize("family", ["megabyte", pytest.param("perceiver_ar", marks=pytest.mark.slow)])
def test_generation_and_compression(family):
  quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_ENABLE_X64": "1"}
  done = subprocess.run(
    [sys.executable, "-c", CODE, family], cwd=ROOT, env=os.environ | quick, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
