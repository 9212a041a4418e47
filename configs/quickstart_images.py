"""Images: 64 x 64 tiles of the nine training photographs, tested on tiles of two others.

  python train.py --config=configs/quickstart_images.py --workdir=runs/quickstart_images

samples.png in the work directory has rows of real, completed (the upper half is given) and sampled tiles. Numbers on
such tiles say nothing about ImageNet64.

A patch is a square of 4 x 4 pixels. The local model also sees the whole patch to the left, so most pixels have both of
their known neighbours in front of it; the global model adds what is further away. A window is eight rows of pixels.
"""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, MeshConfig, OptimizerConfig


def get_config():
  return Config(
    model=MegabyteConfig(
      context=8 * 64 * 3,  # many short steps; a whole tile a step learns far less in the same time
      levels=(
        Level(patch_size=48, width=192, num_layers=1, num_heads=4, rotary=True),
        Level(patch_size=1, width=96, num_layers=1, num_heads=3, rotary=True, cross_patch=48),
      ),
      norm="rmsnorm",
      bias=False,
      activation="swiglu",
      qk_norm=True,
      dropout=0.0,
      init_std=0.04,
      parent_init="balanced",
      scan_layers="never",
    ),
    data=DataConfig(
      train="sample:images/train",
      validation="sample:images/validation",
      form="image",
      image_size=64,
      image_tiles=512,
      scan_patch=48,
    ),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, warmup_steps=100),
    checkpoint=CheckpointConfig(every_steps=1000),
    mesh=MeshConfig(data=1, seq=-1),  # two windows a step; where there are several devices they share the patches
    batch_size=2,
    num_steps=1700,
    log_every=100,
    sample_bytes=4 * 64 * 64 * 3,
  ).to_config_dict()
