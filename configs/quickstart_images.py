"""Images: 64 x 64 tiles of the nine training photographs, tested on tiles of two others.

  python train.py --config=configs/quickstart_images.py --workdir=runs/quickstart_images

Takes 5.5 minutes of processor time on two cores, final evaluation and samples included. 4.85 bits per byte on the 168
tiles of the two photographs, where gzip -9 needs 5.49, bzip2 -9 4.77 and xz -9e 4.39; it still learns when it stops.
samples.png in the work directory has rows of real, completed (the upper half is given) and sampled tiles. Numbers on
such tiles say nothing about ImageNet64.
"""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, MeshConfig, OptimizerConfig


def get_config():
  return Config(
    model=MegabyteConfig(
      context=64 * 64 * 3,
      levels=(
        Level(patch_size=48, width=192, num_layers=2, num_heads=4),  # squares of 4 x 4 pixels
        Level(patch_size=1, width=64, num_layers=2, num_heads=2, rotary=True, cross_patch=48),
      ),
      dropout=0.0,
      init_std=0.02,
    ),
    data=DataConfig(
      train="sample:images/train",
      validation="sample:images/validation",
      form="image",
      image_size=64,
      image_tiles=512,
      scan_patch=48,
    ),
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=50),
    checkpoint=CheckpointConfig(every_steps=100),
    mesh=MeshConfig(data=1, seq=-1),  # one image a step; where there are several devices they share its patches
    batch_size=1,
    num_steps=400,
    log_every=20,
    sample_bytes=4 * 64 * 64 * 3,
  ).to_config_dict()
