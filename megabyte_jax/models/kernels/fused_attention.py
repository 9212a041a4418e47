"""Runs fused attention, also over a mesh: splash (Pallas, TPU), cuDNN (NVIDIA), and local_attention.py's kernel.

XLA cannot split such a kernel over devices, so under a mesh it runs inside `jax.shard_map`: the batch is spread over
`data` and `fsdp`, heads over `tensor`. What `seq` spreads depends on the kernel:

  spans of a local model   each device has whole spans, whatever the kernel; nothing is moved.
  global, splash           each device keeps its queries and gathers all keys and values; their gradients are
                           summed and scattered back.
  global, cuDNN            knows no queries that start late, so sequence shards are traded for head shards and back
                           (two all-to-alls).

Shapes: B batch, N spans, M slots of a span, H heads, K head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from megabyte_jax.models.kernels import local_attention
from megabyte_jax.parallel.activation_layout import AXES, BATCH, mesh_axes
from megabyte_jax.parallel.backend import nvidia_obstacle, platform, triton

Shaped = jax.Array | jax.ShapeDtypeStruct  # of which only shape and dtype are asked

_LANES = 128  # splash's key blocks are whole numbers of TPU vector lanes
_BLOCK = 1024  # slots a block should have at most: larger ones gain little and take on-chip memory
_LARGEST_BLOCK = 2048


def cudnn_obstacle(q_BNMHK: Shaped, keys: int | None = None) -> str:
  """Returns why cuDNN cannot attend here, or '' if it can; `keys` of a span, if they are not as many as its slots."""
  if problem := nvidia_obstacle(platform()):
    return problem
  if q_BNMHK.dtype != jnp.bfloat16:
    return f"it needs bfloat16 and compute is {q_BNMHK.dtype}"
  if q_BNMHK.shape[-1] % 8 or q_BNMHK.shape[-1] > 128:
    return f"head_dim {q_BNMHK.shape[-1]} is not a multiple of 8 up to 128"
  _, N, M, H, _ = q_BNMHK.shape
  if odd := next((n for n in (M, M if keys is None else keys) if n % 2), 0):
    return f"it has no gradients for an odd number of slots, {odd}"
  mesh = _mesh()
  if mesh.keys() >= set(AXES) and N == 1 and H // mesh["tensor"] % mesh["seq"]:
    return f"mesh.seq {mesh['seq']} does not divide the {H // mesh['tensor']} heads of a device"
  return _uneven(q_BNMHK)


def cudnn(q_BNMHK: jax.Array, k_BNMHK: jax.Array, v_BNMHK: jax.Array, window: int) -> jax.Array:
  """Computes causal attention within spans by cuDNN; arguments as in `attention.attention`."""
  return _over_mesh(functools.partial(_cudnn, window=window), q_BNMHK, k_BNMHK, v_BNMHK)


def _cudnn(q_BNMHK, k_BNMHK, v_BNMHK, window):
  B, N, M, H, K = q_BNMHK.shape
  q, k, v = (a.reshape(B * N, M, H, K) for a in (q_BNMHK, k_BNMHK, v_BNMHK))
  local = (window - 1, 0) if window else None
  out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation="cudnn")
  return out.reshape(B, N, M, H, K)


def masked_cudnn_obstacle(q_BNMHK: Shaped, keys: int) -> str:
  """Returns why cuDNN cannot attend to so many keys of each span by a mask, or '' if it can."""
  return _spread_span(q_BNMHK) or cudnn_obstacle(q_BNMHK, keys)


def masked_cudnn(q_BNMHK: jax.Array, k_BNSHK: jax.Array, v_BNSHK: jax.Array, visible_BNMS: jax.Array) -> jax.Array:
  """Computes attention of each slot to the keys that it sees, by cuDNN; `visible` may have one row for all if N = 1."""
  B, N = q_BNMHK.shape[:2]
  if N > 1:
    visible_BNMS = jnp.broadcast_to(visible_BNMS, (B, N, *visible_BNMS.shape[2:]))

  def on_device(q, k, v, visible):
    B, N, M, H, K = q.shape
    q, k, v = (a.reshape(B * N, -1, H, K) for a in (q, k, v))
    visible = visible.reshape(-1, 1, *visible.shape[2:])
    out = jax.nn.dot_product_attention(q, k, v, mask=visible, implementation="cudnn")
    return out.reshape(B, N, M, H, K)

  arrays = (q_BNMHK, k_BNSHK, v_BNSHK, visible_BNMS)
  if not _mesh():
    return on_device(*arrays)
  spread = "seq" if N > 1 else None
  spec, visible_spec = P(BATCH, spread, None, "tensor"), P(BATCH if visible_BNMS.shape[0] == B else None, spread)
  mapped = jax.shard_map(on_device, in_specs=(*[spec] * 3, visible_spec), out_specs=spec, check_vma=False)
  return mapped(*arrays)


def _over_mesh(function, q_BNMHK, k_BNMHK, v_BNMHK):
  """function(q, k, v) on each device's whole spans: of its rows, heads and spans, or of more of its heads (N = 1)."""
  mesh = _mesh()
  if not mesh:
    return function(q_BNMHK, k_BNMHK, v_BNMHK)
  is_global = q_BNMHK.shape[1] == 1
  spec = P(BATCH, None, "seq", "tensor") if is_global else P(BATCH, "seq", None, "tensor")

  def on_device(*qkv):
    if not is_global or mesh["seq"] == 1:
      return function(*qkv)
    whole = jax.lax.all_to_all(jnp.stack(qkv), "seq", split_axis=4, concat_axis=3, tiled=True)  # one instead of three
    return jax.lax.all_to_all(function(*whole), "seq", split_axis=2, concat_axis=3, tiled=True)

  mapped = jax.shard_map(on_device, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
  return mapped(q_BNMHK, k_BNMHK, v_BNMHK)


def tile_obstacle(q_BNMHK: Shaped, earlier: int) -> str:
  """Returns why tiles of short spans cannot be attended to here, or ''; `earlier` slots of each are a past."""
  if problem := nvidia_obstacle(platform()):
    return problem
  if triton() is None:
    return "this JAX has no Pallas for Triton"
  B, N, M, H, K = q_BNMHK.shape
  on_device = jax.ShapeDtypeStruct((B, N // _mesh().get("seq", 1), M, H, K), q_BNMHK.dtype)
  return _spread_span(q_BNMHK) or local_attention.obstacle(on_device, earlier) or _uneven(q_BNMHK)


def tile(
  q_BNMHK: jax.Array,
  k_BNMHK: jax.Array,
  v_BNMHK: jax.Array,
  past: tuple[jax.Array, jax.Array, jax.Array] | None,
) -> jax.Array:
  """Computes causal attention within many short spans; arguments as in `local_attention.tile_attention`."""
  if not _mesh():
    return local_attention.tile_attention(q_BNMHK, k_BNMHK, v_BNMHK, past)
  spec = P(BATCH, "seq", None, "tensor")
  mapped = jax.shard_map(
    local_attention.tile_attention,
    in_specs=(spec, spec, spec, None if past is None else (spec, spec, P("seq"))),
    out_specs=spec,
    check_vma=False,
  )
  return mapped(q_BNMHK, k_BNMHK, v_BNMHK, past)


def splash_obstacle(q_BNMHK: Shaped) -> str:
  """Returns why splash attention cannot attend here, whatever the device, or '' if it can."""
  _, N, M, _, _ = q_BNMHK.shape
  if N > 1:
    return "it serves one span of slots (the global model), not many spans side by side"
  if M % _LANES:
    return f"the number of slots, {M}, is not a multiple of {_LANES}"
  obstacle = _uneven(q_BNMHK)
  if obstacle:
    return obstacle
  queries = M // _mesh().get("seq", 1)
  return "" if _query_block(queries) else f"no block size divides the {queries} queries of a device"


def splash(
  q_B1MHK: jax.Array, k_B1MHK: jax.Array, v_B1MHK: jax.Array, window: int, *, interpret: bool = False
) -> jax.Array:
  """Computes causal attention over all slots by splash attention; arguments as in `attention.attention`.

  Args:
    interpret: run the kernel step by step on any device (tests).
  """
  # Imported here: only programs for TPUs need it.
  from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: PLC0415
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (  # noqa: PLC0415
    splash_attention_mask as masks,
  )

  _, _, M, H, K = q_B1MHK.shape
  sizes = _mesh()
  parts = sizes.get("seq", 1)
  # As one object for all heads the mask is stored once, block by block, not as a square.
  mask = masks.LocalMask((M, M), (window - 1, 0), 0) if window else masks.CausalMask((M, M))
  q, kv = _query_block(M // parts), _key_block(M)
  kernel = kernels.make_splash_mha(
    masks.MultiHeadMask([mask] * H),
    block_sizes=kernels.BlockSizes(
      block_q=q, block_kv=kv, block_q_dkv=q, block_kv_dkv=kv, block_q_dq=q, block_kv_dq=kv
    ),
    head_shards=sizes.get("tensor", 1),
    q_seq_shards=parts,
    interpret=interpret,
  )
  scaled_B1MHK = (q_B1MHK.astype(jnp.float32) * K**-0.5).astype(q_B1MHK.dtype)  # the kernel does not scale

  def on_device(kernel, q, k, v):
    if parts > 1:
      k, v = (jax.lax.all_gather(a, "seq", axis=2, tiled=True) for a in (k, v))
    q, k, v = (a[:, 0].swapaxes(1, 2) for a in (q, k, v))  # B H M K
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)[:, None]

  if not sizes:
    return on_device(kernel, scaled_B1MHK, k_B1MHK, v_B1MHK)
  spec = P(BATCH, None, "seq", "tensor")
  kernel_spec = kernel.manual_sharding_spec(NamedSharding(jax.sharding.get_abstract_mesh(), P("tensor", "seq")))
  mapped = jax.shard_map(on_device, in_specs=(kernel_spec, spec, spec, spec), out_specs=spec, check_vma=False)
  return mapped(kernel, scaled_B1MHK, k_B1MHK, v_B1MHK)


def _key_block(slots: int) -> int:
  """The largest block of keys; a multiple of 128 that divides all slots."""
  return max(n for n in range(_LANES, min(slots, _BLOCK) + 1, _LANES) if slots % n == 0)


def _query_block(queries: int) -> int:
  """The largest block of a device's queries; all of them where no multiple of 128 divides them; 0 if too many."""
  blocks = [n for n in range(_LANES, _BLOCK + 1, _LANES) if queries % n == 0]
  if blocks:
    return max(blocks)
  return queries if queries <= _LARGEST_BLOCK and queries % 8 == 0 else 0


def _mesh() -> dict[str, int]:
  """Sizes of the axes of the mesh that is set; empty without one, on a single device and within `jax.shard_map`."""
  sizes = mesh_axes()
  return sizes if math.prod(sizes.values()) > 1 else {}


def _spread_span(q_BNMHK: Shaped) -> str:
  """Says if no device has the only span as a whole, or ''."""
  return "the slots of a span are spread over devices" if q_BNMHK.shape[1] == 1 and _mesh().get("seq", 1) > 1 else ""


def _uneven(q_BNMHK: Shaped) -> str:
  """Says what the mesh that is set does not divide, or ''."""
  B, N, M, H, _ = q_BNMHK.shape
  mesh = _mesh()
  if not mesh:
    return ""
  if not mesh.keys() >= set(AXES):
    return f"the mesh has the axes {', '.join(mesh)} instead of {', '.join(AXES)}"
  rows = math.prod(mesh[axis] for axis in BATCH)
  spread = ("slots", M) if N == 1 else ("spans", N)
  for what, size, parts in (("rows", B, rows), (*spread, mesh["seq"]), ("heads", H, mesh["tensor"])):
    if size % parts:
      return f"{parts} devices do not divide {size} {what}"
  return ""
