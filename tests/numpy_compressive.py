"""The Compressive Transformer once more, in slow float64 NumPy: memories are lists, and every index has a loop."""

from __future__ import annotations

import math

import numpy as np
from numpy_models import activation, at_layer, float64, linear, norm, of_unit_size, output_table


def sinusoid(distance, width):
  angles = [distance * 10_000.0 ** (-i / width) for i in range(0, width, 2)]
  return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def heads_of(x, kernel):
  """[H, K] from one vector, by a kernel [D, H, K] without bias."""
  return np.tensordot(x, kernel, axes=1)


def softmax(scores):
  weights = np.exp(np.array(scores) - max(scores))
  return weights / weights.sum()


def projected(x, block, config):
  """Query, key and value [H, K] of a slot, from its layer's input."""
  y = norm(x, block["attention_norm"], config) if config.norm_place == "pre" else x
  q, (k, v) = heads_of(y, block["query"]["kernel"]), np.tensordot(y, block["key_value"]["kernel"], axes=1)
  if config.qk_norm:
    q = np.stack([of_unit_size(head, block["q_norm"]["scale"]) for head in q])
    k = np.stack([of_unit_size(head, block["k_norm"]["scale"]) for head in k])
  return q, k, v


def layer(earlier, xs, block, u, v, config):
  """Outputs of a segment's slots; and the attention that each earlier slot and each own one gets, summed."""
  slots = [projected(x, block, config) for x in [*earlier, *xs]]
  used, outputs = np.zeros(len(slots)), []
  for t, x in enumerate(xs):
    at, heads = len(earlier) + t, []
    for h in range(config.num_heads):
      scores = []
      for j in range(at + 1):
        distance = min(at - j, config.clamp_length) if config.clamp_length else at - j
        r = heads_of(sinusoid(distance, config.width), block["distance"]["kernel"])[h]
        query, key = slots[at][0][h], slots[j][1][h]
        scores.append(((query + u[h]) @ key + (query + v[h]) @ r) / math.sqrt(len(key)))
      weights = softmax(scores)
      used[: at + 1] += weights / config.num_heads
      heads.append(sum(weight * slots[j][2][h] for j, weight in enumerate(weights)))
    x = x + np.tensordot(np.stack(heads), block["attention_out"]["kernel"], axes=2)
    pre = config.norm_place == "pre"
    x = x if pre else norm(x, block["attention_norm"], config)
    y = norm(x, block["ff_norm"], config) if pre else x
    x = x + linear(activation(linear(y, block["ff_in"], config), config), block["ff_out"], config)
    outputs.append(x if pre else norm(x, block["ff_norm"], config))
  return outputs, used


def compressed(old, used, p, config):
  """f_c: the T oldest slots of the memory as T / c."""
  c, T, kind = config.compression_rate, len(old), config.compression
  if kind == "most_used":
    return [old[j] for j in sorted(sorted(range(T), key=lambda j: -used[j])[: T // c])]
  if kind in ("mean", "max"):
    return [getattr(np.stack(old[j : j + c]), kind)(axis=0) for j in range(0, T, c)]

  def bias(name):
    return p[name] if config.bias else 0.0

  if kind == "dilated_convolution":
    after = []
    for j in range(T):
      taps = [(k, j + (k - 1) * c) for k in range(3)]
      y = sum(old[s] @ p["dilated_kernel"][k] for k, s in taps if 0 <= s < T) + bias("dilated_bias")
      after.append(old[j] + np.maximum(y, 0))
    old = after
  return [sum(old[j + k] @ p["kernel"][k] for k in range(c)) + bias("bias") for j in range(0, T, c)]


def by_content(x, slots, block, config):
  """What a slot reads from others when positions play no part, [H, K]."""
  query, found = projected(x, block, config)[0], [projected(slot, block, config) for slot in slots]
  heads = []
  for h in range(config.num_heads):
    weights = softmax([query[h] @ key[h] / math.sqrt(query.shape[1]) for _, key, _ in found])
    heads.append(sum(weight * value[h] for weight, (_, _, value) in zip(weights, found, strict=True)))
  return np.stack(heads)


def logits_and_losses(tokens, parameters, config):
  """Logits [T, V] of a document; and of each segment the attention-reconstruction loss."""
  p = float64(parameters)
  transformer, L, T = p["transformer"], config.num_layers, config.context
  table = transformer["embedder"]["table"]
  scale = math.sqrt(config.width) if config.scaled_embeddings else 1.0
  inputs = [scale * x for x in [transformer["embedder"]["pad"], *table[list(tokens[:-1])]]]
  memory, uses, compressed_memory = ([[] for _ in range(L)] for _ in range(3))
  logits, losses = [], []
  for start in range(0, len(tokens), T):
    xs, loss, last = inputs[start : start + T], 0.0, start + T > len(tokens)
    for i in range(L):
      block = at_layer(transformer["blocks"], i)
      of_offsets = block if config.untie else transformer
      earlier = compressed_memory[i] + memory[i]
      outputs, used = layer(earlier, xs, block, of_offsets["u"], of_offsets["v"], config)
      for j in range(len(memory[i])):
        uses[i][j] += used[len(compressed_memory[i]) + j]
      if len(memory[i]) == config.memory_length and not last:
        of_layer = at_layer(p["compressions"], i) if "compressions" in p else None
        old = memory[i][:T]
        new = compressed(old, uses[i][:T], of_layer, config)
        if of_layer:
          for x in xs:
            error = by_content(x, old, block, config) - by_content(x, new, block, config)
            loss += (error**2).mean()
        compressed_memory[i] = (compressed_memory[i] + new)[-config.compressed_length :]
      memory[i] = (memory[i] + xs)[-config.memory_length :]
      uses[i] = (uses[i] + list(used[len(earlier) :]))[-config.memory_length :]
      xs = outputs
    final = [norm(x, transformer["norm"], config) if config.norm_place == "pre" else x for x in xs]
    logits += [output_table(transformer["embedder"], config) @ x for x in final]
    losses.append(loss)
  return np.stack(logits), losses
