"""Texts to pack, and what a packed folder holds."""

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig

PLAIN = DataConfig()

TEXTS = {"a.txt": b"first", "b/two.txt": b"second " * 10, "c.txt": bytes(range(256))}
# Packs with files of at most argv[1] bytes, as if the disk were full.
NO_ROOM = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from megabyte_jax.commands import command_line
from megabyte_jax.commands import prepare
command_line.run(lambda: prepare.main(["pack", *sys.argv[2:]]))
"""


def pack(*arguments):
  prepare.main(["pack", *map(str, arguments)])


def write_texts(folder):
  for name, data in TEXTS.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def contents(source):
  pairs = zip(source.names, source.lengths, strict=True)
  return {name: source.read(i, 0, int(n)).tobytes() for i, (name, n) in enumerate(pairs)}
