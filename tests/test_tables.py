"""The printed tables: every row of the paper, its config, and where our numbers come from."""

import dataclasses
import json

import pytest

from megabyte_jax import measured, tables
from megabyte_jax.config_parsing import ConfigError
from megabyte_jax.measured import Measured
from megabyte_jax.paper_numbers import REPEATED, TABLES
from megabyte_jax.windows import cost_factor


def row(name, label, found=()):
  (one,) = [r for r in tables.describe(name, found)["rows"] if r["row"] == label]
  return one


def test_all_tables_are_there():
  assert {*TABLES, *REPEATED} == {*map(str, range(1, 18)), "audio"}
  assert len(tables.all_rows()) > 50


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
  for entry in TABLES["11"].rows:
    assert entry.paper["cost"] == f"{cost_factor(entry.label):.0f}x"


def test_our_numbers_stand_beside_the_papers():
  found = [
    Measured("table3:megabyte", {"bpb": 1.25, "perplexity_test": 90.0}, "a.json"),
    Measured("table11:both", {"bpb": 1.35}, "b.json"),
    Measured("table11:modern", {"bpb": 1.15}, "c.json"),
  ]
  both = row("11", "both", found)  # the same run as Table 3's
  assert [entry["bpb"] for entry in both["ours"]] == [1.25, 1.35]
  assert row("3", "megabyte", found)["ours"] == [{"source": "a.json", "perplexity_test": 90.0}]
  text = tables.render(["11"], "text", found)
  assert "1.3 ± 0.05 (2 runs)" in text and "a.json; b.json" in text
  assert row("11", "modern (not in the paper)", found)["ours"][0]["bpb"] == 1.15


def test_results_files(tmp_path):
  results = {"rows": [{"row": "table5:image256_megabyte", "bpb": 4.5, "note": "2M parameters, one H200"}]}
  (tmp_path / "images.json").write_text(json.dumps(results))
  (tmp_path / "speed.json").write_text("[1, 2]")
  (one,) = measured.from_results(tmp_path, tmp_path)
  assert one == Measured("table5:image256_megabyte", {"bpb": 4.5}, "images.json (2M parameters, one H200)")
  assert row("16", "megabyte_patch_scan", [one])["ours"][0]["bpb"] == 4.5
  (tmp_path / "broken.json").write_text("{")
  with pytest.raises(ConfigError, match=r"broken\.json is not JSON"):
    measured.from_results(tmp_path, tmp_path)


def test_run_directories(tmp_path):
  rows = tables.all_rows()
  small = dataclasses.replace(rows["table9:megabyte"], model=rows["table9:transformer"].model)
  for folder, config, evaluation in (
    ("table9/megabyte", small, {"bpb": 2.0, "data": "data/pg19/test", "word_perplexity": 40.0}),
    ("mine", rows["table11:strided"], {"bpb": 1.5, "method": "strided"}),
  ):
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / folder / "eval.json").write_text(json.dumps(evaluation))
    (tmp_path / folder / "eval_positions.json").write_text('{"patch": [1, 2]}')
  found = {m.row: m for m in measured.from_runs(tmp_path, rows)}
  assert set(found) == {"table9:megabyte", "table11:strided"}
  assert found["table9:megabyte"].numbers["perplexity_test"] == 40.0
  assert found["table9:megabyte"].source.endswith("eval.json (304M parameters)")
  assert found["table11:strided"].source.endswith("mine/eval.json")
  with pytest.raises(ConfigError, match="is not a folder"):
    measured.from_runs(tmp_path / "nowhere", rows)


def test_unknown_tables_are_an_error():
  with pytest.raises(ConfigError, match="there is no table '18'; choose one of 1, 2, "):
    tables.describe("18")
