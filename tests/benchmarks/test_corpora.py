"""The corpus recipe: what it says and how it ends when results are, or are not, the recorded ones; what it takes."""

import hashlib
import importlib
import io
import json
import os
import pathlib
import sys
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
MODULES = ("build", "novels", "packages", "pictures", "texts", "trees")

# Has one package, `tool`, in the versions that $VERSIONS names, the newest last.
APT_GET = """#!/bin/sh
version=${3#tool=}
[ "$version" = tool ] && version=${VERSIONS##* }
case " $VERSIONS " in
  *" broken "*) echo "E: Failed to fetch tool" >&2; exit 100 ;;
  *" $version "*) printf text > "tool_$(echo $version | sed s/:/%3a/)_all.deb" ;;
  *) echo "E: Version '$version' for 'tool' was not found" >&2; exit 100 ;;
esac
"""


@pytest.fixture
def build(monkeypatch):
  """The module build.py; it and those beside it are imported anew."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "corpora"))
  for name in MODULES:
    monkeypatch.delitem(sys.modules, name, raising=False)
  yield importlib.import_module("build")
  for name in MODULES:
    sys.modules.pop(name, None)


@pytest.fixture
def recipe(build, tmp_path, monkeypatch):
  """Runs the recipe for one corpus of one file from one package; `recorded` are the checksums to compare with."""
  package = tmp_path / "package.tgz"
  package.write_bytes(b"text")
  monkeypatch.setattr(build.packages, "fetch", lambda *_: package)
  monkeypatch.setattr(build, "CORPORA", {"code": lambda get, _: iter([("a.c", get("npm", "package").read_bytes())])})

  def run(folder, *, package_sum=None, result_sum="0"):
    record = tmp_path / "checksums.json"
    recorded = {package.name: package_sum} if package_sum else {}
    record.write_text(json.dumps({"packages": recorded, "corpora": {"code": {"sha256": result_sum}}}))
    monkeypatch.setattr(build, "_RECORD", record)
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path / folder)])
    build.main()

  return run


def test_another_result_of_the_recorded_packages_is_an_error(recipe, capsys):
  package_sum = hashlib.sha256(b"text").hexdigest()
  recipe("a")  # a newer package may give another result
  assert "not as recorded: built from package.tgz" in capsys.readouterr().out
  with pytest.raises(SystemExit, match="code: the recorded packages gave another result"):
    recipe("b", package_sum=package_sum)
  recipe("b", package_sum=package_sum)
  assert "not as recorded: built before" in capsys.readouterr().out
  with pytest.raises(SystemExit, match="does not have the checksum recorded"):
    recipe("c", package_sum="1" * 64)
  result_sum = hashlib.sha256(b"train/a.c\x004\x00text").hexdigest()
  recipe("d", package_sum=package_sum, result_sum=result_sum)
  assert "code: 1 files, 4 bytes, as recorded" in capsys.readouterr().out


def test_the_recorded_version_is_asked_for_first(build, tmp_path, monkeypatch, capsys):
  program = tmp_path / "bin" / "apt-get"
  program.parent.mkdir()
  program.write_text(APT_GET)
  program.chmod(0o755)
  monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
  record = tmp_path / "checksums.json"
  packages = {"tool_1%3a2-3_all.deb": hashlib.sha256(b"text").hexdigest(), "tool-more_1%3a2-2_all.deb": "0"}
  record.write_text(json.dumps({"packages": packages, "corpora": {}}))
  monkeypatch.setattr(build, "_RECORD", record)
  monkeypatch.setattr(build, "CORPORA", {"code": lambda get, _: iter([("a.c", get("debian", "tool").read_bytes())])})

  def said(versions):
    monkeypatch.setenv("VERSIONS", versions)
    monkeypatch.setattr(sys, "argv", ["build.py", str(tmp_path / versions)])
    build.main()
    return capsys.readouterr().out.splitlines()

  assert "  tool_1%3a2-3_all.deb" in said("1:2-3 1:2-4")
  assert "  tool_1%3a2-4_all.deb  (no checksum is recorded for this version)" in said("1:2-2 1:2-4")
  with pytest.raises(SystemExit, match="tool=1:2-3 failed: E: Failed to fetch"):
    said("1:2-3 broken")


def write_tree(path, files):
  """Writes a package that holds an archive, in which `files` are in a folder of their own."""
  tree = io.BytesIO()
  with tarfile.open(fileobj=tree, mode="w:xz") as archive:
    for name, contents in files.items():
      add(archive, f"tree-1.0/{name}", contents)
  with tarfile.open(path, "w:gz") as package:
    add(package, "./usr/src/changes", b"nothing")
    add(package, "./usr/src/tree-1.0.tar.xz", tree.getvalue())


def add(archive, name, contents):
  member = tarfile.TarInfo(name)
  member.size = len(contents)
  archive.addfile(member, io.BytesIO(contents))


def test_sources_have_no_file_twice_and_none_that_a_program_wrote(build, tmp_path, monkeypatch):
  licence = b"/* A licence. */\n" * 20
  first = {
    "bfd/elf.c": b"int elf;",
    "bfd/empty.h": b"",
    "bfd/read me.txt": b"text",
    "bfd/table.c": b"{0x12, 0x34, 0x56}",
    "bfd/same.hpp": b"int elf;",
    "drivers/asic_reg/a.h": b"int a;",
    "opcodes/made.c": licence + b"/* THIS FILE IS MACHINE GENERATED WITH CGEN. */",
  }
  second = {"bfd/elf.c": b"int elf, newer;", "opcodes/made.c": b"int made;", "gdb/main.cc": b"int main() {}"}
  write_tree(tmp_path / "linux.tgz", first)
  write_tree(tmp_path / "gdb.tgz", second)
  monkeypatch.setattr(build.trees, "PACKAGES", dict.fromkeys(["linux-source", "gdb-source"], "usr/src/tree-*.tar.xz"))
  result = build.build("sources", tmp_path, lambda _, name: tmp_path / f"{name.removesuffix('-source')}.tgz")
  folder = tmp_path / "sources"
  found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
  assert found == {"train/linux/bfd/elf.c": b"int elf;", "train/gdb/gdb/main.cc": b"int main() {}"}
  assert (result["files"], result["bytes"]) == (2, 21)


def test_a_file_of_linux_is_in_one_split_of_kernel_and_sources(build):
  names = [f"drivers/net/{number}.c" for number in range(2000)]
  splits = [build.split_of("kernel", name) for name in names]
  assert set(splits) == {"train", "validation", "test"}
  assert splits == [build.split_of("sources", f"linux/{name}") for name in names]
