"""Table 16: patch scan against raster scan on Image256, bits per byte.

  python train.py --config=configs/paper/table16.py:megabyte_raster_scan --workdir=runs/table16/megabyte_raster_scan
  python eval.py --workdir=runs/table16/megabyte_raster_scan

The paper's numbers: megabyte 3.158 (patch), 3.428 (raster); perceiver_ar 3.373 (patch), 3.552 (raster).
It prints each model's sizes beside the other's name; here they are as in Table 15.
"""

from megabyte_jax.paper import rows

ROWS = {
  "megabyte_patch_scan": rows.image256_megabyte(),
  "megabyte_raster_scan": rows.image256_megabyte(scan="raster"),
  "perceiver_ar_patch_scan": rows.image256_perceiver_ar(),
  "perceiver_ar_raster_scan": rows.image256_perceiver_ar(scan="raster"),
}


def get_config(name=""):
  return rows.select(ROWS, name)
