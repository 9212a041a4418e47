"""Figures in README.md and the documents are those of the files in docs/results.

They are found by a link in their passage, the label of a row or the heading of an item, never by a sentence's words.
"""

import json
import re

import pytest

from megabyte_jax.paper.rows_by_name import ROOT

DATA = ("books", "images")
MODELS = ("megabyte", "transformer", "windowed_transformer", "perceiver_ar")
IMAGE_MODELS = ("megabyte", "transformer", "perceiver_ar")
README, RESULTS, COMPARED = (
  (ROOT / name).read_text() for name in ("README.md", "docs/results.md", "docs/comparisons.md")
)


def result(name):
  return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def short(rate):
  return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


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


def bpb_of(*names):
  """{model: bits per byte} of the rows of these comparisons."""
  rows = [row for name in names for row in result(name)["rows"]]
  return {re.search("|".join(MODELS), row["row"])[0]: row["bpb"] for row in rows}


def test_small_scale_in_short():
  lines = {
    "books, 120 MB": ["books"],
    "the same, modern recipe": ["modern_models"],
    "code, 40 MB": ["code"],
    "audio, 200 MB": ["audio"],
    "Image256, 400 MB, 2,035 steps of one image": ["image256"],
    "Image256, 1.6 GB, 2,035 steps of 4 images, other tiles": [f"image256_four/{m}" for m in MODELS[:2]],
    "Image256, 2.5 GB, 800 steps of 16 images, these tiles": [f"image256_sixteen/{m}" for m in IMAGE_MODELS],
  }
  for line, names in lines.items():
    bpb = bpb_of(*names)
    shown = " ".join(f"{bpb[model]:.3f} |" if model in bpb else "|" for model in MODELS)
    assert f"| {line} | {shown}" in COMPARED
  books, modern = bpb_of("books"), bpb_of("modern_models")
  figures = [f"{bpb[model]:.3f}" for bpb in (books, modern) for model in MODELS[:2]]
  assert_shows(README, "(docs/comparisons.md#megabyte-and-its-baselines-at-small-scale)", *figures)


def test_books_at_small_scale():
  for row in result("books")["rows"]:
    shown = " | ".join(f"{value:.3f}" for value in row["methods"].values())
    assert f" | {shown} | " in RESULTS, row["row"]


def test_images_at_small_scale():
  for name in ("image256", "image640", "scans", "image64", "image64_quarter"):
    for row in result(name)["rows"]:
      assert f" | {row['bpb']:.3f} | {row['training_seconds'] / 60:.1f} |" in RESULTS, row["row"]
  ours = bpb_of("image256")["megabyte"]
  windows, other_seed = (result(f"image256_windows{seed}")["rows"][0]["bpb"] for seed in ("", "_seed1"))
  figures = [f"{bpb:.3f}" for bpb in (windows, ours, other_seed)]
  assert_shows(RESULTS, "(results/image256_windows_seed1.json)", *figures)
  assert_shows(RESULTS, "*How many photographs*", *figures)


def test_sixteen_photographs_a_step():
  for model in IMAGE_MODELS:
    (row,) = result(f"image256_sixteen/{model}")["rows"]
    curve = result(f"image256_sixteen/{model}/table5.image256_{model}")["run"]["curve"]
    last = [bpb for step, bpb in curve if step > 700]
    shown = f"{sum(last) / len(last):.3f} | {row['bpb']:.3f} | {row['training_seconds'] / 60:.1f} |"
    assert f"% | {shown}" in RESULTS, model


def test_audio_and_more_text_at_small_scale():
  for row in result("audio")["rows"]:
    assert f" | {row['bpb']:.3f} | {row['training_seconds'] / 60:.1f} | " in RESULTS, row["row"]
  (code,) = result("code300")["rows"]
  minutes = f"{code['training_seconds'] / 60:.1f}"
  assert_shows(RESULTS, "(results/code300.json)", f"{code['bpb']:.3f}", "9155", minutes)
  code, latex = (bpb_of(f"{name}_rate3")["megabyte"] for name in ("code", "latex"))
  assert_shows(RESULTS, "(results/code_rate3.json)", f"{code:.3f}", f"{latex:.3f}")
  trials = result("image64_rates/table5.image64_megabyte")
  paper, half = (trials[f"trial of {factor} times the paper's learning rate"]["bpb"] for factor in ("1", "0.5"))
  mark = "(results/image64_rates/table5.image64_megabyte.json)"
  assert_shows(RESULTS, mark, f"{paper:.3f}", "3e-4", f"{half:.3f}", "1.5e-4")


def test_the_other_comparisons_at_small_scale():
  rows = {
    (name, row["row"].partition(":")[2]): row["bpb"]
    for name in ("latex", "code", "ablations", "shares", "patch_sizes", "books_seed1")
    for row in result(name)["rows"]
  }
  for name, row in (("latex", "arxiv"), ("code", "code")):
    shown = " | ".join(f"{rows[name, f'{row}_{model}']:.3f}" for model in MODELS)
    assert f" | {shown} |" in RESULTS
  for (name, row), bpb in rows.items():
    if name == "ablations":
      assert re.search(rf"\| \d+% \| [\d.e-]+ \| {bpb:.3f} \| [\d.]+ \|", RESULTS), row
  orders = {
    "shares": ("global350m_local290m", "global760m_local262m", "global1300m_local218m"),
    "patch_sizes": ("patch48", "patch192", "patch768"),
    "books_seed1": [f"books_{model}" for model in MODELS],
  }
  for name, order in orders.items():
    assert_shows(RESULTS, f"(results/{name}.json)", *(f"{rows[name, row]:.3f}" for row in order))
  four = [result(f"image256_four/{model}")["rows"][0] for model in MODELS[:2]]
  figures = [(f"{found['bpb']:.3f}", f"{found['training_seconds'] / 60:.1f}") for found in four]
  assert_shows(RESULTS, "(results/image256_four)", *figures[0], *figures[1])


def test_the_modern_recipe():
  books, images = ({row["row"].partition("megabyte")[2]: row for row in result(f"modern_{of}")["rows"]} for of in DATA)
  figures = [f"{rows[change]['bpb']:.3f}" for rows in (books, images) for change in ("+modern", "")]
  assert_shows(COMPARED, "(results.md#the-modern-recipe)", *figures)
  for change in books:
    shown = (
      f"{(row['matched'] or {'cost': 1})['cost']:.2f} | {row['bytes_trained'] / 1e6:.0f} MB | "
      f"{short(row['learning_rate'])} | {row['bpb']:.3f}"
      for row in (books[change], images[change])
    )
    assert f" | {' | '.join(shown)} |" in RESULTS, change


def test_models_with_the_modern_recipe():
  paper = {row["row"]: row["bpb"] for row in result("books")["rows"]}
  for row in result("modern_models")["rows"]:
    before = paper[row["row"].removesuffix("+modern")]
    rate = short(row["learning_rate"]) + (" (the highest)" if row["best_rate_is_the_last_tried"] else "")
    shown = f"{rate} | {row['bpb']:.3f} | {before:.3f} | {row['training_seconds'] / 60:.1f}"
    assert f" | {shown} |" in RESULTS, row["row"]


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


def test_recipes():
  runs = {
    "+scaled": "kernel_scaled",
    "+modern": "kernel_modern",
    "+modern, half the bytes": "kernel_modern_half",
    "the same with cross-patch attention, r = P": "kernel_modern_half_cross_patch",
  }
  for label, name in runs.items():
    run = result(f"recipe/{name}")
    bits = f"{run['validation_bpb']:.3f}", f"{run['train_bpb_of_last_steps']:.3f}"
    expected = [f"{run['train_bytes'] / 1e6:.0f} MB", *bits, f"{run['bytes_per_second'] / 1e6:.2f}"]
    assert row(RESULTS, f"[{label}](results/recipe/{name}.json)") == expected
  models = {
    "MEGABYTE, P = 4, 512 x 6 + 256 x 6": "library_megabyte",
    "Transformer, 320 x 6, 1,024 bytes": "library_transformer",
    "windowed, 384 x 5, 512 of 4,096": "library_windowed",
  }
  for label, name in models.items():
    run = result(f"recipe/{name}")
    each = f"{run['train_bytes'] / run['parameters']:.0f}"
    sizes = f"{run['parameters'] / 1e6:.1f} M", f"{run['train_bytes'] / 1e6:.0f} MB", each
    assert row(RESULTS, f"[{label}](results/recipe/{name}.json)") == [*sizes, f"{run['validation_bpb']:.3f}"]
    assert run["spacebyte_flops_per_byte"] * run["train_bytes"] == pytest.approx(3e16, rel=1e-3)
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
