"""Audio: thirteen seconds of three recordings at 16 kHz, 16 bits a sample, tested on the three seconds of a fourth.

  pip install -e ".[audio]"
  python train.py --config=configs/quickstart_audio.py --workdir=runs/quickstart_audio

The work directory gets real.wav, completed.wav (its first half is given) and sampled.wav.
"""

from megabyte_jax.config import CheckpointConfig, Config, DataConfig, Level, MegabyteConfig, MeshConfig, OptimizerConfig


def get_config():
  return Config(
    model=MegabyteConfig(
      context=1024,
      levels=(
        Level(patch_size=16, width=128, num_layers=1, num_heads=4, rotary=True),
        Level(patch_size=1, width=64, num_layers=1, num_heads=2, rotary=True, cross_patch=16),
      ),
      norm="rmsnorm",
      bias=False,
      activation="swiglu",
      qk_norm=True,
      dropout=0.0,
      init_std=0.04,
      scan_layers="never",
    ),
    data=DataConfig(
      train="sample:audio/train",
      validation="sample:audio/validation",
      form="audio",
      sample_rate=16000,
      encoding="pcm16",
    ),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, warmup_steps=100, weight_decay=0.1),
    checkpoint=CheckpointConfig(every_steps=1000),
    batch_size=2,
    mesh=MeshConfig(data=1, seq=-1),  # two windows a step; where there are several devices they share the patches
    num_steps=3300,
    log_every=100,
    sample_bytes=64000,
  ).to_config_dict()
