"""Small TFDS data sets as TFRecord files, which most copies are."""

import pathlib

from array_record.python import array_record_module


def crc32c(data):
  """Bit by bit, as RFC 3720 defines it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def tfrecord(record):
  def masked(data):
    crc = crc32c(data)
    return ((((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")

  head = len(record).to_bytes(8, "little")
  return head + masked(head) + record + masked(record)


def as_tfrecords(builder):
  """Turns a small data set into the TFRecord files that most copies are."""
  folder = pathlib.Path(builder.data_dir)
  for path in folder.glob("*array_record*"):
    records = array_record_module.ArrayRecordReader(str(path)).read_all()
    (folder / path.name.replace("array_record", "tfrecord")).write_bytes(b"".join(map(tfrecord, records)))
    path.unlink()
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
  return folder
