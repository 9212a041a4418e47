"""The Block-Recurrent Transformer once more, in slow float64 NumPy, over a whole document: it knows no segments."""

from __future__ import annotations

import math

import numpy as np
from numpy_models import activation, at_layer, feed_forward, float64, linear, norm, output_table


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def unit(x):
  return x / math.sqrt((x**2).sum() + 1e-6)


def bucket(distance):
  """T5's, of 32: sixteen exact ones, sixteen that grow with the logarithm up to a distance of 128."""
  if distance < 16:
    return distance
  return min(31, 16 + int(math.log(distance / 16) / math.log(8) * 16))


def attend(query, scale, seen, biases=None):
  """One head over `seen`, a list of (key, value); queries and keys have unit length already."""
  scores = np.array([scale * (query @ key) for key, _ in seen]) + (0 if biases is None else np.array(biases))
  weights = np.exp(scores - scores.max())
  return sum(weight * value for weight, (_, value) in zip(weights / weights.sum(), seen, strict=True))


def parts_of(x, kernel):
  """[parts, H, K] from one vector, by a kernel [D, parts, H, K] without bias."""
  return np.tensordot(x, kernel, axes=1)


def out(heads, kernel):
  return np.tensordot(np.stack(heads), kernel, axes=2)


def gate(h, c, p, config):
  """Eqs. (1) to (7) for one state; h has the axes of the kernel's inputs."""
  y = np.tensordot(h, p["linear"]["kernel"], axes=h.ndim)
  y = y + p["linear"]["bias"] if config.bias else y
  if config.gate == "fixed":
    g = sigmoid(p["b_g"])
    return c * g + y * (1 - g)
  i, f = np.tensordot(h, p["gates"]["kernel"], axes=h.ndim) + p["b_if"]
  return c * sigmoid(f + 1) + np.tanh(y) * sigmoid(i - 1)


def state_parts(states, p, config):
  """Keys, values, queries for states and queries for tokens of each state, [4, H, K]; keys and queries unit."""
  found = []
  for number, c in enumerate(states):
    parts = parts_of(norm(c, p["norm"], config) + p["positions"][number], p["projections"]["kernel"])
    for part in (0, 2, 3):
      parts[part] = [unit(head) for head in parts[part]]
    found.append(parts)
  return found


def next_states(states, parts, tokens, p, config):
  """The horizontal direction, after a window; tokens is a list of (keys [H, K], values [H, K])."""
  after = []
  for c, own in zip(states, parts, strict=True):
    heads = range(config.num_heads)
    of_states = [attend(own[2][h], p["self_scale"][h], [(o[0][h], o[1][h]) for o in parts]) for h in heads]
    of_tokens = [attend(own[3][h], p["cross_scale"][h], [(k[h], v[h]) for k, v in tokens]) for h in heads]
    c = gate(np.stack([of_states, of_tokens]), c, p["gate"], config)
    if not config.skip:
      hidden = activation(linear(norm(c, p["ff_norm"], config), p["ff_in"], config), config)
      c = gate(hidden, c, p["ff_gate"], config)
    after.append(c)
  return after


def logits(tokens, parameters, config):
  """Logits [T, V] of a document of any length."""
  p, W, T, H = float64(parameters), config.window, len(tokens), config.num_heads
  table = p["embedder"]["table"]
  xs = [p["embedder"]["pad"]] + [table[token] for token in tokens[:-1]]
  for layer in range(config.num_layers):
    block = at_layer(p["blocks"], layer)
    normed = [norm(x, block["attention_norm"], config) for x in xs]
    queries, keys, values = [], [], []
    for y in normed:
      q, k, v = parts_of(y, block["qkv"]["kernel"])
      queries.append([unit(head) for head in q])
      keys.append([unit(head) for head in k])
      values.append(v)
    added = []
    for t in range(T):
      seen = range(max(0, t - W + 1), t + 1)
      heads = [
        attend(
          queries[t][h],
          block["scale"][h],
          [(keys[s][h], values[s][h]) for s in seen],
          [block["relative"][bucket(t - s)][h] for s in seen],
        )
        for h in range(H)
      ]
      y = out(heads, block["attention_out"]["kernel"])
      added.append(y + block["attention_out"]["bias"] if config.bias else y)
    if layer in config.cells:
      cell = at_layer(p["cells"], config.cells.index(layer))
      states = list(cell["first"])
      for start in range(0, T, W):
        parts = state_parts(states, cell, config)
        window = range(start, min(start + W, T))
        for t in window:
          heads = []
          for h in range(H):
            query = unit(np.tensordot(normed[t], cell["query"]["kernel"], axes=1)[h])
            heads.append(attend(query, cell["query_scale"][h], [(o[0][h], o[1][h]) for o in parts]))
          added[t] = added[t] + out(heads, cell["attention_out"]["kernel"])
        tokens_seen = [(keys[s], values[s]) for s in range(max(0, start - W), window[-1] + 1)]
        states = next_states(states, parts, tokens_seen, cell, config)
    xs = [x + y for x, y in zip(xs, added, strict=True)]
    xs = [x + feed_forward(x, block, config) for x in xs]
  return np.stack([output_table(p["embedder"], config) @ norm(x, p["norm"], config) for x in xs])
