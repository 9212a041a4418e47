"""Prints reports of train.py and eval.py: the run, the table of results, a sample, what to do next."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from megabyte_jax.config import Config, DataConfig
from megabyte_jax.data.files import files_of, look_into
from megabyte_jax.data.folders import overlaps
from megabyte_jax.data.media.image_source import notice_of_scaling
from megabyte_jax.data.open_data import decodable_as
from megabyte_jax.data.source_names import split_list
from megabyte_jax.data.sources import Source, documents_in_words, first_names, skipped_names
from megabyte_jax.data.subwords.source import text_of
from megabyte_jax.display.progress import Progress, duration, human
from megabyte_jax.errors import in_one_line
from megabyte_jax.evaluation import image_report
from megabyte_jax.evaluation.by_source import SourceBits, by_source
from megabyte_jax.evaluation.compressors import Compressed, compress_all
from megabyte_jax.evaluation.evaluate import Evaluation, evaluate
from megabyte_jax.models.flops import flops_per_byte
from megabyte_jax.models.layers import attention

_NOT_TEXT = (".pdf", ".doc", ".docx", ".odt", ".epub", ".ppt", ".pptx", ".xls", ".xlsx")
_MANY_EPOCHS = 50
_COMPRESSED_BYTES = 20_000_000  # with those of the primer; beyond this xz would run for minutes


def describe_run(config: Config, mesh: Mesh, source: Source, first_step: int, validation: Source | None = None) -> str:
  """Describes the device, the model and its attention, the data, and where the run stands."""
  device = jax.devices()[0]
  axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
  model, unit = config.model, config.data.unit
  total, size = int(source.lengths.sum()), int(text_of(source).lengths.sum())
  tokens = f", {total:,} tokens of {size / max(1, total):.2f} bytes each" if unit == "token" else ""
  return "\n".join(
    [
      f"device  {jax.device_count()} x {device.device_kind}" + (f" (mesh: {axes})" if axes else ""),
      f"model   {model.family}, {human(model.parameter_count())} parameters, context {model.context:,} {unit}s, "
      f"{human(flops_per_byte(model, training=True), 'FLOP')} per {unit} of training",
      f"attention  {attention_line(config, mesh)}",
      f"data    {size:,} bytes in {count_documents(source)}{tokens}",
      *notice_lines(notices(config, source, validation)),
      f"steps   {first_step:,} of {config.num_steps:,} done, {config.batch_size} x {model.context:,} {unit}s each"
      + ("; now compiling" if first_step < config.num_steps else ""),
    ]
  )


def notice_lines(told: Sequence[str]) -> list[str]:
  """Returns notices as they are printed, whatever the names of files in them hold."""
  return [f"notice  {in_one_line(notice)}" for notice in told]


def notices(config: Config, source: Source, validation: Source | None = None) -> list[str]:
  """Returns what a user of these data, of training and validation, may not have meant, a line each."""
  told, data = [], config.data
  decoded = {"image": ("pictures", "pixels"), "audio": ("recordings", "sound")}
  if data.form == "bytes" and (form := decodable_as(source.names)):
    kind, content = decoded[form]
    told.append(f"all are {kind}, read as the raw bytes of their files; --config.data.form={form} reads {content}")
  told += data_notices(data, source)
  told += [f"validation: {notice}" for notice in (data_notices(data, validation) if validation is not None else ())]
  epochs = config.num_steps * config.bytes_per_step / max(1, int(source.lengths.sum()))
  if epochs >= _MANY_EPOCHS:
    told.append(f"the run reads these data {epochs:,.0f} times, and may learn them by heart")
  scored, trained = int(validation.lengths.sum()) if validation else 0, config.num_steps * config.bytes_per_step
  if scored > trained:
    told.append(
      f"all {scored:,} {data.unit}s of {data.validation} are scored after the last step, more than the {trained:,} "
      "that the run trains on; --config.data.validation=FILE takes a smaller text"
    )
  warmup = config.optimizer.warmup_steps
  if warmup > config.num_steps:
    told.append(f"the warm-up of {warmup:,} steps is cut to the run's {config.num_steps:,}")
  if data.validation.startswith("sample:") and not data.train.startswith("sample:"):
    told.append(f"scored on {data.validation}, which comes with the package; --config.data.validation=FILE names yours")
  return told + trained_on(data, data.validation)


def trained_on(data: DataConfig, scored: str) -> list[str]:
  """Returns which of the named sources that are scored are trained on, too, as their names say; a line each."""
  return [
    f"{place} is trained on, too; its score will be better than on texts not seen"
    for place in (split_list(scored) if scored else ())
    if place in split_list(data.train) or (os.path.exists(place) and overlaps(place, data.train))
  ]


def data_notices(data: DataConfig, source: Source) -> list[str]:
  """Returns what was left out of data, what among texts is none or not in UTF-8, and scaled images; a line each."""
  told = []
  if names := skipped_names(source):
    told.append(f"skipped: {first_names(names, source.skipped)}")
  if data.form in ("bytes", "subwords") and not data.raw:
    told += _text_notices(text_of(source))
  if scaled := notice_of_scaling(source):
    told.append(scaled)
  return told


def _text_notices(source: Source) -> list[str]:
  """Which files are no text, or not in UTF-8. Files that hold no text at all, one and all, are meant to be read so."""
  not_text = [name for name in itertools.islice(source.names, 10_000) if name.lower().endswith(_NOT_TEXT)]
  not_utf8: list[str] = []
  looked_at = there = 0
  for files, beside_records in files_of(source):
    found = look_into(files)
    if beside_records or len(found.binary) < found.looked_at:
      not_text += [name for name in found.binary if not name.lower().endswith(_NOT_TEXT)]
    not_utf8 += [name for name in found.not_utf8 if not name.lower().endswith(_NOT_TEXT)]
    looked_at, there = looked_at + found.looked_at, there + len(files.names)
  told, of = [], f" (of {looked_at:,} files looked at)" if 0 < looked_at < there else ""
  if not_text:
    shown = first_names(not_text, len(not_text))
    told.append(f"not plain text, read as raw bytes: {shown}{of}; move such files out, or convert them to text")
  if not_utf8:
    shown = first_names(not_utf8, len(not_utf8))
    told.append(f"not in UTF-8: {shown}{of}; if that is Latin-1, convert it: iconv -f latin1 -t utf-8 OLD > NEW")
  return told


def attention_line(config: Config, mesh: Mesh) -> str:
  """Returns which attention each level trains with on `mesh`, and why not with a kernel: `global: splash; local: xla`.

  Raises:
    ConfigError: the attention asked for cannot serve here.
  """
  with jax.set_mesh(mesh):
    choices = attention.choices(config.model, config.batch_size // config.accumulate)
  levels: dict[attention.Choice, list[str]] = {}
  for name, choice in choices.items():
    levels.setdefault(choice, []).append(name)
  parts = []
  for (name, reason), of in levels.items():
    where = f"{', '.join(of)}: " if len(choices) > 1 else ""
    parts.append(where + name + (f" ({reason})" if reason else ""))
  return "; ".join(parts)


def count_documents(source: Source, name: str = "") -> str:
  """Counts the documents of a source, of this name if one is given, and the items left out as empty or unreadable."""
  of = f" of {name}" if name else ""
  return documents_in_words(len(source.lengths)) + of + (f" ({source.skipped:,} skipped)" if source.skipped else "")


def evaluate_and_print(
  config: Config,
  parameters: Any,
  source: Source,
  mesh: Mesh,
  *,
  primer: Callable[[], Source | None] | None = None,
  with_compressors: bool = True,
  **options: Any,
) -> Evaluation:
  """Evaluates with a progress line and prints the table of bits per byte, compressors included.

  Args:
    primer: opens the training data, for the compressors' primed figures; called only if they are wanted.
    options: further arguments of `evaluate`.
  """
  total = int(np.sum(text_of(source).lengths))
  with_compressors = with_compressors and config.data.form in ("bytes", "subwords")  # what files are made of
  compare = with_compressors and total <= _COMPRESSED_BYTES and jax.process_index() == 0
  before = primer() if compare and primer else None  # opened before the work, lest it fails after it
  with Progress("scoring", compiles=True, enabled=jax.process_index() == 0) as progress:
    result = evaluate(config, parameters, source, mesh=mesh, on_progress=progress.update, **options)
  compressors = {}
  if compare:
    text = read_all(source)
    if before and total + int(np.sum(text_of(before).lengths)) > _COMPRESSED_BYTES:
      before = None
    compressors = compress_all(text, read_all(before) if before else None)
  if jax.process_index() == 0:
    print(results_table(config, result, compressors, by_source(source, result)), flush=True)
  return result


def read_all(source: Source) -> bytes:
  """Joins all documents, as bytes."""
  source = text_of(source)
  return b"".join(source.read(i, 0, int(length)).tobytes() for i, length in enumerate(source.lengths))


def results_table(
  config: Config, result: Evaluation, compressors: dict[str, Compressed], sources: Sequence[SourceBits] = ()
) -> str:
  """Renders bits per byte of the model and of the compressors, one line each."""
  documents = documents_in_words(int(np.count_nonzero(result.document_bytes)))
  if config.data.unit == "token":
    documents += f", {result.tokens:,} tokens of {result.bytes / result.tokens:.2f} bytes each"
  lines = [
    f"bits per byte on {result.bytes:,} bytes ({documents}, {duration(result.seconds)})",
    f"  {config.model.display_name:<12}{result.bpb:7.3f}   {result.method} inference, {result.cost:.3g}x",
  ]
  lines += [f"{'':14}{one.bpb:7.3f}   of {one.name}, {one.bytes:,} bytes" for one in sources]
  for compressor, bits in sorted(compressors.items(), key=lambda item: item[1].alone):
    primed = "" if bits.primed is None else f"   {bits.primed:.3f} primed with the training data"
    lines.append(f"  {compressor:<12}{bits.alone:7.3f}{primed}")
  return "\n".join(lines)


def what_next(workdir: str, picture: str, data: DataConfig) -> str:
  """Returns commands to try after training on such data; `picture`: the loss curve, or ''."""
  text = "--bytes=400" if data.train != DataConfig.train else '--prompt="It is a truth" --bytes=400'
  what = {"image": "--output=sampled.png", "audio": "--output=sampled.wav"}.get(data.form, text)
  lines = [
    *([f"loss curve: {picture}"] if picture else []),
    "try next:",
    f"  python -m megabyte_jax eval --workdir={shlex.quote(workdir)} --data=YOUR_FILE_OR_FOLDER",
    f"  python -m megabyte_jax generate --workdir={shlex.quote(workdir)} {what} --temperature=0.7",
  ]
  if data.form == "bytes" and data.train.startswith("sample:"):  # of the default config
    yours = "--config.data.train=YOUR_FOLDER --config.data.validation=YOUR_FILE"
    lines.append(f"  python -m megabyte_jax train --workdir=runs/mine {yours}")
  return "\n".join(lines)


def facts(
  config: Config,
  source: Source,
  result: Evaluation,
  step: int,
  workdir: str,
  images: image_report.ImageSummary | None,
  *,
  split: str,
  data: str = "",
) -> dict[str, Any]:
  """Returns what a result's JSON says beside its numbers: the model, what was scored, and the bits of its parts.

  Args:
    images: what was found of each image, if it was images that were scored.
    split: what was scored, unless `data` names other data.
  """
  told: dict[str, Any] = {"step": step, "data": data or getattr(config.data, split), "workdir": workdir}
  if config.data.form == "subwords":
    told["tokenizer_sha256"] = config.data.tokenizer_sha256
  told |= {} if data else {"split": split}
  told |= {"skipped": source.skipped} if source.skipped else {}
  if sources := by_source(source, result):
    told["sources"] = [one._asdict() for one in sources]
  return told | (images.as_json() if images else {})


def result_json(result: Evaluation, **more: Any) -> str:
  """Renders the evaluation as one JSON object on one line."""
  values = {
    "bpb": result.bpb,
    "bytes": result.bytes,
    "nats": result.nats,
    "seconds": round(result.seconds, 3),
    "method": result.method,
    "cost": round(result.cost, 4),
    "bytes_read": result.bytes_read,
  }
  if result.tokens != result.bytes:
    values["tokens"] = result.tokens
  return json.dumps({**values, **more})
