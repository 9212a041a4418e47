"""Audio: three short recordings at 16 kHz, one mu-law byte a sample, tested on a fourth.

  pip install "megabyte_jax[audio]"
  python train.py --config=configs/quickstart_audio.py --workdir=runs/quickstart_audio

Takes 4 minutes of processor time on two cores, final evaluation and samples included. 4.69 bits per byte on the fourth
recording, where gzip -9 needs 4.16, xz -9e 3.38 and bzip2 -9 2.93: thirteen seconds of sound to learn from are few, and
the loss is still falling. The work directory gets real.wav, completed.wav (its first half is given) and sampled.wav.
"""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, OptimizerConfig


def get_config():
  return Config(
    model=MegabyteConfig(
      context=1024,
      levels=(
        Level(patch_size=8, width=128, num_layers=2, num_heads=4),
        Level(patch_size=1, width=64, num_layers=2, num_heads=2, rotary=True, cross_patch=8),
      ),
      dropout=0.1,
      init_std=0.02,
    ),
    data=DataConfig(
      train="sample:audio/train",
      validation="sample:audio/validation",
      form="audio",
      sample_rate=16000,
      encoding="mulaw8",
    ),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=50),
    checkpoint=CheckpointConfig(every_steps=200),
    batch_size=8,
    num_steps=500,
    log_every=50,
    sample_bytes=32000,
  ).to_config_dict()
