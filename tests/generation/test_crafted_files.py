"""Compressed files that are damaged, or were made to deceive, are refused in one line."""

import pytest
from compressed_files import header_of, repacked, text_bytes, with_header

from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.generation import compression

DEEP = b'{"format":' + 100_000 * b"["

CRAFTED = {
  "not JSON": (b"{", "is not JSON"),
  "empty": (b"", "is not JSON"),
  "not UTF-8": (b'{"format": "\xff"}', "is not UTF-8"),
  "nested deeply": (DEEP, "nested too deeply"),
  "no object": (b"[1]", "is not a JSON object"),
  "no format": (b"{}", "another version"),
  "nothing else": (b'{"format":2}', "header.length is missing"),
  "a coding that is none": (b'{"format":2,"length":0,"digest":"","coding":3}', "header.coding must be a group of keys"),
}


@pytest.mark.usefixtures("always_coded")
def test_an_altered_or_short_file_is_refused(model):
  packed = compression.compress(model, text_bytes()[:30])
  for place in range(len(packed)):
    altered = bytearray(packed)
    altered[place] ^= 1
    with pytest.raises(DataError, match="altered" if place >= 8 else "not a file that `megabyte_jax"):
      compression.read(bytes(altered))
  for length in range(len(packed)):
    with pytest.raises(DataError, match=r"altered|not a file that `megabyte_jax"):
      compression.read(packed[:length])
  with pytest.raises(DataError, match="altered"):
    compression.read(packed + b"\0")


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_header_is_one_line(model, name):
  header, message = CRAFTED[name]
  packed = with_header(compression.compress(model, b""), header)
  with pytest.raises(DataError, match=message) as error:
    compression.decompress(model, packed)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"length": -1}, "header.length must not be negative"),
    ({"length": 10**15}, r"is not that of a text of 1,000,000,000,000,000 bytes"),
    ({"length": 1e3}, "header.length must be a whole number"),
    ({"length": True}, "header.length must be a whole number"),
    ({"length": None}, "header.length is missing"),
    ({"length": 29}, "not what was compressed|not that of a text of 29 bytes|does not fit"),
    ({"batch": 0}, "header.coding.batch must be at least 1"),
    ({"batch": 10**12}, "is not that of a text"),
    ({"batch": None}, "header.coding.batch is missing"),
    ({"digest": 5}, "header.digest must be text"),
    ({"more": 1}, "unknown key header.more"),
  ],
)
@pytest.mark.usefixtures("always_coded")
def test_a_crafted_field_is_one_line(model, changes, message):
  packed = repacked(compression.compress(model, text_bytes()[:30]), **changes)
  with pytest.raises(DataError, match=message) as error:
    compression.decompress(model, packed)
  assert "\n" not in str(error.value)


@pytest.mark.usefixtures("always_coded")
def test_a_crafted_code_is_one_line(model):
  packed = compression.compress(model, text_bytes()[:30])
  _, code = compression.read(packed)
  crafted = [code[:n] for n in range(len(code))] + [code + b"x", bytes(4), b"\xff" * 4, b"\xff\xff\xff\x7f" + code[4:]]
  for bad in crafted:
    with pytest.raises(DataError):
      compression.decompress(model, with_header(packed, header_of(packed), bad))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("always_coded")
def test_every_byte_of_the_header_may_be_wrong(model, every):
  text = text_bytes()[:12]
  packed = compression.compress(model, text)
  header, refused = header_of(packed), 0
  places = range(0, len(header), every)
  for place in places:
    for flip in (0x01, 0x10, 0x80, header[place] ^ ord("9")):
      altered = bytearray(header)
      altered[place] ^= flip
      try:
        assert compression.decompress(model, with_header(packed, bytes(altered))) == text
      except (DataError, ConfigError) as error:
        refused += 1
        assert "\n" not in str(error)
  assert refused > 3 * len(places)  # else it is the step, or a 9 already


def test_what_a_crafted_file_says_of_stored_bytes_and_versions_is_one_short_line(model):
  packed = compression.compress(model, text_bytes()[:30])
  header = header_of(packed).replace(b'"length":30', b'"length":29')
  assert compression.read(packed)[0].coding is None
  with pytest.raises(DataError, match="not what was compressed: the file is altered; get a whole copy"):
    compression.decompress(None, with_header(packed, header))


@pytest.mark.usefixtures("always_coded")
def test_a_field_of_many_lines_is_shown_in_one(model):
  packed = repacked(compression.compress(model, text_bytes()[:30]), jax="9\n" * 1000)
  with pytest.raises(ConfigError, match=r"with jax 9 9 9") as error:
    compression.decompress(model, packed)
  assert "\n" not in str(error.value) and len(str(error.value)) < 300
