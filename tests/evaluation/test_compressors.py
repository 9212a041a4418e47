from megabyte_jax.evaluation.compressors import COMPRESSORS, compress_all


def test_no_compressor_has_negative_bits_for_few_bytes():
  """A compressor's end may even become shorter with one byte more."""
  primer = b"It was a dark and stormy night; the rain fell in torrents. " * 50
  for length in range(1, 12):
    for name, bits in compress_all(primer[:length], primer).items():
      assert bits.alone > 0 and (bits.primed is None or bits.primed > 0), name


def test_a_repeated_text_costs_less_after_itself():
  text = bytes(range(256)) * 8
  found = compress_all(text, text)
  assert set(found) == set(COMPRESSORS)
  assert all(bits.primed is not None and bits.primed < bits.alone for bits in found.values())
