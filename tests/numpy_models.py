"""The models once more, in slow float64 NumPy, written from the paper's definitions with a loop for every index.

Nothing is shared with the package but the configuration and the names of parameters. There is no padding,
shifting, masking or batching here: what may not be seen is never looked at.
"""

from __future__ import annotations

import math

import numpy as np

from megabyte_jax.config import PerceiverARConfig


def float64(parameters):
  if isinstance(parameters, dict):
    return {name: float64(value) for name, value in parameters.items()}
  return np.asarray(parameters, np.float64)


def log_softmax(logits):
  return logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())


def norm(x, p, options):
  """LayerNorm or RMSNorm of one vector."""
  if options.norm == "layernorm":
    x = x - x.mean()
  y = x / math.sqrt((x**2).mean() + 1e-5) * p["scale"]
  return y + p["bias"] if options.bias and options.norm == "layernorm" else y


def activation(x, options):
  if options.activation == "swiglu":
    gate, value = x
    return gate / (1 + np.exp(-gate)) * value
  if options.activation == "relu":
    return np.maximum(x, 0)
  if options.activation == "silu":
    return x / (1 + np.exp(-x))
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # gelu's usual approximation


def linear(x, p, options):
  """One vector times a matrix, or times each of the two of a gated layer, [D, 2, F]."""
  y = np.tensordot(x, p["kernel"], axes=1)
  return y + p["bias"] if options.bias else y


def of_unit_size(head, scale):
  """RMSNorm of one query or key."""
  return head / math.sqrt((head**2).mean() + 1e-5) * scale


def turned(key, distance):
  """A key that lies `distance` slots after the query, as rotary positions show it to the query (Su et al., 2021)."""
  half, out = len(key) // 2, np.empty_like(key)
  for i in range(half):
    angle = distance * 10_000.0 ** (-i / half)
    out[i] = key[i] * math.cos(angle) - key[half + i] * math.sin(angle)
    out[half + i] = key[half + i] * math.cos(angle) + key[i] * math.sin(angle)
  return out


def attend(query, seen, rotary):
  """One head of one query over `seen`, a list of (distance from the query, key, value)."""
  keys = [turned(key, distance) if rotary else key for distance, key, _ in seen]
  scores = np.array([query @ key / math.sqrt(len(query)) for key in keys])
  weights = np.exp(scores - scores.max())
  weights /= weights.sum()
  return sum(weight * value for weight, (_, _, value) in zip(weights, seen, strict=True))


def feed_forward(x, p, options):
  return linear(activation(linear(norm(x, p["ff_norm"], options), p["ff_in"], options), options), p["ff_out"], options)


def attention_output(heads, p, options):
  """The heads' results [H, K] back to the width of the residual stream."""
  return linear(np.concatenate(heads), {**p, "kernel": p["kernel"].reshape(-1, p["kernel"].shape[-1])}, options)


def decoder(spans, p, level, options):
  """Eqs. (3) and (5): a pre-norm Transformer over each span, a list of slots; with cross-patch attention, 2.3.2."""
  spans = [list(span) for span in spans]
  for i in range(level.num_layers):
    block = at_layer(p["blocks"], i)
    queries, keys, values = [], [], []
    for span in spans:
      qkv = [project(norm(x, block["attention_norm"], options), block["qkv"], options) for x in span]
      if options.qk_norm:
        for slot in qkv:
          for h in range(level.heads[0]):
            slot[0][h] = of_unit_size(slot[0][h], block["q_norm"]["scale"])
            slot[1][h] = of_unit_size(slot[1][h], block["k_norm"]["scale"])
      for part, out in enumerate((queries, keys, values)):
        out.append([slot[part] for slot in qkv])
    for n, span in enumerate(spans):
      attended = []
      for m in range(len(span)):
        seen = [(n, j) for j in range(m + 1) if not level.attention_window or m - j < level.attention_window]
        if n > 0 and level.cross_patch:
          M = len(spans[n - 1])
          seen = [(n - 1, j) for j in range(M - level.cross_patch, M)] + seen
        heads = []
        for h in range(level.heads[0]):
          # A slot of the previous span lies as far back as if both spans were one.
          distance = {(k, j): j - m - (len(spans[n - 1]) if k < n else 0) for k, j in seen}
          entries = [(distance[k, j], keys[k][j][h], values[k][j][h]) for k, j in seen]
          heads.append(attend(queries[n][m][h], entries, level.rotary))
        attended.append(attention_output(heads, block["attention_out"], options))
      for m in range(len(span)):
        span[m] = span[m] + attended[m]
        span[m] = span[m] + feed_forward(span[m], block, options)
  return [[norm(x, p["norm"], options) for x in span] for span in spans]


def at_layer(p, i):
  """The parameters of one layer from stacked ones."""
  return {name: at_layer(value, i) if isinstance(value, dict) else value[i] for name, value in p.items()}


def project(x, p, options):
  """[parts, H, K] from one vector, for a kernel [D, parts, H, K]."""
  y = np.tensordot(x, p["kernel"], axes=1)
  return y + p["bias"] if options.bias else y


def embed(bytes_, p, level, options):
  """Eq. (1) for the bytes of one span; then the convolutions of section 2.3.1."""
  h = [p["table"][x] + p["positions"][t] for t, x in enumerate(bytes_)]
  for number, size in enumerate(level.conv_filters):
    conv, after = p["convolutions"][number], []
    for t in range(len(h)):
      y = conv["bias"].copy() if options.bias else np.zeros_like(h[t])
      for back in range(min(size, t + 1)):
        y += h[t - back] @ conv["kernel"][size - 1 - back]
      after.append(h[t] + np.maximum(y, 0))
    h = after
  return h


def input_slots(bytes_, p, level, options):
  """Eq. (2) for one span: the pad, then the concatenated bytes of each element but the last."""
  h, S = embed(bytes_, p, level, options), level.patch_size
  slots = [p["pad"].reshape(-1)]
  for j in range(1, -(-len(bytes_) // S)):
    slots.append(np.concatenate([h[t] for t in range((j - 1) * S, j * S)]))
  return slots


def megabyte(bytes_, p, config):
  """Logits [T, V] of one text of any length up to the context."""
  slots_above = None
  for number, (level, span) in enumerate(zip(config.levels, config.spans, strict=True)):
    q = p["levels"][number]
    spans = [
      input_slots(bytes_[start : start + span], q["embedder"], level, config) for start in range(0, len(bytes_), span)
    ]
    if slots_above is not None:  # eq. (4)
      size = q["from_parent"].shape[0]
      for above, slots in zip(slots_above, spans, strict=True):
        for j in range(len(slots)):
          slots[j] = slots[j] + above[j * size : (j + 1) * size] @ q["from_parent"]
    out = decoder(spans, q["decoder"], level, config)
    slots_above = [slot for span_slots in out for slot in span_slots]
  table = output_table(q["embedder"], config)  # eq. (6)
  d, S = table.shape[1], config.levels[-1].patch_size
  return np.stack([table @ slots_above[t // S][t % S * d : (t % S + 1) * d] for t in range(len(bytes_))])


def output_table(embedder, options):
  """The byte table, or the output's own matrix, as logits are products with it."""
  table = embedder["table" if options.tied_output else "output"]
  return table / math.sqrt(table.shape[1]) if options.logit_scale == "width" else table


def perceiver_ar(bytes_, p, config):
  """Logits [N, V] of the last N bytes: cross-attention to everything before, then decoder layers over N latents."""
  level, cross = config.level, p["cross"]
  slots = input_slots(bytes_, p["embedder"], level, config)
  N = min(config.latents, len(slots))
  key_values = [project(norm(x, cross["context_norm"], config), cross["key_value"], config) for x in slots]
  latents = []
  for at in range(len(slots) - N, len(slots)):
    query = project(norm(slots[at], cross["query_norm"], config), cross["query"], config)
    heads = []
    for h in range(level.heads[0]):
      keys = [key_values[j][0][h] for j in range(at + 1)]
      if config.qk_norm:
        query[h] = of_unit_size(query[h], cross["q_norm"]["scale"])
        keys = [of_unit_size(key, cross["k_norm"]["scale"]) for key in keys]
      seen = [(j - at, keys[j], key_values[j][1][h]) for j in range(at + 1)]
      heads.append(attend(query[h], seen, config.rotary))
    x = slots[at] + attention_output(heads, cross["attention_out"], config)
    latents.append(x + feed_forward(x, cross, config))
  (out,) = decoder([latents], p["decoder"], level, config)
  return np.stack([output_table(p["embedder"], config) @ h for h in out])


def logits(bytes_, parameters, config):
  """Of one text, by either kind of model."""
  model = perceiver_ar if isinstance(config, PerceiverARConfig) else megabyte
  return model([int(x) for x in bytes_], float64(parameters), config)
