"""Small files of records for tests, and what they hold."""

import json

TEXTS = ["first", 'with "quotes"\nand a line', "ünïcödé ✓", "x" * 5000]


def json_lines(texts=TEXTS, field="text"):
  return "".join(
    json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
  ).encode()


def read_all(source):
  return [source.read(i, 0, int(length)).tobytes() for i, length in enumerate(source.lengths)]


def as_bytes(texts=TEXTS):
  return [text.encode() for text in texts]


def write_parquet(path, texts, **options):
  """A Parquet file with the columns id and text."""
  import pyarrow as arrow  # noqa: PLC0415
  import pyarrow.parquet as parquet  # noqa: PLC0415

  parquet.write_table(arrow.table({"id": list(range(len(texts))), "text": texts}), path, **options)
