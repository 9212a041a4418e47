"""Continues texts with models of subwords: bytes in, bytes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from megabyte_jax.data.subwords.tokenizer import Tokenizer
from megabyte_jax.generation.sampling import generate
from megabyte_jax.models.build import Model


def generate_text(
  model: Model,
  tokenizer: Tokenizer,
  prompt: bytes,
  num_bytes: int,
  *,
  stop: bytes = b"",
  on_bytes: Callable[[bytes], None] | None = None,
  **options: Any,
) -> list[bytes]:
  """Continues `prompt` and returns each sample's bytes, without the prompt.

  Args:
    model: of the pieces of `tokenizer`.
    prompt: any bytes.
    num_bytes: to generate at least: a sample ends with a whole piece.
    stop: ends a sample, and is its last bytes then; '' never does.
    on_bytes: called with the new bytes of the first sample, as they come.
    options: further arguments of `generate`.
  """
  sent = 0
  first_sample: list[np.ndarray] = []

  def enough(tokens: np.ndarray) -> int | None:
    ends = np.cumsum(tokenizer.lengths[tokens])
    wanted = num_bytes
    if stop and (found := tokenizer.decode(tokens).find(stop)) >= 0:
      wanted = min(wanted, found + len(stop))
    return int(np.searchsorted(ends, wanted)) + 1 if len(ends) and ends[-1] >= wanted else None

  def cut(text: bytes) -> bytes:
    found = text.find(stop) if stop else -1
    return text[: found + len(stop)] if found >= 0 else text

  def put(new: np.ndarray) -> None:
    nonlocal sent
    first_sample.append(new[0])
    text = cut(tokenizer.decode(np.concatenate(first_sample)))
    if on_bytes and len(text) > sent:
      on_bytes(text[sent:])
    sent = len(text)

  made = generate(
    model, tokenizer.encode(prompt), num_bytes, stop=enough, on_bytes=put if on_bytes else None, **options
  )
  return [cut(tokenizer.decode(tokens[:count])) for tokens, count in zip(made.bytes_, made.lengths, strict=True)]
