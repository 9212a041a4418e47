"""Lists what is compared: rows of the paper's tables on real corpora, and recipes (see comparisons.py)."""

from __future__ import annotations

import dataclasses
from typing import Literal

from megabyte_jax.paper import recipe


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Rows that are compared.

  Attributes:
    data: the folder of the corpus, with train, validation and test.
    rows: TABLE:ROW, perhaps with changes of its recipe; the first is the reference, whose cost the others are given.
    vary: what gives the other rows its cost, their layers or the bytes that they are trained on.
    methods: by which each row is evaluated besides its own, if they fit its model.
    flags: of train.py, for all rows.
    words: whether word-level perplexity is wanted.
  """

  data: str
  rows: tuple[str, ...]
  vary: Literal["layers", "bytes"] = "layers"
  methods: tuple[str, ...] = ()
  flags: tuple[str, ...] = ()
  words: bool = False


def text_rows(name: str) -> tuple[str, ...]:
  return tuple(
    f"table2:{name}_{model}" for model in ("megabyte", "transformer", "windowed_transformer", "perceiver_ar")
  )


def image_rows(name: str) -> tuple[str, ...]:
  return tuple(f"table5:{name}_{model}" for model in ("megabyte", "transformer", "perceiver_ar"))


def recipe_rows(row: str) -> tuple[str, ...]:
  """Names a row with the paper's recipe, the modern one, that without each of its changes, and that without dropout.

  Not without the wider initial values and rotary positions: all rows of configs/small.py have these.
  """
  without = (f"{row}+modern-{change}" for change in recipe.MODERN if change not in ("init", "rotary"))
  return (row, f"{row}+modern", *without, f"{row}+modern+no_dropout")


TILES = ("--config.data.image_tiles=512",)  # four times as many images of 256 pixels as centred squares would give
RGB_TILES = (*TILES, "--config.data.convert_images=True")  # a photograph of those is grey

COMPARISONS = {
  "books": Comparison("books", text_rows("books"), methods=("basic", "sliding", "strided", "both"), words=True),
  "code": Comparison("code", text_rows("code")),
  "latex": Comparison("latex", text_rows("arxiv")),
  "image64": Comparison("photos", image_rows("image64"), flags=RGB_TILES),
  "image64_quarter": Comparison("photos", tuple(f"{row}@4" for row in image_rows("image64")), flags=RGB_TILES),
  "image256": Comparison("photos", image_rows("image256"), flags=TILES),
  "image640": Comparison("photos", image_rows("image640"), flags=("--config.data.image_tiles=960",)),  # twice as many
  "scans": Comparison(  # image256 has the patch scans already; --rows=raster trains the others alone
    "photos",
    tuple(f"table16:{m}_{s}_scan" for m in ("megabyte", "perceiver_ar") for s in ("patch", "raster")),
    flags=TILES,
  ),
  "audio": Comparison(
    "audio",
    tuple(f"audio:{model}" for model in ("megabyte", "transformer", "perceiver_ar")),
    flags=("--config.data.skip_bad=True",),  # one is empty
  ),
  "ablations": Comparison(
    "latex",
    tuple(
      f"table10:arxiv_{m}" for m in ("megabyte", "without_local", "without_global", "without_cross_patch", "with_cnn")
    ),
  ),
  "patch_sizes": Comparison("photos", tuple(f"table12:patch{size}" for size in (192, 48, 768)), flags=TILES),
  "shares": Comparison(
    "books",
    tuple(f"table13:{row}" for row in ("global760m_local262m", "global350m_local290m", "global1300m_local218m")),
  ),
  "scales": Comparison(
    "books", tuple(f"table2:books_{m}@4" for m in ("megabyte", "transformer", "windowed_transformer"))
  ),
  "modern_books": Comparison("books", recipe_rows("table2:books_megabyte"), vary="bytes"),
  "modern_models": Comparison("books", tuple(f"{row}+modern" for row in text_rows("books"))),
  "modern_images": Comparison("photos", recipe_rows("table5:image256_megabyte"), vary="bytes", flags=TILES),
}
