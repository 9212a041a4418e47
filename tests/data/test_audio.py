import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax.config import DataConfig
from megabyte_jax.data.batches import batches
from megabyte_jax.data.media import audio
from megabyte_jax.data.open_data import open_path
from megabyte_jax.errors import ConfigError, DataError

sf = pytest.importorskip("soundfile")


def tone(seconds=0.5, rate=8000, hertz=440.0, channels=1):
  t = np.arange(int(seconds * rate)) / rate
  wave = (12000 * np.sin(2 * np.pi * hertz * t)).astype(np.int16)
  return np.stack([wave] * channels, 1) if channels > 1 else wave


def all_of(source, i=0):
  return source.read(i, 0, int(source.lengths[i]))


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_bit_mono_comes_through_exactly(tmp_path, suffix):
  samples = np.random.default_rng(0).integers(-32768, 32768, 5000).astype(np.int16)
  sf.write(tmp_path / f"a.{suffix}", samples, 8000, subtype="PCM_16")
  source = open_path(str(tmp_path), DataConfig(form="audio"))
  assert all_of(source).tobytes() == samples.astype("<i2").tobytes()
  assert source.read(0, 3, 9).tobytes() == samples.astype("<i2").tobytes()[3:9]


def test_channels_are_averaged_and_24_bits_rounded(tmp_path):
  stereo = np.stack([tone(), 0 * tone()], 1)
  sf.write(tmp_path / "a.wav", stereo, 8000)
  source = open_path(str(tmp_path), DataConfig(form="audio"))
  np.testing.assert_allclose(audio.bytes_to_samples(all_of(source), "pcm16"), tone() / 2, atol=0.51)
  sf.write(tmp_path / "a.wav", tone() / 32768, 8000, subtype="PCM_24")
  source = open_path(str(tmp_path), DataConfig(form="audio"))
  np.testing.assert_array_equal(audio.bytes_to_samples(all_of(source), "pcm16"), tone())


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
def test_pcm16_is_exactly_inverted(values):
  samples = np.array(values, np.int16)
  x = audio.samples_to_bytes(samples, "pcm16")
  np.testing.assert_array_equal(audio.bytes_to_samples(x, "pcm16"), samples)
  np.testing.assert_array_equal(audio.bytes_to_samples(np.append(x, 7), "pcm16"), samples)


def test_mu_law_keeps_every_byte_and_grows_with_the_sample():
  every = np.arange(256, dtype=np.uint8)
  samples = audio.bytes_to_samples(every, "mulaw8")
  assert (np.diff(samples.astype(int)) > 0).all()
  np.testing.assert_array_equal(audio.samples_to_bytes(samples, "mulaw8"), every)
  ramp = np.arange(-32768, 32768).astype(np.int16)
  assert (np.diff(audio.samples_to_bytes(ramp, "mulaw8").astype(int)) >= 0).all()
  loud = np.abs(audio.bytes_to_samples(audio.samples_to_bytes(ramp, "mulaw8"), "mulaw8").astype(int) - ramp)
  half_a_step = np.log(256) / 255 * (np.abs(ramp.astype(int)) + 32768 / 255)  # derivative of the curve
  assert (loud <= 1.03 * half_a_step + 2).all()


@pytest.mark.parametrize("rate", [4000, 11025, 16000])
def test_resampling_keeps_the_tone_and_the_promised_length(tmp_path, rate):
  sf.write(tmp_path / "a.wav", tone(rate=8000), 8000)
  source = open_path(str(tmp_path), DataConfig(form="audio", sample_rate=rate))
  samples = audio.bytes_to_samples(all_of(source), "pcm16")
  assert len(samples) == (rate + 1) // 2
  middle = slice(rate // 10, -rate // 10)
  np.testing.assert_allclose(samples[middle], tone(0.501, rate)[: len(samples)][middle], atol=60)


def test_shipped_recordings_become_batches(tmp_path):
  data = DataConfig(form="audio", sample_rate=8000, encoding="mulaw8")
  source = open_path("sample:audio/train", data)
  assert source.names == ["ambi_choir.flac", "ambi_drone.flac", "ambi_lunar_land.flac"]
  assert source.lengths.tolist() == [12572, 35267, 59154]
  for _, batch in batches(source, batch_size=2, context=500, seed=0, num_steps=3):
    assert 100 < batch.x_BT.mean() < 155
  audio.write_wav(tmp_path / "out.wav", all_of(source, 1), "mulaw8", 8000)
  assert sf.info(str(tmp_path / "out.wav")).frames == 35267
  with pytest.raises(ConfigError, match="sample_rate"):
    audio.write_wav(tmp_path / "out.wav", all_of(source, 1), "mulaw8", 0)


def test_windows_of_16_bit_audio_start_at_samples(tmp_path):
  samples = np.arange(5001).astype(np.int16)
  sf.write(tmp_path / "a.wav", samples, 8000)
  source = open_path(str(tmp_path), DataConfig(form="audio"))
  for _, batch in batches(source, batch_size=8, context=64, seed=0, num_steps=40):
    assert (np.diff(batch.x_BT.view("<i2").astype(int)) == 1).all()
  with pytest.raises(ConfigError, match="context of 63 bytes"):
    next(batches(source, batch_size=8, context=63, seed=0))


def test_fingerprint_follows_what_changes_the_bytes(tmp_path):
  sf.write(tmp_path / "a.wav", tone(), 8000)
  kinds = [{}, {"sample_rate": 4000}, {"encoding": "mulaw8"}]
  assert len({open_path(str(tmp_path), DataConfig(form="audio", **k)).fingerprint for k in kinds}) == 3


def encoded(kind):
  file = io.BytesIO()
  sf.write(file, np.random.default_rng(0).integers(-9999, 9999, 20_000).astype(np.int16), 8000, format=kind)
  return file.getvalue()


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize("keep", [0.0, 0.005, 0.5, 0.95])
def test_cut_recordings_are_named_or_skipped(tmp_path, kind, keep):
  data = encoded(kind)
  sf.write(tmp_path / "fine.wav", tone(), 8000)
  (tmp_path / "cut.flac").write_bytes(data[: int(len(data) * keep)])
  with pytest.raises(DataError, match=r"cut\.flac"):
    all_of(open_path(str(tmp_path), DataConfig(form="audio")))
  source = open_path(str(tmp_path), DataConfig(form="audio", skip_bad=True))
  assert source.names == ["fine.wav"] and source.skipped == 1 and source.skipped_names == ["cut.flac"]


def ogg_pages(data):
  """The pages of an OGG file."""
  starts = [i for i in range(len(data)) if data.startswith(b"OggS", i)]
  return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


def test_an_ogg_file_without_a_page_is_found(tmp_path):
  pages = ogg_pages(encoded("OGG"))
  path = tmp_path / "a.ogg"
  path.write_bytes(b"".join(pages))
  whole = all_of(open_path(str(path), DataConfig(form="audio")))
  assert len(pages) >= 4 and whole.size == 40_000
  for kept in (pages[:-1], pages[:2] + pages[3:], [*pages, b"x"]):
    path.write_bytes(b"".join(kept))
    with pytest.raises(DataError, match=r"a\.ogg (is cut short: its last|lacks a page|is damaged)"):
      all_of(open_path(str(path), DataConfig(form="audio")))


SAMPLES = b"\1\2" * 500


def wav(kind, promised=None, samples=SAMPLES):
  """A WAV file of 16-bit samples in one of its three dresses, saying `promised` bytes of samples."""
  promised = len(samples) if promised is None else promised
  order = ">" if kind == b"RIFX" else "<"
  long = kind == b"RF64"
  ds64 = b"ds64" + struct.pack("<IQQQI", 28, promised + 72, promised, promised // 2, 0) if long else b""
  size = 0xFFFFFFFF if long else promised
  head = (
    b"fmt " + struct.pack(f"{order}IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16) + b"data" + struct.pack(f"{order}I", size)
  )
  riff = 0xFFFFFFFF if long else promised + 36 if promised not in (0, 0xFFFFFFFF) else promised
  return kind + struct.pack(f"{order}I", riff) + b"WAVE" + ds64 + head + samples


@pytest.mark.parametrize("kind", [b"RIFF", b"RIFX", b"RF64"])
def test_wav_files_of_every_dress_are_read_or_named(tmp_path, kind):
  path, data = tmp_path / "a.wav", DataConfig(form="audio")
  path.write_bytes(wav(kind))
  assert all_of(open_path(str(path), data)).tobytes() == (b"\2\1" if kind == b"RIFX" else b"\1\2") * 500
  bad = {"is cut short": [wav(kind)[:-4], wav(kind, 1002)]}
  bad["does not say how long|is cut short"] = [] if kind == b"RF64" else [wav(kind, 0)]
  sf.write(tmp_path / "fine.wav", tone(), 8000)
  for what, contents in bad.items():
    for content in contents:
      path.write_bytes(content)
      with pytest.raises(DataError, match=rf"a\.wav ({what})"):
        all_of(open_path(str(path), data))
      assert open_path(str(tmp_path), DataConfig(form="audio", skip_bad=True)).skipped == 1


@pytest.mark.parametrize("kind", [b"RIFF", b"RIFX"])
@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_wav_files_that_came_through_a_pipe_are_read_to_their_end(tmp_path, kind, size):
  order = ">I" if kind == b"RIFX" else "<I"
  data = bytearray(wav(kind))
  data[40:44] = struct.pack(order, size)
  for riff in (size, (size + 36) & 0xFFFFFFFF, 0):
    data[4:8] = struct.pack(order, riff)
    (tmp_path / "a.wav").write_bytes(data)
    assert all_of(open_path(str(tmp_path), DataConfig(form="audio"))).size == 1000


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_24", "PCM_16", "GSM610"])
@pytest.mark.parametrize("more", [-9, 1, 8, 1000])
def test_wav_files_are_judged_by_their_samples_and_not_by_their_head(tmp_path, subtype, more):
  path = tmp_path / "a.wav"
  sf.write(path, tone()[:3999], 8000, subtype=subtype)
  data = bytearray(path.read_bytes())
  before = all_of(open_path(str(path), DataConfig(form="audio")))
  data[4:8] = struct.pack("<I", len(data) - 8 + more)
  path.write_bytes(data.rstrip(b"\0") if subtype == "PCM_U8" else data)  # without the byte that makes it even
  np.testing.assert_array_equal(all_of(open_path(str(path), DataConfig(form="audio"))), before)
  path.write_bytes(data[:-100])
  with pytest.raises(DataError, match="cut short"):
    open_path(str(path), DataConfig(form="audio"))


@pytest.mark.parametrize("rate", [1, 100, 1 << 23])
def test_a_head_with_a_wrong_rate_does_not_fill_the_memory(tmp_path, rate):
  sf.write(tmp_path / "fine.wav", tone(), 8000)
  data = bytearray(wav(b"RIFF"))
  data[24:28] = struct.pack("<I", rate)
  (tmp_path / "wrong.wav").write_bytes(data)
  with pytest.raises(DataError, match=rf"wrong\.wav says that it has {rate:,} samples per second"):
    open_path(str(tmp_path), DataConfig(form="audio", sample_rate=8000))
  source = open_path(str(tmp_path), DataConfig(form="audio", sample_rate=8000, skip_bad=True))
  assert source.names == ["fine.wav"] and source.skipped == 1
  assert open_path(str(tmp_path), DataConfig(form="audio")).lengths.tolist() == [8000, 1000]  # nothing is resampled


def without_length(flac):
  """A FLAC file as programs write it that do not know its length beforehand."""
  return flac[:21] + bytes([flac[21] & 0xF0]) + bytes(4) + flac[26:]


@pytest.mark.parametrize("count", [1, 100, 4096, 4097, 20_000])
def test_flac_files_that_do_not_say_how_long_they_are(tmp_path, count):
  file = io.BytesIO()
  samples = np.random.default_rng(0).integers(-9999, 9999, (count, 2)).astype(np.int16)
  sf.write(file, samples, 8000, format="FLAC")
  data, path = without_length(file.getvalue()), tmp_path / "a.flac"
  path.write_bytes(data)
  assert audio.read_head(str(path)) == (count, 8000)
  found, rate = audio.decode(str(path))
  np.testing.assert_allclose(found * 32768, samples.mean(axis=1), atol=0.01)
  for bad in (data[:-1], data[:-5], data + b"x", data[:-9] + bytes([data[-9] ^ 85]) + data[-8:]):
    path.write_bytes(bad)
    with pytest.raises(DataError, match=r"a\.flac is not a readable .*last frame is damaged or cut short"):
      audio.read_head(str(path))


@pytest.mark.parametrize("tag", [b"TAG" + bytes(125), b"APETAGEX" + bytes(24)])
def test_an_ogg_file_may_have_a_tag_behind_its_last_page(tmp_path, tag):
  (tmp_path / "a.ogg").write_bytes(encoded("OGG") + tag)
  assert all_of(open_path(str(tmp_path), DataConfig(form="audio"))).size == 40_000


@pytest.mark.parametrize(("kind", "subtype"), [("AIFF", "PCM_16"), ("AU", "PCM_16"), ("CAF", "PCM_16"), ("MP3", None)])
def test_recordings_of_other_kinds_are_read_and_cut_ones_named(tmp_path, kind, subtype):
  path = tmp_path / f"a.{kind}"
  sf.write(path, tone(), 8000, format=kind, subtype=subtype)
  source = open_path(str(tmp_path), DataConfig(form="audio"))
  samples = audio.bytes_to_samples(all_of(source), "pcm16")
  np.testing.assert_allclose(samples, tone(), atol=600 if kind == "MP3" else 0)
  path.write_bytes(path.read_bytes()[:-400])
  with pytest.raises(DataError, match=f"a.{kind} is (cut short|damaged or cut short)"):
    all_of(open_path(str(tmp_path), DataConfig(form="audio")))


@pytest.mark.parametrize("kind", ["WAV", "RF64", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF"])
def test_joined_recordings_are_named_and_not_read_in_part(kind):
  """As `cat a.flac b.flac` joins them: decoders stop after the first."""
  first, second = io.BytesIO(), io.BytesIO()
  sf.write(first, tone(), 8000, format=kind)
  sf.write(second, tone(0.2), 8000, format=kind)
  assert len(audio.decode("a", first.getvalue())[0]) == 4000
  with pytest.raises(DataError, match="a holds several recordings, one after another"):
    audio.decode("a", first.getvalue() + second.getvalue())


@pytest.mark.parametrize("start", [0, 8, 23])
def test_samples_of_an_au_file_begin_after_its_head(start):
  file = io.BytesIO()
  sf.write(file, tone(), 8000, format="AU")
  data = file.getvalue()
  with pytest.raises(DataError, match=f"a says that its samples begin at byte {start}, within its head"):
    audio.read_head("a", data[:4] + start.to_bytes(4, "big") + data[8:])


def test_opus_is_read(tmp_path):
  sf.write(tmp_path / "a.opus", tone(rate=48000), 48000, format="OGG", subtype="OPUS")
  source = open_path(str(tmp_path), DataConfig(form="audio", sample_rate=8000))
  assert source.lengths.tolist() == [8000]
  assert np.abs(audio.bytes_to_samples(all_of(source), "pcm16")[400:-400] - tone()[400:-400].astype(int)).max() < 1500


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_samples_that_are_no_numbers_are_named_or_skipped(tmp_path, value):
  samples = np.zeros(100, np.float32)
  sf.write(tmp_path / "fine.wav", samples, 8000, subtype="FLOAT")
  samples[50] = value
  sf.write(tmp_path / "bad.wav", samples, 8000, subtype="FLOAT")
  with pytest.raises(DataError, match=r"bad\.wav has samples that are not numbers"):
    all_of(open_path(str(tmp_path), DataConfig(form="audio")))
  assert open_path(str(tmp_path), DataConfig(form="audio", skip_bad=True)).names == ["fine.wav"]


def test_a_flipped_bit_in_a_flac_is_found(tmp_path):
  data = bytearray(encoded("FLAC"))
  for place in (len(data) // 3, len(data) // 2, len(data) - 100):
    changed = bytearray(data)
    changed[place] ^= 4
    (tmp_path / "a.flac").write_bytes(changed)
    with pytest.raises(DataError, match=r"a\.flac"):
      all_of(open_path(str(tmp_path), DataConfig(form="audio")))


def test_what_is_no_audio_is_named(tmp_path):
  (tmp_path / "a.wav").write_text("text")
  with pytest.raises(DataError, match=r"a\.wav is not a readable"):
    open_path(str(tmp_path), DataConfig(form="audio"))
  sf.write(tmp_path / "a.wav", np.zeros(0, np.int16), 8000)
  with pytest.raises(DataError, match=r"a\.wav has 0 samples"):
    open_path(str(tmp_path), DataConfig(form="audio"))
  with pytest.raises(ConfigError, match="sample_rate is -1"):
    open_path(str(tmp_path), DataConfig(form="audio", sample_rate=-1))
