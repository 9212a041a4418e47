"""Links between the documents lead somewhere, and files that the documents name exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [
  *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "benchmarks/README", "launch/README")),
  *sorted((ROOT / "docs").glob("*.md")),
]
# Where the documents' short names of files begin.
PLACES = [ROOT, *(ROOT / folder for folder in ("megabyte_jax", "megabyte_jax/models", "tests", "docs"))]
FILE = re.compile(r"`((?:[\w.]+/)*[\w.]+/[\w.]+\.(?:py|md|sh|toml|ipynb|yaml|sbatch))`")


def anchors(text):
  """The names by which a document's headings are linked to, as GitHub makes them."""
  headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document, text):
  """The links of a document to a file or a heading that does not exist."""
  found = []
  for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", text):
    if re.match(r"\w+:", target):
      continue
    name, _, anchor = target.partition("#")
    path = document.parent / name if name else document
    if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
      found.append(target)
  return found


def unknown_files(text):
  return [
    name for name in FILE.findall(text) if "NAME" not in name and not any((place / name).exists() for place in PLACES)
  ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_files_of_a_document(document):
  text = document.read_text()
  assert not broken_links(document, text)
  assert not unknown_files(text)


def test_the_design_names_every_module():
  named = set(re.findall(r"`(\w+)`", (ROOT / "docs/design.md").read_text()))
  modules = [path for path in (ROOT / "megabyte_jax").rglob("*.py") if not path.stem.startswith("__")]
  missing = [path.relative_to(ROOT) for path in modules if path.stem not in named and "commands" not in path.parts]
  assert not [path for path in missing if path.name != "errors.py" and "scripts" not in path.parts], missing


def test_broken_ones_are_found():
  links = "[a](README.md) [b](gone.md) [c](README.md#nowhere) [d](CONTRIBUTING.md#contributing)"
  text = f"{links} `data/gone.py` `data/batches.py` `config/NAME.py`"
  assert broken_links(ROOT / "x.md", text) == ["gone.md", "README.md#nowhere"]
  assert anchors("# Why the orders are not the paper's\n") == {"why-the-orders-are-not-the-papers"}
  assert unknown_files(text) == ["data/gone.py"]
