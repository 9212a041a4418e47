"""Figures in README.md and docs/results.md are those of the files in docs/results."""

import json
import re

from megabyte_jax.paper.configs import ROOT

DATA = ("books", "images")
MODELS = ("megabyte", "transformer", "windowed_transformer", "perceiver_ar")
IMAGE_MODELS = ("megabyte", "transformer", "perceiver_ar")
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))


def result(name):
  return json.loads((ROOT / f"docs/results/{name}.json").read_text())


def short(rate):
  return f"{rate:.1e}".replace(".0e", "e").replace("e-0", "e-")


def flat(text):
  return " ".join(text.split())


def test_generation():
  rows = {(row["model"], row["batch"]): row for row in result("generation")["measured"]}
  ours, transformer, peer = (rows[name, 1] for name in ("MEGABYTE", "Transformer", "MEGABYTE-pytorch"))
  seconds = [row["seconds_per_8192_bytes"] for row in (ours, transformer, peer)]
  said = (
    f"generates 8,192 bytes in {seconds[0]:.2f} s, a Transformer of the paper's Table 9 in {seconds[1]:.2f} s "
    f"({ours['speed_up']:.2f} times; the paper: 1.42), MEGABYTE-pytorch in {seconds[2]:.0f} s"
  )
  assert said in flat(README)
  assert f"| {seconds[0]:.2f} s | {seconds[2]:.0f} s |" in README
  assert f"{rows['MEGABYTE', 256]['speed_up']:.1f} times the Transformer" in flat(README)
  for row in rows.values():
    shown = "{:,.1f}" if row["bytes_per_second"] < 100 else "{:,.0f}"
    assert f"| {row['batch']} | {shown.format(row['bytes_per_second'])} | " in RESULTS, row
    if "share_of_floor" in row:
      assert f" {row['share_of_floor']:.1%} " in RESULTS


def bpb_of(*names):
  """{model: bits per byte} of the rows of these comparisons."""
  rows = [row for name in names for row in result(name)["rows"]]
  return {re.search("|".join(MODELS), row["row"])[0]: row["bpb"] for row in rows}


def test_small_scale_in_the_readme():
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
    assert f"| {line} | {shown}" in README


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
  assert f"It has **{windows:.3f}** instead of {ours:.3f} ({other_seed:.3f} with another seed)" in flat(RESULTS)


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
  assert f"With 300 MB of code, 4.5 times the data, MEGABYTE has {code['bpb']:.3f}" in flat(RESULTS)
  assert f"9,155 steps, {code['training_seconds'] / 60:.1f} minutes" in flat(RESULTS)
  code, latex = (bpb_of(f"{name}_rate3")["megabyte"] for name in ("code", "latex"))
  assert f"no worse: {code:.3f} on code ([code_rate3.json](results/code_rate3.json)) and {latex:.3f}" in flat(RESULTS)
  trials = result("image64_rates/table5.image64_megabyte")
  for factor, said in (("0.5", "**{:.3f} at 1.5e-4**"), ("1", "at {:.3f} at the paper's 3e-4")):
    bpb = trials[f"trial of {factor} times the paper's learning rate"]["bpb"]
    assert said.format(bpb) in flat(RESULTS)


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
  said = "(512 + 512) {:.3f}, 12 + 9 (768 + 512) {:.3f}, 12 + 7 with a large one (1024 + 512) {:.3f}."
  sizes = ("global350m_local290m", "global760m_local262m", "global1300m_local218m")
  assert said.format(*(rows["shares", row] for row in sizes)) in flat(RESULTS)
  said = "P = 48 {:.3f}, 192 {:.3f}, 768 {:.3f}."
  assert said.format(*(rows["patch_sizes", f"patch{size}"] for size in (48, 192, 768))) in flat(RESULTS)
  seeds = [rows["books_seed1", f"books_{model}"] for model in MODELS]
  assert "has {:.3f}, {:.3f}, {:.3f} and {:.3f}: MEGABYTE's distance".format(*seeds) in flat(RESULTS)
  four = [result(f"image256_four/{model}")["rows"][0] for model in MODELS[:2]]
  ours, transformer = (f"{row['bpb']:.3f} ({row['training_seconds'] / 60:.1f}" for row in four)
  assert f"MEGABYTE {ours} minutes), Transformer {transformer})" in flat(RESULTS)


def test_the_modern_recipe():
  books, images = ({row["row"].partition("megabyte")[2]: row for row in result(f"modern_{of}")["rows"]} for of in DATA)
  said = "In the time of 60 MB of books it has {:.3f} bits per byte, the paper's recipe {:.3f}; in that of 200 MB of "
  said += "photographs {:.3f} and {:.3f}."
  assert said.format(*(rows[change]["bpb"] for rows in (books, images) for change in ("+modern", ""))) in flat(README)
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
  said = re.search(
    r"Two GPUs: (\d+)% of .*? with `data`, (\d+)% with `fsdp`, (\d+)% with one .*?, (\d+)% with `tensor`", flat(README)
  )
  assert said
  assert [int(n) for n in said.groups()] == [
    round(100 * share) for share in (shares["data"], shares["fsdp"], image, shares["tensor"])
  ]
  for (case, axis), row in rows.items():
    share = shares[axis] if case == "text24" else image
    assert f"| {row['many']['bytes/s']:,.0f} | {share:.1%} | " in RESULTS, (case, axis)


def test_long_sequences():
  for row in result("long_sequences")["measured"]:
    assert f"| {row['bytes']:,} | {row['seconds']:.3f} | " in RESULTS, row
