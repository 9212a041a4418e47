"""What the commands say when something is wrong: one line, no traceback, and an exit code other than 0."""

import dataclasses
import re

import pytest
from run_commands import run_each

from megabyte_jax.config import Config

TINY = "--config=tests/tiny_config.py"

DATA = "--config.data.train"

# name: (arguments, exit code, pattern); FOLDER stands for a folder with the files of `folder` below
CASES = {
  "unknown flag": (
    ["train.py", "--confg=x"],
    2,
    r"unknown flag --confg; did you mean --config\? \(see python train\.py --help\)$",
  ),
  "a key without --config": (
    ["train.py", "--learning-rate=3"],
    2,
    r"unknown flag --learning-rate; did you mean --config\.optimizer\.learning_rate\? \(see",
  ),
  "a group without --config": (
    ["train.py", "--data=x"],
    2,
    r"unknown flag --data; did you mean --config\.data\.train\?",
  ),
  "another group without --config": (["train.py", "--mesh=x"], 2, r"did you mean --config\.mesh\.KEY\?"),
  "part of a key": (["train.py", "--steps=3"], 2, r"did you mean --config\.num_steps\?"),
  "unknown key": (
    ["train.py", "--config.nokey=1"],
    2,
    r"no such key: --config\.nokey=1; there are accumulate, batch_size, .*seed",
  ),
  "misspelt key": (
    ["train.py", TINY, "--config.seed=1", "--config.batch_sise=4"],
    2,
    r"no such key: --config\.batch_sise=4; did you mean --config\.batch_size\?",
  ),
  "misspelt key of a level": (
    ["train.py", TINY, "--config.model.levels[0].num_layer=3"],
    2,
    r"no such key: --config\.model\.levels\[0\]\.num_layer=3; did you mean --config\.model\.levels\[0\]\.num_layers\?",
  ),
  "no such level": (
    ["train.py", "--config.model.levels[5].num_layers=3"],
    2,
    r"no such key: --config\.model\.levels\[5\]\.num_layers=3",
  ),
  "wrong type": (
    ["train.py", "--config.batch_size=abc"],
    2,
    r"--config\.batch_size must be a whole number, not 'abc'$",
  ),
  "wrong type of number": (
    ["train.py", "--config.optimizer.learning_rate=x"],
    2,
    r"--config\.optimizer\.learning_rate must be a number, not 'x'$",
  ),
  "wrong type of choice": (
    ["train.py", "--config.model.levels[0].rotary=2"],
    2,
    r"--config\.model\.levels\[0\]\.rotary must be True or False, not '2'$",
  ),
  "wrong type of a flag": (
    ["train.py", "--start_timeout=x"],
    2,
    r"--start_timeout must be a whole number, not 'x' \(see",
  ),
  "missing value": (
    ["train.py", "--workdir=FOLDER/new", "--config.batch_size"],
    2,
    r"Missing value for flag --config\.batch_size",
  ),
  "override first": (["train.py", "--config.seed=1", TINY], 2, r"--config\.seed=1 in argv before a value for --config"),
  "positional": (["train.py", "configs/quickstart.py"], 2, r"unexpected configs/quickstart\.py; flags begin with --"),
  "no config file": (["train.py", "--config=nothing.py"], 2, r"No such file or directory: 'nothing\.py'$"),
  "a config file that is not Python": (["train.py", "--config=README.md"], 2, r"--config: README\.md, line 3: "),
  "a config file without a config": (
    ["train.py", "--config=megabyte_jax/config/run.py"],
    2,
    r"has no attribute 'get_config'; a config file has a function get_config\(\)$",
  ),
  "matching: no config file": (
    ["-m", "megabyte_jax", "matching", TINY.replace("config", "reference", 1), "--candidate=configs/no.py"],
    2,
    r"error: --candidate: No such file or directory: 'configs/no\.py'",
  ),
  "matching: a config file that is not Python": (
    ["-m", "megabyte_jax", "matching", "--candidate=README.md"],
    2,
    r"error: --candidate: README\.md, line 3: ",
  ),
  "matching: a config file without a config": (
    ["-m", "megabyte_jax", "matching", "--candidate=megabyte_jax/config/run.py"],
    2,
    r"error: --candidate: module .* has no attribute 'get_config'",
  ),
  "no name of a config file": (["train.py", "--config="], 2, r"--config: .* empty string"),
  "misspelt config file": (
    ["train.py", "--config=configs/smal.py"],
    2,
    r"No such file or directory: 'configs/smal\.py'; did you mean configs/small\.py\?",
  ),
  "a row of a file without rows": (
    ["train.py", "--config=configs/quickstart.py:x"],
    2,
    r"this config file has one config: leave out the colon",
  ),
  "no row": (["train.py", "--config=configs/paper/table2.py:x"], 2, r"no row 'x' in this file; choose one of pg19_"),
  "misspelt row": (
    ["train.py", "--config=configs/paper/table2.py:bookz_megabyte"],
    2,
    r"no row 'bookz_megabyte' in this file; did you mean books_megabyte\? All are pg19_",
  ),
  "no row of the small ones": (
    ["train.py", "--config=configs/small.py:table2:books_megabite"],
    2,
    r"no row 'books_megabite' in table2; did you mean books_megabyte\? All are pg19_",
  ),
  "a row without its table": (
    ["train.py", "--config=configs/small.py:books_megabyte"],
    2,
    r"'books_megabyte' names no row; write TABLE:ROW, such as table2:books_megabyte \(",
  ),
  "a table without its row": (
    ["train.py", "--config=configs/small.py:table5"],
    2,
    r"'table5' names no row; write TABLE:ROW, such as table5:",
  ),
  "misspelt table": (
    ["train.py", "--config=configs/small.py:tabel2:books_megabyte"],
    2,
    r"there is no table 'tabel2' in configs/paper; did you mean table2\? All are audio, table10",
  ),
  "a method that does not fit": (
    ["train.py", "--config=configs/small.py:table2:books_transformer", "--config.eval.method=strided"],
    1,
    r"strided",
  ),
  "recordings without a rate": (
    ["train.py", "--config=configs/quickstart_audio.py", "--config.data.sample_rate=0"],
    1,
    r"sample_bytes of audio needs data\.sample_rate",
  ),
  "config without return": (
    ["train.py", "--config=FOLDER/no_return.py"],
    2,
    r"get_config\(\) of .* must return Config",
  ),
  "misspelt field": (
    ["train.py", "--config=FOLDER/misspelt.py"],
    2,
    r"keyword argument 'widht'(\. Did you mean 'width'\?)? \(FOLDER/misspelt\.py, line 4\)$",  # from Python 3.13 on
  ),
  "impossible value": (["train.py", TINY, "--config.batch_size=0"], 1, r"batch_size is 0; it must be at least 1"),
  "mesh": (["train.py", TINY, "--config.mesh.data=3"], 1, r"does not fit 1 devices: the sizes must multiply to 1"),
  "no data": (["train.py", TINY, f"{DATA}=FOLDER/nothing"], 1, r"FOLDER/nothing does not exist; name a file, a folder"),
  "no sample data": (["train.py", TINY, f"{DATA}=sample:txt"], 1, r"no sample data 'sample:txt'; there are .*sample:"),
  "empty data": (["train.py", TINY, f"{DATA}=FOLDER/empty"], 1, r"FOLDER/empty is empty; remove it"),
  "empty folder": (["train.py", TINY, f"{DATA}=FOLDER/folder"], 1, r"no files in folder FOLDER/folder"),
  "short data": (["train.py", TINY, f"{DATA}=FOLDER/short"], 1, r"20 bytes, fewer than the context of 32; give more"),
  "no validation data": (
    ["train.py", TINY, "--config.data.validation=FOLDER/nothing"],
    1,
    r"FOLDER/nothing does not exist",
  ),
  "workdir below a file": (
    ["train.py", TINY, "--workdir=FOLDER/short/run"],
    1,
    r"--workdir=FOLDER/short/run: FOLDER/short is a f",
  ),
  "prepare: folder below a file": (
    ["-m", "megabyte_jax", "prepare", "pack", "docs", "FOLDER/short/packed"],
    1,
    r"=FOLDER/short/packed: FOLDER/short is a file, not a folder; choose another ",
  ),
  "tables: picture below a file": (
    ["-m", "megabyte_jax", "tables", "figure3", "--plot=FOLDER/short/figure3.png"],
    1,
    r"--plot=FOLDER/short/figure3\.png: FOLDER/short is a file, not a folder; choose another --plot$",
  ),
  "plan: result below a file": (
    ["-m", "megabyte_jax", "plan", TINY, "--save=FOLDER/short/step"],
    1,
    r"--save=FOLDER/short/step: FOLDER/short is a file, not a folder; choose another --save$",
  ),
  "compress: no such file": (
    ["-m", "megabyte_jax", "compress", "FOLDER/x", "FOLDER/y"],
    1,
    r"FOLDER/x does not exist$",
  ),
  "no such run to start from": (["train.py", TINY, "--init_from=FOLDER/folder"], 1, r"FOLDER/folder holds no run"),
  "plan: no such remat": (
    ["-m", "megabyte_jax", "plan", "--remat=most"],
    2,
    r"--remat: invalid choice: 'most' \(choose from .*none.*full.*named",
  ),
  "generate: fewer than no bytes": (
    ["-m", "megabyte_jax", "generate", "--bytes=-1"],
    1,
    r"--bytes is -1; it must not be",
  ),
  "generate: too many bytes": (
    ["-m", "megabyte_jax", "generate", f"--bytes={2**31}"],
    1,
    r"--bytes is 2147483648; it must be at most 2147483647$",
  ),
  "generate: far too many samples": (
    ["-m", "megabyte_jax", "generate", f"--num-samples={10**20}"],
    2,
    r"--num-samples: 10{20} is too large a number \(see",
  ),
  "generate: a seed that is none": (
    ["-m", "megabyte_jax", "generate", "--seed=4294967296"],
    1,
    r"--seed is 4294967296; it must be between -2147483648 and 4294967295$",
  ),
  "an infinite learning rate": (
    ["train.py", TINY, "--config.optimizer.learning_rate=inf"],
    1,
    r"optimizer\.learning_rate is inf; it must be finite$",
  ),
  "a flag given twice": (
    ["train.py", TINY, "--config=configs/quickstart.py", "--config.num_steps=2"],
    2,
    r"--config is given twice; leave one out",
  ),
  "no time to wait": (["train.py", TINY, "--start_timeout=0"], 1, r"--start_timeout is 0; it must be at least 1"),
  "generate: no samples": (
    ["-m", "megabyte_jax", "generate", "--num-samples=0"],
    1,
    r"--num-samples is 0; it must be at",
  ),
  "eval: no picture": (
    ["eval.py", "--workdir=FOLDER/images", "--data=FOLDER/no.png"],
    1,
    r"no\.png is not a whole JPEG, PNG, WebP, GIF, TIFF, BMP or AVIF image \(cannot identify image file\)",
  ),
  "eval: no run": (["eval.py", "--workdir=FOLDER/folder"], 1, r"FOLDER/folder holds no run: .* give the --workdir"),
  "eval: no checkpoint": (["eval.py", "--workdir=FOLDER/run", "--split=train"], 1, r"no checkpoint in .*FOLDER/run"),
  "eval: no split": (
    ["eval.py", "--workdir=FOLDER/run", "--split=test"],
    1,
    r"config\.data\.test is empty; name a file",
  ),
  "eval: unknown split": (["eval.py", "--split=dev"], 2, r"invalid choice: 'dev' \(choose from .*validation"),
  "eval: no data": (["eval.py", "--workdir=FOLDER/run", "--data=FOLDER/x"], 1, r"FOLDER/x does not exist"),
  "eval: negative": (["eval.py", "--max-bytes=-1"], 1, r"--max-bytes is -1; it must not be negative"),
  "eval: unknown flag": (
    ["eval.py", "--wordir=x"],
    2,
    r"unknown flag --wordir; did you mean --workdir\? \(see python eval\.py --help\)$",
  ),
  "eval: a number that is none": (["eval.py", "--stride", "x"], 2, r"--stride must be a whole number, not 'x' \(see"),
  "train: hyphens are underscores": (
    ["train.py", "--num-processes=x"],
    2,
    r"--num_processes must be a whole number, not 'x'",
  ),
  "plan: unknown flag": (
    ["-m", "megabyte_jax", "plan", "--topolgy=x"],
    2,
    r"unknown flag --topolgy; did you mean --top",
  ),
  "generate: unknown flag": (
    ["-m", "megabyte_jax", "generate", "--nm_samples", "3"],
    2,
    r"unknown flag --nm-samples; did you mean --num-samples\? \(see python -m megabyte_jax generate --help\)$",
  ),
  "prepare: unknown flag of a subcommand": (
    ["-m", "megabyte_jax", "prepare", "pack", "a", "b", "--image-siez=3"],
    2,
    r"unknown flag --image-siez; did you mean --image-size\? \(see .*prepare pack --help\)$",
  ),
  "compress: one file too many": (
    ["-m", "megabyte_jax", "compress", "a", "b", "c"],
    2,
    r"unexpected c \(see .*compress",
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("errors")
  (folder / "empty").touch()
  (folder / "folder").mkdir()
  (folder / "short").write_text("twenty bytes of text")
  (folder / "no_return.py").write_text("def get_config():\n  pass\n")
  (folder / "misspelt.py").write_text(
    "from megabyte_jax.config import Level\n\ndef get_config():\n  return Level(widht=3)\n"
  )
  (folder / "run").mkdir()
  (folder / "no.png").write_text("no picture")
  return folder


@pytest.fixture(scope="module")
def said(folder):
  """{name: (exit code, what was printed)} of all cases."""
  import tiny_config  # noqa: PLC0415

  from megabyte_jax.checkpoints.saved_config import save_config  # noqa: PLC0415

  tiny = Config.from_dict(tiny_config.get_config())
  save_config(folder / "run", tiny)
  data = dataclasses.replace(tiny.data, form="image", image_size=4, image_tiles=4, scan="raster")
  save_config(folder / "images", dataclasses.replace(tiny, data=data))
  workdir = f"--workdir={folder / 'new'}"
  commands = {}
  for name, (arguments, *_) in CASES.items():
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    has_workdir = any(argument.startswith("--workdir") for argument in arguments)
    commands[name] = arguments + ([workdir] if arguments[0] == "train.py" and not has_workdir else [])
  return run_each(commands, folder / "outputs")


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line(said, folder, name):
  _, expected_code, pattern = CASES[name]
  code, output = said[name]
  assert code == expected_code, output
  assert "Traceback" not in output
  (error,) = [line for line in output.splitlines() if "error: " in line]
  assert re.search(pattern.replace("FOLDER", re.escape(str(folder))), error), output
  assert len(error) < 700 or "pg19_" in error


def test_nothing_is_left_in_the_work_directory(said, folder):
  left = [path for path in (folder / "new").rglob("*") if path.is_file()] if (folder / "new").exists() else []
  assert left == []
