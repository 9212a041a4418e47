"""Bounds the time of a training step on TPUs from below: by compute, by memory traffic and by communication.

Compute is exact (models/flops.py plus recomputation). Memory traffic is a closed-form estimate, because XLA reports the
body of a loop only once. It covers the weights of each pass, the optimizer state, the arrays between a block's matrix
products, and the attention probabilities where no fused kernel keeps them on the chip. Communication is taken from the
collectives of the compiled program: over the links within a slice, over the data centre's network between slices.
"""

from __future__ import annotations

import dataclasses

import jax

from megabyte_jax.config import Config, Level, ModelConfig
from megabyte_jax.models import flops
from megabyte_jax.parallel import hardware

_WIDTHS = 14  # arrays of a slot's width that a block reads or writes: norms, q, k, v, attended, residuals
_HIDDENS = 3  # arrays of the feed-forward width: written, read for the activation, read for the product
_GATED_HIDDENS = 5  # the first two twice


@dataclasses.dataclass(frozen=True)
class Bounds:
  """Seconds that one step would take if a single resource limited it.

  Attributes:
    compute: matrix products at the chips' peak, recomputation included.
    memory: HBM traffic.
    links: communication within a slice, over both directions of one axis of the torus, without any overlap.
    model_compute: as compute, but without recomputation; the numerator of MFU.
    network: communication between slices over the data centre's network; 0 on one slice, or where the chip's rate is
      unknown.
  """

  compute: float
  memory: float
  links: float
  model_compute: float
  network: float = 0.0

  @property
  def step(self) -> float:
    """Seconds of a step with perfect overlap: a true bound unless memory, which is an estimate, is the largest."""
    return max(self.compute, self.memory, self.links, self.network)

  @property
  def mfu(self) -> float:
    """Model FLOPs utilisation of a step that takes `step` seconds, between 0 and 1."""
    return self.model_compute / self.step


def passes(config: Config, step: str, tensor: int) -> float:
  """Returns the cost of a step in forward passes: 1, or in training 3 and the share that is recomputed.

  Args:
    config, step, tensor: as in `bounds`.
  """
  if step != "train":
    return 1.0
  # `named` recomputes one product of a block, attention's output: D^2 of 12 D^2, and a little (0.02) for norms and
  # activations. Where devices sum that output it is kept.
  named = 0.1 if tensor == 1 else 0.02
  return flops.TRAINING_FACTOR + {"none": 0.0, "named": named, "full": 1.0}[config.model.remat]


def bounds(
  config: Config,
  device: jax.Device,
  devices: int,
  tensor: int,
  step: str,
  wire_bytes: float,
  network_bytes: float = 0.0,
) -> Bounds:
  """Returns the bounds of one train or eval step.

  Args:
    config: the run.
    device: one of the mesh's devices; all are alike.
    devices: number of devices on the mesh.
    tensor: size of the mesh axis `tensor`.
    step: train | eval.
    wire_bytes: bytes that each device sends in one step within its slice.
    network_bytes: bytes that each device sends in one step to other slices.

  Raises:
    ValueError: hardware.py does not know the device.
  """
  peak = hardware.peak_flops(device)
  if peak is None or not hardware.is_known_tpu(device):
    raise ValueError(f"hardware.py does not know {device.device_kind}")
  chip, per_chip = hardware.tpu_chip(device), hardware.devices_per_chip(device)
  predicted = config.bytes_per_step
  forward = flops.flops_per_byte(config.model) * predicted / devices / peak
  counted = flops.flops_per_byte(config.model, training=step == "train") * predicted / devices / peak
  again = passes(config, step, tensor) - (flops.TRAINING_FACTOR if step == "train" else 1)
  traffic = memory_traffic(config, devices, tensor, step)
  return Bounds(
    compute=counted + forward * again,
    memory=traffic / (chip.memory_rate / per_chip),
    links=wire_bytes / (2 * chip.link_rate),
    model_compute=counted,
    network=network_bytes / (chip.network_rate / per_chip) if chip.network_rate else 0.0,
  )


def memory_traffic(config: Config, devices: int, tensor: int, step: str) -> float:
  """Estimates the bytes that each device moves to and from its HBM in one step; arguments as in `bounds`."""
  model, count = config.model, passes(config, step, tensor)
  parameters = model.parameter_count()
  weights = 2 * parameters / tensor * count * (config.accumulate if step == "train" else 1)
  per_parameter = 8 * (2 + config.optimizer.moments)  # value, gradient and moments, float32, read and written
  optimizer = per_parameter * parameters / devices if step == "train" else 0.0
  stacks = zip(model.levels, model.slots, model.spans, strict=True)
  per_row = sum(_activations(model, level, slots, span) for level, slots, span in stacks)
  per_row += 3 * 4 * model.vocab_size * model.predicted_bytes
  if cross := model.cross_attention:
    per_row += cross.queries * cross.keys * cross.heads * 2 * 4 + 4 * 2 * cross.width * model.context
  if remembered := model.memory_traffic:
    per_row += remembered.scores * 2 * 4 + remembered.numbers * 2
  return weights + optimizer + config.batch_size * per_row * count / devices


def _activations(model: ModelConfig, level: Level, slots: int, span: int) -> float:
  """Estimates the bytes that one forward pass of a level's blocks moves for one row."""
  per_slot = 2 * (_WIDTHS * level.width + (_GATED_HIDDENS if model.gated else _HIDDENS) * model.hidden(level))
  own = span // level.patch_size
  fused = own == slots and own >= 128 and own % 128 == 0  # splash
  if not fused and model.memory_traffic is None:  # logits are written and read, float32
    per_slot += 2 * 4 * level.num_heads * (own + level.cross_patch)
  return level.num_layers * slots * per_slot
