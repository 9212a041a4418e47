"""Compiled programs in the user's cache folder: when, where, how many, and that nothing about it ends a run."""

import os
import shutil
import stat

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from megabyte_jax.commands import compress, generate, scripts
from megabyte_jax.parallel import compilation_cache
from megabyte_jax.parallel.compilation_cache import delete_oldest, keep_compiled_programs, machine

NAMES = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
  "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture
def no_folder(tmp_path, monkeypatch):
  """As for a user who has set nothing, with an empty folder for caches."""
  before = {name: jax.config.values[name] for name in NAMES}
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  jax.config.update("jax_compilation_cache_dir", None)
  jax_cache.reset_cache()
  yield tmp_path / "megabyte_jax" / "compiled" / machine()
  for name, value in before.items():
    jax.config.update(name, value)
  jax_cache.reset_cache()


def test_a_second_start_finds_the_programs_of_the_first(no_folder, capsys):
  hits = []
  assert keep_compiled_programs() == str(no_folder)
  assert capsys.readouterr().err == (
    f"compiled programs are kept in {no_folder} (JAX_ENABLE_COMPILATION_CACHE=false switches this off)\n"
  )
  assert stat.S_IMODE(no_folder.stat().st_mode) == 0o700
  jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("/cache_hits") else None)
  x = jnp.arange(7.0)
  jax.jit(lambda x: x * 3 + 1)(x)
  assert list(no_folder.iterdir()) and not hits
  jax.jit(lambda x: x * 3 + 1)(x)  # another function to JAX, the same program
  assert len(hits) == 1


def test_a_folder_that_is_lost_or_damaged_during_a_run_is_no_matter(no_folder, recwarn):
  keep_compiled_programs()
  x = jnp.arange(7.0)
  jax.jit(lambda x: x * 5 + 1)(x)
  for path in no_folder.iterdir():
    path.write_bytes(path.read_bytes()[:40])
  assert jax.jit(lambda x: x * 5 + 1)(x)[1] == 6
  shutil.rmtree(no_folder)
  no_folder.write_text("")
  assert jax.jit(lambda x: x * 7 + 1)(x)[1] == 8
  assert not [str(w.message) for w in recwarn if "cache" in str(w.message)]


@pytest.mark.parametrize("reason", ["a folder is set", "switched off", "several processes"])
def test_nothing_changes(reason, no_folder, monkeypatch, capsys, tmp_path):
  if reason == "a folder is set":
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  elif reason == "switched off":
    jax.config.update("jax_enable_compilation_cache", False)
  else:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
  before = jax.config.jax_compilation_cache_dir
  try:
    assert keep_compiled_programs() == "" and jax.config.jax_compilation_cache_dir == before
  finally:
    jax.config.update("jax_enable_compilation_cache", True)
  assert not any(capsys.readouterr()) and not no_folder.exists()


@pytest.mark.parametrize(
  "reason,said",
  [
    ("a file in its place", "Not a directory"),
    ("no home", "there is no home folder"),
    ("a full disk", "its disk is almost full"),
    ("others may write", "others own it or may write to it"),
  ],
)
def test_a_folder_that_cannot_be_used_is_one_line(reason, said, no_folder, monkeypatch, capsys):
  if reason == "a file in its place":
    no_folder.parents[1].write_text("")
  elif reason == "no home":
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user whom the system does not know
  elif reason == "a full disk":
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
  else:
    no_folder.mkdir(parents=True)
    no_folder.chmod(0o777)
  assert keep_compiled_programs() == "" and not jax.config.jax_compilation_cache_dir
  [line] = capsys.readouterr().err.splitlines()
  assert line.startswith("compiled programs are not kept: ") and line.endswith(said)


def test_the_programs_longest_not_used_are_deleted(tmp_path):
  for age, name in enumerate("dcba"):
    (tmp_path / name).write_bytes(bytes(100))
    os.utime(tmp_path / name, (10_000 - age, 5_000))
  (tmp_path / "empty").touch()
  (tmp_path / "folder").mkdir()
  delete_oldest(tmp_path, 250 + (tmp_path / "folder").stat().st_size)
  assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"c", "d"}
  delete_oldest(tmp_path, 1 << 20)
  assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {"c", "d"}


def test_programs_belong_to_a_number_of_cores(monkeypatch):
  here = machine()
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(77), raising=False)
  assert machine() != here


@pytest.mark.parametrize("command", ["train", "eval", "generate", "compress"])
def test_the_commands_keep_their_programs(command, tmp_path, monkeypatch):
  class Called(Exception):
    pass

  def keep():
    raise Called

  (tmp_path / "a").write_text("text")
  monkeypatch.setattr(compilation_cache, "keep_compiled_programs", keep)
  with pytest.raises(Called):
    if command in ("train", "eval"):
      module = scripts.load(command)
      monkeypatch.setattr(module, "keep_compiled_programs", keep)
      others = [f"--workdir={tmp_path / 'run'}"], ["--workdir=pretrained:books", f"--data={tmp_path / 'a'}"]
      module.main(others[command == "eval"])
    elif command == "generate":
      generate.main(["--workdir=pretrained:books"])
    else:
      compress.main([str(tmp_path / "a"), str(tmp_path / "b"), "--workdir=pretrained:books"])
