"""Parquet files and Hugging Face data sets read as documents: texts, images and recordings."""

import dataclasses
import io
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from record_files import TEXTS, as_bytes, json_lines, read_all, write_parquet

from megabyte_jax.config import DataConfig
from megabyte_jax.data.media.image_source import ImageFiles, Images
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import ConfigError, DataError

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def data(tmp_path):
  return DataConfig(cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet_is_read_at_random(tmp_path, data, compression):
  for name, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
    write_parquet(tmp_path / f"{name}.parquet", texts, compression=compression, row_group_size=3)
  source = open_path(str(tmp_path / "a.parquet"), data)
  assert read_all(source) == as_bytes() and source.names[3] == "a.parquet[3]"
  both = open_path(f"{tmp_path}/*.parquet", data)
  assert read_all(both) == as_bytes(TEXTS + TEXTS[::-1]) and both.slow
  assert [both.read(i, 0, 1).tobytes() for i in (7, 0, 5, 2)] == [
    t[:1] for t in as_bytes(["first", "first", TEXTS[2], TEXTS[2]])
  ]
  assert both.fingerprint != source.fingerprint


def test_parquet_types_and_fields(tmp_path, data):
  columns = {
    "text": arrow.array(["a", "b", "a"]).dictionary_encode(),
    "large": arrow.array(["a", "b", "a"], arrow.large_string()),
    "raw": arrow.array([b"a", b"\xff", b"a"]),
    "n": [1, 2, 3],
  }
  parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
  for field, expected in (("text", b"b"), ("large", b"b"), ("raw", b"\xff")):
    assert read_all(open_path(f"{tmp_path}/a.parquet#{field}", data)) == [b"a", expected, b"a"]
  with pytest.raises(ConfigError, match=r"field 'n' is int64 and holds no text"):
    open_path(f"{tmp_path}/a.parquet#n", data)
  with pytest.raises(ConfigError, match=r"no field 'x'; its fields: text, large, raw, n"):
    open_path(f"{tmp_path}/a.parquet#x", data)
  parquet.write_table(arrow.table({"content": ["a"]}), tmp_path / "b.parquet")
  with pytest.raises(ConfigError, match=r"no field 'text'"):
    open_path(f"{tmp_path}/b.parquet", data)


def test_rows_without_a_text(tmp_path, data):
  write_parquet(tmp_path / "a.parquet", ["one", "", None, "two"])
  with pytest.raises(DataError, match=r"a\.parquet, row 2 has no value in 'text'; skip"):
    open_path(f"{tmp_path}/a.parquet", data)
  source = open_path(f"{tmp_path}/a.parquet", dataclasses.replace(data, skip_bad=True))
  assert read_all(source) == [b"one", b"two"] and source.skipped == 2
  assert list(source.names) == ["a.parquet[0]", "a.parquet[3]"]
  write_parquet(tmp_path / "b.parquet", ["one", None, "two", None, None])
  with pytest.raises(DataError, match=r"b\.parquet, row 1 has no value in 'text', the first of 3 such rows; skip"):
    open_path(f"{tmp_path}/b.parquet", data)


def test_a_damaged_parquet_file_is_named_or_skipped(tmp_path, data):
  write_parquet(tmp_path / "a.parquet", TEXTS)
  write_parquet(tmp_path / "b.parquet", TEXTS)
  (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
  with pytest.raises(DataError, match=r"a\.parquet is not a whole Parquet file") as error:
    open_path(str(tmp_path / "*.parquet"), data)
  assert "\n" not in str(error.value)
  source = open_path(str(tmp_path / "*.parquet"), dataclasses.replace(data, skip_bad=True))
  assert read_all(source) == as_bytes() and source.skipped == 1


def pictures(count=3):
  encoded = []
  for i in range(count):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), np.uint8)).save(file, "PNG")
    encoded.append(file.getvalue())
  return encoded


def image_files(tmp_path, encoded, config):
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i, image in enumerate(encoded):
    (folder / f"{i}.png").write_bytes(image)
  paths = sorted(map(str, folder.iterdir()))
  return read_all(Images(ImageFiles(paths, paths), config))


@pytest.mark.parametrize("nested", [False, True])
def test_images_in_parquet(tmp_path, data, nested):
  config = dataclasses.replace(data, form="image", image_size=16)
  encoded = pictures()
  values = [{"bytes": image, "path": "x.png"} for image in encoded] if nested else encoded
  parquet.write_table(arrow.table({"image": values, "label": [1, 2, 3]}), tmp_path / "a.parquet", row_group_size=2)
  source = open_path(f"{tmp_path}/a.parquet", config)
  assert read_all(source) == image_files(tmp_path, encoded, config) and source.names[2] == "a.parquet[2]"
  parquet.write_table(arrow.table({"image": [encoded[0], b"no image", None]}), tmp_path / "b.parquet")
  with pytest.raises(DataError, match=r"b\.parquet, row 1 is not a whole"):
    read_all(open_path(f"{tmp_path}/b.parquet", config))
  skipping = open_path(f"{tmp_path}/b.parquet", dataclasses.replace(config, skip_bad=True))
  assert len(read_all(skipping)) == 1 and skipping.skipped == 2
  with pytest.raises(ConfigError, match="field 'label' is int64 and holds no encoded images"):
    open_path(f"{tmp_path}/a.parquet#label", config)


def test_recordings_in_parquet(tmp_path, data):
  soundfile = pytest.importorskip("soundfile")
  samples = (3000 * np.sin(np.arange(2000) / 7)).astype(np.int16)
  file = io.BytesIO()
  soundfile.write(file, samples, 8000, format="FLAC")
  parquet.write_table(arrow.table({"audio": [{"bytes": file.getvalue(), "path": "x.flac"}]}), tmp_path / "a.parquet")
  source = open_path(f"{tmp_path}/a.parquet", dataclasses.replace(data, form="audio"))
  assert read_all(source) == [samples.tobytes()] and source.unit == 2


@pytest.mark.parametrize("form", ["image", "audio"])
def test_files_that_are_left_out_are_counted_with_bad_items(tmp_path, data, form):
  if form == "audio":
    soundfile, file = pytest.importorskip("soundfile"), io.BytesIO()
    soundfile.write(file, np.arange(2000, dtype=np.int16), 8000, format="FLAC")
    good = [file.getvalue()] * 2
  else:
    good = pictures(2)
  for name in ("a", "b"):
    parquet.write_table(arrow.table({form: [*good, b"neither"]}), tmp_path / f"{name}.parquet")
  (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
  config = dataclasses.replace(data, form=form, image_size=16, skip_bad=True)
  source = open_path(f"{tmp_path}/*.parquet", config)
  assert len(source.names) == 2 and source.skipped == 2  # a file and a record


@pytest.fixture
def saved(tmp_path, monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
  datasets.disable_progress_bars()
  table = datasets.Dataset.from_dict({"text": [*TEXTS, "last"], "title": ["t"] * 5})
  datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "saved"))
  table.save_to_disk(str(tmp_path / "table"))
  return tmp_path


def test_hugging_face_data_sets_saved_to_disk(saved, data):
  source = open_path(f"hf:{saved}/saved:train", data)
  assert read_all(source) == as_bytes([*TEXTS, "last"])
  assert source.fingerprint == open_path(f"hf:{saved}/saved:train", data).fingerprint
  assert read_all(open_path(f"hf:{saved}/saved:test", data)) == as_bytes(TEXTS[1:2])
  assert read_all(open_path(f"hf:{saved}/saved:train[:40%]+test", data)) == as_bytes([*TEXTS[:2], TEXTS[1]])
  assert read_all(open_path(f"hf:{saved}/saved:train#title", data)) == [b"t"] * 5
  for spec in (f"hf:{saved}/table", f"{saved}/table", f"{saved}/table#text"):  # named as a folder, too
    assert read_all(open_path(spec, data)) == as_bytes([*TEXTS, "last"])
  with pytest.raises(ConfigError, match=r"no split 'dev'; there are train, test"):
    open_path(f"hf:{saved}/saved:dev", data)
  with pytest.raises(ConfigError, match=r"names no split; there are train, test"):
    open_path(f"{saved}/saved", data)
  with pytest.raises(ConfigError, match=r"no field 'x'; its fields: text, title"):
    open_path(f"hf:{saved}/saved:train#x", data)


def test_parts_of_saved_data_sets_that_have_no_rows(saved, data):
  for spec in ("saved:train[:1%]", "saved:train[:0]", "saved:train[2:2]", "table:train[:1%]"):
    with pytest.raises(DataError, match=r"train\[\S*\] has no rows; name another split, or a larger part of it$"):
      open_path(f"hf:{saved}/{spec}", data)
  assert read_all(open_path(f"hf:{saved}/saved:train[:1%]+train[3:]+test", data)) == as_bytes(
    [TEXTS[3], "last", TEXTS[1]]
  )


def test_the_split_of_a_single_saved_table(saved, data):
  """A table that says of which split it is has no other; one that does not say counts as train."""
  datasets = pytest.importorskip("datasets")
  for name, split in (("said", "validation"), ("sum", "train[:50%]+test")):
    rows = {"text": [*TEXTS, "last"]}
    datasets.Dataset.from_dict(rows, split=datasets.NamedSplit(split)).save_to_disk(str(saved / name))
  whole = as_bytes([*TEXTS, "last"])
  for spec in ("said", "said:validation", "table:train", "sum", "sum:train[:50%]+test"):
    assert read_all(open_path(f"hf:{saved}/{spec}", data)) == whole
  for spec in ("said:validation[:40%]", "table:train[:40%]"):
    assert read_all(open_path(f"hf:{saved}/{spec}", data)) == whole[:2]
  assert read_all(open_path(f"hf:{saved}/table:train[:1]+train[4:]", data)) == [whole[0], whole[4]]
  for spec, wrong, there in (
    ("said:train", "train", "validation"),
    ("said:train[:40%]", "train", "validation"),
    ("said:validation+test", "test", "validation"),
    ("table:validation", "validation", "train"),
    ("table:validation[:1]", "validation", "train"),
    ("table:train+validation", "validation", "train"),
    ("sum:train", "train", r"train\[:50%\]\+test"),
  ):
    with pytest.raises(ConfigError, match=rf"there is no split '{wrong}'; there is {there} alone; without a split"):
      open_path(f"hf:{saved}/{spec}", data)


def test_hugging_face_data_sets_by_name(saved, data):
  """A folder that load_dataset reads is opened by its name, as one of the hub is, and is then in the cache."""
  (saved / "corpus").mkdir()
  (saved / "corpus" / "train.jsonl").write_bytes(json_lines())
  assert read_all(open_path(f"hf:{saved}/corpus:train", data)) == as_bytes()
  with pytest.raises(DataError, match=r"hf:.*corpus:dev cannot be opened: Unknown split"):
    open_path(f"hf:{saved}/corpus:dev", data)
  with pytest.raises(ConfigError, match=r"names no split; write it like"):
    open_path(f"hf:{saved}/corpus", data)


OFFLINE = """
import sys
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
for spec in ("hf:org/name:train", "hf:org/name/default:train"):
  source = open_path(spec, DataConfig())
  print(source.read(0, 0, int(source.lengths[0])).tobytes().decode())
try:
  open_path("hf:org/other:train", DataConfig())
except ValueError as error:
  print(error)
"""


def test_hugging_face_data_sets_of_the_cache_need_no_network(saved):
  """The folder that a data set of the hub leaves in the cache is made by hand here."""
  datasets = pytest.importorskip("datasets")
  (saved / "a.jsonl").write_bytes(json_lines())
  datasets.load_dataset("json", data_files=str(saved / "a.jsonl"), cache_dir=str(saved / "home/datasets"))
  [made] = [path.parent for path in (saved / "home/datasets/json").rglob("dataset_info.json")]
  cached = saved / "home/datasets/org___name/default/0.0.0" / made.name
  shutil.copytree(made, cached)
  (cached / "json-train.arrow").rename(cached / "name-train.arrow")
  info = cached / "dataset_info.json"
  info.write_text(info.read_text().replace('"dataset_name": "json"', '"dataset_name": "name"'))
  variables = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(saved / "home")}
  variables.pop("HF_DATASETS_CACHE", None)
  result = subprocess.run([sys.executable, "-c", OFFLINE], env=variables, capture_output=True, text=True, check=True)
  *found, error = result.stdout.splitlines()
  assert found == [TEXTS[0]] * 2 and error.startswith("hf:org/other:train cannot be opened: Couldn't reach"), result


def test_hugging_face_images(tmp_path, data):
  datasets = pytest.importorskip("datasets")
  encoded = pictures()
  (tmp_path / "2.png").write_bytes(encoded[2])
  rows = [
    {"bytes": encoded[0], "path": None},
    {"bytes": encoded[1], "path": "x"},
    {"bytes": None, "path": f"{tmp_path}/2.png"},
  ]
  features = datasets.Features({"image": datasets.Image()})
  datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(str(tmp_path / "saved"))
  config = dataclasses.replace(data, form="image", image_size=16)
  source = open_path(f"hf:{tmp_path}/saved", config)
  assert read_all(source) == image_files(tmp_path, encoded, config)


def test_hugging_face_images_without_a_value(tmp_path, data):
  datasets = pytest.importorskip("datasets")
  encoded = pictures(2)
  rows = [{"bytes": encoded[0], "path": None}, None, {"bytes": encoded[1], "path": None}]
  features = datasets.Features({"image": datasets.Image()})
  for name, chosen in (("saved", rows), ("other", [rows[0], None, rows[0]])):
    datasets.Dataset.from_dict({"image": chosen}, features=features).save_to_disk(str(tmp_path / name))
  config = dataclasses.replace(data, form="image", image_size=16, skip_bad=True)
  source, other = (open_path(f"hf:{tmp_path}/{name}", config) for name in ("saved", "other"))
  assert read_all(source) == image_files(tmp_path, encoded, config) and source.skipped == 1
  assert source.fingerprint != other.fingerprint


def test_two_columns_of_one_name(tmp_path, data):
  parquet.write_table(arrow.table([["a"], ["b"], ["c"]], names=["text", "text", "other"]), tmp_path / "a.parquet")
  with pytest.raises(ConfigError, match=r"a\.parquet has several columns called 'text'; rename all but one"):
    open_path(f"{tmp_path}/a.parquet", data)
  assert read_all(open_path(f"{tmp_path}/a.parquet#other", data)) == [b"c"]
