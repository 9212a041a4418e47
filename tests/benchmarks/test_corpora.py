"""The corpus recipe: what it says and how it ends when results are, or are not, the recorded ones."""

import hashlib
import importlib
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
  """Runs the recipe for one corpus of one file from one package; `recorded` are the checksums to compare with."""
  monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "corpora"))
  for name in ("build", "packages", "pictures", "texts"):
    monkeypatch.delitem(sys.modules, name, raising=False)
  build = importlib.import_module("build")
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

  yield run
  for name in ("build", "packages", "pictures", "texts"):
    sys.modules.pop(name, None)


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
