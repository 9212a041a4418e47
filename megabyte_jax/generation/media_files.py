"""Reads pictures and recordings as prompts, and writes what a model makes of them as PNG and WAV files."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from megabyte_jax.config import DataConfig
from megabyte_jax.data.files import read_whole
from megabyte_jax.data.media import audio, image_decoding, patch_scan, pictures
from megabyte_jax.data.media.image_source import centred_square
from megabyte_jax.errors import require
from megabyte_jax.files.atomic_file import replacing

_AUDIO_SECONDS = 2  # generated where nobody says how long


@dataclasses.dataclass(frozen=True)
class Prompt:
  """The bytes that a model continues.

  Attributes:
    kept: uint8, the bytes that it is given.
    whole: uint8, the image or recording that they are the beginning of; the same bytes for other files.
    sample_rate: of a recording, samples per second; 0 where it has none of its own.
  """

  kept: np.ndarray
  whole: np.ndarray
  sample_rate: int = 0


def read_prompt(path: str, data: DataConfig, keep: float | None = None) -> Prompt:
  """Reads the beginning of a file, its bytes made as in training on `data`.

  A photograph gives its centred square, scaled to the model's size (also where training cut tiles), with whatever is
  not 8-bit RGB made so.

  Args:
    path: an image or a recording (docs/data.md has the kinds) for a model of these, or .bin: raw bytes in the order
      that it was trained on; any file for a model of bytes.
    keep: the share of the bytes that is kept; None takes the upper half of an image, and all of anything else.

  Raises:
    DataError: the file cannot be decoded.
    ConfigError: `keep` is not a share, or the file's name ends otherwise.
  """
  require(keep is None or 0 <= keep <= 1, f"the share to keep is {keep}; it must be between 0 and 1")
  unit, rate, name = 1, 0, path.lower()
  decodable = {"image": image_decoding.SUFFIXES, "audio": audio.SUFFIXES}.get(data.form, ("",))
  require(
    name.endswith((*decodable, ".bin")),
    f"{path} is no {data.form} file that can be decoded ({', '.join(decodable)}); raw bytes are taken from NAME.bin",
  )
  if data.form == "image" and name.endswith(image_decoding.SUFFIXES):
    whole = centred_square(read_whole(path), path, data)
    keep = 0.5 if keep is None else keep
  elif data.form == "audio" and name.endswith(audio.SUFFIXES):
    source = audio.AudioFiles([path], [path], dataclasses.replace(data, skip_bad=False))
    unit, rate = source.unit, data.sample_rate or audio.read_head(path).rate
    whole = source.read(0, 0, int(source.lengths[0]))
  else:
    whole = np.frombuffer(read_whole(path), np.uint8)  # also of a pipe
  kept = whole if keep is None else whole[: int(keep * whole.size) // unit * unit]
  return Prompt(kept, whole, rate)


def default_bytes(data: DataConfig, prompt: Prompt) -> int:
  """Returns the bytes that complete an image or recording; 400 for other data, two seconds after a whole recording."""
  rest = prompt.whole.size - prompt.kept.size
  if data.form == "image":
    return max(image_bytes(data) - prompt.kept.size, 0)
  if data.form == "audio":
    return rest or _AUDIO_SECONDS * (data.sample_rate or prompt.sample_rate or 16000) * audio.sample_width(
      data.encoding
    )
  return 400


def image_bytes(data: DataConfig) -> int:
  """Returns the bytes of one image."""
  return data.image_size**2 * 3


def check_output(path: str, data: DataConfig, samples: int, prompt: Prompt, num_bytes: int) -> None:
  """Raises ConfigError unless `write` can write such samples to `path`."""
  if not path:
    require(data.form in ("bytes", "subwords"), f"a model of {data.form} data has no text to print; give --output=FILE")
  elif is_picture(path, data):
    total, size = prompt.kept.size + num_bytes, image_bytes(data)
    require(total == size, f"{total:,} bytes, prompt included, are not an image; this model's images have {size:,}")
  else:
    if not is_sound(path, data):
      endings, made = {"image": (image_decoding.SUFFIXES, "PNG"), "audio": (audio.SUFFIXES, "WAV")}.get(
        data.form, ((), "")
      )
      require(
        not path.lower().endswith(endings),
        f"--output={path}: samples of this model are written as {made}; take a name that ends with .{made.lower()}",
      )
    require(
      samples == 1 or "{}" in path,
      f"--output={path} names one file for {samples} samples; put {{}} where their number goes",
    )
    rate = data.sample_rate or prompt.sample_rate
    require(not is_sound(path, data) or rate > 0, "a WAV file needs a sample rate; this model's data have none")


def is_picture(path: str, data: DataConfig) -> bool:
  """Returns True if samples go to `path` as a picture."""
  return data.form == "image" and path.lower().endswith(".png")


def is_sound(path: str, data: DataConfig) -> bool:
  """Returns True if samples go to `path` as sound."""
  return data.form == "audio" and path.lower().endswith(".wav")


def write(path: str, samples: list[np.ndarray], data: DataConfig, prompt: Prompt) -> None:
  """Writes samples (uint8, what they continue included): to one file each, numbered where `path` has {}.

  FILE.png of a model of images becomes a picture, FILE.wav of a model of audio sound, anything else the raw bytes.
  Several pictures in one file form a grid; where they complete an image, that comes first.
  """
  if is_picture(path, data) and "{}" not in path and len(samples) > 1:
    cells = ([prompt.whole] if prompt.kept.size and prompt.whole.size == image_bytes(data) else []) + samples
    columns = math.ceil(math.sqrt(len(cells)))
    cells = [patch_scan.bytes_to_image(x, data.scan, data.scan_patch) for x in cells]
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    pictures.write_png(path, pictures.image_grid(rows))
    return
  for number, x in enumerate(samples):
    one = path.replace("{}", str(number))
    if is_picture(path, data):
      pictures.write_document_png(one, x, data)
    elif is_sound(path, data):
      audio.write_wav(one, x, data.encoding, data.sample_rate or prompt.sample_rate)
    else:
      with replacing(one) as temporary:
        temporary.write_bytes(x.tobytes())
