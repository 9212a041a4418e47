"""Figures in README.md and the documents are those of the files in docs/results.

They are found by a link in their passage, the label of a row or the heading of an item, never by a sentence's words.
"""

import json
import re

import pytest

from megabyte_jax.paper.rows_by_name import ROOT

MODELS = ("megabyte", "transformer", "windowed_transformer", "perceiver_ar")
IMAGE_MODELS = ("megabyte", "transformer", "perceiver_ar")
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


def test_other_packages_in_the_quick_start():
  labels = {"MEGABYTE-pytorch": "MEGABYTE-pytorch 0.3.6", "SpaceByte": "SpaceByte's MegaByte (3211113)"}
  for peer in result("quickstart_peers")["rows"]:
    parameters, rates, bits, _ = row(RESULTS, labels[peer["peer"]])
    found = {float(rate): bpb for rate, bpb in peer["other_rates"].items()}
    found[peer["learning_rate"]] = peer["validation_bpb"]
    assert min(found.values()) == pytest.approx(peer["validation_bpb"], abs=0.005)
    assert parameters == f"{peer['parameters']:,}"
    assert [float(rate.strip("* ")) for rate in rates.split(",")] == sorted(found)
    assert bits.replace("*", "").split(", ") == [f"{found[rate]:.3f}" for rate in sorted(found)]
    assert f"{peer['validation_bpb']:.3f}" in passage(README, "(docs/results.md#other-packages-on-the-same-bytes)")


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
  alone = rows["text24", "seq"]["one"]["bytes/s"]  # one GPU that takes its rows at once
  shares = {axis: rows["text24", axis]["many"]["bytes/s"] / alone / 2 for axis in ("data", "fsdp", "seq", "tensor")}
  image = rows["image640", "seq"]["of ideal"]
  item = passage(COMPARED, "(results.md#several-gpus)")
  said = dict(re.findall(r"(\d+)%[^%`]*`(\w+)`", item))
  said = {axis: int(percent) for percent, axis in said.items()}
  assert said == {
    "data": round(100 * shares["data"]),
    "fsdp": round(100 * shares["fsdp"]),
    "seq": round(100 * image),
    "tensor": round(100 * shares["tensor"]),
  }
  for (case, axis), row in rows.items():
    share = shares[axis] if case == "text24" else image
    assert f"| {row['many']['bytes/s']:,.0f} | {share:.1%} | " in RESULTS, (case, axis)


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


def test_recipes_and_other_packages():
  speeds = {one.get("peer", one.get("case")): one for one in result("peer_speeds")["rows"]}
  runs = {
    "+modern": ("kernel_modern", "1e17_megabyte8"),
    "SpaceByte's MegaByte": ("kernel_spacebyte", "SpaceByte"),
    "MEGABYTE-pytorch": ("kernel_megabyte_pytorch", "MEGABYTE-pytorch"),
    "+scaled": ("kernel_scaled", ""),
    "+modern with an output of its own": ("kernel_modern_own_output", ""),
  }
  for label, (name, alone) in runs.items():
    run = result(f"recipe/{name}")
    assert run["train_bytes"] == 419_430_400
    bits = f"{run['validation_bpb']:.3f}", f"{run['train_bpb_of_last_steps']:.3f}"
    rest = ["-", "-"]
    if alone:
      one = speeds[alone]
      gib = one["GiB"] if "GiB" in one else one["peak_memory"] / 2**30
      rest = [f"{one.get('bytes/s', one.get('bytes_per_second')) / 1e6:.2f}", f"{gib:.1f}"]
    assert row(RESULTS, f"[{label}](results/recipe/{name}.json)") == [f"{run['parameters'] / 1e6:.1f} M", *bits, *rest]
    if alone:
      shown = "megabyte_jax, `+modern`" if name == "kernel_modern" else f"{label}, compiled"
      cells = [cell.strip("*").split(",")[0] if n != 1 else cell for n, cell in enumerate(row(README, shown))]
      assert cells == [bits[0], f"{float(rest[0]) * 1e6:,.0f}", rest[1]]
  modern, others = bits_of("kernel_modern"), (bits_of("kernel_spacebyte"), bits_of("kernel_megabyte_pytorch"))
  assert [f"{1 - modern / other:.0%}" for other in others] == ["17%", "18%"]
  for label, name in {
    "+modern, half the bytes": "kernel_modern_half",
    "the same with cross-patch attention, r = P": "kernel_modern_half_cross_patch",
  }.items():
    run = result(f"recipe/{name}")
    bits = f"{run['validation_bpb']:.3f}", f"{run['train_bpb_of_last_steps']:.3f}"
    expected = [f"{run['train_bytes'] / 1e6:.0f} MB", *bits, f"{run['bytes_per_second'] / 1e6:.2f}"]
    assert row(RESULTS, f"[{label}](results/recipe/{name}.json)") == expected


def test_an_output_of_its_own():
  labels = {
    "`+scaled` as it was: the byte table, and normals cut at two deviations": "scaled_tied",
    "`+scaled` as it is now: an output of its own, and whole normals": "scaled_own_output",
    "`+modern`": "modern",
    "`+modern` with an output of its own": "modern_own_output",
  }
  rows = result("own_output")["rows"]
  for label, run in labels.items():
    bits = [f"{one['validation_bpb']:.3f}" for one in sorted(rows, key=lambda one: one["seed"]) if one["run"] == run]
    assert row(RESULTS, label) == [", ".join(bits)]


EQUAL_FLOPS = {
  "C: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "kernel_megabyte_1e17",
  "C: [Transformer, 448 x 6, 1,024 bytes]": "kernel_transformer_1e17",
  "C: [PerceiverAR, 448 x 6, 1,024 latents of 4,096]": "kernel_perceiver_1e17",
  "C: [windowed, 448 x 6, 512 of 4,096]": "kernel_windowed_1e17",
  "whole novels: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "library_megabyte_whole_novels",
  "whole novels: [windowed, 448 x 6, 512 of 4,096]": "library_windowed_whole_novels",
}
OTHER_SIZES = {
  "C, 1e17: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "kernel_megabyte_tied_1e17",
  "C, 1e17: [MEGABYTE, P = 4, 512 x 8 + 256 x 8]": "kernel_megabyte_deeper_1e17",
  "C, 1e17: [MEGABYTE, P = 4, 768 x 6 + 384 x 6]": "kernel_megabyte_wider_1e17",
  "C, 1e17: [Transformer, 512 x 6]": "kernel_transformer_wider_1e17",
  "C, 1e17: [PerceiverAR, 512 x 6]": "kernel_perceiver_wider_1e17",
  "C, 1e17: [windowed, 512 x 6]": "kernel_windowed_wider_1e17",
  "books, 1e17: [windowed, 512 x 6]": "library_windowed_1e17",
  "books, 3e16: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "library_megabyte",
  "books, 3e16: [MEGABYTE, P = 4, 512 x 8 + 256 x 8]": "library_megabyte_deeper",
  "books, 3e16: [Transformer, 320 x 6]": "library_transformer",
  "books, 3e16: [windowed, 384 x 5]": "library_windowed",
}


def passes_of(name):
  """Returns the bits per byte with one pass and with two, as shown: PerceiverAR has no other way than two."""
  methods = result(f"recipe/{name}")["bpb_by_method"]
  return ["-" if "perceiver" in name else f"{methods['basic']:.3f}", f"{methods['sliding']:.3f}"]


@pytest.mark.parametrize(("label", "name"), [*EQUAL_FLOPS.items(), *OTHER_SIZES.items()])
def test_rows_of_equal_training_flops(label, name):
  run = result(f"recipe/{name}")
  scored = 3_145_812 if label.startswith("C") else 36_173_225 if label.startswith("whole novels") else 3_670_016
  assert run["validation_bytes"] == scored
  tier = 3e16 if "3e16" in label else 1e17
  assert run["spacebyte_flops_per_byte"] * run["train_bytes"] == pytest.approx(tier, rel=1e-3)
  each = f"{run['train_bytes'] / run['parameters']:.0f}"
  expected = [f"{run['parameters'] / 1e6:.1f} M", f"{run['train_bytes'] / 1e6:,.0f} MB", each]
  if label in EQUAL_FLOPS:
    assert run["config"]["model"]["tied_output"] is False
    expected += [f"{run['train_bpb_of_last_steps']:.3f}", *passes_of(name)]
  else:
    expected.append(f"{run['validation_bpb']:.3f}")
  assert row(RESULTS, f"{label}(results/recipe/{name}.json)") == expected


def test_equal_training_flops():
  for label, system in {
    "MEGABYTE, P = 4, 768 x 6 + 384 x 6": "megabyte",
    "Transformer, 512 x 6": "transformer",
  }.items():
    (run,) = (one for one in result("table3")["rows"] if one["row"] == f"table3:{system}")
    assert run["bytes"] == 3_670_016
    each = f"{run['trained_on'] / run['parameters']:.0f}"
    expected = [f"{run['parameters'] / 1e6:.1f} M", f"{run['trained_on'] / 1e6:,.0f} MB", each]
    expected.append(f"{run['bpb_by_method']['basic']:.3f}")
    assert row(RESULTS, f"books, 1e17: [{label}](results/table3.json)") == expected
  names = ("megabyte", "transformer", "perceiver", "windowed")
  on_c = [result(f"recipe/kernel_{name}_1e17")["bpb_by_method"]["sliding"] for name in names]
  assert_shows(README, "[1e17 training FLOPs](docs/results.md#equal", *(f"{bits:.3f}" for bits in on_c))
  novels = [result(f"recipe/library_{name}_whole_novels")["bpb_by_method"] for name in ("megabyte", "windowed")]
  assert_shows(README, "[books](docs/results.md#equal", *(f"{bits['sliding']:.3f}" for bits in novels))
  behind = f"{novels[0]['basic'] - novels[1]['basic']:.3f}"
  first, *_ = passages(RESULTS.partition("## Equal training FLOPs\n")[2])
  assert [number for number in numbers(first) if number.startswith("0.")] == [*(f"{bits:.3f}" for bits in on_c), behind]
  summary = RESULTS.partition("**Contents**")[0]
  by = [f"{other - on_c[0]:.3f}" for other in on_c[1:]]
  assert [number for number in numbers(passage(summary, "1e17")) if number.startswith("0.0")] == by
  four = [result(f"recipe/{name}")["bpb_by_method"]["both"] for name in EQUAL_FLOPS.values() if "megabyte" in name]
  assert_shows(RESULTS, "**Four passes.**", *(f"{bits:.3f}" for bits in four))
  one_pass = {name: bits_of(f"kernel_{name}_1e17") for name in ("transformer", "windowed", "megabyte")}
  others = {name: bits_of(f"kernel_{name}_wider_1e17") for name in ("transformer", "windowed")}
  smaller = [f"{one_pass[name] - others[name]:.3f}" for name in others]
  worse = f"{one_pass['megabyte'] - bits_of('kernel_megabyte_tied_1e17'):.4f}"
  assert_shows(RESULTS, "**Sizes.**", *smaller, worse)


def test_an_output_of_its_own_at_larger_sizes():
  for label, tied, own in (
    ("[cut at two deviations](results/recipe/kernel_scaled_tied.json)", "kernel_scaled_tied", "kernel_scaled"),
    ("the same: `+modern`", "kernel_modern", "kernel_modern_own_output"),
    ("[1e17 FLOPs](#equal-training-flops) on C: `+modern`", "kernel_megabyte_tied_1e17", "kernel_megabyte_1e17"),
  ):
    (line,) = (line for line in RESULTS.splitlines() if line.startswith("|") and label in line)
    assert line.split(" | ")[1:] == [f"{bits_of(tied):.3f}", f"{bits_of(own):.3f} |"]


def bits_of(name):
  return result(f"recipe/{name}")["validation_bpb"]


def test_cross_patch_attention_and_the_shipped_model():
  without, with_it = (result(f"recipe/kernel_modern_half{name}") for name in ("", "_cross_patch"))
  for step in (50, 150, 300, 450, 600, 800):
    cells = []
    for run in (without, with_it):
      (found,) = (d for d in run["diagnoses"] if d["step"] == step)
      (bits,) = (bits for at, bits, _ in run["curve"] if at == step)
      cells += [f"{bits:.3f}", f"{found['first_level_bits']:.2f}", f"{found['gradient_norms']['level0']:.3f}"]
    assert f"| {step} | {' | '.join(cells)} |" in RESULTS, step
  small = result("recipe/library_small")
  figures = (
    f"{small['parameters'] / 1e6:.2f}",
    f"{small['bytes_per_second'] / 1e6:.2f}",
    f"{small['validation_bpb']:.3f}",
  )
  assert_shows(RESULTS, "(results/recipe/library_small.json)", *figures)
