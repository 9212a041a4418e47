"""Continues a text with a trained model.

python -m megabyte_jax.generate --workdir=runs/quickstart --prompt="It is a truth" --bytes=400
"""

from __future__ import annotations

import argparse
import codecs
import os
import sys

import numpy as np

from megabyte_jax import command_line
from megabyte_jax.atomic_file import replacing
from megabyte_jax.config_parsing import ConfigError, require
from megabyte_jax.pretrained import load, step_argument
from megabyte_jax.progress import Progress, duration, human
from megabyte_jax.sampling import Sampling, generate


def parse_arguments() -> argparse.Namespace:
  """The command line; see the head of this file."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", default="runs/quickstart", help="the folder of a train.py run")
  parser.add_argument("--step", type=step_argument, metavar="N|best", help="checkpoint; default: the newest")
  parser.add_argument("--prompt", default="", help="text to continue")
  parser.add_argument("--prompt-file", default="", help="a file to continue, instead of --prompt")
  parser.add_argument("--bytes", type=int, default=400, help="to generate")
  parser.add_argument("--num-samples", type=int, default=1, help="continuations, generated side by side")
  parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable byte")
  parser.add_argument("--top-k", type=int, default=0, help="only the k most probable bytes; 0: all")
  parser.add_argument("--top-p", type=float, default=1.0, help="only the most probable bytes that reach p together")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--output", default="", help="write the raw bytes (prompt included) here; {} numbers samples")
  args = parser.parse_args()
  require(not (args.prompt and args.prompt_file), "give --prompt or --prompt-file, not both")
  require(
    args.num_samples == 1 or not args.output or "{}" in args.output,
    f"--output={args.output} names one file for {args.num_samples} samples; put {{}} where their number goes",
  )
  if args.prompt_file and not os.path.isfile(args.prompt_file):
    raise ConfigError(f"--prompt-file={args.prompt_file} does not exist")
  return args


def main() -> None:
  """Loads the model, streams one sample or shows progress on several, prints or writes them."""
  args = parse_arguments()
  sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
  prompt = args.prompt.encode("utf-8", "surrogateescape")  # bytes that are no UTF-8 come through as they are
  if args.prompt_file:
    with open(args.prompt_file, "rb") as file:
      prompt = file.read()
  model, _, step = load(args.workdir, args.step)
  print(f"step {step} of {args.workdir}", file=sys.stderr)
  streams = args.num_samples == 1 and not args.output
  show = StreamedText() if streams else None
  if streams:
    show.write(prompt)
  progress = Progress("generating", total=args.bytes * args.num_samples, enabled=not streams)

  def on_bytes(new: np.ndarray) -> None:
    if streams:
      show.write(new.tobytes())
    progress.add(new.size)

  options = dict(num_samples=args.num_samples, sampling=sampling, seed=args.seed, on_bytes=on_bytes)
  with progress:
    made = generate(model, prompt, args.bytes, **options)
  if streams:
    show.close()
    seconds = progress.seconds
    speed = human(args.bytes / seconds, "B/s")
    print(f"{args.bytes:,} bytes in {duration(seconds)} ({speed}, compilation included)", file=sys.stderr)
  for number, sample in enumerate(made.bytes_):
    text = prompt + sample.tobytes()
    if args.output:
      with replacing(args.output.replace("{}", str(number))) as path:
        path.write_bytes(text)
    elif not streams:
      print(f"--- sample {number} ---\n{text.decode(errors='replace')}")


class StreamedText:
  """Writes bytes to the terminal as text as they come; a character that is split waits for its other bytes."""

  def __init__(self):
    self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def write(self, data: bytes) -> None:
    """Prints what is complete."""
    sys.stdout.write(self.decoder.decode(data))
    sys.stdout.flush()

  def close(self) -> None:
    """Prints what is left, and ends the line."""
    sys.stdout.write(self.decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
  command_line.run(main)
