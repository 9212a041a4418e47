"""The quick start: a small MEGABYTE on the two novels shipped with the package.

  python train.py

TIME and RESULT are in the README.
"""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, OptimizerConfig


def get_config():
  return Config(
    model=MegabyteConfig(
      context=256,
      levels=(
        Level(patch_size=4, width=128, num_layers=3, num_heads=4),
        Level(patch_size=1, width=64, num_layers=2, num_heads=2),
      ),
      dropout=0.0,  # a few passes over the data: nothing to regularise
      init_std=0.02,  # the paper's 0.006 is for widths of 1024 and more; narrow layers start slowly with it
    ),
    data=DataConfig(train="sample:text/train", validation="sample:text/validation"),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=100),
    checkpoint=CheckpointConfig(every_steps=500),
    batch_size=8,
    num_steps=2300,
    log_every=50,
    sample_bytes=300,
  ).to_config_dict()
