"""A list of checksums that somebody damaged is damage, too, and no error of its own."""

import json

import pytest
from etils import epath

from megabyte_jax.checkpoints.checksums import DIGESTS_FILE, find_damage, write_digests


@pytest.fixture
def folder(tmp_path):
  (tmp_path / "params").mkdir()
  (tmp_path / "params/array").write_bytes(b"numbers")
  folder = epath.Path(tmp_path)
  write_digests(folder)
  return folder


def test_a_whole_folder_and_a_changed_file(folder):
  assert find_damage(folder) is None and find_damage(folder, "params") is None
  assert find_damage(folder, "meta") == "meta is missing"
  (folder / "params/array").write_bytes(b"Numbers")
  assert find_damage(folder) == "the contents of params/array have changed"


@pytest.mark.parametrize(
  "text",
  [
    '{"params/',
    "[]",
    "[" * 100_000,
    '{"params/array": 7}',
    '{"params/array": [7]}',
    '{"params/array": ["7", 1]}',
    '{"params/array": [7, 1], "params/array": [7, 1]}',
    b"\xff",
  ],
  ids=["cut", "list", "deep", "number", "short", "text", "twice", "bytes"],
)
def test_a_damaged_list_is_damage(folder, text):
  (folder / DIGESTS_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
  assert find_damage(folder) == f"{DIGESTS_FILE} cannot be read"


def test_object_stores_keep_checksums_of_their_own(folder):
  (folder / DIGESTS_FILE).write_text(json.dumps({"params/array": [7, None]}))
  assert find_damage(folder) is None
