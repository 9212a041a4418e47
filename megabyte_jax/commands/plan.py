"""Tells what a run needs on TPUs, without one: compiles the real step ahead of time for a topology.

  python -m megabyte_jax plan --config=configs/paper/table5.py:image256_megabyte --topology=v5p:2x2x4
  python -m megabyte_jax plan --config=... --topology=v6e:16x16 --mesh=fsdp=64,seq=4 --batch_size=128 --remat=named
  python -m megabyte_jax plan --config=... --topology=v5e:16x16 --search       # tries meshes, batch sizes, remat
  python -m megabyte_jax plan --config=... --step=generate --json              # train (default), eval or generate
  python -m megabyte_jax plan --config=... --save=step.pickle                  # keeps the executable; see `save`

Needs libtpu, not a TPU: pip install "jax[tpu]". Topologies have the form KIND:SIZE, with sizes of chips: v4:2x2x2,
v5e:4x4 ... 16x16, v5p:2x2x1 ..., v6e:4x4 ... 16x16, tpu7x:2x2x1 ... . Devices of tpu7x are half a chip. The exit code
is 1 if the step does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line, stopping
from megabyte_jax.config import Config
from megabyte_jax.config.levels import Remat
from megabyte_jax.display.progress import duration, human
from megabyte_jax.errors import require
from megabyte_jax.files.outputs import check_output_file
from megabyte_jax.models import flops

if TYPE_CHECKING:
  import jax

  from megabyte_jax.planning.plans import Plan

STEPS = ("train", "eval", "generate")
_GIB = 2**30


def describe(plan: Plan) -> str:
  """Returns the plan as text for people."""
  from megabyte_jax.planning.plans import BETWEEN, axes_text, remedies, windows_of

  config, model, unit = plan.config, plan.config.model, plan.config.data.unit
  counted = "B" if unit == "byte" else "tokens"
  axes = axes_text(plan.mesh)
  cost = flops.flops_per_byte(model, training=plan.step == "train")
  size = [f"{config.batch_size} x {model.context:,} {unit}s", f"remat {model.remat}"]
  if config.accumulate > 1 and plan.step == "train":
    size.append(f"in {config.accumulate} parts")
  how = "compiled quickly" if plan.quick else "compiled"
  lines = [
    f"topology    {plan.topology}: {plan.chips} chips, {plan.devices} devices ({plan.kind}), mesh {axes}",
    f"model       {human(model.parameter_count())} parameters, {human(cost, 'FLOP')} per {unit} of {plan.step}",
    f"step        {plan.step}, {', '.join(size)}; {how} in {duration(plan.seconds)}",
  ]
  of = f"of {plan.memory / _GIB:.1f} GiB a device"
  if plan.arguments:
    parts = [(plan.arguments, "arguments"), (plan.temporaries, "temporaries"), (plan.output, "output")]
    shown = " + ".join(f"{size / _GIB:.2f} {name}" for size, name in parts)
    lines.append(f"memory      {plan.total / _GIB:.2f} GiB {of} ({shown})")
  lines.append("fits        yes" if plan.fits else f"fits        no: {plan.reason}")
  if not plan.fits:
    lines.append(f"try         {remedies(plan)}")
  for kind, (count, sent) in sorted(plan.wire.items()):
    lines.append(f"{kind:<26}{count:>6} a step, each device sends {human(sent, 'B')}")
  if plan.bounds:
    b = plan.bounds
    network = f", network {1e3 * b.network:.1f} ms" if b.network else ""
    if not b.network and any(BETWEEN in kind for kind in plan.wire):
      network = ", network not counted (its rate is not known)"
    lines += [
      f"bounds      compute {1e3 * b.compute:.1f} ms, memory ~{1e3 * b.memory:.1f} ms, links {1e3 * b.links:.1f} ms"
      + network,
      f"at best     {1e3 * b.step:.1f} ms a step, MFU {100 * b.mfu:.0f}%, "
      f"{human(windows_of(config, plan.step) * model.predicted_bytes / b.step, counted + '/s')}",
    ]
  if plan.days is not None:
    total = config.num_steps * config.bytes_per_step
    hours = 24 * plan.days
    time = f"{duration(3600 * hours)} and {hours * plan.chips:,.1f} chip-hours at best"
    lines.append(f"run         {config.num_steps:,} steps, {human(total, counted)}: {time}")
  return "\n".join(lines)


def to_json(plan: Plan) -> str:
  """Returns the plan as one JSON object on one line."""
  values = dataclasses.asdict(plan)
  values["config"] = plan.config.to_dict()
  values["parameters"] = plan.config.model.parameter_count()
  values["days"] = plan.days
  if plan.bounds:
    values["bounds"] |= {"step": plan.bounds.step, "mfu": plan.bounds.mfu}
  return json.dumps(values)


def save(executable: jax.stages.Compiled, path: str | os.PathLike) -> None:
  """Writes the executable for devices of the same topology, where JAX and libtpu have the same versions.

  There `jax.experimental.serialize_executable.deserialize_and_load(*pickle.loads(pathlib.Path(path).read_bytes()))`
  makes it callable, without compiling. Unpickling runs code: load only files that you wrote.
  """
  from jax.experimental.serialize_executable import serialize

  from megabyte_jax.files.atomic_file import replacing

  with replacing(path) as file:
    file.write_bytes(pickle.dumps(serialize(executable)))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own) and the config that it names.

  Raises:
    ConfigError: flags do not go together, or no file can be written at --save.
  """
  parser = flags.Parser(flags.called("plan"), description=__doc__)
  parser.add_config("config", "what to plan, and any --config.KEY=VALUE")
  parser.add_argument("--topology", default="v5p:4x4x4", metavar="KIND:SIZE", help="in chips; default: v5p:4x4x4")
  parser.add_argument(
    "--slices", type=int, default=1, help="slices of that topology, joined by the data centre's network"
  )
  parser.add_argument("--mesh", default="", help="devices per axis, like fsdp=16,seq=4; default: the config's")
  parser.add_argument(
    "--batch_size",
    type=int,
    default=0,
    help="windows per step; num_steps changes with it, so that the bytes stay the same (--config.batch_size leaves it)",
  )
  parser.add_argument(
    "--accumulate", type=int, default=0, help="parts a batch is worked through in; 0 takes the config's"
  )
  parser.add_argument("--remat", default="", choices=["", *get_args(Remat)], help="default: the config's")
  parser.add_argument("--step", default="train", choices=STEPS, help="what to compile")
  parser.add_argument(
    "--quick", action="store_true", help="compile in a third of the time; memory may come out a fifth too small"
  )
  parser.add_argument(
    "--search", action="store_true", help="try meshes, remat, parts and, without --batch_size, batches; recommend one"
  )
  parser.add_argument("--tries", type=int, default=8, help="combinations that --search compiles at most")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  parser.add_argument(
    "--save", type=flags.path, default="", metavar="FILE", help="keep the serialized executable in this file"
  )
  args = parser.parse_args(arguments)
  if args.save:
    check_output_file("--save", args.save)
  require(not (args.search and args.quick), "--search ends with the real program; leave out --quick")
  parts = args.config.accumulate
  if args.batch_size and not args.accumulate and isinstance(parts, int) and parts > 1:
    args.accumulate, args.config.accumulate = parts, 1  # they divide the batch that is planned, not the config's
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Compiles as the command line says, and prints the plan; ends with exit code 1 if the step does not fit."""
  args = parse_arguments(arguments)
  import jax

  from megabyte_jax.planning.plans import changed, lay_out, make_plan
  from megabyte_jax.planning.search import search
  from megabyte_jax.planning.topologies import topology_devices

  jax.config.update("jax_platforms", "cpu")  # nothing runs here, and a TPU of this machine may be busy
  devices = topology_devices(args.topology, args.slices)
  config = changed(
    Config.from_dict(args.config),
    batch_size=args.batch_size,
    accumulate=args.accumulate,
    remat=args.remat,
    mesh=args.mesh,
  )
  with stopping.at_once():  # compilers hold Python for minutes, and nothing is lost
    if args.search:
      sizes = (config.batch_size,) if args.batch_size else ()
      plan, executable = search(config, args.topology, devices, args.step, tries=args.tries, batch_sizes=sizes)
    else:
      lay_out(config, devices, args.step)  # what is wrong is said first
      print(f"compiling for {args.topology}, which can take minutes", file=sys.stderr, flush=True)
      plan, executable = make_plan(config, args.topology, devices, args.step, quick=args.quick)
  print(to_json(plan) if args.json else describe(plan), flush=True)
  if args.save:
    require(executable is not None, f"--save={args.save}: nothing was written, for the step does not fit")
    save(executable, args.save)
  if not plan.fits:
    raise SystemExit(1)


if __name__ == "__main__":
  command_line.run(main)
