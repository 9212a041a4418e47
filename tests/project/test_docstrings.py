"""Docstrings say what a thing does, beginning with a verb in the third person, and not what it is about."""

import ast
import pathlib
import re

import megabyte_jax

PACKAGE = pathlib.Path(megabyte_jax.__file__).parent
ROOT = PACKAGE.parent
OPENERS = {"How", "Of", "That", "What", "Where", "Whether", "Which"}  # no docstring begins with these
NOUNS = {  # words in s that are no verbs, or verbs only elsewhere
  *("Always", "Archives", "Args", "As", "Batches", "Bits", "Bytes", "Commands", "Configs", "Dataclasses", "Days"),
  *("Devices", "Documents", "Eqs", "Errors", "Flags", "Forwards", "Images", "Inputs", "Keys", "Latents", "Layers"),
  *("Lines", "Logits", "Models", "Parameters", "Paths", "Photographs", "Positions", "Recordings", "Rows", "Seconds"),
  *("Steps", "This", "Tokens", "Units", "Windows", "Words"),
}


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


def complaints(source, module_too=False):
  """Docstrings that do not begin with a verb: of functions and, if `module_too`, of the module itself.

  Classes, properties and configs may name a thing.
  """
  found = []
  for name, is_function, text in documented(ast.parse(source)):
    first = text.split()[0].strip('",.:;') if text else ""
    if first in OPENERS:
      found.append(f"{name or 'the module'} begins with {first}")
    elif (is_function or (module_too and not name)) and first and (not first.endswith("s") or first in NOUNS):
      found.append(f"{name or 'the module'} begins with {first}, which is no verb in the third person")
  return found


def paths():
  folders = (ROOT / name for name in ("megabyte_jax", "configs", "benchmarks", "launch", "examples"))
  found = [*(ROOT / name for name in ("train.py", "eval.py")), *(p for folder in folders for p in folder.rglob("*.py"))]
  return {path: path.is_relative_to(PACKAGE) for path in sorted(found) if "scripts" not in path.parts}


def test_docstrings_begin_with_a_verb():
  found = [
    f"{path.relative_to(ROOT)}: {one}"
    for path, package in paths().items()
    for one in complaints(path.read_text(), module_too=package)
  ]
  assert not found, "\n".join(found)


def test_the_check_sees_what_it_is_for():
  source = '"""What it is."""\ndef f():\n  """The sum."""\ndef g():\n  """Returns it."""\nclass C:\n  """A thing."""\n'
  assert complaints(source) == [
    "the module begins with What",
    "f begins with The, which is no verb in the third person",
  ]
  method = 'class C:\n  def f(self):\n    """Bytes of it."""\n  @property\n  def g(self):\n    """Bytes of it."""\n'
  assert complaints(method) == ["C.f begins with Bytes, which is no verb in the third person"]
  assert complaints('"""A module."""', module_too=True) and not complaints('"""A module."""')
