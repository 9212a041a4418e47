"""Saves checkpoints in the background, whole or not at all, and never restores one in part.

A checkpoint of step n is the folder `WORKDIR/checkpoints/n` with three Orbax items: `params` and `opt_state`, each one
flat dict of arrays (`levels.0.decoder.blocks.qkv.kernel`: array), and `meta`, a JSON object. Orbax commits it by
renaming; `files.json` in it holds the checksum of every file. What lies there half-written or damaged is named and
passed over.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from megabyte_jax.checkpoints.arrays import check_same_arrays, flat_arrays, handlers, placed
from megabyte_jax.checkpoints.best_steps import BestSteps
from megabyte_jax.checkpoints.checksums import find_damage, write_digests
from megabyte_jax.checkpoints.failed_saves import cannot_write, file_system_error, quiet
from megabyte_jax.checkpoints.format import FOLDER, FORMAT, check_format
from megabyte_jax.checkpoints.processes_agree import check_shared, from_first_process
from megabyte_jax.config import CheckpointConfig
from megabyte_jax.errors import CheckpointError, UserError, in_one_line
from megabyte_jax.files.outputs import NO_ROOM
from megabyte_jax.models.layers.quantised import require_floats

_ITEMS = ("params", "opt_state", "meta")
_WITHOUT_OPTIMIZER = ("params", "meta")
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")  # by Orbax, after files.json
_MULTI_PROCESS_CLOCK_STEPS = 16  # with several processes, the clock is looked at only so often


class Restored(NamedTuple):
  """A checkpoint in memory; `opt_state` is None where only parameters were asked for."""

  step: int
  params: Any
  opt_state: Any
  meta: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run; every process of the run makes one, and calls the same methods in the same order."""

  def __init__(
    self,
    workdir: epath.PathLike,
    config: CheckpointConfig = CheckpointConfig(),  # noqa: B008  (it is frozen)
    *,
    read_only: bool = False,
  ):
    """Opens `workdir`/checkpoints.

    Args:
      workdir: the run's folder, or a bucket path (gs://...) that all processes see.
      config: when to save and what to keep.
      read_only: change nothing in the folder, so that evaluation can look on while training goes on.
    """
    self.workdir, self.folder = str(workdir), epath.Path(workdir).resolve() / FOLDER
    self._config, self._read_only = config, read_only
    self._damage: dict[tuple[int, str], str | None] = {}  # what was found by checking (step, item)
    self._saved: set[int] = set()  # steps that this object wrote
    self._saving_step = -1
    self._last_save = time.monotonic()
    self._closing = contextlib.ExitStack()
    if not read_only:
      self._closing.enter_context(quiet())
      check_shared(self.folder)
      self._warn_of_half_written()
    self._best = BestSteps(self.folder, config.keep_best)
    keep = [ocp.checkpoint_managers.LatestN(config.keep), self._best]
    if config.keep_every_steps:
      keep.append(ocp.checkpoint_managers.EveryNSteps(config.keep_every_steps))
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        create=not read_only,
        cleanup_tmp_directories=not read_only,
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
        async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
      ),
      handler_registry=handlers(),
    )

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
    try:
      self.close()
    except UserError as failed:
      if error is None:
        raise
      if not isinstance(error, (UserError, OSError)):
        _warn(str(failed))
    if not self._read_only and isinstance(error, OSError) and error.errno in NO_ROOM:
      raise cannot_write(error, error.filename2 or error.filename or self.folder, *self._unsaved_and_good()) from error

  # -- Saving --

  def should_save(self, step: int) -> bool:
    """Returns True if the config asks for a checkpoint of `step`, by its number or by the clock."""
    if self._config.every_steps and step % self._config.every_steps == 0:
      return True
    if not self._config.every_minutes:
      return False
    if jax.process_count() > 1 and step % _MULTI_PROCESS_CLOCK_STEPS:
      return False  # asking process 0 waits for the devices
    return bool(from_first_process(time.monotonic() - self._last_save >= 60 * self._config.every_minutes))

  def record(self, step: int, bpb: float) -> None:
    """Notes the validation bits per byte of the checkpoint of `step`: `keep_best` and `best_step` go by them."""
    if step in self._manager.all_steps():
      self._best.put(step, bpb)

  def preempted(self, step: int) -> bool:
    """Returns True if the cluster manager has announced the end of this job: the same answer in every process.

    Known only where `jax.distributed` was initialised; False elsewhere.
    """
    return self._manager.reached_preemption(step)

  def save(self, step: int, params: Any, opt_state: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving and returns as soon as the arrays are copied, so that they may be donated to the next step.

    A step that is saved already is left as it is.

    Args:
      step: optimizer steps taken.
      params, opt_state: pytrees of arrays.
      meta: what JSON can hold. `check_same_run` reads `config`, `fingerprint` and
        `validation_fingerprint`; `step` and `format` are added.

    Raises:
      CheckpointError: opened for reading only, or `meta` is nothing that JSON can hold.
      ConfigError: weights are in 8 bits.
    """
    if self._read_only:
      raise CheckpointError(f"{self.folder} was opened for reading only; save() needs read_only=False")
    require_floats(params, "a checkpoint")
    if step in self._manager.all_steps():
      return
    meta = {**meta, "step": int(step), "format": FORMAT}
    try:
      json.dumps(meta)
    except (TypeError, ValueError) as error:
      raise CheckpointError(f"meta of step {step} does not fit into JSON: {error}") from error
    self.wait()
    self._saving_step = step
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(flat_arrays(params)),
        opt_state=ocp.args.StandardSave(flat_arrays(opt_state)),
        meta=ocp.args.JsonSave(meta),
      ),
      force=True,
    )
    self._saved.add(step)
    self._last_save = time.monotonic()

  def wait(self) -> None:
    """Returns when the save that is under way is on disk; raises what went wrong with it."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._saved.discard(self._saving_step)
      unsaved, good = self._unsaved_and_good()
      if refused := file_system_error(error):
        raise cannot_write(refused, self.folder, unsaved, good) from error
      error.add_note(f"The checkpoint of step {unsaved} in {self.folder} was not saved; the one before is step {good}.")
      raise

  def _unsaved_and_good(self) -> tuple[int | None, int | None]:
    """Returns the step whose save began and is not on disk, and the newest step on disk; None where there is none."""
    with contextlib.suppress(OSError):
      steps = {int(path.name) for path in self.folder.iterdir() if path.name.isdigit()}
      unsaved = self._saving_step if self._saving_step >= 0 and self._saving_step not in steps else None
      return unsaved, max(steps, default=None)
    return None, None

  def close(self) -> None:
    """Waits for the save that is under way and lets go of threads."""
    with self._closing:
      self.wait()
      self._manager.close()

  # -- Restoring --

  def latest_step(self) -> int | None:
    """Returns the newest step whose checkpoint is whole, None where there are no checkpoints.

    Every file of a checkpoint is read once to be sure. Damaged ones are named on stderr and, unless this is
    `read_only`, moved to `checkpoints/damaged`.

    Raises:
      CheckpointError: there are checkpoints, and all are damaged.
    """
    return self._latest(_ITEMS)

  def best_step(self) -> int:
    """Returns the step whose checkpoint had the fewest validation bits per byte during training.

    Raises:
      CheckpointError: none of the checkpoints that are there was evaluated.
    """
    if self._read_only:
      self._manager.reload()
    self._best.reload()
    found = self._best.best(self._manager.all_steps())
    best = from_first_process(found[0] if found else -1)  # training may be writing another
    if best < 0:
      raise CheckpointError(
        f"none of the checkpoints in {self.folder} was evaluated while training; set config.eval.every_steps and "
        "config.checkpoint.keep_best, or take another step"
      )
    return best

  def meta(self, step: int | None = None, *, optimizer: bool = True) -> dict[str, Any]:
    """Returns the JSON object saved with `step` (None: the newest whole one); see `save`.

    Args:
      step: optimizer steps.
      optimizer: False takes a checkpoint whose optimizer state is damaged for whole, as `restore_params` does.
    """
    return self._read(step, _ITEMS if optimizer else _WITHOUT_OPTIMIZER, {}).meta

  def restore(self, abstract_params: Any, abstract_opt_state: Any, step: int | None = None) -> Restored:
    """Reads the state saved at `step` (None: the newest whole one), placed as the abstract trees say.

    Args:
      abstract_params, abstract_opt_state: pytrees of ShapeDtypeStruct with shardings, on any mesh. A leaf without
        a sharding goes to the first local device.
      step: optimizer steps.

    Raises:
      CheckpointError: no such checkpoint, a damaged one, or one whose arrays have other names, shapes or dtypes.
    """
    return self._read(step, _ITEMS, {"params": abstract_params, "opt_state": abstract_opt_state})

  def restore_params(self, abstract_params: Any, step: int | None = None) -> Restored:
    """Reads the parameters as `restore` does, without the optimizer's state."""
    return self._read(step, _WITHOUT_OPTIMIZER, {"params": abstract_params})

  def _read(self, step: int | None, items: tuple[str, ...], abstract: dict[str, Any]) -> Restored:
    """Reads `meta` and the items in `abstract` from a checkpoint whose `items` are whole."""
    self.wait()
    if step is None:
      step = self._latest(items)
      if step is None:
        raise CheckpointError(f"no checkpoint in {self.folder}; give the --workdir of a run that has saved one")
    else:
      steps = self._manager.all_steps()
      if not from_first_process(step in steps):
        raise CheckpointError(f"no checkpoint of step {step} in {self.folder}; there are {_list(steps)}")
      step = next((one for one in steps if one == step), step)  # 8 where it is 8.0
      if not from_first_process(jax.process_index() > 0 or self._is_whole(step, items)):
        raise CheckpointError(f"the checkpoint {self.folder / str(step)} is damaged; take another step")
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    check_format(self.folder / str(step), step, meta)
    flat = {name: {key: placed(leaf) for key, leaf in flat_arrays(tree).items()} for name, tree in abstract.items()}
    if flat:
      check_same_arrays(self.folder / str(step), flat)
      args = {name: ocp.args.StandardRestore(tree) for name, tree in flat.items()}
      flat = self._manager.restore(step, args=ocp.args.Composite(**args))
    trees = {
      name: jax.tree.unflatten(jax.tree.structure(tree), [flat[name][key] for key in flat_arrays(tree)])
      for name, tree in abstract.items()
    }
    return Restored(step, trees.get("params"), trees.get("opt_state"), meta)

  # -- Telling whole from damaged --

  def _latest(self, items: tuple[str, ...]) -> int | None:
    if self._read_only:
      self._manager.reload()  # training may have gone on since
    steps = self._manager.all_steps()
    # One process checks and decides, so that all restore the same step.
    newest_first = sorted(steps, reverse=True)
    whole = -1
    if jax.process_index() == 0:
      whole = next((step for step in newest_first if self._is_whole(step, items)), -1)
    whole = from_first_process(whole)
    if whole >= 0:
      self._move_aside([step for step in steps if step > whole])
      return whole
    if self._read_only and not from_first_process(all((self.folder / str(step)).exists() for step in steps)):
      return self._latest(items)  # training saved a newer one and deleted these meanwhile
    if steps:
      raise CheckpointError(
        f"all checkpoints in {self.folder} are damaged ({_list(steps)}); "
        "put back a copy, or delete the folder to start anew"
      )
    return None

  def _is_whole(self, step: int, items: tuple[str, ...]) -> bool:
    """Tells whether the files of `items` are as they were written; a warning on stderr says what is not."""
    if step in self._saved:
      return True
    if not (self.folder / str(step)).exists():
      return False
    for item in items:
      if (step, item) not in self._damage:
        damage = self._damage[step, item] = find_damage(self.folder / str(step), item)
        if damage:
          _warn(f"the checkpoint {self.folder / str(step)} is damaged and passed over: {damage}")
      if self._damage[step, item]:
        return False
    return True

  def _move_aside(self, steps: list[int]) -> None:
    """Makes room for new checkpoints of the damaged `steps`, without deleting what may still be of use."""
    if self._read_only or not steps:
      return
    if jax.process_index() == 0:
      for step in steps:
        target = self.folder / "damaged" / f"{step}-{time.strftime('%Y%m%d-%H%M%S')}"
        target.parent.mkdir(exist_ok=True)
        (self.folder / str(step)).rename(target)
        _warn(f"moved it to {target}; delete it when it is of no more use")
    from_first_process(0)  # nobody lists the folder before it is done
    self._manager.reload()

  def _warn_of_half_written(self) -> None:
    if jax.process_index() == 0 and self.folder.exists():
      for path in sorted(self.folder.iterdir()):
        if ocp.utils.TMP_DIR_SUFFIX in path.name:
          _warn(f"{path} was left half-written when an earlier run ended; it is removed")

  def _write_digests(self) -> None:
    """Called by Orbax when all files of a checkpoint are written, just before it gets its final name."""
    if jax.process_index() == 0:
      temporary = [path for path in self.folder.iterdir() if path.name.split(".")[0] == str(self._saving_step)]
      for folder in temporary:  # one
        write_digests(folder, skip=_WRITTEN_LAST)


def _list(steps: list[int]) -> str:
  return "steps " + ", ".join(map(str, steps)) if steps else "none"


def _warn(message: str) -> None:
  print(f"warning: {in_one_line(message)}", file=sys.stderr, flush=True)
