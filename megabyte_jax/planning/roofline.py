"""The least time that a training step can take on TPUs: compute, memory and links, each as if it were alone.

Compute is exact (flops.py plus recomputation). Memory traffic is an estimate in closed form, because XLA reports a
loop's body once: weights per pass, optimizer state, the arrays between a block's matrix products, and the attention
probabilities where no fused kernel keeps them on the chip. Links carry what the compiled program's collectives send,
and the data centre's network what goes between slices.
"""

from __future__ import annotations

import dataclasses

import jax

from megabyte_jax.config import Config, Level, MegabyteConfig, ModelConfig
from megabyte_jax.models import flops
from megabyte_jax.parallel import hardware

_WIDTHS = 14  # arrays of a slot's width that a block reads or writes: norms, q, k, v, attended, residuals
_HIDDENS = 3  # arrays of the feed-forward width: written, read for the activation, read for the product
_GATED_HIDDENS = 5  # the first two twice


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Seconds that one step would take if only this limited it.

  Attributes:
    compute: matrix products at the chips' peak, recomputation included.
    memory: HBM traffic.
    links: communication, over both directions of one axis of the torus, not hidden behind anything.
    model_compute: as compute, without recomputation: what MFU counts.
    network: communication between slices, over the data centre's network; 0 on one slice, or where the chip's rate is
      not known.
  """

  compute: float
  memory: float
  links: float
  model_compute: float
  network: float = 0.0

  @property
  def step(self) -> float:
    """All at once, perfectly overlapped: no step is faster, where memory (an estimate) is not the largest."""
    return max(self.compute, self.memory, self.links, self.network)

  @property
  def mfu(self) -> float:
    """Of a step that takes `step`."""
    return self.model_compute / self.step


def passes(config: Config, step: str) -> float:
  """Forward passes that a step's products are worth: 1, or 3 in training, and what is recomputed."""
  if step != "train":
    return 1.0
  # `named` recomputes one product of a block, attention's output: D^2 of 12 D^2, and a little for what is none.
  return flops.TRAINING_FACTOR + {"none": 0.0, "named": 0.1, "full": 1.0}[config.model.remat]


def bounds(
  config: Config,
  device: jax.Device,
  devices: int,
  tensor: int,
  step: str,
  wire_bytes: float,
  network_bytes: float = 0.0,
) -> Bounds:
  """Bounds for one train or eval step.

  Args:
    devices, tensor: on the mesh, and on its axis `tensor`.
    wire_bytes, network_bytes: that each device sends in one step, within its slice and to other slices.

  Raises:
    ValueError: hardware.py does not know the device.
  """
  peak = hardware.peak_flops(device)
  if peak is None or not hardware.is_known_tpu(device):
    raise ValueError(f"hardware.py does not know {device.device_kind}")
  chip, per_chip = hardware.tpu_chip(device), hardware.devices_per_chip(device)
  predicted = config.batch_size * flops.predicted_bytes(config.model)
  forward = flops.flops_per_byte(config.model) * predicted / devices / peak
  traffic = memory_traffic(config, devices, tensor, step)
  return Bounds(
    compute=forward * passes(config, step),
    memory=traffic / (chip.memory_rate / per_chip),
    links=wire_bytes / (2 * chip.link_rate),
    model_compute=forward * (flops.TRAINING_FACTOR if step == "train" else 1),
    network=network_bytes / (chip.network_rate / per_chip) if chip.network_rate else 0.0,
  )


def memory_traffic(config: Config, devices: int, tensor: int, step: str) -> float:
  """Bytes that each device moves to and from its memory in one step."""
  model, count = config.model, passes(config, step)
  parameters = flops.parameter_count(model)
  weights = 2 * parameters / tensor * count * (config.accumulate if step == "train" else 1)
  per_parameter = 8 * (2 + config.optimizer.moments)  # value, gradient and moments, float32, read and written
  optimizer = per_parameter * parameters / devices if step == "train" else 0.0
  if isinstance(model, MegabyteConfig):
    levels = zip(model.levels, model.spans, strict=True)
    per_row = sum(_activations(model, level, model.context // level.patch_size, span) for level, span in levels)
    per_row += 3 * 4 * model.vocab_size * model.context
  else:
    per_row = _activations(model, model.level, model.latents, model.latents)
    per_row += 3 * 4 * model.vocab_size * model.latents
    keys = (model.context - model.latents / 2) * model.num_heads * 2 * 4
    per_row += model.latents * keys + 4 * 2 * model.width * model.context  # the cross-attention layer
  return weights + optimizer + config.batch_size * per_row * count / devices


def _activations(model: ModelConfig, level: Level, slots: int, span: int) -> float:
  """Bytes that one forward pass of a level's blocks moves for one row."""
  per_slot = 2 * (_WIDTHS * level.width + (_GATED_HIDDENS if model.gated else _HIDDENS) * model.hidden(level))
  own = span // level.patch_size
  fused = own == slots and own >= 128 and own % 128 == 0  # splash
  if not fused:  # logits are written and read, float32
    per_slot += 2 * 4 * level.num_heads * (own + level.cross_patch)
  return level.num_layers * slots * per_slot
