"""Every byte of a packed folder's manifest may be wrong: it is read as it stands, or refused in one line."""

import json

import pytest
from etils import epath

from megabyte_jax.commands import prepare
from megabyte_jax.data.packing.packed_folder import MANIFEST, read_manifest
from megabyte_jax.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("packed")
  (root / "texts").mkdir()
  (root / "texts" / "a.txt").write_bytes(b"some bytes")
  prepare.main(["pack", str(root / "texts"), str(root / "packed")])
  return root / "packed"


def refused(folder, data):
  (folder / MANIFEST).write_bytes(data)
  try:
    read_manifest(epath.Path(folder))
  except DataError as error:
    assert str(folder) in str(error) and "\n" not in str(error)
    return str(error)
  return ""


def test_every_byte(folder):
  whole = (folder / MANIFEST).read_bytes()
  found = [
    refused(folder, whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
    for place in range(len(whole))
    for flip in (0x01, 0x10, 0x80, 0xFF)
  ]
  assert sum(map(bool, found)) > len(found) // 2  # the others are in text that says nothing of the bytes
  assert all(refused(folder, whole[:length]) for length in range(len(whole) - 1))
  (folder / MANIFEST).write_bytes(whole)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"bytes": -1}, "wrong 'bytes'"),
    ({"documents": True}, "wrong 'documents'"),
    ({"unit": "1"}, "wrong 'unit'"),
    ({"sha256": []}, "wrong 'sha256'"),
    ({"format": 2}, "is in the format 2"),
  ],
)
def test_fields_of_another_type(folder, changes, message):
  whole = (folder / MANIFEST).read_bytes()
  assert message in refused(folder, json.dumps(json.loads(whole) | changes).encode())
  assert "pack the data again" in refused(folder, b"[" * 100_000)
  (folder / MANIFEST).write_bytes(whole)
