"""Reads the config saved in a work directory, and decides if another config continues that run."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from megabyte_jax.config import Config
from megabyte_jax.data.files import read_whole
from megabyte_jax.errors import CheckpointError, ConfigError
from megabyte_jax.files.atomic_file import replacing
from megabyte_jax.files.json_files import read_json
from megabyte_jax.files.object_stores import unknown_scheme

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"  # of a model of subwords, beside its config
SHIPPED = "pretrained:"  # before the name of a model that the package holds
# The configs that have the shipped models' sizes.
SHIPPED_CONFIGS = {"books": "configs/recipe.py:megabyte:4:256x4:192x5+modern"}
_SHIPPED_FOLDER = epath.Path(__file__).parent / "pretrained"

# A run continues exactly only where these agree; the rest is about where it runs, what it prints and when it saves.
_DECISIVE = ("model", "data", "optimizer", "batch_size", "accumulate", "num_steps", "seed")
_FREE = (  # other ways to compute the same numbers, and where data lie whose contents the fingerprint knows
  "model.attention",
  "model.remat",
  "model.scan_layers",
  "data.train",
  "data.test",
  "data.tfds_dir",
  "data.cache_dir",
  "data.tokenizer",  # data.tokenizer_sha256 decides
)

_LENGTH_HINT = (
  "num_steps sets when the learning rate falls, so it may change only with optimizer.schedule=constant, or with wsd "
  "(warm-up, stable, decay) before the decay begins"
)
# How items become bytes: a model reads no other bytes than those that it was trained on.
_MAKES_BYTES = (
  "form",
  "image_size",
  "image_tiles",
  "convert_images",
  "scan",
  "scan_patch",
  "sample_rate",
  "encoding",
  "tokenizer_sha256",
)

_ABSENT = object()


def is_shipped(workdir: epath.PathLike) -> bool:
  """Returns whether `workdir` names a model that the package holds, rather than a folder."""
  return os.fspath(workdir).startswith(SHIPPED)


def shipped_folder(workdir: epath.PathLike) -> epath.PathLike:
  """Returns the folder that `pretrained:NAME` stands for; any other work directory as it is.

  Raises:
    CheckpointError: no model of this name is shipped with the package.
  """
  if not is_shipped(workdir):
    return workdir
  name = os.fspath(workdir)
  model = name.removeprefix(SHIPPED)
  known = sorted(path.name for path in _SHIPPED_FOLDER.iterdir()) if _SHIPPED_FOLDER.exists() else []
  if model not in known:
    raise CheckpointError(
      f"{name}: there is no such model; this package holds {', '.join(SHIPPED + one for one in known) or 'none'}"
    )
  return _SHIPPED_FOLDER / model


def save_config(workdir: epath.PathLike, config: Config) -> None:
  """Writes `config` to `workdir`/config.json, where `load_config` finds it; process 0 does, all may call.

  A tokenizer is copied beside it, unless it is there.
  """
  if jax.process_index() > 0:
    return
  if config.data.form == "subwords":
    copy = epath.Path(workdir) / TOKENIZER_FILE
    file = read_whole(config.data.tokenizer)
    if not copy.exists() or copy.read_bytes() != file:
      with replacing(copy) as path:
        path.write_bytes(file)
  with replacing(epath.Path(workdir) / CONFIG_FILE) as path:
    path.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(workdir: epath.PathLike) -> Config:
  """Reads the config of the run in `workdir`; its tokenizer, if it has one, is the copy in `workdir`.

  Raises:
    CheckpointError: `workdir` holds no run, or its config cannot be read by this version.
  """
  if scheme := unknown_scheme(os.fspath(workdir)):
    raise CheckpointError(f"{workdir}: no run can be read from {scheme}; name a folder or a bucket (gs://)")
  if not os.fspath(workdir):
    raise CheckpointError("the name of the work directory is empty; give the --workdir of a train.py run")
  path = epath.Path(shipped_folder(workdir)) / CONFIG_FILE
  if not path.exists():
    raise CheckpointError(f"{workdir} holds no run: {path} does not exist; give the --workdir of a train.py run")
  values = read_json(path, CheckpointError, "restore it, or start train.py again there, which writes it anew")
  try:
    config = Config.from_dict(values)
    if config.data.form != "subwords":
      return config
    copy = os.fspath(path.parent / TOKENIZER_FILE)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=copy))
  except ConfigError as error:
    raise CheckpointError(f"{path} does not fit this version of megabyte_jax: {error}") from error


def changed_keys(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
  """Lists the dotted keys, sorted, in which two configs differ and that matter for continuing a run exactly.

  Args:
    saved, current: `Config.to_dict()` of the run and of what is asked for now. A key that `saved` lacks, because
      an older version wrote it, counts as having its default value.
  """
  return sorted(_differences(saved, current))


def check_same_run(
  meta: Mapping[str, Any],
  config: Mapping[str, Any],
  fingerprint: Any,
  validation_fingerprint: str = "",
  skipped: Sequence[int] = (0, 0),
  free: Collection[str] = (),
  workdir: str = "",
) -> None:
  """Checks that a checkpoint can be continued exactly under `config` on the data of `fingerprint`.

  One thing may change: a run may begin to skip items that cannot be read (`data.skip_bad`), which the error about such
  an item advises. It then goes on with the windows of the others, in another order.

  Args:
    meta: `Checkpoints.meta()`, with the keys `config`, `fingerprint`, `validation_fingerprint` and `skipped`.
    config: `Config.to_dict()` of what is asked for now.
    fingerprint: of the training data, anything that JSON can hold.
    validation_fingerprint: of the validation data; '' where there are none.
    skipped: items left out as unreadable, of the training and of the validation data.
    free: further keys that may differ.
    workdir: of the run, for the message.

  Raises:
    CheckpointError: the files have changed; or names every key that differs, with both values.
  """
  differences = _differences(meta["config"], config)
  for key in free:
    differences.pop(key, None)
  if begins_to_skip(meta, config):
    differences.pop("data.skip_bad")
  elif list(skipped) != list(meta.get("skipped", skipped)):
    differences["items of the data that cannot be read"] = list(meta["skipped"]), list(skipped)
  prints = {"train": (_plain(meta.get("fingerprint")), _plain(fingerprint))}
  if (saved := meta.get("validation_fingerprint")) and validation_fingerprint:  # it does not matter where they lie
    differences.pop("data.validation", None)
    prints["validation"] = saved, validation_fingerprint
  explained = any(f"data.{name}" in differences for name in (*_MAKES_BYTES, "raw", "train_weights"))
  changed, lines = [], []
  for split in (split for split, (was, given) in prints.items() if was != given and not explained):
    was, given = (of.get("data", {}).get(split) for of in (meta["config"], config))
    if was == given:
      changed.append(was)
      lines.append(f"  data.{split}: the files in {was} have changed")
    else:
      which = "which hold different data (a folder and its packed form count as different)"
      lines.append(f"  data.{split}: {show_value(was)} -> {show_value(given)}, {which}")
  where = f" in {workdir}" if workdir else ""
  if changed and not differences and len(changed) == len(lines):
    raise CheckpointError(
      f"the files in {' and '.join(changed)} have changed since the run{where} began (one was added, removed, renamed "
      f"or edited); put them back, or start a new run, e.g. with --workdir=NEW --init_from={workdir or 'OLD'}"
    )
  if differences or lines:
    raise CheckpointError(
      f"the checkpoint at step {meta.get('step', '?')}{where} belongs to another run (saved -> given):",
      *(f"  {key}: {show_value(was)} -> {show_value(given)}" for key, (was, given) in sorted(differences.items())),
      *lines,
      *([_LENGTH_HINT] if "num_steps" in differences else []),
      "give the saved values, or start a new run in another --workdir (--init_from=DIR takes this one's parameters)",
    )


def begins_to_skip(meta: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
  """Returns True if a run that met each item so far is to skip those that cannot be read from now on."""
  before, now = (values.get("data", {}).get("skip_bad") for values in (meta["config"], config))
  return before is False and now is True


def check_saved_config(workdir: epath.PathLike, config: Config, meta: Mapping[str, Any]) -> None:
  """Checks that the config in `workdir` is that of a checkpoint, whose own copy has a checksum.

  Fields of the model that change no array's shape, such as the activation, would give other predictions; so would
  data that become other bytes. Where the seed or the optimizer differs, the checkpoint is that of another run.

  Args:
    workdir: the run's folder.
    config: as `load_config` read it.
    meta: of the checkpoint (`Checkpoints.meta`); one without `config` is not compared.

  Raises:
    CheckpointError: names each field that differs, with both values.
  """
  differences = {
    key: values
    for key, values in all_differences(meta.get("config") or config.to_dict(), config.to_dict()).items()
    if (key.startswith(("model.", "optimizer.")) and key not in _FREE)
    or key.removeprefix("data.") in (*_MAKES_BYTES, "seed")
  }
  if differences:
    shown = [f"{key}: {show_value(was)} -> {show_value(now)}" for key, (was, now) in sorted(differences.items())]
    raise CheckpointError(
      f"{epath.Path(workdir) / CONFIG_FILE} differs from the config that the checkpoint of step {meta['step']} was "
      f"trained with (checkpoint -> file): {', '.join(shown)}; restore the file, or start train.py again there, which "
      "writes it anew; a checkpoint of another run belongs elsewhere"
    )


def _differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Decisive keys that differ, each with its saved and its current value."""
  return {key: values for key, values in all_differences(saved, current).items() if matters(key)}


def all_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Returns the dotted keys in which two configs differ, each with its saved and its current value.

  Args:
    saved, current: `Config.to_dict()`; keys that `saved` lacks count as having their default values.
  """
  saved, current = _plain(saved), _plain(current)
  before, now = _flat(_with_defaults(saved, current)), _flat(current)
  return {
    key: (before.get(key, _ABSENT), now.get(key, _ABSENT))
    for key in before.keys() | now.keys()
    if before.get(key, _ABSENT) != now.get(key, _ABSENT)
  }


def matters(key: str) -> bool:
  """Returns whether a run continues exactly only where this dotted key is the same."""
  return key.replace("[", ".").split(".")[0] in _DECISIVE and key not in _FREE


def _with_defaults(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Mapping[str, Any]:
  """`saved`, where keys that only `current` has are added with their default values."""
  try:  # leaving those keys out of `current` lets the dataclasses fill them in
    defaults = Config.from_dict(_common(current, saved)).to_dict()
  except ConfigError:  # one of them has no default: then it differs
    return saved
  return _fill(saved, _plain(defaults))


def _common(values: Any, pattern: Any) -> Any:
  """`values` without the keys that `pattern` lacks, at every depth."""
  if isinstance(values, dict) and isinstance(pattern, dict):
    return {key: _common(value, pattern[key]) for key, value in values.items() if key in pattern}
  if isinstance(values, list) and isinstance(pattern, list) and len(values) == len(pattern):
    return [_common(*pair) for pair in zip(values, pattern, strict=True)]
  return values


def _fill(values: Any, defaults: Any) -> Any:
  """`values`, with the keys added that only `defaults` has, at every depth."""
  if isinstance(values, dict) and isinstance(defaults, dict):
    return defaults | {key: _fill(value, defaults.get(key)) for key, value in values.items()}
  if isinstance(values, list) and isinstance(defaults, list) and len(values) == len(defaults):
    return [_fill(*pair) for pair in zip(values, defaults, strict=True)]
  return values


def _flat(values: Any, key: str = "") -> dict[str, Any]:
  """Nested dicts and lists of dicts as one dict of dotted keys; other lists stay values."""
  if isinstance(values, dict):
    items = [(f"{key}.{name}" if key else name, value) for name, value in values.items()]
  elif isinstance(values, list) and values and all(isinstance(value, dict) for value in values):
    items = [(f"{key}[{i}]", value) for i, value in enumerate(values)]
  else:
    return {key: values}
  return {name: value for item in items for name, value in _flat(item[1], item[0]).items()}


def _plain(values: Any) -> Any:
  """Returns values as JSON gives them back: tuples are lists, keys are strings."""
  return json.loads(json.dumps(values))


def is_absent(value: Any) -> bool:
  """Returns whether `all_differences` found no such key on this side."""
  return value is _ABSENT


def show_value(value: Any) -> str:
  """Renders a value as JSON; `(absent)` where `all_differences` found none."""
  return "(absent)" if value is _ABSENT else json.dumps(value)
