"""A model small enough to train in a second, for the tests of the commands; dropout is on."""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, OptimizerConfig

LEVELS = (
  Level(patch_size=4, width=32, num_layers=1, num_heads=4),
  Level(patch_size=1, width=16, num_layers=1, num_heads=4),
)


def get_config(levels="2"):
  """With `levels` 1 the global level alone, which is quicker to compile."""
  return Config(
    model=MegabyteConfig(
      context=32,
      levels=LEVELS[: int(levels)],
      init_std=0.02,
    ),
    data=DataConfig(train="sample:text/train", validation=""),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    checkpoint=CheckpointConfig(every_steps=0),
    batch_size=8,
    num_steps=12,
    log_every=1,
  ).to_config_dict()
