"""Makes the samples that training ends with: a continued text; images and sounds, real, completed, unprompted."""

from __future__ import annotations

import codecs
import dataclasses
import os
from typing import Any

import jax
import numpy as np

from megabyte_jax.config import Config
from megabyte_jax.data.media import audio, patch_scan, pictures
from megabyte_jax.data.sources import Source
from megabyte_jax.data.subwords.source import text_of
from megabyte_jax.data.subwords.tokenizer import load_tokenizer
from megabyte_jax.generation.sampling import Sampling, generate
from megabyte_jax.generation.subword_text import generate_text
from megabyte_jax.models.build import trained_model


def whole_letters(text: bytes) -> bytes:
  """Returns text without the first bytes of a letter of UTF-8 that is cut off at its end; other text as it is."""
  decoder = codecs.getincrementaldecoder("utf-8")()
  try:
    decoder.decode(text)
  except UnicodeDecodeError:
    return text
  begun, _ = decoder.getstate()
  return text[: len(text) - len(begun)]


def print_sample(config: Config, parameters: Any, source: Source) -> None:
  """Prints `config.sample_bytes` bytes that continue the first bytes of the last training document.

  Nothing in a run of several processes, whose parameters no process has alone: `generate` loads them anew.
  """
  if not config.sample_bytes or config.data.form not in ("bytes", "subwords") or jax.process_count() > 1:
    return
  text = text_of(source)
  prompt_bytes = min(64, config.model.context // 2, int(text.lengths[-1]))
  prompt = whole_letters(text.read(len(text.lengths) - 1, 0, prompt_bytes).tobytes())
  print(f"\na sample (temperature 0.7) that continues {prompt.decode(errors='replace')!r}:\n")
  model, sampling = trained_model(config.model, parameters), Sampling(temperature=0.7)
  if config.data.form == "subwords":
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.tokenizer_sha256)
    [made] = generate_text(model, tokenizer, prompt, config.sample_bytes, sampling=sampling)
  else:
    made = generate(model, prompt, config.sample_bytes, sampling=sampling).bytes_[0].tobytes()
  print(made.decode(errors="replace"), "\n")


def write_samples(config: Config, parameters: Any, source: Source, workdir: str) -> list[str]:
  """Writes samples of a model of images or audio to `workdir`; returns the files.

  Images: samples.png, a grid with rows of real, completed (the first half of the bytes is real: the upper half in a
  patch scan) and freely sampled images; `config.sample_bytes` // bytes per image columns, at least one.
  Audio: real.wav, completed.wav (the first half is real) and sampled.wav of `config.sample_bytes` bytes each, or of
  the longest recording where that is shorter.
  Where `config.sample_bytes` is 0, for other bytes, and in runs of several processes nothing is written.

  Args:
    parameters: of the model, as nested dicts.
    source: where the real ones come from; best the validation data.
  """
  if not config.sample_bytes or config.data.form in ("bytes", "subwords") or jax.process_count() > 1:
    return []
  config = dataclasses.replace(config, seed=config.seed % (1 << 31))  # room for one per picture
  model = trained_model(config.model, parameters)
  if config.data.form == "image":
    return [_image_grid(config, model, source, workdir)]
  return _recordings(config, model, source, workdir)


def _image_grid(config: Config, model: Any, source: Source, workdir: str) -> str:
  size = int(source.lengths[0])
  columns = min(len(source.lengths), max(1, config.sample_bytes // size))
  chosen = np.linspace(0, len(source.lengths) - 1, columns).round().astype(int)
  real = [source.read(int(i), 0, size) for i in chosen]
  completed = [_complete(model, x, size // 2, config.seed + i) for i, x in enumerate(real)]
  sampled = generate(model, b"", size, num_samples=columns, sampling=Sampling(), seed=config.seed).bytes_
  rows = [
    [patch_scan.bytes_to_image(x, config.data.scan, config.data.scan_patch) for x in row]
    for row in (real, completed, sampled)
  ]
  path = os.path.join(workdir, "samples.png")
  pictures.write_png(path, pictures.image_grid(rows))
  return path


def _recordings(config: Config, model: Any, source: Source, workdir: str) -> list[str]:
  document = int(np.argmax(source.lengths))
  size = min(config.sample_bytes, int(source.lengths[document])) // (2 * source.unit) * 2 * source.unit
  real = source.read(document, 0, size)
  made = {
    "real": real,
    "completed": _complete(model, real, size // 2, config.seed),
    "sampled": generate(model, b"", size, seed=config.seed).bytes_[0],
  }
  paths = []
  for name, x in made.items():
    paths.append(os.path.join(workdir, f"{name}.wav"))
    audio.write_wav(paths[-1], x, config.data.encoding, config.data.sample_rate)
  return paths


def _complete(model: Any, x: np.ndarray, known: int, seed: int) -> np.ndarray:
  """`x` with all bytes after the first `known` generated."""
  made = generate(model, x[:known].tobytes(), x.size - known, seed=seed)
  return np.concatenate([x[:known], made.bytes_[0]])
