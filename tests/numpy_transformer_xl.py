"""Transformer-XL once more, in slow float64 NumPy, written from arXiv 1901.02860.

A document is one list of tokens; every slot's hidden state is computed once, in the segment that it belongs to. There
is neither a batch nor a mask: what may not be seen is never looked at.
"""

from __future__ import annotations

import math

import numpy as np
from numpy_models import activation, float64, norm


def sinusoid(distance, width):
  angles = [distance / 10_000 ** (2 * i / width) for i in range(width // 2)]
  return np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def normed_head(x, p, config):
  return x / math.sqrt((x**2).mean() + 1e-5) * p["scale"] if config.qk_norm else x


def attended(p, i, inputs, own_start, config, u, v):
  """What slot i of a layer gets from the slots that it sees, and the residual stream is not added yet."""
  scale_of = (lambda x: norm(x, p["attention_norm"], config)) if config.norm_place == "pre" else (lambda x: x)
  first = max(0, own_start - config.memory_length)
  seen = [j for j in range(first, i + 1) if not config.same_length or i - j < config.memory_length]
  x_i, out = scale_of(inputs[i]), np.zeros(config.width)
  for h in range(config.num_heads):
    q = normed_head(x_i @ p["query"]["kernel"][:, h], p.get("q_norm"), config)
    scores, values = [], []
    for j in seen:
      x_j = scale_of(inputs[j])
      k = normed_head(x_j @ p["key_value"]["kernel"][:, 0, h], p.get("k_norm"), config)
      distance = min(i - j, config.clamp_length) if config.clamp_length else i - j
      r = sinusoid(distance, config.width) @ p["distance"]["kernel"][:, h]
      scores.append((q @ k + q @ r + u[h] @ k + v[h] @ r) / math.sqrt(len(q)))  # (a), (b), (c), (d)
      values.append(x_j @ p["key_value"]["kernel"][:, 1, h])
    weights = np.exp(np.array(scores) - max(scores))
    out += (weights / weights.sum()) @ np.array(values) @ p["attention_out"]["kernel"][h]
  return out


def feed_forward(p, x, config):
  hidden = np.tensordot(x, p["ff_in"]["kernel"], 1)
  hidden = activation(hidden + p["ff_in"]["bias"] if config.bias else hidden, config)
  out = hidden @ p["ff_out"]["kernel"]
  return out + p["ff_out"]["bias"] if config.bias else out


def layer_of(tree, n):
  return {name: layer_of(value, n) if isinstance(value, dict) else value[n] for name, value in tree.items()}


def logits(parameters, config, tokens):
  """Of every token of a document that is read in segments of `config.context`, [n, V]."""
  p = float64(parameters)
  embedder, pre = p["embedder"], config.norm_place == "pre"
  scale = math.sqrt(config.width) if config.scaled_embeddings else 1.0
  stream = [embedder["pad"] * scale] + [embedder["table"][token] * scale for token in tokens[:-1]]
  for n in range(config.num_layers):
    layer = layer_of(p["blocks"], n)
    u, v = (layer["u"], layer["v"]) if config.untie else (p["u"], p["v"])
    outputs = []
    for i in range(len(tokens)):
      own_start = i // config.context * config.context
      x = stream[i] + attended(layer, i, stream, own_start, config, u, v)
      if pre:
        x = x + feed_forward(layer, norm(x, layer["ff_norm"], config), config)
      else:
        x = norm(x, layer["attention_norm"], config)
        x = norm(x + feed_forward(layer, x, config), layer["ff_norm"], config)
      outputs.append(x)
    stream = outputs
  last = [norm(x, p["norm"], config) if pre else x for x in stream]
  factor = config.width**-0.5 if config.logit_scale == "width" else 1.0
  table = embedder["table" if config.tied_output else "output"]
  return np.array([factor * x @ table.T for x in last])
