"""Outputs appear whole or not at all, and never in place of a device, a pipe or a symbolic link."""

import os
import stat
import subprocess
import sys
import threading

import pytest

from megabyte_jax.files.atomic_file import replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
  target = tmp_path / "folder" / "file.txt"
  with replacing(target) as path:
    path.write_text("old")
  with pytest.raises(RuntimeError), replacing(target) as path:
    path.write_text("half")
    assert target.read_text() == "old"
    raise RuntimeError
  assert target.read_text() == "old"
  assert list(target.parent.iterdir()) == [target]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
  target, link, chain = tmp_path / "a" / "file", tmp_path / "link", tmp_path / "chain"
  target.parent.mkdir()
  link.symlink_to("a/file")
  chain.symlink_to(link)
  for text in ("to a file that is not there yet", "to one that is"):
    with replacing(chain) as path:
      path.write_text(text)
    assert chain.is_symlink() and link.is_symlink() and target.read_text() == text
  assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_link_to_itself_is_named(tmp_path):
  (tmp_path / "loop").symlink_to("loop")
  with pytest.raises(OSError, match="loop"), replacing(tmp_path / "loop"):
    pass
  assert (tmp_path / "loop").is_symlink()


def test_a_replaced_file_keeps_its_permissions(tmp_path):
  (tmp_path / "private").write_text("old")
  (tmp_path / "private").chmod(0o600)
  with replacing(tmp_path / "private") as path:
    path.write_text("new")
  assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def _device(path, minor):
  try:
    os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, minor))
    with open(path, "wb"):
      pass
  except OSError:
    pytest.skip("no device nodes may be made or opened here")


def test_a_device_is_written_into(tmp_path):
  _device(tmp_path / "null", 3)
  with replacing(tmp_path / "null") as path:
    path.write_bytes(b"for nobody")
  assert stat.S_ISCHR((tmp_path / "null").lstat().st_mode)
  assert list(tmp_path.iterdir()) == [tmp_path / "null"]


def test_a_full_device_is_named(tmp_path):
  _device(tmp_path / "full", 7)
  with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/full'"), replacing(tmp_path / "full") as p:
    p.write_bytes(b"a byte")
  assert stat.S_ISCHR((tmp_path / "full").lstat().st_mode)


def test_a_pipe_gets_the_bytes_once_they_are_whole(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  got = []
  reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
  reader.start()
  with pytest.raises(RuntimeError), replacing(tmp_path / "pipe") as path:
    path.write_bytes(b"half")
    raise RuntimeError
  with replacing(tmp_path / "pipe") as path, path.open("wb") as file:
    file.write(b"????second")
    file.seek(0)  # as writers of pictures and sound do
    file.write(b"1st-")
  reader.join(timeout=10)
  assert got == [b"1st-second"]
  assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)


@pytest.mark.parametrize("piped", [True, False])
def test_standard_output_goes_on_after_it(tmp_path, piped):
  names = [name for name in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1") if os.path.exists(name)]
  code = (
    "from megabyte_jax.files.atomic_file import replacing\n"
    f"for name in {names}:\n"
    "  print('before')\n"
    "  with replacing(name) as path: path.write_text('within\\n')\n"
    "print('after')\n"
  )
  with open(tmp_path / "out", "wb") as out:
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE if piped else out, check=True)
  said = done.stdout if piped else (tmp_path / "out").read_bytes()
  assert names and said == b"before\nwithin\n" * len(names) + b"after\n"
  assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_is_no_file(tmp_path):
  with pytest.raises(IsADirectoryError, match=f"'{tmp_path}'"), replacing(tmp_path) as path:
    path.write_text("x")
