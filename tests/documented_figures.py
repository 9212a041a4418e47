"""Looks up figures in README.md and the documents, and the files in docs/results that they come from.

They are found by a link in their passage, the label of a row or the heading of an item, never by a sentence's words.
"""

import json
import re

from megabyte_jax.paper.rows_by_name import ROOT

README, RESULTS, COMPARED = (
  (ROOT / name).read_text() for name in ("README.md", "docs/results.md", "docs/comparisons.md")
)


def result(name):
  return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def numbers(text):
  """The numbers in a text as they are written, without the commas that divide thousands."""
  found = re.findall(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)
  return [number.replace(",", "") for number in found]


def passages(text):
  """Paragraphs and items of lists, each on one line; tables are left out."""
  parts = re.split(r"\n\s*\n|\n(?=\s*- )", text)
  return [" ".join(part.split()) for part in parts if not part.lstrip().startswith("|")]


def passage(text, mark):
  """The one paragraph or item that has `mark`, a link or a piece of code, and figures."""
  found = [part for part in passages(text) if mark in part and numbers(part.replace(mark, ""))]
  assert len(found) == 1, f"{mark} stands in {len(found)} passages with figures, not in one"
  return found[0]


def assert_shows(text, mark, *figures):
  """The passage with `mark` has these numbers in this order, others and any words between them."""
  shown = numbers(passage(text, mark))
  rest = iter(shown)
  missing = [figure for figure in figures if figure.replace(",", "") not in rest]  # `in` reads on from the last one
  assert not missing, f"{missing} are not there, in this order, in the passage with {mark}, which has {shown}"


def row(text, label):
  """The cells, after the first, of the one table row whose first cell is `label`."""
  lines = [line.strip().strip("|").split("|") for line in text.splitlines() if line.lstrip().startswith("|")]
  found = [[cell.strip() for cell in cells[1:]] for cells in lines if cells[0].strip() == label]
  assert len(found) == 1, f"{len(found)} rows are called {label!r}"
  return found[0]
