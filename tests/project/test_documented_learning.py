"""Figures of what models learn, in README.md and docs/results.md, are those of the files in docs/results."""

import pytest
from documented_figures import README, RESULTS, assert_shows, numbers, passage, passages, result, row


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
  "C: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "kernel_megabyte",
  "C: [Transformer, 448 x 6, 1,024 bytes]": "kernel_transformer",
  "C: [PerceiverAR, 448 x 6, 1,024 latents of 4,096]": "kernel_perceiver",
  "C: [windowed, 448 x 6, 512 of 4,096]": "kernel_windowed",
  "books: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "library_megabyte",
  "books: [Transformer, 448 x 6, 1,024 bytes]": "library_transformer",
  "books: [PerceiverAR, 448 x 6, 1,024 latents of 4,096]": "library_perceiver",
  "books: [windowed, 448 x 6, 512 of 4,096]": "library_windowed",
  "photographs: [MEGABYTE, P = 12, 576 x 6 + 320 x 6]": "image64_megabyte",
  "photographs: [Transformer, 448 x 6, 1,024 bytes]": "image64_transformer",
  "photographs: [PerceiverAR, 384 x 6, 1,024 latents of 12,288]": "image64_perceiver",
  "photographs: [windowed, 448 x 6, 512 of 12,288]": "image64_windowed",
}
SCORED = {"kernel": 3_145_812, "library": 36_173_225, "image64": 30_965_760}  # bytes of validation
OTHER_SIZES = {
  "C, 1e17: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "kernel_megabyte_tied_1e17",
  "C, 1e17: [MEGABYTE, P = 4, 512 x 8 + 256 x 8]": "kernel_megabyte_deeper_1e17",
  "C, 1e17: [MEGABYTE, P = 4, 768 x 6 + 384 x 6]": "kernel_megabyte_wider_1e17",
  "C, 1e17: [Transformer, 512 x 6]": "kernel_transformer_wider_1e17",
  "C, 1e17: [PerceiverAR, 512 x 6]": "kernel_perceiver_wider_1e17",
  "C, 1e17: [windowed, 512 x 6]": "kernel_windowed_wider_1e17",
  "books, 1e17: [windowed, 512 x 6]": "library_windowed_wider_1e17",
  "photographs, 1e17: [MEGABYTE, P = 6, 576 x 6 + 320 x 6]": "image64_megabyte_patch6_1e17",
  "books, 3e16: [MEGABYTE, P = 4, 512 x 6 + 256 x 6]": "library_megabyte",
  "books, 3e16: [MEGABYTE, P = 4, 512 x 8 + 256 x 8]": "library_megabyte_deeper",
  "books, 3e16: [Transformer, 320 x 6]": "library_transformer",
  "books, 3e16: [windowed, 384 x 5]": "library_windowed",
}


def passes_of(name, tier="1e17"):
  """Returns the bits per byte with one pass and with two, as shown: PerceiverAR has no other way than two."""
  methods = result(f"recipe/{name}_{tier}")["bpb_by_method"]
  one, two = methods["basic"], methods.get("sliding")
  if "perceiver" in name:
    one, two = None, one
  return [f"{bits:.3f}" if bits else "-" for bits in (one, two)]


def size_and_bytes(run):
  """Returns the cells of a row that come before its bits."""
  each = f"{run['train_bytes'] / run['parameters']:.0f}"
  return [f"{run['parameters'] / 1e6:.1f} M", f"{run['train_bytes'] / 1e6:,.0f} MB", each]


@pytest.mark.parametrize(
  ("label", "name", "tier"),
  [
    *((label, name, "1e17") for label, name in EQUAL_FLOPS.items()),
    ("C, 3e17: [MEGABYTE, P = 4, 640 x 6 + 320 x 6]", "kernel_megabyte", "3e17"),
    ("C, 3e17: [Transformer, 576 x 6, 1,024 bytes]", "kernel_transformer", "3e17"),
    ("C, 3e17: [PerceiverAR, 576 x 6, 1,024 latents of 4,096]", "kernel_perceiver", "3e17"),
    ("C, 3e17: [windowed, 576 x 6, 512 of 4,096]", "kernel_windowed", "3e17"),
  ],
)
def test_rows_of_equal_training_flops(label, name, tier):
  run = result(f"recipe/{name}_{tier}")
  corpus = name.partition("_")[0]
  assert run["validation_bytes"] == SCORED[corpus]
  assert run["spacebyte_flops_per_byte"] * run["train_bytes"] == pytest.approx(float(tier), rel=1e-3)
  assert run["config"]["model"]["tied_output"] is (corpus == "image64")
  expected = [*size_and_bytes(run), f"{run['train_bpb_of_last_steps']:.3f}", *passes_of(name, tier)]
  assert row(RESULTS, f"{label}(results/recipe/{name}_{tier}.json)") == expected


@pytest.mark.parametrize(("label", "name"), OTHER_SIZES.items())
def test_rows_of_other_sizes(label, name):
  run = result(f"recipe/{name}")
  corpus = name.partition("_")[0]
  assert run["validation_bytes"] == (3_670_016 if corpus == "library" else SCORED[corpus])
  tier = 3e16 if "3e16" in label else 1e17
  assert run["spacebyte_flops_per_byte"] * run["train_bytes"] == pytest.approx(tier, rel=1e-3)
  expected = [*size_and_bytes(run), f"{run['validation_bpb']:.3f}"]
  assert row(RESULTS, f"{label}(results/recipe/{name}.json)") == expected


def test_rows_of_other_sizes_from_table_3():
  for label, system in {
    "MEGABYTE, P = 4, 768 x 6 + 384 x 6": "megabyte",
    "Transformer, 512 x 6": "transformer",
  }.items():
    (run,) = (one for one in result("table3")["rows"] if one["row"] == f"table3:{system}")
    assert run["bytes"] == 3_670_016
    expected = [*size_and_bytes(run | {"train_bytes": run["trained_on"]}), f"{run['bpb_by_method']['basic']:.3f}"]
    assert row(RESULTS, f"books, 1e17: [{label}](results/table3.json)") == expected


def test_equal_training_flops():
  one, two = ({name: passes_of(name)[n] for name in EQUAL_FLOPS.values()} for n in (0, 1))
  on_c = [two[f"kernel_{name}"] for name in ("megabyte", "transformer", "perceiver", "windowed")]
  books_two = [two[f"library_{name}"] for name in ("transformer", "windowed", "megabyte", "perceiver")]
  books_one = [one[f"library_{name}"] for name in ("windowed", "megabyte", "transformer")]
  assert [on_c, books_two, books_one] == [sorted(bits) for bits in (on_c, books_two, books_one)]  # as said
  images = [one["image64_megabyte"], *(two[f"image64_{name}"] for name in ("transformer", "perceiver"))]
  assert images == sorted(images)
  behind = f"{float(images[0]) - float(one['image64_windowed']):.3f}"
  mark = "](docs/results.md#equal-training-flops)"
  assert_shows(README, f"[1e17 training FLOPs{mark}", *on_c)
  assert_shows(README, f"[books{mark}", *books_two, *images, behind)
  first, *_ = passages(RESULTS.partition("## Equal training FLOPs\n")[2])
  bits = [number for number in numbers(first) if len(number.partition(".")[2]) == 3]
  assert bits == [*on_c, *books_two, *books_one, *images, behind]
  by = [f"{float(other) - float(on_c[0]):.3f}" for other in on_c[1:]]
  assert_shows(RESULTS.partition("**Contents**")[0], "1e17", *by)
  four = [result(f"recipe/{name}_megabyte_1e17")["bpb_by_method"]["both"] for name in ("kernel", "library")]
  assert_shows(RESULTS, "**Four passes.**", *(f"{bits:.3f}" for bits in four))


def test_three_times_the_flops():
  others = ("transformer", "perceiver", "windowed")
  tiers = ("3e17", "1e17")
  bits = {(name, tier): passes_of(f"kernel_{name}", tier) for name in ("megabyte", *others) for tier in tiers}

  def ahead(name, tier, passes):
    return f"{float(bits[name, tier][passes - 1]) - float(bits['megabyte', tier][passes - 1]):.3f}"

  runs = [result(f"recipe/kernel_{name}_3e17") for name in ("megabyte", *others)]
  epochs = [f"{run['train_bytes'] / run['corpus_bytes']:.1f}" for run in runs]
  by_two = [ahead(name, tier, 2) for name in others for tier in tiers]
  by_one = [ahead(name, tier, 1) for name in ("transformer", "windowed") for tier in tiers]
  assert all(larger > smaller for larger, smaller in zip(by_two[::2], by_two[1::2], strict=True))  # as said
  assert_shows(RESULTS, "**Three times the FLOPs.**", *by_two, *by_one, *epochs)
  two = [bits[name, "3e17"][1] for name in ("megabyte", *others)]
  assert_shows(README, "[1e17 training FLOPs](docs/results.md#equal-training-flops)", *two)
  to_transformer, to_perceiver, to_windowed = by_two[::2]
  said = f"At 3e17 it is ahead by {to_transformer}, {to_perceiver} and {to_windowed}"
  assert said in " ".join(RESULTS.partition("**Contents**")[0].split())


def test_sizes_and_outputs_at_equal_training_flops():
  one_pass = {name: bits_of(f"kernel_{name}_1e17") for name in ("transformer", "windowed", "megabyte")}
  others = {name: bits_of(f"kernel_{name}_wider_1e17") for name in ("transformer", "windowed")}
  smaller = [f"{one_pass[name] - others[name]:.3f}" for name in others]
  assert_shows(RESULTS, "**Sizes.**", *smaller)
  assert_shows(RESULTS, "**Outputs.**", f"{one_pass['megabyte'] - bits_of('kernel_megabyte_tied_1e17'):.4f}")
  larger = [
    bits_of(f"{corpus}_megabyte_{size}") - bits_of(f"{corpus}_megabyte{smallest}")
    for corpus, size, smallest in (
      ("kernel", "deeper_1e17", "_tied_1e17"),
      ("kernel", "wider_1e17", "_tied_1e17"),
      ("library", "deeper", ""),
    )
  ]
  first, *_ = passages(RESULTS.partition("## Other sizes and fewer FLOPs\n")[2])
  assert [number for number in numbers(first) if number.startswith("0.")] == [f"{bits:.3f}" for bits in larger]


def test_another_seed_at_equal_training_flops():
  bits = [b for name in ("megabyte", "transformer") for b in passes_of(f"kernel_{name}_seed1")]
  assert_shows(RESULTS, "**Seeds.**", *bits)


def test_patches_of_photographs():
  worse = bits_of("image64_megabyte_patch6_1e17") - bits_of("image64_megabyte_1e17")
  assert_shows(RESULTS, "[those of 12](#equal-training-flops)", f"{worse:.3f}")


@pytest.mark.parametrize(
  ("context", "suffix"), [(4096, ""), (8192, ""), (32768, ""), (131072, ""), (32768, "_window"), (131072, "_window")]
)
def test_contexts(context, suffix):
  name = f"recipe/kernel_megabyte_context_{context}{suffix}_3e16"
  run = result(name)
  assert run["spacebyte_flops_per_byte"] * run["train_bytes"] == pytest.approx(3e16, rel=1e-3)
  model = run["config"]["model"]
  assert [model["context"], model["levels"][0]["attention_window"]] == [context, 1024 if suffix else 0]
  at_300 = next(bits for step, bits, _ in run["curve"] if step == 300)
  methods = run["bpb_by_method"]
  at_the_end = [bits for step, bits, _ in run["curve"] if step % 50 == 0][-1]
  bits = [at_300, at_the_end, methods["basic"], methods.get("sliding")]
  label = f"[{context:,}{', window' if suffix else ''}](results/{name}.json)"
  cells = [f"{1024 if suffix else context // 4:,}", f"{run['train_bytes'] / 1e6:.0f} MB"]
  assert row(RESULTS, label) == [*cells, *(f"{b:.3f}" if b else "-" for b in bits)]
  first, *_ = passages(RESULTS.partition("## Longer contexts\n")[2])
  assert f"{methods['basic']:.3f}" in numbers(first)


def test_epochs_at_equal_training_flops():
  said = []
  for corpus in SCORED:
    for name in ("megabyte", "windowed", "transformer", "perceiver"):
      if f"{corpus}_{name}" in EQUAL_FLOPS.values():
        run = result(f"recipe/{corpus}_{name}_1e17")
        said.append(f"{run['train_bytes'] / run['corpus_bytes']:.1f}")
  assert numbers(passage(RESULTS, "**Epochs.**")) == said


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
