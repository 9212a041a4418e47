"""Computes causal attention within spans, behind one contract.

Shapes: B batch, N spans, M slots of a span, S earlier slots, H heads, K head width. A level whose span is
the whole context has N = 1 (global attention); the local model has one span per patch (local attention).
Batch and spans are never merged, so that spans can lie on different devices without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from megabyte_jax.config import ModelConfig
from megabyte_jax.errors import ConfigError
from megabyte_jax.models.kernels import fused_attention
from megabyte_jax.models.kernels.fused_attention import Shaped
from megabyte_jax.models.layers import dropout as dropout_lib
from megabyte_jax.models.parameters import compute_dtype
from megabyte_jax.parallel.backend import platform

_FUSED: dict[str, Callable[..., jax.Array]] = {"cudnn": fused_attention.cudnn, "splash": fused_attention.splash}
_FUSED_MIN_SLOTS = 64  # below, the matrix products of a span are too small for a fused kernel to help
_SHORT_SPAN = 16  # slots, up to which sums of products beat matrix products on a GPU


class Past(NamedTuple):
  """Holds keys and values from before the slots at hand: a cache, or the end of the previous span.

  Attributes:
    k_BNSHK, v_BNSHK: keys (rotated, where positions are rotary) and values.
    visible: bool, broadcastable to [B, N, M, S]: which of them each slot sees.
  """

  k_BNSHK: jax.Array
  v_BNSHK: jax.Array
  visible: jax.Array


def attention(
  q_BNMHK: jax.Array,
  k_BNMHK: jax.Array,
  v_BNMHK: jax.Array,
  *,
  past: Past | None = None,
  window: int = 0,
  implementation: str = "auto",
  dropout: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Lets each slot attend to itself, to earlier slots of its span, and to what it sees of `past`.

  Args:
    q_BNMHK, k_BNMHK, v_BNMHK: queries, keys and values; scaling by 1/sqrt(K) is done here.
    past: further keys and values that come before the span's own.
    window: a slot sees only itself and the `window - 1` slots before it; 0 sees all. `past.visible`
      is not narrowed by it.
    implementation: xla | cudnn | splash | auto. auto takes splash on a TPU and cudnn on a GPU where they can serve
      and spans are long, and tiles of short spans on a GPU (local_attention.py). One asked for by name must serve all
      whole contexts (N = 1); many spans and calls with a `past` take it where it can. Everything else is xla's.
    dropout, dropout_key: dropout on the attention probabilities; none without a key.

  Returns:
    The attended values, [B, N, M, H, K], in the dtype of q. The softmax is float32.

  Raises:
    ConfigError: the implementation asked for cannot serve this call.
  """
  rate = dropout if dropout_key is not None else 0.0
  choice = choose_attention(q_BNMHK, past=past, window=window, implementation=implementation, drops=rate > 0)
  if choice.name in _FUSED:
    return _FUSED[choice.name](q_BNMHK, k_BNMHK, v_BNMHK, window)
  if choice.name == "windowed":
    return _windowed(q_BNMHK, k_BNMHK, v_BNMHK, window, rate, dropout_key)
  if choice.name == "tiles":
    of_past = None if past is None else (past.k_BNSHK, past.v_BNSHK, past.visible[:, 0, 0])
    return fused_attention.tile(q_BNMHK, k_BNMHK, v_BNMHK, of_past)
  if choice.name == "masked cudnn":
    return _masked(q_BNMHK, k_BNMHK, v_BNMHK, past)
  M = q_BNMHK.shape[2]
  distance_MM = jnp.arange(M)[:, None] - jnp.arange(M)[None, :]
  visible_MM = (distance_MM >= 0) & (distance_MM < (window or M))
  if choice.name == "short":
    return _short(q_BNMHK, k_BNMHK, v_BNMHK, visible_MM, past)
  if choice.name == "one slot":
    assert past is not None  # see choose_attention
    return _one_slot(q_BNMHK, k_BNMHK, v_BNMHK, past)
  return _xla(q_BNMHK, k_BNMHK, v_BNMHK, visible_MM, past, rate, dropout_key)


class Choice(NamedTuple):
  """Names an implementation of attention.

  Attributes:
    name: splash | cudnn | windowed (blocks of a sliding window, by XLA) | tiles (local_attention.py) | masked cudnn |
      short (sums of products, by XLA) | one slot (of a cache, on a CPU) | xla.
    reason: why it is none of the kernels, or ''.
  """

  name: str
  reason: str = ""


def choose_attention(q_BNMHK: Shaped, *, past: Past | None, window: int, implementation: str, drops: bool) -> Choice:
  """Chooses what `attention` computes with, for the device and mesh at hand; the arguments may be shapes.

  Args:
    drops: whether attention probabilities are dropped.

  Raises:
    ConfigError: the implementation asked for cannot serve this call.
  """
  _, N, M, _, _ = q_BNMHK.shape
  obstacles = {}
  for name in _FUSED:
    if implementation not in ("auto", name):
      continue
    obstacle = _obstacle(name, q_BNMHK, past is not None, drops)
    if implementation == name and obstacle and past is None and N == 1:
      raise ConfigError(f"model.attention={name} cannot serve here: {obstacle}; take model.attention=auto")
    if not obstacle and (implementation == name or M >= _FUSED_MIN_SLOTS):
      return Choice(name)
    obstacles[name] = obstacle or f"spans of {M} slots are short"
  earlier = past.k_BNSHK.shape[2] if past is not None else 0  # a cache of a short span holds that of the one before
  if window and past is None and window < M and M % window == 0 and N == 1:
    return Choice("windowed", _reason(implementation, obstacles, M))
  plain = not drops and not 0 < window < M
  if plain and implementation == "auto":
    obstacles["tiles"] = _tile_obstacle(q_BNMHK, past)
    if not obstacles["tiles"]:
      return Choice("tiles")
  if plain and past is not None and M >= _FUSED_MIN_SLOTS and implementation in ("auto", "cudnn"):
    obstacles["cudnn"] = fused_attention.masked_cudnn_obstacle(q_BNMHK, earlier + M)
    if not obstacles["cudnn"]:
      return Choice("masked cudnn")
  if plain and M == N == 1 and earlier > _SHORT_SPAN and platform() == "cpu":
    return Choice("one slot", _reason(implementation, obstacles, M))
  is_short = M <= _SHORT_SPAN and earlier <= 2 * _SHORT_SPAN and not drops and platform() == "gpu"
  return Choice("short" if is_short else "xla", _reason(implementation, obstacles, M))


def choose_cross_attention(q_B1NHK: Shaped, keys: int, *, implementation: str, drops: bool) -> Choice:
  """Chooses what `cross_attention` computes with for so many keys; as `choose_attention`."""
  if implementation not in ("auto", "cudnn"):
    return Choice("xla", f"model.attention={implementation}")
  obstacle = "it has no dropout on attention probabilities" if drops else ""
  if q_B1NHK.shape[2] < _FUSED_MIN_SLOTS:
    obstacle = obstacle or f"{q_B1NHK.shape[2]} latents are few"
  obstacle = obstacle or fused_attention.masked_cudnn_obstacle(q_B1NHK, keys)
  return (
    Choice("xla", _reason(implementation, {"cudnn": obstacle}, _FUSED_MIN_SLOTS))
    if obstacle
    else Choice("masked cudnn")
  )


def _reason(implementation: str, obstacles: dict[str, str], slots: int) -> str:
  """Says why no kernel serves: of the one that would be the fastest here."""
  if implementation == "xla":
    return "model.attention=xla"
  if platform() == "cpu":
    return "a CPU has no kernels"
  wanted = "splash" if platform() == "tpu" else "tiles" if slots < _FUSED_MIN_SLOTS else "cudnn"
  name = wanted if wanted in obstacles else next(iter(obstacles))
  return f"not {name}: {obstacles[name]}"


def choices(config: ModelConfig, rows: int) -> dict[str, Choice]:
  """Returns what each level of a model trains with in batches of so many rows, by the level's name."""
  if config.recurrent:
    return dict.fromkeys(config.level_names, Choice("xla", "kernels know no memory of earlier segments"))
  found, drops = {}, config.attention_dropout > 0
  if cross := config.cross_attention:
    q = jax.ShapeDtypeStruct((rows, 1, cross.queries, *config.levels[0].heads), compute_dtype(config))
    found["cross"] = choose_cross_attention(q, config.context, implementation=config.attention, drops=drops)
  for name, level, (spans, slots) in zip(config.level_names, config.levels, config.attention_shapes, strict=True):
    q = jax.ShapeDtypeStruct((rows, spans, slots, *level.heads), compute_dtype(config))
    past = None
    if level.cross_patch:
      end: Any = jax.ShapeDtypeStruct((rows, spans, level.cross_patch, *level.heads), q.dtype)
      visible: Any = jax.ShapeDtypeStruct((spans, 1, 1), jnp.bool_)
      past = Past(end, end, visible)
    found[name] = choose_attention(
      q, past=past, window=level.attention_window, implementation=config.attention, drops=drops
    )
  return found


def cross_attention(
  q_B1NHK: jax.Array,
  k_B1THK: jax.Array,
  v_B1THK: jax.Array,
  visible_BNT: jax.Array,
  *,
  implementation: str = "auto",
  dropout: float = 0.0,
  dropout_key: jax.Array | None = None,
) -> jax.Array:
  """Lets each of N slots attend to those of T keys that it sees.

  Args:
    visible_BNT: bool, [B, N, T] or one for all rows, [1, N, T].
    implementation, dropout, dropout_key: see `attention`. auto and cudnn take cuDNN where it can serve.

  Returns:
    The attended values, [B, 1, N, H, K], in the dtype of q. The softmax is float32.
  """
  rate = dropout if dropout_key is not None else 0.0
  visible_B1NT = visible_BNT[:, None]
  choice = choose_cross_attention(q_B1NHK, k_B1THK.shape[2], implementation=implementation, drops=rate > 0)
  if choice.name == "masked cudnn":
    return fused_attention.masked_cudnn(q_B1NHK, k_B1THK, v_B1THK, visible_B1NT)
  return _xla(q_B1NHK, k_B1THK, v_B1THK, visible_B1NT, None, rate, dropout_key)


def _masked(q_BNMHK, k_BNMHK, v_BNMHK, past):
  """Causal attention within spans and to what each slot sees of `past`, by cuDNN."""
  M = q_BNMHK.shape[2]
  k, v, visible = _with_past(k_BNMHK, v_BNMHK, jnp.tril(jnp.ones((M, M), bool)), past)
  return fused_attention.masked_cudnn(q_BNMHK, k, v, visible)


def _with_past(k_BNMHK, v_BNMHK, visible_MM, past):
  """Keys and values of the S slots of `past`, then of the span; and which each slot sees, [.., .., M, S + M]."""
  k, v = (jnp.concatenate(pair, axis=2) for pair in ((past.k_BNSHK, k_BNMHK), (past.v_BNSHK, v_BNMHK)))
  M, S = visible_MM.shape[0], past.k_BNSHK.shape[2]
  earlier = _four_axes(past.visible)
  earlier = jnp.broadcast_to(earlier, (*earlier.shape[:2], M, S))
  own = jnp.broadcast_to(visible_MM, (*earlier.shape[:2], M, M))
  return k, v, jnp.concatenate([earlier, own], axis=-1)


def _four_axes(visible):
  """B N M S, where those that are missing in front are 1."""
  return visible.reshape((1,) * (4 - visible.ndim) + visible.shape)


def _xla(q_BNMHK, k_BNMHK, v_BNMHK, visible_MM, past, dropout, dropout_key):
  """The reference: logits, a masked float32 softmax, weighted sum; `past` is a second block of keys."""
  scale = q_BNMHK.shape[-1] ** -0.5
  blocks = [(k_BNMHK, v_BNMHK, visible_MM)] + ([past] if past is not None else [])
  logits = []
  for k, _, visible in blocks:
    block = jnp.einsum("BNMHK,BNSHK->BNHMS", q_BNMHK, k, preferred_element_type=jnp.float32) * scale
    logits.append(jnp.where(_four_axes(visible)[:, :, None], block, jnp.finfo(jnp.float32).min))
  weights = jax.nn.softmax(jnp.concatenate(logits, axis=-1), axis=-1)
  weights = dropout_lib.dropout(weights, dropout, dropout_key).astype(q_BNMHK.dtype)
  M = k_BNMHK.shape[2]
  out = jnp.einsum("BNHMS,BNSHK->BNMHK", weights[..., :M], v_BNMHK)
  if past is not None:
    out += jnp.einsum("BNHMS,BNSHK->BNMHK", weights[..., M:], past.v_BNSHK)
  return out


def _short(q_BNMHK, k_BNMHK, v_BNMHK, visible_MM, past):
  """As `_xla` for many short spans: products and sums that XLA fuses, where small matrix products would crawl."""
  k, v, visible = k_BNMHK, v_BNMHK, visible_MM
  if past is not None:
    k, v, visible = _with_past(k_BNMHK, v_BNMHK, visible_MM, past)
  q, k, v = (a.astype(jnp.float32) for a in (q_BNMHK, k, v))
  logits_BNMSH = jnp.sum(q[:, :, :, None] * k[:, :, None], axis=-1) * q.shape[-1] ** -0.5
  logits_BNMSH = jnp.where(visible[..., None], logits_BNMSH, jnp.finfo(jnp.float32).min)
  weights_BNMSH = jax.nn.softmax(logits_BNMSH, axis=3)
  return jnp.sum(weights_BNMSH[..., None] * v[:, :, None], axis=3).astype(q_BNMHK.dtype)


def _one_slot(q_B11HK, k_B11HK, v_B11HK, past):
  """As `_xla` for one slot and a cache on a CPU, where matrix products by head would copy and transpose the cache.

  All heads' keys are one vector here, which every head's query meets with zeros at the other heads' places.
  """
  B, _, S, H, K = past.k_BNSHK.shape
  apart_BHHK = q_B11HK[:, 0, 0, :, None] * jnp.eye(H, dtype=q_B11HK.dtype)[:, :, None]
  keys_BSC, queries_BHC = past.k_BNSHK.reshape(B, S, H * K), apart_BHHK.reshape(B, H, H * K)
  logits_BSH = jnp.einsum("BSC,BHC->BSH", keys_BSC, queries_BHC, preferred_element_type=jnp.float32)
  visible_BS1 = jnp.broadcast_to(past.visible, (B, 1, 1, S)).reshape(B, S, 1)
  logits_BSH = jnp.where(visible_BS1, logits_BSH * K**-0.5, jnp.finfo(jnp.float32).min)
  own_B1H = jnp.sum(q_B11HK.astype(jnp.float32) * k_B11HK, axis=-1)[:, :, 0] * K**-0.5
  highest_B1H = jnp.maximum(jnp.max(logits_BSH, axis=1, keepdims=True), own_B1H)
  of_past_BSH1, of_own_BH1 = jnp.exp(logits_BSH - highest_B1H)[..., None], jnp.exp(own_B1H - highest_B1H)[:, 0, :, None]
  attended_BHK = jnp.sum(of_past_BSH1 * past.v_BNSHK[:, 0], axis=1) + of_own_BH1 * v_B11HK[:, 0, 0]
  return (attended_BHK / (jnp.sum(of_past_BSH1, axis=1) + of_own_BH1)).astype(q_B11HK.dtype)[:, None, None]


def _windowed(q_B1MHK, k_B1MHK, v_B1MHK, window, dropout, dropout_key):
  """Sliding window in O(M * window): blocks of `window` slots that also see the block before."""
  B, _, M, H, K = q_B1MHK.shape
  q, k, v = (a.reshape(B, M // window, window, H, K) for a in (q_B1MHK, k_B1MHK, v_B1MHK))
  slot = jnp.arange(window)
  inside = slot[:, None] >= slot[None, :]
  before = slot[:, None] < slot[None, :]  # query i sees key j of the block before if window + i - j < window
  has_previous = jnp.arange(M // window)[:, None, None] > 0
  past = Past(previous_span(k), previous_span(v), has_previous & before)
  return _xla(q, k, v, inside, past, dropout, dropout_key).reshape(B, 1, M, H, K)


def previous_span(x_BNMHK: jax.Array) -> jax.Array:
  """Returns the same array one span later: span n holds what span n - 1 held, span 0 zeros."""
  return shift(x_BNMHK, axis=1)


def shift(x: jax.Array, axis: int) -> jax.Array:
  """Returns x one place later along `axis`, zeros first; the last place falls out.

  As a pad with a negative end XLA moves one place between neighbouring devices; a concatenation of unequal parts
  would be redistributed as a whole.
  """
  return jax.lax.pad(x, jnp.zeros((), x.dtype), [(int(i == axis), -int(i == axis), 0) for i in range(x.ndim)])


def _tile_obstacle(q_BNMHK: Shaped, past: Past | None) -> str:
  """Returns why many short spans cannot be attended to in tiles, or '' if they can."""
  if past is not None and past.visible.shape != (q_BNMHK.shape[1], 1, 1):
    return "what it sees of the past must be one answer for each span"
  return fused_attention.tile_obstacle(q_BNMHK, past.k_BNSHK.shape[2] if past is not None else 0)


def _obstacle(name: str, q_BNMHK: Shaped, has_past: bool, drops: bool) -> str:
  """Returns why the fused attention `name` cannot serve this call on this device, or '' if it can."""
  if has_past:
    return "it sees only the span's own slots, not the previous span's or a cache"
  if drops:
    return "it has no dropout on attention probabilities"
  if name == "cudnn":
    return fused_attention.cudnn_obstacle(q_BNMHK)
  if platform() != "tpu":
    return f"the device is {platform()}, not a TPU"
  return fused_attention.splash_obstacle(q_BNMHK)
