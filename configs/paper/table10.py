"""Table 10: what each component of MEGABYTE is worth, bits per byte, equal compute and data in a column.

  python train.py --config=configs/paper/table10.py:arxiv_without_local --workdir=runs/table10/arxiv_without_local
  python eval.py --workdir=runs/table10/arxiv_without_local

Names are DATA_ROW. The paper's numbers:

                        arxiv    audio   image256
  megabyte              0.6871   3.477   3.158
  without_local         1.263    5.955   4.768
  without_global        1.373    3.659   3.181
  without_cross_patch   0.6781   3.481   3.259
  with_cnn              0.6871   3.475   3.155

Without a global model the local one keeps its cross-patch attention: one component is left out at a time.
"""

from megabyte_jax.paper import rows
from megabyte_jax.paper.rows import audio_megabyte, image256_megabyte, megabyte, run, text, text_megabyte

ROWS = {
  "arxiv_megabyte": text_megabyte("arxiv"),
  "arxiv_without_local": run(
    megabyte((2560, 20), None, patch_size=4, context=8192), text("arxiv"), batch_size=48, learning_rate=1.5e-4
  ),
  "arxiv_without_global": run(megabyte(None, (1024, 24), patch_size=8, context=8192), text("arxiv"), batch_size=192),
  "arxiv_without_cross_patch": text_megabyte("arxiv", (2048, 17), (1024, 24), cross_patch=False),
  "arxiv_with_cnn": text_megabyte("arxiv", (2048, 13), (1024, 18), conv=True),
  "audio_megabyte": audio_megabyte(),
  "audio_without_local": audio_megabyte((4096, 32), None),
  "audio_without_global": audio_megabyte(None, (768, 12)),
  "audio_without_cross_patch": audio_megabyte((1024, 24), (768, 14), cross_patch=False),
  "audio_with_cnn": audio_megabyte(conv=True),
  "image256_megabyte": image256_megabyte(),
  "image256_without_local": image256_megabyte((4096, 32), None, patch_size=48),
  "image256_without_global": image256_megabyte(None, (768, 12)),
  # Table 15 says 250M and no shape: twice the layers of 125M.
  "image256_without_cross_patch": image256_megabyte((768, 24), (768, 15), cross_patch=False),
  "image256_with_cnn": image256_megabyte(conv=True),
}


def get_config(name=""):
  return rows.select(ROWS, name)
