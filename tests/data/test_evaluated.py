"""eval.py on data that are not plain: images whose number no batch divides, and items that are left out."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tfds_copies
import tiny_config
from PIL import Image
from processes import run
from run_commands import evaluate_command

from megabyte_jax.checkpoints.checkpoints import Checkpoints
from megabyte_jax.checkpoints.saved_config import save_config
from megabyte_jax.config import Config, DataConfig, EvalConfig
from megabyte_jax.data import files
from megabyte_jax.data.files import read_block
from megabyte_jax.data.open_data import open_path, open_source
from megabyte_jax.errors import ConfigError, DataError
from megabyte_jax.evaluation import report
from megabyte_jax.parallel.sharding import make_mesh
from megabyte_jax.training.state import initial_state

IMAGE = DataConfig(form="image", image_size=8, scan_patch=12)
BYTES = 8 * 8 * 3


def save_run(workdir, config):
  """A run that has taken no step yet."""
  state = initial_state(config, make_mesh(config.mesh))
  with Checkpoints(workdir, config.checkpoint) as checkpoints:
    checkpoints.save(1, state.parameters, state.opt_state, {"config": config.to_dict()})
  save_config(workdir, config)
  return workdir


@pytest.fixture(scope="module")
def run_on_images(tmp_path_factory):
  """(config, work directory) of a run on the eleven shipped photographs that has taken no step yet.

  Its model has one level, which is quick to compile.
  """
  folder, workdir = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("run")
  for photo in tfds_copies.PHOTOS:
    (folder / photo.name).write_bytes(tfds_copies.jpeg(photo, 20))
  config = Config.from_dict(tiny_config.get_config())
  model = dataclasses.replace(config.model, context=BYTES, levels=config.model.levels[:1])
  data = dataclasses.replace(IMAGE, train=str(folder), validation="", test=str(folder))
  config = dataclasses.replace(config, model=model, data=data, eval=EvalConfig(batch_size=4))
  save_run(workdir, config)
  return config, workdir


def expected_summary(per_byte):
  """Mean and standard error over images, from the nats of each byte."""
  bpb = np.load(per_byte).reshape(-1, BYTES).sum(axis=1, dtype=np.float64) / BYTES / math.log(2)
  return bpb.mean(), bpb.std(ddof=1) / math.sqrt(len(bpb))


def test_every_image_counts_once_whatever_the_batch(run_on_images, tmp_path, monkeypatch):
  _, workdir = run_on_images
  results = []
  for batch_size in (4, 11):
    per_byte = tmp_path / f"{batch_size}.npy"
    arguments = ["--workdir", workdir, "--split=test", f"--batch-size={batch_size}", "--per-byte-out", per_byte]
    _, result = evaluate_command(monkeypatch, *arguments)
    mean, error = expected_summary(per_byte)
    assert (result["images"], result["bytes"]) == (11, 11 * BYTES)
    assert result["mean_bpb"] == pytest.approx(mean, rel=1e-6) == pytest.approx(result["bpb"], rel=1e-6)
    assert result["standard_error"] == pytest.approx(error, rel=1e-5) and error > 0
    assert "skipped" not in result
    results.append(result)
  for other in results[1:]:
    assert other["nats"] == pytest.approx(results[0]["nats"], rel=1e-6)
  assert Image.open(workdir / "images_best.png").size == Image.open(workdir / "images_worst.png").size


def test_what_is_left_out_is_told(run_on_images, tmp_path, monkeypatch):
  config, workdir = run_on_images
  images = tmp_path / "images"
  images.mkdir()
  for photo in tfds_copies.PHOTOS[:2]:
    (images / photo.name).write_bytes(tfds_copies.jpeg(photo, 20))
  (images / "broken.png").write_bytes(b"no image")
  with pytest.raises(DataError, match=r"broken\.png is not a whole"):
    evaluate_command(monkeypatch, "--workdir", workdir, "--data", images)
  lines, result = evaluate_command(monkeypatch, "--workdir", workdir, "--data", images, "--skip-bad")
  assert result["skipped"] == 1 and result["images"] == 2
  assert f"2 documents of {images} (1 skipped)" in "\n".join(lines)

  data = dataclasses.replace(config.data, train=str(images), skip_bad=True)
  mesh = make_mesh(config.mesh)
  assert "bytes in 2 documents (1 skipped)\n" in report.describe_run(config, mesh, open_source(data, "train"), 0)
  assert "bytes in 11 documents\n" in report.describe_run(config, mesh, open_source(config.data, "train"), 0)


@pytest.mark.parametrize(
  ("train", "form", "told"),
  [
    ("images/train", "bytes", "--config.data.form=image reads pixels"),
    ("audio/train", "bytes", "--config.data.form=audio reads sound"),
    ("text/train", "bytes", ""),
    ("images/train,sample:text/train", "bytes", ""),
    ("images/train", "image", "scaled or cut to 64 x 64 pixels: 9 of 9 images looked at; compare bits"),
  ],
)
def test_pictures_and_recordings_that_are_read_as_bytes_are_told(train, form, told):
  config = Config.from_dict(tiny_config.get_config())
  config = dataclasses.replace(config, data=DataConfig(train=f"sample:{train}", form=form))
  text = report.describe_run(config, make_mesh(config.mesh), open_source(config.data, "train"), 0)
  notices = [line for line in text.splitlines() if line.startswith("notice")]
  assert len(notices) == bool(told) and told in "".join(notices)


def test_what_may_not_be_meant_is_told(tmp_path, monkeypatch):
  for name in ("a.txt", "notes.DOCX", "paper.pdf"):
    (tmp_path / name).write_bytes(b"words")
  config = Config.from_dict(tiny_config.get_config())

  def told(num_steps=1, **data):
    changed = dataclasses.replace(config, data=DataConfig(**data), num_steps=num_steps, batch_size=1)
    validation = open_source(changed.data, "validation") if changed.data.validation else None
    told = report.notices(changed, open_source(changed.data, "train"), validation)
    assert ("the warm-up of 5 steps is cut to the run's" in "".join(told)) == (num_steps < 5)
    return [line for line in told if not any(part in line for part in ("warm-up", "scored after the last step"))]

  not_text, scored = told(train=str(tmp_path), validation="sample:text/validation")
  assert "notes.DOCX, paper.pdf; move" in not_text and "scored on sample:text/validation" in scored
  assert told(train=f"{tmp_path}/a.txt", validation="") == []
  odd = "validation: not plain text, read as raw bytes: paper.pdf; move such files out, or convert them to text"
  assert told(train=f"{tmp_path}/a.txt", validation=f"{tmp_path}/paper.pdf") == [odd]
  for validation in (f"{tmp_path}/a.txt", f"{tmp_path}/../{tmp_path.name}"):
    assert "is trained on, too" in told(train=str(tmp_path), validation=validation)[-1]
  for train in (f"{tmp_path}/*.txt", f"{tmp_path}/../{tmp_path.name}/a.txt"):
    assert "is trained on, too" in told(train=train, validation=f"{tmp_path}/a.txt")[-1]
  assert told(train=f"{tmp_path}/*.txt", validation=f"{tmp_path}/paper.pdf") == [odd]
  (tmp_path / "held_out").mkdir()
  (tmp_path / "held_out/b.txt").write_bytes(b"other words")
  assert told(train=f"{tmp_path}/*", validation=f"{tmp_path}/held_out")[-1].startswith("not plain text")  # files alone
  assert "is trained on, too" in told(train=f"{tmp_path}/*/*.txt", validation=f"{tmp_path}/held_out")[-1]
  assert told(train="sample:text/train", validation="sample:text/validation") == []
  (tmp_path / ".hidden").mkdir()
  (tmp_path / ".hidden/c.txt").write_bytes(b"words")
  assert not any("too;" in line for line in told(train=str(tmp_path), validation=f"{tmp_path}/.hidden/c.txt"))
  monkeypatch.chdir(tmp_path)
  assert not any("too;" in line for line in told(train=".", validation="sample:text/validation"))
  (few,) = told(num_steps=100, train=f"{tmp_path}/a.txt", validation="")
  assert f"{100 * config.model.context / 5:,.0f} times" in few


def text_notices(spec, **data):
  data = DataConfig(**data)
  return report.data_notices(data, open_path(str(spec), data))


def write_all(folder, **files):
  folder.mkdir(exist_ok=True)
  for name, contents in files.items():
    (folder / name.replace("_", ".")).write_bytes(contents)


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
LATIN = "Stra\xdfe, caf\xe9\n".encode("latin1")


def test_files_among_texts_that_are_not_text_are_told_by_their_contents(tmp_path):
  texts, binary = tmp_path / "texts", tmp_path / "binary"
  write_all(texts, a_txt="Stra\xdfe \u4e2d".encode(), b_png=PNG, c=b"\x7fELF\2\1\1\0", x_pdf=b"words")
  write_all(texts, u_txt="text".encode("utf-16"), esc_txt=b"\x1b[1mbold\x1b[0m\n\xef\xbb\xbf")
  write_all(binary, a_bin=b"\0\1", b_exe=b"MZ\0", c_mp3=b"\xff\xfb\x90\x04\x01\xd2")
  told = "not plain text, read as raw bytes: x.pdf, b.png, c; move such files out, or convert them to text"
  assert text_notices(texts) == [told]
  assert text_notices(f"{texts}/*") == [told]
  assert report.data_notices(DataConfig(form="subwords", tokenizer="t"), open_path(str(texts), DataConfig())) == [told]
  assert text_notices(texts, raw=True) == []  # all bytes were asked for
  write_all(texts, d_png=PNG, e_bin=b"\xff\x80\3")
  assert "bytes: x.pdf, b.png, c and 2 more; move" in text_notices(texts)[0]
  assert text_notices(binary) == text_notices(f"{binary},{texts}/a.txt") == text_notices(texts / "b.png") == []
  write_all(binary, r_jsonl=b'{"text": "of a record"}\n')
  assert "bytes: a.bin, b.exe, c.mp3; move" in text_notices(binary)[0]


def test_files_that_are_not_in_utf8_are_told_with_a_remedy(tmp_path):
  write_all(tmp_path, a_txt=LATIN, c_txt=b"words", d_txt=b"x" * (1 << 14) + LATIN, e_txt=b"cut \xc3")
  remedy = "; if that is Latin-1, convert it: iconv -f latin1 -t utf-8 OLD > NEW"
  assert text_notices(tmp_path) == [f"not in UTF-8: a.txt, d.txt, e.txt{remedy}"]
  assert text_notices(tmp_path / "a.txt") == [f"not in UTF-8: a.txt{remedy}"]
  write_all(tmp_path, f_txt=LATIN, g_txt=LATIN, h_doc=LATIN)
  not_text, not_utf8 = text_notices(tmp_path)
  assert "bytes: h.doc; move" in not_text and not_utf8 == f"not in UTF-8: a.txt, d.txt, e.txt and 2 more{remedy}"
  (tmp_path / "new\nline.txt").write_bytes(LATIN)
  assert r"new\nline.txt" in report.notice_lines(text_notices(tmp_path / "new\nline.txt"))[0]


def test_large_files_are_looked_at_in_three_places(tmp_path):
  large = b"x" + "\xe9".encode() * (1 << 19) + b"y"  # more than what is read whole; places may cut characters
  half, end = len(large) // 2 & ~1, len(large) - 100
  write_all(tmp_path, a_txt=large, b_txt=large + b"\n", c_txt=large[:half] + LATIN + large[half:])
  write_all(tmp_path, d_txt=large[:end] + LATIN, e_txt=large[:half] + b"\0" + large[half:], f_txt=large + b"\xc3")
  assert [line.split("; ")[0] for line in text_notices(tmp_path)] == [
    "not plain text, read as raw bytes: e.txt",
    "not in UTF-8: c.txt, d.txt, f.txt",
  ]


def test_few_of_many_files_are_looked_at(tmp_path, monkeypatch):
  for i in range(40):
    (tmp_path / f"{i:02}.txt").write_bytes(b"words")
  write_all(tmp_path, **{"01_png": PNG, "02_png": PNG, "39_txt": LATIN})
  monkeypatch.setattr(files, "_SAMPLED_FILES", 3)
  opened = []
  monkeypatch.setattr(files, "read_block", lambda path, *place: opened.append(path) or read_block(path, *place))
  not_text, not_utf8 = text_notices(tmp_path)
  assert "raw bytes: 01.png (of 4 files looked at); move" in not_text  # the first with its ending
  assert "UTF-8: 39.txt (of 4 files looked at); if" in not_utf8 and len(opened) == 4
  monkeypatch.setattr(files, "is_remote", lambda path: True)
  source = files.ByteFiles.__new__(files.ByteFiles)
  source.paths = source.names = ["gs://bucket/a.png"]
  assert files.look_into(source) == (0, [], []) and len(opened) == 4


def test_what_is_skipped_is_named(tmp_path):
  write_all(tmp_path, a_txt=b"words", b_zip=b"PK", c_txt=b"", d_txt_gz=b"no gzip")
  assert text_notices(tmp_path, skip_bad=True) == ["skipped: c.txt, b.zip, d.txt.gz"]
  write_all(tmp_path, r_jsonl=b'{"text": "a"}\n{\n')
  assert text_notices(f"{tmp_path},{tmp_path}/*", skip_bad=True) == ["skipped: c.txt, b.zip, d.txt.gz and 5 more"]
  write_all(tmp_path, p_png=PNG)
  (tmp_path / "q.jpg").write_bytes(tfds_copies.jpeg(tfds_copies.PHOTOS[0], 20))
  assert text_notices(tmp_path, form="image", skip_bad=True)[0] == "skipped: p.png"
  assert text_notices(tmp_path / "a.txt", skip_bad=True) == []


def test_evaluation_tells_of_what_is_no_text_and_of_what_it_leaves_out(run_on_images, tmp_path, monkeypatch):
  config, _ = run_on_images
  workdir = save_run(tmp_path / "run", dataclasses.replace(config, data=dataclasses.replace(config.data, form="bytes")))
  write_all(tmp_path / "texts", a_txt=b"words " * 40, b_png=PNG, c_txt=LATIN, d_txt=b"")
  lines, _ = evaluate_command(monkeypatch, "--workdir", workdir, "--no-compressors", "--data", tmp_path / "texts")
  told = [line.split("; ")[0] for line in lines if line.startswith("notice")]
  plain = "notice  not plain text, read as raw bytes: b.png"
  assert told == ["notice  skipped: d.txt", plain, "notice  not in UTF-8: c.txt"]


def test_empty_files_of_a_folder_are_left_out_and_told(run_on_images, tmp_path, monkeypatch):
  """A model of bytes: the same run, saved as one whose data are bytes."""
  config, _ = run_on_images
  workdir = save_run(tmp_path / "run", dataclasses.replace(config, data=dataclasses.replace(config.data, form="bytes")))
  source = tmp_path / "source"
  source.mkdir()
  (source / "a.py").write_bytes(b"x = 1\n" * 20)
  (source / "__init__.py").write_bytes(b"")
  arguments = ["--workdir", workdir, "--no-compressors", "--data"]
  lines, result = evaluate_command(monkeypatch, *arguments, source)
  assert (result["bytes"], result["skipped"]) == (120, 1) and f"1 document of {source} (1 skipped)" in "\n".join(lines)
  with pytest.raises(DataError, match=r"__init__\.py is empty; .*eval\.py and prepare: --skip-bad"):
    evaluate_command(monkeypatch, *arguments, source / "__init__.py")


def test_tiles_are_said_and_counted_by_the_image_that_they_are_of(run_on_images, monkeypatch):
  _, workdir = run_on_images
  arguments = ["--workdir", workdir, "--split=test"]
  lines, result = evaluate_command(monkeypatch, *arguments, "--image-tiles=16")
  said = "\n".join(lines)
  assert "images are scaled to 16 pixels and cut into tiles" in said and f"{result['tiles']} tiles of 11 images" in said
  assert result["images"] == 11 and result["bytes"] == result["tiles"] * BYTES and result["tiles"] >= 4 * 11
  assert evaluate_command(monkeypatch, *arguments, "--convert-images")[1]["images"] == 11
  with pytest.raises(ConfigError, match="image_tiles 4 is smaller than image_size 8"):
    evaluate_command(monkeypatch, *arguments, "--image-tiles=4")
  with pytest.raises(ConfigError, match="--image-tiles is -1; it must not be negative"):
    evaluate_command(monkeypatch, *arguments, "--image-tiles=-1")


@pytest.mark.slow
def test_two_processes_evaluate_images_as_one(run_on_images, monkeypatch):
  _, workdir = run_on_images
  arguments = ["--workdir", workdir, "--split=test"]
  _, alone = evaluate_command(monkeypatch, *arguments)
  output = run(2, 4, "eval.py", *arguments, "--batch-size=8")
  result = json.loads(output[0].strip().splitlines()[-1])
  for name in ("images", "bytes", "mean_bpb", "standard_error", "nats"):
    assert result[name] == pytest.approx(alone[name], rel=1e-5), name
