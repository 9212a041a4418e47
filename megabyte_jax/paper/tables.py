"""Renders the paper's tables as text, Markdown or JSON: sizes, FLOPs, the paper's numbers and ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megabyte_jax.config import Config, ModelConfig
from megabyte_jax.errors import require
from megabyte_jax.models import flops
from megabyte_jax.paper import measured
from megabyte_jax.paper.printed_numbers import FIGURE_3, REPEATED, TABLES, Row, table_names
from megabyte_jax.paper.rows_by_name import CONFIGS, ROOT, config_of, rows_of_file
from megabyte_jax.paper.subword_rows import BYTES_PER_TOKEN

RESULTS = ROOT / "docs" / "results"
MODEL_COLUMNS = ["parameters, nominal", "true", "training MFLOPs/byte", "context"]


def describe(name: str, found: Sequence[measured.Measured] = ()) -> dict[str, Any]:
  """Returns a table as plain data, the form of --format=json.

  Args:
    name: 1 to 17 or audio.
    found: measurements; one counts for every table that has a row with the same settings.

  Raises:
    ConfigError: there is no such table.
  """
  known = table_names()
  require(name in known, f"there is no table {name!r}; choose one of {', '.join(known)}, {FIGURE_3}")
  table = TABLES[REPEATED.get(name, name)]
  note = f"Repeats Table {REPEATED[name]}. {table.note}".strip() if name in REPEATED else table.note
  found = [m for m in found if table.split in ("", m.split) or not m.split]
  rows = [_describe_row(row, table.metrics, found) for row in table.rows]
  file = "audio" if name == "audio" else f"table{REPEATED.get(name, name)}"
  for reference in sorted({m.row for m in found if m.row.startswith(f"{file}:")} - {row.config for row in table.rows}):
    rows.append(_describe_row(Row(f"{reference.split(':')[1]} (not in the paper)"), table.metrics, found, reference))
  return {"table": name, "title": table.title, "note": note, "metrics": list(table.metrics), "rows": rows}


def _describe_row(
  row: Row, metrics: Sequence[str], found: Sequence[measured.Measured], reference: str = ""
) -> dict[str, Any]:
  described: dict[str, Any] = {"row": row.label, "config": row.config, "printed": row.printed}
  same = [m for m in found if m.row == (row.config or reference)]
  if row.config:
    config = config_of(row.config)
    described |= {
      "nominal": nominal(config.model),
      "parameters": config.model.parameter_count(),
      "training_flops_per_byte": flops.flops_per_byte(config.model, training=True) / bytes_per_token(config),
      "context": config.model.context,
      "cut": cut(config.model),
    }
    same = [m for m in found if m.row == row.config or _same_settings(m.row, config)]
  of_test = [m for m in same if m.split in ("", "test")]  # splits are never averaged: test, where it was scored
  same = of_test or [m for m in same if m.split == "validation"]
  ours = [{"source": m.source, "note": m.note} | {k: m.numbers[k] for k in metrics if k in m.numbers} for m in same]
  described["ours"] = [entry for entry in ours if any(metric in entry for metric in metrics)]
  described["paper"] = dict(row.paper)
  return described


def bytes_per_token(config: Config) -> float:
  """Returns what a position stands for: one byte, or of subwords an assumed number of bytes."""
  return BYTES_PER_TOKEN if config.data.form == "subwords" else 1.0


def _same_settings(reference: str, config: Config) -> bool:
  """Returns True if the row of another table is the same run: Tables 3, 11 and 17 share one, for example."""
  table, _, name = reference.partition(":")
  return (CONFIGS / f"{table}.py").exists() and rows_of_file(table).get(name) == config


def cut(model: ModelConfig) -> str:
  """Returns the text for a model's division of its context: `P 8`, `1,024 latents`, or nothing."""
  if model.num_latents:
    return f"{model.num_latents:,} latents"
  span = model.spans[0] if model.spans[0] < model.context else 0
  patches = [size for size in (span, *(level.patch_size for level in model.levels)) if size > 1]
  return f"P {', '.join(map(str, patches))}" if patches else ""


def nominal(model: ModelConfig) -> str:
  """Returns the sizes as the paper names them, from the coarsest level to the finest: `758M + 262M`."""
  sizes = [flops.nominal_parameters(level) for level in model.levels]
  return " + ".join("?" if size is None else short(size) for size in sizes)


def short(number: float) -> str:
  """Formats a count in millions, or in billions with three digits."""
  return f"{number / 1e9:.3g}B" if round(number / 1e6) >= 1000 else f"{number / 1e6:.0f}M"


def figure3() -> dict[str, Any]:
  """Returns Fig. 3 as a table: forward FLOPs per token at some of its lengths."""
  curves = flops.figure3_curves()
  lengths = [256, 8192, 65_536, 1_048_576]
  rows = []
  for name, (all_lengths, values) in curves.items():
    at = dict(zip(all_lengths, values, strict=True))
    computed = {f"FLOPs, {length:,} bytes": at[length] for length in lengths}
    rows.append({"row": name, "config": "", "printed": "", "computed": computed})
  note = "Counted by flops.py with the paper's formulas, P = 8; --plot=FILE.png draws all lengths."
  title = "Forward FLOPs per token by sequence length"
  return {"table": FIGURE_3, "title": title, "note": note, "metrics": list(rows[0]["computed"]), "rows": rows}


def cells(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
  """Formats a table as (heading, rows) of text, without empty columns."""
  rows, metrics = table["rows"], table["metrics"]
  runnable = any(row["config"] for row in rows)
  heading = ["row", "printed"]
  if runnable:
    heading += MODEL_COLUMNS
  for metric in metrics:
    named = metric.replace("_", " ")
    heading += [f"{named}: paper", f"{named}: ours"] if runnable else [named]
  heading += ["source of ours"]
  lines = []
  for row in rows:
    line = [row["row"], row["printed"]]
    if runnable and row["config"]:
      line += [row["nominal"], short(row["parameters"])]
      context = f"{row['context']:,}" + (f" ({row['cut']})" if row["cut"] else "")
      line += [f"{row['training_flops_per_byte'] / 1e6:,.0f}", context]
    elif runnable:
      line += [""] * len(MODEL_COLUMNS)
    alike: dict[str, list[dict[str, Any]]] = {}  # runs that differ in their seeds at most, by note
    for entry in row.get("ours", []):
      alike.setdefault(entry["note"], []).append(entry)
    for metric in metrics:
      line.append(_number(row.get("paper", row.get("computed")).get(metric), metric))
      if runnable:
        line.append("; ".join(_spread([e[metric] for e in entries if metric in e]) for entries in alike.values()))
    sources = [", ".join(e["source"] for e in entries) + f" ({note})" * bool(note) for note, entries in alike.items()]
    lines.append([*line, "; ".join(sources)])
  used = [i for i in range(len(heading)) if any(line[i] for line in lines)]
  return [heading[i] for i in used], [[line[i] for i in used] for line in lines]


def _number(value: Any, metric: str) -> str:
  if value is None or isinstance(value, str):
    return value or "-"
  if metric.startswith("FLOPs"):
    return f"{value:.3g}"
  if abs(value) >= 1000:
    return f"{value:,.0f}"
  return max(f"{value:g}", f"{value:.2f}", key=len) if metric == "bpb" else f"{value:g}"


def _spread(values: Sequence[float]) -> str:
  """Formats one value, the mean of several with half their range, or `-` for none."""
  if len(values) < 2:
    return "".join(f"{value:.4g}" for value in values) or "-"
  return f"{sum(values) / len(values):.4g} ± {(max(values) - min(values)) / 2:.2g} ({len(values)} runs)"


def as_text(table: dict[str, Any]) -> str:
  """Renders a table for a terminal."""
  heading, lines = cells(table)
  widths = [max(len(line[i]) for line in [heading, *lines]) for i in range(len(heading))]
  padded = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in [heading, *lines]]
  return "\n".join([_title(table), *padded, *([table["note"]] if table["note"] else [])])


def as_markdown(table: dict[str, Any]) -> str:
  """Renders a table as Markdown."""
  heading, lines = cells(table)
  body = ["| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *lines]]
  return "\n".join([f"### {_title(table)}", "", *body, *(["", table["note"]] if table["note"] else [])])


def _title(table: dict[str, Any]) -> str:
  return f"{'Fig. 3' if table['table'] == FIGURE_3 else 'Table ' + table['table']}. {table['title']}"


def render(names: Sequence[str], form: str, found: Sequence[measured.Measured] = ()) -> str:
  """Renders tables as `form`: text, markdown or json (a list, or one object for a single table)."""
  tables = [figure3() if name == FIGURE_3 else describe(name, found) for name in names]
  if form == "json":
    return json.dumps(tables[0] if len(tables) == 1 else tables, indent=2)
  return "\n\n".join((as_text if form == "text" else as_markdown)(table) for table in tables)
