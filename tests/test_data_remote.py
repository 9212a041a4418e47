"""gs:// paths through etils.epath, with a bucket kept in memory behind fsspec's interface."""

import importlib.util
import pathlib
import sys

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from megabyte_jax.config import DataConfig
from megabyte_jax.data import prepare
from megabyte_jax.data.batches import batches
from megabyte_jax.data.sources import SAMPLE_FOLDER, DataError, open_path

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("tensorflow") is not None, reason="epath then goes through TensorFlow"
)
PLAIN = DataConfig()


class Bucket(MemoryFileSystem):
  protocol = ("gs", "gcs")
  store, pseudo_dirs = {}, [""]

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")


@pytest.fixture
def upload(monkeypatch):
  monkeypatch.setitem(
    sys.modules["fsspec.registry"]._registry, "gcs", Bucket
  )  # fsspec.registry itself hides the module
  Bucket.store.clear()
  Bucket.clear_instance_cache()

  def upload(folder, where):
    for path in pathlib.Path(folder).rglob("*"):
      if path.is_file():
        Bucket().pipe_file(f"gs://{where}/{path.relative_to(folder).as_posix()}", path.read_bytes())

  return upload


def contents(source):
  pairs = zip(source.names, source.lengths, strict=True)
  return {name: source.read(i, 0, int(n)).tobytes() for i, (name, n) in enumerate(pairs)}


def test_files_in_a_bucket_are_the_files(upload):
  local = open_path("sample:text/train", PLAIN)
  upload(f"{SAMPLE_FOLDER}/text/train", "bucket/text")
  remote = open_path("gs://bucket/text", PLAIN)
  assert contents(remote) == contents(local) and remote.fingerprint == local.fingerprint
  assert open_path("gs://bucket/text/*.txt", PLAIN).names == local.names
  assert open_path("gs://bucket/text/moby_dick.txt", PLAIN).names == ["moby_dick.txt"]
  options = dict(batch_size=4, context=128, seed=0, num_steps=3)
  for (_, a), (_, b) in zip(batches(remote, **options), batches(local, **options), strict=True):
    assert a.x_BT.tobytes() == b.x_BT.tobytes()
  with pytest.raises(DataError, match="gs://bucket/none does not exist"):
    open_path("gs://bucket/none", PLAIN)


def test_images_and_packed_data_in_a_bucket(upload, tmp_path):
  data = DataConfig(form="image", image_size=16)
  local = open_path("sample:images/validation", data)
  upload(f"{SAMPLE_FOLDER}/images/validation", "bucket/images")
  remote = open_path("gs://bucket/images", data)
  assert contents(remote) == contents(local) and remote.fingerprint == local.fingerprint
  prepare.main(["pack", f"{SAMPLE_FOLDER}/text/validation", str(tmp_path / "packed")])
  upload(tmp_path / "packed", "bucket/packed")
  packed = open_path("gs://bucket/packed", PLAIN)
  assert contents(packed) == contents(open_path("sample:text/validation", PLAIN))
  assert packed.fingerprint == open_path(str(tmp_path / "packed"), PLAIN).fingerprint
