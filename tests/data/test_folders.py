"""Which files a folder has: links, names of any bytes, what cannot be read; and what evaluation makes of empty ones."""

import os
import pathlib
import re
import shutil

import pytest

from megabyte_jax.commands import prepare
from megabyte_jax.config import DataConfig
from megabyte_jax.data.folders import find_files
from megabyte_jax.data.media import image_decoding
from megabyte_jax.data.open_data import SAMPLE_FOLDER, open_path
from megabyte_jax.errors import DataError

PLAIN, SKIPPING = DataConfig(), DataConfig(skip_bad=True)


@pytest.fixture
def folder(tmp_path):
  folder = tmp_path / "data"
  (folder / "b").mkdir(parents=True)
  (folder / "a.txt").write_bytes(b"first")
  (folder / "b" / "c.txt").write_bytes(b"second")
  return folder


def contents(source):
  pairs = zip(source.names, source.lengths, strict=True)
  return {name: source.read(i, 0, int(n)).tobytes() for i, (name, n) in enumerate(pairs)}


def test_linked_folders_and_files_are_read_and_loops_are_not(folder, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  (other / "d.txt").write_bytes(b"third")
  (folder / "linked").symlink_to(other)
  (folder / "b" / "e.txt").symlink_to(other / "d.txt")
  (folder / "b" / "up").symlink_to(folder)
  (other / "here").symlink_to(".")
  expected = {"a.txt": b"first", "b/c.txt": b"second", "b/e.txt": b"third", "linked/d.txt": b"third"}
  assert contents(open_path(str(folder), PLAIN)) == expected
  assert contents(open_path(f"{folder}/**/*.txt", PLAIN)) == expected


def test_names_are_the_same_however_many_slashes_a_glob_has(folder):
  for spec in ("/*.txt", "//*.txt", "///*.txt"):
    assert find_files(f"{folder}{spec}")[1] == ["a.txt"]
  for spec in ("/**/*.txt", "//**/*.txt", "//**//*.txt", "", "/", "//"):
    assert find_files(f"{folder}{spec}")[1] == ["a.txt", "b/c.txt"]


def test_links_to_nothing_are_named_or_skipped_and_counted(folder):
  (folder / "b" / "gone.txt").symlink_to("nowhere")
  for spec in (folder, f"{folder}/**/*.txt"):
    with pytest.raises(DataError, match=r"b/gone\.txt is a link whose target /.*/nowhere is missing; remove it"):
      open_path(str(spec), PLAIN)
    assert (source := open_path(str(spec), SKIPPING)).skipped == 1 and len(source.names) == 2
  with pytest.raises(DataError, match=r"b/gone\.txt is a link whose target /.*/nowhere is missing; name"):
    open_path(f"{folder}/b/gone.txt", PLAIN)
  (folder / "gone.txt.gz").symlink_to("b/gone.txt")
  with pytest.raises(DataError, match=r"gone\.txt\.gz is a link whose target /.*/nowhere is missing"):
    open_path(str(folder), PLAIN)
  (folder / "p.png").symlink_to("nowhere")
  with pytest.raises(DataError, match=r"p\.png is a link whose target /.*/nowhere is missing"):
    open_path(str(folder), DataConfig(form="image")).read(0, 0, 1)
  (folder / "s.flac").symlink_to("nowhere")
  with pytest.raises(DataError, match=r"s\.flac is a link whose target /.*/nowhere is missing; "):
    open_path(str(folder), DataConfig(form="audio"))


@pytest.mark.parametrize("form", ["bytes", "image"])
def test_links_to_themselves_are_named_or_skipped_and_counted(folder, form):
  shutil.copy(f"{SAMPLE_FOLDER}/images/validation/flower.jpg", folder / "b" / "flower.jpg")
  (folder / "b" / "loop.jpg").symlink_to("loop.jpg")
  for spec in (folder / "b", f"{folder}/b/*.jpg"):
    with pytest.raises(DataError, match=r"b/loop\.jpg cannot be read \(Too many levels of symbolic links"):
      source = open_path(str(spec), DataConfig(form=form))
      source.read(len(source.names) - 1, 0, 1)
    source = open_path(str(spec), DataConfig(form=form, skip_bad=True))
    assert source.skipped == 1 and "flower.jpg" in source.names and "loop.jpg" not in source.names


def test_files_that_are_left_out_are_counted_by_their_endings(folder, caplog, tmp_path):
  for name in ("a.png", "b/x.heic", "b/y.HEIC", ".hidden", "._z.png"):
    (folder / name).write_bytes(b"-")
  line = r".*/data: 4 of 5 files are left out, as they are not images of a kind that is read: 2 \.\w+, 2 \.\w+"
  open_path(str(folder), DataConfig(form="image"))
  open_path(str(folder), DataConfig(form="image"))
  [found] = caplog.messages  # once
  assert re.fullmatch(line, found) and "2 .heic" in found and "2 .txt" in found
  sound = tmp_path / "sound"
  shutil.copytree(f"{SAMPLE_FOLDER}/audio/validation", sound)
  (sound / "cover.mp4").write_bytes(b"-")
  open_path(str(sound), DataConfig(form="audio"))
  assert caplog.messages[1:] == [
    f"{sound}: 1 of 2 files are left out, as they are not recordings of a kind that is read: 1 .mp4"
  ]


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch):
  scandir = os.scandir

  def refuse(path):  # the superuser may read all
    if str(path).endswith("/b"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  for spec in (folder, f"{folder}/**/*.txt"):
    with pytest.raises(DataError, match=r"data/b cannot be listed .Permission denied"):
      open_path(str(spec), SKIPPING)


def test_pipes_are_no_files(folder):
  os.mkfifo(folder / "pipe")
  assert find_files(str(folder))[1] == find_files(f"{folder}/**")[1] == ["a.txt", "b/c.txt"]


def test_the_parts_of_packed_folders_are_no_documents(folder, tmp_path, monkeypatch):
  prepare.main(["pack", str(folder), str(tmp_path / "top" / "p")])
  for spec in ("top", "top/**", "top/p/*", "top/*/*", "top/**/*.txt", "top/*/*.json", "**/data.*"):
    with pytest.raises(DataError, match=r"has the packed folder .*top/p in it, .*; name .*top/p itself \("):
      open_path(f"{tmp_path}/{spec}", PLAIN)
  monkeypatch.chdir(tmp_path / "top" / "p")
  with pytest.raises(DataError, match=r"\* has the packed folder \. in it, .*; name \. itself"):
    open_path("*", PLAIN)
  (tmp_path / "top" / "p" / "data.bin").unlink()
  assert open_path("*.txt", PLAIN).names == ["names.txt"]


def test_a_folder_of_other_files_says_what_it_has(folder):
  (folder / "notes.MD").touch()
  (folder / "b" / "README").touch()
  (folder / ".hidden").touch()
  with pytest.raises(DataError) as error:
    open_path(str(folder), DataConfig(form="image"))
  assert str(error.value) == (
    f"no files in folder {folder} (looked for {', '.join(image_decoding.SUFFIXES)}), but others: 2 .txt, 1 hidden, "
    "1 without ending, 1 .md; name another folder, or set config.data.form to what these are"
  )
  (folder / "b" / "README").rename(folder / "b" / ".README")
  (folder / "arrays").mkdir()
  (folder / "arrays" / "train_data_batch_1").touch()
  (folder / "arrays" / "val.npz").touch()
  arrays = (
    r"others: 1 without ending, 1 \.npz; name another folder; images in arrays are written as files first, as docs/"
  )
  with pytest.raises(DataError, match=arrays):
    open_path(str(folder / "arrays"), DataConfig(form="image"))
  with pytest.raises(DataError, match=r"to what these are$"):
    open_path(str(folder / "arrays"), DataConfig(form="audio"))
  (folder / "b" / "c.txt").unlink()
  with pytest.raises(DataError, match=r"no files in folder .*/b, but others: 1 hidden; name another folder$"):
    open_path(str(folder / "b"), PLAIN)


def test_names_need_not_be_utf8(folder, tmp_path):
  odd = os.fsencode(folder) + b"/\xe9t\xe9.txt"
  with open(odd, "wb") as file:
    file.write(b"summer")
  source = open_path(str(folder), PLAIN)
  assert contents(source)[os.fsdecode(b"\xe9t\xe9.txt")] == b"summer" and source.fingerprint
  prepare.main(["pack", str(folder), str(tmp_path / "packed")])
  assert contents(open_path(str(tmp_path / "packed"), PLAIN)) == contents(source)
  os.truncate(odd, 0)
  with pytest.raises(DataError, match="is empty"):
    open_path(str(folder), PLAIN)


def test_all_bad_files_are_counted_and_the_first_named(folder):
  bad = [folder / name for name in ("d.txt", "e.txt", "f.txt", "g.txt")]
  bad[0].write_bytes(b"")
  with pytest.raises(DataError, match=rf"^{bad[0]} is empty; remove it, or skip such files with --config"):
    open_path(str(folder), PLAIN)
  bad[1].symlink_to("nowhere")
  bad[2].write_bytes(b"")
  bad[3].write_bytes(b"")
  with pytest.raises(DataError) as error:
    open_path(str(folder), PLAIN)
  missing = f"{bad[1]} is a link whose target {folder}/nowhere is missing"
  told = f"4 files are empty or unreadable: {bad[0]} is empty, {missing}, {bad[2]} is empty and 1 more; remove them, or"
  assert str(error.value).startswith(told)
  # Empty files cost an evaluation nothing; the link does.
  with pytest.raises(DataError, match=rf"^{bad[1]} is a link whose [^,]* missing; remove it"):
    open_path(str(folder), PLAIN, skip_empty=True)
  assert open_path(str(folder), SKIPPING).skipped == 4


def test_empty_files_of_a_folder_cost_an_evaluation_nothing(folder):
  (folder / "__init__.py").write_bytes(b"")
  with pytest.raises(DataError, match=r"__init__\.py is empty.*eval\.py and prepare: --skip-bad"):
    open_path(str(folder), PLAIN)
  source = open_path(str(folder), PLAIN, skip_empty=True)
  assert source.names == ["a.txt", "b/c.txt"] and source.skipped == 1
  both = open_path(f"{folder},{folder}/*", PLAIN, skip_empty=True)
  assert both.skipped == 2
  with pytest.raises(DataError, match=r"__init__\.py is empty"):  # it was named itself
    open_path(str(folder / "__init__.py"), PLAIN, skip_empty=True)
  (folder / "gone").symlink_to("nowhere")
  with pytest.raises(DataError, match="gone is a link whose target"):
    open_path(str(folder), PLAIN, skip_empty=True)


def test_any_changed_byte_of_a_small_file_changes_the_fingerprint(tmp_path):
  path = pathlib.Path(tmp_path / "x")
  data = bytearray(100_000)
  path.write_bytes(data)
  before = open_path(str(path), PLAIN).fingerprint
  data[20_000] = 1  # in none of the three blocks that are looked at in large files
  path.write_bytes(data)
  after = open_path(str(path), PLAIN).fingerprint
  assert before != after
