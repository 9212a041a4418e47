"""gs:// paths through etils.epath, with a bucket kept in memory behind fsspec's interface.

ArrayRecord's own reader speaks to buckets itself: for it the same bucket stands behind an HTTP server.
"""

import http.server
import importlib.util
import pathlib
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
import tfds_copies
from fsspec.implementations.memory import MemoryFileSystem
from run_commands import ROOT

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data import files
from megabyte_jax.data.batches import batches
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path
from megabyte_jax.errors import DataError
from megabyte_jax.files import object_stores

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


class Objects(http.server.BaseHTTPRequestHandler):
  """The JSON interface of Google's buckets, as far as reading an object goes."""

  protocol_version = "HTTP/1.1"

  def do_GET(self):
    url = urllib.parse.urlparse(self.path)
    *_, bucket, _, name = url.path.split("/", 6)  # /storage/v1/b/BUCKET/o/NAME
    path = f"gs://{bucket}/{urllib.parse.unquote(name)}"
    if not Bucket().exists(path):
      self.send_error(404)
      return
    body, asked = Bucket().cat_file(path), self.headers.get("Range")
    self.send_response(206 if asked else 200)
    if asked:
      first, _, last = asked.removeprefix("bytes=").partition("-")
      first, last = (int(first), int(last or len(body) - 1)) if first else (len(body) - int(last), len(body) - 1)
      self.send_header("Content-Range", f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}")
      body = body[first : last + 1]
    self.send_header("x-goog-generation", "1")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def server():
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Objects) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_tfds_data_set_in_a_bucket(upload, server, tmp_path, monkeypatch):
  monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", server)
  builder = tfds_copies.downsampled_imagenet(tmp_path)
  upload(tmp_path, "bucket/tfds")
  local = DataConfig(form="image", tfds_dir=str(tmp_path))
  expected = open_path("tfds:downsampled_imagenet/64x64:validation", local)
  for spec, folder in (
    ("tfds:downsampled_imagenet/64x64:validation", "gs://bucket/tfds"),
    ("tfds:gs://bucket/tfds/downsampled_imagenet/64x64/2.0.0:validation", ""),
  ):
    source = open_path(spec, DataConfig(form="image", tfds_dir=folder))
    assert list(contents(source).values()) == list(contents(expected).values())
    assert source.fingerprint == expected.fingerprint
  [shard] = pathlib.Path(builder.data_dir).glob("*validation*")
  path = f"gs://bucket/tfds/{shard.relative_to(tmp_path).as_posix()}"
  Bucket().pipe_file(path, shard.read_bytes()[:-3000])
  with pytest.raises(DataError, match=r"validation\[\d\] \(record \d of gs://.*\) cannot be read"):
    contents(
      open_path("tfds:downsampled_imagenet/64x64:validation", DataConfig(form="image", tfds_dir="gs://bucket/tfds"))
    )


def test_hidden_and_many_files_are_found_and_asked_for_at_once(upload, tmp_path, monkeypatch):
  for i in range(64):
    (tmp_path / f"{i:02}").write_bytes(bytes([i + 1]) * 10)
  (tmp_path / ".hidden").write_bytes(b"no")
  upload(tmp_path, "bucket/many")
  at_once, most, lock, real = [0], [0], threading.Lock(), files.read_block

  def slow(*arguments):
    with lock:
      at_once[0] += 1
      most[0] = max(most[0], at_once[0])
    time.sleep(0.005)
    with lock:
      at_once[0] -= 1
    return real(*arguments)

  monkeypatch.setattr(files, "read_block", slow)
  remote_source, local = open_path("gs://bucket/many", PLAIN), open_path(str(tmp_path), PLAIN)
  assert len(remote_source.names) == 64 and remote_source.names == local.names
  assert remote_source.fingerprint == local.fingerprint and most[0] > 8


MISSING = """
import sys
from megabyte_jax.commands import command_line
from megabyte_jax.config import DataConfig
from megabyte_jax.commands import prepare
from megabyte_jax.data.open_data import open_path
from megabyte_jax.checkpoints.trained_model import load
for command in (
  lambda: command_line.run(lambda: prepare.main(["pack", "gs://bucket/text", "p"])),
  lambda: command_line.run(lambda: open_path("gs://bucket/text", DataConfig())),
  lambda: command_line.run(lambda: load("gs://bucket/run")),
):
  try:
    command()
  except SystemExit as end:
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
"""


def test_a_missing_package_is_one_line_with_the_command_that_installs_it():
  if importlib.util.find_spec("gcsfs"):
    pytest.skip("gcsfs is installed")
  result = subprocess.run([sys.executable, "-c", MISSING], cwd=ROOT, capture_output=True, text=True, check=False)
  hint = 'paths in a bucket need gcsfs, which is not installed: pip install -e ".[gcs]"'
  assert result.stderr.splitlines() == [f"error: {hint}"] * 3
  assert object_stores.missing_package(ImportError("`google-cloud-storage` must be installed")).endswith('[gcs]"')
  assert not object_stores.missing_package(ImportError("No module named 'numpy'"))


def test_what_is_no_bucket_is_one_line():
  with pytest.raises(DataError, match="no data can be read from https://; copy them"):
    open_path("https://example.org/a.txt", PLAIN)
