"""A small model, texts to compress with it, and compressed files of which something was changed."""

import json
import pathlib

import model_variants
from flax import nnx

from megabyte_jax.config import Level, MegabyteConfig
from megabyte_jax.data.open_data import SAMPLE_FOLDER
from megabyte_jax.generation import compression
from megabyte_jax.models.build import abstract_model

P = 4

MEGABYTE = MegabyteConfig(
  context=24,
  levels=(
    Level(patch_size=P, width=16, num_layers=1, num_heads=2, conv_filters=(3,)),
    Level(patch_size=1, width=8, num_layers=1, num_heads=2, rotary=True, cross_patch=4),
  ),
)


def model_of(config, seed=0):
  return nnx.merge(abstract_model(config)[0], model_variants.draw_parameters(config, seed))


def text_bytes():
  return pathlib.Path(SAMPLE_FOLDER, "text", "train", "moby_dick.txt").read_bytes()[40_000:]


def with_header(packed, header, code=None):
  """The file with these bytes as its header, perhaps another code, and right checksums."""
  start = len(compression._MAGIC) + 4
  end = start + int.from_bytes(packed[start - 4 : start], "little")
  code = packed[end : -compression._DIGEST] if code is None else code
  body = packed[: start - 4] + len(header).to_bytes(4, "little") + header + code
  return body + compression._digest(body)


def header_of(packed):
  start = len(compression._MAGIC) + 4
  return packed[start : start + int.from_bytes(packed[start - 4 : start], "little")]


def repacked(packed, **changes):
  """The file with other fields in its header, those of `coding` too, and right checksums; None leaves one out."""
  fields = json.loads(header_of(packed))
  for name, value in changes.items():
    group = fields["coding"] if name in fields["coding"] else fields
    group[name] = value
    if value is None:
      del group[name]
  return with_header(packed, json.dumps(fields).encode())
