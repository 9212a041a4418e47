"""Docstrings of the package say what a thing does, beginning with a verb, and not what it is about."""

import ast
import pathlib
import re

import pytest

import megabyte_jax

ROOT = pathlib.Path(megabyte_jax.__file__).parent
OPENERS = {"How", "Of", "That", "What", "Where", "Whether", "Which"}
NOUNS = {"Bits", "Bytes", "Days", "Devices", "Forwards", "Layers", "Rows", "Seconds", "Steps", "Windows", "Words"}
DONE = (  # rooms and modules whose functions are held to a verb; openers are banned everywhere
  "data/files.py",
  "data/folders.py",
  "data/media",
  "data/file_handles.py",
  "data/read_ahead.py",
  "data/records",
  "data/shared_cache.py",
  "data/tfds_source.py",
  "data/fingerprints.py",
  "data/open_data.py",
  "data/packing/zstd.py",
  "data/pipes.py",
  "evaluation/by_source.py",
  "data/source_names.py",
  "data/sources.py",
  "display",
  "paper",
  "planning",
  "parallel/backend.py",
  "parallel/hardware.py",
  "parallel/rendezvous.py",
  "evaluation/compressors.py",
  "evaluation/image_report.py",
  "evaluation/perplexity.py",
  "evaluation/windows.py",
)


def is_property(node):
  names = {getattr(decorator, "id", getattr(decorator, "attr", "")) for decorator in node.decorator_list}
  return bool(names & {"property", "cached_property"})


def documented(tree):
  """(name, whether it is a function, docstring) of the module and of its public classes, functions and methods."""
  yield "", False, ast.get_docstring(tree)
  todo = [("", node) for node in tree.body]
  while todo:
    prefix, node = todo.pop()
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not re.match(r"_(?!_)", node.name):
      is_function = isinstance(node, ast.FunctionDef) and not is_property(node)
      yield prefix + node.name, is_function, ast.get_docstring(node)
      todo += [(f"{prefix}{node.name}.", inner) for inner in node.body if isinstance(node, ast.ClassDef)]


def complaints(source):
  found = []
  for name, is_function, text in documented(ast.parse(source)):
    first = text.split()[0].strip('",.:;') if text else ""
    if first in OPENERS:
      found.append(f"{name or 'the module'} begins with {first}")
    elif is_function and first and (not first.endswith("s") or first in NOUNS):
      found.append(f"{name} begins with {first}, which is no verb in the third person")
  return found


def paths():
  found = (path for place in DONE for path in [ROOT / place, *(ROOT / place).rglob("*.py")])
  return sorted(path for path in found if path.is_file())


@pytest.mark.parametrize("path", paths(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_verb(path):
  assert not complaints(path.read_text())


def test_no_docstring_of_the_package_begins_with_a_question():
  found = [
    f"{path.relative_to(ROOT)}: {one}" for path in sorted(ROOT.rglob("*.py")) for one in complaints(path.read_text())
  ]
  found = [one for one in found if one.split(" begins with ")[1] in OPENERS]
  assert not found, found


def test_the_check_sees_what_it_is_for():
  source = '"""What it is."""\ndef f():\n  """The sum."""\ndef g():\n  """Returns it."""\nclass C:\n  """A thing."""\n'
  assert complaints(source) == [
    "the module begins with What",
    "f begins with The, which is no verb in the third person",
  ]
