"""JSON that somebody edited or damaged is one line, never a traceback."""

import json

import pytest

from megabyte_jax.errors import CheckpointError, DataError
from megabyte_jax.files.json_files import parse_json, read_json

GOOD = {"a": 1, "b": {"c": [1.5, None, "é"]}}


def test_what_is_written_is_read(tmp_path):
  path = tmp_path / "a.json"
  path.write_text(json.dumps(GOOD, ensure_ascii=False), encoding="utf-8")
  assert read_json(path, DataError, "do this") == GOOD
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Windows' editors begin a file
  assert read_json(path, DataError, "do this") == GOOD


def test_a_missing_file_is_for_the_caller(tmp_path):
  with pytest.raises(FileNotFoundError):
    read_json(tmp_path / "a.json", DataError, "do this")


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (b"", "is not JSON: Expecting value"),
    (b"{", "is not JSON: Expecting property name"),
    (b'{"a": "\xe9"}', "is not JSON: byte 7 is not UTF-8"),
    (b"[1]", "is not a JSON object but a list"),
    (b"null", "is not a JSON object but a NoneType"),
    (b'{"a": NaN}', "NaN is not a number in JSON"),
    (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: Exceeds the limit"),
    (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"a":' * 900 + b"1" + b"}" * 900, "nested too deeply"),
  ],
)
def test_anything_else_is_one_line(data, said):
  with pytest.raises(CheckpointError) as caught:
    parse_json(data, "the file f", CheckpointError, "do this")
  message = str(caught.value)
  assert message.startswith("the file f is n") and message.endswith("; do this") and "\n" not in message
  assert said in message


def test_every_changed_byte_is_read_or_one_line():
  good = json.dumps(GOOD).encode()
  for place in range(len(good)):
    for value in range(256):
      data = bytes([*good[:place], value, *good[place + 1 :]])
      try:
        assert isinstance(parse_json(data, "f", DataError, "do this"), dict)
      except DataError as error:
        assert "\n" not in str(error)


def test_a_device_is_not_read(tmp_path):
  (tmp_path / "a.json").symlink_to("/dev/zero")
  with pytest.raises(CheckpointError, match=r"a\.json is a terminal or a device"):
    read_json(tmp_path / "a.json", CheckpointError, "do this")
