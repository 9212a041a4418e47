"""The quick start: a small MEGABYTE on the two novels shipped with the package.

  python train.py

Some minutes on two cores; 2.024 bits per byte on the validation text, where bzip2 -9 needs 2.561. Muon, RMSNorm,
QK-norm and rotary positions are of configs/modern.py; docs/results.md has what each was worth.
"""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, MeshConfig, OptimizerConfig


def get_config():
  return Config(
    model=MegabyteConfig(
      context=256,
      levels=(
        Level(patch_size=4, width=128, num_layers=2, num_heads=4, rotary=True),
        Level(patch_size=1, width=64, num_layers=2, num_heads=2, rotary=True, cross_patch=4),
      ),
      norm="rmsnorm",
      bias=False,
      qk_norm=True,
      dropout=0.0,  # a few passes over the data: nothing to regularise
      init_std=0.04,  # the paper's 0.006 suits widths of 1024 and more; narrow layers start slowly with it
      parent_init="balanced",
      scan_layers="never",  # a few layers: a tenth faster
    ),
    data=DataConfig(train="sample:text/train", validation="sample:text/validation"),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, warmup_steps=100, weight_decay=0.1),
    checkpoint=CheckpointConfig(every_steps=1000),
    batch_size=4,
    mesh=MeshConfig(data=1, seq=-1),  # four windows a step; where there are several devices they share the patches
    num_steps=2800,
    log_every=100,
    sample_bytes=300,
  ).to_config_dict()
