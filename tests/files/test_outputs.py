"""What is said where a result cannot be written: before any work, and of what the file system refuses later."""

import errno
import os
import tempfile

import pytest

from megabyte_jax.errors import ConfigError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.outputs import check_output_file, check_output_folder, in_words

CHECKS = (check_output_file, check_output_folder)


@pytest.mark.parametrize("check", CHECKS)
def test_what_can_be_written_leaves_nothing(check, tmp_path):
  check("--output", str(tmp_path / "new" / "result"))
  check("--output", "gs://bucket/result")
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
  ("path", "message"), [("", "--output is empty; name a f"), ("https://a/b", "to https://; name a f")]
)
def test_where_nothing_can_be_written(check, path, message):
  with pytest.raises(ConfigError, match=message):
    check("--output", path)


def test_the_longest_names_of_files(tmp_path):
  path = tmp_path / ("n" * 255)
  check_output_file("--output", str(path))
  with replacing(path) as temporary:
    temporary.write_text("whole")
    assert temporary.name.startswith(".nnnn")  # by which remains of a killed process are known
  assert path.read_text() == "whole"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
  ("number", "advice"),
  [
    (errno.EACCES, "choose another --output"),
    (errno.EROFS, "choose another --output"),
    (errno.ENOSPC, "make room there, or choose another --output"),
  ],
)
def test_a_folder_that_takes_no_files(check, number, advice, tmp_path, monkeypatch):
  def refuse(dir):  # the superuser may write all
    raise OSError(number, os.strerror(number), f"{dir}/temporary")

  monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
  with pytest.raises(ConfigError) as error:
    check("--output", str(tmp_path / "new" / "result"))
  expected = f"--output={tmp_path}/new/result: no file can be written in {tmp_path} ({os.strerror(number)}); {advice}"
  assert str(error.value) == expected


def test_pipes_and_links_are_checked_where_they_lead(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  check_output_file("--output", str(tmp_path / "pipe"))  # opening it would wait for a reader
  (tmp_path / "link").symlink_to("/proc/result")
  (tmp_path / "loop").symlink_to("loop")
  with pytest.raises(ConfigError, match=r"=.*/loop: Too many levels of symbolic links; choose another --output"):
    check_output_file("--output", str(tmp_path / "loop"))
  if os.path.isdir("/proc/self"):
    with pytest.raises(ConfigError, match=r"--output=.*/link: no file can be written in /proc"):
      check_output_file("--output", str(tmp_path / "link"))


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a folder in which even the superuser makes no files")
@pytest.mark.parametrize("check", CHECKS)
def test_a_folder_of_the_kernel(check):
  with pytest.raises(ConfigError, match=r"=/proc/result: no file can be written in /proc .*; choose another --output"):
    check("--output", "/proc/result")


_ELSEWHERE = "move what is in the way elsewhere, or name another place"


def test_errors_of_the_file_system_in_words():
  def words(number, *files):
    return in_words(OSError(number, os.strerror(number), *files))

  assert words(errno.ENOENT, "a") == "a does not exist"
  assert words(errno.EACCES, "a") == "a: Permission denied; change its permissions, or name another place"
  assert words(errno.EROFS, "a") == "a: Read-only file system; name another place"
  assert words(errno.ENOSPC) == "No space left on device; make room there, or name another place"
  assert words(errno.EISDIR, "a") == "a: Is a directory; name a file"
  assert words(errno.EEXIST, "a", None, "b") == f"b: File exists; {_ELSEWHERE}"
  assert words(errno.ENOTDIR, "a") == f"a: Not a directory; {_ELSEWHERE}"
  assert in_words(OSError("what a library says")) == "what a library says"
  assert in_words(ValueError("another error")) == "another error"


def test_a_file_that_is_replaced_is_named_by_its_own_name(tmp_path):
  path = tmp_path / "result"
  with pytest.raises(OSError, match=f"No space left on device: '{path}'"), replacing(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  with pytest.raises(FileNotFoundError, match=f": '{path}'"), replacing(path) as temporary:
    temporary.read_bytes()
  with pytest.raises(OSError, match="what a library says"), replacing(path):
    raise OSError("what a library says")
  with pytest.raises(FileNotFoundError, match="another"), replacing(path):
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "another")
