"""Audio (section 8): raw 16 kHz, 16-bit speech, bits per byte.

  python train.py --config=configs/paper/audio.py:megabyte --workdir=runs/audio/megabyte
  python eval.py --workdir=runs/audio/megabyte

The paper's numbers: transformer 3.567, perceiver_ar 3.543, megabyte 3.477. MEGABYTE reads 524,288 bytes
(16 seconds) at once. Its batch is the 32 of the text; Table 15 says 256.
"""

import dataclasses

from megabyte_jax.paper import rows

ROWS = {
  "transformer": rows.run(rows.transformer((768, 13), 1024), rows.audio(), batch_size=2048),
  "perceiver_ar": rows.run(
    rows.perceiver_ar((768, 6), 8192, 1024),
    dataclasses.replace(rows.audio(), documents="whole"),  # random spans of each recording
    batch_size=384,
  ),
  "megabyte": rows.audio_megabyte(),
}


def get_config(name=""):
  return rows.select(ROWS, name)
