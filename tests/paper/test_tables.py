"""The printed tables: every row of the paper, its config, and where our numbers come from."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
from run_commands import ROOT, environment

from megabyte_jax.errors import ConfigError
from megabyte_jax.evaluation.windows import cost_factor
from megabyte_jax.paper import measured, rows_by_name, tables
from megabyte_jax.paper.measured import Measured
from megabyte_jax.paper.printed_numbers import REPEATED, TABLES


def row(name, label, found=()):
  (one,) = [r for r in tables.describe(name, found)["rows"] if r["row"] == label]
  return one


def test_all_tables_are_there():
  assert {*TABLES, *REPEATED} == {*map(str, range(1, 18)), "audio"}
  assert len(rows_by_name.all_rows()) > 50


@pytest.mark.parametrize("form", ["text", "markdown", "json"])
def test_everything_prints(form):
  shown = tables.render([*TABLES, *REPEATED, "figure3"], form)
  assert "Block-Recurrent" in shown and "image640 megabyte" in shown
  if form == "json":
    assert len(json.loads(shown)) == 19


def test_a_row_of_the_paper():
  text = row("5", "image640 megabyte")
  assert (text["nominal"], text["context"], text["cut"]) == ("125M + 83M", 1_228_800, "P 192")
  assert text["paper"] == {"bpb": 2.282} and text["ours"] == []
  line = next(x for x in tables.render(["5"], "text").splitlines() if x.startswith("image640 megabyte"))
  assert " ".join(line.split()) == "image640 megabyte 125M + 83M 147M 367 1,228,800 (P 192) 2.282"


def test_settings_printed_in_table_15_are_those_of_the_configs():
  exceptions = {"table4:megabyte": "2 would be 57 million updates", "table10:audio": "section 8 says 32"}
  for entry in TABLES["15"].rows:
    config = tables.config_of(entry.config)
    assert config.optimizer.learning_rate == entry.paper["learning rate"]
    assert entry.paper["context, as printed"].split()[0] == f"{config.model.context:,}"
    if not entry.config.startswith(tuple(exceptions)):
      assert config.batch_size == entry.paper["batch size"]


def test_costs_printed_in_table_11():
  model = tables.config_of("table3:megabyte").model
  for entry in TABLES["11"].rows:
    assert entry.paper["cost"] == f"{cost_factor(entry.label, model):.0f}x"


def test_our_numbers_stand_beside_the_papers():
  found = [
    Measured("table3:megabyte", {"bpb": 1.25, "perplexity_test": 90.0}, "a.json"),
    Measured("table11:both", {"bpb": 1.35}, "b.json"),
    Measured("table11:modern", {"bpb": 1.15}, "c.json"),
  ]
  both = row("11", "both", found)  # the same run as Table 3's
  assert [entry["bpb"] for entry in both["ours"]] == [1.25, 1.35]
  assert row("3", "megabyte", found)["ours"] == [{"source": "a.json", "note": "", "perplexity_test": 90.0}]
  text = tables.render(["11"], "text", found)
  assert "1.3 ± 0.05 (2 runs)" in text and "a.json, b.json" in text
  assert row("11", "modern (not in the paper)", found)["ours"][0]["bpb"] == 1.15


def test_only_runs_with_equal_notes_are_averaged():
  found = [
    Measured("table5:image256_megabyte", {"bpb": bpb}, source, note)
    for bpb, source, note in ((3.0, "a.json", "400 MB"), (3.5, "b.json", "200 MB"), (3.2, "c.json", "400 MB"))
  ]
  text = tables.render(["5"], "text", found)
  assert "3.1 ± 0.1 (2 runs); 3.5 " in text and "a.json, c.json (400 MB); b.json (200 MB)" in text


def test_splits_are_never_averaged():
  """The sizes of Table 5 are scored on one split by eval.py, on another by eval.py --split=test: one run, not two."""
  bits = {"train": 1.0, "validation": 2.5, "test": 3.0}
  of = {
    split: Measured("table5:image256_megabyte", {"bpb": bpb}, f"{split}.json", split=split)
    for split, bpb in bits.items()
  }
  for splits, shown in ((("train", "validation"), 2.5), (("validation", "test"), 3.0), (("train",), None)):
    found = row("5", "image256 megabyte", [of[split] for split in splits])["ours"]
    assert [entry["bpb"] for entry in found] == ([shown] if shown else [])


def test_what_is_not_as_in_the_row_is_told(tmp_path):
  rows = rows_by_name.all_rows()
  config = rows["table11:sliding"]
  optimizer = dataclasses.replace(config.optimizer, learning_rate=1e-3)
  config = dataclasses.replace(
    config, batch_size=1, num_steps=config.num_steps * config.batch_size, optimizer=optimizer
  )
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  evaluation = {"bpb": 1.0, "method": "sliding", "stride": 128, "step": config.num_steps, "split": "test"}
  (tmp_path / "eval_test_sliding_stride128.json").write_text(json.dumps(evaluation))
  (found,) = measured.from_runs(tmp_path, rows)
  assert found.source.endswith("sliding_stride128.json")
  assert found.note == "other batch_size, other optimizer.learning_rate, evaluated at 64x instead of 2x"


def test_results_files(tmp_path):
  results = {"rows": [{"row": "table5:image256_megabyte", "bpb": 4.5, "note": "2M parameters, one H200"}]}
  (tmp_path / "images.json").write_text(json.dumps(results))
  (tmp_path / "speed.json").write_text("[1, 2]")
  (one,) = measured.from_results(tmp_path, tmp_path)
  assert one == Measured("table5:image256_megabyte", {"bpb": 4.5}, "images.json", "2M parameters, one H200")
  assert row("16", "megabyte_patch_scan", [one])["ours"][0]["bpb"] == 4.5
  (tmp_path / "broken.json").write_text("{")
  with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
    measured.from_results(tmp_path, tmp_path)


def test_run_directories(tmp_path):
  rows = rows_by_name.all_rows()
  small = dataclasses.replace(rows["table9:megabyte"], model=rows["table9:transformer"].model)
  for folder, config, evaluation in (
    ("table9/megabyte", small, {"bpb": 2.0, "method": "basic", "word_perplexity": 40.0, "step": small.num_steps}),
    ("table9/megabyte", small, {"bpb": 1.9, "method": "sliding"}),  # no row of Table 9 is evaluated so
    ("mine", rows["table11:strided"], {"bpb": 1.5, "method": "strided", "step": 1000, "data": "x/", "bytes": 5000}),
    ("mine", rows["table11:strided"], {"bpb": 1.4, "method": "both", "step": rows["table11:both"].num_steps}),
  ):
    path = tmp_path / folder / f"eval_test_{evaluation['method']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / "config.json").write_text(json.dumps(config.to_dict()))
    path.write_text(json.dumps(evaluation | {"split": "test"}))
    (path.parent / "eval.json").write_text(json.dumps(evaluation))  # the newest once more
    (path.parent / "eval_positions.json").write_text('{"patch": [1, 2]}')
  found = measured.from_runs(tmp_path, rows)
  assert len(found) == 3
  one, both, strided = sorted(found, key=lambda m: -m.numbers["bpb"])[0], *found[:2]
  assert one.row == "table9:megabyte" and one.numbers["perplexity_test"] == 40.0
  assert one.source.endswith("eval_test_basic.json") and one.note == "304M parameters, trained on 10.0 GB of 80.0 GB"
  assert strided.row == "table11:strided"
  assert strided.source.endswith("mine/eval_test_strided.json")
  assert strided.note == "trained on 393 MB of 400 GB, scored on 5.00 kB of x/"
  assert both.source.endswith("mine/eval_test_both.json") and not both.note
  for name, label in (("11", "both"), ("3", "megabyte"), ("17", "context8192")):  # one run, three tables, no spread
    assert [entry["source"] for entry in row(name, label, found)["ours"]] in ([both.source], [])
  assert row("11", "both", found)["ours"][0]["bpb"] == 1.4
  with pytest.raises(ConfigError, match="is not a folder"):
    measured.from_runs(tmp_path / "nowhere", rows)


def test_a_folder_without_runs_of_rows_is_told(tmp_path):
  command = [sys.executable, "-m", "megabyte_jax", "tables", "5", f"--runs={tmp_path}"]
  done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
  assert f"--runs={tmp_path} holds no run of a row, scored by eval.py with the row's method" in done.stderr


def test_tables_of_the_test_split_take_no_other():
  found = [
    Measured("table11:both", {"bpb": 1.4}, "a", split="validation"),
    Measured("table2:pg19_megabyte", {"bpb": 1.6}, "b"),
  ]
  assert row("11", "both", found)["ours"] == []
  assert row("2", "pg19 megabyte", found)["ours"]


def test_shapes_printed_in_the_tables_are_those_of_the_configs():
  """(width, layers), context, P and latents, read from the paper's own words; slips of its tables by name."""
  slips = {  # a size printed for the model that the row leaves out, or no shape at all
    "table10:image256_without_global": ["(768, 12)"],
    "table10:audio_without_global": ["(768, 12)"],
    "table10:audio_without_local": ["(4096, 32)"],
    "table10:image256_without_cross_patch": ["(768, 24)", "(768, 15)"],
  }
  for entry in TABLES["15"].rows:
    model = tables.config_of(entry.config).model
    levels = (model.level,) if hasattr(model, "latents") else model.levels
    shapes = [(level.width, level.num_layers) for level in levels]
    printed = slips.get(entry.config, re.findall(r"\(\d+, \d+\)", entry.printed))
    expected = [tuple(map(int, re.findall(r"\d+", shape))) for shape in printed]
    assert len(shapes) == len(expected), entry
    for (width, layers), (printed_width, printed_layers), level in zip(shapes, expected, levels, strict=True):
      assert layers == printed_layers, entry
      assert width == -(-printed_width // math.lcm(level.patch_size, 8)) * math.lcm(level.patch_size, 8), entry
    context = entry.paper["context, as printed"]
    if "latents" in context:
      assert f"({model.latents} latents)" in context
    elif "(P" in context:
      assert f"(P {max(model.span, model.levels[0].patch_size)})" in context, entry


def test_sizes_printed_elsewhere():
  for reference, shapes in {
    "table3:transformer": [(1024, 22)],
    "table3:megabyte": [(2048, 24), (1024, 24)],
    "table4:megabyte": [(2568, 32), (1024, 24)],
    "table9:transformer": [(1024, 24)],
    "table9:megabyte": [(2048, 24), (1024, 15)],
    "table11:both": [(2048, 24), (1024, 24)],
    "table12:patch48": [(768, 12), (768, 11)],
    "table12:patch192": [(768, 12), (768, 12)],
    "table12:patch768": [(768, 12), (768, 8)],
    "table13:global350m_local290m": [(1024, 24), (1024, 20)],
    "table13:global760m_local262m": [(1536, 24), (1024, 18)],
    "table13:global1300m_local218m": [(2048, 24), (1024, 15)],
    "table17:context16384": [(2048, 24), (1024, 24)],
  }.items():
    config = tables.config_of(reference)
    assert [(level.width, level.num_layers) for level in config.model.levels] == shapes, reference
  assert tables.config_of("table17:context16384").model.context == 16_384
  assert [tables.config_of(f"table12:patch{p}").model.levels[0].patch_size for p in (48, 192, 768)] == [48, 192, 768]


def test_unknown_tables_are_an_error():
  with pytest.raises(ConfigError, match="there is no table '18'; choose one of 1, 2, "):
    tables.describe("18")
