"""Holds the numbers printed in the paper's tables (arXiv 2305.07185) as data.

Tables 6, 7 and 8 repeat 1, 2 and 3. A row with a `config` can be run: `table5:image640_megabyte` is
configs/paper/table5.py:image640_megabyte. Rows without one are quoted by the paper from other work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from megabyte_jax.models.flops import STANDARD_SIZES

Number = float | str | None


@dataclasses.dataclass(frozen=True)
class Row:
  """One row of a table.

  Attributes:
    label: its name in the table.
    config: reference of the config that runs it; '' where the paper quotes the row from other work.
    paper: the paper's numbers, by metric.
    printed: the size or setting that the paper prints beside the row.
  """

  label: str
  config: str = ""
  paper: Mapping[str, Number] = dataclasses.field(default_factory=dict)
  printed: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
  """One table of the paper.

  Attributes:
    title: what the table compares.
    metrics: the columns that hold results; `bpb` is bits per byte.
    rows: in the paper's order.
    note: remarks of this project.
    split: the split that was scored, if the paper names it.
  """

  title: str
  metrics: tuple[str, ...]
  rows: tuple[Row, ...]
  note: str = ""
  split: str = ""


def _grid(table: str, columns: tuple[str, ...], rows: Mapping[str, tuple[float, ...]]) -> tuple[Row, ...]:
  """Returns the rows `COLUMN_ROW` of a table whose cells are bits per byte."""
  return tuple(
    Row(f"{column} {name}", f"{table}:{column}_{name}", {"bpb": values[i]})
    for i, column in enumerate(columns)
    for name, values in rows.items()
  )


def _bpb(table: str, values: Mapping[str, float]) -> tuple[Row, ...]:
  return tuple(Row(name, f"{table}:{name}", {"bpb": value}) for name, value in values.items())


def _perplexity(label: str, config: str, validation: Number, test: Number, printed: str) -> Row:
  return Row(label, config, {"perplexity_validation": validation, "perplexity_test": test}, printed)


def _setting(label: str, config: str, printed: str, batch_size: int, learning_rate: float, context: str) -> Row:
  return Row(
    label, config, {"batch size": batch_size, "learning rate": learning_rate, "context, as printed": context}, printed
  )


TABLES = {
  "1": Table(
    "Text data sets",
    ("total bytes", "mean document bytes"),
    (
      Row("PG-19", "", {"total bytes": 10.1e9, "mean document bytes": 411_404}),
      Row("Stories", "", {"total bytes": 21.3e9, "mean document bytes": 35_265}),
      Row("Books", "", {"total bytes": 79.7e9, "mean document bytes": 509_526}),
      Row("arXiv", "", {"total bytes": 91.5e9, "mean document bytes": 58_518}),
      Row("Code", "", {"total bytes": 353.7e9, "mean document bytes": 7_461}),
    ),
    "arXiv and Code were never published; Books was withdrawn.",
  ),
  "2": Table(
    "Language modelling on 80 billion bytes, equal compute",
    ("bpb",),
    _grid(
      "table2",
      ("pg19", "stories", "books", "arxiv", "code"),
      {
        "transformer": (1.057, 1.064, 1.097, 0.816, 0.575),
        "perceiver_ar": (1.104, 1.070, 1.104, 0.791, 0.546),
        "megabyte": (1.000, 0.978, 1.007, 0.678, 0.411),
      },
    ),
  ),
  "3": Table(
    "Word-level perplexity on PG-19 after 400 billion bytes",
    ("perplexity_validation", "perplexity_test"),
    (
      _perplexity(
        "Transformer-XL (Rae et al., 2019)",
        "table3:transformer_xl",
        45.5,
        36.3,
        "parameters unknown; SentencePiece 32k; 512+1024 subwords",
      ),
      _perplexity(
        "Compressive Transformer",
        "table3:compressive_transformer",
        43.4,
        33.6,
        "parameters unknown; SentencePiece 32k; 512+512+2x512 subwords",
      ),
      _perplexity(
        "PerceiverAR (Hawthorne et al., 2022)",
        "table3:subword_perceiver_ar",
        45.9,
        28.9,
        "975M, layers and latents unknown; SentencePiece 32k; 2048 subwords",
      ),
      _perplexity(
        "Block-Recurrent Transformer",
        "table3:block_recurrent",
        None,
        26.5,
        "1.3B; SentencePiece 32k; 1024+recurrence subwords",
      ),
      _perplexity("transformer", "table3:transformer", 81.6, 69.4, "bytes; 2048"),
      _perplexity("perceiver_ar", "table3:perceiver_ar", 119.1, 88.8, "bytes; 8192"),
      _perplexity("megabyte", "table3:megabyte", 42.8, 36.4, "bytes; 8192"),
      Row("subword transformer (not in the paper)", "table3:subword_transformer", {}, "subwords; 2048"),
    ),
    "The subword models are quoted by the paper; configs/paper/table3.py has what their papers leave open. FLOPs per "
    "byte of their rows are those per token over 4 bytes, an assumption. Byte-level equivalents quoted in its footnote "
    "(Hutchins et al., 2022), test: Block-Recurrent 46.5, Memorizing Transformer 49.5.",
  ),
  "4": Table(
    "ImageNet 64x64",
    ("bpb",),
    (
      Row("Routing Transformer", "", {"bpb": 3.43}),
      Row("Combiner", "", {"bpb": 3.42}),
      Row("Perceiver AR", "", {"bpb": 3.40}),
      Row("megabyte", "table4:megabyte", {"bpb": 3.40}, "2.7B + 350M"),
    ),
    "Sliding windows and strided inference; the first three are quoted by the paper.",
  ),
  "5": Table(
    "ImageNet at three resolutions, equal compute and data, no sliding windows",
    ("bpb",),
    _grid(
      "table5",
      ("image64", "image256", "image640"),
      {
        "transformer": (3.62, 3.801, 2.847),
        "perceiver_ar": (3.55, 3.373, 2.345),
        "megabyte": (3.52, 3.158, 2.282),
      },
    ),
    "For the baselines the paper's Table 5 prints contexts of 1,024 and 12,000; Table 15 has those used here.",
  ),
  "9": Table(
    "Generating 8,192 bytes; trained on PG-19 with equal compute",
    ("bpb", "seconds_to_generate"),
    (
      Row("transformer", "table9:transformer", {"bpb": 1.064, "seconds_to_generate": 132}, "350M"),
      Row("megabyte", "table9:megabyte", {"bpb": 0.991, "seconds_to_generate": 93}, "1.3B + 218M"),
    ),
    "The paper names neither device nor batch.",
  ),
  "10": Table(
    "What each component is worth; equal compute and data within a data set",
    ("bpb",),
    _grid(
      "table10",
      ("arxiv", "audio", "image256"),
      {
        "megabyte": (0.6871, 3.477, 3.158),
        "without_local": (1.263, 5.955, 4.768),
        "without_global": (1.373, 3.659, 3.181),
        "without_cross_patch": (0.6781, 3.481, 3.259),
        "with_cnn": (0.6871, 3.475, 3.155),
      },
    ),
  ),
  "11": Table(
    "Inference methods on PG-19 (test), best model",
    ("bpb", "cost"),
    tuple(
      Row(name, f"table11:{name}", {"bpb": bpb, "cost": cost})
      for name, bpb, cost in (
        ("basic", 0.9079, "1x"),
        ("sliding", 0.8918, "2x"),
        ("strided", 0.8926, "2x"),
        ("both", 0.8751, "4x"),
      )
    ),
    split="test",
  ),
  "12": Table(
    "Patch size on Image256", ("bpb",), _bpb("table12", {"patch48": 3.178, "patch192": 3.158, "patch768": 3.186})
  ),
  "13": Table(
    "Global against local size on PG-19, equal compute and data",
    ("bpb",),
    _bpb("table13", {"global350m_local290m": 1.014, "global760m_local262m": 1.002, "global1300m_local218m": 0.991}),
  ),
  "14": Table(
    "Standard sizes (those of GPT-3)",
    ("layers", "width", "heads", "head width", "true size (12 L D^2)"),
    tuple(
      Row(
        f"S{i}",
        "",
        {
          "layers": size.layers,
          "width": width,
          "heads": size.heads,
          "head width": width // size.heads,
          "true size (12 L D^2)": 12 * size.layers * width**2,
        },
        f"{size.nominal / 1e9:.1f}B" if size.nominal >= 1e9 else f"{size.nominal / 1e6:.0f}M",
      )
      for i, (width, size) in enumerate(STANDARD_SIZES.items(), 1)
    ),
  ),
  "15": Table(
    "Settings of all models",
    ("batch size", "learning rate", "context, as printed"),
    (
      _setting("text transformer", "table2:arxiv_transformer", "320M (1024, 22)", 72, 2e-4, "1,024"),
      _setting("text perceiver_ar", "table2:arxiv_perceiver_ar", "248M (1024, 17)", 72, 2e-4, "8,192 (1024 latents)"),
      _setting("text megabyte", "table2:arxiv_megabyte", "758M (2048, 14) + 262M (1024, 18)", 48, 2e-4, "8,192 (P 8)"),
      _setting("text without_local", "table10:arxiv_without_local", "2.3B (2560, 20)", 48, 1.5e-4, "8,192 (P 4)"),
      _setting("text without_global", "table10:arxiv_without_global", "350M (1024, 24)", 192, 2e-4, "8,192 (P 8)"),
      _setting(
        "text without_cross_patch",
        "table10:arxiv_without_cross_patch",
        "921M (2048, 17) + 350M (1024, 24)",
        48,
        2e-4,
        "8,192 (P 8)",
      ),
      _setting("text with_cnn", "table10:arxiv_with_cnn", "704M (2048, 13) + 262M (1024, 18)", 48, 2e-4, "8,192 (P 8)"),
      _setting("image64, Table 4", "table4:megabyte", "2.7B (2560, 32) + 350M (1024, 24)", 2, 2e-4, "12,288 (P 12)"),
      _setting("image64 transformer", "table5:image64_transformer", "760M (1536, 24)", 512, 3e-4, "2,048"),
      _setting(
        "image64 perceiver_ar", "table5:image64_perceiver_ar", "227M (1024, 16)", 512, 3e-4, "12,288 (1024 latents)"
      ),
      _setting(
        "image64 megabyte",
        "table5:image64_megabyte",
        "1.3B (2048, 24) + 1.3B (2048, 24)",
        256,
        3e-4,
        "12,288 (P 12)",
      ),
      _setting("image256 transformer", "table5:image256_transformer", "62M (768, 6)", 1536, 2e-4, "1,024"),
      _setting(
        "image256 perceiver_ar", "table5:image256_perceiver_ar", "62M (768, 6)", 256, 2e-4, "8,192 (768 latents)"
      ),
      *(
        _setting(f"image256 {name}", f"table10:image256_{name}", printed, 16, 2e-4, f"196,608 (P {patch})")
        for name, printed, patch in (
          ("megabyte", "125M (768, 12) + 125M (768, 12)", 192),
          ("without_local", "2.7B (4096, 32)", 48),
          ("without_global", "125M (768, 12) + 125M (768, 12)", 192),
          ("without_cross_patch", "250M + 156M (768, 15)", 192),
          ("with_cnn", "125M (768, 12) + 125M (768, 12)", 192),
        )
      ),
      _setting("image640 transformer", "table5:image640_transformer", "83M (768, 8)", 4800, 3e-4, "1,024"),
      _setting(
        "image640 perceiver_ar", "table5:image640_perceiver_ar", "62M (768, 6)", 2048, 3e-4, "4,096 (1024 latents)"
      ),
      _setting(
        "image640 megabyte", "table5:image640_megabyte", "125M (768, 12) + 83M (768, 8)", 32, 3e-4, "1,228,800 (P 192)"
      ),
      _setting("audio transformer", "audio:transformer", "135M (768, 13)", 2048, 2e-4, "1,024"),
      _setting("audio perceiver_ar", "audio:perceiver_ar", "62M (768, 6)", 384, 2e-4, "8,192 (1024 latents)"),
      *(
        _setting(f"audio {name}", f"table10:audio_{name}", printed, 256, 2e-4, "524,288 (P 32)")
        for name, printed in (
          ("megabyte", "350M (1024, 24) + 125M (768, 12)"),
          ("without_local", "2.7B (4096, 32) + 125M (768, 12)"),
          ("without_global", "350M (1024, 24) + 125M (768, 12)"),
          ("without_cross_patch", "350M (1024, 24) + 146M (768, 14)"),
          ("with_cnn", "350M (1024, 24) + 125M (768, 12)"),
        )
      ),
    ),
    "Sizes as printed, in brackets (width, layers). The ones printed for rows without a local or a global model are "
    "partly slips of the paper's table; the configs leave that model out.",
  ),
  "16": Table(
    "Patch scan against raster scan on Image256",
    ("bpb",),
    _bpb(
      "table16",
      {
        "megabyte_patch_scan": 3.158,
        "megabyte_raster_scan": 3.428,
        "perceiver_ar_patch_scan": 3.373,
        "perceiver_ar_raster_scan": 3.552,
      },
    ),
    "The paper prints each model's sizes and context beside the other one's name.",
  ),
  "17": Table(
    "Longer context on PG-19 (test)",
    ("bpb",),
    _bpb("table17", {"context8192": 0.8751, "context16384": 0.8787}),
    split="test",
  ),
  "audio": Table(
    "Raw audio (section 8)", ("bpb",), _bpb("audio", {"transformer": 3.567, "perceiver_ar": 3.543, "megabyte": 3.477})
  ),
}

REPEATED = {"6": "1", "7": "2", "8": "3"}
FIGURE_3 = "figure3"  # rendered like a table, by a name of its own


def table_names() -> list[str]:
  """Returns the names of all tables in the paper's order, `audio` last."""
  return sorted((*TABLES, *REPEATED), key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0))
