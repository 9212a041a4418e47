"""Figures of speed, memory and half-size runs in README.md and the documents are those of the files in docs/results."""

import re

import pytest
from documented_figures import COMPARED, README, RESULTS, assert_shows, passage, result, row

MODELS = ("megabyte", "transformer", "windowed_transformer", "perceiver_ar")
IMAGE_MODELS = ("megabyte", "transformer", "perceiver_ar")


def test_generation():
  rows = {(row["model"], row["batch"]): row for row in result("generation")["measured"]}
  ours, transformer, peer = (rows[name, 1] for name in ("MEGABYTE", "Transformer", "MEGABYTE-pytorch"))
  seconds = [row["seconds_per_8192_bytes"] for row in (ours, transformer, peer)]
  said = [f"{seconds[0]:.2f}", f"{seconds[1]:.2f}", f"{ours['speed_up']:.2f}", "1.42", f"{seconds[2]:.0f}"]
  assert_shows(COMPARED, "(results.md#generation-on-one-gpu)", *said, f"{rows['MEGABYTE', 256]['speed_up']:.1f}")
  assert_shows(README, "(docs/comparisons.md#speed)", said[0], said[-1])
  assert row(COMPARED, "generating 8,192 bytes with it, one sample")[:2] == [said[0] + " s", said[-1] + " s"]
  for one in rows.values():
    shown = "{:,.1f}" if one["bytes_per_second"] < 100 else "{:,.0f}"
    assert f"| {one['batch']} | {shown.format(one['bytes_per_second'])} | " in RESULTS, one
    if "share_of_floor" in one:
      assert f" {one['share_of_floor']:.1%} " in RESULTS


def test_half_size_comparisons():
  lines = {
    "books, 120 MB": ["books"],
    "the same, another seed": ["books_seed1"],
    "the same, modern recipe": ["modern_models"],
    "LaTeX, 60 MB": ["latex"],
    "code, 40 MB": ["code"],
    "audio, 200 MB": ["audio"],
    "Image640, 1 GB": ["image640"],
    "Image64 at a quarter of the size, 200 MB": ["image64_quarter"],
    "Image256, 400 MB, one photograph a step": ["image256"],
    "Image256, 2.5 GB, sixteen photographs a step": [f"image256_sixteen_{model}" for model in IMAGE_MODELS],
  }
  runs = result("half_size")
  for line, names in lines.items():
    found = [one for name in names for one in runs[name]["models"]]
    bpb = {re.search("|".join(MODELS), one["row"])[0]: one["methods"]["basic"] for one in found}
    assert row(RESULTS, line) == [f"{bpb[model]:.3f}" if model in bpb else "" for model in MODELS], line
  (windows,) = runs["image256_windows"]["models"]
  whole = next(one for one in runs["image256"]["models"] if "megabyte" in one["row"])
  figures = [f"{one['methods']['basic']:.3f}" for one in (windows, whole)]
  assert_shows(RESULTS, "**One photograph a step.**", *figures)


def test_parts_of_the_model_and_of_the_recipe_at_half_size():
  runs = result("half_size")
  bpb = {
    (name, one["row"].partition(":")[2]): f"{one['methods']['basic']:.3f}"
    for name in ("modern_books", "modern_images", "ablations")
    for one in runs[name]["models"]
  }
  books, images = (
    [bpb[f"modern_{of}", f"{row}_megabyte+modern{muon}"] for muon in ("-muon", "")]
    for of, row in (("books", "books"), ("images", "image256"))
  )
  parts = [bpb["ablations", f"arxiv_{part}"] for part in ("megabyte", "without_local", "without_global")]
  assert_shows(RESULTS, "Table 10, both models", *books, *images, *parts)


def test_every_run_at_half_size_says_where_it_comes_from():
  for name, run in result("half_size").items():
    assert run["command"].startswith("python benchmarks/comparisons.py "), name
    for one in run["models"]:
      assert one["device"].startswith("NVIDIA H") and one["jax"] and one["date"], (name, one["row"])


def sections(text):
  """{heading: its lines} of the sections of a document."""
  parts = re.split(r"^## ", text, flags=re.M)[1:]
  return {part.partition("\n")[0]: part.splitlines() for part in parts}


def test_results_can_be_found():
  """A summary and all sections in the contents at the head; none is longer than two screens."""
  head, found = RESULTS.partition("\n## ")[0], sections(RESULTS)
  assert len(found) > 10 and len(head.splitlines()) <= 45
  linked = re.findall(r"\(#([\w-]+)\)", head)
  assert sorted(linked) == sorted(re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in found)
  long = {name: len(lines) for name, lines in found.items() if len(lines) > 90}
  assert not long, f"divide these sections of docs/results.md, of more than 90 lines: {long}"


def test_several_gpus():
  rows = {(row["case"], *row["mesh"]): row for row in result("scaling")}
  shares = {axis: rows["text24", axis]["of ideal"] for axis in ("data", "fsdp", "seq", "tensor")}
  image = rows["image640", "seq"]["of ideal"]
  item = passage(COMPARED, "(results.md#several-gpus)")
  said = {axis: int(percent) for percent, axis in re.findall(r"(\d+)%[^%`]*`(\w+)`", item)}
  assert said == {
    "data": round(100 * shares["data"]),
    "fsdp": round(100 * shares["fsdp"]),
    "seq": round(100 * image),
    "tensor": round(100 * shares["tensor"]),
  }
  for (case, axis), measured in rows.items():
    share = shares[axis] if case == "text24" else image
    times = measured["many"]["seconds"], measured["s beyond"], measured["s on wire"]
    figures = [f"{measured['many']['bytes/s']:,.0f}", f"{share:.1%}", *(f"{1000 * seconds:.0f}" for seconds in times)]
    figures += [f"{measured['GiB']:.1f}", f"{measured['MB sent']:,.0f}"]
    assert f"| {' | '.join(figures)} | " in RESULTS, (case, axis)
  rates = [measured["many"]["wire"] / 1e9 for measured in rows.values()]
  found = RESULTS.partition("## Several GPUs\n")[2]
  assert_shows(found, "**On the wire**", f"{min(rates):.0f}", f"{max(rates):.0f}")
  tensor = rows["text24", "tensor"]
  ideal = tensor["many"]["seconds"] - tensor["s beyond"]
  allowed = f"{(ideal + tensor['s on wire']) / tensor['many']['seconds']:.0%}"
  assert_shows(found, "which run at", allowed.rstrip("%"))


def test_flags_for_several_gpus():
  shown = {
    "": "none",
    "--xla_gpu_enable_latency_hiding_scheduler=true": "latency-hiding scheduler",
    "--xla_gpu_enable_nccl_user_buffers=true": "NCCL user buffers",
    "--xla_gpu_dot_merger_threshold_mb=0": "products not merged",
  }
  rows = result("scaling_flags")
  for one in rows:
    ((axis, _),) = one["mesh"].items()
    mesh = f"{'Image640, ' if one['case'] == 'image640' else ''}{axis}=2"
    expected = [f"{one['of ideal']:.1%}", *(f"{1000 * one[name]:.0f}" for name in ("s beyond", "s on wire"))]
    assert row(RESULTS, f"{mesh}, {shown[one['flags']]}") == expected


def test_muon_before_and_after():
  rows = {(one["code"], one["case"]): one for one in result("muon")}
  faster = []
  for case, label in (("1e18_megabyte8", "12 x 768 + 12 x 384"), ("1e17_megabyte8", "8 x 768 + 8 x 384")):
    pair = [rows[code, case] for code in ("before", "after")]
    expected = [figure for one in pair for figure in (f"{one['bytes/s']:,.0f}", f"{one['Muon']:.1%}")]
    assert row(RESULTS, f"{label} (`{case}`)") == expected
    before, after = (one["step_seconds"] * (1 - one["Muon"]) for one in pair)
    faster.append(f"{100 * (before / after - 1):.1f}")
  assert_shows(RESULTS, "(results/muon.json)", *faster)


def test_long_sequences():
  steps = result("long_sequences")["measured"]
  for step in steps:
    assert f"| {step['bytes']:,} | {step['seconds']:.3f} | " in RESULTS, step
  longest = max(steps, key=lambda step: step["bytes"])
  figures = f"{longest['seconds']:.0f}", f"{longest['memory_bytes'] / 2**30:.0f}"
  assert_shows(COMPARED, "(results.md#very-long-sequences)", *figures)
  assert_shows(README, "(docs/results.md#very-long-sequences)", *figures)
  assert row(COMPARED, "one training step on 100 million bytes")[0] == f"{figures[0]} s, {figures[1]} GiB"


def test_look_ups_notice_another_figure():
  text = (
    "The rate is 2.377, not 2.5,\nhere ([rows](results/a.json)).\n\n- one 1,508 ([b](results/b.json))\n\n| a | 1.5 |\n"
  )
  assert_shows(text, "(results/a.json)", "2.377")
  assert_shows(text, "(results/b.json)", "1,508")
  assert row(text, "a") == ["1.5"]
  for figure in ("2.37", "2.378", "377", "1508"):
    with pytest.raises(AssertionError, match=re.escape(figure)):
      assert_shows(text, "(results/a.json)", figure)
  with pytest.raises(AssertionError, match="in this order"):
    assert_shows(text, "(results/a.json)", "2.5", "2.377")
