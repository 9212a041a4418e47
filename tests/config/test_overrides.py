"""Config files and what a command line changes of them: values of every type, and mistakes in one line."""

import pytest

from megabyte_jax.config import Config, overrides
from megabyte_jax.errors import FlagError

TINY = "tests/tiny_config.py"


def changed(*flags, file=TINY):
  rest, changes = overrides.split(flags, ["config"])
  assert rest == []
  return overrides.load("--config", file, changes["config"])


@pytest.mark.parametrize(
  ("flag", "key", "value"),
  [
    (["--config.batch_size=16"], "batch_size", 16),
    (["--config.batch_size", "16"], "batch_size", 16),
    (["--config.seed=0x10"], "seed", 16),
    (["--config.mesh.fsdp", "-1"], "mesh.fsdp", -1),
    (["--config.optimizer.learning_rate=3"], "optimizer.learning_rate", 3.0),
    (["--config.optimizer.learning_rate=1e-4"], "optimizer.learning_rate", 1e-4),
    (["--config.data.skip_bad"], "data.skip_bad", True),
    (["--config.data.skip_bad=t"], "data.skip_bad", True),
    (["--config.model.bias=False"], "model.bias", False),
    (["--noconfig.model.bias"], "model.bias", False),
    (["--config.data.train=a=b 'c'"], "data.train", "a=b 'c'"),
    (["--config.data.validation="], "data.validation", ""),
    (["--config.profile_steps=(2, 5)"], "profile_steps", (2, 5)),
    (["--config.profile_steps=2,5"], "profile_steps", (2, 5)),
    (["--config.data.train_weights=(0.25,)"], "data.train_weights", (0.25,)),
    (["--config.data.train_weights=1.5"], "data.train_weights", (1.5,)),
    (["--config.profile_steps=()"], "profile_steps", ()),
  ],
)
def test_values_have_the_type_of_what_they_replace(flag, key, value):
  found = changed(*flag)
  for part in key.split("."):
    found = found[part]
  assert found == value and type(found) is type(value)


def test_levels_are_changed_by_their_number():
  config = Config.from_dict(changed("--config.model.levels[1].num_layers=3", "--config.model.levels[-2].rotary"))
  assert [(level.num_layers, level.rotary) for level in config.model.levels] == [(1, True), (3, False)]


def test_groups_are_given_as_dicts():
  assert changed("--config.mesh={'data': 2, 'fsdp': 1, 'seq': 1, 'tensor': 1}").mesh.data == 2
  level = "{'patch_size': 1, 'width': 16, 'num_layers': 1, 'num_heads': 2}"
  assert len(Config.from_dict(changed(f"--config.model.levels=({level},)")).model.levels) == 1


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config.seed=1", "--config.seed=1"], r"--config\.seed is given twice; leave one out$"),
    (["--config.model.bias", "--noconfig.model.bias"], r"--config\.model\.bias is given twice"),
    (
      ["--config.mesh.data=2", "--config.mesh={}"],
      r"--config\.mesh is given after --config\.mesh\.data, which it would",
    ),
    (["--config.seed=1.5"], r"--config\.seed must be a whole number, not '1\.5'$"),
    (["--config.seed=1e20"], r"--config\.seed must be a whole number"),
    (["--config.batch_size=100000000000000000000"], r"--config\.batch_size: 10+ is too large a number$"),
    (["--config.profile_steps=1 2"], r"must be a tuple like \(1, 2\), not '1 2'$"),
    (["--config.mesh=3"], r"--config\.mesh must be"),
    (["--config.seed"], r"Missing value for flag --config\.seed"),
    (["--config.seed", "--config.batch_size=2"], r"Missing value for flag --config\.seed"),
    (["--noconfig.seed"], r"only what is True or False"),
    (["--noconfig.model.bias=1"], r"takes no value$"),
    (["--config.model.levels[0]={}"], r"one element cannot be replaced; give the whole tuple$"),
    (["--config.model..x=1"], r"--config\.model\.\.x=1 names no key"),
    (["--config.batch_sise=1"], r"--config\.batch_sise=1; did you mean --config\.batch_size\?$"),
    (["--config.learning_rate=1"], r"learning_rate=1; did you mean --config\.optimizer\.learning_rate\?$"),
    (["--config.levels[0].width=1"], r"width=1; did you mean --config\.model\.levels\[0\]\.width\?$"),
    (["--config.data.batch_size=1"], r"did you mean --config\.batch_size or --config\.eval\.batch_size\?$"),
    (["--noconfig.bias"], r"no such key: --noconfig\.bias; did you mean --noconfig\.model\.bias\?$"),
    (["--config.mesh.x=1"], r"--config\.mesh\.x=1; there are data, fsdp, seq, tensor$"),
    (["--config.seed.x=1"], r"there is no such key: --config\.seed\.x=1; before \.x stands a value, which has no keys"),
    (["--config.seed[0]=1"], r"--config\.seed\[0\]=1; before \[0\] stands a value, which has no keys$"),
    (["--config.model.levels.x=1"], r"there is no such key: --config\.model\.levels\.x=1; there are \[0\] to \[1\]"),
    (["--config.model.levels[5].width=1"], r"levels\[5\]\.width=1; there are \[0\] to \[1\]$"),
    (["--config.__class__=1"], r"there is no such key: --config\.__class__=1"),
  ],
)
def test_mistakes_are_one_line(flags, message):
  with pytest.raises(FlagError, match=message) as error:
    changed(*flags)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config():\n  return int('x')\n", r"invalid literal .*'x' \(.*file\.py, line 2\)$"),
    ("x = open('/nothing/there')\n", r"/nothing/there.*\(.*file\.py, line 1\)$"),
    ("import broken_module_of_this_test\n", r"--config: .*broken_module_of_this_test\.py, line 1: "),
    ("def get_config(row):\n  return row\n", r"missing 1 required positional argument"),
    ("\0", r"file\.py"),
    ("def get_config():\n  return [1]\n", r"get_config\(\) of .*file\.py must return Config"),
  ],
)
def test_errors_in_a_config_file_name_the_place(tmp_path, monkeypatch, text, message):
  (tmp_path / "broken_module_of_this_test.py").write_text("this is no Python")
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "file.py").write_text(text)
  with pytest.raises(FlagError, match=message) as error:
    changed(file=str(tmp_path / "file.py"))
  assert "\n" not in str(error.value)


def test_a_bug_in_a_config_file_keeps_its_traceback(tmp_path):
  (tmp_path / "file.py").write_text("def get_config():\n  return unknown_name\n")
  with pytest.raises(NameError):
    changed(file=str(tmp_path / "file.py"))


def test_a_file_may_return_a_plain_dict_and_have_a_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "file.py").write_text("def get_config(row='a'):\n  return {'row': row, 'sizes': (1, 2)}\n")
  assert changed("--config.sizes=(3,)", file="~/file.py:b:c").to_dict() == {"row": "b:c", "sizes": (3,)}


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  here = changed(file="configs/quickstart.py")
  monkeypatch.chdir(tmp_path)
  assert changed(file="configs/quickstart.py") == here
  with pytest.raises(FlagError, match=r"No such file or directory: 'configs/nothing\.py'"):
    changed(file="configs/nothing.py")
  for name, meant in {
    "quickstart": "configs/quickstart",
    "smal.py": "configs/small",
    "table5": "configs/paper/table5",
  }.items():
    with pytest.raises(FlagError, match=rf"No such file or directory: '{name}'; did you mean {meant}\.py\?$"):
      changed(file=name)
  with pytest.raises(FlagError, match=r"No such file or directory: 'nothing'$"):
    changed(file="nothing")


def test_homes_are_expanded_in_lists(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  for text, expected in {
    "~/a,~/b/*.txt": "/home/me/a,/home/me/b/*.txt",
    "~": "/home/me",
    "a~/b": "a~/b",
    "tfds:~": "tfds:~",
    "~nobody_of_this_name/x": "~nobody_of_this_name/x",
  }.items():
    assert overrides.expanded(text) == expected
  assert changed("--config.data.train=~/x").data.train == "/home/me/x"
