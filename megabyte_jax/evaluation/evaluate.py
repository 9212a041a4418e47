"""Computes bits per byte of documents: every byte is scored exactly once, whatever the method.

A model of subwords is evaluated in the same way: its windows hold tokens, and each token's nats count for the bytes
that it stands for. All sums are over bytes of the original text, whatever the model reads.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from megabyte_jax.config import Config, ModelConfig
from megabyte_jax.config.model import check_bytes, token_dtype
from megabyte_jax.data.batches import rows_of_this_process
from megabyte_jax.data.read_ahead import read_ahead
from megabyte_jax.data.sources import Source
from megabyte_jax.data.subwords.source import text_of, token_lengths, tokens_within
from megabyte_jax.errors import require
from megabyte_jax.evaluation import windows
from megabyte_jax.evaluation.lanes import Row, one_after_the_other, side_by_side
from megabyte_jax.evaluation.windows import Window
from megabyte_jax.models.build import Family, empty_memory, family_of, trained_model
from megabyte_jax.models.loss import bits_per_byte, byte_nats, segment_nats
from megabyte_jax.parallel.backend import platform
from megabyte_jax.parallel.sharding import batch_sharding


@dataclasses.dataclass
class Evaluation:
  """The result of an evaluation. Sums are float64.

  Attributes:
    method: as in windows.py.
    document_nats, document_bytes: [documents], summed over each.
    context_nats, context_bytes: [T], by a byte's (or token's) position in the window that scored it (Fig. 4).
    patch_nats, patch_bytes: [P], by a byte's position in its patch (Fig. 5), or in its span without a global model.
    bytes_read, bytes_predicted: of all windows; prefixes of PerceiverAR are read and not predicted.
    tokens: scored; as many as bytes, unless the model reads subwords.
    seconds: wall time, compilation included.
  """

  method: str
  document_nats: np.ndarray
  document_bytes: np.ndarray
  context_nats: np.ndarray
  context_bytes: np.ndarray
  patch_nats: np.ndarray
  patch_bytes: np.ndarray
  bytes_read: int = 0
  bytes_predicted: int = 0
  tokens: int = 0
  seconds: float = 0.0

  @property
  def nats(self) -> float:
    """Nats of all scored bytes."""
    return float(self.document_nats.sum())

  @property
  def bytes(self) -> int:
    """Bytes scored."""
    return int(self.document_bytes.sum())

  @property
  def cost(self) -> float:
    """Computes how often each byte of these documents was predicted; `windows.cost_factor` is that of long ones."""
    return self.bytes_predicted / max(1, self.bytes)

  @property
  def bpb(self) -> float:
    """Bits per byte."""
    return bits_per_byte(self.nats, self.bytes)


def make_eval_step(config: Config) -> jax.stages.Wrapped:
  """Makes the jitted (parameters, x_BT, length_B, start_B) -> nats_BT (`byte_nats`); `start_B` is PerceiverAR's.

  Of a recurrent model it is (parameters, memory, x_BT, length_B, fresh_B) -> (nats_BT, memory). The latest are kept:
  a model that is evaluated again in this process is not compiled again.
  """
  return _eval_step(config.model, platform(), family_of(config.model))


@functools.lru_cache(maxsize=8)
def _eval_step(config: ModelConfig, device: str, family: Family) -> jax.stages.Wrapped:
  @jax.jit
  def eval_step(parameters, x_BT, length_B, start_B=None):
    return byte_nats(trained_model(config, parameters), x_BT, length_B=length_B, start_B=start_B)[0]

  @functools.partial(jax.jit, donate_argnums=1)
  def next_segment(parameters, memory, x_BT, length_B, fresh_B):
    model = trained_model(config, parameters)
    nats_BT, _, memory, _ = segment_nats(model, memory, x_BT, fresh_B=fresh_B, length_B=length_B)
    return nats_BT, memory

  return next_segment if config.recurrent else eval_step


def evaluate(
  config: Config,
  parameters: Any,
  source: Source,
  *,
  mesh: Mesh,
  method: str = "basic",
  stride: int = 0,
  max_bytes: int = 0,
  eval_step: Callable[..., jax.Array] | None = None,
  on_byte_nats: Callable[[int, int, np.ndarray, np.ndarray], None] | None = None,
  on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
  """Scores every byte of every document of `source` exactly once.

  Args:
    parameters: nested dicts, laid out on `mesh`.
    method, stride: see windows.py.
    max_bytes: stop once this many bytes are in the plan (and the token that holds the last one); 0 scores all.
    eval_step: from `make_eval_step`, to reuse its compilation.
    on_byte_nats: called with (document, start, nats, weights) of every window: of document bytes start,
      start + 1, ... those of weight 1 are scored by this window, others are 0. Of subwords the places are those of
      tokens, whose weight is the number of their bytes.
    on_progress: called with (bytes scored, bytes to score).

  Raises:
    ConfigError: the method does not fit the model, or the model does not know one of the bytes.
  """
  begin = time.perf_counter()
  windows.check_method(config.model, method, stride)
  eval_step = eval_step or make_eval_step(config)
  context = config.model.context
  patch = config.model.alignment
  lengths = np.asarray(source.lengths, np.int64)
  require(bool(lengths.sum() > 0), "there is not a single byte to evaluate")
  used = tokens_within(source, max_bytes)
  sizes, table = int(np.sum(text_of(source).lengths)), token_lengths(source)
  total = min(sizes, max_bytes or sizes)
  result = Evaluation(
    method,
    document_nats=np.zeros(len(lengths)),
    document_bytes=np.zeros(len(lengths)),
    context_nats=np.zeros(context),
    context_bytes=np.zeros(context),
    patch_nats=np.zeros(patch),
    patch_bytes=np.zeros(patch),
  )
  batch_size = _rows_at_once(used, config, method, stride)
  share = mesh.shape["data"] * mesh.shape["fsdp"]
  batch_size += -batch_size % share
  sharding = batch_sharding(mesh)
  own_rows = set(rows_of_this_process(sharding, batch_size, context).tolist())
  with_latents = config.model.num_latents > 0

  recurrent = config.model.recurrent
  put_together = side_by_side if recurrent else one_after_the_other

  def plan() -> Iterator[list[Row | None]]:
    return put_together(_documents(used, config, method, stride), batch_size)

  own = (row for rows in plan() for b, row in enumerate(rows) if row and b in own_rows)
  contents = read_ahead(source, ((document, w.start, w.start + w.length) for document, w in own))

  def score(rows: list[Row | None], nats: jax.Array, x: jax.Array) -> None:
    nats_BT = _of_all_processes(nats)
    bytes_BT = np.ones(nats_BT.shape, np.int32) if table is None else table[_of_all_processes(x)]
    for row, nats_T, bytes_T in zip(rows, nats_BT, bytes_BT, strict=False):
      if not row:
        continue
      document, window = row
      mask, bytes_T = windows.scored_mask(window), bytes_T[: window.length]
      scored = np.where(mask, nats_T[: window.length].astype(np.float64), 0.0)
      _add(result, document, window, scored, mask, bytes_T)
      if on_byte_nats:
        on_byte_nats(document, window.start, nats_T[: window.length], mask * bytes_T)
    if on_progress:
      on_progress(result.bytes, total)

  memory: Any = None
  if recurrent:
    begin_documents = functools.partial(empty_memory, config.model.for_evaluation, rows=batch_size)
    memory = jax.jit(begin_documents, out_shardings=sharding)(parameters)
  under_way: tuple[list[Row | None], jax.Array, jax.Array] | None = None  # scored while the next batch is worked on
  for rows in plan():
    x_BT = np.zeros((batch_size, context), token_dtype(config.model.vocab_size))
    length_B, start_B = np.zeros(batch_size, np.int32), np.zeros(batch_size, np.int32)
    fresh_B = np.ones(batch_size, bool)
    for b, row in enumerate(rows):
      if not row:
        continue
      _, window = row
      length_B[b], start_B[b], fresh_B[b] = window.length, window.latent_start, window.start == 0
      if b in own_rows:
        x_BT[b, : window.length] = next(contents)
    check_bytes(x_BT, config.model.vocab_size)
    arrays = (x_BT, length_B, *([fresh_B] if recurrent else [start_B] if with_latents else []))
    placed = [jax.make_array_from_callback(a.shape, sharding, a.__getitem__) for a in arrays]
    with jax.set_mesh(mesh):
      nats, memory = eval_step(parameters, memory, *placed) if recurrent else (eval_step(parameters, *placed), None)
    if under_way:
      score(*under_way)
    under_way = rows, nats, placed[0]
  if under_way:
    score(*under_way)
  result.seconds = time.perf_counter() - begin
  return result


def _rows_at_once(used: np.ndarray, config: Config, method: str, stride: int) -> int:
  """Returns the windows of a batch: fewer than usual where there are not so many, for empty rows cost as much."""
  most = config.scored_at_once
  if config.model.recurrent:  # a row reads the windows of one document after another
    return min(most, int(np.count_nonzero(used)))
  each = (1 for length in used if length for _ in windows.windows_of(int(length), config.model, method, stride))
  return min(most, sum(itertools.islice(each, most)))


def _of_all_processes(array: jax.Array) -> np.ndarray:
  return np.asarray(multihost_utils.process_allgather(array, tiled=True) if jax.process_count() > 1 else array)


def _add(
  result: Evaluation, document: int, window: Window, nats: np.ndarray, mask: np.ndarray, bytes_T: np.ndarray
) -> None:
  scored_T = mask * bytes_T
  result.bytes_read += int(bytes_T.sum())
  result.bytes_predicted += int(bytes_T[window.latent_start :].sum())
  result.tokens += int(mask.sum())
  result.document_nats[document] += nats.sum()
  result.document_bytes[document] += scored_T.sum()
  result.context_nats[: window.length] += nats
  result.context_bytes[: window.length] += scored_T
  place = np.arange(window.length) % len(result.patch_nats)
  result.patch_nats += np.bincount(place, nats, len(result.patch_nats))
  result.patch_bytes += np.bincount(place, scored_T, len(result.patch_nats))


def _documents(used: np.ndarray, config: Config, method: str, stride: int) -> Iterator[Iterator[Row]]:
  """Yields the windows of each document."""
  for document, length in enumerate(used):
    if length:
      yield zip(itertools.repeat(document), windows.windows_of(int(length), config.model, method, stride), strict=False)
