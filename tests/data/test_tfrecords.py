"""Copies of TFDS data sets in the form of TFRecords are converted, and damaged ones named."""

import pytest
import tfds_copies
from packed_folders import contents
from tfrecord_files import as_tfrecords

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.open_data import open_path
from megabyte_jax.data.packing import prepare_tfds
from megabyte_jax.errors import DataError


def test_tfrecord_copies_are_converted_by_the_command_in_the_error(tmp_path, capsys):
  builder = tfds_copies.downsampled_imagenet(tmp_path)
  data = DataConfig(form="image", tfds_dir=str(tmp_path))
  spec = "tfds:downsampled_imagenet/64x64:validation"
  before = contents(open_path(spec, data))
  folder = as_tfrecords(builder)
  with pytest.raises(DataError, match="stored as tfrecord") as error:
    open_path(spec, data)
  command = next(line.split() for line in str(error.value).splitlines() if "prepare" in line)
  assert command[:4] == ["python", "-m", "megabyte_jax", "prepare"]
  elsewhere = tmp_path / "elsewhere"
  prepare.main([*command[4:], f"--out={elsewhere}"])
  assert contents(open_path(spec, DataConfig(form="image", tfds_dir=str(elsewhere)))) == before
  prepare.main(command[4:])
  assert contents(open_path(spec, data)) == before and list(folder.glob("*tfrecord*"))
  prepare.main(command[4:])
  assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "length", "missing", "content"])
def test_damaged_tfrecords_are_named(tmp_path, damage):
  folder = as_tfrecords(tfds_copies.downsampled_imagenet(tmp_path))
  [path] = folder.glob("*validation*")
  data = bytearray(path.read_bytes())
  if damage == "content" and not prepare_tfds.fast_crc32c():
    pytest.skip("google-crc32c is not installed")
  if damage == "cut":
    data = data[:-5]
  elif damage == "length":
    data[2] ^= 1
  elif damage == "content":
    data[500] ^= 1
  else:
    data = data[: 16 + int.from_bytes(data[:8], "little")]
  path.write_bytes(data)
  with pytest.raises(DataError, match=rf"{path.name} (is (damaged|cut short)|holds 1 records)"):
    prepare.main(["convert", "tfds:downsampled_imagenet/64x64", f"--tfds_dir={tmp_path}"])
  assert not list(folder.glob("*validation*array_record*")) and not list(folder.glob("*tmp*"))


def test_a_data_set_that_nobody_knows_is_one_line(tmp_path):
  for command in ("build", "convert"):
    with pytest.raises(DataError, match="knows no data set 'nonsense'"):
      prepare.main([command, "tfds:nonsense", f"--tfds_dir={tmp_path}"])
  with pytest.raises(DataError, match="nothing to convert"):
    prepare.main(["convert", "tfds:pg19", f"--tfds_dir={tmp_path}"])
  with pytest.raises(DataError, match=r"manual|by hand"):
    prepare.main(["build", "tfds:imagenet2012", f"--tfds_dir={tmp_path}"])
