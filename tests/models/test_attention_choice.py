"""What a run says of its attention is what its training step then takes, for every model and kind of device."""

import dataclasses

import jax
import jax.numpy as jnp
import model_variants as variants
import pytest
from flax import nnx

from megabyte_jax.config import Config, Level, MegabyteConfig, MeshConfig, PerceiverARConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation.report import attention_line
from megabyte_jax.models.build import abstract_model
from megabyte_jax.models.kernels import fused_attention
from megabyte_jax.models.layers import attention
from megabyte_jax.models.layers.attention import Choice
from megabyte_jax.models.loss import sum_of_nats
from megabyte_jax.parallel.sharding import make_mesh

LOCAL = Level(patch_size=1, width=256, num_layers=1, num_heads=4, rotary=True)
GLOBAL = Level(patch_size=8, width=512, num_layers=1, num_heads=8)
MODEL = MegabyteConfig(context=1024, levels=(GLOBAL, LOCAL), compute_dtype="bfloat16")
OTHERS = {
  "wide": MODEL,
  "wide cross-patch": dataclasses.replace(MODEL, levels=(GLOBAL, dataclasses.replace(LOCAL, cross_patch=8))),
  "wide groups": dataclasses.replace(MODEL, patch_groups=3),
  "attention dropout": dataclasses.replace(MODEL, attention_dropout=0.1),
  "wide perceiver": PerceiverARConfig(
    context=512, latents=128, width=64, num_layers=1, num_heads=2, compute_dtype="bfloat16"
  ),
}
MODELS = {**variants.VARIANTS, **OTHERS}


def on(monkeypatch, device):
  for module in (attention, fused_attention):
    monkeypatch.setattr(module, "platform", lambda: device)


@pytest.mark.parametrize("device", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_is_what_a_training_step_takes(monkeypatch, name, device):
  on(monkeypatch, device)
  config, rows = MODELS[name], 2
  said = list(attention.choices(config, rows).values())
  taken = []
  for function in ("choose_attention", "choose_cross_attention"):
    choose = getattr(attention, function)

    def noted(*arguments, choose=choose, **options):
      taken.append(choose(*arguments, **options))
      return Choice("xla")  # kernels need the device to be traced

    monkeypatch.setattr(attention, function, noted)
  graph, parameters = abstract_model(config)
  x_BT = jax.ShapeDtypeStruct((rows, config.context), jnp.uint8)

  def loss(parameters, x_BT):
    return sum_of_nats(nnx.merge(graph, parameters), x_BT, dropout_key=jax.random.key(0))

  jax.eval_shape(loss, parameters, x_BT)
  assert list(dict.fromkeys(taken)) == list(dict.fromkeys(said))


@pytest.mark.parametrize(
  ("device", "name", "line"),
  [
    ("cpu", "wide", "global, local: xla (a CPU has no kernels)"),
    ("gpu", "wide", "global: cudnn; local: tiles"),
    ("tpu", "wide", "global: splash; local: xla (not splash: it serves one span of slots (the global model), not many"),
    ("gpu", "wide cross-patch", "global: cudnn; local: tiles"),
    ("gpu", "attention dropout", "global, local: xla (not cudnn: it has no dropout on attention probabilities)"),
    ("tpu", "wide perceiver", "cross: xla (not cudnn: the device is tpu, not an NVIDIA GPU); latents: splash"),
    ("gpu", "wide perceiver", "cross: masked cudnn; latents: cudnn"),
  ],
)
def test_the_line_of_a_run(monkeypatch, device, name, line):
  on(monkeypatch, device)
  config = Config(model=MODELS[name], batch_size=4, accumulate=2, num_steps=1)
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  assert attention_line(config, mesh).startswith(line)


def test_one_asked_for_by_name_is_said_or_an_error(monkeypatch):
  xla, splash = (dataclasses.replace(MODEL, attention=name) for name in ("xla", "splash"))
  assert attention.choices(xla, 2)["local"] == Choice("xla", "model.attention=xla")
  with pytest.raises(ConfigError, match=r"model\.attention=splash cannot serve here: the device is cpu"):
    attention.choices(splash, 2)
  on(monkeypatch, "gpu")
  short = dataclasses.replace(MODEL, levels=(dataclasses.replace(GLOBAL, head_dim=24), LOCAL))
  assert attention.choices(short, 2)["global"] == Choice("cudnn")
  uneven = dataclasses.replace(MODEL, levels=(GLOBAL, dataclasses.replace(LOCAL, head_dim=48)))
  assert attention.choices(uneven, 2)["local"].reason.startswith("not tiles: head_dim 48")
