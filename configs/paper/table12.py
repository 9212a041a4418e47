"""Table 12: patch size on Image256, equal GPU hours and data, bits per byte.

  python train.py --config=configs/paper/table12.py:patch192 --workdir=runs/table12/patch192
  python eval.py --workdir=runs/table12/patch192

The paper's numbers: patch48 3.178, patch192 3.158, patch768 3.186. Local models have 11, 12 and 8 layers.
"""

from megabyte_jax.paper import rows

ROWS = {
  "patch48": rows.image256_megabyte((768, 12), (768, 11), patch_size=48),
  "patch192": rows.image256_megabyte((768, 12), (768, 12), patch_size=192),
  "patch768": rows.image256_megabyte((768, 12), (768, 8), patch_size=768),
}


def get_config(name=""):
  return rows.select(ROWS, name)
