"""Exported models come back exactly, or not at all."""

import json
import re

import jax
import jax.numpy as jnp
import model_variants as variants
import numpy as np
import pytest
from etils import epath
from flax import nnx
from run_commands import MESH, assert_bitwise_equal
from safetensors.numpy import load_file

from megabyte_jax.checkpoints import checksums, exported, saved_config
from megabyte_jax.checkpoints.exported import INDEX_FILE, export_model, is_exported, read_exported
from megabyte_jax.checkpoints.init_from import parameters_from
from megabyte_jax.checkpoints.saved_config import load_config
from megabyte_jax.checkpoints.trained_model import load
from megabyte_jax.commands import export
from megabyte_jax.config import Config, MeshConfig, overrides
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.models.build import abstract_model, parameter_info
from megabyte_jax.models.loss import bits_per_byte, byte_nats
from megabyte_jax.parallel.sharding import make_mesh, shard_abstract


def config_of(name):
  return Config(model=variants.VARIANTS[name], batch_size=1, num_steps=9)


def parameters_of(config, seed=0):
  return variants.draw_parameters(config.model, seed)


def abstract_of(config):
  return shard_abstract(abstract_model(config.model)[1], parameter_info(config.model), MESH)


@pytest.mark.parametrize("name", ["two_levels", "three_levels_cross_patch", "conv", "own_output", "perceiver_ar"])
def test_float32_comes_back_to_the_last_bit(tmp_path, name):
  config = config_of(name)
  parameters = parameters_of(config)
  export_model(str(tmp_path / "out"), config, parameters, step=7)
  assert is_exported(tmp_path / "out") and not is_exported(tmp_path)
  read, step = read_exported(tmp_path / "out", abstract_of(config))
  assert step == 7 and load_config(tmp_path / "out") == config
  assert_bitwise_equal(parameters, read)


def test_bfloat16_is_the_rounded_number_and_half_the_size(tmp_path):
  config = config_of("two_levels")
  parameters = parameters_of(config)
  for dtype in ("float32", "bfloat16"):
    export_model(str(tmp_path / dtype), config, parameters, step=7, dtype=dtype)
  sizes = [
    json.loads((tmp_path / d / exported.INDEX_FILE).read_text())["metadata"]["total_size"] for d in exported.DTYPES
  ]
  assert sizes[0] == 2 * sizes[1]
  read, _ = read_exported(tmp_path / "bfloat16", abstract_of(config))
  rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), parameters)
  assert_bitwise_equal(rounded, read)


def test_each_layer_is_a_tensor_and_no_file_is_larger_than_asked(tmp_path):
  config = config_of("two_levels")
  parameters = parameters_of(config)
  limit = (1 << 16) + 4096
  export_model(str(tmp_path / "out"), config, parameters, step=7, max_file_bytes=limit)
  files = sorted((tmp_path / "out").glob("*.safetensors"))
  assert len(files) > 1 and max(path.stat().st_size for path in files) <= limit
  tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
  whole = parameters["levels"][0]["decoder"]["blocks"]["qkv"]["kernel"]
  np.testing.assert_array_equal(tensors["levels.0.decoder.blocks.1.qkv.kernel"], whole[1])
  assert_bitwise_equal(parameters, read_exported(tmp_path / "out", abstract_of(config))[0])
  with pytest.raises(ConfigError, match=r"alone takes [\d,]+ bytes; allow files"):
    export_model(str(tmp_path / "small"), config, parameters, step=7, max_file_bytes=(1 << 16) + 64)
  assert not (tmp_path / "small").exists()


def test_what_stands_there_is_left_alone(tmp_path, monkeypatch):
  config = config_of("two_levels")
  (tmp_path / "mine").write_text("")
  with pytest.raises(ConfigError, match=r"is not empty; name a new folder"):
    export_model(str(tmp_path), config, parameters_of(config), step=7)
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ConfigError, match=r"gs://bucket/out is not on this machine's disks; write to a disk, then copy"):
    export_model("gs://bucket/out", config, parameters_of(config), step=7)
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_every_damage_is_noticed(tmp_path):
  config = config_of("two_levels")
  export_model(str(tmp_path / "out"), config, parameters_of(config), step=7, max_file_bytes=(1 << 16) + 8192)
  for path in sorted((tmp_path / "out").iterdir()):
    content = path.read_bytes()
    for damaged in (None, content[:-1], b"", bytes([content[0] ^ 1]) + content[1:]):
      path.unlink()
      if damaged is not None:
        path.write_bytes(damaged)
      with pytest.raises(CheckpointError):
        load(str(tmp_path / "out"))
      path.write_bytes(content)
  load(str(tmp_path / "out"))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"metadata": None}, "has format None, not 1"),
    ({"metadata": {"format": 1}}, "has no step, or no weight_map of file names"),
    ({"weight_map": {"levels.0": 3}}, "has no step, or no weight_map of file names"),
  ],
)
def test_an_index_edited_together_with_its_checksum(tmp_path, change, message):
  config = config_of("two_levels")
  export_model(str(tmp_path / "out"), config, parameters_of(config), step=7)
  index = tmp_path / "out" / exported.INDEX_FILE
  index.write_text(json.dumps(json.loads(index.read_text()) | change))
  checksums.write_digests(epath.Path(tmp_path / "out"))
  with pytest.raises(CheckpointError, match=message):
    read_exported(tmp_path / "out", abstract_of(config))


def test_tensors_of_another_model_are_refused(tmp_path):
  config = config_of("two_levels")
  export_model(str(tmp_path / "out"), config, parameters_of(config), step=7)
  with pytest.raises(CheckpointError, match=r"are not those of its config\.json: .*levels\.0"):
    read_exported(tmp_path / "out", abstract_of(config_of("conv")))


def test_a_shipped_model_is_found_by_its_name(tmp_path, monkeypatch):
  monkeypatch.setattr(saved_config, "_SHIPPED_FOLDER", tmp_path)
  config = config_of("two_levels")
  parameters = parameters_of(config)
  export_model(str(tmp_path / "tiny"), config, parameters, step=7)
  model, found, step = load("pretrained:tiny")
  assert found == config and step == 7
  x_BT = jnp.arange(8)[None] % config.model.vocab_size
  direct = nnx.merge(abstract_model(config.model)[0], parameters)
  nats = jax.jit(lambda graph, parameters: byte_nats(nnx.merge(graph, parameters), x_BT)[0], static_argnums=0)
  np.testing.assert_array_equal(nats(*nnx.split(model)), nats(*nnx.split(direct)))
  one = make_mesh(MeshConfig(data=1), jax.local_devices()[:1])
  assert_bitwise_equal(parameters, parameters_from("pretrained:tiny", parameters_of(config, seed=5), config, one))
  with pytest.raises(CheckpointError, match="pretrained:large: there is no such model; this package holds pretrained:"):
    load("pretrained:large")
  for name in ("../" + tmp_path.name + "/tiny", "tiny/", "tiny/../tiny", "", "."):  # no way out of the package
    with pytest.raises(CheckpointError, match="there is no such model"):
      load(f"pretrained:{name}")
  with pytest.raises(CheckpointError, match="exported model of step 7 alone; leave out --step=8"):
    load("pretrained:tiny", step=8)


def test_the_command_exports_what_the_run_has(tmp_path, capsys):
  config = config_of("two_levels")
  export_model(str(tmp_path / "model"), config, parameters_of(config), step=7)
  export.main([str(tmp_path / "out"), f"--workdir={tmp_path}/model", "--max-file-size=70000"])
  assert capsys.readouterr().out == f"step 7 of {tmp_path}/model is in {tmp_path}/out\n"
  assert_bitwise_equal(parameters_of(config), read_exported(tmp_path / "out", abstract_of(config))[0])
  with pytest.raises(ConfigError, match="--max-file-size is 0; it must be positive"):
    export.parse_arguments([str(tmp_path / "x"), "--max-file-size=0"])


SHIPPED = sorted(path.name for path in saved_config._SHIPPED_FOLDER.iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_models_are_whole_small_and_explained(name):
  """Reading checks every file's checksum."""
  folder = saved_config._SHIPPED_FOLDER / name
  model, config, step = load(f"pretrained:{name}")
  assert step == config.num_steps and model.config == config.model
  sizes = [path.stat().length for path in folder.iterdir()]
  assert max(sizes) <= 4e6 and sum(sizes) <= 12e6
  card = (folder / "README.md").read_text()
  for heading in ("## Data", "## Size", "## Results", "## Licence", "## How it was made"):
    assert heading in card
  assert f"{config.model.parameter_count():,} parameters" in card
  same = Config.from_dict(overrides.load("--config", saved_config.SHIPPED_CONFIGS[name]))
  assert same.model == config.model


@pytest.mark.parametrize("name", SHIPPED)
def test_a_config_that_does_not_fit_a_shipped_model_is_told_the_one_that_does(name):
  config = Config.from_dict(overrides.load("--config", "configs/quickstart.py"))
  fits = re.escape(f"give --config={saved_config.SHIPPED_CONFIGS[name]}, which has its sizes")
  with pytest.raises(CheckpointError, match=rf"the model of pretrained:{name} does not fit this config; {fits}$"):
    parameters_from(f"pretrained:{name}", parameters_of(config), config, MESH)


def test_books_predict_english(tmp_path):
  """Held-out prose costs the shipped model far less than a model that knows letters alone."""
  model, _, _ = load("pretrained:books")
  text = b"It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"
  nats = byte_nats(model, jnp.asarray(np.frombuffer(text, np.uint8))[None])[0]
  assert bits_per_byte(float(nats.sum()), len(text)) < 2.6


def test_a_shipped_model_cannot_be_trained_in():
  import train  # noqa: PLC0415

  with pytest.raises(ConfigError, match=r"--workdir=pretrained:books cannot be trained in; give it to --init_from"):
    train.main(["--workdir=pretrained:books"])


def test_an_export_through_a_link_fills_the_folder_that_it_leads_to(tmp_path):
  config = config_of("two_levels")
  (tmp_path / "empty").mkdir()
  for name, target in (("link", "empty"), ("other", "new")):
    (tmp_path / name).symlink_to(tmp_path / target)
    export_model(str(tmp_path / name), config, parameters_of(config), step=7)
    assert (tmp_path / name).is_symlink() and (tmp_path / target / INDEX_FILE).exists()
    with pytest.raises(ConfigError, match="is not empty; name a new folder"):
      export_model(str(tmp_path / name), config, parameters_of(config), step=7)
