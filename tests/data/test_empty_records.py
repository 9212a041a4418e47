"""Files of records that hold none: what is said of them, and that files beside them are read all the same."""

import dataclasses
import re

import pytest
from record_files import TEXTS, as_bytes, json_lines, read_all, write_parquet

from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import DataError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

EMPTY = {
  "no byte": ("b.jsonl", "is empty; remove it"),
  "blank lines": ("b.jsonl", "has no records; remove it"),
  "no rows": ("b.parquet", "has no rows; remove it"),
  "no byte of Parquet": ("b.parquet", "is not a whole Parquet file"),
}


def write_empty(kind, folder):
  path = folder / EMPTY[kind][0]
  if kind == "no rows":
    parquet.write_table(arrow.table({"text": arrow.array([], arrow.string())}), path)
  else:
    path.write_bytes(b"\n \n\n" if kind == "blank lines" else b"")
  return path


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "set"
  folder.mkdir()
  return folder


@pytest.fixture
def data(tmp_path):
  return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", EMPTY)
def test_files_beside_an_empty_one_of_records_are_read(folder, data, kind):
  path = write_empty(kind, folder)
  skipping = dataclasses.replace(data, skip_bad=True)
  message = rf"^{re.escape(str(path))} {EMPTY[kind][1]}"
  for spec in (folder, f"{folder}/*", path):  # alone
    with pytest.raises(DataError, match=message):
      open_path(str(spec), data)
    with pytest.raises(DataError, match=re.escape(str(path))):
      open_path(str(spec), skipping)
  (folder / "a.txt").write_bytes(b"text")
  for spec in (folder, f"{folder}/*"):
    with pytest.raises(DataError, match=message) as error:
      open_path(str(spec), data)
    assert "\n" not in str(error.value)
    for source in (open_path(str(spec), skipping), open_path(str(spec), data, skip_empty=True)):
      assert read_all(source) == [b"text"] and source.skipped == 1 and source.skipped_names == [path.name]
  with pytest.raises(DataError, match=message):  # it was named itself
    open_path(str(path), data, skip_empty=True)


@pytest.mark.parametrize("kind", ["no byte", "no byte of Parquet"])
def test_records_beside_an_empty_file_of_the_same_kind_are_read(folder, data, kind):
  write_empty(kind, folder)
  if kind == "no byte":
    (folder / "a.jsonl").write_bytes(json_lines())
  else:
    write_parquet(folder / "a.parquet", TEXTS)
  for source in (
    open_path(str(folder), data, skip_empty=True),
    open_path(str(folder), dataclasses.replace(data, skip_bad=True)),
  ):
    assert read_all(source) == as_bytes() and source.skipped == 1


def test_records_beside_an_empty_text_are_read(folder, data):
  (folder / "a.txt").write_bytes(b"")
  (folder / "b.jsonl").write_bytes(json_lines())
  source = open_path(str(folder), data, skip_empty=True)
  assert read_all(source) == as_bytes() and source.skipped_names == ["a.txt"]


def test_another_field_or_damage_is_no_empty_file(folder, data):
  """Otherwise a run would go on without nearly all of its data, for the sake of a file beside them."""
  (folder / "a.txt").write_bytes(b"text")
  (folder / "b.jsonl").write_bytes(json_lines(field="body"))
  skipping = dataclasses.replace(data, skip_bad=True)
  with pytest.raises(DataError, match=r"none of 4 records of .*b\.jsonl has a text in its field 'text'"):
    open_path(str(folder), skipping)
  (folder / "b.jsonl").unlink()
  write_parquet(folder / "c.parquet", ["", ""])
  with pytest.raises(DataError, match=r"none of 2 rows of .*/set/c\.parquet has a text in its field 'text'"):
    open_path(str(folder), skipping)
  (folder / "c.parquet").write_bytes(b"PAR1")
  with pytest.raises(DataError, match=r"none of 1 files of .*: .*c\.parquet is not a whole Parquet file"):
    open_path(str(folder), skipping)


@pytest.mark.parametrize("form", ["image", "audio"])
def test_tables_of_no_images_or_recordings(folder, data, form):
  columns = {form: arrow.array([], arrow.binary())}
  config = dataclasses.replace(data, form=form, image_size=16)
  parquet.write_table(arrow.table(columns), folder / "a.parquet")
  with pytest.raises(DataError, match=r"^\S*/a\.parquet has no rows; remove it, or skip such files with --config"):
    open_path(str(folder / "a.parquet"), config)
  parquet.write_table(arrow.table(columns), folder / "b.parquet")
  with pytest.raises(DataError, match=r"^\S*/a\.parquet, \S*/b\.parquet have no rows; remove them"):
    open_path(str(folder), config)
