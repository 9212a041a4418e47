"""python -m megabyte_jax.generate: see generate_command.py. On import, the function of this name takes its place."""

import sys

if __name__ == "__main__":
  from megabyte_jax import command_line, generate_command

  command_line.run(generate_command.main)
else:  # an import binds what stands here to megabyte_jax.generate, which otherwise would no longer be the function
  from megabyte_jax.sampling import generate

  sys.modules[__name__] = generate  # type: ignore[assignment]  # a function in place of a module
