"""Every command in README.md and the documents is run by a test, here in a small variant or where RUN_BY says.

But for those of NOT_RUN, which need a network of their own, another device, or all of CI.
"""

import gzip
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from processes import free_port
from record_files import write_parquet
from run_commands import ROOT, XLA_FLAGS, run_each

DOCUMENTS = (
  "README.md",
  "CONTRIBUTING.md",
  "launch/README.md",
  "benchmarks/README.md",
  *(f"docs/{n}.md" for n in ("comparisons", "data", "from_python", "running", "scaling")),
  *(f"docs/{n}.md" for n in ("start_with_your_texts", "reproduce_a_row", "plan_a_pod")),
)
COMMAND = re.compile(r"(?:\w+=\S+ )*(?:python|pytest|pip|ruff|mypy|\.ci/)\b.*")
TINY_IMAGES = [  # the small images that both image models are given, and what shrinks them
  "--config.num_steps=2",
  "--config.batch_size=1",
  "--config.sample_bytes=0",
  "--config.model.levels[0].num_layers=1",
  "--config.model.levels[0].num_heads=2",
  "--config.model.levels[1].num_layers=1",
  "--config.model.levels[1].width=16",
  "--config.model.levels[1].num_heads=2",
]
TINY_IMAGE64 = [
  *TINY_IMAGES,
  "--config.accumulate=1",
  "--config.model.levels[0].width=48",
  "--config.data.train=runs/photos",
]
PHOTO = ["--data=runs/photos", "--max-bytes=12288"]
TEXT = "megabyte_jax/data/sample/text/validation/pride_and_prejudice_last_tenth.txt"
# What is added to a command to make it small. Those that name no config get tests/tiny_config.py:1. In this order.
RUN_HERE = {
  "python train.py": [],
  "python train.py --workdir=runs/pages --config.data.train='docs/*.md' --config.data.validation=README.md": [
    "--config.eval.max_bytes=200",
  ],
  "python train.py --init_from=runs/pages --workdir=runs/tuned --config.data.train='docs/*.md' "
  "--config.data.validation=README.md --config.model.context=512": ["--config.batch_size=1"],
  "python eval.py --workdir=runs/pages --data=CONTRIBUTING.md": ["--max-bytes=500", "--no-compressors"],
  "python train.py --config=configs/quickstart_images.py --workdir=runs/images": [
    *TINY_IMAGES,
    "--config.model.levels[0].width=48",
    "--config.data.train=runs/photos",
    "--config.data.validation=",
  ],
  "python eval.py --workdir=runs/images --data=sample:images/validation": ["--max-bytes=12288", "--no-compressors"],
  'python -m megabyte_jax generate --workdir=pretrained:books --prompt="Late at night" --bytes=400 --temperature=0.7': [
    "--bytes=20"
  ],
  'python -m megabyte_jax generate --workdir=runs/quickstart --prompt="It is a truth" --bytes=400 --temperature=0.7': [
    "--bytes=20"
  ],
  "python -m megabyte_jax generate --workdir=runs/images --num-samples=8 --output=runs/out.png "
  "--prompt-file=megabyte_jax/data/sample/images/validation/flower.jpg": ["--num-samples=2", "--keep=0.9"],
  "python -m megabyte_jax compress LICENSE runs/license.mz --workdir=pretrained:books": ["--window=64"],
  "python -m megabyte_jax compress --decompress runs/license.mz runs/license.txt --workdir=pretrained:books": [],
  f"python -m megabyte_jax compress {TEXT} runs/text.mz --workdir=runs/quickstart": [],
  "python -m megabyte_jax compress --decompress runs/text.mz runs/text.txt --workdir=runs/quickstart": [],
  "python -m megabyte_jax tables 5": [],
  "python -m megabyte_jax tables figure3 --plot=runs/figure3.png": [],
  "python train.py --config=configs/paper/table5.py:image640_megabyte --workdir=runs/image640": [
    *TINY_IMAGES,
    "--config.model.levels[0].width=192",
    "--config.model.context=12288",
    "--config.data.train=runs/photos",
    "--config.data.validation=",
    "--config.data.image_size=64",
  ],
  "python train.py --workdir=runs/sharded --config.mesh.data=1 --config.mesh.seq=1 --config.mesh.fsdp=-1 "
  "--config.batch_size=8": [],
  "python train.py --workdir=runs/a --config.eval.every_steps=500 --config.checkpoint.keep_best=1": [
    "--config.eval.every_steps=6",
    "--config.data.validation=CHANGELOG.md",
    "--config.data.test=CHANGELOG.md",
    "--config.eval.max_bytes=200",
  ],
  "python eval.py --workdir=runs/a --step=best --split=test": ["--max-bytes=200", "--no-compressors"],
  "python -m megabyte_jax generate --workdir=runs/a --step=best": ["--bytes=20"],
  "python train.py --workdir=runs/web --config.data.train='corpora/web/*.parquet' "
  "--config.data.validation=corpora/held_out.jsonl.zst": ["--config.data.cache_dir=runs/cache"],
  "python eval.py --workdir=runs/web --data='corpora/books.jsonl#body'": ["--no-compressors"],
  "python eval.py --workdir=runs/web --data=hf:corpora/saved:test": ["--no-compressors"],
  "python eval.py --workdir=runs/web --data=corpora/notes.txt.gz": ["--no-compressors"],
  "python eval.py --workdir=runs/web --data=corpora/notes.txt.gz --raw": ["--no-compressors"],
  "python eval.py --workdir=runs/web --data='corpora/books.jsonl#body,corpora/notes.txt.gz'": ["--no-compressors"],
  "python -m megabyte_jax prepare pack 'corpora/web/*.jsonl.zst' corpora/packed": [],
  "python eval.py --workdir=pretrained:books --data=sample:text/validation --max-bytes=20000": ["--max-bytes=50"],
  "python train.py --workdir=runs/novels --config.data.train=sample:text/train "
  "--config.data.validation=sample:text/validation": [
    "--config.data.train=docs/data.md",
    "--config.data.validation=CHANGELOG.md",
  ],
  'python -m megabyte_jax generate --workdir=runs/novels --prompt="It was " --bytes=400 --temperature=0.7': [
    "--bytes=20"
  ],
  "python -m megabyte_jax compress README.md runs/readme.mz --workdir=runs/novels": [],
  "python -m megabyte_jax compress --decompress runs/readme.mz runs/readme.md --workdir=runs/novels": [],
  "python train.py --config=configs/recipe.py:megabyte:4:256x4:192x5+modern --init_from=pretrained:books "
  "--workdir=runs/tuned_books --config.data.train=sample:text/train --config.data.validation=sample:text/validation "
  "--config.batch_size=4 --config.num_steps=100 --config.log_every=5 --config.optimizer.warmup_steps=10 "
  "--config.optimizer.learning_rate=1e-3": [
    "--config.data.validation=",
    "--config.model.context=64",
    "--config.batch_size=1",
    "--config.num_steps=2",
    "--config.optimizer.warmup_steps=1",
  ],
  "python train.py --config=configs/small.py:table5:image64_megabyte@4 --workdir=runs/table5/image64_megabyte "
  "--config.data.train=data/image64/train --config.data.validation=data/image64/validation --config.num_steps=5425 "
  "--config.optimizer.warmup_steps=216 --config.optimizer.learning_rate=9e-4": [
    *TINY_IMAGE64,
    "--config.data.validation=",
  ],
  "python eval.py --workdir=runs/table5/image64_megabyte --max-bytes=10000000": PHOTO,
  "CUDA_VISIBLE_DEVICES=$i python train.py --config=configs/small.py:table5:image64_megabyte@4 "
  "--workdir=runs/sweep/${rates[i]} --config.optimizer.learning_rate=${rates[i]} "
  "--config.data.train=data/image64/train --config.data.validation= --config.num_steps=1085 "
  "--config.optimizer.warmup_steps=43": TINY_IMAGE64,
  "python eval.py --workdir=runs/sweep/$rate --data=data/image64/validation --max-bytes=10000000": PHOTO,
  "XLA_FLAGS=--xla_gpu_enable_triton_gemm=false python train.py ...": ["--workdir=runs/flag1"],
  "XLA_FLAGS=--xla_gpu_deterministic_ops=true python train.py ...": ["--workdir=runs/flag2"],
  "python train.py --coordinator=HOST:PORT --num_processes=N --process_id=I ...": [
    f"--coordinator=localhost:{free_port()}",
    "--num_processes=1",
    "--process_id=0",
    "--workdir=runs/flag3",
  ],
}
# Those of RUN_HERE that a slow test runs, as other tests do nearly the same: in this order, after the others.
_SLOW = re.compile(
  r"--init_from=|runs/pages|image64|LICENSE|license|runs/text\.|runs/sharded|runs/a\b|XLA_FLAGS|--coordinator"
)
RUN_SLOWLY = [command for command in RUN_HERE if _SLOW.search(command)]
RUN_QUICKLY = [command for command in RUN_HERE if command not in RUN_SLOWLY]
# Command, or its beginning: the file whose tests run it, or which is itself run, and what must be found there.
# Those of benchmarks are slow tests, which .ci/slow runs and .ci/run does not.
RUN_BY = {
  "pip install -r requirements.txt": (".ci/run", "pip install -q -r requirements.txt"),
  'pip install -e ".[test]"': (".ci/run", 'pip install -q -e ".[test]"'),
  "pytest": (".ci/run", "pytest -q"),
  "ruff": (".ci/run", "ruff check .; ruff format --check ."),
  "mypy": (".ci/run", "mypy"),
  ".ci/plan": (".ci/run", ".ci/plan"),
  "python -m venv .venv": (".ci/run", '-m venv "$work/venv"'),
  'pip install "jax[tpu]"': (".ci/plan", '"jax[tpu]"'),
  "python -m megabyte_jax plan": (
    "tests/planning/test_plans.py",
    "def test_search_over_two_slices_ends_with_the_real_program",
  ),
  "python -m megabyte_jax --help": ("tests/commands/test_commands.py", '["--help"]'),
  "python -m megabyte_jax export": ("tests/checkpoints/test_exported.py", "export.main"),
  "python benchmarks/file_compression.py": ("tests/benchmarks/test_file_compression.py", "benchmark.main("),
  "python -m megabyte_jax matching": ("tests/planning/test_matching.py", "def test_command_line"),
  "python benchmarks/subword_systems.py": ("tests/benchmarks/test_subword_systems.py", "benchmark.main("),
  "python benchmarks/comparisons.py": ("tests/benchmarks/test_comparisons.py", "def test_a_small_comparison"),
  "python benchmarks/": ("tests/benchmarks/test_speed_benchmarks.py", 'f"benchmarks/{name}.py"'),
  "python benchmarks/scaling.py": ("tests/benchmarks/test_speed_benchmarks.py", "benchmarks/scaling.py"),
  "python benchmarks/input_pipeline.py": ("tests/benchmarks/test_speed_benchmarks.py", "benchmarks/input_pipeline.py"),
  "python benchmarks/corpora/build.py": (
    "tests/benchmarks/test_corpora.py",
    "def test_another_result_of_the_recorded_packages",
  ),
  "python -m megabyte_jax prepare build": (
    "tests/data/test_tfrecords.py",
    "def test_a_data_set_that_nobody_knows_is_one_line",
  ),
  "python -m megabyte_jax prepare convert": (
    "tests/data/test_tfrecords.py",
    "def test_tfrecord_copies_are_converted",
  ),
  "python -m megabyte_jax prepare pack": ("tests/data/test_prepare.py", "def test_archives_are_packed"),
  "python -m megabyte_jax prepare tokenizer": ("tests/data/test_subwords.py", '"tokenizer"'),
  "python train.py --workdir=runs/subwords": ("tests/training/test_subword_models.py", "train.train("),
  "python -m megabyte_jax prepare verify": ("tests/data/test_prepare.py", '"verify"'),
  "python train.py ...": ("tests/parallel/test_launch.py", "def test_tpu_vm"),
}
NOT_RUN = (
  ".ci/run",
  ".ci/slow",
  "pip install .",
  'pip install -e ".[',
  'pip install -U "jax[',
  "pip install -e . jupyterlab",
  "pip install -e .",
  "JAX_PLATFORMS=cuda pytest",
)


def documented() -> dict[str, list[str]]:
  """{command: the documents that have it}, from blocks of code and from code between words."""
  found: dict[str, list[str]] = {}
  for name in DOCUMENTS:
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in re.sub(r" *\\\n *", " ", block).splitlines()]
    words = re.findall(r"`([^`]+)`", re.sub(r"```\w*\n.*?```", "", text, flags=re.S))
    for part in (part for code in (*lines, *words) for part in re.split(r" && |;|  +#| &> | &$", code)):
      command = re.sub(r"-m megabyte_jax\.(?=\w)", "-m megabyte_jax ", " ".join(part.split()))  # the first spelling
      if COMMAND.fullmatch(command):
        found.setdefault(command, []).append(name)
  return found


def run_by(command: str) -> str | None:
  """The longest beginning of the command that RUN_BY or NOT_RUN has."""
  return max((begin for begin in (*RUN_BY, *NOT_RUN) if command.startswith(begin)), key=len, default=None)


def test_every_command_is_run_somewhere():
  commands = documented()
  nowhere = [c for c in commands if c not in RUN_HERE and run_by(c) is None]
  assert not nowhere, f"add these commands to RUN_HERE or RUN_BY: {nowhere}"
  assert set(RUN_HERE) <= set(commands), "a command here is no longer documented"
  unused = {*RUN_BY, *NOT_RUN} - {run_by(c) for c in commands if c not in RUN_HERE}
  assert not unused, f"no documented command begins like this: {unused}"


@pytest.mark.parametrize("begin", RUN_BY)
def test_the_other_place_is_there(begin):
  path, needed = RUN_BY[begin]
  assert needed in (ROOT / path).read_text()


def small(command: str, more: list[str], folder: pathlib.Path) -> tuple[list[str], dict[str, str]]:
  """The arguments of the small variant, and its environment variables; everything written lies in `folder`."""
  command = command.replace("$i ", "0 ").replace("${rates[i]}", "9e-4").replace("$rate ", "9e-4 ")
  words = shlex.split(re.sub(r" \S+=(HOST:PORT|N|I)\b| \.\.\.$", "", command))
  variables = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"} | dict(w.split("=", 1) for w in words[: words.index("python")])
  if "XLA_FLAGS" in variables:
    variables["XLA_FLAGS"] += " " + XLA_FLAGS
  given = words[words.index("python") + 1 :]
  replaced = {argument.partition("=")[0] for argument in more}
  arguments = [*(argument for argument in given if argument.partition("=")[0] not in replaced), *more]
  if arguments[0] == "train.py" and not any(a.startswith("--config=") for a in arguments):
    arguments.insert(1, "--config=tests/tiny_config.py:1")
    if not any(a.startswith("--workdir=") for a in arguments):
      arguments.append("--workdir=runs/quickstart")
  return [re.sub(r"(?<![\w/.])(runs|corpora)/", rf"{folder}/\1/", a) for a in arguments], variables


def write_corpora(folder: pathlib.Path) -> None:
  """The files of docs/data.md, small."""
  datasets, zstandard = pytest.importorskip("datasets"), pytest.importorskip("zstandard")
  (folder / "web").mkdir(parents=True)
  texts = ["a sentence of a page. " * 20, "another one, which is longer. " * 20]
  lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
  write_parquet(folder / "web" / "0.parquet", texts)
  (folder / "held_out.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
  (folder / "web" / "0.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
  (folder / "books.jsonl").write_bytes(lines.replace(b'"text"', b'"body"'))
  (folder / "notes.txt.gz").write_bytes(gzip.compress(b"notes " * 50))
  datasets.disable_progress_bars()
  datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": texts})}).save_to_disk(str(folder / "saved"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("documented")
  (folder / "runs/photos").mkdir(parents=True)
  write_corpora(folder / "corpora")
  images = pathlib.Path("megabyte_jax/data/sample/images/train")
  (folder / "runs/photos/china.jpg").write_bytes((ROOT / images / "china.jpg").read_bytes())
  program = re.search(r"```python\n(.*?)```", (ROOT / "docs/from_python.md").read_text(), re.S)[1]
  for long, short in {"8192": "64", "512": "64", "256": "32"}.items():
    program = program.replace(long, short)
  (folder / "from_python.py").write_text(program)
  return folder


def run_all(
  commands: list[str], folder: pathlib.Path, outputs: str, **programs: list[str]
) -> dict[str, tuple[int, str]]:
  """{command: exit code, what it printed} of the small variants, and of programs by name."""
  names = {str(number): command for number, command in enumerate(commands)}
  small_ones = {name: small(command, RUN_HERE[command], folder) for name, command in names.items()}
  done = run_each(small_ones | programs, folder / outputs)
  return {names.get(name, name): result for name, result in done.items()}


@pytest.fixture(scope="module")
def said(folder):
  return run_all(RUN_QUICKLY, folder, "quick", python=[str(folder / "from_python.py")])


@pytest.fixture(scope="module")
def said_slowly(folder, said):
  return run_all(RUN_SLOWLY, folder, "slow")


@pytest.mark.parametrize("command", RUN_QUICKLY)
def test_it_runs(said, command):
  code, output = said[command]
  assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("command", RUN_SLOWLY)
def test_it_runs_too(said_slowly, command):
  code, output = said_slowly[command]
  assert code == 0, output


def test_the_program_of_from_python(said):
  code, output = said["python"]
  assert code == 0, output
  bits, sample = output.split("\n", 1)
  assert 7 < float(bits) < 9 and len(sample) > 50


def test_they_do_what_the_text_says(said, folder):
  assert (folder / "runs/readme.md").read_bytes() == (ROOT / "README.md").read_bytes()
  assert (folder / "runs/out.png").read_bytes().startswith(b"\x89PNG")
  assert "(P 192)" in said["python -m megabyte_jax tables 5"][1]
  evaluated = "python eval.py --workdir=runs/web --data="
  text, raw = (said[f"{evaluated}corpora/notes.txt.gz{flag}"][1].splitlines()[-1] for flag in ("", " --raw"))
  assert json.loads(text)["bytes"] == 300 and json.loads(raw)["bytes"] < 100
  both = json.loads(said[f"{evaluated}'corpora/books.jsonl#body,corpora/notes.txt.gz'"][1].splitlines()[-1])
  assert [one["documents"] for one in both["sources"]] == [2, 1] and both["bytes"] == 440 + 600 + 300
  assert json.loads(said[f"{evaluated}hf:corpora/saved:test"][1].splitlines()[-1])["bytes"] == 440 + 600
  assert (
    "2 documents, 1,040 bytes"
    in said["python -m megabyte_jax prepare pack 'corpora/web/*.jsonl.zst' corpora/packed"][1]
  )


@pytest.mark.slow
def test_the_slow_ones_do_what_the_text_says(said_slowly, folder):
  mine = said_slowly["python eval.py --workdir=runs/pages --data=CONTRIBUTING.md"][1]
  assert json.loads(mine.splitlines()[-1])["bytes"] == 500
  assert (folder / "runs/text.txt").read_bytes() == (ROOT / TEXT).read_bytes()
  assert (folder / "runs/license.txt").read_bytes() == (ROOT / "LICENSE").read_bytes()
  assert (folder / "runs/a/checkpoints/validation_bpb.json").exists()
  assert np.isfinite(json.loads((folder / "runs/image640/metrics.jsonl").read_text().splitlines()[0])["bpb"])
