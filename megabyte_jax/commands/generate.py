r"""Continues a text, an image or a recording with a trained model.

python -m megabyte_jax generate --workdir=runs/quickstart --prompt="It is a truth" --bytes=400
python -m megabyte_jax generate --workdir=runs/quickstart --prompt="It is" --stop='\n\n'   to the end of the paragraph
python -m megabyte_jax generate --workdir=IMAGE_RUN --prompt-file=photo.jpg --num-samples=8 --output=completed.png
python -m megabyte_jax generate --workdir=AUDIO_RUN --prompt-file=clip.wav --output=longer.wav
"""

from __future__ import annotations

import argparse
import codecs
import os
import re
import sys
from collections.abc import Sequence

from megabyte_jax.commands import arguments as flags
from megabyte_jax.commands import command_line
from megabyte_jax.display.progress import Progress, duration, human
from megabyte_jax.errors import DataError, require
from megabyte_jax.files import inputs, outputs


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Reads the command line (None: this process's own).

  Raises:
    ConfigError: flags do not go together, one names no file that can be read or written, or --output exists.
  """
  parser = flags.Parser(flags.called("generate"), description=__doc__)
  flags.add_run_arguments(parser)
  parser.add_argument("--prompt", default="", help="text to continue")
  parser.add_argument("--prompt-file", type=flags.path, default="", help="a file to continue, instead of --prompt")
  parser.add_argument("--keep", type=float, help="the share of the file to keep; default: 0.5 of an image, else 1")
  parser.add_argument("--bytes", type=int, help="to generate; default: 400, the rest of an image, 2 seconds of audio")
  parser.add_argument(
    "--stop", default="", help=r"a text that ends a sample; \n, \t, \r, \0, \\ and \xHH stand for one byte each"
  )
  parser.add_argument("--num-samples", type=int, default=1, help="continuations, generated side by side; default: 1")
  parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the most probable byte; default: 1.0")
  parser.add_argument("--top-k", type=int, default=0, help="only the k most probable bytes; 0: all")
  parser.add_argument("--top-p", type=float, default=1.0, help="only the most probable bytes that reach p together")
  parser.add_argument("--seed", type=int, default=0, help="of the samples; the same gives the same ones; default: 0")
  parser.add_argument(
    "--output",
    type=flags.path,
    default="",
    help="write samples, prompt included, here instead of to standard output; {} numbers them: .png of an image model "
    "(without {} a grid), .wav of an audio model, else raw bytes",
  )
  parser.add_argument("--force", action="store_true", help="overwrite the files of --output, if they exist")
  parser.add_argument(
    "--weights", default="", choices=["", "int8"], help="int8: matrices in 8 bits, half the memory to read for a byte"
  )
  parser.add_argument("--mesh", default="", help="spread the model over all devices, such as fsdp=4,tensor=2")
  args = parser.parse_args(arguments)
  require(not (args.prompt and args.prompt_file), "give --prompt or --prompt-file, not both")
  require(args.bytes is None or args.bytes >= 0, f"--bytes is {args.bytes}; it must not be negative")
  require(args.num_samples >= 1, f"--num-samples is {args.num_samples}; it must be at least 1")
  for name in ("bytes", "num_samples"):  # positions are numbers of 32 bits
    flag, value = f"--{name.replace('_', '-')}", getattr(args, name) or 0
    require(value < 2**31, f"{flag} is {value}; it must be at most {2**31 - 1}")
  require(-(2**31) <= args.seed < 2**32, f"--seed is {args.seed}; it must be between {-(2**31)} and {2**32 - 1}")
  require(args.keep is None or bool(args.prompt_file), "--keep is for --prompt-file")
  if args.prompt_file:
    what = "is a folder" if os.path.isdir(args.prompt_file) else "does not exist"
    found = os.path.exists(args.prompt_file) and not os.path.isdir(args.prompt_file)  # a file, or a pipe
    require(found, f"--prompt-file={args.prompt_file} {what}; name one file")
    inputs.check_readable(args.prompt_file, DataError)
  require(bool(args.output) or not args.force, "--force is for --output")
  if args.output:
    for number in range(args.num_samples if "{}" in args.output else 1):
      path = args.output.replace("{}", str(number))
      inputs.check_not_replaced("--output", path, args.prompt_file)
      if not args.force:
        outputs.check_new_file("--output", path)
    outputs.check_output_file("--output", args.output)
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Loads the model, streams one sample or shows progress on several, prints or writes them."""
  args = parse_arguments(arguments)
  import numpy as np

  from megabyte_jax.checkpoints.saved_config import load_config
  from megabyte_jax.checkpoints.trained_model import describe_step, load
  from megabyte_jax.data.subwords.tokenizer import load_tokenizer
  from megabyte_jax.generation import media_files
  from megabyte_jax.generation.media_files import Prompt
  from megabyte_jax.generation.sampling import Sampling, generate
  from megabyte_jax.generation.subword_text import generate_text
  from megabyte_jax.parallel.compilation_cache import keep_compiled_programs
  from megabyte_jax.parallel.sharding import make_mesh, parse_mesh

  sampling = Sampling(temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
  config = load_config(args.workdir)
  data = config.data
  if args.prompt_file:
    prompt = media_files.read_prompt(args.prompt_file, data, args.keep)
  else:  # bytes that are not UTF-8 come through as they are
    x = np.frombuffer(args.prompt.encode("utf-8", "surrogateescape"), np.uint8)
    prompt = Prompt(x, x)
  num_bytes = media_files.default_bytes(data, prompt) if args.bytes is None else args.bytes
  media_files.check_output(args.output, data, args.num_samples, prompt, num_bytes)
  require(not args.stop or data.form in ("bytes", "subwords"), "--stop is for models of text")
  tokenizer = load_tokenizer(data.tokenizer, data.tokenizer_sha256) if data.form == "subwords" else None
  mesh = make_mesh(parse_mesh(args.mesh, data=1)) if args.mesh else None
  keep_compiled_programs()
  model, _, step = load(args.workdir, args.step, mesh)
  print(describe_step(args.workdir, step, config), file=sys.stderr)
  given = len(tokenizer.encode(prompt.kept.tobytes())) if tokenizer else prompt.kept.size
  if given > model.config.context and not model.config.recurrent:
    seen = f"the last {model.config.context:,} of the prompt's {given:,} {data.unit}s"
    print(f"the model sees at most {seen}", file=sys.stderr)
  streams = args.num_samples == 1 and not args.output
  show = Output()
  if streams:
    show.write(prompt.kept.tobytes())
  first_alone = tokenizer is not None and args.num_samples > 1  # samples of subwords differ in length: one is counted
  label, total = ("first sample", num_bytes) if first_alone else ("generating", num_bytes * args.num_samples)
  progress = Progress(label, total=total, compiles=True, enabled=not streams)

  def on_bytes(new: np.ndarray) -> None:
    if streams:
      show.write(new.tobytes())
    progress.add(new.size)

  def on_text(new: bytes) -> None:
    on_bytes(np.frombuffer(new, np.uint8))

  options = dict(num_samples=args.num_samples, sampling=sampling, seed=args.seed, weights=args.weights)
  text = prompt.kept.tobytes()
  stop = stop_bytes(args.stop) or None
  try:
    with progress:
      if tokenizer:
        texts = generate_text(model, tokenizer, text, num_bytes, stop=stop or b"", on_bytes=on_text, **options)
      else:
        made = generate(model, text, num_bytes, stop=stop, on_bytes=on_bytes, **options)
        texts = [x[:n].tobytes() for x, n in zip(made.bytes_, made.lengths, strict=True)]
  finally:
    if streams:
      show.end()
  if streams:
    seconds = progress.seconds
    speed = human(progress.done / seconds, "B/s")
    print(f"{int(progress.done):,} bytes in {duration(seconds)} ({speed}, compilation included)", file=sys.stderr)
    return
  samples = [np.concatenate([prompt.kept, np.frombuffer(x, np.uint8)]) for x in texts]
  if args.output:
    media_files.write(args.output, samples, data, prompt)
  else:
    for number, sample in enumerate(samples):
      show.write(f"--- sample {number} ---\n".encode() + sample.tobytes() + b"\n")


def stop_bytes(text: str) -> bytes:
  r"""Returns the bytes that --stop names: \n, \t, \r, \0, \\ and \xHH are one each, any other backslash is itself."""
  named = {b"n": b"\n", b"t": b"\t", b"r": b"\r", b"0": b"\0", b"\\": b"\\"}
  return re.sub(
    rb"\\(?:x([0-9a-fA-F]{2})|([ntr0\\]))",
    lambda found: bytes.fromhex(found[1].decode()) if found[1] else named[found[2]],
    text.encode("utf-8", "surrogateescape"),
  )


class Output:
  """Standard output: bytes as they are, or text as they come where it is a terminal.

  There a character that is split waits for its other bytes, and what the terminal cannot show becomes a `?`.
  """

  def __init__(self):
    self.text = sys.stdout.isatty()
    self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

  def write(self, data: bytes) -> None:
    """Writes what is complete."""
    self._put(self.decoder.decode(data) if self.text else data)

  def end(self) -> None:
    """Writes what is left, and on a terminal ends the line."""
    if self.text:
      self._put(self.decoder.decode(b"", final=True) + "\n")

  def _put(self, data: str | bytes) -> None:
    sys.stdout.buffer.write(data if isinstance(data, bytes) else data.encode(sys.stdout.encoding, "replace"))
    sys.stdout.flush()


if __name__ == "__main__":
  command_line.run(main)
